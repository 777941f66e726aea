"""Chat templates: the text that transformers makes of them, within limits whatever they ask for."""

import json
import time

import pytest

from model.errors import InputError
from model.text import template_sandbox
from model.text.chat_template import MESSAGES_TEMPLATE, encode_chat, render_template

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message ="
    " messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
    " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' }}
            {{- reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
EVERYTHING = (
    "{% macro line(role, text='') %}{{ role ~ ': ' ~ text }}\\n{% endmacro %}{% for m in messages if m.content %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ line(m.role|upper|replace('U', 'u'), text=m.content|trim) }}"
    "{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.previtem.role if loop.previtem }}{% else %}none"
    "{% endfor %}"
    "{% set parts = messages | map(attribute='content') | list %}{{ parts | join(' / ') }}{{ parts }}"
    "{% generation %}{{ '%s-%03d' | format('a', 7) }}{{ '{:>5}'.format('x') }}{{ '-' * 10 }}{% endgeneration %}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ dict(a=1).items() | list }}"
    "{{ {'b': [1, 2.5, none, true]} | tojson }}{{ 2 ** 10 + 7 % 4 }}{{ ['x', 'y'] | tojson(indent=2) }}"
    "{{ 'a\\nb' | indent(4) }}{{ range(3) | list }}{{ 'a,b'.split(',') | last }}{{ none | default('d', true) }}"
    "{%- for key, value in messages[0].items() | sort %}{{ key }}={{ value }};{% endfor %}{{ tools }}{{ nothing }}"
    "{% filter upper %}x{{ eos_token }}{% endfilter %}{% set block %}{{ 1 }}b{% endset %}{{ block | title }}"
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}{{ strftime_now('%Y') }}"
)
HISTORY = [
    {"role": "system", "content": "你是助手。 "},
    {"role": "user", "content": "  你好\\n"},
    {"role": "assistant", "content": "<think>\\n嗯\\n</think>\\n\\n你好！"},
    {"role": "user", "content": "再见"},
]


@pytest.mark.long
@pytest.mark.parametrize("template", [MESSAGES_TEMPLATE, LLAMA_2, LLAMA_3, QWEN_3, EVERYTHING])
@pytest.mark.parametrize("history", [HISTORY, HISTORY[1:], HISTORY[1:2]])
def test_the_text_is_what_transformers_makes(tokenizer, template, history):
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert render_template(tokenizer, history) == expected
    calls = [*history, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]
    if template == QWEN_3:
        expected = tokenizer.apply_chat_template(calls, tokenize=False, add_generation_prompt=True)
        assert render_template(tokenizer, calls) == expected


def test_the_default_of_several_templates_is_used(tokenizer):
    tokenizer.chat_template = {"default": "a{{ messages|length }}", "tool_use": "b"}
    assert render_template(tokenizer, HISTORY) == "a4"


def grown(start: str, step: str, then: str = "") -> str:
    """A template that changes a value 64 times."""
    turn = f"{{% for i in range(64) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{turn}{then}"


MUCH = {
    "a text of 100 GB": "{{ 'x' * 10**11 }}",
    "64 MB": "{{ 'x' * 64000000 }}",
    "a list of 100 GB": "{{ ([0] * 10**10) | length }}",
    "a number without end": "{{ 10 ** (10 ** 10) }}",
    "squares without end": grown("9", "ns.x * ns.x"),
    "doubling by ~": grown("'ab'", "ns.x ~ ns.x"),
    "doubling by +": grown("'ab'", "ns.x + ns.x"),
    "doubling a list": grown("[1]", "ns.x + ns.x"),
    "a list of itself": grown("['ab']", "[ns.x, ns.x]", "{{ ns.x }}"),
    "the same as JSON": grown("['ab']", "[ns.x, ns.x]", "{{ ns.x | tojson | length }}"),
    "a width in %": "{{ '%10000000000d' % 1 }}",
    "a width in %, by filter": "{{ '%10000000000d' | format(1) }}",
    "a width in %*d": "{{ '%*d' % (10**10, 1) }}",
    "a width in format": "{{ '{:10000000000}'.format(1) }}",
    "a width in format's argument": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "many fields": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "centred": "{{ 'x'.center(10**10) }}",
    "zeros": "{{ 'x'.zfill(10**10) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) | length }}",
    "replaced": "{{ ('x' * 10000000).replace('x', 'y' * 10000000) | length }}",
    "replaced, by filter": "{{ ('x' * 10000000) | replace('x', 'y' * 10000000) | length }}",
    "joined": "{{ ('x' * 10000000).join(range(90000) | map('string') | list) | length }}",
    "joined, by filter": "{{ range(90000) | join('x' * 10000000) | length }}",
    "translated": "{{ ('x' * 10000000).translate({120: 'y' * 10000000}) | length }}",
    "indented": "{{ ('x\\n' * 1000000) | indent(1000000) | length }}",
    "JSON indented": "{{ range(90000) | list | tojson(indent=1000000) | length }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "rounded": "{{ 5 | round(-10**9) }}",
    "rounded up": "{{ 5 | round(10**9, 'ceil') }}",
    "a billion turns": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "turns that write": "{% set x %}{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    "recursive turns": "{% for a in range(999) recursive %}{{ loop(range(999)) if loop.depth < 6 }}{% endfor %}",
    "macros that recurse": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "filters in turns": "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "lists summed": "{{ ([[1] * 1000] * 15000) | sum(start=[]) | length }}",
    "a range": "{{ range(10**9) | list }}",
    "much output": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
}  # fmt: skip

TWINS = (
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
MUCH |= {
    what: TWINS + use
    for what, use in {
        "equal": "{{ ns.a == ns.b }}",
        "less": "{{ 0 < 1 and ns.a < ns.b }}",
        "a member": "{{ ns.a in [ns.b] }}",
        "a member of an iterator": "{{ ns.a in ([ns.b] | map('default')) }}",
        "equal, by test": "{{ ns.a is eq ns.b }}",
        "equal, by select": "{{ [ns.a] | select('equalto', ns.b) | list | length }}",
        "a key": "{{ {ns.t: 1} | length }}",
        "a look-up": "{{ {}[ns.t] }}",
        "a look-up by get": "{{ {}.get(ns.t) }}",
        "an index": "{{ [ns.a].index(ns.b) }}",
        "views": "{{ {'x': ns.a}.items() == {'x': ns.b}.items() }}",
        "sets": "{{ {ns.t: 1}.keys() - {}.keys() }}",
        "a view's text": "{{ {'x': ns.a}.items() }}",
        "a namespace's text": "{{ ns }}",
        "text by ~": "{{ (ns.a ~ '') | length }}",
        "a field's text": "{{ '{0.a}'.format(ns) }}",
        "sorted by attribute": "{{ [namespace(x=ns.a), namespace(x=ns.b)] | sort(attribute='x') | length }}",
        "sorted iterator": "{{ [ns.a, ns.b] | map('list') | sort | length }}",
        "changed": "{% for i in [1] %}{{ loop.changed(ns.a) }}{% endfor %}",
    }.items()
}
MUCH["slices"] = (
    "{% set ns = namespace(s='x' * 16000000, all=[]) %}"
    "{% for i in range(99999) %}{% set ns.all = ns.all + [ns.s[1:]] %}{% endfor %}"
)
MUCH["joined iterator"] = "{{ 'x'.join(([('x' * 10000000)] * 10000) | map('string')) | length }}"
MUCH["stripped"] = "{{ ('a' * 16000000).strip('b' * 8000000 + 'a') | length }}"


@pytest.mark.long
@pytest.mark.parametrize("template", MUCH.values(), ids=MUCH)
def test_a_template_that_asks_for_too_much_is_one_line(tokenizer, monkeypatch, template):
    monkeypatch.setattr(template_sandbox, "SECONDS", 1)
    tokenizer.chat_template, clock = template, time.process_time()
    with pytest.raises(InputError, match="the tokenizer's chat template") as raised:
        render_template(tokenizer, HISTORY)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    assert "TypeError" not in str(raised.value)  # a limit, not a slip in the template
    assert time.process_time() - clock < 20  # seconds of this process alone: a minute and more without limits


@pytest.mark.parametrize(
    "template",
    ["{{ cycler() }}", "{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "{{ 10.0 ** 999 }}", "{{ [1](" * 999],
)
def test_whatever_a_template_raises_is_one_line(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="^the tokenizer's chat template ") as raised:
        render_template(tokenizer, HISTORY)
    assert "\n" not in str(raised.value)


def test_comparisons_and_slices_give_what_python_gives(tokenizer):
    tokenizer.chat_template = (
        "{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 3 < 2 < nothing }} {{ [1, 2] == [1, 2] }} {{ (1, 2) in [(1, 2)] }} "
        "{{ 'b' not in {'a': 1} }} {{ 2 in ([1, 2] | map('int')) }} {{ 'abcd'[1:3] }}{{ [1, 2, 3][::-1] }} "
        "{{ {(1, 2): 'x'}[(1, 2)] }} {{ 2 is gt 1 }} {{ {'a': 1}.keys() - {'b': 1}.keys() }}"
    )
    expected = "True False False True True True True bc[3, 2, 1] x True {'a'}"
    assert render_template(tokenizer, HISTORY) == expected


def test_a_template_reaches_nothing_of_python(tokenizer):
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.a }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% include 'x' %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match="chat template"):
            render_template(tokenizer, HISTORY)


@pytest.mark.parametrize("template", ["{% if false %}x{% endif %}", "", "{{ '' }}"])
def test_a_template_that_makes_no_text_is_one_line(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template makes no text of this history; repair or remove it"):
        encode_chat(tokenizer, HISTORY)


def test_a_long_chat_is_well_within_the_limits(tokenizer):
    tokenizer.chat_template = QWEN_3
    history = [{"role": role, "content": "你好，世界。" * 200} for _ in range(400) for role in ("user", "assistant")]
    assert len(render_template(tokenizer, history)) > 900_000
    assert json.dumps(history, ensure_ascii=False)

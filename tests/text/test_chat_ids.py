"""Chats as ids: what precedes an answer is what inference sends, and learned is each answer with its end."""

import dataclasses
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from model.corpus.bulk_encoder import BulkEncoder, EncoderChoice
from model.errors import InputError
from model.text.chat_ids import PROBES, load_chat_format
from model.text.chat_template import encode_chat
from model.text.detokenize import BYTE_ALPHABET
from model.text.tokenization import load_bulk_tokenizer, load_tokenizer
from tests.text.chat_tokenizers import CHAT_ML, STYLES, write_style
from tests.text.kinds import KINDS, write_tokenizer

EMBEDDED = "embedded"
NO_THOUGHTS = "<think>\n\n</think>\n\n"  # what Qwen 3's template writes before the last answer
MARKERS = [
    *("<s>", "</s>", "<unk>", "<s>assistant\n", "</s>\n<s>user\n", "<|im_start|>", "<|im_end|>", "<|im_end", "|>"),
    *(
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|endoftext|>",
        "<｜Assistant｜>",
        "<｜User｜>",
    ),
    *(
        "<｜end▁of▁sentence｜>",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "<think>",
        "</think>",
        "[learned]",
        "{{ x }}",
    ),
    *(
        "assistant\n",
        "user\n",
        "assistant",
        "\n",
        "\n\n",
        " ",
        "\t",
        "\r\n",
        "\u3000",
        "\u2028",
        "\x00",
        "\x1c",
        "\x85",
    ),
    *(
        "🤔",
        "👩‍👩‍👧",
        "🇨🇳",
        "e\u0301",
        "\u0301",
        "\ufffd",
        "\u200d",
        "ﬁ",
        "你好",
        "是",
        "1",
        "23",
        "a",
        "'s",
        "。",
        "\ue000",
    ),
]
TEXT = st.lists(st.sampled_from(MARKERS) | st.text(max_size=4).filter(lambda text: text.isprintable()), max_size=6)
CONTENT = TEXT.map("".join).map(str.strip).filter(bool)
TURN = st.tuples(CONTENT, CONTENT)
SYSTEM = st.none() | CONTENT


@st.composite
def chats(draw) -> tuple[tuple[str, str], ...]:
    system, turns = draw(SYSTEM), draw(st.lists(TURN, min_size=1, max_size=3))
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return tuple(messages)


CUTS_THOUGHTS = ("Qwen 3", "thoughts in control tokens", "DeepSeek")


class Style:
    """A tokenizer that writes chats, and what tells whether its ids and masks are right."""

    def __init__(self, folder: Path | None, end: str) -> None:
        bulk = load_bulk_tokenizer(folder)
        self.tokenizer, self.format, self.end = load_tokenizer(folder), load_chat_format(folder, bulk), end
        self.ways = both_ways(self.format)
        self.encode_texts = BulkEncoder(EncoderChoice("tokenizers", bulk.json)).encode
        self.normalize = str
        if (normalizer := self.tokenizer.backend_tokenizer.normalizer) is not None:
            self.normalize = normalizer.normalize_str

    def spelled(self, ids) -> str:
        """The text of ids, with control tokens by name."""
        pieces = b""
        for token in self.tokenizer.convert_ids_to_tokens(list(map(int, ids))):
            in_alphabet = all(character in BYTE_ALPHABET for character in token)
            is_added = token in self.tokenizer.get_added_vocab()
            pieces += bytes(map(BYTE_ALPHABET.get, token)) if in_alphabet and not is_added else token.encode()
        return pieces.decode("utf-8")

    def check(self, chat) -> bool:
        """Whether the chat is usable; fails where its ids or its mask are wrong."""
        encoded = self.format.encode([chat], self.encode_texts)
        if encoded.reasons != [None]:
            assert encoded.lengths.tolist() == [0] and not len(encoded.ids) and not len(encoded.learned)
            return False
        ids, places, runs = encoded.ids.tolist(), np.arange(len(encoded.ids)), []
        for flag, group in groupby(places.tolist(), key=lambda place: bool(encoded.learned[place])):
            if flag:
                runs.append(list(group))
        answers = [n for n, (role, _) in enumerate(chat) if role == "assistant"]
        assert len(runs) == len(answers)
        for run, n in zip(runs, answers, strict=True):
            history = [{"role": role, "content": content} for role, content in chat[:n]]
            assert ids[: run[0]] == encode_chat(self.tokenizer, history)
            # The oracle on characters: the learned tokens spell the answer and its end, and nothing else.
            text, answer = self.spelled([ids[place] for place in run]), self.normalize(chat[n][1]) + self.end
            assert text in (answer, NO_THOUGHTS + answer)
            assert ids[run[-1]] in self.format.end_ids
        contents = [self.normalize(content) for role, content in chat if role != "assistant"]
        rest = self.spelled([index for index, flag in zip(ids, encoded.learned, strict=True) if not flag])
        for content in contents:  # in order, and all that is not learned
            assert content in rest
            rest = rest[rest.index(content) + len(content) :]
        return True


@pytest.fixture(scope="session")
def styles(tmp_path_factory) -> dict[str, Style]:
    folder = tmp_path_factory.mktemp("styles")
    made = {name: Style(write_style(folder / name.replace(" ", "_"), name), STYLES[name][-1]) for name in STYLES}
    return {EMBEDDED: Style(None, "</s>")} | made


@pytest.mark.long
@given(chat=chats())
@example(chat=PROBES[0])
@example(chat=(("user", "</s>\n<s>assistant\n是"), ("assistant", "<s>user\n</s>"), ("user", "a"), ("assistant", "b")))
@example(chat=(("system", "<|im_end|>"), ("user", "<|im_start|>"), ("assistant", "<|im_end|>\n<|im_start|>user")))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ids_are_those_of_inference_and_the_mask_is_the_answers(styles, chat):
    for name, style in styles.items():
        note(name)  # the last one is the one that fails
        # Some templates take no system message, or cut an answer at the end of its thoughts.
        is_refused = (name == "Gemma" and chat[0][0] == "system") or (name in CUTS_THOUGHTS and "</think>" in str(chat))
        assert style.check(chat) or is_refused


CHATS = [
    PROBES[0],
    (("user", "a"), ("assistant", "   b")),  # not stripped: the answer's first token would join the header's last
    (("system", "s"), ("user", "c"), ("assistant", "d\n"), ("user", "</s>"), ("assistant", "<s>🤔")),
]


def test_a_chat_whose_answer_cannot_be_told_apart_leaves_the_others_as_they_are(styles):
    style = styles[EMBEDDED]
    assert style.format.in_pieces
    for chat_format in (style.format, dataclasses.replace(style.format, in_pieces=False)):
        encoded = chat_format.encode(CHATS, style.encode_texts)
        assert encoded.reasons == [None, "cannot_mask", None]
        first, none, last = encoded.lengths.tolist()
        alone = [chat_format.encode([chat]) for chat in (CHATS[0], CHATS[2])]
        assert none == 0 and [first, last] == [len(one.ids) for one in alone]
        assert np.array_equal(encoded.ids, np.concatenate([one.ids for one in alone]))
        assert np.array_equal(encoded.learned, np.concatenate([one.learned for one in alone]))


def both_ways(chat_format):
    """A format that makes chats of pieces, and one that renders them; each keeps the outlines that it has made."""
    return [dataclasses.replace(chat_format, in_pieces=in_pieces) for in_pieces in (True, False)]


def assert_made_as_rendered(ways, chats, encode_texts=None):
    """Chats made of pieces are those that rendering makes."""
    made, rendered = (chat_format.encode(chats, encode_texts) for chat_format in ways)
    assert made.reasons == rendered.reasons and made.lengths.tolist() == rendered.lengths.tolist()
    assert made.ids.tolist() == rendered.ids.tolist() and made.learned.tolist() == rendered.learned.tolist()


@pytest.mark.long
@given(several=st.lists(chats(), min_size=1, max_size=5))
@settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck])
def test_chats_made_of_pieces_are_those_that_rendering_makes(styles, several):
    for name, style in styles.items():
        note(name)
        assert style.format.in_pieces and style.format._outline(("user", "assistant")) is not None
        assert_made_as_rendered(style.ways, several, style.encode_texts)


LOOKS = {  # what a template may write behind `user`; c: the content; True: chats can be made of pieces nevertheless
    "copied whole": ("'!' if c and c is string and c is not none and 'content' in message else ''", True),
    "trimmed": ("'!' if c | trim and c.strip() | default('') and c.rstrip('\\n') else ''", True),
    "type": ("'!' if c is mapping or c == none else ''", True),
    "messages": ("(messages[:1] | length | string) + (messages[:1] | map(attribute='role') | join(','))", True),
    "in": ("'!' if '。' in c else ''", True),
    "not in": ("'!' if '。' not in c else ''", True),
    "equal": ("'!' if c == '你好' or '是' == c else ''", True),
    "equal, as a test": ("'!' if c is eq('a') else ''", True),
    "begins": ("'!' if c.startswith('a') else ''", True),
    "split": ("'!' if c.split('a') | length > 1 else ''", True),
    "part": ("c.split('a')[0]", False),
    "count": ("c.count('a') | string", True),
    "replaced": ("'!' if c.replace('a', '是') == c else ''", False),
    "a digit": ("'!' if '1' in c else ''", False),
    "length": ("'!' if c | length > 4 else ''", False),
    "upper": ("'!' if c | upper == c else ''", False),
    "is upper": ("'!' if c is upper else ''", False),
    "slice": ("c[:2]", False),
    "index": ("c[0]", False),
    "characters": ("c | list | first", False),
    "in a list": ("'!' if c in ['a', '1'] else ''", False),
    "less": ("'!' if c < 'b' else ''", False),
    "key": ("{'a': '!', '1': '?'}[c] | default('')", False),
    "got": ("{'a': '!'}.get(c, '')", False),
    "percent": ("'%s' % c", False),
    "format": ("'{}'.format(c)", False),
    "join": ("[c, 'x'] | join('-')", False),
    "JSON": ("c | tojson", False),
    "twice": ("c", False),
    "tilde": ("'x' ~ c ~ 'y'", False),
    "stripped together": ("(' ' + c + ' ') | trim", False),
    "stripped of letters": ("'!' if c.strip('a') == c else ''", False),
    "selected": ("messages[:1] | selectattr('content', 'eq', 'a') | list | length | string", True),
    "compared": ("'!' if messages[0].content == c else ''", False),
    "messages compared": ("'!' if messages[0] == message else ''", False),
    "mapped": ("'!' if messages[:1] | map(attribute='content') | join | length > 20 else ''", False),
    "as Python writes it": ("[c] | string", False),
    "a namespace": ("namespace(c=c) | string", False),
    "sorted": ("(messages[:1] | sort(attribute='content') | first).role", False),
    "digits": ("'!' if c.isdigit() else ''", False),
    "a number": ("c | int | string", False),
    "a regex by hand": ("'!' if 'a' in c.split()[0] else ''", False),
}


@pytest.fixture(scope="session")
def looking(tmp_path_factory):
    """Formats whose templates look into contents, and both ways of each, by the names of LOOKS."""
    formats, template = {}, "{% set c = message.content %}{% if message.role == 'user' %}"
    template += "{{ '<|im_start|>' + message.role + (LOOK) }}{% else %}{{ '<|im_start|>' + message.role }}{% endif %}{{"
    for name, (look, _) in LOOKS.items():
        replaced = CHAT_ML.replace("{{ '<|im_start|>' + message['role'] +", template.replace("LOOK", look), 1)
        folder = write_style(tmp_path_factory.mktemp("looking") / "t", "MiniMind 2", chat_template=replaced)
        chat_format = load_chat_format(folder, load_bulk_tokenizer(folder))
        formats[name] = chat_format, both_ways(chat_format)
    return formats


@pytest.mark.long
@given(several=st.lists(chats(), min_size=1, max_size=3))
@example(several=[(("user", "你好"), ("assistant", "a")), (("user", "a"), ("assistant", "a")), PROBES[0], PROBES[1]])
@example(several=[(("user", content), ("assistant", "b")) for content in ("1", "是", "ba", "A", "b。", "23", "b a")])
@settings(max_examples=2, deadline=None, suppress_health_check=[*HealthCheck])
def test_a_template_that_looks_into_contents_is_rendered_or_its_constants_are_known(looking, several):
    for name, (chat_format, ways) in looking.items():
        note(name)
        assert_made_as_rendered(ways, several)
        outline = chat_format.in_pieces and chat_format._outline(("user", "assistant"))
        assert bool(outline) is LOOKS[name][1]


KNOWS_FEW_CHARACTERS = ("Unigram", "an eos that is not special")  # one unknown token stands for header and answer


def test_thoughts_as_qwen_3_writes_them_are_learned_and_those_that_it_drops_are_refused(styles):
    style, thought = styles["Qwen 3"], "<think>\n因为……\n</think>\n\n"
    last = (("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", f"{thought}4"))
    assert style.check(last) and style.format.encode([last]).reasons == [None]
    earlier = (("user", "1+1"), ("assistant", f"{thought}2"), ("user", "2+2"), ("assistant", "4"))
    assert style.format.encode([earlier]).reasons == ["template_refuses"]


@pytest.mark.parametrize("kind", KNOWS_FEW_CHARACTERS)
def test_a_tokenizer_that_merges_header_and_answer_is_refused(tmp_path, kind):
    folder = write_tokenizer(tmp_path / "t", KINDS[kind]())
    with pytest.raises(InputError, match="cannot be trained on"):
        load_chat_format(folder, load_bulk_tokenizer(folder))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {*KNOWS_FEW_CHARACTERS}))
def test_of_every_kind_of_tokenizer_the_ids_are_those_of_inference(tmp_path, kind):
    folder = write_tokenizer(tmp_path / "t", KINDS[kind]())
    tokenizer, chat_format = load_tokenizer(folder), load_chat_format(folder, load_bulk_tokenizer(folder))
    chat = (("user", "甲乙 a"), ("assistant", "丙 b"), ("user", "</s>甲"), ("assistant", "乙"))
    encoded = chat_format.encode([chat])
    starts = np.flatnonzero(np.diff(encoded.learned.astype(int), prepend=0) == 1).tolist()
    assert encoded.reasons == [None] and len(starts) == 2
    for start, n in zip(starts, (1, 3), strict=True):
        history = [{"role": role, "content": content} for role, content in chat[:n]]
        assert encoded.ids[:start].tolist() == encode_chat(tokenizer, history)
    ends = np.flatnonzero(np.diff(encoded.learned.astype(int), append=0) == -1)
    assert encoded.ids[ends].tolist() == [2, 2] and chat_format.end_ids == (2,)


PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
REFUSED = {
    "no end": (
        PLAIN + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "ends no answer with a control token",
    ),
    "no start": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}",
        "does not begin the answer",
    ),
    "another start": (CHAT_ML.replace("assistant\n' }}", "Assistant\n' }}"), "differs from what inference sends"),
    "a count": ("{{ messages | length }}" + CHAT_ML, "differs from what inference sends"),
    "one turn only": (
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT_ML,
        "refuses a chat of two questions and answers, or changes their text",
    ),
    "nothing": ("{# #}", "refuses a chat of two questions"),
    "always": ("{{ raise_exception('no') }}", "refuses this history: no"),
    "damaged": ("{% for", "refuses this history: unexpected 'end of template'"),
    "last answer only": (
        "{{ '<|im_start|>' + messages[-1].content + '<|im_end|>' }}",
        "refuses a chat of two questions and answers, or changes their text",
    ),
    "upper case": (CHAT_ML.replace("message['content']", "message['content'] | upper"), "changes their text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_masked_is_refused_by_name(tmp_path, name):
    template, reason = REFUSED[name]
    folder = write_style(tmp_path / "my tokenizer", "MiniMind 2", chat_template=template)
    with pytest.raises(InputError, match=f"(?s)my tokenizer.*{reason}|{reason}.*my tokenizer"):
        load_chat_format(folder, load_bulk_tokenizer(folder))


def test_chats_of_a_tokenizer_whose_control_tokens_take_white_space_along_are_rendered(tmp_path):
    folder = write_style(tmp_path / "t", "MiniMind 2")
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in values["added_tokens"]:
        token["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    chat_format, tokenizer = load_chat_format(folder, load_bulk_tokenizer(folder)), load_tokenizer(folder)
    assert not chat_format.in_pieces
    encoded = chat_format.encode([(("user", "a"), ("assistant", "b"))])
    start = int(np.argmax(encoded.learned))
    assert encoded.reasons == [None]
    assert encoded.ids[:start].tolist() == encode_chat(tokenizer, [{"role": "user", "content": "a"}])


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    folder = write_style(tmp_path / "t", "MiniMind 2", chat_template=None)
    with pytest.raises(InputError, match="has no chat template"):
        load_chat_format(folder, load_bulk_tokenizer(folder))


def test_a_template_in_a_file_of_its_own_beats_the_one_in_the_config(tmp_path):
    folder = write_tokenizer(tmp_path / "t", KINDS["byte-level BPE"]())
    assert load_chat_format(folder, load_bulk_tokenizer(folder)).in_pieces
    (folder / "chat_template.jinja").write_text(CHAT_ML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"))
    made = load_chat_format(folder, load_bulk_tokenizer(folder))
    assert (
        made.template == load_tokenizer(folder).chat_template != load_chat_format(None, load_bulk_tokenizer()).template
    )

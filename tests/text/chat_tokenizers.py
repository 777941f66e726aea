"""Small tokenizers with the chat templates in use: their shapes and control tokens are those of the real ones."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.text.kinds import special, write_tokenizer

CHAT_ML = (  # MiniMind 2 and many others
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' "
    "and not message.tool_calls %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
# Qwen 3's, and MiniMind 3's after it: thoughts of earlier turns go, the last answer has a block for them.
QWEN_3 = (
    "{%- set ns = namespace(last_query_index=messages|length - 1, found=false) %}\n"
    "{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if not ns.found and message.role == 'user' %}\n"
    "        {%- set ns.found = true %}{%- set ns.last_query_index = index %}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n"
    "    {%- if message.role != 'assistant' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "    {%- else %}\n"
    "        {%- set reasoning = '' %}\n"
    "        {%- if '</think>' in content %}\n"
    "            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "        {%- endif %}\n"
    "        {%- if loop.index0 > ns.last_query_index %}\n"
    "            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}\n"
    "        {%- else %}\n"
    "            {{- '<|im_start|>assistant\\n' }}\n"
    "        {%- endif %}\n"
    "        {{- content.lstrip('\\n') + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)
SMOL_LM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MINIMIND_1 = (  # with the question as the model's own turn: the answer has no header but the prompt's
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>user\n' + message['content'] + '</s>\n<s>assistant\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' + '\n' }}{% endif %}{% endfor %}"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?", 1)
TRAINED_ON = [
    "你好，有什么可以帮助你的吗？",
    "中国是一个历史悠久的国家。",
    "user\nassistant\n\n",
    "The quick brown fox.",
] * 3


def _byte_level(steps: list, tokens: list[str], normalizer=None, plain: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE with these steps before the bytes and these control tokens; `plain`: added tokens of text."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    use_regex = not steps or isinstance(steps[-1], pre_tokenizers.Digits)  # else the steps have split the words
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*steps, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TRAINED_ON, trainer)
    backend.add_special_tokens(special(*tokens))
    backend.add_tokens(list(plain))
    return backend


def _split(words: str) -> list:
    return [pre_tokenizers.Split(Regex(words), "isolated")]


CHAT_ML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
GEMMA_TOKENS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
STYLES = {  # name: (backend, bos, eos, template, the token that ends an answer)
    "Qwen 2.5": (
        lambda: _byte_level(_split(QWEN_WORDS), CHAT_ML_TOKENS, normalizers.NFC()),
        None, "<|im_end|>", QWEN_2_5, "<|im_end|>",
    ),
    "Qwen 3": (
        lambda: _byte_level(
            _split(QWEN_WORDS), CHAT_ML_TOKENS, normalizers.NFC(), ("<think>", "</think>")
        ),
        None, "<|im_end|>", QWEN_3, "<|im_end|>",
    ),
    "thoughts in control tokens": (
        lambda: _byte_level([], [*CHAT_ML_TOKENS, "<think>", "</think>"]),
        None, "<|im_end|>", QWEN_3, "<|im_end|>",
    ),
    "MiniMind 2": (lambda: _byte_level([], CHAT_ML_TOKENS), "<|im_start|>", "<|im_end|>", CHAT_ML, "<|im_end|>"),
    "MiniMind 1": (lambda: _byte_level([], ["<s>", "</s>"]), "<s>", "</s>", MINIMIND_1, "</s>"),
    "Llama 3": (
        lambda: _byte_level(_split(LLAMA_WORDS), LLAMA_3_TOKENS),
        "<|begin_of_text|>", "<|end_of_text|>", LLAMA_3, "<|eot_id|>",
    ),
    "DeepSeek": (
        lambda: _byte_level(
            [pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"), pre_tokenizers.Digits(individual_digits=True)],
            DEEPSEEK_TOKENS,
        ),
        DEEPSEEK_TOKENS[0], DEEPSEEK_TOKENS[1], DEEPSEEK, DEEPSEEK_TOKENS[1],
    ),
    "SmolLM2": (
        lambda: _byte_level([pre_tokenizers.Digits(individual_digits=True)], CHAT_ML_TOKENS),
        "<|im_start|>", "<|im_end|>", SMOL_LM_2, "<|im_end|>",
    ),
    "Gemma": (lambda: _byte_level([], GEMMA_TOKENS), "<bos>", "<eos>", GEMMA, "<end_of_turn>"),
}  # fmt: skip


def write_style(folder: Path, name: str, **changes) -> Path:
    """The tokenizer of a style as a folder; `changes` to its tokenizer_config.json."""
    backend, bos, eos, template, _ = STYLES[name]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "unk_token": None}
    return write_tokenizer(folder, backend(), **about, **({"chat_template": template} | changes))

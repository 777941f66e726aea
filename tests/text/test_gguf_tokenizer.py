"""The tokenizer inside a GGUF file. llama.cpp itself is asked in tests/text/gguf_tokenizers.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from model.errors import InputError
from model.storage.gguf_header import GGUFFile
from model.text.gguf_tokenizer import read_tokenizer, write_tokenizer
from model.text.pre_tokenizers import BY_NAME
from model.text.tokenization import EMBEDDED_TOKENIZER, encode_texts, load_tokenizer
from model.text.tokenizer_folder import read_folder, same_tokenizer
from tests.conftest import ROOT
from tests.text.gguf_tokenizers import sample_texts, write_pairs

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROWS = 6400


def write_gguf(file: Path, folder: Path, rows: int = ROWS, change=None, **options) -> dict:
    """A GGUF file with a folder's tokenizer, whose metadata `change` may spoil first; its fields as they are read."""
    writer = gguf.GGUFWriter(file, "llama")
    write_tokenizer(writer, folder, rows, **options)
    if change:
        change(writer.kv_data[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(file).fields


def through_gguf(folder: Path, here: Path, rows: int = ROWS, change=None, **options) -> Path:
    """The folder that comes of writing a tokenizer into a GGUF file and reading it back."""
    here.mkdir(exist_ok=True)
    fields = write_gguf(here / "model.gguf", folder, rows, change, **options)
    read_tokenizer(fields, here / "back", here / "model.gguf")
    return here / "back"


def copy_of(folder: Path, target: Path, tokenizer=None, config=None) -> Path:
    """A copy of a tokenizer folder, with changes to its two files."""
    shutil.copytree(folder, target)
    for name, change in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        value = json.loads((target / name).read_text(encoding="utf-8"))
        if change:
            change(value)
        (target / name).write_text(json.dumps(value), encoding="utf-8")
    return target


def ids_of(folder: Path, texts: list[str], control: bool = False) -> list[list[int]]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = not control
    return [found.ids for found in backend.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sample_texts(300, ["<unk>", "<s>", "</s>"])


def add_token(text: str, special: bool = True, **properties):
    """A change to tokenizer.json that adds a token."""

    def change(tokenizer: dict) -> None:
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        index = len({*tokenizer["model"]["vocab"], *(token["content"] for token in tokenizer["added_tokens"])})
        tokenizer["added_tokens"].append(token | {"id": index, "content": text} | properties)

    return change


# ------------------------------------------------------------------------------------------------ the embedded one


@pytest.mark.long
def test_the_embedded_tokenizer_comes_back_as_it_was(tmp_path, texts):
    back = through_gguf(EMBEDDED_TOKENIZER, tmp_path)
    before, after = (json.loads((folder / "tokenizer.json").read_bytes()) for folder in (EMBEDDED_TOKENIZER, back))
    assert after.pop("post_processor")["type"] == "TemplateProcessing"  # the bos, which llama.cpp adds
    assert before.pop("post_processor") is None
    assert after == before
    assert same_tokenizer(EMBEDDED_TOKENIZER, back)
    ours, theirs = load_tokenizer(), load_tokenizer(back)
    assert encode_texts(theirs, texts) == encode_texts(ours, texts)
    assert theirs.chat_template == ours.chat_template
    assert theirs("你好").input_ids == [1, *ours("你好").input_ids]
    assert theirs.decode(theirs("a  b, 「你好」!").input_ids, skip_special_tokens=True) == "a  b, 「你好」!"


@pytest.mark.long
def test_what_the_file_says_of_the_embedded_tokenizer(tmp_path):
    fields = write_gguf(tmp_path / "model.gguf", EMBEDDED_TOKENIZER, ROWS + 3)
    said = {key.split(".", 1)[1]: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    tokens, types, merges = (said.pop(f"ggml.{key}") for key in ("tokens", "token_type", "merges"))
    config = json.loads((EMBEDDED_TOKENIZER / "tokenizer_config.json").read_bytes())
    assert said == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": config["chat_template"],
    }
    assert tokens[:4] + tokens[-3:] == ["<unk>", "<s>", "</s>", "!", "[PAD6400]", "[PAD6401]", "[PAD6402]"]
    assert types == [CONTROL] * 3 + [NORMAL] * (ROWS - 3) + [UNUSED] * 3
    assert all(merge.count(" ") == 1 and merge.replace(" ", "") in tokens for merge in merges)
    read_tokenizer(fields, tmp_path / "back", "model.gguf")
    assert same_tokenizer(EMBEDDED_TOKENIZER, tmp_path / "back")  # rows that only fill the embedding are no tokens
    assert (
        write_gguf(tmp_path / "b.gguf", EMBEDDED_TOKENIZER, add_bos=False)["tokenizer.ggml.add_bos_token"].contents()
        is False
    )


@pytest.mark.long
def test_tokenizers_that_differ_are_distinguished(tmp_path):
    def no_template(config: dict) -> None:
        del config["chat_template"]

    def one_merge_less(tokenizer: dict) -> None:
        tokenizer["model"]["merges"].pop()

    other = copy_of(EMBEDDED_TOKENIZER, tmp_path / "template", config=no_template)
    assert not same_tokenizer(EMBEDDED_TOKENIZER, other)
    other = copy_of(EMBEDDED_TOKENIZER, tmp_path / "merge", one_merge_less)
    assert not same_tokenizer(EMBEDDED_TOKENIZER, other)
    other = copy_of(EMBEDDED_TOKENIZER, tmp_path / "same")
    assert same_tokenizer(EMBEDDED_TOKENIZER, other)
    (other / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert not same_tokenizer(EMBEDDED_TOKENIZER, other)


# ------------------------------------------------------------------------------------------------- pre-tokenizers

SAMPLE = (
    "I'LL  go 12345 don't\r\n a,b=/\n\n\u3000在中国1945年。「中」 camelsCase 'Sie `x`e\u0301 x \n\n\n zA"
    " ze\u0301\u0301z We'reX  "
)
# How many bytes each token has that llama.cpp 0.3.36 (llama-cpp-python) makes of the sample, with pairs of bytes.
RECORDED = {
    "gpt-2": "1121121221121222112221222212212212112212221222212111221211212221122112",
    "smollm": "11211211111112122211222122221111112212112212221222212111221211212221122112",
    "llama-bpe": "1211121212121222212121222212111221211221222122221212221211212221122112",
    "glm4": "1211121212121222212121222212111221211221222122221212221211212221122112",
    "dbrx": "1211121212121222212121222212111221211221222122221212221211212221122112",
    "qwen2": "1211121111111212222121212222111111221211221222122221212221211212221122112",
    "qwen35": "1211121111111212222121212222111111221211221222122221212221211222121122112",
    "deepseek-v3": "121112121212122221212122221211122121122122212222121222121122212112222",
    "deepseek-llm": "1121121221121111121121121222212212212222122212222121112211111212221121122",
    "deepseek-coder": "1121121111111211111211111121222211111122121122122212222121112211111212221121122",
    "seed-coder": "121112111111121222222212222111111221211221222122221212221211212221122112",
    "bailingmoe": "1211121111111212222121212222111111221211221222122221212221211212221122112",
    "tekken": "1211121111111212222121212222111111221211221222122221212221212112221122112",
    "gpt-4o": "1211121212121222212121222212111221211221222122221212221212112221122112",
    "falcon": "11211212121211122112221222212111221211221222122112111111221211212221121122",
    "default": "1121121212121112211222122221211122121122122212211212111221211212221121122",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A tokenizer whose tokens are all pairs of the sample's bytes: how it merges shows where a text was split."""
    folder = tmp_path_factory.mktemp("pairs")
    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str(SAMPLE)
    write_pairs(folder, BY_NAME["gpt-2"], {letter for piece, _ in pieces for letter in piece})
    return folder


@pytest.mark.parametrize("name", RECORDED)
def test_a_named_pre_tokenizer_splits_as_llama_cpp_does(tmp_path, pairs, name):
    def rename(metadata: dict) -> None:
        metadata["tokenizer.ggml.pre"].value = name

    back = through_gguf(pairs, tmp_path, 6_000, rename)
    tokens = Tokenizer.from_file(str(back / "tokenizer.json")).encode(SAMPLE, add_special_tokens=False).tokens
    assert "".join(str(len(token)) for token in tokens) == RECORDED[name]


def split_on(*patterns: str, use_regex: bool = False) -> dict:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level]}


ORIGINALS = {  # as they stand in the tokenizer.json of Qwen 3, Llama 3, DeepSeek V3 and SmolLM 2
    "qwen2": split_on(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama-bpe": split_on(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek-v3": split_on(
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_tokenizers_own_pre_tokenizer_gets_its_name_and_keeps_its_ids(tmp_path, pairs, texts, name):
    def original(tokenizer: dict) -> None:
        tokenizer["pre_tokenizer"] = ORIGINALS[name]
        tokenizer["model"]["ignore_merges"] = name == "llama-bpe"

    folder = copy_of(pairs, tmp_path / "original", original)
    back = through_gguf(folder, tmp_path / "gguf", 6_000)
    assert gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name
    texts = [text for text in texts if "ſ" not in text]  # 's in capitals, to some
    for control in (False, True):
        assert ids_of(back, texts, control) == ids_of(folder, texts, control)


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused_by_name(tmp_path):
    def spoil(key: str, value):
        def change(tokenizer: dict) -> None:
            tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"] | {key: value}

        return change

    def ignore_merges(tokenizer: dict) -> None:
        tokenizer["model"]["ignore_merges"] = True

    def splits(*patterns: str):
        def change(tokenizer: dict) -> None:
            tokenizer["pre_tokenizer"] = split_on(*patterns)

        return change

    cases = {
        "add_prefix_space": spoil("add_prefix_space", True),
        "ignore_merges true": ignore_merges,
        r"\\p{Han}+": splits(r"\p{Han}+"),
        "use_regex": spoil("use_regex", False),
    }
    for number, (said, change) in enumerate(cases.items()):
        folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / str(number), change)
        with pytest.raises(InputError, match="llama.cpp cannot have the same tokenizer: its pre-tokenizer") as error:
            write_gguf(tmp_path / "model.gguf", folder)
        assert said in str(error.value) and "gpt-2, smollm, llama-bpe" in str(error.value)
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- SentencePiece's kind


def best_score_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, word for word: merge the neighbours that form the best token, the leftmost of equals."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = ["".join(pair) for pair in zip(parts, parts[1:], strict=False)]
        known = [number for number, token in enumerate(joined) if token in scores]
        if not known:
            return parts
        best = max(known, key=lambda number: (scores[joined[number]], -number))
        parts[best : best + 2] = [joined[best]]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Path:
    """A tokenizer folder as conversions from SentencePiece make it: bytes as tokens, every merge that there can be."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    with open(ROOT / "dataset" / "classics_zh.jsonl", encoding="utf-8") as file:
        lines = [json.loads(next(file))["text"] for _ in range(60)]
    sentences = lines + ["The quick brown fox jumps over the lazy dog, don't they?", "  spaces   here"] * 20
    backend.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=2500, special_tokens=special, max_token_length=8, show_progress=False)
    )
    tokenizer = json.loads(backend.to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    model = tokenizer["model"]
    made = dict.fromkeys("".join(pair) for pair in model["merges"])
    cuts = ((token[:length], token[length:]) for token in made for length in range(1, len(token)))
    model["merges"] = [[left, right] for left, right in cuts if left in model["vocab"] and right in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.long
def test_bytes_as_tokens_are_written_with_scores_and_come_back(tmp_path, sentencepiece, texts):
    back = through_gguf(sentencepiece, tmp_path, 2600)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, types, scores = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "scores"))
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and types.count(BYTE) == 256 and types[-1] == UNUSED
    assert "tokenizer.ggml.merges" not in fields
    for control in (False, True):
        assert ids_of(back, texts, control) == ids_of(sentencepiece, texts, control)
    words = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    backend = Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in ["學而時習之，不亦說乎？", "The fox  jumps", "   ", "x🙂y", "子曰：「"] + texts[:20]:
        expected = [
            part if part in words else f"<0x{byte:02X}>"
            for part in best_score_first(text[:300], words)
            for byte in (part.encode() if part not in words else [0])
        ]
        assert backend.encode(text[:300], add_special_tokens=False).tokens == expected
    tokenizer = load_tokenizer(back)
    assert tokenizer.decode(encode_texts(tokenizer, [" 學而時習之 fox🙂"])[0]) == " 學而時習之 fox🙂"


@pytest.mark.long
def test_no_space_before_a_text(tmp_path, sentencepiece, texts):
    def no_prefix(tokenizer: dict) -> None:
        tokenizer["normalizer"] = tokenizer["normalizer"]["normalizers"][1]
        tokenizer["decoder"]["decoders"].pop()

    folder = copy_of(sentencepiece, tmp_path / "folder", no_prefix)
    back = through_gguf(folder, tmp_path / "gguf", 2600)
    assert ids_of(back, texts) == ids_of(folder, texts) != ids_of(sentencepiece, texts)
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


def test_what_scores_cannot_say_is_refused(tmp_path, sentencepiece):
    def apart(tokenizer: dict) -> None:
        merges = tokenizer["model"]["merges"]
        token = next(
            "".join(pair) for pair in merges if [merge[0] + merge[1] for merge in merges].count("".join(pair)) > 1
        )
        first = next(number for number, pair in enumerate(merges) if "".join(pair) == token)
        merges.append(merges.pop(first))

    def fewer(tokenizer: dict) -> None:
        tokenizer["model"]["merges"].pop()

    def metaspace(tokenizer: dict) -> None:
        tokenizer["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
        }  # fmt: skip

    def lower_case(tokenizer: dict) -> None:
        tokenizer["normalizer"]["normalizers"].append({"type": "Lowercase"})

    cases = {
        "are not together": apart,
        "merges lack": fewer,
        "Metaspace": metaspace,
        "does not just write spaces": lower_case,
        "looked for after normalizing": add_token("<call>", normalized=True),
    }
    for number, (said, change) in enumerate(cases.items()):
        folder = copy_of(sentencepiece, tmp_path / str(number), change)
        with pytest.raises(InputError, match=said):
            write_gguf(tmp_path / "model.gguf", folder, 2600)


# ----------------------------------------------------------------------------------------------- control tokens


@pytest.mark.long
def test_all_that_ends_a_text_is_kept(tmp_path):
    def tokens(tokenizer: dict) -> None:
        for text in ("<|im_end|>", "<|done|>"):
            add_token(text)(tokenizer)

    folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / "folder", tokens)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 6400, 6401]}')
    back = through_gguf(folder, tmp_path / "gguf", 6402)
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 6401  # llama.cpp knows the other by its name
    assert json.loads((back / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 6400, 6401],
        "bos_token_id": 1,
    }
    assert same_tokenizer(folder, back)


@pytest.mark.long
def test_added_tokens_are_control_tokens_or_words(tmp_path, texts):
    def tokens(tokenizer: dict) -> None:
        add_token("<tool>", special=False)(tokenizer)
        add_token("<|turn|>")(tokenizer)

    folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / "folder", tokens)
    back = through_gguf(folder, tmp_path / "gguf", 6402)
    types = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[6399:] == [NORMAL, USER_DEFINED, CONTROL]
    mixed = [text + word for text in texts for word in ("<tool>", "<|turn|>", "a<tool>b</s>")]
    for control in (False, True):
        assert ids_of(back, mixed, control) == ids_of(folder, mixed, control)
    assert same_tokenizer(folder, back)


@pytest.mark.long
def test_a_tokenizer_without_bos(tmp_path, texts):
    def no_bos(config: dict) -> None:
        config["bos_token"] = None

    folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / "folder", config=no_bos)
    back = through_gguf(folder, tmp_path / "gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert read_folder(back).special_ids == {"eos": 2, "unk": 0}
    assert ids_of(back, texts, control=True) == ids_of(folder, texts, control=True)


def test_a_text_never_becomes_a_control_token_by_merging(tmp_path):
    def reach(metadata: dict) -> None:
        """Call the eos "zqx", which merges make of a text."""
        tokens, merges = (metadata[f"tokenizer.ggml.{key}"].value for key in ("tokens", "merges"))
        merges[:] = ["z q", "zq x"] + [merge for merge in merges if merge.replace(" ", "") != tokens[-1]]
        tokens[2], tokens[-1] = "zqx", "zq"

    back = through_gguf(EMBEDDED_TOKENIZER, tmp_path, change=reach)
    tokenizer = load_tokenizer(back)
    assert tokenizer.eos_token == "zqx"
    assert encode_texts(tokenizer, ["zqx"]) == [[6399, tokenizer.convert_tokens_to_ids("x")]]


def test_several_templates_and_one_in_a_file(tmp_path):
    def several(config: dict) -> None:
        config["chat_template"] = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain {{ 1 }}"},
        ]

    folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / "folder", config=several)
    assert read_folder(through_gguf(folder, tmp_path / "a")).chat_template == "plain {{ 1 }}"
    (folder / "chat_template.jinja").write_text("文件 {{ 2 }}\n", encoding="utf-8")
    assert read_folder(through_gguf(folder, tmp_path / "b")).chat_template == "文件 {{ 2 }}\n"


def test_what_llama_cpp_will_do_otherwise_is_reported(tmp_path):
    def nfc(tokenizer: dict) -> None:
        tokenizer["normalizer"] = {"type": "NFC"}
        for text in ("<|done|>", "<|stop|>"):
            add_token(text)(tokenizer)
        add_token("<|fim_pad|>", special=False)(tokenizer)

    folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / "folder", nfc)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 6400, 6401]}')
    remarks = write_tokenizer(gguf.GGUFWriter(tmp_path / "model.gguf", "llama"), folder, 6403)
    assert len(remarks) == 3
    for said, remark in zip(["NFC", "<|fim_pad|>", "<|stop|>"], remarks, strict=True):
        assert said in remark
    assert write_tokenizer(gguf.GGUFWriter(tmp_path / "b.gguf", "llama"), EMBEDDED_TOKENIZER, ROWS) == []


@pytest.mark.long
def test_a_folder_that_cannot_be_written_says_why(tmp_path):
    def model(value: dict):
        return lambda tokenizer: tokenizer.update(model=value)

    def no_eos(config: dict) -> None:
        config["eos_token"] = None

    def other_bos(config: dict) -> None:
        config["bos_token"] = "<bos>"

    def other_decoder(config: dict) -> None:
        config["added_tokens_decoder"] = {"6400": {"content": "<|im_end|>", "special": True}}

    word_level = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"}
    cases = [
        ("model is WordLevel, BPE expected", model(word_level), None),
        ("takes in the spaces beside it", add_token("<mask>", lstrip=True), None),
        ("has the id 6,400, the embedding 6,400 rows", add_token("<more>"), None),
        ("names no eos_token", None, no_eos),
        ("bos_token is '<bos>', which is no token", None, other_bos),
        ("save it again", None, other_decoder),
        ("cannot be loaded", model({"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}), None),
    ]
    for number, (said, tokenizer, config) in enumerate(cases):
        folder = copy_of(EMBEDDED_TOKENIZER, tmp_path / str(number), tokenizer, config)
        with pytest.raises(InputError) as error:
            write_gguf(tmp_path / "model.gguf", folder)
        assert said in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="a folder with a tokenizer.json expected"):
        write_gguf(tmp_path / "model.gguf", tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ damaged metadata


def put(key: str, value, kind: str | None = None):
    """A change of a file's metadata: another value, of a type of GGUF's if it is to have another."""

    def change(metadata: dict) -> None:
        new = value(metadata[key].value) if callable(value) else value
        if kind is None:
            metadata[key].value = new
        else:
            items = gguf.GGUFValueType.STRING if kind == "ARRAY" and not isinstance(new[0], (int, float)) else None
            metadata[key] = gguf.gguf_writer.GGUFValue(new, gguf.GGUFValueType[kind], items)

    return change


def remove(key: str):
    return lambda metadata: metadata.pop(key)


GGML = "tokenizer.ggml."
DAMAGE = {
    "no tokenizer": (remove(GGML + "model"), "the file has no tokenizer"),
    "another model": (put(GGML + "model", "bert"), "model is 'bert', gpt2 or llama expected"),
    "another pre-tokenizer": (put(GGML + "pre", "kimi-k2"), "pre is 'kimi-k2', which is not known; expected one of"),
    "a number for a name": (put(GGML + "pre", 7, "UINT32"), "pre is UINT32, STRING expected"),
    "no tokens": (remove(GGML + "tokens"), "there are 0 tokens and 6,400 token types"),
    "numbers for tokens": (put(GGML + "tokens", [1, 2, 3], "ARRAY"), "tokens is ARRAY of INT32, ARRAY of STRING"),
    "a text for tokens": (put(GGML + "tokens", "abc", "STRING"), "tokens is STRING, ARRAY of STRING expected"),
    "fewer types": (put(GGML + "token_type", lambda types: types[:-1]), "6,400 tokens and 6,399 token types"),
    "types of floats": (put(GGML + "token_type", [1.0] * 6400, "ARRAY"), "token_type is ARRAY of FLOAT32"),
    "a token twice": (put(GGML + "tokens", lambda tokens: [*tokens[:-1], "!"]), "the token '!' is there twice"),
    "an empty token": (put(GGML + "tokens", lambda tokens: [*tokens[:-1], ""]), "the token with the id 6399 is empty"),
    "a long token": (put(GGML + "tokens", lambda tokens: [*tokens[:-1], "x" * 5000]), "a token has 5,000 characters"),
    "no UTF-8": (
        put(GGML + "tokens", lambda tokens: [*(token.encode() for token in tokens[:-1]), b"\xff\xfe"], "ARRAY"),
        "tokens is not UTF-8",
    ),
    "a merge of nothing": (put(GGML + "merges", lambda merges: [*merges[:9], "Ġqqq x"]), "'Ġqqq x' (number 9) is not"),
    "a merge of one": (put(GGML + "merges", ["abc"]), "'abc' (number 0) is not two tokens that make one"),
    "no merges": (remove(GGML + "merges"), "there are no tokenizer.ggml.merges"),
    "an id out of range": (put(GGML + "eos_token_id", 6400), "eos_token_id is 6400, an id below 6,400 expected"),
    "an id below none": (put(GGML + "bos_token_id", -1, "INT32"), "bos_token_id is -1"),
    "no eos": (remove(GGML + "eos_token_id"), "there is no tokenizer.ggml.eos_token_id"),
    "a text for an id": (put(GGML + "eos_token_id", "</s>", "STRING"), "eos_token_id is STRING"),
    "a number for yes": (put(GGML + "add_bos_token", 1, "UINT8"), "add_bos_token is UINT8, BOOL expected"),
    "a list for a template": (put("tokenizer.chat_template", ["a"], "ARRAY"), "chat_template is ARRAY of STRING"),
    "a huge template": (put("tokenizer.chat_template", "x" * (2 << 20)), "the chat template has 2,097,152 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_metadata_is_one_clear_line(tmp_path, case):
    change, said = DAMAGE[case]
    with pytest.raises(InputError) as error:
        through_gguf(EMBEDDED_TOKENIZER, tmp_path, change=change)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'model.gguf'}: its tokenizer cannot be used: ") and said in message
    assert "\n" not in message
    assert not (tmp_path / "back").exists()


SCORES = {
    "no scores": (remove(GGML + "scores"), "0 scores for 2,500 tokens"),
    "not a number": (put(GGML + "scores", lambda scores: [float("nan")] * len(scores)), "has the score nan"),
    "all the same": (put(GGML + "scores", lambda scores: [0.0] * len(scores)), "have the same score 0"),
    "no bytes": (
        put(GGML + "tokens", lambda tokens: [token.replace("<0x", "<0y") for token in tokens]),
        "256 of the tokens <0x00> to <0xFF> are missing",
    ),
}


@pytest.mark.parametrize("case", SCORES)
def test_damaged_scores_are_one_clear_line(tmp_path, sentencepiece, case):
    change, said = SCORES[case]
    with pytest.raises(InputError, match=said):
        through_gguf(sentencepiece, tmp_path, 2500, change)


def test_more_tokens_than_there_can_be(tmp_path, monkeypatch):
    import model.text.gguf_tokenizer as module

    monkeypatch.setattr(module, "MOST_TOKENS", 6000)
    with pytest.raises(InputError, match="tokens has 6,400 values, at most 6,000 expected"):
        through_gguf(EMBEDDED_TOKENIZER, tmp_path)


UNPACK = """
import pathlib, sys, time
from model.text.gguf_tokenizer import unpacked_tokenizer
print("ready", flush=True)
sys.stdin.readline()
folder = unpacked_tokenizer(pathlib.Path(sys.argv[1]))
print(folder, sorted(path.name for path in folder.iterdir()), len((folder / "tokenizer.json").read_bytes()))
"""


@pytest.mark.long
def test_processes_that_unpack_one_file_at_once_do_not_disturb_each_other(tmp_path):
    write_gguf(tmp_path / "model.gguf", EMBEDDED_TOKENIZER)
    environment = os.environ | {"MATECONV_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNPACK, str(tmp_path / "model.gguf")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, encoding="utf-8", **pipes) for _ in range(6)]
    for process in processes:  # all of them start at once
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate() for process in processes}
    assert [process.returncode for process in processes] == [0] * 6, said
    assert len(said) == 1 and "['generation_config.json', 'tokenizer.json', 'tokenizer_config.json']" in str(said)
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1

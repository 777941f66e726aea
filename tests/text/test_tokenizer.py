"""The embedded tokenizer, and training one's own."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model.corpus.sources import find_sources
from model.corpus.train_tokenizer import TrainingText, train_tokenizer
from model.errors import InputError
from model.text.token_bytes import token_bytes
from model.text.tokenization import (
    encode_texts,
    is_byte_level,
    load_tokenizer,
    tokenizer_sha256,
    vocabulary_size,
)
from tests import forks

ROOT = Path(__file__).resolve().parent.parent.parent
CORPUS = ROOT / "dataset" / "classics_zh.jsonl"


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer()


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def random_strings(count: int) -> list[str]:
    """Text of every kind: Chinese, Latin, digits, white space, controls, emoji, any code point, control tokens."""
    generator, code_points = random.Random(7), [*range(0xD800), *range(0xE000, 0x110000)]
    kinds = [
        lambda: chr(generator.randrange(0x4E00, 0xA000)),
        lambda: chr(generator.randrange(0x20, 0x7F)),
        lambda: chr(generator.randrange(0x20)),
        lambda: chr(generator.randrange(0x1F300, 0x1FAFF)),
        lambda: chr(generator.choice(code_points)),
        lambda: generator.choice(
            ["</s>", "<s>", "<unk>", " ", "\u3000", "\r\n", "👩‍👩‍👧", "e\u0301", "\ufeff", "12345"]
        ),
    ]
    return ["".join(generator.choice(kinds)() for _ in range(generator.randrange(1, 40))) for _ in range(count)]


@pytest.mark.long
def test_it_loads_as_the_guide_shows_and_has_6400_tokens(embedded):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model" / "tokenizer"))
    assert len(tokenizer) == vocabulary_size(embedded) == 6400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert tokenizer("你好").input_ids == tokenizer.encode("你好", add_special_tokens=False)  # no bos, no eos
    assert tokenizer("<s>你好</s>").input_ids == [1, *tokenizer.encode("你好"), 2]


def test_the_chat_template_is_minimind_v1s_form(embedded):
    messages = [
        {"role": "system", "content": "你是助手。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"},
    ]
    written = "<s>system\n你是助手。</s>\n<s>user\n你好</s>\n<s>assistant\n你好！</s>\n"
    assert embedded.apply_chat_template(messages, tokenize=False) == written
    prompt = embedded.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>user\n你好</s>\n<s>assistant\n"


@pytest.mark.long
def test_every_string_comes_back_unchanged_and_holds_no_control_token(embedded):
    strings = random_strings(3000)
    for text, ids in zip(strings, encode_texts(embedded, strings), strict=True):
        assert embedded.decode(ids) == text
        assert min(ids) > 2


def test_every_byte_has_a_token(embedded):
    lengths = token_bytes(embedded).lengths
    assert is_byte_level(embedded)
    assert lengths[:3].tolist() == [0, 0, 0]
    assert int((lengths == 1).sum()) == 256
    text = "中国 hello 👋\n"
    assert int(lengths[encode_texts(embedded, [text])[0]].sum()) == len(text.encode("utf-8"))


def test_it_needs_far_fewer_tokens_than_minimind_v1s_on_the_sample_corpus(embedded, corpus):
    """MiniMind v1's tokenizer gets 0.80 characters a token here."""
    sample = corpus[::10]
    assert sum(map(len, sample)) / sum(map(len, encode_texts(embedded, sample))) > 1.0


def test_everyday_modern_words_are_one_or_two_tokens(embedded):
    words = "你好 中国 我们 什么 可以 世界 学习 人工智能 现在 因为 时间 问题 今天 朋友 老师 知道 生活 国家".split()
    assert max(map(len, encode_texts(embedded, words))) <= 2


def test_no_token_is_a_long_run_of_one_symbol_or_a_formula(embedded):
    texts = [embedded.decode([index]) for index in range(3, 6400)]
    assert [text for text in texts if len(text) > 4 and len(set(text)) == 1 and not text.isspace()] == []
    assert token_bytes(embedded).lengths.max() < 12
    digits = [text for text in texts if sum(character.isdigit() for character in text) > 1]
    assert digits == []  # digits stand one by one, so that numbers are written alike


def command(*arguments) -> subprocess.CompletedProcess:
    script = [sys.executable, str(ROOT / "optimized_data_processing.py"), "--train_tokenizer"]
    return forks.run([*script, *map(str, arguments)], capture_output=True, encoding="utf-8")


@pytest.mark.long
def test_a_user_trains_one_on_their_own_text(tmp_path, corpus):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in corpus[:3000]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:1500], "not json", '{"text": 1}']), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1500:]).encode("utf-8")))
    flags = ["--input_path", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", "--vocab_size", 900]
    done = command(*flags, "--tokenizer_output", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert "3,000 documents" in done.stderr and "bad_json 1, no_text 1" in done.stderr

    tokenizer = load_tokenizer(tmp_path / "first")
    assert vocabulary_size(tokenizer) == 900
    strings = random_strings(200)
    assert [tokenizer.decode(ids) for ids in encode_texts(tokenizer, strings)] == strings

    before = tokenizer_sha256(tmp_path / "first")
    done = command(*flags, "--tokenizer_output", tmp_path / "first")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: tokenizer_output")
    assert tokenizer_sha256(tmp_path / "first") == before
    train_tokenizer([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], tmp_path / "second", 900)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the same bytes each time
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "太少了"}\n', encoding="utf-8")
    for size, message in ((258, "too small"), (6400, "give more text or a smaller")):
        with pytest.raises(InputError, match=message):
            train_tokenizer([path], tmp_path / "out", size)
    with pytest.raises(InputError, match="no file"):
        train_tokenizer([path, tmp_path / "missing.jsonl"], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()


def test_noise_is_kept_out_of_the_training_text(tmp_path):
    texts = ["本文由某站荣誉推出\n正文一" + "=" * 50, "本文由某站荣誉推出\n正文二\u00a0x" + " " * 30 + "y"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert list(TrainingText(find_sources([path]))) == ["本文由某站荣誉推出\n正文一====", "正文二 x" + " " * 8 + "y"]


def test_a_large_file_is_sampled_evenly(tmp_path, monkeypatch):
    import model.corpus.train_tokenizer as module

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number}"}) + "\n" for number in range(20_000)), encoding="utf-8")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", path.stat().st_size // 4)
    numbers = np.array([int(text) for text in TrainingText(find_sources([path]))])
    assert 4500 < len(numbers) < 5500
    assert np.all(np.histogram(numbers, bins=10, range=(0, 20_000))[0] > 300)
    assert numbers.tolist() == [int(text) for text in TrainingText(find_sources([path]))]

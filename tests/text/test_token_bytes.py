"""Bytes of text behind token ids: those of the text itself, so that bits per byte mean the same in all programs."""

import json
import random
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import inference
import train as train_script
from model.text.token_bytes import token_bytes
from model.text.tokenization import encode_texts, load_tokenizer, vocabulary_size
from optimized_data_processing import OptimizedDataProcessor
from tests.text.kinds import KINDS, not_special, write_tokenizer

LOSSLESS = [name for name in KINDS if "byte" in name or "first word" in name]
PIECES = ["魑", "春", "风", "a", "b c", "甲", "😀", "é", "\n", "s", "</s>", "/", "1"]


def counted(tokenizer, text: str) -> int:
    """Bytes of a text's tokens as a document has them: behind the bos."""
    ids = np.array([1, *encode_texts(tokenizer, [text])[0]])
    return token_bytes(tokenizer).count(ids[:-1], ids[1:])


@pytest.mark.long
@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_are_those_of_the_text(tmp_path, kind):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, KINDS[kind]()))
    dice = random.Random(3)
    for _ in range(100):
        text = " ".join("".join(dice.choices(PIECES, k=dice.randrange(1, 6))) for _ in range(dice.randrange(1, 4)))
        assert counted(tokenizer, text) == len(text.encode()), text


def test_a_unigrams_bytes_are_those_of_the_text(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, KINDS["Unigram"]()))
    for text in ("甲乙 丙丁", "甲", "s </s> 甲", "丙 丁 s"):
        assert counted(tokenizer, text) == len(text.encode())


def test_the_space_after_an_added_token_is_the_tokenizers(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, not_special()))
    for text in ("甲<思考>乙", "<思考>乙<思考>", "甲 乙<思考>s"):
        assert counted(tokenizer, text) == len(text.encode())


def test_berts_chinese_has_no_spaces(tmp_path):
    """As bert-base-chinese, with which many small Chinese models were trained: a token a character, words in Latin."""
    tokens = ["[UNK]", "<s>", "</s>", *"春风又绿江南岸，", "hello", "world", "##s", "a"]
    backend = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, backend, unk_token="[UNK]"))
    for text in ("春风又绿，江南岸", "hello worlds", "a hello", "worlds"):
        assert counted(tokenizer, text) == len(text.encode())
    assert counted(tokenizer, "春魑") == 3  # an unknown token counts none


def test_ids_without_a_token_count_nothing(tokenizer):
    size = vocabulary_size(tokenizer)
    found = token_bytes(tokenizer, size + 5)
    assert len(found.lengths) == size + 5 and not found.lengths[size:].any() and not found.lengths[:3].any()
    assert not found.is_text[1:3].any() and found.is_text[3:].all()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["byte-level BPE", *LOSSLESS[2:], "Unigram"])
def test_validation_says_what_score_file_says(tmp_path, monkeypatch, capsys, kind):
    """Of the same texts, to the last digit."""
    folder = write_tokenizer(tmp_path / "tokenizer", KINDS[kind]())
    dice = random.Random(5)
    pieces = ["甲", "乙 ", "丙", "丁"] if kind == "Unigram" else PIECES
    texts = ["".join(dice.choices(pieces, k=dice.randrange(2, 12))).strip() or "甲" for _ in range(40)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    processor = OptimizedDataProcessor(tokenizer_path=folder, clean=False, deduplicate=False)
    processor.process_dataset(tmp_path / "x.jsonl", tmp_path / "x.bin")
    shape = "--dim=32 --n_layers=1 --n_heads=4 --n_kv_heads=2 --max_seq_len=256 --batch_size=8 --max_steps=2"
    paths = {"train_data_path": "x.bin", "val_data_path": "x.bin", "tokenizer_path": "tokenizer", "out_dir": "out"}
    flags = [*shape.split(), *(f"--{name}={tmp_path / path}" for name, path in paths.items())]
    flags += ["--sample_start=document", "--document_mask", "--dtype=float32", "--eval_interval=2", "--device=cpu"]
    run(monkeypatch, train_script, "train.py", *flags)
    events = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    bits = [event["bits_per_byte"] for event in events if "bits_per_byte" in event][-1]
    capsys.readouterr()
    arguments = ["--model_path", tmp_path / "out" / "pretrain_32.pth", "--compile=false", "--device=cpu"]
    run(monkeypatch, inference, "inference.py", *arguments, "--score_file", tmp_path / "x.jsonl")
    assert f" {bits:.4f} bits per byte" in capsys.readouterr().out


def run(monkeypatch, script, name: str, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        script.main()
    except SystemExit as exit_:
        assert not exit_.code

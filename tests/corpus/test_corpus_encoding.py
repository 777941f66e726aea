"""Encoding in bulk: whichever library does it, the ids are those that tokenizers gives."""

import json
import shutil
import sys

import numpy as np
import pytest

from model.corpus.bulk_encoder import TRAPS, BulkEncoder, EncoderChoice, choose_encoder, with_bos_and_eos
from model.text.tokenization import encode_texts, load_bulk_tokenizer, load_tokenizer, vocabulary_size
from tests.conftest import ROOT

LINES = (ROOT / "dataset" / "classics_zh.jsonl").read_text(encoding="utf-8").splitlines()[:300]
TEXTS = [json.loads(line)["text"] for line in LINES] + list(TRAPS)


def encode(folder=None):
    """The ids of TEXTS, the encoder's name, and what it said."""
    said = []
    encoder = BulkEncoder(choose_encoder(load_bulk_tokenizer(folder), TEXTS, said.append))
    ids, lengths = encoder.encode(TEXTS)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])], encoder.name, said


def test_fastokens_gives_the_ids_that_tokenizers_gives():
    pytest.importorskip("fastokens")
    ids, name, (said,) = encode()
    assert name.startswith("fastokens") and said.startswith(f"encoder {name}")
    assert ids == encode_texts(load_tokenizer(), TEXTS)


def test_no_text_gives_no_ids():
    ids, lengths = BulkEncoder(choose_encoder(load_bulk_tokenizer(), [], lambda line: None)).encode([])
    assert (len(ids), len(lengths)) == (0, 0)


def test_without_fastokens_a_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    ids, name, (said,) = encode()
    assert name.startswith("tokenizers") and "fastokens" in said and "not installed" in said
    assert ids == encode_texts(load_tokenizer(), TEXTS)


def test_a_tokenizer_that_fastokens_does_not_support_falls_back(tmp_path, tokenizer_folder):
    pytest.importorskip("fastokens")
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFKC"}}), encoding="utf-8")
    ids, name, (said,) = encode(tmp_path)
    assert name.startswith("tokenizers") and "does not support" in said
    assert ids == encode_texts(load_tokenizer(tmp_path), TEXTS)


def test_fastokens_falls_back_where_it_gives_other_ids(monkeypatch, tokenizer_folder):
    pytest.importorskip("fastokens")
    fast = BulkEncoder._encode_fast
    monkeypatch.setattr(BulkEncoder, "_encode_fast", lambda self, texts: fast(self, [f" {text}" for text in texts]))
    ids, name, (said,) = encode(tokenizer_folder)
    assert name.startswith("tokenizers") and "other ids" in said
    assert ids == encode_texts(load_tokenizer(tokenizer_folder), TEXTS)


def test_bos_and_eos_stand_around_each_text():
    tokens = with_bos_and_eos(np.array([7, 8, 9]), np.array([2, 0, 1]), bos=1, eos=2, dtype=np.uint16)
    assert tokens.tolist() == [1, 7, 8, 2, 1, 2, 1, 9, 2]
    assert with_bos_and_eos(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 1, 2, np.uint16).tolist() == []


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
def test_a_tokenizer_loaded_for_bulk_is_the_one_that_transformers_loads(tmp_path, tokenizer_folder, tokenizer_class):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = tokenizer_class or config["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    bulk, whole = load_bulk_tokenizer(tmp_path), load_tokenizer(tmp_path)
    assert (bulk.bos_id, bulk.eos_id) == (whole.bos_token_id, whole.eos_token_id)
    assert bulk.vocab_size == vocabulary_size(whole)
    ids, lengths = BulkEncoder(EncoderChoice("tokenizers", bulk.json)).encode(TEXTS)
    assert ids.tolist() == [index for text in encode_texts(whole, TEXTS) for index in text]

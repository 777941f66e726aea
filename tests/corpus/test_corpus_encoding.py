"""Encoding in bulk: whichever library does it, the ids are those that tokenizers gives."""

import json
import shutil
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from model.corpus.bulk_encoder import TRAPS, BulkEncoder, EncoderChoice, choose_encoder, with_bos_and_eos
from model.corpus.lost_text import LossCounter
from model.errors import InputError
from model.text.tokenization import encode_texts, load_bulk_tokenizer, load_tokenizer, vocabulary_size
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import ROOT

LINES = (ROOT / "dataset" / "classics_zh.jsonl").read_text(encoding="utf-8").splitlines()[:300]
TEXTS = [json.loads(line)["text"] for line in LINES] + list(TRAPS)


def encode(folder=None):
    """The ids of TEXTS, the encoder's name, and what it said."""
    said = []
    encoder = BulkEncoder(choose_encoder(load_bulk_tokenizer(folder), TEXTS, said.append))
    ids, lengths = encoder.encode(TEXTS)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])], encoder.name, said


@pytest.mark.long
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


# ----------------------------------------------------------------------------- tokenizers that cannot express all text

SPECIAL = ["<unk>", "<s>", "</s>"]
LOSSY_TEXTS = ["春眠不觉晓，处处闻啼鸟。", "夜来 Windy 🤔 </s> 花落<unk>知多少？", "a</s>b", *TEXTS[:20]]


def lossy_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer that learnt only from Chinese."""
    unigram = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -5.0), ("春", -5.0), ("<", -5.0), ("/", -6.0)]
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "春": 3, "眠": 4, "<": 5, "/": 6, "s": 7, ">": 8}
    model = {
        "bytes": models.BPE(),
        "bytes, NFKC": models.BPE(),
        "characters": models.BPE(),
        "characters, unk": models.BPE(unk_token="<unk>"),
        "fallback": models.BPE(byte_fallback=True),
        "Unigram": models.Unigram(unigram, 0, False),
        "WordLevel": models.WordLevel(words, "<unk>"),
        "WordPiece": models.WordPiece(words, unk_token="<unk>"),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if kind.startswith("bytes"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "bytes, NFKC":
        tokenizer.normalizer = normalizers.NFKC()
    if kind.startswith("Word"):
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    if isinstance(model, models.BPE):
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "fallback" else []
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=SPECIAL + fallback, show_progress=False, limit_alphabet=300
        )
        tokenizer.train_from_iterator(["春眠不觉晓，" * 3, "处处闻啼鸟。" * 3, "夜来花落知多少" * 2], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    "kind",
    ["bytes", "bytes, NFKC", "characters", "characters, unk", "fallback", "Unigram", "WordLevel", "WordPiece"],
)
def test_what_has_no_token_is_counted_and_said(tmp_path, capsys, kind):
    tokenizer = lossy_tokenizer(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = "".join(json.dumps({"text": text.strip()}) + "\n" for text in LOSSY_TEXTS)
    (tmp_path / "raw.jsonl").write_text(lines, encoding="utf-8")
    processor = OptimizedDataProcessor(tmp_path, workers=0, clean=False)
    counts = processor.process_dataset(tmp_path / "raw.jsonl", tmp_path / "x.bin")
    said = capsys.readouterr().err

    tokens, ends = np.fromfile(tmp_path / "x.bin", "<u2"), np.fromfile(tmp_path / "x.ends", "<u8")
    unknown, lost = counts["vocabulary"]["unknown_tokens"], counts["vocabulary"]["lost_bytes"]
    pieces = np.split(tokens, ends[:-1].astype(int))
    assert (tokens == 1).sum() == (tokens == 2).sum() == len(pieces) == len(LOSSY_TEXTS)  # </s> in a text stays text
    assert unknown == (tokens == 0).sum() and ("are the unknown token" in said) == (unknown > 0)
    assert (f"warning: {lost:,} bytes of the texts (" in said) == (lost > 0)
    assert (unknown > 0) == (kind in ("characters, unk", "Unigram", "WordLevel", "WordPiece"))
    assert (lost > 0) == (kind in ("bytes", "bytes, NFKC", "characters"))
    if not kind.startswith("Word"):
        texts = [tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text for text in LOSSY_TEXTS]
        names = [[tokenizer.id_to_token(index) for index in piece[1:-1]] for piece in pieces]
        if kind.startswith("bytes"):
            assert lost == sum(len(t.strip().encode()) - len("".join(n)) for t, n in zip(texts, names, strict=True))
        elif kind == "characters":
            marked = ["▁" + text.strip().replace(" ", "▁") for text in texts]
            assert lost == len("".join(marked).encode()) - sum(len("".join(n).encode()) for n in names)


def test_a_vocabulary_without_single_characters_loses_every_byte():
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "ab": 2}, []))
    assert not tokenizer.encode("a眠").ids
    assert LossCounter(tokenizer.to_str()).count(["a眠", "b"]) == 5


def test_a_model_without_a_token_for_unknown_words_is_one_line(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "春": 2}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    (tmp_path / "raw.jsonl").write_text('{"text": "眠"}', encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer fails on this text .*UNK"):
        OptimizedDataProcessor(tmp_path, workers=0).process_dataset(tmp_path / "raw.jsonl", tmp_path / "x.bin")

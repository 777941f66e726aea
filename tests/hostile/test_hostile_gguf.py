"""GGUF files that are damaged or made to do harm: one line, or a model where that does not matter."""

import copy
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.errors import InputError
from model.text.tokenization import load_tokenizer
from model.weights.gguf import load_gguf, save_gguf
from tests.bad_files import assert_refused, load_or_refusal, many
from tests.model_shapes import assert_same, weights_of
from tests.raw_gguf import ARRAY, BOOL, F16, F32, FLOAT32, INT32, Q8_0, STRING, UINT32, UINT64, Raw, read, text

gguf = pytest.importorskip("gguf")

QUERY, NORM, EMBEDDING = "blk.0.attn_q.weight", "output_norm.weight", "token_embd.weight"
ROPE = "rope_freqs.weight"
MANY = many(200)


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer_folder):
    """A file with which nothing is wrong."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    save_gguf(path, weights_of({"max_seq_len": 64}, tokenizer_folder))
    return path


@pytest.fixture(scope="module")
def whole(good):
    """Its parts; a test spoils a copy."""
    return read(good.read_bytes())


@pytest.fixture
def raw(whole):
    return copy.deepcopy(whole)


@pytest.fixture
def refused(tmp_path):
    """That the bytes are a file which is refused so."""

    def check(content, message: str) -> None:
        (tmp_path / "bad.gguf").write_bytes(bytes(content))
        assert_refused(tmp_path / "bad.gguf", message)

    return check


def test_the_parts_put_together_are_the_file(good, whole):
    assert bytes(whole) == good.read_bytes()


# ----------------------------------------------------------------------------------------------------------- the header


@MANY
@example(0)
@example(3)
@example(24)
@given(st.integers(0, 331_000))
def test_a_file_that_is_cut_off(tmp_path, good, place):
    content = good.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(content[: min(place, len(content) - 1)])
    assert_refused(tmp_path / "bad.gguf", "damaged, or not a GGUF file")


@pytest.mark.long
@MANY
@given(st.data())
def test_other_bytes_in_the_header(tmp_path, good, whole, data):
    content, size = bytearray(good.read_bytes()), len(whole.header())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, size - 8))
        numbers = st.sampled_from([0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))
        new = data.draw(st.binary(min_size=1, max_size=4) | numbers)
        content[place : place + len(new)] = new
    (tmp_path / "bad.gguf").write_bytes(content)
    load_or_refusal(tmp_path / "bad.gguf")


HEADERS = {
    "version 1": ({"version": 1}, "version 1, version 2 or 3"),
    "version 4": ({"version": 4}, "version 4"),
    "big-endian": ({"order": ">"}, "big-endian numbers"),
    "2^60 tensors": ({"counts": (2**60, 1)}, "1,152,921,504,606,846,976 tensors"),
    "2^60 values": ({"counts": (1, 2**60)}, "1,152,921,504,606,846,976 values"),
    "one tensor more": ({"counts": (20, 10)}, "damaged, or not a GGUF file"),
    "no values": ({"counts": (0, 0)}, "general.architecture|architecture None"),
}


@pytest.mark.parametrize("changes, message", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_ours(raw, refused, changes, message):
    for name, value in changes.items():
        setattr(raw, name, value)
    refused(raw, message)


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"ggml" * 100, b"\0" * 5000, b"PK\3\4" * 99])
def test_what_is_no_gguf_file(refused, content):
    refused(content, "damaged, or not a GGUF file")


ITEMS = {
    "bytes": lambda n: struct.pack("<IQ", 0, n) + bytes(n),
    "texts": lambda n: struct.pack("<IQ", STRING, n // 8) + bytes(n),
    "lists": lambda n: struct.pack("<IQ", ARRAY, n // 12) + struct.pack("<IQ", UINT32, 0) * (n // 12),
}


@pytest.mark.long
@pytest.mark.parametrize("make", ITEMS.values(), ids=ITEMS)
def test_many_values_take_little_memory(tmp_path, good, raw, make):
    """The library's reader took half a gigabyte for a megabyte."""
    raw.values["x"] = ARRAY, make(2_000_000)
    (tmp_path / "big.gguf").write_bytes(bytes(raw))
    assert_same(load_or_refusal(tmp_path / "big.gguf"), load_gguf(good))


LISTS = {
    "2^60 texts": (struct.pack("<IQ", STRING, 2**60), "texts and lists, at most"),
    "2^62 numbers": (struct.pack("<IQ", UINT32, 2**62), "cut off"),
    "2^64 - 1 bytes": (struct.pack("<IQ", 0, 2**64 - 1), "cut off"),
    "three million texts": (
        struct.pack("<IQ", STRING, 3_000_000) + bytes(24_000_000),
        "3,000,... texts and lists, at most 2,097,152 expected",
    ),
    "lists without end": (struct.pack("<IQ", ARRAY, 1) * 20_000, "lists in lists in lists"),
    "an unknown type": (struct.pack("<IQ", 13, 1), "13 is not a valid"),
}


@pytest.mark.long
@pytest.mark.parametrize("content, message", LISTS.values(), ids=LISTS)
def test_a_list_that_lies(raw, refused, content, message):
    raw.values["x"] = ARRAY, content
    refused(raw, message)


@pytest.mark.parametrize("kind, content", [(13, b""), (2**32 - 1, b""), (STRING, struct.pack("<Q", 2**60))])
def test_a_value_that_lies(raw, refused, kind, content):
    raw.values["x"] = kind, content
    refused(raw, "damaged, or not a GGUF file")


def test_names_that_are_there_twice_or_no_text(raw, refused):
    content = bytes(raw)
    twice = content.replace(text("blk.0.attn_k.weight"), text(QUERY), 1)
    refused(twice, "'blk.0.attn_q.weight' is there twice")
    refused(content.replace(b"llama.block_count", b"llama.block_coun\xff", 1), "can't decode byte 0xff")
    refused(content.replace(b"blk.0.attn_q", b"blk.0.attn_\xff", 1), "can't decode byte 0xff")


def test_what_nobody_asks_for_does_not_matter(tmp_path, good, raw):
    raw.set("general.name", STRING, b"\xff\xfe")
    raw.values["x" * 1_000_000] = UINT32, b"1234"
    raw.set_list("general.tags", STRING, [b"\xff"] * 9)
    (tmp_path / "a.gguf").write_bytes(bytes(raw))
    assert_same(load_or_refusal(tmp_path / "a.gguf"), load_gguf(good))


@pytest.mark.long
def test_thousands_of_values(raw, refused):
    for number in range(5000):
        raw.set(f"x{number}", UINT32, 1)
    refused(raw, f"{len(raw.tensors)} tensors and 5,0.. values")


# ---------------------------------------------------------------------------------------------------------- the tensors

DIMENSIONS = [(), (0,), (64, 0), (0, 2**63), (2**32, 2**32), (2**64 - 1,), (64, 301), (1,) * 5, (64,) * 4]


@pytest.mark.parametrize("name", [EMBEDDING, QUERY, NORM])
@pytest.mark.parametrize("dimensions", DIMENSIONS, ids=str)
def test_a_tensor_of_other_dimensions(raw, refused, name, dimensions):
    raw.tensors[name] = dimensions, *raw.tensors[name][1:]
    refused(raw, "damaged, or not a GGUF file|by its description")


@pytest.mark.parametrize("dimensions", [(64,), (64, 64, 1), (32, 128), (300, 64)], ids=str)
def test_a_tensor_of_another_shape(raw, refused, dimensions):
    raw.tensors[EMBEDDING] = dimensions, F32, bytes(4 * torch.Size(dimensions).numel())
    refused(raw, r"(output|tok_embeddings).weight is \(.*by its description")


@pytest.mark.parametrize("offset", [1, 7, 16, 32, 2**60, 2**63, 2**64 - 1, 331_000])
def test_a_tensor_that_lies_elsewhere(raw, refused, offset):
    """Past the end, where numbers cannot begin, or over others: thousands could share a page and fill the memory."""
    raw.offsets[QUERY] = offset
    refused(raw, "begins at byte|reaches to byte")


@pytest.mark.parametrize("name", [EMBEDDING, "blk.1.ffn_down.weight", NORM])
def test_a_tensor_that_is_missing(raw, refused, name):
    del raw.tensors[name]
    refused(raw, "no '.*' inside|does not say vocab_size|by its description|layers")


def test_tensors_that_are_too_much(raw, refused):
    more = copy.deepcopy(raw)
    more.tensors["evil"] = (3,), F32, bytes(12)
    refused(more, "an unknown 'evil'")
    more.tensors["e" * 100_000 + "\n"] = (3,), F32, bytes(12)
    refused(more, "an unknown 'e")
    for number in range(17_000):
        more.tensors[f"evil.{number}"] = (1,), F32, bytes(4)
    refused(more, "17,0.. tensors")


@pytest.mark.parametrize("kind", range(45))
def test_numbers_of_every_kind(tmp_path, raw, kind):
    """A matrix of zeros in each of ggml's types: those that the library knows are read, as float32 or as they are."""
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except ValueError:
        block, size = 32, 34
    raw.tensors[QUERY] = (64, 64), kind, bytes(max(1, 4096 // block * size))
    (tmp_path / "bad.gguf").write_bytes(bytes(raw))
    found = load_or_refusal(tmp_path / "bad.gguf")
    if isinstance(found, str):
        assert kind not in (F32, F16, Q8_0)
        assert any(part in found for part in ("is stored as", "not a valid GGML", "stored in blocks of"))
    else:
        assert not found.state_dict["layers.0.attention.wq.weight"].any()


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_another_alignment_is_read(tmp_path, good, raw, alignment):
    raw.set("general.alignment", UINT32, alignment)
    raw.alignment = alignment
    (tmp_path / "a.gguf").write_bytes(bytes(raw))
    assert_same(load_gguf(tmp_path / "a.gguf"), load_gguf(good))


@pytest.mark.parametrize("kind, alignment", [(UINT32, 0), (UINT32, 3), (UINT32, 2**32 - 1), (UINT64, 64), (INT32, -32)])
def test_an_alignment_that_cannot_be(raw, refused, kind, alignment):
    raw.set("general.alignment", kind, alignment)
    refused(raw, "general.alignment is .*, a power of 2 expected")


@pytest.mark.parametrize("count, kind", [(8, F32), (8, F16), (7, F32), (1, F32), (1 << 20, F32), (32, Q8_0)])
@pytest.mark.parametrize("ours", [True, False])
def test_factors_of_rope_that_are_not_llama_3s(raw, refused, count, kind, ours):
    raw.tensors[ROPE] = (count,), kind, bytes({F32: 4, F16: 2, Q8_0: 2}[kind] * count)
    if ours:
        for name, value in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
            raw.set(f"mateconv.rope_{name}", FLOAT32, value)
        raw.set("mateconv.rope_original_max_seq_len", UINT32, 64)
    refused(raw, "factors that are not Llama 3's")


# ----------------------------------------------------------------------------------------------------------- the values

SHAPES = {
    "another architecture": ("general.architecture", STRING, "mixtral", "architecture 'mixtral', one of llama"),
    "an architecture that is no text": ("general.architecture", UINT32, 1, "general.architecture is UINT32, STRING"),
    "an architecture that is no UTF-8": ("general.architecture", STRING, b"\xff", "general.architecture is not UTF-8"),
    "experts": ("llama.expert_count", UINT32, 8, "does not say n_active_experts of the model"),
    "no heads": ("llama.attention.head_count", UINT32, 0, "n_heads: 0 found"),
    "no key heads": ("llama.attention.head_count_kv", UINT32, 0, "n_kv_heads: 0 found"),
    "heads of nothing": ("llama.attention.key_length", UINT32, 0, "0 expected|head_dim"),
    "other heads": ("llama.attention.key_length", UINT32, 32, "llama.attention.value_length is 16, 32 expected"),
    "part of a head": ("llama.rope.dimension_count", UINT32, 8, "llama.rope.dimension_count is 8, 16 expected"),
    "no layers": ("llama.block_count", UINT32, 0, "n_layers: 0 found"),
    "four billion layers": ("llama.block_count", UINT32, 2**32 - 1, "n_layers: 4294967295 found"),
    "9,999 layers": ("llama.block_count", UINT32, 9999, "holds 2 layers"),
    "2^63": ("llama.embedding_length", UINT64, 2**63, "dim: 9223372036854775808 found"),
    "less than nothing": ("llama.context_length", INT32, -1, "max_seq_len: -1 found"),
    "truth for a number": ("llama.embedding_length", BOOL, True, "llama.embedding_length is BOOL, INT16 or"),
    "text for a number": ("llama.feed_forward_length", STRING, "96", "llama.feed_forward_length is STRING"),
    "no number": ("llama.attention.layer_norm_rms_epsilon", FLOAT32, float("nan"), "norm_eps: nan found"),
    "no end": ("llama.rope.freq_base", FLOAT32, float("inf"), "rope_theta: inf found"),
    "YaRN": ("llama.rope.scaling.type", STRING, "yarn", "RoPE of type 'yarn'"),
    "an end that is none": ("tokenizer.ggml.eos_token_id", UINT32, 300, "its tokenizer cannot be used"),
    "another tokenizer": ("tokenizer.ggml.model", STRING, "bert", "tokenizer.ggml.model is 'bert'"),
    "another pre-tokenizer": ("tokenizer.ggml.pre", STRING, "x" * 5000, "tokenizer.ggml.pre is 'xxx"),
    "a template that is a number": ("tokenizer.chat_template", UINT32, 1, "tokenizer.chat_template is UINT32"),
}  # fmt: skip


@pytest.mark.parametrize("key, kind, value, message", SHAPES.values(), ids=SHAPES)
def test_a_value_of_another_model(raw, refused, key, kind, value, message):
    raw.set(key, kind, value)
    refused(raw, message)


def test_heads_that_differ_between_layers(raw, refused):
    raw.set_list("llama.attention.head_count", UINT32, [4, 4])
    refused(raw, "llama.attention.head_count is ARRAY of UINT32, INT16 or")


LISTED = {
    "tokens that are numbers": ("tokens", UINT32, range(300), "tokens is ARRAY of UINT32"),
    "tokens that are no UTF-8": ("tokens", STRING, [b"\xff"] * 300, "tokens is not UTF-8"),
    "tokens twice": ("tokens", STRING, ["a"] * 300, "the token 'a' is there twice"),
    "too many tokens": ("tokens", STRING, [str(n) for n in range(301)], "cannot be used|300 rows|token types"),
    "no tokens": ("tokens", STRING, [], "there are no tokens|token types"),
    "merges of nothing": ("merges", STRING, ["x y"] * 5, "is not two tokens that make one"),
    "merges that are numbers": ("merges", INT32, [1, 2], "merges is ARRAY of INT32"),
    "two types": ("token_type", INT32, [1, 2], "2 token types"),
}


@pytest.mark.parametrize("key, kind, items, message", LISTED.values(), ids=LISTED)
def test_lists_of_another_tokenizer(raw, refused, key, kind, items, message):
    raw.set_list(f"tokenizer.ggml.{key}", kind, list(items))
    refused(raw, message)


VALUES = st.one_of(
    st.tuples(st.just(STRING), st.binary(max_size=6).map(text)),
    st.tuples(st.sampled_from([UINT32, INT32, FLOAT32]), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(UINT64), st.binary(min_size=8, max_size=8)),
    st.tuples(st.just(BOOL), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just(ARRAY), st.integers(0, 9).map(lambda n: struct.pack("<IQ", UINT32, n) + bytes(4 * n))),
    st.tuples(st.just(ARRAY), st.integers(0, 9).map(lambda n: struct.pack("<IQ", STRING, n) + text("a") * n)),
)


@pytest.mark.long
@MANY
@given(st.data())
def test_any_value_of_any_type(tmp_path, whole, data):
    raw = Raw()
    raw.values, raw.tensors = dict(whole.values), whole.tensors
    for key in data.draw(st.lists(st.sampled_from([*whole.values]), min_size=1, max_size=2)):
        raw.values[key] = data.draw(VALUES)
    (tmp_path / "bad.gguf").write_bytes(bytes(raw))
    load_or_refusal(tmp_path / "bad.gguf")


def test_a_damaged_file_is_no_tokenizer_either(tmp_path, good):
    (tmp_path / "bad.gguf").write_bytes(good.read_bytes()[:5000])
    with pytest.raises(InputError, match="bad.gguf: damaged, or not a GGUF file"):
        load_tokenizer(tmp_path / "bad.gguf")

"""The token file and its samples."""

import ctypes
import json
import mmap
import os
import sys
import time

import numpy as np
import pytest
import torch

from model.dataset import (
    PretrainDataset,
    hold_out,
    number_documents,
    verify_tokens,
)
from model.errors import InputError
from model.loss import IGNORE_INDEX
from model.storage.files import drop_from_cache
from model.token_file.manifest import Manifest, file_sha256, manifest_path, write_manifest
from model.token_file.packing import pack_documents


def write_tokens(path, ids, dtype="uint16", manifest=True, **changes):
    array = np.asarray(ids, dtype=dtype)
    array.tofile(path)
    if manifest:
        values = {
            "dtype": dtype, "vocab_size": 100, "bos_id": 1, "eos_id": 2, "tokens": len(array), "documents": 1,
            "tokenizer_sha256": "t", "encoder": "test", "sha256": file_sha256(path),
        }  # fmt: skip
        write_manifest(path, Manifest(**(values | changes)))
    return path


def test_every_token_is_predicted_once(tmp_path):
    ids = np.arange(1, 42)  # 41 tokens: 5 samples of 8, neighbours share one
    data = PretrainDataset(write_tokens(tmp_path / "a.bin", ids), seq_len=8, vocab_size=100)
    assert len(data) == 5
    inputs, targets = data.batch(np.arange(5), rows=5)
    assert inputs.flatten().tolist() == ids[:-1].tolist()
    assert targets.flatten().tolist() == ids[1:].tolist()


def test_rows_past_the_last_sample_count_in_no_loss(tmp_path):
    data = PretrainDataset(write_tokens(tmp_path / "a.bin", range(41)), seq_len=8, vocab_size=100)
    inputs, targets = data.batch(np.array([3]), rows=3)
    assert inputs.shape == targets.shape == (3, 8)
    assert (targets[1:] == IGNORE_INDEX).all() and (targets[0] != IGNORE_INDEX).all()


def documents_of(*lengths):
    """A token file's ids: documents of so many tokens, begun by 1 and ended by 2, and all others differ."""
    ids, content = [], 3
    for length in lengths:
        ids += [1, *range(content, content + length - 2), 2]
        content += length - 2
    return np.array(ids)


def test_samples_begin_where_documents_do_and_what_is_left_stays_empty(tmp_path):
    path = write_tokens(tmp_path / "a.bin", documents_of(6, 20, 3, 5, 4))
    data = PretrainDataset(path, seq_len=8, vocab_size=100, bos_id=1)
    inputs, targets = data.batch(np.arange(len(data)), rows=len(data))
    assert inputs.tolist() == [
        [1, 3, 4, 5, 6, 2, 1, 25],  # of the third document only what a sample holds is an input; its 2 is a target
        [1, 7, 8, 9, 10, 11, 12, 13],
        [14, 15, 16, 17, 18, 19, 20, 21],
        [22, 23, 24, 2, 1, 26, 27, 28],  # the long document's tail, then another
        [1, 29, 30, 2, 0, 0, 0, 0],
    ]
    empty = IGNORE_INDEX
    assert targets.tolist() == [
        [3, 4, 5, 6, 2, empty, 25, 2],
        [7, 8, 9, 10, 11, 12, 13, 14],
        [15, 16, 17, 18, 19, 20, 21, 22],
        [23, 24, 2, empty, 26, 27, 28, 2],
        [29, 30, 2, empty, empty, empty, empty, empty],
    ]
    assert data.count_targets(np.array([0, 4])) == 7 + 3
    assert number_documents(inputs, targets, bos_id=1)[[0, 1, 3]].tolist() == [
        [1, 1, 1, 1, 1, 1, 2, 2], [1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_packing_predicts_every_token_but_a_documents_first_once(seed):
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, random.lognormal(2.5, 1.2, 2000)).astype(np.int64)
    ends = lengths.cumsum()
    packing = pack_documents(ends - lengths, int(ends[-1]), seq_len=32)
    predicted = np.zeros(ends[-1], dtype=np.int64)
    for start, length in zip(packing.starts, packing.lengths, strict=True):
        predicted[start + 1 : start + length] += 1
    begins = np.isin(np.arange(ends[-1]), ends - lengths)
    assert (predicted == ~begins).all()
    assert (np.add.reduceat(packing.lengths, packing.first[:-1]) <= 33).all()
    assert packing.targets.sum() == (~begins).sum()
    fewest = -(-(~begins).sum() // 32)
    assert fewest <= len(packing.targets) < 1.05 * fewest


def test_tails_in_the_middle_of_a_sample_are_documents_of_their_own():
    inputs = torch.tensor([[1, 5, 6, 2, 8, 9], [1, 5, 2, 1, 6, 7]])
    targets = torch.tensor([[5, 6, 2, IGNORE_INDEX, 9, 2], [5, 2, 1, 6, 7, 8]])
    assert number_documents(inputs, targets, bos_id=1).tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ([9, 3, 4, 9, 9, 5, 6, 7, 9, 9, 8, 9], [4, 5, 3]),  # ours: each between two of them
        ([9, 3, 4, 9, 5, 6, 7, 9, 8, 2], [3, 4, 3]),  # llm.c's: one before each
        ([3, 4, 9, 5, 6, 7, 9, 8, 2, 9], [2, 4, 4]),  # nanoGPT's: one after each
    ],
)
def test_one_token_can_begin_and_end_documents(tmp_path, ids, lengths):
    """GPT-2's <|endoftext|>."""
    path = write_tokens(tmp_path / "a.bin", ids, vocab_size=10)
    data = PretrainDataset(path, seq_len=5, vocab_size=10, bos_id=9, eos_id=9)
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    runs = sorted(zip(data.packing.starts.tolist(), data.packing.lengths.tolist(), strict=True))
    assert runs == [*zip(starts, lengths, strict=True)]

    inputs, targets = PretrainDataset(path, seq_len=len(ids) - 1, vocab_size=10).batch(np.array([0]), rows=1)
    numbers = number_documents(inputs, targets, bos_id=9, eos_id=9)[0]
    expected = np.repeat(np.arange(3), lengths)[:-1]  # of the inputs, all tokens but the last
    assert (numbers - numbers[0]).tolist() == expected.tolist()


def test_a_file_in_which_no_document_begins_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"no document begins in it \(bos id 1\); use sample_start packed"):
        PretrainDataset(write_tokens(tmp_path / "a.bin", range(3, 44)), seq_len=8, vocab_size=100, bos_id=1)


def test_minimind_and_nanogpt_files_without_a_manifest_are_read(tmp_path):
    data = PretrainDataset(write_tokens(tmp_path / "a.bin", range(41), manifest=False), seq_len=8, vocab_size=100)
    assert data.manifest is None and len(data) == 5


def test_a_file_of_ours_that_lost_its_manifest_is_one_clear_line(tmp_path):
    path = write_tokens(tmp_path / "a.bin", range(41), manifest=False)
    path.with_suffix(".ends").write_bytes(np.array([41], dtype="<i8").tobytes())
    with pytest.raises(InputError, match="a.json: is missing, but .*a.ends says that this program made"):
        PretrainDataset(path, seq_len=8, vocab_size=100)


def write_llm_c(path, ids, dtype="uint16", magic=20240520, version=1, count=None):
    """As write_datafile of karpathy/llm.c, dev/data/data_common.py: 256 int32 and the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
    return path


LLAMA_3 = {"dtype": "uint32", "magic": 20240801, "version": 7}


@pytest.mark.parametrize("form", [{}, LLAMA_3], ids=["gpt-2", "llama-3"])
@pytest.mark.parametrize("marks", [{}, {"bos_id": 1}], ids=["packed", "document"])
def test_llm_c_files_are_the_same_as_their_tokens_without_the_header(tmp_path, form, marks):
    ids = documents_of(6, 20, 3, 5, 4)
    plain = PretrainDataset(write_tokens(tmp_path / "a.bin", ids, manifest=False), 8, vocab_size=100, **marks)
    data = PretrainDataset(write_llm_c(tmp_path / "b.bin", ids, **form), 8, vocab_size=100, **marks)
    assert data.tokens.tolist() == plain.tokens.tolist() == ids.tolist() and len(data) == len(plain)
    everything = np.arange(len(data))
    for one, other in zip(data.batch(everything, 9), plain.batch(everything, 9), strict=True):
        assert torch.equal(one, other)
    assert data.count_targets(everything) == plain.count_targets(everything)
    assert data.manifest is None and data.layout.origin.startswith("llm.c's uint")

    data.verified_sha256 = verify_tokens(data)
    assert data.fingerprint()["sha256"] == file_sha256(data.path)
    assert data.fingerprint()["tokens"] == len(ids) and data.fingerprint()["dtype"] == form.get("dtype", "uint16")
    with pytest.raises(InputError, match="id 20 at token 20, but the model has 20"):
        verify_tokens(PretrainDataset(data.path, 8, vocab_size=20))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED") or sys.platform != "linux", reason="asked as Linux tells it")
@pytest.mark.parametrize("write", [write_tokens, write_llm_c], ids=["plain", "with a header"])
def test_what_is_read_ahead_is_in_memory_and_nothing_else(tmp_path, write):
    data = PretrainDataset(write(tmp_path / "a.bin", np.arange(1 << 22) % 100), seq_len=512, vocab_size=100)
    with open(data.path, "rb") as file:
        os.fsync(file.fileno())
    drop_from_cache(data.path)
    samples = np.array([3, 4000, len(data) - 1])
    if resident(data, len(data) // 2):
        pytest.skip("this file system keeps everything in memory")
    data.read_ahead(samples)
    deadline = time.monotonic() + 60
    while not all(resident(data, sample) for sample in samples):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not resident(data, len(data) // 2)


def resident(data, sample) -> bool:
    """Whether all pages of a sample are in memory, as mincore(2) says; nothing is read."""
    address = data.tokens.ctypes.data + int(sample) * data.seq_len * data.tokens.itemsize
    first, end = address // mmap.PAGESIZE * mmap.PAGESIZE, address + (data.seq_len + 1) * data.tokens.itemsize
    pages = (ctypes.c_ubyte * -(-(end - first) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(end - first), pages) == 0
    return all(page & 1 for page in pages)


@pytest.mark.parametrize("write", [write_tokens, write_llm_c], ids=["plain", "with a header"])
def test_a_file_that_is_shortened_while_it_is_open_is_one_clear_line(tmp_path, write):
    """By two bytes here, which leave its last page: then the map reads zeros. Without the page it is a bus error."""
    data = PretrainDataset(write(tmp_path / "a.bin", range(41)), seq_len=8, vocab_size=100)
    size = os.path.getsize(data.path)
    os.truncate(data.path, size - 2)
    for read in (lambda: data.batch(np.arange(1), rows=1), data.token_arrays):
        with pytest.raises(InputError, match=f"a.bin: {size - 2:,} bytes found, {size:,} when it was opened") as raised:
            read()
        assert "\n" not in str(raised.value)
    os.truncate(data.path, size + 2)
    data.batch(np.arange(1), rows=1)


def test_a_file_that_is_replaced_while_it_is_open_is_read_as_it_was(tmp_path):
    data = PretrainDataset(write_tokens(tmp_path / "a.bin", range(41)), seq_len=8, vocab_size=100)
    write_tokens(tmp_path / "b.bin", range(4)).replace(data.path)
    assert data.batch(np.arange(1), rows=1)[0].tolist() == [[*range(8)]]


@pytest.mark.parametrize(
    ("changes", "cut", "match"),
    [
        ({"version": 2}, None, "version is 2, expected 1"),
        (LLAMA_3 | {"version": 1}, None, "version is 1, expected 7"),
        ({"count": 40}, None, "has 1,106 bytes where the header's 40 tokens of 2 bytes take 1,104"),
        ({"count": -1}, None, "the header's -1 tokens"),
        ({"dtype": "uint32"}, None, "has 1,188 bytes where the header's 41 tokens of 2 bytes take 1,106"),
        (LLAMA_3 | {"dtype": "uint16"}, None, "the header's 41 tokens of 4 bytes take 1,188"),
        ({}, -1, "has 1,105 bytes"),
        ({}, 1024, "has 1,024 bytes where the header's 41 tokens"),
        ({}, 1022, "fewer than the header's 1,024"),
        ({}, 4, "has 4 bytes, fewer than the header's"),
    ],
)
def test_a_damaged_header_is_one_clear_line(tmp_path, changes, cut, match):
    path = write_llm_c(tmp_path / "a.bin", range(41), **changes)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=match) as raised:
        PretrainDataset(path, seq_len=8, vocab_size=100)
    assert "\n" not in str(raised.value) and "a.bin" in str(raised.value)


def test_a_manifest_says_what_a_file_is_even_if_it_begins_like_one_of_llm_c(tmp_path):
    ids = [20240520 % 65536, 20240520 >> 16, 1, 0, *range(41)]
    path = write_tokens(tmp_path / "a.bin", ids, vocab_size=65536)
    assert PretrainDataset(path, seq_len=8, vocab_size=65536).tokens.tolist() == ids


def test_uint32_files_are_read(tmp_path):
    path = write_tokens(tmp_path / "a.bin", [70_000] * 20, dtype="uint32")
    inputs, _ = PretrainDataset(path, seq_len=8, vocab_size=70_001).batch(np.array([0]), rows=1)
    assert (inputs == 70_000).all()


def test_what_does_not_fit_is_one_clear_line(tmp_path):
    def open_with(match, ids=range(41), vocab_size=100, sha=None, **arguments):
        path = write_tokens(tmp_path / "a.bin", ids, **arguments)
        with pytest.raises(InputError, match=match) as raised:
            PretrainDataset(path, seq_len=8, vocab_size=vocab_size, tokenizer_sha256=sha).batch(np.arange(2), rows=2)
        assert "\n" not in str(raised.value)

    open_with("manifest says 50 tokens", tokens=50)
    open_with("another tokenizer", sha="u")
    open_with("holds id 16, but the model has 16", vocab_size=16)
    open_with("fewer than one sample", ids=range(8))
    open_with("dtype is 'int8'", tokens=41, dtype="int8")
    with pytest.raises(InputError, match="no such token file"):
        PretrainDataset(tmp_path / "none.bin", seq_len=8, vocab_size=100)
    (tmp_path / "odd.bin").write_bytes(b"x" * 101)
    with pytest.raises(InputError, match="even number"):
        PretrainDataset(tmp_path / "odd.bin", seq_len=8, vocab_size=100)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format_version": 99}), '{"format_version": 1}'])
def test_a_damaged_manifest_is_one_clear_line(tmp_path, text):
    path = write_tokens(tmp_path / "a.bin", range(41))
    manifest_path(path).write_text(text)
    with pytest.raises(InputError, match="a.json"):
        PretrainDataset(path, seq_len=8, vocab_size=100)


@pytest.mark.parametrize(("samples", "expected"), [(1, 0), (2, 1), (50, 1), (100, 1), (5_000, 50), (7_000_000, 1000)])
def test_a_small_share_is_held_out_for_validation(samples, expected):
    train, held_out = hold_out(samples)
    assert len(held_out) == expected and len(train) == samples - expected
    if samples <= 5000:
        assert sorted([*train.numbers(), *held_out]) == list(range(samples))


def test_holding_out_of_a_huge_file_takes_no_memory():
    samples = 2_400_000_000
    train, held_out = hold_out(samples)
    last = train[np.array([len(train) - 1])]
    assert len(train) == samples - 1000 and last == samples - 2 and held_out[-1] == samples - 1

"""A token file of 3 TB: all that is counted in it needs 64 bits. It is sparse, so it takes no room on the disk."""

import dataclasses
import os

import numpy as np
import pytest

from model.dataset import PretrainDataset
from model.text.tokenization import tokenizer_sha256
from model.token_file.manifest import Manifest, read_manifest, write_manifest
from model.training.order import SampleOrder, Source
from tests.tiny_runs import exit_code_here

BYTES = 3 * 10**12
SEQ_LEN = 64
LAST = np.arange(1, SEQ_LEN + 2)  # the last tokens


@pytest.fixture(params=["uint16", "uint32"])
def huge_file(tmp_path, request):
    """Zeros, and LAST as the last tokens that a sample holds; of uint32 with a manifest."""
    path, dtype = tmp_path / "huge.bin", np.dtype(request.param).newbyteorder("<")
    tokens = BYTES // dtype.itemsize
    begin = (tokens - 1) // SEQ_LEN * SEQ_LEN - SEQ_LEN  # of the last sample
    try:
        with open(path, "wb") as file:
            os.truncate(path, BYTES)
            file.seek(begin * dtype.itemsize)
            file.write(LAST.astype(dtype).tobytes())
    except OSError as error:
        pytest.skip(f"this file system takes no file of 3 TB ({error.strerror})")
    if request.param == "uint32":
        write_manifest(path, Manifest(request.param, 300, 1, 2, tokens, 10**10, "t", "test", "0" * 64))
    return path


def test_the_last_sample_of_three_terabytes_is_read_and_reached_by_the_order(huge_file):
    data = PretrainDataset(huge_file, SEQ_LEN, vocab_size=300)
    tokens = BYTES // data.tokens.dtype.itemsize
    assert data.fingerprint()["tokens"] == len(data.tokens) == tokens > 2**39
    assert len(data) == (tokens - 1) // SEQ_LEN > 2**33
    data.read_ahead(np.array([len(data) - 1, 0]))
    inputs, targets = data.batch(np.array([len(data) - 1, 0]), rows=2)
    assert inputs[0].tolist() == LAST[:-1].tolist() and targets[0].tolist() == LAST[1:].tolist()
    assert not inputs[1].any()
    assert data.count_targets(np.array([len(data) - 1])) == SEQ_LEN

    training, held_out = data.hold_out()
    assert len(training) + len(held_out) == len(data) and 990 < len(held_out) <= 1000
    order = SampleOrder([Source(training, len(training))], seed=42, rows_per_step=64)
    end = 3 * order.per_epoch  # of the third epoch
    samples = order.next_step(end - 64)
    assert len(samples) == 64 and samples.max() > 2**33 and samples.max() < len(data)
    last = len(data) - 1
    assert (data.batch(samples, rows=64)[0].any(dim=1).numpy() == (samples == last)).all()
    assert order.steps_left(end - 128, epochs=3) == 2 and order.count_targets(end, data) == end * SEQ_LEN


@pytest.mark.long
def test_a_run_on_three_terabytes_is_planned_and_steps(huge_file, flags, tokenizer_folder, capfd):
    if (manifest := read_manifest(huge_file)) is not None:
        write_manifest(huge_file, dataclasses.replace(manifest, tokenizer_sha256=tokenizer_sha256(tokenizer_folder)))
    options = {"train_data_path": huge_file, "max_seq_len": SEQ_LEN, "max_steps": None, "epochs": 2, "compile": "false"}
    assert exit_code_here(flags(**options), "--dry_run") == 0
    out, said = capfd.readouterr()
    samples = len(PretrainDataset(huge_file, SEQ_LEN, vocab_size=300).hold_out()[0])
    assert f"data: {samples:,} samples of {SEQ_LEN} tokens" in said
    assert f"{2 * samples * SEQ_LEN:,} (2 epochs)" in out and f"{2 * -(-samples // 4):,}" in out

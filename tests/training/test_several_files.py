"""Several token files as one: what is read of each, how it resumes, and what is refused."""

import shutil

import numpy as np
import pytest
import torch

from model.dataset import PretrainDataset
from model.storage.archive import load_torch
from model.token_file.manifest import file_sha256, manifest_path, read_manifest, write_manifest
from model.training.data import TrainingData
from model.training.order import apportioned
from model.training.settings import build_settings
from tests.chat_files import CHATS, write_chats
from tests.tiny_runs import (
    assert_a_killed_run_resumes,
    assert_two_processes_resume,
    exit_code_here,
    losses,
    refused,
    train,
    two_ranks,
)


@pytest.fixture
def files(tmp_path, token_file) -> list[str]:
    """The tests' token file, cut into three of different length."""
    manifest, tokens = read_manifest(token_file), np.fromfile(token_file, "<u2")
    (tmp_path / "data").mkdir()
    ends, paths = [0, len(tokens) // 2, len(tokens) * 4 // 5, len(tokens)], []
    for number, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        path = tmp_path / "data" / f"part_{number}.bin"
        tokens[begin:end].tofile(path)
        write_manifest(path, manifest_of(path, manifest, end - begin))
        paths.append(str(path))
    return paths


def manifest_of(path, manifest, tokens):
    return type(manifest)(**vars(manifest) | {"tokens": tokens, "sha256": file_sha256(path)})


@pytest.fixture
def data_of(flags):
    """TrainingData of a run with these flags."""

    def build(**changes):
        lines = []
        data = TrainingData(build_settings({}, flags(**changes)), verify=True, say=lines.append)
        data.said = lines
        return data

    return build


def in_epoch(data, epoch=0) -> np.ndarray:
    """The samples that an epoch reads, in order."""
    order = data.order(seed=1, rows_per_step=7)
    return order.samples_at(np.arange(epoch * order.per_epoch, (epoch + 1) * order.per_epoch))


def sizes_of(files) -> np.ndarray:
    return np.array([len(PretrainDataset(path, 32, 300)) for path in files])


def test_each_sample_of_all_files_is_read_once_an_epoch_and_is_what_its_file_holds(data_of, files):
    data, sizes = data_of(train_data_path=files), sizes_of(files)
    assert len(data.train) == sizes.sum() and len(data.val_samples) == sizes.sum() // 100
    for epoch in range(2):
        assert sorted([*in_epoch(data, epoch), *data.val_samples]) == list(range(sizes.sum()))
    assert (in_epoch(data) != in_epoch(data, 1)).any()
    samples = np.array([0, sizes[0] - 1, sizes[0], sizes.sum() - 1, 3, sizes[:2].sum()])  # of all files, in disorder
    inputs, targets = data.train.batch(samples, rows=8)
    begins = np.cumsum([0, *sizes])
    for row, sample in enumerate(samples):
        number = np.searchsorted(begins, sample, side="right") - 1
        alone = PretrainDataset(files[number], 32, 300).batch(np.array([sample - begins[number]]), rows=1)
        assert torch.equal(inputs[row], alone[0][0]) and torch.equal(targets[row], alone[1][0])
    assert (targets[6:] == -100).all()


def test_a_glob_is_its_files_in_order_without_those_that_are_for_something_else(data_of, files):
    by_name = data_of(train_data_path=files)
    by_glob = data_of(train_data_path=str(files[0]).replace("part_0", "part_*"))
    assert by_glob.fingerprint == by_name.fingerprint and by_name.fingerprint["files"] == 3
    assert [by_name.fingerprint[f"{number}_sha256"] for number in (1, 2, 3)] == [file_sha256(path) for path in files]
    validated = data_of(train_data_path=str(files[0]).replace("part_0", "*"), val_data_path=files[2])
    assert validated.fingerprint == data_of(train_data_path=files[:2], val_data_path=files[2]).fingerprint


def test_a_file_that_is_validated_on_and_trained_on_is_warned_of(data_of, files):
    both = data_of(train_data_path=files, val_data_path=files[1])
    assert [line for line in both.said if "is trained on too" in line and files[1] in line]
    assert not [line for line in data_of(train_data_path=files[:1], val_data_path=files[1]).said if "too" in line]


def test_weights_are_exact_shares_of_an_epoch_and_of_every_stretch_of_it(data_of, files):
    entries = [files[0].replace("part_0", "part_[01]"), files[2]]
    data = data_of(train_data_path=entries, train_data_weights=[1, 3])
    sizes = sizes_of(files)
    small = sizes[2]
    training = [len(source.samples) for source in data.sources]
    assert training == [sizes[0] + sizes[1] - (sizes[0] + sizes[1]) // 100, small - small // 100]
    per_epoch = [source.per_epoch for source in data.sources]
    assert per_epoch == apportioned(sum(training), [1, 3]) and data.fingerprint["samples_per_epoch"] == per_epoch
    assert abs(per_epoch[1] - 0.75 * sum(training)) <= 0.5 and sum(per_epoch) == sum(training)
    assert f"75.0% of the samples are of {files[2]}" in " ".join(data.said)

    read = np.concatenate([in_epoch(data, epoch) for epoch in range(6)])
    is_small = read >= sizes[:2].sum()
    assert np.abs(is_small.cumsum() - 0.75 * np.arange(1, len(read) + 1)).max() < 4
    for of_entry, samples in ((~is_small, data.sources[0].samples), (is_small, data.sources[1].samples)):
        its, size = read[of_entry], len(samples)
        passes = [its[begin : begin + size] for begin in range(0, len(its) - size + 1, size)]
        assert passes and all(np.array_equal(np.sort(one), samples.numbers()) for one in passes)
    assert not set(read) & set(data.val_samples)
    assert len(set(data.val_samples >= sizes[:2].sum())) == 2  # both are validated on


def test_a_weight_that_stands_for_less_than_a_sample_is_warned_of(data_of, files):
    said = data_of(train_data_path=files, train_data_weights=[1, 1e-9, 1]).said
    (line,) = [line for line in said if line.startswith("warning: train_data_weights")]
    assert f"1e-09 of 2 for {files[1]} is less than one of " in line and "; one is read in each epoch; raise it" in line
    assert not [
        line for line in data_of(train_data_path=files, train_data_weights=[1, 1, 1]).said if "less than" in line
    ]


def test_numbers_in_proportion_to_weights_add_up():
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3] and apportioned(7, [0.7, 0.2, 0.1]) == [5, 1, 1]
    assert apportioned(10**12, [2, 1]) == [666666666667, 333333333333] and apportioned(100, [1e9, 1]) == [100, 1]


# ------------------------------------------------------------------------------------------------------------ in a run

WEIGHTED = {"train_data_weights": [0.3, 1, 2], "batch_size": 7, "optimizer_type": "muon"}


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [WEIGHTED, {"sample_start": "document", "document_mask": "true", "max_seq_len": 96}]
)
def test_a_killed_run_resumes_and_ends_with_the_same_bits(flags, files, tmp_path, options):
    assert_a_killed_run_resumes(flags, tmp_path, "pretrain_32", train_data_path=files, **options)


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits(flags, files, tmp_path):
    assert_two_processes_resume(flags, tmp_path, train_data_path=files, train_data_weights=[1, 2, 3])


@pytest.mark.long
def test_two_processes_read_what_one_does(flags, files, tmp_path):
    options = {"train_data_path": files, "train_data_weights": [1, 2, 3], "dtype": "float32"}
    train(flags(batch_size=4, out_dir=tmp_path / "one", **options))
    result = two_ranks(flags(batch_size=2, out_dir=tmp_path / "two", **options))
    assert result.returncode == 0, result.stderr
    assert dict(losses(tmp_path / "two")) == pytest.approx(dict(losses(tmp_path / "one")), abs=1e-5)


@pytest.mark.long
def test_another_set_of_files_is_not_resumed(flags, files, tmp_path, capfd):
    train(flags(train_data_path=files, max_steps=4))
    sizes = [read_manifest(path).tokens for path in files]
    for others, expected in (
        (files[:2], f"tokens {sum(sizes)} there, {sum(sizes[:2])} here; files 3 there, 2 here"),
        ([*files, copied(files[0])], "files 3 there, 4 here"),
        (files[::-1], f"tokens of file 1 {sizes[0]} there, {sizes[2]} here; sha256 of file 1 "),
        (files[0], f"tokens {sum(sizes)} there, {sizes[0]} here"),
    ):
        said = refused(flags(train_data_path=others), capfd, "--resume")
        assert f"was made with other data: {expected}" in said or f"; {expected}" in said
        assert "give the same data, or begin a new run" in said
    weighted = {"train_data_path": files, "train_data_weights": [1, 1, 1], "out_dir": tmp_path / "weighted"}
    train(flags(max_steps=4, **weighted))
    assert load_torch(tmp_path / "weighted" / "checkpoint_step_4.pth")["data"]["files"] == 3
    said = refused(flags(**weighted | {"train_data_weights": [1, 1, 2]}), capfd, "--resume")
    assert "samples of each source in an epoch (train_data_weights) [" in said
    entries = {"train_data_path": [files[0].replace("part_0", "part_[01]"), files[2]], "train_data_weights": [1, 2]}
    train(flags(max_steps=4, out_dir=tmp_path / "entries", **entries))
    entries["train_data_path"][0] = files[1].replace("part_1", "part_[12]")
    entries["train_data_path"][1] = files[0]
    said = refused(flags(out_dir=tmp_path / "entries", **entries), capfd, "--resume")
    assert f"tokens of entry 1 {sum(sizes[:2])} there, {sum(sizes[1:])} here; " in said
    assert f"tokens of file 1 of entry 1 {sizes[0]} there, {sizes[1]} here; " in said
    assert exit_code_here(flags(max_steps=5, **weighted), "--resume") == 0


def copied(path: str) -> str:
    other = path.replace(".bin", "_again.bin")
    shutil.copy(path, other)
    shutil.copy(manifest_path(path), manifest_path(other))
    return other


@pytest.mark.long
def test_a_dry_run_reports_all_files(flags, files, capfd):
    assert exit_code_here(flags(train_data_path=files, max_steps=None, epochs=1), "--dry_run") == 0
    out, said = capfd.readouterr()
    samples = sizes_of(files).sum() - sizes_of(files).sum() // 100
    assert f"train_data_path: 3 token files, from {files[0]} to {files[2]}" in said
    assert f"data: {samples} samples" in said and f"{samples * 32:,} (1 epoch)" in out


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_read_together_is_one_line(flags, files, tmp_path, capfd):
    manifest = read_manifest(files[1])
    missing, glob = str(tmp_path / "none.bin"), str(tmp_path / "none*.bin")
    for path, expected in (
        ([files[0], missing], f"train_data_path: no file {missing}, one of 2 token files"),
        ([files[0], glob], f"train_data_path: no token file matches {glob}"),
        (glob, f"train_data_path: no token file matches {glob}"),
        ([files[0], files[0]], f"{files[0]} is named twice; train_data_weights can give it"),
        ([files[0].replace("part_0", "*"), files[0]], f"{files[0]} is named twice"),
        ([files[0], str(manifest_path(files[0]))], "part_0.json is text, a token file (.bin) expected"),
        ([files[0], str(tmp_path)], "no plain file"),
    ):
        assert expected in refused(flags(train_data_path=path), capfd)
    said = refused(flags(train_data_path=files, raw_data_path=missing), capfd)
    assert "raw_data_path: it makes one token file, but train_data_path names 3" in said
    write_manifest(files[1], type(manifest)(**vars(manifest) | {"tokenizer_sha256": "u" * 64}))
    assert f"train_data_path: {files[1]}: made with another tokenizer" in refused(flags(train_data_path=files), capfd)
    assert not (tmp_path / "out").exists()


def test_chats_are_not_read_with_other_files(flags, files, tmp_path, tokenizer_folder, capfd):
    chats = str(write_chats(tmp_path / "chats.bin", CHATS[:12], tokenizer_folder))
    said = refused(flags(train_data_path=[files[0], chats], max_seq_len=96), capfd)
    assert f"{chats} holds chats, but of 2 token files each must hold texts; make one file of all chats" in said

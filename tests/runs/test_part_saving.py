"""Checkpoints that all ranks write: who writes what, what becomes of the parts, and runs of several processes.

Kills, full disks, damage and other numbers of processes: tests/reliability/part_saves.py.
"""

import errno
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch

from model.runs.checkpoint import restore_state
from model.runs.copying import CHECKPOINT, Copier
from model.runs.folder import (
    claim,
    interrupted_stem,
    leave_line,
    move_earlier_run,
    prune_checkpoints,
    remove_stray_parts,
)
from model.runs.part_saving import split
from model.runs.resume import load_checkpoint
from model.runs.supervisor import Supervisor
from model.storage.files import TEMPORARY_NAME, temporary_path
from model.storage.part_names import PARTS, index_name
from model.storage.parts import load_parted, part_names
from model.storage.slices import copy_by_name, describe
from model.training.optimizer import build_optimizer
from model.training.recipe import all_should_write
from model.training.sharding import InPieces
from model.weights import load_weights
from model.weights.find import find_weights
from tests.conftest import random_model
from tests.parted import save_in_parts
from tests.reliability.states import differences, resumed_from
from tests.runs.test_processes import ranks
from tests.tiny_runs import assert_equal, train, two_ranks, wait_for
from tests.weights.test_checkpoint import CONFIG, checkpoint_content

STEP, BYTES = "checkpoint_step_{}.pth".format, 10**9

# --------------------------------------------------------------------------------------------------- who writes what


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_element_is_written_once_and_what_has_two_names_too(count):
    content = checkpoint_content()
    state = {section: content[section] for section in ("model", "ema", "optimizer")}
    divided = [split(state, rank, count) for rank in range(count)]
    assert all(described == divided[0][0] for described, _ in divided)
    written = [slice for _, own in divided for slice in own]
    sizes = [sum(slice.end - slice.start for slice in own) for _, own in divided]
    numbers = sum(p.numel() for p in random_model(CONFIG).parameters())
    assert len({*written}) == len(written) and "model/output.weight" not in {slice.key for slice in written}
    assert sum(sizes) == 3 * numbers + len(content["optimizer"]["state"])  # weights, two moments, a step each
    assert max(sizes) - min(sizes) <= 2 * 64
    assert divided[0][0]["model"]["output.weight"]["in_parts"] == "model/tok_embeddings.weight"


def test_what_is_in_pieces_is_written_by_those_who_give_them():
    weight = torch.arange(10.0)
    for rank, (start, end) in enumerate(((0, 4), (4, 10))):
        piece = InPieces(torch.Size((5, 2)), torch.float32, {(start, end): weight[start:end]})
        described, own = split({"model": {"a": piece, "b": piece}}, rank, 2)
        assert described == {"model": dict.fromkeys("ab", describe("model/a", (5, 2), torch.float32))}
        assert [(*slice, part.tolist()) for slice, part in own.items()] == [
            ("model/a", start, end, weight[start:end].tolist())
        ]


@pytest.mark.parametrize(
    ("is_shared", "several_machines", "size", "expected"),
    [
        (True, False, BYTES, True),
        (True, False, BYTES - 1, False),
        (True, True, BYTES, False),
        (False, False, BYTES, False),
    ],
)
def test_auto_has_all_write_where_much_is_shared_on_one_disk(is_shared, several_machines, size, expected):
    assert all_should_write(is_shared, several_machines, size) == expected


# ------------------------------------------------------------------------------------------------ what they leave


@pytest.fixture
def parted(tmp_path):
    """Writes a checkpoint of a step in two parts; returns its files' names."""

    def save(step, name=None, count=2) -> set[str]:
        path = tmp_path / (name or STEP(step))
        parts = save_in_parts(path, checkpoint_content(step), count)
        if path.name == "checkpoint_interrupted.pth":
            content = torch.load(path, weights_only=True)
            raise_names(path, content, interrupted_stem(tmp_path, step), parts)
            parts = [tmp_path / name for name in part_names(path)]
        return {path.name, *(part.name for part in parts)}

    return save


def raise_names(path, content, stem, parts) -> None:
    """Give the parts of an interrupted checkpoint the names that a run gives them."""
    from model.storage.archive import save_torch

    for entry, part in zip(content["parts"], parts, strict=True):
        entry["name"] = part.name.replace("checkpoint_interrupted", stem)
        part.rename(part.with_name(entry["name"]))
    save_torch(path, content)


def names(folder) -> set[str]:
    return {path.name for path in folder.glob("checkpoint_*")}


def test_parts_are_removed_with_their_index_and_those_being_written_stay(tmp_path, parted):
    parted(9), parted(57, "checkpoint_interrupted.pth")
    kept = parted(10) | parted(100)
    being_written = tmp_path / "checkpoint_step_110.part-00001-of-00002.pth"
    left = tmp_path / "checkpoint_step_20.part-00000-of-00002.pth"  # of a save that failed
    for path in (being_written, left):
        path.write_bytes(b"part")
    prune_checkpoints(tmp_path, keep_last=2, verified=100)
    assert names(tmp_path) == kept | {being_written.name}


def test_an_interrupted_checkpoint_that_is_being_read_ends_no_training(tmp_path, parted, monkeypatch):
    """Windows removes no file that is open; the next save does."""
    read, kept = parted(57, "checkpoint_interrupted.pth") | parted(9), parted(100)
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name in read:
            raise PermissionError(13, "being used by another process")
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        prune_checkpoints(tmp_path, keep_last=1, verified=100)
    assert names(tmp_path) == kept | read
    prune_checkpoints(tmp_path, keep_last=1, verified=100)
    assert names(tmp_path) == kept


def test_what_killed_saves_left_is_removed_by_the_next_start(tmp_path, parted):
    kept = parted(8) | parted(9, "checkpoint_interrupted.pth")
    for name in ("checkpoint_step_12.part-00000-of-00002.pth", "checkpoint_interrupted_9_1.part-00001-of-00002.pth"):
        (tmp_path / name).write_bytes(b"part")
    claim(tmp_path).release()
    assert names(tmp_path) == kept


def test_only_what_a_killed_save_left_is_removed_by_the_next_start(tmp_path):
    """Temporary files of the user stay, and those that another machine may be writing."""
    here = TEMPORARY_NAME.fullmatch(temporary_path(tmp_path / "a.pth").name)["host"]
    own, young, old = (f"a.pth.{host}-{2**31 - 2}-abcd.tmp" for host in (here, "0000", "ffff"))
    for name in ("notes.tmp", ".swap.tmp", own, young, old):
        (tmp_path / name).write_text("text")
    os.utime(tmp_path / old, (0, 0))
    claim(tmp_path).release()
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"notes.tmp", ".swap.tmp", young}


def test_parts_that_a_copy_of_their_index_names_stay(tmp_path, parted):
    old = parted(9)
    (tmp_path / "keep.pth").write_bytes((tmp_path / "checkpoint_step_9.pth").read_bytes())
    new = parted(100)
    prune_checkpoints(tmp_path, keep_last=1, verified=100)
    claim(tmp_path).release()
    assert names(tmp_path) == new | (old - {"checkpoint_step_9.pth"})
    assert load_parted(tmp_path / "keep.pth")["progress"]["step"] == 9


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O"), MemoryError(), RuntimeError("unable to mmap 9 bytes: Cannot allocate (12)")]
)
def test_no_part_is_removed_while_an_index_cannot_be_read(tmp_path, parted, monkeypatch, error):
    stray = tmp_path / "checkpoint_step_7.part-00000-of-00002.pth"
    kept = parted(9) | parted(9, "checkpoint_interrupted.pth") | {stray.name}
    stray.write_bytes(b"part")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", fail)
        claim(tmp_path).release()
        assert names(tmp_path) == kept
        target = leave_line(tmp_path, 5)
    assert names(target) == kept - {stray.name}
    claim(tmp_path).release()
    assert names(tmp_path) == set()


def test_no_part_of_an_interrupted_checkpoint_is_replaced(tmp_path, parted):
    assert interrupted_stem(tmp_path, 5) == "checkpoint_interrupted_5"
    first = parted(5, "checkpoint_interrupted.pth")
    assert "checkpoint_interrupted_5.part-00001-of-00002.pth" in first
    assert interrupted_stem(tmp_path, 5) == "checkpoint_interrupted_5_1"
    second = parted(5, "checkpoint_interrupted.pth")
    assert names(tmp_path) == first | second and len(first | second) == 5
    remove_stray_parts(tmp_path)
    assert names(tmp_path) == second and resumed_from(tmp_path)[0].content["progress"]["step"] == 5


def test_parts_move_with_their_checkpoint(tmp_path, parted):
    (tmp_path / "config.yaml").write_text("# started 20260101T120000\n")
    kept, newer = parted(5), parted(9) | parted(8, "checkpoint_interrupted.pth")
    target = leave_line(tmp_path, 5)
    assert names(tmp_path) == kept and names(target) == newer
    assert load_checkpoint(target / STEP(9))["progress"]["step"] == 9
    target = move_earlier_run(tmp_path)
    assert names(tmp_path) == set() and names(target) == kept


def test_a_copy_has_the_parts_and_then_the_index(tmp_path, parted):
    (tmp_path / "config.yaml").write_text("# started 20260101T120000\n")
    copier, said = None, []
    copier = Copier(tmp_path, tmp_path / "copy", "20260101T120000", 0, said.append)
    for step in (1, 2, 3):
        files = parted(step)
        copier.offer(CHECKPOINT, *sorted(files - {STEP(step)}), STEP(step))
        wait_for(lambda: not copier._unfinished())
    copier.finish()
    assert said == [] and names(tmp_path / "copy") == parted(2) | parted(3)
    assert resumed_from(tmp_path / "copy")[0].content["progress"]["step"] == 3


def test_a_part_alone_is_neither_weights_nor_progress(tmp_path, parted):
    parted(5)
    supervisor = Supervisor([], [], tmp_path, 1, print)
    assert {*supervisor._checkpoints()} == {STEP(5)}
    assert find_weights(tmp_path)[0].name == STEP(5)
    (tmp_path / STEP(5)).unlink()
    assert supervisor._checkpoints() == {} and resumed_from(tmp_path) == (None, [])
    assert all(index_name(path) == STEP(5) for path in tmp_path.glob(PARTS))


# ------------------------------------------------------------------------------------------------ loading and runs


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
def test_an_optimizer_that_shares_nothing_takes_it_too(tmp_path, optimizer_type):
    content = checkpoint_content(optimizer_type=optimizer_type)
    save_in_parts(tmp_path / STEP(5), content, 3)
    model = random_model(CONFIG, seed=1)
    optimizer, scaler = build_optimizer(model, optimizer_type, 1e-3, 0.1), torch.amp.GradScaler("cpu", enabled=False)
    load = functools.partial(copy_by_name, targets=model.state_dict())
    progress = restore_state(load_checkpoint(tmp_path / STEP(5)), load, None, optimizer, scaler)
    assert progress.step == 5
    assert_equal(dict(model.state_dict()), dict(content["model"]))
    assert_equal(optimizer.state_dict()["state"], content["optimizer"]["state"])


SAVED_BY_SOME = """
import torch
from pathlib import Path
from model.errors import InputError, TrainingDiverged
from model.runs.part_saving import PartSaver
folder = Path({folder!r})
saver = PartSaver(folder, processes, print)
def save(number, mine):
    state = {{"model": {{"w": torch.arange(1000.0), "x": torch.full((500,), mine)}}}}
    described, saved = saver.save(state, number, False, lambda: None)
    if rank == 0:
        try:
            print(*saved.write_index(folder / f"checkpoint_step_{{number}}.pth", described | {{"progress": {{}}}}))
        except (InputError, TrainingDiverged) as error:
            print(f"{{type(error).__name__}}: {{error}}")
    processes.barrier()
save(1, 1.0)
save(2, torch.nan if rank else 1.0)
if rank:
    (folder / "checkpoint_step_3.part-00001-of-00002.pth").mkdir()
processes.barrier()
save(3, 1.0)
save(4, 1.0)
saver.close()
"""


@pytest.mark.long
def test_a_rank_that_cannot_write_is_named_and_the_next_save_succeeds(tmp_path):
    (code, said, errors), (other, *_) = ranks(SAVED_BY_SOME.format(folder=str(tmp_path)))
    assert (code, other, errors) == (0, 0, "")
    first, second, third, fourth = said.splitlines()
    parts = [f"checkpoint_step_1.part-0000{rank}-of-00002.pth" for rank in (0, 1)]
    assert first.split() == parts and fourth == first.replace("step_1", "step_4")
    assert second.startswith("TrainingDiverged: rank 1: weights, optimizer state or moving average are not finite")
    assert third.startswith(
        f"InputError: rank 1: {tmp_path}/checkpoint_step_3.part-00001-of-00002.pth: cannot be written"
    )
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        *parts, STEP(1), *(name.replace("step_1", "step_4") for name in parts), STEP(4)
    }  # fmt: skip


@pytest.mark.long
def test_two_ranks_that_write_parts_save_what_one_writes_and_resume_with_the_same_bits(flags, tmp_path):
    options = {"optimizer_type": "muon", "use_ema": "true", "dropout": 0.1, "shard": "optimizer"}
    options |= {"n_experts": 3, "expert_bias": "true"}  # biases are buffers, which no rank has a piece of
    one, parts = tmp_path / "one", tmp_path / "parts"
    for folder, writers in ((one, "one"), (parts, "all")):
        copies = tmp_path / f"copies_{writers}"
        result = two_ranks(flags(out_dir=folder, copy_to=copies, checkpoint_writers=writers, **options))
        assert result.returncode == 0, result.stderr
        assert differences(folder / STEP(12), copies / STEP(12)) == []
    assert len([*parts.glob("checkpoint_step_12.part-*")]) == 2 and not [*one.glob(PARTS)]
    assert differences(one / STEP(12), parts / STEP(12)) == []
    for path in parts.glob("checkpoint_step_12.*"):
        path.unlink()
    shutil.rmtree(one / "previous", ignore_errors=True)
    result = two_ranks(flags(out_dir=parts, checkpoint_writers="one", resume="true", **options | {"shard": "none"}))
    assert result.returncode == 0 and "at step 8" in result.stderr, result.stderr
    assert "other settings" not in result.stderr and not [*parts.glob("checkpoint_step_12.part-*")]
    assert differences(one / STEP(12), parts / STEP(12)) == []


@pytest.mark.long
def test_one_process_writes_one_file_and_says_so(flags, tmp_path, capfd):
    assert train(flags(checkpoint_writers="all", max_steps=4)).plan.writers == 1
    assert not [*(tmp_path / "out").glob(PARTS)]
    assert "checkpoint_writers all: there is one process, which writes one file" in capfd.readouterr().err


@pytest.mark.slow
def test_adapters_and_frozen_weights_are_saved_too(flags, tmp_path):
    train(flags(max_steps=4, out_dir=tmp_path / "base"))
    given_by_weights = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    options = {"init_from": tmp_path / "base" / "pretrain_32.pth", "lora_rank": 4, "use_ema": "true"}
    for writers in ("one", "all"):
        shared = {"shard": "optimizer", "checkpoint_writers": writers, "out_dir": tmp_path / writers}
        result = two_ranks(flags(**options, **given_by_weights, **shared))
        assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "one" / STEP(12), tmp_path / "all" / STEP(12)) == []
    index = torch.load(tmp_path / "all" / STEP(12), weights_only=True)
    embedding, adapter = "tok_embeddings.weight", "layers.0.attention.wq.lora_a"
    assert index["ema"][embedding]["in_parts"] == f"model/{embedding}"  # it is frozen, and written once
    assert index["ema"][adapter]["in_parts"] == f"ema/{adapter}"
    weights = [load_weights(tmp_path / writers / STEP(12)).state_dict for writers in ("one", "all")]
    assert_equal(*weights)

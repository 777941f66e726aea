"""`copy_to`: copies in a folder that is slow, full, gone or damaged, and runs that are resumed from them."""

import builtins
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from model.errors import InputError
from model.runs.copying import CHECKPOINT, Copier, copy_checked
from model.runs.folder import started_at
from model.runs.resume import find_checkpoint
from model.runs.status import read_status
from model.storage.archive import save_torch
from model.training.settings import build_settings
from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import ONE_THREAD, assert_same_end, command, losses, refused, run, train, two_ranks, wait_for
from tests.weights.test_checkpoint import checkpoint_content

WEIGHTS = {"best_model.pth", "best_model.json", "pretrain_32.pth", "pretrain_32.json"}
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and mounts as Linux has them")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def copier(tmp_path, said):
    """Makes a copier of a run's folder, which holds a config.yaml and checkpoints that are none."""

    def make(started="20260101T000000", step=0) -> Copier:
        out, drive = tmp_path / "out", tmp_path / "drive"
        out.mkdir(exist_ok=True)
        drive.mkdir(exist_ok=True)
        (out / "config.yaml").write_text(f"# started {started}\n")
        for number in range(1, 6):
            (out / f"checkpoint_step_{number}.pth").write_bytes(bytes([number]) * 100_000)
        return Copier(out, drive / "copy", started, step, said.append)

    return make


def copied(copier: Copier, step: int) -> None:
    """Offer a checkpoint and wait until the thread is done with it."""
    copier.offer(CHECKPOINT, f"checkpoint_step_{step}.pth")
    wait_for(lambda: not copier._unfinished())


# --------------------------------------------------------------------------------------------------------- the copier


def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path, copier, said):
    made, copy = copier(), tmp_path / "drive" / "copy"
    for step in (1, 2, 3, 5):
        copied(made, step)
    made.offer(CHECKPOINT, "checkpoint_step_4.pth")
    made.finish()
    assert said == [] and {"config.yaml", "checkpoint_step_4.pth"} < names(copy)
    assert len(list(copy.glob("checkpoint_*"))) == 2 and not list(copy.glob("*.tmp"))
    assert (copy / "checkpoint_step_4.pth").read_bytes() == bytes([4]) * 100_000


def test_a_copy_of_the_interrupted_checkpoint_goes_with_the_next_one(tmp_path, copier):
    made, copy = copier(), tmp_path / "drive" / "copy"
    (tmp_path / "out" / "checkpoint_interrupted.pth").write_bytes(b"interrupted")
    copied(made, 1)
    copied(made, 2)
    made.offer(CHECKPOINT, "checkpoint_interrupted.pth")
    wait_for(lambda: not made._unfinished())
    assert {"checkpoint_step_2.pth", "checkpoint_interrupted.pth"} == names(copy) - {"config.yaml"}
    copied(made, 3)
    assert {"checkpoint_step_2.pth", "checkpoint_step_3.pth"} == names(copy) - {"config.yaml"}


def test_another_runs_copies_and_later_steps_are_moved_aside(tmp_path, copier, said):
    copied(copier(), 2)
    copied(copier(started="20260202T000000"), 4)
    copy = tmp_path / "drive" / "copy"
    assert started_at(copy) == "20260202T000000" and "of another run" in said[-1]
    assert "checkpoint_step_2.pth" in names(copy / "previous" / "20260101T000000")
    copied(copier(started="20260202T000000", step=3), 3)
    assert "of later steps" in said[-1]
    assert {path.name for path in copy.glob("*.pth")} == {"checkpoint_step_3.pth"}
    assert len(list(copy.glob("previous/*/checkpoint_step_4.pth"))) == 1


def test_a_drive_that_is_not_mounted_is_a_line_and_gets_its_copy_once_it_is(tmp_path, copier, said):
    made, drive = copier(), tmp_path / "drive"
    copied(made, 1)
    shutil.rmtree(drive)
    copied(made, 2)
    (told,) = said
    assert "checkpoint_step_2.pth is not copied: there is no folder" in told and "is the drive mounted?" in told
    assert not drive.exists()  # nothing is written to the disk below
    drive.mkdir()
    copied(made, 3)
    assert {"config.yaml", "checkpoint_step_3.pth"} == names(drive / "copy") and len(said) == 1


def test_a_file_in_the_place_of_the_folder_is_a_line(tmp_path, copier, said):
    made = copier()
    (tmp_path / "drive" / "copy").write_text("mine")
    copied(made, 1)
    made.finish()
    assert len(said) == 3 and "File exists" in said[0] and "lacks checkpoint_step_1.pth" in said[-1]
    assert (tmp_path / "drive" / "copy").read_text() == "mine"


def test_a_copy_that_reads_back_differently_gets_no_name(tmp_path, copier, said, monkeypatch):
    def spoil(path: Path) -> None:
        if path.name.startswith("checkpoint_step_2.pth"):
            content = bytearray(path.read_bytes())
            content[50_000] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr("model.runs.copying.drop_from_cache", spoil)
    made = copier()
    copied(made, 1)
    copied(made, 2)
    assert {"config.yaml", "checkpoint_step_1.pth"} == names(tmp_path / "drive" / "copy")
    assert len(said) == 1 and "what was read back is not what was written" in said[0]


def test_a_slow_folder_gets_the_newest_and_holds_the_end_for_a_limited_time(tmp_path, copier, said, monkeypatch):
    go_on, copies = threading.Event(), []

    def blocked(source: Path, target: Path) -> None:
        copies.append(source.name)
        go_on.wait(600)
        copy_checked(source, target)

    monkeypatch.setattr("model.runs.copying.copy_checked", blocked)
    monkeypatch.setattr("model.runs.copying.QUIET_SECONDS", 0.1)
    made, beats = copier(), []
    for step in (1, 2, 3, 4, 5):
        made.offer(CHECKPOINT, f"checkpoint_step_{step}.pth")
    made.finish(lambda: beats.append(1), seconds=2)
    assert beats and copies == ["config.yaml"]
    waiting, lacks = said
    assert "for at most 2 s" in waiting and "checkpoint_step_5.pth" in lacks and str(tmp_path / "out") in lacks
    made.finish(seconds=600)  # was said already: does not wait again
    go_on.set()
    assert len(said) == 2


# -------------------------------------------------------------------------------------------------- and the training


class Failing(io.FileIO):
    """A file on a folder that fails."""

    code = 0

    def write(self, data) -> int:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.long
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENOTCONN])
def test_a_folder_that_fails_ends_no_run_and_is_tried_again(flags, tmp_path, monkeypatch, capfd, code):
    train(flags(out_dir=tmp_path / "whole"))
    weights, failures = (tmp_path / "whole" / "pretrain_32.pth").read_bytes(), []
    monkeypatch.setattr(Failing, "code", code)

    def opened(path, mode="r", *arguments):
        if Path(path).parent == tmp_path / "copy" and "x" in mode and len(failures) < 3:
            failures.append(path)
            return Failing(path, mode.replace("b", ""))
        return builtins.open(path, mode, *arguments)

    monkeypatch.setattr("model.storage.files.open", opened, raising=False)
    capfd.readouterr()
    assert train(flags(copy_to=tmp_path / "copy")).outcome == "finished"
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("copy_to: ")]
    assert len(failures) == 3 and 1 <= len(told) <= 3 and all(os.strerror(code) in line for line in told)
    assert (tmp_path / "out" / "pretrain_32.pth").read_bytes() == weights
    assert WEIGHTS | {"checkpoint_step_12.pth", "metrics.jsonl"} <= names(tmp_path / "copy")
    assert (tmp_path / "copy" / "pretrain_32.pth").read_bytes() == weights
    assert not list((tmp_path / "copy").glob("*.tmp"))


@pytest.mark.long
def test_a_folder_that_never_answers_holds_no_step_and_the_end_for_a_limited_time(flags, tmp_path, monkeypatch, capfd):
    train(flags(out_dir=tmp_path / "whole"))
    go_on = threading.Event()
    monkeypatch.setattr("model.runs.copying.copy_checked", lambda source, target: go_on.wait(600))
    monkeypatch.setattr("model.runs.copying.FINISH_SECONDS", 0.5)
    assert train(flags(copy_to=tmp_path / "copy")).outcome == "finished"
    go_on.set()
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("copy_to: ")]
    assert all(name in told for name in (*WEIGHTS, "checkpoint_step_12.pth", str(tmp_path / "out")))
    assert_same_end(tmp_path / "whole", tmp_path / "out")


def test_a_folder_that_is_not_there_is_told_as_the_run_begins(flags, tmp_path, capfd):
    assert train(flags(copy_to=tmp_path / "drive" / "copy", max_steps=2)).outcome == "finished"
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("copy_to: ")]
    missing = f"there is no folder {tmp_path / 'drive'}; is the drive mounted?"
    assert told[0] == f"copy_to: {missing} Nothing is copied until it is there."
    assert len(told) > 1 and "lacks" in told[-1]


@posix_only
def test_a_folder_that_cannot_be_looked_at_is_told_by_each_copy_and_ends_no_run(flags, tmp_path, capfd):
    copy = tmp_path / ("x" * 300) / "copy"  # no file system takes the name: an OSError, as of a broken mount
    assert train(flags(copy_to=copy, max_steps=2)).outcome == "finished"
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("copy_to: ")]
    assert "is not copied: [Errno" in told[0] and "lacks" in told[-1]


@pytest.mark.long
@posix_only
def test_a_full_disk_is_named_and_ends_no_run(flags, tmp_path):
    from tests.reliability.disks import can_mount

    if not can_mount():
        pytest.skip("no file system can be mounted here")
    train(flags(out_dir=tmp_path / "whole"))
    (tmp_path / "drive").mkdir()
    size = (tmp_path / "whole" / "checkpoint_step_12.pth").stat().st_size
    code = f"""
from tests.reliability.disks import private_tmpfs
private_tmpfs({str(tmp_path / "drive")!r}, {size * 3 // 2}, {str(tmp_path / "seen")!r})
import train
train.run_command(train.main)
"""
    words = command(flags(copy_to=tmp_path / "drive" / "copy"))[2:]
    result = run([sys.executable, "-c", code, *words], cwd=ROOT)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "is not copied" in result.stderr and "No space left on device" in result.stderr
    assert f"copy_to: {tmp_path / 'drive' / 'copy'} lacks" in result.stderr
    assert not list((tmp_path / "seen").rglob("*.tmp"))
    assert_same_end(tmp_path / "whole", tmp_path / "out")


@pytest.mark.long
def test_a_run_whose_disk_is_gone_is_resumed_from_its_copy_with_the_same_bits(flags, tmp_path):
    whole, out, copy = (tmp_path / name for name in ("whole", "out", "copy"))
    options = {"dropout": 0.1, "use_ema": "true"}
    train(flags(out_dir=whole, **options))
    train(flags(copy_to=copy, **options))
    assert WEIGHTS | {"checkpoint_step_12.pth", "metrics.jsonl", "config.yaml"} <= names(copy)
    for name in ("checkpoint_step_12.pth", *WEIGHTS):
        assert (copy / name).read_bytes() == (out / name).read_bytes()
    shutil.copy(out / "checkpoint_step_8.pth", copy)  # as if the copying had come so far
    for name in ("checkpoint_step_12.pth", "pretrain_32.pth", "pretrain_32.json"):
        (copy / name).unlink()
    started = started_at(out)
    shutil.rmtree(out)
    result = run([sys.executable, str(ROOT / "train.py"), "--resume", "--out_dir", out, "--copy_to", copy])
    assert result.returncode == 0 and f"resuming from {copy / 'checkpoint_step_8.pth'} at step 8" in result.stderr
    assert "settings: those saved in" in result.stderr and read_status(out)["state"] == "finished"
    assert_same_end(whole, out)
    assert losses(whole) == losses(out) and started_at(out) == started == started_at(copy)
    assert (copy / "checkpoint_step_12.pth").read_bytes() == (out / "checkpoint_step_12.pth").read_bytes()
    assert not (copy / "previous").exists()


# Steps of a fifth of a second, and a copy of the second checkpoint that is written but never gets its name.
KILLED_WHILE_COPYING = """
import time
import optimized_pretrain
from model.runs import copying
step, sha256 = optimized_pretrain.Trainer._take_step, copying.file_sha256
optimized_pretrain.Trainer._take_step = lambda trainer, last: (time.sleep(0.2), step(trainer, last))[1]
copying.file_sha256 = lambda path: time.sleep(600) if path.name.startswith("checkpoint_step_8.") else sha256(path)
import train
train.run_command(train.main)
"""


@pytest.mark.long
@posix_only
def test_a_run_killed_while_it_copies_is_resumed_from_the_copy_before(flags, tmp_path, capfd):
    whole, out, copy = (tmp_path / name for name in ("whole", "out", "copy"))
    train(flags(out_dir=whole))
    words = [sys.executable, "-c", KILLED_WHILE_COPYING, *command(flags(copy_to=copy))[2:]]
    with forks.Popen(words, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: list(copy.glob("checkpoint_step_8.*.tmp")), process)
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(out)
    assert train(flags(resume="true", copy_to=copy)).outcome == "finished"
    assert f"resuming from {copy / 'checkpoint_step_4.pth'} at step 4" in capfd.readouterr().err
    assert_same_end(whole, out)
    assert losses(whole) == losses(out)
    assert not list(copy.glob("*.tmp")) and (copy / "checkpoint_step_12.pth").exists()


@pytest.mark.slow
def test_two_ranks_are_resumed_from_the_copy(flags, tmp_path):
    whole, out, copy = (tmp_path / name for name in ("whole", "out", "copy"))
    result = two_ranks(flags(out_dir=whole, copy_to=copy))
    assert result.returncode == 0, result.stderr
    shutil.copy(whole / "checkpoint_step_8.pth", copy)
    (copy / "checkpoint_step_12.pth").unlink()
    result = two_ranks(flags(resume="true", copy_to=copy))
    assert result.returncode == 0 and "at step 8" in result.stderr, result.stderr
    assert_same_end(whole, out)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_copy_in_the_same_folder_is_refused(flags, tmp_path):
    with pytest.raises(InputError, match="copy_to: .*out/ is out_dir; give another folder"):
        build_settings({}, flags(copy_to=f"{tmp_path / 'out'}/"))
    (tmp_path / "link").symlink_to(tmp_path / "out")  # which is not there yet
    with pytest.raises(InputError, match="copy_to: .*link is out_dir"):
        build_settings({}, flags(copy_to=tmp_path / "link"))


def test_what_is_no_folder_for_copies_is_refused_before_training_and_stays(flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="copy_to: .*file is a file, a folder expected"):
        train(flags(copy_to=tmp_path / "file"))
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(InputError, match="copy_to: .* holds config.yaml of no run; give a new or an empty folder"):
        train(flags(copy_to=tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine: 1" and not (tmp_path / "out" / "status.json").exists()


def test_a_whole_copy_is_taken_where_nothing_local_is_whole(tmp_path, said):
    out, copy = tmp_path / "out", tmp_path / "copy"
    for folder, step in ((out, 8), (copy, 4)):
        save_torch(folder / f"checkpoint_step_{step}.pth", checkpoint_content(step))
        (folder / "config.yaml").write_text(f"# started {checkpoint_content()['started']}\n")
    training = build_settings({}, {"out_dir": str(out), "copy_to": str(copy), "resume": True}).training
    assert find_checkpoint(training, said.append).path.parent == out and said == []
    (out / "checkpoint_step_8.pth").write_bytes(b"damaged")
    assert find_checkpoint(training, said.append).path.parent == copy
    assert len(said) == 1 and "resume: passed over" in said[0] and "checkpoint_step_8.pth: damaged" in said[0]
    (out / "config.yaml").write_text("# started 20260101T000000\n")
    with pytest.raises(InputError, match="no whole checkpoint in .*out or .*copy: .*step_8.*step_4.pth: of the run"):
        find_checkpoint(training, said.append)


def test_nothing_to_resume_names_both_places(tmp_path, capfd):
    (tmp_path / "drive").mkdir()
    places = {"out_dir": tmp_path / "out", "copy_to": tmp_path / "drive"}
    assert f"no checkpoint in {tmp_path / 'out'} or {tmp_path / 'drive'}" in refused(places, capfd, "--resume")


def test_a_drive_that_cannot_be_read_does_not_begin_the_run_anew(tmp_path, flags, capfd):
    told = refused(flags(resume="true", copy_to=tmp_path / "no drive" / "run"), capfd)
    assert "copy_to: " in told and "cannot be read (No such file or directory); mount it" in told
    assert not (tmp_path / "out").exists()

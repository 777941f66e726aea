"""Large token files are verified while training takes its first steps, and before anything is saved."""

import signal
import threading

import pytest

from model.storage.archive import load_torch
from model.training import verification
from tests.chat_files import CHATS, write_chats
from tests.conftest import ROOT
from tests.tiny_runs import command, finish_ranks, refused, start_two_ranks, train

pytestmark = pytest.mark.long


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr("model.training.data.VERIFY_BYTES", 0)


@pytest.fixture
def slow(monkeypatch, everything_is_large):
    """Verification that begins once this event is set, as with a file that takes long to read."""
    may_begin, verify = threading.Event(), verification.verify
    monkeypatch.setattr(verification, "verify", lambda *about: may_begin.wait() and verify(*about))
    yield may_begin
    may_begin.set()


def damaged(token_file, folder):
    """A copy of a token file with its manifest, of which one byte has changed."""
    path, content = folder / "damaged.bin", bytearray(token_file.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    path.with_suffix(".json").write_bytes(token_file.with_suffix(".json").read_bytes())
    return path


def steps_until(monkeypatch, event, step):
    """Set the event once so many steps were taken."""
    from optimized_pretrain import Trainer

    count = Trainer._count

    def counted(self, result):
        count(self, result)
        if self.progress.step == step:
            event.set()

    monkeypatch.setattr(Trainer, "_count", counted)


def test_a_large_file_is_verified_beside_the_steps_and_the_run_is_as_ever(flags, tmp_path, slow, monkeypatch, capfd):
    steps_until(monkeypatch, slow, 3)
    train(flags(max_steps=8))
    said = capfd.readouterr().err
    assert "which are verified while training takes its first steps" in said
    assert said.index("train.bin: verified") < said.index("checkpoint_step_4.pth")
    monkeypatch.undo()
    train(flags(max_steps=8, out_dir=tmp_path / "at_once"))
    assert ": verified" not in capfd.readouterr().err
    first, second = (load_torch(tmp_path / name / "checkpoint_step_8.pth") for name in ("out", "at_once"))
    assert first["data"] == second["data"] and all(first["model"][k].equal(second["model"][k]) for k in first["model"])


def test_the_first_save_waits_for_the_verification(flags, tmp_path, slow, capfd):
    """The verification begins a while after training has reached its first save."""
    out, found = tmp_path / "out", []

    def release():
        while "before the first save" not in "".join(found):
            found.append(capfd.readouterr().err)
        found.append(str(sorted(path.name for path in out.glob("*.pth"))))
        slow.set()

    thread = threading.Thread(target=release)
    thread.start()
    train(flags(max_steps=4))
    thread.join()
    assert found[-1] == "[]" and (out / "checkpoint_step_4.pth").exists()


@pytest.mark.parametrize("step", [2, None])
def test_a_damaged_large_file_ends_the_run_before_anything_is_saved(
    flags, tmp_path, token_file, slow, monkeypatch, capfd, step
):
    """Noticed between two steps, or while the first save waits."""
    if step is None:
        slow.set()
    else:
        steps_until(monkeypatch, slow, step)
    path = damaged(token_file, tmp_path)
    said = refused(flags(train_data_path=path, eval_interval=50), capfd)
    assert f"{path}: changed since its manifest was made" in said
    assert not list((tmp_path / "out").glob("*.pth"))


def test_what_lies_beside_a_large_file_of_chats_is_verified_too(
    flags, tmp_path, tokenizer_folder, everything_is_large, capfd
):
    path = write_chats(tmp_path / "chats.bin", CHATS[:12], tokenizer_folder)
    content = bytearray(path.with_suffix(".learn").read_bytes())
    content[3] ^= 1
    path.with_suffix(".learn").write_bytes(content)
    said = refused(flags(train_data_path=path, max_seq_len=96), capfd)
    assert "chats.learn: changed since its manifest was made" in said


def test_a_stopped_run_does_not_wait(flags, tmp_path, slow):
    from model.training.settings import build_settings
    from optimized_pretrain import Trainer

    trainer = Trainer(build_settings({}, flags(save_interval=2)))
    threading.Timer(2, lambda: signal.raise_signal(signal.SIGINT)).start()
    assert trainer.train() == "interrupted"
    assert (tmp_path / "out" / "checkpoint_interrupted.pth").exists()


def test_a_fault_of_the_verification_is_raised_in_the_main_thread(everything_is_large, monkeypatch, flags):
    def broken(*about):
        raise MemoryError("no room")

    monkeypatch.setattr(verification, "verify", broken)
    with pytest.raises(MemoryError, match="no room"):
        train(flags())


@pytest.mark.slow
def test_with_two_processes_the_other_one_ends_too(flags, tmp_path, token_file):
    path = damaged(token_file, tmp_path)
    script = tmp_path / "train_large.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import model.training.data, train, utils\n"
        "model.training.data.VERIFY_BYTES = 0\n"
        "utils.run_command(train.main)\n"
    )
    python, _, *words = command(flags(train_data_path=path), "--ddp")
    started = start_two_ranks([python, str(script), *words])
    result = finish_ranks(started)
    assert [process.returncode for process in started] == [2, 3]
    assert f"error: {path}: changed since its manifest was made" in result.stderr
    assert not list((tmp_path / "out").glob("*.pth")) and "Traceback" not in result.stderr

"""A tiny training run, in this process or in others, and what it left; its flags are the fixture `flags`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterable

import pytest
import torch

from model.storage.archive import load_torch
from model.storage.parts import load_parted
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests import forks
from tests.conftest import ROOT, signals_kept
from tests.parted import in_dicts
from utils import Processes, run_command

TINY = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32, "batch_size": 4, "learning_rate": 3e-3,
    "max_steps": 12, "eval_interval": 4, "eval_steps": 3, "save_interval": 4, "log_interval": 1, "keep_last": 9,
}  # fmt: skip
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
HUNG = 600  # seconds after which a process counts as hung, on a busy machine too


# ---------------------------------------------------------------------------------------------------------- running it


def mostly(cases: Iterable, slow: Container) -> list:
    """The cases as a test's parameters, of which some are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in cases]


def calls_of(monkeypatch, owner, name: str) -> list[tuple]:
    """The positional arguments of each call of `owner.name` from now on."""
    calls, function = [], getattr(owner, name)

    def noted(*given, **more):
        calls.append(given)
        return function(*given, **more)

    monkeypatch.setattr(owner, name, noted)
    return calls


def train(flags: dict) -> Trainer:
    """Train in this process; returns the trainer, with what happened in `trainer.outcome`."""
    torch.set_num_threads(1)  # sums in the same order as in the runs it is compared with
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer = Trainer(build_settings({}, flags), Processes())
        trainer.outcome = trainer.train()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return trainer


def exit_code_here(flags: dict, *more: str) -> int:
    """The exit code of train.py with these flags, run in this process; also in a fixture that many tests share."""
    import train as script

    before = sys.argv
    sys.argv = command(flags, *more)[1:]
    try:
        with signals_kept():
            run_command(script.main)
    except SystemExit as exit_:
        return exit_.code
    finally:
        sys.argv = before
    return 0


def refused(flags, capfd, *more) -> str:
    """The one line with which a run is refused."""
    assert exit_code_here(flags, *more) == 2
    messages = capfd.readouterr().err
    lines = [line for line in messages.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in messages, messages
    return lines[0]


def command(flags: dict, *more: str) -> list[str]:
    """The command that trains with these flags."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return [sys.executable, str(ROOT / "train.py"), *words, *more]


def run(arguments: list, **options) -> subprocess.CompletedProcess:
    """Run a command to its end, with its output caught."""
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": HUNG, "env": ONE_THREAD} | options
    return forks.run(arguments, **options)


def torchrun(flags: dict, launcher: str = "torch.distributed.run") -> subprocess.CompletedProcess:
    """Train with these flags in two processes."""
    script, *words = command(flags)[1:]
    return run([sys.executable, "-m", launcher, "--nproc_per_node=2", script, *words, "--ddp"])


def start_two_ranks(arguments: list, **options) -> list:
    """Start a command twice, as two ranks that no launcher watches."""
    return start_ranks(2, arguments, **options)


def start_ranks(count: int, arguments: list, **options) -> list:
    """Start a command `count` times, as ranks that no launcher watches."""
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(forks.free_port()),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    environments = [ONE_THREAD | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [forks.Popen(arguments, env=environment, **pipes, **options) for environment in environments]


def finish_ranks(started: list) -> subprocess.CompletedProcess:
    """Wait for ranks; the exit code is of the one that failed, if any, and the output of all."""
    said = [process.communicate(timeout=HUNG) for process in started]
    code = next((process.returncode for process in started if process.returncode), 0)
    return subprocess.CompletedProcess([], code, *map("".join, zip(*said, strict=True)))


def two_ranks(flags: dict) -> subprocess.CompletedProcess:
    """Train with these flags in two processes without a launcher."""
    return finish_ranks(start_two_ranks(command(flags, "--ddp")))


def python(code, **options):
    """Run Python text in a separate process, with the project to import from; returns what it printed, as JSON."""
    options = {"capture_output": True, "text": True, "timeout": HUNG, "env": ONE_THREAD} | options
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def signal_while_reading(trainer: Trainer, step: int, micro: int, look=lambda: None) -> None:
    """Have a trainer get SIGTERM while it reads a micro-batch of a step, both counted from 0.

    Args:
        look: called just before.
    """
    read, reads = trainer.objective.read, []

    def read_with_signal(data, samples):
        if divmod(len(reads), trainer.training.accumulation_steps) == (step, micro):
            look()
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: trainer.stop_signal.count)  # another thread counts it
        reads.append(samples)
        return read(data, samples)

    trainer.objective.read = read_with_signal


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    """Wait until the condition holds; fail if the process ends before."""
    end = time.monotonic() + HUNG
    while not condition():
        assert process is None or process.poll() is None, f"the process ended too early: {process.communicate()}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------------- what it left


def events(folder) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[tuple[int, float]]:
    """Step and training loss of each line that has one."""
    return [(event["step"], event["loss"]) for event in events(folder) if "loss" in event]


def assert_equal(a, b, where: str = "") -> None:
    """Equal to the last bit, however deep; tensors on whatever devices."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.cpu(), b.cpu()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_end(first, second, step: int = 12) -> None:
    """The checkpoints of this step in two folders resume to the same bits."""
    a, b = (load_parted(folder / f"checkpoint_step_{step}.pth") for folder in (first, second))
    for content in (a, b):
        content["progress"].pop("seconds")
    for key in ("model", "ema", "ema_updates", "optimizer", "scaler", "progress", "random_states", "data", "config"):
        assert_equal(in_dicts(a[key]), in_dicts(b[key]), key)


def assert_two_processes_resume(flags, folder, **options) -> None:
    """Two processes that resume from their next to last checkpoint end with the same bits as if they had not stopped.

    Args:
        flags: the fixture `flags`, or one like it.
        folder: for the two runs.
    """
    whole, killed = folder / "whole", folder / "killed"
    result = two_ranks(flags(out_dir=whole, **options))
    assert result.returncode == 0, result.stderr
    shutil.copytree(whole, killed)
    (killed / "checkpoint_step_12.pth").unlink()
    result = two_ranks(flags(out_dir=killed, resume="true", **options))
    assert result.returncode == 0 and "resuming from" in result.stderr, result.stderr
    assert_same_end(whole, killed)


def assert_a_killed_run_resumes(flags, folder, weights: str, lost=lambda: None, **options) -> None:
    """A run without its last checkpoint and its final weights resumes, and ends with the bits of the whole one.

    Args:
        flags: the fixture `flags`, or one like it.
        folder: for the two runs.
        weights: the name of the final weights, without its ending.
        lost: called before the run resumes: it may take away more.
    """
    whole, killed = folder / "whole", folder / "killed"
    assert train(flags(out_dir=whole, **options)).outcome == "finished"
    shutil.copytree(whole, killed)
    for name in ("checkpoint_step_12.pth", f"{weights}.pth", f"{weights}.json"):
        (killed / name).unlink()
    lost()
    assert train(flags(out_dir=killed, resume="true", **options)).outcome == "finished"
    assert_same_end(whole, killed)
    assert losses(whole) == losses(killed)
    assert_equal(*(load_torch(run / f"{weights}.pth") for run in (whole, killed)))

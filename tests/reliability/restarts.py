"""Automatic restarts: each case kills a real training with SIGKILL and lets whatever started it restart it. It passes
if the run ends with exit code 0 and the SHA-256 of the full state of a run that was never killed. The starters are the
supervisor over one process and over two (killing a rank, the launcher, a rank), and torchrun with --max-restarts. In
the last cases train.py is process 1 of a container: SIGTERM must reach it and make it save, and the next start resumes
from there.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.runs.status import read_status
from tests.reliability.harness import ROOT, Counts, make_data, run_cases
from tests.reliability.states import differences

TITLE = "Restarting by itself"
STEPS = 120
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]  # as root: a first process of its own


def run(scale: str, folder: Path) -> Counts:
    """Each case twice; "fast": once."""
    flags = functools.partial(
        make_data(folder / "data").flags,
        max_steps=STEPS, save_interval=10, eval_interval=STEPS // 2, log_interval=20, keep_last=99, batch_size=2,
    )  # fmt: skip
    for processes in (1, 2):
        end_of(start(flags(folder / f"whole_{processes}"), *several(processes)))
    cases = {}
    for number in range(2 if scale == "full" else 1):
        here = folder / str(number)
        add = {
            "supervisor, 1 process": functools.partial(killed, flags, here, 1, ["rank 0", "rank 0"]),
            "supervisor, 2 processes": functools.partial(killed, flags, here, 2, ["rank 0", "a child", "rank 0"]),
            "torchrun --max-restarts": functools.partial(killed, flags, here, 2, ["rank 0", "rank 0"], torchrun=True),
        }
        if can_be_process_1():
            add |= {f"process 1, {n} processes": functools.partial(process_1, flags, here, n) for n in (1, 2)}
        cases |= {f"{name}, {number + 1}": case for name, case in add.items()}
    counts = run_cases(cases, at_once=1)
    counts.figures = "SIGKILL in mid-run to a process of each run, twice or more" + (
        "" if can_be_process_1() else "; process 1 of a container: not tried, since that needs root on Linux"
    )
    return counts


def several(processes: int) -> list[str]:
    """The flags for so many processes."""
    return [f"--nproc_per_node={processes}"] if processes > 1 else []


def start(flags: dict, *more: str, before: tuple | list = (), launcher: tuple | list = ()) -> subprocess.Popen:
    """Start train.py with these flags; its messages go to the file beside its folder."""
    here = Path(flags["out_dir"]).parent
    here.mkdir(parents=True, exist_ok=True)
    (here / "config.yaml").touch()  # --resume alone asks for a checkpoint; with --config the first start needs none
    arguments = ["--config", here / "config.yaml", *(f"--{name}={value}" for name, value in flags.items()), *more]
    with open(f"{flags['out_dir']}.log", "ab") as log:
        return subprocess.Popen(
            [*before, sys.executable, *launcher, str(ROOT / "train.py"), *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT,
        )  # fmt: skip


def end_of(process: subprocess.Popen, seconds: float = 600) -> int:
    """Wait for its end; its exit code.

    Raises:
        TimeoutError: it hangs, and was ended.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        with_its_children = [process.pid, *children(process.pid)]
        time.sleep(5)
        for pid in with_its_children:
            kill(pid)
        process.wait()
        raise TimeoutError(f"no end within {seconds:.0f} s") from None


def killed(flags, folder: Path, processes: int, kills: list[str], torchrun: bool = False) -> list[str]:
    """Train, kill so often, each time once a newer checkpoint is there, and compare the end."""
    out_dir = folder / f"{'torchrun' if torchrun else 'supervisor'}_{processes}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=5"]
    more = ["--ddp", "--resume"] if torchrun else ["--restarts=8", *several(processes)]
    process = start(flags(out_dir), *more, launcher=launcher if torchrun else ())
    for number, whom in enumerate(kills):
        wait_for_progress(out_dir, process, checkpoints=1 + 3 * number)
        kill(read_status(out_dir)["pid"] if whom == "rank 0" else children(process.pid)[0])
    code = end_of(process)
    problems = [] if code == 0 else [f"exit code {code}"]
    return problems + compare(folder, processes, out_dir)


def process_1(flags, folder: Path, processes: int) -> list[str]:
    """SIGTERM to a train.py that is process 1 of a container; then the same command once more."""
    out_dir, problems = folder / f"container_{processes}", []
    process = start(flags(out_dir), "--resume", *several(processes), before=CONTAINER)
    wait_for_progress(out_dir, process, checkpoints=2)
    os.kill(children(process.pid)[0], signal.SIGTERM)
    asked = time.monotonic()
    code, status = end_of(process), read_status(out_dir)
    if code != 130 or status["state"] != "interrupted":
        problems.append(f"exit code {code}, state {status['state']} {time.monotonic() - asked:.0f} s after SIGTERM")
    code = end_of(start(flags(out_dir), "--resume", *several(processes), before=CONTAINER))
    return problems + ([] if code == 0 else [f"exit code {code}"]) + compare(folder, processes, out_dir)


def compare(folder: Path, processes: int, out_dir: Path) -> list[str]:
    """What differs at the end from the run that nothing happened to."""
    name = f"checkpoint_step_{STEPS}.pth"
    if not (out_dir / name).exists():
        return [f"no {name}"]
    return [f"{part} differs" for part in differences(folder.parent / f"whole_{processes}" / name, out_dir / name)]


def wait_for_progress(out_dir: Path, process: subprocess.Popen, checkpoints: int, seconds: float = 600) -> None:
    """Wait until a running attempt has brought the folder to so many step checkpoints.

    Raises:
        RuntimeError: it ended, or nothing happens.
    """
    end = time.monotonic() + seconds
    while len(list(out_dir.glob("checkpoint_step_*.pth"))) < checkpoints or read_status(out_dir) is None:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no {checkpoints} checkpoints; it ended with {process.poll()}")
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that this one started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kill(pid: int) -> None:
    """SIGKILL; nothing where the process has ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def can_be_process_1() -> bool:
    """Whether a process with its own process numbers can be started here."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*CONTAINER, "true"], capture_output=True).returncode == 0
    )

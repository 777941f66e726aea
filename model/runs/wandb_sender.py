"""Sends a run's metrics to wandb, in a process of its own that `model/runs/metrics.py` starts.

Training shares nothing with this process but a file and two pipes. So whatever wandb does, a stall, a crash, a draw
from a global random generator, a hook at the exit, cannot reach the training.

In: on stdin one line of JSON (see `send`), and when the run has ended the line `finish`. Stdin that ends without it
means that the run was killed. Out: each line on stdout is one to show to the user.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from model.errors import first_line
from model.runs.metrics import parse_event

POLL_SECONDS = 0.5  # between two looks at metrics.jsonl
GRACE_SECONDS = 30  # that this process may live on after the run has ended, to send the rest


class MetricsTail:
    """Reads metrics.jsonl as it grows, one row a step: wandb takes a step once, and drops what comes later for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0  # in bytes
        self._row: dict = {}  # of the newest step, which may have more events to come

    def rows(self, last: bool) -> Iterator[dict]:
        """The steps that are complete and were not given yet; the newest one is where no more events will come."""
        yield from self._rows_before_newest()
        if last and self._row:
            yield self._row

    def _rows_before_newest(self) -> Iterator[dict]:
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._position:  # lines were taken back, or the file is a new one
                self._position = 0
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    return
                self._position += len(line)
                if (event := parse_event(line)) is None:
                    continue
                if self._row and self._row["step"] != event["step"]:
                    yield self._row
                    self._row = {}
                self._row |= {key: value for key, value in event.items() if value is not None}


def begin(arguments: dict, tell: Callable[[str], None]):
    """Begin a wandb run, or go on with the one of that id; offline where there is no login or no network."""
    import wandb

    quiet, why = wandb.Settings(init_timeout=20, console="off"), ""
    try:
        if "WANDB_MODE" not in os.environ:
            wandb.login(prompt=False)
        run = wandb.init(**arguments, resume="allow", settings=quiet)
    except Exception as error:
        run, why = wandb.init(**arguments, mode="offline", settings=quiet), f"{reason(error)}; "
    if why or getattr(run, "offline", False):
        kept = getattr(getattr(run, "settings", None), "sync_dir", None) or Path(arguments["dir"]) / "wandb"
        tell(f"use_wandb: {why}the run is kept offline; send it later with: wandb sync {kept}")
    elif getattr(run, "url", None):
        tell(f"use_wandb: {run.url}")
    return run


def send(order: dict, ended: threading.Event, killed: Callable[[], bool], tell: Callable[[str], None]) -> None:
    """Send what is in metrics.jsonl, and what comes, until the run has ended.

    All of it is sent from the first step on that wandb does not have: also what an earlier session could not send, and
    what a run that begins in the middle of another one has of its beginning.

    Args:
        order: `metrics`, the path of metrics.jsonl, and `arguments`, those of wandb.init.
        ended: set when the run has ended.
        killed: whether it ended without a word; the last step, which may be half, then comes again with the resume.
        tell: shows one line to the user.
    """
    from filelock import FileLock  # a requirement of torch itself

    folder = Path(order["arguments"]["dir"]) / "wandb"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock", timeout=2 * GRACE_SECONDS):  # what a run just resumed left behind may still send
        run = begin(order["arguments"], tell)
        tail, first = MetricsTail(Path(order["metrics"])), getattr(run, "starting_step", 0)
        last_round = False
        while not last_round:
            last_round = ended.wait(POLL_SECONDS)
            for row in tail.rows(last=last_round and not killed()):
                if row["step"] >= first:
                    run.log(row, step=row["step"])
                    first = row["step"] + 1
        run.finish(exit_code=1 if killed() else 0)


def reason(error: BaseException) -> str:
    """The first line of what an exception says, to go on after it."""
    return first_line(error).rstrip(". ")


def main() -> None:
    """Read the order, send, and end: 0 where what went wrong, if anything, has been told."""
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the training, which then tells us
        signal.signal(number, lambda *_: None)
    shown = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # wandb's own print goes where its stderr goes

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # the training may have gone
            print(line, file=shown, flush=True)

    order = json.loads(sys.stdin.buffer.readline())
    ended, last_word = threading.Event(), []

    def wait_for_the_end() -> None:
        last_word.append(sys.stdin.buffer.readline())
        ended.set()
        time.sleep(GRACE_SECONDS)
        os._exit(3)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    try:
        send(order, ended, lambda: last_word != [b"finish\n"], tell)
    except BaseException as error:  # SystemExit too
        tell(f"use_wandb: {reason(error)}; the run goes on without wandb (metrics.jsonl holds all of it)")
    os._exit(0)  # neither a hook nor a thread of wandb holds it

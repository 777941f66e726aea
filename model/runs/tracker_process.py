"""A tracker in a separate process, which follows metrics.jsonl and sends what it finds there.

Training shares nothing with this process but a file and two pipes. So whatever the tracker does, a stall, a crash, a
draw from a global random generator, a hook at the exit, cannot reach the training. (In a thread it could.)

In: one line of JSON on stdin, {"tracker": name, "metrics": path, "options": …}, and when the run has ended the line
`finish`, or `stop` if it may be resumed and its last step may get an evaluation then. If stdin ends without a line, the
run was killed. Out: each line on stdout is one to show to the user.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from model.children import OWN_GROUP
from model.errors import InputError, command_line, first_line
from model.runs.metrics_file import parse_event
from model.runs.trackers import TRACKERS, SentSteps, send_later

POLL_SECONDS = 0.5  # between two looks at metrics.jsonl
SETTLE_SECONDS = 2.0  # after which a tracker, killed at once, has what it was sent
CLOSE_SECONDS = 3.0  # that the end of a training waits for its trackers, all of them together
GRACE_SECONDS = 30  # that this process may live after the run has ended, to send the rest


class TrackerProcess:
    """The training's end of the pipes.

    Args:
        name: of the tracker.
        metrics: the file to follow.
        options: of the tracker.
        say: prints one line for the user.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, name: str, metrics: Path, options: dict, say: Callable[[str], None]) -> None:
        self._name, self._options, self._say = name, options, say
        self._is_begun = False  # whether the tracker has said where the run is
        self._left = False  # whether the training waits no more
        code = f"import sys; sys.path[:] = {sys.path!r}; from model.runs.tracker_process import main; main()"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | TRACKERS[name].environment(options),
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, **OWN_GROUP,
        )  # fmt: skip
        self._tell(json.dumps({"tracker": name, "metrics": str(metrics), "options": options}, default=str))
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the process has ended; `_pass_on` says so
            self._process.stdin.write(line.encode() + b"\n")

    def _pass_on(self) -> None:
        """Show the process's lines to the user, and its end if it ends without a word."""
        with self._process.stdout:
            for line in self._process.stdout:
                self._is_begun = True
                if not self._left:
                    self._say(line.decode(errors="replace").rstrip())
        if (code := self._process.wait()) and not self._left:
            ended = f"{self._name}: its process ended with code {code}"
            self._say(f"{ended}; the run continues without {self._name}; {send_later(self._options)}")

    def finish(self, is_whole: bool) -> None:
        """Tell the process that the run has ended; it sends what is left, and the last step only if that is whole."""
        self._tell("finish" if is_whole else "stop")
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def leave(self, end: float) -> None:
        """Wait until all is sent, at most until `end`, a time of the monotonic clock."""
        self._reader.join(max(0.0, end - time.monotonic()))
        self._left = True
        if self._reader.is_alive():
            command = TRACKERS[self._name].unsent(self._options) if self._is_begun else None
            rest = f"send the rest with: {command_line(*command)}" if command else send_later(self._options)
            unfinished = f"not finished after {CLOSE_SECONDS:g} s; it continues for up to {GRACE_SECONDS} s"
            self._say(f"{self._name}: {unfinished}; if that is too short, {rest}")


def close_trackers(trackers: list[TrackerProcess], is_whole: bool) -> None:
    """End the runs of all trackers, and wait for them `CLOSE_SECONDS` at most.

    Args:
        is_whole: whether the last step has all its events; if not, the next session sends it.
    """
    for tracker in trackers:
        tracker.finish(is_whole)
    end = time.monotonic() + CLOSE_SECONDS
    for tracker in trackers:
        tracker.leave(end)


class MetricsTail:
    """Reads metrics.jsonl as it grows, one row per step: trackers take a step once and drop what comes later for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0  # in bytes
        self._row: dict = {}  # of the newest step, which may have more events to come

    def rows(self, last: bool) -> Iterator[dict]:
        """The new rows that are complete; the newest step only if no more events will come."""
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


class RunEnd:
    """The end of the run, as this process hears of it on stdin."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.killed = self.is_whole = False  # whether it came without a word; whether the last step has all its events
        self.unheard = False  # whether the training no longer shows our lines
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        word = sys.stdin.buffer.readline().strip()
        self.killed, self.is_whole = word == b"", word == b"finish"
        self.came.set()
        time.sleep(CLOSE_SECONDS / 2)
        self.unheard = True
        time.sleep(GRACE_SECONDS - CLOSE_SECONDS / 2)
        os._exit(3)


def send(order: dict, end: RunEnd, tell: Callable[[str], None]) -> None:
    """Send metrics.jsonl from the first step that the tracker lacks, also of earlier sessions, until the run ends.

    Args:
        order: see above.
        tell: shows one line to the user.

    Raises:
        InputError: the tracker began, offline, when nobody could be told any more where it keeps the run.
    """
    from filelock import FileLock  # a requirement of torch itself

    name, options = order["tracker"], order["options"]
    folder = Path(options["dir"]) / name
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock", timeout=2 * GRACE_SECONDS):  # the session before may still be sending
        sent = SentSteps(Path(options["dir"]) / f"{name}_run.json", options["id"])
        tracker, tail = TRACKERS[name](options), MetricsTail(Path(order["metrics"]))
        if tracker.is_offline and end.unheard:
            raise InputError("no connection before the run ended")  # the next session sends all of it
        tell(f"{name}: {tracker.where}")
        newest = settled = max(tracker.first_step - 1, sent.last)
        look, last_round = time.monotonic() + SETTLE_SECONDS, False
        while not last_round:
            last_round = end.came.wait(POLL_SECONDS)
            for row in tail.rows(last=last_round and end.is_whole):
                if row["step"] > newest:
                    tracker.log(row, row["step"])
                    newest = row["step"]
            if time.monotonic() > look:
                sent.keep(settled)
                look, settled = time.monotonic() + SETTLE_SECONDS, newest
        tracker.finish(failed=end.killed)
        sent.keep(newest)


def main() -> None:
    """Read the order, send, and end: 0 if nothing went wrong or the fault was reported."""
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the training, which then tells us
        signal.signal(number, lambda *_: None)
    shown = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the tracker's own output goes where its stderr goes

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # the training may be gone
            print(line, file=shown, flush=True)

    order = json.loads(sys.stdin.buffer.readline())
    try:
        send(order, RunEnd(), tell)
    except BaseException as error:  # SystemExit too
        name, reason = order["tracker"], first_line(error).rstrip(". ")
        tell(f"{name}: {reason}; the run continues without {name}; {send_later(order['options'])}")
    os._exit(0)  # whatever hooks and threads the tracker has left

"""Restarts a run that dies: `python train.py --config config.yaml --restarts 10`.

The supervisor is a small process that imports no torch. It starts the training as a child and looks at how that ended.
If a restart can help, it starts the training again with `--resume`: after a kill, a crash, or exit codes 3 and 4. If
not, it ends with the child's exit code: done (0), diverged (1), bad input (2), interrupted (130).

Why not torchrun's --max-restarts: that restarts the same command, without `--resume`; it restarts a run that diverged
or whose input is bad; it gives up on nothing but a count; and a single process has no torchrun.

The child leads its own process group, so that Ctrl-C in a terminal reaches it once, through the supervisor. If the
supervisor itself is killed, the child continues to its end; it holds the lock on its folder, so that no second one can
start beside it.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from model.children import OWN_GROUP
from model.errors import InputError, NodesMissing, TrainingDiverged
from model.runs.status import STATUS_FILE, read_status
from model.storage.part_names import is_part

DIVERGED, BAD_INPUT, INTERRUPTED = TrainingDiverged.exit_code, InputError.exit_code, 130  # exit codes of train.py
FRUITLESS_ATTEMPTS = 3  # in a row without a newer checkpoint, after which the supervisor gives up; waits do not count
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SECONDS_TO_LEAVE = 10.0  # after the third signal; then the child is killed


class Supervisor:
    """Runs a training until it ends for good.

    Args:
        command: starts the training.
        resume_command: resumes it, once it has saved a checkpoint.
        out_dir: the training's folder.
        restarts: the most restarts.
        say: called with one line for each restart.
        first_wait: seconds before a restart; doubled after each attempt without a newer checkpoint.
    """

    def __init__(
        self,
        command: Sequence[str],
        resume_command: Sequence[str],
        out_dir: Path,
        restarts: int,
        say: Callable[[str], None],
        first_wait: float = 1.0,
    ) -> None:
        self.command, self.resume_command, self.out_dir = list(command), list(resume_command), Path(out_dir)
        self.restarts, self.say, self.first_wait = restarts, say, first_wait
        self.child: subprocess.Popen | None = None
        self.stop = threading.Event()  # a signal has come: no more restarts
        self._signals, self._kill_at = 0, float("inf")  # how many came; when the child is killed

    def run(self) -> int:
        """Start the training, again and again; returns the last child's exit code, 128 + N if signal N ended it."""
        self._take_over_signals()
        before = found = self._checkpoints()
        own: set = set()  # checkpoints written since; those of an earlier run in the same folder do not count
        fruitless = 0
        for attempt in range(self.restarts + 1):
            code, status = self._attempt(self.resume_command if own else self.command)
            state = (status or {}).get("state")
            if code in (0, BAD_INPUT, INTERRUPTED) or (code == DIVERGED and state == "diverged"):
                return code
            if self.stop.is_set():
                return INTERRUPTED if state == "interrupted" else exit_code(code)
            if self.restarts == 0:
                return exit_code(code)
            happened = describe_end(code, status)
            earlier, found = found, self._checkpoints()
            own = found.items() - before.items()
            waited = code == NodesMissing.exit_code  # for other nodes, which may take long to come back
            fruitless = 0 if found.items() - earlier.items() else fruitless + (not waited)
            if fruitless == FRUITLESS_ATTEMPTS or attempt == self.restarts:
                reason = (
                    f"giving up after {fruitless} attempts in a row without a newer checkpoint: the fault repeats"
                    if fruitless == FRUITLESS_ATTEMPTS
                    else f"giving up after {self.restarts} restarts"
                )
                self.say(f"{reason}; the last attempt: {happened}")
                return exit_code(code)
            newest = (
                f"resuming from {max(own, key=lambda item: item[1])[0]}" if own else "starting the same command again"
            )
            self.say(f"restart {attempt + 1} of {self.restarts}: {happened}; {newest}")
            if self.stop.wait(self.first_wait * 2**fruitless):
                self.say("interrupted while waiting for the next attempt")
                return INTERRUPTED
        raise AssertionError("not reached")

    def _attempt(self, command: list[str]) -> tuple[int, dict | None]:
        """One child's exit code (-N if signal N killed it), and the status that it wrote, if any."""
        before = file_identity(self.out_dir / STATUS_FILE)
        if self.stop.is_set():
            return INTERRUPTED, None
        self.child = subprocess.Popen(command, **OWN_GROUP)
        if self.stop.is_set():  # the signal came while the child was being started
            self._pass_on(signal.SIGTERM)
        while True:
            try:
                code = self.child.wait(timeout=1)  # Windows handles Ctrl-C only between two waits
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > self._kill_at:
                    self.child.kill()
        self.child = None
        return code, read_status(self.out_dir) if file_identity(self.out_dir / STATUS_FILE) != before else None

    def _take_over_signals(self) -> None:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            # nohup ignores SIGHUP; a shell's `&` ignores SIGINT, which is heeded as training does.
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        self.stop.set()
        self._signals += 1
        if self._signals == 3:
            self._kill_at = time.monotonic() + SECONDS_TO_LEAVE
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self.child is not None:
            self.child.send_signal(number if os.name != "nt" else signal.CTRL_BREAK_EVENT)

    def _checkpoints(self) -> dict[str, tuple[int, int]]:
        """Each checkpoint in the folder with when it was written and its size."""
        whole = (path for path in self.out_dir.glob("checkpoint_*.pth") if not is_part(path))
        found = {path.name: file_identity(path) for path in whole}
        return {name: identity for name, identity in found.items() if identity is not None}


def file_identity(path: Path) -> tuple[int, int] | None:
    """When a file was written last (nanoseconds) and its bytes; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def exit_code(code: int) -> int:
    """A child's return code as an exit code: 128 + N if signal N killed it, as in shells."""
    return 128 - code if code < 0 else code


def describe_end(code: int, status: dict | None) -> str:
    """'killed by SIGKILL after step 40', 'exit code 3 after step 40 (rank 1 ended)'."""
    number = -code if code < 0 else code - 128 if 128 < code < 192 else 0
    names = {int(one): one.name for one in signal.Signals}
    text = f"killed by {names.get(number, f'signal {number}')}" if number else f"exit code {code}"
    if status is not None:
        text += f" after step {status.get('step')} or later" if status["state"] == "running" else ""
        text += f" ({status['message']})" if status.get("message") else ""
    return text

"""Faults that strike a training process at a named point: killed, stopped, hanging, raising, or a signal sent.

Real functions are wrapped before training begins, and nothing of what they do is left out.
"""

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class InjectedFault(RuntimeError):
    """What the kind "raise" raises."""


@dataclass
class Fault:
    """What happens, where and when.

    Args:
        point: a name in POINTS.
        occurrence: the point is reached this many times before it happens, this one included.
        rank: the process that it happens to; None: each of them.
        kind: "kill" (SIGKILL to itself), "stop" (SIGSTOP to itself), "hang" (sleeps for ever), "raise"
            (InjectedFault), "exit:CODE" (SystemExit), "term", "int" (that signal to itself), "sleep:SECONDS";
            "term@rank1", "int@launcher" send the signal to another process of the run, "term@rank1*2" twice, 0.2 s
            apart, and "term@launcher+1.5" stays at the point for 1.5 seconds, until it has gone round.
        after_file: it happens once this file is there, waited for at the point for five minutes at most.
    """

    point: str
    occurrence: int = 1
    rank: int | None = 0
    kind: str = "kill"
    after_file: str | None = None


def act(fault: Fault, folder: Path) -> None:
    """Let the fault happen, in the process and thread that has reached its point."""
    end = time.monotonic() + 300
    while fault.after_file is not None and not Path(fault.after_file).exists() and time.monotonic() < end:
        time.sleep(0.005)
    (folder / f"fault.rank{os.environ.get('RANK', '0')}").write_text(f"{fault.point} {fault.kind}\n")
    kind, _, argument = fault.kind.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        while True:
            time.sleep(3600)
    elif kind == "sleep":
        time.sleep(float(argument))
    elif kind == "exit":
        sys.exit(int(argument))
    elif kind == "raise":
        raise InjectedFault(f"injected at {fault.point}")
    else:
        _send(kind, folder)


def _send(kind: str, folder: Path) -> None:
    """Send the signal that "term@rank1*2" and the like name."""
    kind, _, stay = kind.partition("+")
    kind, _, times = kind.partition("*")
    name, _, target = kind.partition("@")
    number = {"term": signal.SIGTERM, "int": signal.SIGINT}[name]
    pid = int((folder / f"pid.{target}").read_text()) if target else os.getpid()
    os.kill(pid, number)
    for again in range(1, int(times or 1)):
        timer = threading.Timer(0.2 * again, os.kill, (pid, number))
        timer.daemon = True
        timer.start()
    time.sleep(float(stay or 0))


def install(fault: Fault, folder: Path, data_path: str) -> None:
    """Wrap what the point names, so that the fault happens there.

    Args:
        folder: of the job; holds its processes' ids.
        data_path: the training data; reads of any other token file are evaluation.
    """
    if fault.rank is not None and fault.rank != int(os.environ.get("RANK", "0")):
        return
    hits, lock = [0], threading.Lock()

    def reached() -> None:
        with lock:
            hits[0] += 1
            now = hits[0] == fault.occurrence
        if now:
            act(fault, folder)

    POINTS[fault.point](reached, data_path)


def wrap(owner, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Replace `owner.name` by itself with a call before or after it, which gets its arguments."""
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before is not None:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    wrapped.__name__ = getattr(function, "__name__", name)
    setattr(owner, name, wrapped)


def _reads(training: bool) -> Callable:
    def point(reached: Callable, data_path: str) -> None:
        from model.dataset import PretrainDataset

        def before(self, *args, **kwargs):
            if (str(self.path) == data_path) == training:
                reached()

        wrap(PretrainDataset, "batch", before)

    return point


def _forward(reached: Callable, data_path: str) -> None:
    from torch import Tensor

    from model.model import Transformer

    def before(self, tokens, *args, **kwargs) -> None:
        if self.training and type(tokens) is Tensor:  # fake ones tell how much memory a step takes
            reached()

    wrap(Transformer, "forward", before)


def _backward(reached: Callable, data_path: str) -> None:
    import torch

    wrap(torch.Tensor, "backward", lambda *args, **kwargs: reached())


def _optimizer(when: str) -> Callable:
    def point(reached: Callable, data_path: str) -> None:
        import torch

        for kind in (torch.optim.AdamW, torch.optim.Adam):
            wrap(kind, "step", **{when: lambda *args, **kwargs: reached()})

    return point


def _replace(name: str, when: str) -> Callable:
    """Where a written file gets its name.

    Args:
        name: a regular expression that a part of the file's name matches.
    """

    def point(reached: Callable, data_path: str) -> None:
        def call(source, target, *args, **kwargs):
            if re.search(name, Path(target).name):
                reached()

        wrap(os, "replace", **{when: call})

    return point


def _unlink(name_holds: str) -> Callable:
    def point(reached: Callable, data_path: str) -> None:
        wrap(Path, "unlink", lambda self, *args, **kwargs: reached() if name_holds in self.name else None)

    return point


def _half_saved(is_meant: Callable[[dict], bool]) -> Callable:
    """Within torch.save: half of the bytes are written, and handed to the system, when the point is reached.

    Args:
        is_meant: whether it is about this content.
    """

    def point(reached: Callable, data_path: str) -> None:
        import torch

        save = torch.save

        def halved(content, file, *args, **kwargs):
            if is_meant(content) and hasattr(file, "write"):
                whole = io.BytesIO()
                save(content, whole, *args, **kwargs)
                middle = len(whole.getvalue()) // 2
                file.write(whole.getvalue()[:middle])
                file.flush()
                reached()
                file.write(whole.getvalue()[middle:])
            else:
                save(content, file, *args, **kwargs)

        torch.save = halved

    return point


def _part_saver(when: str) -> Callable:
    def point(reached: Callable, data_path: str) -> None:
        from model.runs.part_saving import PartSaver

        wrap(PartSaver, "_write", **{when: lambda *args, **kwargs: reached()})

    return point


def _processes(method: str) -> Callable:
    def point(reached: Callable, data_path: str) -> None:
        from utils import Processes

        wrap(Processes, method, lambda *args, **kwargs: reached())

    return point


def _fsync(reached: Callable, data_path: str) -> None:
    wrap(os, "fsync", lambda *args, **kwargs: reached())


def _start(reached: Callable, data_path: str) -> None:
    reached()


POINTS = {
    "start": _start,
    "reading a batch": _reads(training=True),
    "forward": _forward,
    "backward": _backward,
    "before the optimizer's step": _optimizer("before"),
    "after the optimizer's step": _optimizer("after"),
    "evaluation": _reads(training=False),
    "best_model.json": _replace("best_model.json", "before"),
    "best_model.pth": _replace("best_model.pth", "before"),
    "within torch.save of a checkpoint": _half_saved(lambda content: "progress" in content),
    "within torch.save of weights": _half_saved(lambda content: "norm.weight" in content),
    "before a part": _part_saver("before"),
    "within a part": _half_saved(lambda content: "tensors" in content),
    "after a part": _replace(r"\.part-", "after"),
    "after a part is reported": _part_saver("after"),
    "before the index": _replace(r"^checkpoint_\w+\.pth$", "before"),
    "after the index": _replace(r"^checkpoint_\w+\.pth$", "after"),
    "removing a part": _unlink(".part-"),
    "before the rename of a checkpoint": _replace("checkpoint_", "before"),
    "after the rename of a checkpoint": _replace("checkpoint_", "after"),
    "pruning": _unlink("checkpoint_step_"),
    "final weights": _replace("pretrain_", "before"),
    "fsync": _fsync,
    "gathering the states": _processes("gather"),
    "exchanging weights": _processes("gather_on_device"),
    "gathering the shares": _processes("send_to_main"),
    "barrier": _processes("barrier"),
}

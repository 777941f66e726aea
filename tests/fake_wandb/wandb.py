"""A wandb for tests. It writes what it is sent into the file $FAKE_WANDB_LOG, and fails as $FAKE_WANDB_FAULT says.

"init raises", "log stalls": what the place does; the places are import, init, log and finish. It "raises", "stalls" for
ten minutes, "exits" as sys.exit does, or "dies" as from a segmentation fault. And it does what no good library does:
it seeds the global random generators, and leaves a thread that is no daemon and a hook at the exit, which take as long.
"""

import atexit
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

LOG = Path(os.environ["FAKE_WANDB_LOG"])
FAULT = os.environ.get("FAKE_WANDB_FAULT", "")
STALL = 600  # seconds


def _record(**event) -> None:
    with open(LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _disturb(place: str) -> None:
    random.seed(0)
    for name in ("numpy.random", "torch"):
        if name in sys.modules:
            getattr(sys.modules[name], "seed" if name == "numpy.random" else "manual_seed")(0)
    if FAULT == f"{place} raises":
        raise RuntimeError(f"{place} fails\nfor a reason of many lines")
    if FAULT == f"{place} stalls":
        time.sleep(STALL)
        _record(id=None, stalled=place)
    if FAULT == f"{place} exits":
        sys.exit(1)
    if FAULT == f"{place} dies":
        os.abort()


class Settings:
    def __init__(self, **values) -> None:
        self.sync_dir = None


class Run:
    offline = False

    def __init__(self, id: str) -> None:
        self.url = f"https://example.org/runs/{id}"
        self.starting_step = 0
        for event in map(json.loads, LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []):
            if event["id"] == id and "step" in event:
                self.starting_step = event["step"] + 1
        self.id = id

    def log(self, row: dict, step: int) -> None:
        _disturb("log")
        _record(id=self.id, step=step, row=row)

    def finish(self, exit_code: int) -> None:
        _disturb("finish")
        _record(id=self.id, finish=exit_code)


def login(prompt: bool) -> bool:
    return True


def init(id: str, **arguments) -> Run:
    _disturb("init")
    del arguments["settings"]
    run = Run(id)
    _record(id=id, init=arguments, pid=os.getpid())
    return run


_disturb("import")
if FAULT:
    atexit.register(time.sleep, STALL)
    threading.Thread(target=time.sleep, args=(STALL,), daemon=False).start()

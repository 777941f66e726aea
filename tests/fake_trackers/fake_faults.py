"""What the fake trackers share. They write what they are sent into the file $FAKE_TRACKER_LOG, and fail as
$FAKE_TRACKER_FAULT says.

"init raises", "log stalls": what the place does; the places are import, init, log and finish. It "raises", "stalls" for
ten minutes, "is slow", "exits" as sys.exit does, or "dies" as from a segmentation fault. And they do what no good
library does: they seed the global random generators, and leave a thread that is no daemon and a hook at the exit, which
take as long as a stall.
"""

import atexit
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

LOG = Path(os.environ["FAKE_TRACKER_LOG"])
FAULT = os.environ.get("FAKE_TRACKER_FAULT", "")
STALL = 600  # seconds


def record(**event) -> None:
    """Write down what a tracker was sent."""
    with open(LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def recorded(run_id: str) -> list[dict]:
    """What a run was sent so far."""
    events = map(json.loads, LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else [])
    return [event for event in events if event["id"] == run_id]


def disturb(place: str) -> None:
    """Fail, if it is to be here."""
    random.seed(0)
    for name in ("numpy.random", "torch"):
        if name in sys.modules:
            getattr(sys.modules[name], "seed" if name == "numpy.random" else "manual_seed")(0)
    if FAULT == f"{place} raises":
        raise RuntimeError(f"{place} fails\nfor a reason of many lines")
    if FAULT == f"{place} stalls":
        time.sleep(STALL)
        record(id=None, stalled=place)
    if FAULT == f"{place} is slow":
        time.sleep(2)
    if FAULT == f"{place} exits":
        sys.exit(1)
    if FAULT == f"{place} dies":
        os.abort()


disturb("import")
if FAULT:
    atexit.register(time.sleep, STALL)
    threading.Thread(target=time.sleep, args=(STALL,), daemon=False).start()

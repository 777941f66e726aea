"""Several processes on this machine, started by torchrun's own code, with an exit code that can be relied on.

`torchrun` itself exits with 1 whatever its workers exited with, and also where all of them were interrupted and saved.
"""

import os
import threading
import time
from pathlib import Path

from model.command import print_message
from model.errors import ProcessLost
from model.runs.status import STATUS_FILE, read_status
from model.runs.supervisor import INTERRUPTED, exit_code, file_identity

PROCESS_LOST = ProcessLost.exit_code  # of a process that ends because another one of the run did


def launch(processes: int, command: list[str], out_dir: Path) -> int:
    """Run `python command…` in several processes; returns the exit code of the one that failed first.

    torchrun's settings can be given in its environment variables PET_*: with PET_RDZV_ENDPOINT and PET_NNODES the same
    command on each of several machines makes one run.

    Args:
        processes: how many, on this machine.
        command: the script and its arguments.
        out_dir: the run's folder, whose status.json tells whether it was interrupted.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "300")  # seconds that workers have for saving when they are stopped
    where = [] if "PET_RDZV_ENDPOINT" in os.environ else ["--standalone"]
    before = file_identity(out_dir / STATUS_FILE)
    try:
        torchrun([*where, f"--nproc_per_node={processes}", *command])
        code = 0
    except ChildFailedError as error:
        codes = [error.get_first_failure()[1].exitcode, *(failure.exitcode for failure in error.failures.values())]
        code = next((code for code in codes if code != PROCESS_LOST), PROCESS_LOST)  # the cause, not what came of it
    except SignalException as error:
        code = -int(error.sigval)
    status = read_status(out_dir) if file_identity(out_dir / STATUS_FILE) != before else None
    stopped = code in (0, -2, -15, -1) and status is not None and status["state"] == "interrupted"
    return INTERRUPTED if stopped else exit_code(code)


def end_with_parent(seconds: float = 0.5) -> None:
    """End this process (exit code 3) soon after the one that started it: no worker trains on without torchrun."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        print_message("the process that started this one is gone")
        os._exit(PROCESS_LOST)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()

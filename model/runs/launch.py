"""Several processes on this machine, started by torchrun's own code, with an exit code that can be relied on.

`torchrun` itself exits with 1 whatever its workers exited with, also where all of them were interrupted and saved. And
it kills them 30 s after Ctrl-C, while they may still be saving.
"""

import functools
import os
import signal
import sys
from pathlib import Path

from model.children import when_parent_ends
from model.command import print_message
from model.errors import NodesMissing, ProcessLost, first_line
from model.runs.status import STATUS_FILE, read_status
from model.runs.supervisor import INTERRUPTED, exit_code, file_identity

PROCESS_LOST = ProcessLost.exit_code  # of a process that ends because another one of the run did
SECONDS_TO_SAVE = 300.0  # that workers have after Ctrl-C
TORCHRUN_SECONDS_TO_SAVE = 30.0  # that they have under plain torchrun
OURS = "MATECONV_LAUNCHER"  # set in the environment of our own workers


def launch(processes: int, command: list[str], out_dir: Path) -> int:
    """Run `python command…` in several processes; returns the exit code of the first that failed.

    PET_* environment variables set torchrun's options: with PET_RDZV_ENDPOINT and PET_NNODES, the same command on each
    of several machines makes one run.

    Args:
        processes: how many, on this machine.
        command: the script and its arguments.
        out_dir: the run's folder; its status.json says whether it was interrupted.

    Raises:
        NodesMissing: the other machines did not come, or the one where they meet is gone.
    """
    # Where one process has died, the others' connections warn in pages of C++ frames; what happened is said in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    os.environ[OURS] = "1"
    # Otherwise torchrun keeps its first store when it restarts the ranks, and a machine that comes back never finds it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    _let_workers_save()
    where = [] if "PET_RDZV_ENDPOINT" in os.environ else ["--standalone"]
    before = file_identity(out_dir / STATUS_FILE)
    try:
        torchrun([*where, f"--nproc_per_node={processes}", *command])
        code = 0
    except ChildFailedError as error:
        codes = [error.get_first_failure()[1].exitcode, *(failure.exitcode for failure in error.failures.values())]
        code = next((code for code in codes if code != PROCESS_LOST), PROCESS_LOST)  # the cause, not its effects
    except SignalException as error:
        code = -int(error.sigval)
    except (RendezvousError, DistError) as error:
        raise NodesMissing(_why_nobody_met(error)) from error
    status = read_status(out_dir) if file_identity(out_dir / STATUS_FILE) != before else None
    stopped = code in (0, -2, -15, -1) and status is not None and status["state"] == "interrupted"
    return INTERRUPTED if stopped else exit_code(code)


def _why_nobody_met(error: Exception) -> str:
    """One sentence on an error of the store where the machines of a run meet."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    endpoint = os.environ.get("PET_RDZV_ENDPOINT", "this machine")
    if isinstance(error, RendezvousTimeoutError):
        found = f"not all of {os.environ.get('PET_NNODES')} nodes came to {endpoint} in time (torchrun's join_timeout)"
    elif isinstance(error, RendezvousClosedError):
        found = f"a node of run {os.environ.get('PET_RDZV_ID')} has ended it at {endpoint}"
    else:
        reason = first_line(error.__cause__ or error)
        found = f"{endpoint}, where the nodes meet, does not answer; its node may have failed ({reason})"
    return f"{found}; start the same command again on each node"


class _Impatient(Exception):
    """The user asked a third time."""


def _let_workers_save() -> None:
    """Make torchrun wait for SECONDS_TO_SAVE after a signal, and not at all after the third one.

    torch 2.10 has no option for that, and how a further signal ends depends on when it comes. (`PContext` is public,
    and so is its `close`.)
    """
    from torch.distributed.elastic.multiprocessing import PContext, SignalException

    close = PContext.close
    if hasattr(close, "__wrapped__"):
        return

    @functools.wraps(close)
    def close_patiently(self, death_sig=None, timeout=30) -> None:
        if not isinstance(sys.exc_info()[1], SignalException):  # a worker failed, or all have ended
            close(self, death_sig, timeout)
            return
        more = 0

        def count(number: int, frame) -> None:
            nonlocal more
            more += 1
            if more == 2:
                raise _Impatient

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            close(self, death_sig, int(SECONDS_TO_SAVE))
        except _Impatient:
            close(self, getattr(signal, "SIGKILL", signal.SIGTERM), 1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    PContext.close = close_patiently


def is_ours() -> bool:
    """Whether `launch` started this process, and so turns the outcome into the exit code of a run without torchrun."""
    return OURS in os.environ


def advice_on_slow_saves(seconds: float) -> str | None:
    """What to say under plain torchrun where a save takes so long that it may be killed after Ctrl-C."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or is_ours():
        return None
    names = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    limit = float(next((os.environ[name] for name in names if name in os.environ), TORCHRUN_SECONDS_TO_SAVE))
    if seconds < limit / 2:
        return None
    ways = "start with python train.py --nproc_per_node=N, or give torchrun --shutdown_timeout=300 (torch 2.13)"
    return f"saving took {seconds:.0f} s, and torchrun kills its workers {limit:.0f} s after Ctrl-C: {ways}"


def end_with_parent() -> None:
    """End this process (exit code 3) soon after its parent: no worker trains on without torchrun."""

    def end() -> None:
        print_message("the process that started this one is gone")
        os._exit(PROCESS_LOST)

    when_parent_ends(os.getppid(), end)

"""Forks processes that have imported torch and the project already: milliseconds in place of seconds.

Started by `forks.py`, with a socket as its only argument. Each message asks for one process and brings its standard
input, output and error; the answers are `started PID` and, in time, `ended PID CODE`. The server uses no thread, so
what it forks is like a fresh process. It ends, and ends what it forked, when the socket closes.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 1 << 17  # of a message


def preload() -> None:
    """Import what the scripts import sooner or later, and load a tokenizer, which imports parts of transformers."""
    import torch
    import torch._dynamo  # noqa: F401 (every optimizer imports it)
    import torch._inductor.codecache  # noqa: F401 (what looks for a C++ compiler imports it)
    import torch.distributed.run  # noqa: F401
    import torch.nn.parallel  # noqa: F401

    import inference  # noqa: F401
    import model.runs.metrics
    import optimized_data_processing  # noqa: F401
    import optimized_pretrain  # noqa: F401
    import train  # noqa: F401
    import utils
    from model.text.tokenization import load_tokenizer

    load_tokenizer()
    # As in conftest.py: no curves, and the machine is measured once.
    model.runs.metrics.draw_curves = lambda events, path: None
    warm_up_fake_tensors()
    rates = {dtype: utils.measure_matmul_flops(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)}
    utils.measure_matmul_flops = lambda device, dtype, weights=(): rates.get(dtype, rates[torch.bfloat16])


def warm_up_fake_tensors() -> None:
    """Count a small step's memory, as every training does: fake tensors keep what they find out about operations."""
    import torch

    from model.LMConfig import LMConfig
    from model.training.memory import step_memory
    from model.training.settings import build_settings

    config = LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=300, max_seq_len=32)
    step_memory(config, build_settings({}, {}).training, 2, torch.device("cpu"), contextlib.nullcontext())


def serve(asked: socket.socket) -> dict:
    """Fork a process for each message; returns only in those, with what the message said."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this server
    signal.set_wakeup_fd(wake)
    running: set[int] = set()
    while True:
        ready, _, _ = select.select([asked, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    asked.send(f"ended {pid} {os.waitstatus_to_exitcode(status)}".encode())
        if asked in ready:
            message, streams, _, _ = socket.recv_fds(asked, MOST_BYTES, 3)
            if not message:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                asked.close()
                os.close(woken)
                os.close(wake)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return json.loads(message)
            running.add(pid)
            for stream in streams:
                os.close(stream)
            asked.send(f"started {pid}".encode())


def run_script(arguments: list[str], folder: str, environment: dict[str, str], session: bool) -> None:
    """Run what `python ARGUMENTS` would in that folder: SCRIPT …, -m MODULE … or -c CODE …, after -u or not."""
    if session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "CXX" in environment:  # which torch read when it was imported
        sys.modules["torch._inductor.config"].cpp.cxx = (None, environment["CXX"])
    starts_others = any(word.startswith(("--nproc_per_node", "--restarts")) for word in arguments)
    if starts_others or arguments.count("--config") > 1:
        fork_children()
    sys.orig_argv = [sys.executable, *arguments]
    unbuffered = arguments[0] == "-u"
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        errors = "surrogateescape" if number == 1 else "backslashreplace"
        stream = open(number, "w", encoding="utf-8", errors=errors, closefd=False)
        stream.reconfigure(line_buffering=number == 2 or stream.isatty(), write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = arguments[unbuffered:]
    if sys.argv[0] == "-c":
        code, sys.argv = sys.argv[1], ["-c", *sys.argv[2:]]
        sys.path[0] = ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        sys.path[0] = folder
        sys.modules.pop(sys.argv[0], None)  # runpy warns of a module that is there already
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def fork_children() -> None:
    """Make torch's launcher and our supervisor, in this process, fork what they would start: from a copy of this
    process that has none of its threads."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from model.runs import supervisor
    from tests import forks

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        os.setsid()  # signals to the launcher's group are not for this copy
        end_quickly(serve(theirs))
    theirs.close()
    forks.SERVER = forks.Server(ours)
    supervisor.subprocess = forks
    popen = SubprocessHandler._popen

    def start(handler, command: tuple, environment: dict[str, str]):
        script = next((word for word in command if word.endswith(".py")), "")
        if Path(script).resolve().parent != ROOT:
            return popen(handler, command, environment)
        output = {"stdout": handler._stdout, "stderr": handler._stderr}
        return forks.Fork(list(command[1:]), environment, start_new_session=True, **output)

    SubprocessHandler._popen = start


def end_quickly(job: dict) -> NoReturn:
    """Call the job's function and end as Python does, but for the freeing of all modules, which takes a second."""
    code: object = 0
    try:
        module, _, function = job["function"].partition(":")
        getattr(sys.modules["__main__"] if module == "" else importlib.import_module(module), function)(
            **job["arguments"]
        )
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, (int, type(None))):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for all threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has closed it
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in the place of this file's own folder
    preload()
    gc.collect()
    gc.freeze()  # the collector of a forked process would otherwise touch, and so copy, all that was imported
    end_quickly(serve(socket.socket(fileno=int(sys.argv[1]))))

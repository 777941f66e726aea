"""One training process of a test, and the server that forks such processes.

The server has imported torch and the training code once, and has used no thread; a process forked from it begins
training after some milliseconds in place of seconds. Started by `harness.py`, with a JSON object a line on its standard
input for each process to fork, it answers with a line for its id and a line for its exit code.

Under torchrun the same file is the script: the job is then named in the environment.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
JOB_VARIABLE = "MATECONV_RELIABILITY_JOB"


def run_job(job: dict) -> None:
    """Run `train.main` with the job's flags in this process, as `python train.py` does; ends with SystemExit."""
    os.environ.update(job["environment"])
    rank, folder = os.environ.get("RANK", "0"), Path(job["folder"])
    log = os.open(folder / f"stderr.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # where does it hang? asked by the harness before it kills
    (folder / f"pid.rank{rank}").write_text(str(os.getpid()))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (folder / "pid.launcher").write_text(str(os.getppid()))
    sys.argv = ["train.py", *job["flags"]]

    import train
    from tests.reliability import faults
    from utils import run_command

    if job["quick"]:
        skip_what_is_slow()
    if job["record"]:
        record_reads(folder / f"reads.rank{rank}.jsonl", job["data_path"])
    for fault in job["faults"]:
        faults.install(faults.Fault(**fault), folder, job["data_path"])
    for setup in job["setups"]:
        module, _, function = setup["function"].partition(":")
        getattr(importlib.import_module(module), function)(**setup["arguments"])
    try:
        run_command(train.main)
    except SystemExit as exit_:
        (folder / f"code.rank{rank}").write_text(str(exit_.code))
        raise


def skip_what_is_slow() -> None:
    """Do without the measuring of the machine, the picture and the sample texts: seconds of each tiny run."""
    import model.runs.metrics
    import train
    import utils

    utils.measure_matmul_flops = lambda *args, **kwargs: 1e9
    model.runs.metrics.draw_curves = lambda events, path: None
    train.make_preview = lambda settings: None


def record_reads(path: Path, data_path: str) -> None:
    """Write down the samples of each training read, and each step of the float16 scaler."""
    import torch

    from model.dataset import PretrainDataset
    from tests.reliability.faults import wrap

    log = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (lives as long as the process)

    def read(self, samples, *args, **kwargs):
        if str(self.path) == data_path:
            log.write(json.dumps({"samples": [int(sample) for sample in samples]}) + "\n")

    def updated(self, *args, **kwargs):
        if self.is_enabled():
            log.write(json.dumps({"scale": self.get_scale()}) + "\n")

    wrap(PretrainDataset, "batch", before=read)
    wrap(torch.amp.GradScaler, "update", after=updated)


def serve() -> dict:
    """Fork a process for each line of standard input; returns only in those, with what the line asked for."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which ends this server
    signal.set_wakeup_fd(wake)
    running: set[int] = set()
    waiting = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    os.write(1, f"ended {pid} {os.waitstatus_to_exitcode(status)}\n".encode())
        if 0 in ready:
            received = os.read(0, 1 << 16)
            if not received:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    os.close(woken)
                    os.close(wake)
                    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                    return json.loads(line)
                running.add(pid)
                os.write(1, f"started {pid}\n".encode())


def preload() -> None:
    """Import what training needs, and load a tokenizer once: most of that is the import of transformers' parts."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch._dynamo  # noqa: F401 (every optimizer imports it)
    import torch.distributed  # noqa: F401
    import torch.nn.parallel  # noqa: F401

    import optimized_inference  # noqa: F401
    import optimized_pretrain  # noqa: F401
    import train  # noqa: F401
    from model.text.tokenization import load_tokenizer

    load_tokenizer()


def end_quickly(job: dict) -> NoReturn:
    """Run the job and end as Python does, but for the freeing of all modules, which takes a second."""
    code: object = 0
    try:
        run_job(job)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for all threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in the place of this file's own folder
    if JOB_VARIABLE in os.environ:  # a worker of torchrun
        run_job(json.loads(Path(os.environ[JOB_VARIABLE]).read_text(encoding="utf-8")))
    else:
        preload()
        gc.collect()
        gc.freeze()  # the collector of a forked process would otherwise touch, and so copy, all that was imported
        end_quickly(serve())

"""One training process of a test: a function for `tests/fork_server.py`; under torchrun, which starts its workers
itself, this file is their script, and the environment names the job.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

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


if __name__ == "__main__":  # a worker of torchrun
    sys.path[0] = str(ROOT)  # in the place of this file's own folder
    run_job(json.loads(Path(os.environ[JOB_VARIABLE]).read_text(encoding="utf-8")))

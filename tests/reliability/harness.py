"""What the reliability tests share: tiny data, and training processes with faults in them (`states.py` compares them).

data = make_data(folder)
job = start(data.flags(folder / "out", max_steps=12), ranks=2, fault=("forward", 7, 1))
codes = job.wait()  # [1, -9]: what each rank's process ended with
fingerprint(folder / "out" / "checkpoint_step_12.pth")
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from tests.forks import SERVER, free_port
from tests.reliability.faults import Fault

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = Path(__file__).with_name("child.py")
RUN_JOB = "tests.reliability.child:run_job"
SENTENCES = ["中国是一个历史悠久的国家。", "长江、黄河都在中国。", "The quick brown fox."]
HANG = "hang"  # in the place of the exit code of a process that had to be killed

# 41 thousand parameters; every step and evaluation is logged.
TINY = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32, "batch_size": 4, "learning_rate": 3e-3,
    "dtype": "float32", "max_steps": 12, "eval_interval": 4, "save_interval": 4, "log_interval": 1, "keep_last": 9,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is counted


@dataclass
class Counts:
    """What a test found."""

    cases: int = 0
    passed: int = 0
    failures: list[str] = field(default_factory=list)  # one line each: the case and what was wrong
    figures: str = ""  # what else was measured


def run_cases(cases: dict[str, Callable[[], Iterable[str]]], at_once: int = 2, figures: str = "") -> Counts:
    """Run each case, `at_once` of them at a time; a case returns its problems, one text each.

    An exception is a problem too.
    """

    def run(item: tuple[str, Callable]) -> list[str]:
        name, case = item
        try:
            return [f"{name}: {problem}" for problem in case()]
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = str(error).strip().splitlines() or [""]
            return [f"{name}: {type(error).__name__}: {reason[0]} ({Path(where.filename).name}:{where.lineno})"]

    with ThreadPoolExecutor(at_once) as pool:
        problems = list(pool.map(run, cases.items()))
    failures = [
        f"{found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") for found in problems if found
    ]
    return Counts(len(cases), len(cases) - len(failures), failures, figures)


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """A small tokenizer, token files to train on and to validate on, each with its manifest."""

    tokenizer: Path
    train: Path
    validation: Path

    def flags(self, out_dir: str | Path, **changes) -> dict[str, str]:
        """Flags of a tiny run into `out_dir`, with those given on top; None leaves a flag away."""
        paths = {"tokenizer_path": self.tokenizer, "train_data_path": self.train, "val_data_path": self.validation}
        values = TINY | paths | {"out_dir": out_dir} | changes
        return {name: str(value) for name, value in values.items() if value is not None}


_DATA_LOCK = threading.Lock()


def make_data(folder: str | Path, samples: int = 640, validation_samples: int = 8, seq_len: int = 32) -> Data:
    """Token files of so many samples, of the sample corpus' first texts; made once a folder and size."""
    from model.text.tokenization import load_tokenizer, tokenizer_sha256

    folder = Path(folder)
    tokenizer_folder = folder / "tokenizer"
    with _DATA_LOCK:
        if not tokenizer_folder.exists():
            make_tokenizer(tokenizer_folder)
            np.save(folder / "ids.npy", _corpus_ids(load_tokenizer(tokenizer_folder)))
        ids, sha256 = np.load(folder / "ids.npy"), tokenizer_sha256(tokenizer_folder)
        train, validation = samples * seq_len + 1, validation_samples * seq_len + 1
        assert train + validation <= len(ids), f"{len(ids)} tokens are there"
        paths = folder / f"train_{samples}_{seq_len}.bin", folder / f"validation_{validation_samples}_{seq_len}.bin"
        for path, part in zip(paths, (ids[:train], ids[-validation:]), strict=True):
            if not path.exists():
                write_token_file(path, part, sha256)
    return Data(tokenizer_folder, *paths)


def write_token_file(path: Path, ids: np.ndarray, tokenizer_sha256: str) -> None:
    """A token file of uint16 with its manifest."""
    from model.token_file.manifest import Manifest, file_sha256, write_manifest

    ids.astype("<u2").tofile(path)
    documents = max(1, int((ids == 1).sum()))
    write_manifest(
        path, Manifest("uint16", 300, 1, 2, len(ids), documents, tokenizer_sha256, "test", file_sha256(path))
    )


def _corpus_ids(tokenizer) -> np.ndarray:
    from model.text.tokenization import encode_texts

    with open(ROOT / "dataset" / "classics_zh.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 150)]
    ids: list[int] = []
    for encoded in encode_texts(tokenizer, texts):
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    return np.array(ids, dtype="<u2")


def make_tokenizer(folder: Path, sentences: list[str] = SENTENCES, chat_template: str | None = None) -> None:
    """A byte-level BPE of 300 tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass
class Job:
    """The processes of one training run."""

    folder: Path  # its logs: stderr.rankN, reads.rankN.jsonl, fault.rankN, code.rankN
    ranks: int
    pids: list[int]  # of the forked ranks; of the launcher alone where there is one
    launcher: subprocess.Popen | None = None
    began: float = field(default_factory=time.monotonic)

    def code(self, rank: int = 0, timeout: float = 0) -> int | None:
        """The exit code of a rank (of the launcher where there is one): negative for a signal, None while it runs."""
        if self.launcher is None:
            return SERVER.code(self.pids[rank], timeout)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(timeout)
        return self.launcher.poll()

    def wait(self, timeout: float = 600) -> list[int | str]:
        """Wait for all processes; each one's exit code, or HANG for those that were killed after `timeout` seconds.

        Those that hang are first asked where they are: it stands at the end of their stderr.
        """
        end, codes = time.monotonic() + timeout, []
        for rank in range(len(self.pids)):
            codes.append(self.code(rank, max(0.0, end - time.monotonic())))
        if None in codes:
            for rank in range(self.ranks):
                self.signal(signal.SIGUSR1, rank)
            time.sleep(0.5)
            self.kill()
        return [HANG if code is None else code for code in codes]

    def pid(self, rank: int | str) -> int | None:
        """The process id of a rank, or of the "launcher"."""
        if rank == "launcher":
            return self.pids[0] if self.launcher else None
        if self.launcher is None:
            return self.pids[rank]
        path = self.folder / f"pid.rank{rank}"
        return int(path.read_text()) if path.exists() else None

    def signal(self, number: int, rank: int | str = 0) -> None:
        """Send a signal to a rank or to the "launcher"; nothing where it has ended."""
        alive = self.code(rank) is None if self.launcher is None else self.launcher.poll() is None
        pid = self.pid(rank)
        if alive and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to all that still run, and wait for their end."""
        for rank in range(self.ranks):
            self.signal(signal.SIGKILL, rank)
        if self.launcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(600)
            self.launcher.kill()
        for rank in range(len(self.pids)):
            self.code(rank, 10)

    def stderr(self, rank: int | str = 0) -> str:
        """What a rank, or the "launcher", has said so far (stdout included)."""
        path = self.folder / ("stderr.launcher" if rank == "launcher" else f"stderr.rank{rank}")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def said(self, text: str, rank: int = 0, timeout: float = 600) -> bool:
        """Wait until a rank has said this; False where it has ended or the time is up before."""
        end = time.monotonic() + timeout
        while text not in self.stderr(rank):
            if self.code(rank) is not None or time.monotonic() > end:
                return text in self.stderr(rank)
            time.sleep(0.01)
        return True

    def struck(self, rank: int) -> bool:
        """Whether the rank's fault has happened."""
        return (self.folder / f"fault.rank{rank}").exists()

    def exit_code(self, rank: int) -> int | None:
        """What `train.main` ended with on a rank, also under a launcher; None where it did not come to its end."""
        path = self.folder / f"code.rank{rank}"
        text = path.read_text() if path.exists() else ""
        return int(text) if text.lstrip("-").isdigit() else None

    def reads(self, rank: int = 0, key: str = "samples") -> list:
        """The samples of each training read of a rank, in order; or with "scale" the float16 scale after each step."""
        path = self.folder / f"reads.rank{rank}.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one
        return [entry[key] for entry in entries if key in entry]


_NUMBERS = itertools.count()


def start(
    flags: dict[str, str],
    ranks: int = 1,
    fault: Fault | tuple | list | None = None,
    launcher: bool = False,
    *,
    setup: tuple[str, dict] | list[tuple[str, dict]] = (),
    environment: dict[str, str] | None = None,
    record: bool = True,
    launcher_flags: Iterable[str] = (),
) -> Job:
    """Start real processes that run `train.main` with these flags, without what `child.skip_what_is_slow` names.

    Args:
        flags: name to value; needs out_dir and train_data_path.
        ranks: how many processes train together.
        fault: a `faults.Fault`, or a tuple of its arguments, or a list of either.
        launcher: start `python -m torch.distributed.run --standalone` in place of forking the ranks.
        setup: ("tests.reliability.numerics:poison", {"rank": 1}): called in each process before training,
            with these arguments; or a list of such pairs. It must be importable with few imports of its own.
        environment: variables on top of this process's own.
        record: write down the samples of every training read (`Job.reads`).
        launcher_flags: more flags for torch.distributed.run.
    """
    out_dir = Path(flags["out_dir"])
    folder = out_dir.with_name(f"{out_dir.name}.job{next(_NUMBERS)}")
    folder.mkdir(parents=True)
    faults = fault if isinstance(fault, list) else [] if fault is None else [fault]
    setups = setup if isinstance(setup, list) else [setup] if setup else []
    job = {
        "folder": str(folder),
        "flags": [f"--{name}={value}" for name, value in flags.items()],
        "data_path": str(flags.get("train_data_path", "")),
        "faults": [asdict(f if isinstance(f, Fault) else Fault(*f)) for f in faults],
        "setups": [{"function": function, "arguments": arguments} for function, arguments in setups],
        "record": record,
        "environment": {name: str(value) for name, value in (environment or {}).items()},
    }
    if launcher:
        return _launch(job, folder, ranks, launcher_flags)
    return Job(folder, ranks, _fork(job, ranks))


def _fork(job: dict, ranks: int) -> list[int]:
    if ranks == 1:
        return [SERVER.fork(RUN_JOB, {"job": job})]
    port, pids = free_port(), []
    for rank in range(ranks):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": _loopback()}
        group = {name: str(value) for name, value in group.items()}
        pids.append(SERVER.fork(RUN_JOB, {"job": job | {"environment": group | job["environment"]}}))
    return pids


def _launch(job: dict, folder: Path, ranks: int, launcher_flags: Iterable[str]) -> Job:
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MATECONV_RELIABILITY_JOB": str(folder / "job.json")} | job["environment"]
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with open(folder / "stderr.launcher", "wb") as log:
        process = subprocess.Popen(
            [*arguments, *launcher_flags, str(CHILD)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return Job(folder, ranks, [process.pid], process)


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def finish(flags: dict[str, str], ranks: int = 1, **options) -> Job:
    """`start` and wait.

    Raises:
        RuntimeError: a rank did not end with 0.
    """
    job = start(flags, ranks, **options)
    codes = job.wait(options.get("timeout", 600))
    if any(codes):
        raise RuntimeError(f"ended with {codes}: {last_line(job)}")
    return job


def last_line(job: Job) -> str:
    """The last thing that each rank said, for a failure's line."""
    said = [(rank, job.stderr(rank).strip().splitlines()) for rank in range(job.ranks)]
    return "; ".join(f"rank {rank}: {lines[-1][:200]}" for rank, lines in said if lines)

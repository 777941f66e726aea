"""Does a run on several nodes give what one machine gives, and what happens when a node or its network fails?

    sudo python benchmarks/nodes.py
    sudo python benchmarks/nodes.py --only "silent" --keep /tmp/nodes

Nodes are network namespaces of this machine (`namespaces.py`), each with one process that torchrun starts; gradients go
through gloo. A small model trains on the sample corpus. Each case does something to a node or to its link, and is
compared with an undisturbed run: what was said and after how long, how many steps were taken twice, and whether the
final weights have the same SHA-256.
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.namespaces import Network, Node, end_on_sigterm, why_not
from model.training.reference import weights_sha256
from model.weights import load_weights

STEPS, SAVE_INTERVAL, FAULT_AT = 240, 20, 70  # the fault comes after FAULT_AT steps
ROWS = 8  # of all processes together
TIMEOUT = 20.0  # ddp_timeout, seconds
PATIENCE = 300.0  # seconds until a case counts as hung
FLAGS = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_steps": STEPS, "dtype": "float32",
    "attention": "pytorch", "save_interval": SAVE_INTERVAL, "eval_interval": STEPS, "log_interval": 1,
    "early_stopping": "false", "ddp_timeout": TIMEOUT,
}  # fmt: skip
# torchrun's own store lies on its first node and is not renewed when that node changes: each start makes a new one.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
ROW = "| {} | {} | {} | {} | {} |"


@dataclass
class Result:
    """What a case came to: a row of the table."""

    happened: str
    noticed: float | None = None  # seconds from the fault to the line that names it
    lost: int | None = None  # steps taken twice
    line: str = ""  # that named it
    weights: str = ""  # compared with the undisturbed run's


@dataclass
class Run:
    """One training on several nodes.

    Args:
        out_dir: the run's folder, which all nodes share.
        nodes: that it may use.
        data: the token file.
        min_nodes: that it may continue with.
        restarts: how often torchrun restarts the ranks.
    """

    out_dir: Path
    nodes: list[Node]
    data: Path
    min_nodes: int | None = None
    restarts: int = 5
    flags: dict = field(default_factory=dict)

    def start(self, *nodes: Node) -> None:
        """Start torchrun on these nodes, or on all."""
        least = self.min_nodes or len(self.nodes)
        count = f"{least}:{len(self.nodes)}" if least < len(self.nodes) else str(least)
        launcher = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={count}", "--nproc_per_node=1",
            f"--max_restarts={self.restarts}", "--rdzv_backend=c10d", f"--rdzv_endpoint={self.nodes[0].name}:29500",
            "--rdzv_id=run1",
        ]  # fmt: skip
        command = [*launcher, *training(self.out_dir, self.data, len(self.nodes), self.flags), "--ddp", "--resume"]
        for node in nodes or self.nodes:
            node.start(command, self.log(node), ENVIRONMENT)

    def log(self, node: Node) -> Path:
        return self.out_dir.with_name(f"{self.out_dir.name}.{node.name}.log")

    def said(self, node: Node) -> str:
        """What a node's processes have said so far."""
        return self.log(node).read_text(encoding="utf-8", errors="replace") if self.log(node).exists() else ""

    def step(self) -> int:
        """The last step that was logged."""
        try:
            lines = (self.out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, ValueError, IndexError):  # not yet, or a line that is being written
            return 0

    def wait_for_step(self, step: int = FAULT_AT) -> None:
        wait_until(lambda: self.step() >= step, f"step {step}", self)

    def wait_for_line(self, node: Node, pattern: str, after: int = 0, patience: float = PATIENCE) -> str:
        """Wait until a node says a line that matches; returns it.

        Args:
            after: characters of its log that do not count.
        """
        found = functools.partial(re.compile(f"^.*(?:{pattern}).*$", re.MULTILINE).search)
        wait_until(lambda: found(self.said(node)[after:]), f"{pattern!r} from {node.name}", self, patience)
        return found(self.said(node)[after:]).group().strip()

    def codes(self, *nodes: Node) -> list[int]:
        """Wait for the end on these nodes, or on all; what each ended with."""
        nodes = nodes or self.nodes
        wait_until(lambda: all(node.code() is not None for node in nodes), "the end", self)
        return [node.code() for node in nodes]

    def weights(self) -> str:
        """SHA-256 of the final weights."""
        return weights_sha256(load_weights(self.out_dir / "pretrain_64.pth").state_dict)

    def loss(self) -> float:
        """The last validation loss."""
        lines = (self.out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event["val_loss"] for event in map(json.loads, lines) if "val_loss" in event][-1]


def training(out_dir: Path, data: Path, processes: int, more: dict) -> list[str]:
    """The training's script and flags, without the launcher."""
    place = {"out_dir": out_dir, "train_data_path": data, "batch_size": ROWS // processes}
    flags = [f"--{name}={value}" for name, value in (FLAGS | place | more).items()]
    return [str(ROOT / "train.py"), f"--config={ROOT / 'config_demo.yaml'}", *flags]


def wait_until(condition: Callable, what: str, run: Run, patience: float = PATIENCE) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not; with the last thing that each node said.
    """
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            last = "; ".join(f"{node.name}: {run.said(node).strip().splitlines()[-1:]}" for node in run.nodes)
            raise TimeoutError(f"no {what} within {patience:.0f} s ({last})")
        time.sleep(0.05)


class Lab:
    """The cases, and the undisturbed runs that they are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "classics.bin"
        self.whole: dict[int, Run] = {}  # on one machine, by its number of processes

    def undisturbed(self, processes: int) -> Run:
        """A run of so many processes on this machine."""
        if processes not in self.whole:
            run = self.whole[processes] = Run(self.folder / f"machine_{processes}", [], self.data)
            several = [] if processes == 1 else [f"--nproc_per_node={processes}"]
            command = [sys.executable, *training(run.out_dir, self.data, processes, {}), *several]
            with open(f"{run.out_dir}.log", "ab") as log:
                source = f"--raw_data_path={ROOT / 'dataset' / 'classics_zh.jsonl'}"
                subprocess.run([*command, source], env=ENVIRONMENT, stdout=log, stderr=log, check=True)
        return self.whole[processes]

    def run(self, name: str, nodes: list[Node], **options) -> Run:
        """A run that begins now."""
        run = Run(self.folder / name, nodes, self.data, **options)
        run.start()
        return run

    def compared(self, run: Run) -> str:
        """Whether the final weights are those of the undisturbed run."""
        whole = self.undisturbed(len(run.nodes))
        if run.weights() == whole.weights():
            return "the same bits"
        return f"other bits; validation loss off by {abs(run.loss() - whole.loss()):.1e}"

    # ---------------------------------------------------------------------------------------------------- the cases

    def equal(self, count: int) -> Result:
        """Nothing happens; compared with one machine and with one process."""
        with Network(count) as nodes:
            run = self.run(f"equal_{count}", nodes)
            codes = run.codes()
        off = abs(run.loss() - self.undisturbed(1).loss())
        return Result(f"exit codes {codes}; validation loss {off:.0e} off one process's", weights=self.compared(run))

    def node_returns(self) -> Result:
        """A node dies, and its torchrun is started again."""
        with Network(2) as nodes:
            run = self.run("node_returns", nodes)
            run.wait_for_step()
            reached, fault = run.step(), time.monotonic()
            nodes[1].kill()
            line = run.wait_for_line(nodes[0], "error: ")
            noticed = time.monotonic() - fault
            run.start(nodes[1])
            resumed = run.wait_for_line(nodes[0], "resuming from .* at step")
            codes = run.codes()
        lost = reached - int(resumed.rsplit(None, 1)[1])
        return Result(f"torchrun restarts, exit codes {codes}", noticed, lost, line, self.compared(run))


CASES: dict[str, Callable[[Lab], Result]] = {
    "two nodes": lambda lab: lab.equal(2),
    "four nodes": lambda lab: lab.equal(4),
    "a node dies and comes back": Lab.node_returns,
}


def main() -> int:
    """Run the cases and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which stays; must be new or empty")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    end_on_sigterm()
    chosen = {name: case for name, case in CASES.items() if options.only in name}
    with tempfile.TemporaryDirectory(prefix="mateconv-nodes-") as temporary:
        lab = Lab(options.keep or Path(temporary))
        lab.folder.mkdir(parents=True, exist_ok=True)
        lab.undisturbed(1)
        print(ROW.format("case", "what happened", "noticed after, s", "steps repeated", "final weights"))
        print("|---|---|---:|---:|---|")
        failed = 0
        for name, case in chosen.items():
            try:
                result = case(lab)
            except (TimeoutError, OSError, subprocess.CalledProcessError) as error:
                result, failed = Result(f"FAILED: {error}"), failed + 1
            said = f"{result.happened}: `{result.line}`" if result.line else result.happened
            noticed = "" if result.noticed is None else f"{result.noticed:.1f}"
            lost = "" if result.lost is None else result.lost
            print(ROW.format(name, said, noticed, lost, result.weights), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Does a run on several nodes give what one machine gives, and what happens when a node or its network fails?

    sudo python benchmarks/nodes.py
    sudo python benchmarks/nodes.py --only "silent|slow" --keep /tmp/nodes

Nodes are network namespaces of this machine (`namespaces.py`), each with one process that torchrun starts; gradients go
through gloo. A small model trains on the sample corpus. Each case does something to a node or to its link, and is
compared with an undisturbed run: what was said and after how long, how many steps were taken twice, and whether the
final weights have the same SHA-256.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from namespaces import Network, Node, end_on_sigterm, why_not

from model.training.reference import weights_sha256
from model.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_INTERVAL, FAULT_AT = 360, 20, 70  # the fault comes after FAULT_AT steps
ROWS = 8  # of all processes together
TIMEOUT = 20.0  # ddp_timeout, seconds
PATIENCE = 240.0  # seconds until a case counts as hung
FLAGS = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_steps": STEPS, "dtype": "float32",
    "attention": "pytorch", "save_interval": SAVE_INTERVAL, "eval_interval": STEPS, "log_interval": 1,
    "early_stopping": "false", "ddp_timeout": TIMEOUT,
}  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
ENVIRONMENT |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # no warning that the addresses have no names
TORCHRUN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/distributed.md says why
OTHER = "other bits"
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
        restarts: how often the ranks are restarted.
        by_torchrun: whether torchrun restarts them, or `train.py --restarts`.
    """

    out_dir: Path
    nodes: list[Node]
    data: Path
    min_nodes: int | None = None
    restarts: int = 5
    by_torchrun: bool = True

    def start(self, *nodes: Node) -> None:
        """Start the launcher on these nodes, or on all."""
        least = self.min_nodes or len(self.nodes)
        count = f"{least}:{len(self.nodes)}" if least < len(self.nodes) else str(least)
        meeting = {"NNODES": count, "RDZV_BACKEND": "c10d", "RDZV_ID": "run1"}
        meeting |= {"RDZV_ENDPOINT": f"{self.nodes[0].name}:29500"}
        train = [*training(self.out_dir, self.data, len(self.nodes)), "--resume"]
        if self.by_torchrun:
            meeting |= {"NPROC_PER_NODE": "1", "MAX_RESTARTS": str(self.restarts)}
            command, environment = [sys.executable, "-m", "torch.distributed.run", *train, "--ddp"], TORCHRUN
        else:
            command, environment = [sys.executable, *train, "--nproc_per_node=1", f"--restarts={self.restarts}"], {}
        environment = environment | {f"PET_{name}": value for name, value in meeting.items()}
        for node in nodes or self.nodes:
            node.start(command, self.log(node), ENVIRONMENT | environment)

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

    def wait_for_line(self, node: Node, pattern: str, after: int = 0) -> str:
        """Wait until a node says a line that matches; returns it.

        Args:
            after: characters of its log that do not count.
        """
        found = functools.partial(re.compile(f"^.*(?:{pattern}).*$", re.MULTILINE).search)
        wait_until(lambda: found(self.said(node)[after:]), f"{pattern!r} from {node.name}", self)
        return found(self.said(node)[after:]).group().strip()

    def noticed(self, node: Node, pattern: str = "error: ") -> tuple[str, float]:
        """Wait for a line about what happens now; the line, and after how many seconds it came."""
        since, before = time.monotonic(), len(self.said(node))
        line = self.wait_for_line(node, pattern, before)
        return line, time.monotonic() - since

    def resumed_from(self) -> int:
        """The step that the first restart resumed from."""
        steps = re.findall(r"resuming from \S+ at step ([\d,]+)", "".join(map(self.said, self.nodes)))
        return int(steps[0].replace(",", "")) if steps else 0

    def restarts_seen(self) -> int:
        """How often the ranks resumed."""
        return len(re.findall(r"resuming from \S+ at step", "".join(map(self.said, self.nodes))))

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


def training(out_dir: Path, data: Path, processes: int) -> list[str]:
    """The training's script and flags, without the launcher."""
    place = {"out_dir": out_dir, "train_data_path": data, "batch_size": ROWS // processes}
    place |= {"global_batch_size": ROWS}  # also where fewer nodes continue
    flags = [f"--{name}={value}" for name, value in (FLAGS | place).items()]
    return [str(ROOT / "train.py"), f"--config={ROOT / 'config_demo.yaml'}", *flags]


def wait_until(condition: Callable, what: str, run: Run) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not; with the last thing that each node said.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            last = "; ".join(f"{node.name}: {run.said(node).strip().splitlines()[-1:]}" for node in run.nodes)
            raise TimeoutError(f"no {what} within {PATIENCE:.0f} s ({last})")
        time.sleep(0.05)


class Lab:
    """The cases, and the undisturbed runs that they are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "classics.bin"
        folder.mkdir(parents=True, exist_ok=True)
        self.whole: dict[int, Run] = {}  # on one machine, by its number of processes

    def undisturbed(self, processes: int) -> Run:
        """A run of so many processes on this machine."""
        if processes not in self.whole:
            run = self.whole[processes] = Run(self.folder / f"machine_{processes}", [], self.data)
            several = [] if processes == 1 else [f"--nproc_per_node={processes}"]
            command = [sys.executable, *training(run.out_dir, self.data, processes), *several]
            with open(f"{run.out_dir}.log", "ab") as log:
                source = f"--raw_data_path={ROOT / 'dataset' / 'classics_zh.jsonl'}"
                subprocess.run([*command, source], env=ENVIRONMENT, stdout=log, stderr=log, check=True)
        return self.whole[processes]

    def run(self, name: str, nodes: list[Node], **options) -> Run:
        """A run that begins now, in a new folder."""
        run = Run(self.folder / name, nodes, self.data, **options)
        run.out_dir.mkdir()
        run.start()
        return run

    def compared(self, run: Run) -> str:
        """Whether the final weights are those of the undisturbed run."""
        whole = self.undisturbed(len(run.nodes))
        if run.weights() == whole.weights():
            return "the same bits"
        return f"{OTHER}; validation loss off by {abs(run.loss() - whole.loss()):.1e}"

    # ---------------------------------------------------------------------------------------------------- the cases

    def equal(self, count: int) -> Result:
        """Nothing happens; compared with one machine and with one process."""
        with Network(count) as nodes:
            run = self.run(f"equal_{count}", nodes)
            codes = run.codes()
        off = abs(run.loss() - self.undisturbed(1).loss())
        return Result(f"exit codes {codes}; validation loss {off:.1e} off one process's", weights=self.compared(run))

    @contextlib.contextmanager
    def disturbed(self, name: str, **options) -> Iterator[Run]:
        """A run on two nodes that has reached the step of its fault."""
        with Network(2) as nodes:
            run = self.run(name, nodes, **options)
            run.wait_for_step()
            yield run

    def node_returns(self, dead: int = 1, **options) -> Result:
        """A node dies, and is started again 5 s after the other has noticed."""
        with self.disturbed("_".join(["returns", str(dead), *options]), **options) as run:
            alive, reached = run.nodes[1 - dead], run.step()
            run.nodes[dead].kill()
            line, noticed = run.noticed(alive)
            time.sleep(5)
            run.start(run.nodes[dead])
            codes = run.codes()
        return Result(f"exit codes {codes}", noticed, reached - run.resumed_from(), line, self.compared(run))

    def no_restarts(self) -> Result:
        """A node dies, the other ends; then both are started again."""
        with self.disturbed("no_restarts", restarts=0) as run:
            reached = run.step()
            run.nodes[1].kill()
            line, noticed = run.noticed(run.nodes[0])
            codes = run.codes(run.nodes[0])
            run.start()
            codes += run.codes()
        happened = f"exit code {codes[0]}; started again: {codes[1:]}"
        return Result(happened, noticed, reached - run.resumed_from(), line, self.compared(run))

    def node_stays_away(self, leave: Callable[[Node], None]) -> Result:
        """One node of `--nnodes 1:2` dies, or is cut off, for good."""
        with self.disturbed(f"away_{leave.__name__}", min_nodes=1) as run:
            reached = run.step()
            leave(run.nodes[1])
            line, noticed = run.noticed(run.nodes[0])
            codes = run.codes(run.nodes[0])
        return Result(
            f"continues alone, exit code {codes[0]}", noticed, reached - run.resumed_from(), line, self.compared(run)
        )

    def node_joins(self) -> Result:
        """One node of `--nnodes 1:2` dies, and comes back when the other continues alone."""
        with self.disturbed("joins", min_nodes=1) as run:
            reached = run.step()
            run.nodes[1].kill()
            line, noticed = run.noticed(run.nodes[0])
            run.wait_for_line(run.nodes[0], "resuming from")
            lost = reached - run.resumed_from()
            run.start(run.nodes[1])
            codes = run.codes()
        return Result(f"{run.restarts_seen()} restarts, exit codes {codes}", noticed, lost, line, self.compared(run))

    def silent_for_a_moment(self) -> Result:
        """A link is silent for a quarter of ddp_timeout."""
        with self.disturbed("moment") as run:
            run.nodes[1].cut()
            time.sleep(TIMEOUT / 4)
            run.nodes[1].join()
            codes = run.codes()
        return Result(f"{run.restarts_seen()} restarts, exit codes {codes}", weights=self.compared(run))

    def silent_until_noticed(self) -> Result:
        """A link is silent until both sides have given up, then comes back."""
        with self.disturbed("silent", by_torchrun=False) as run:
            reached = run.step()
            run.nodes[1].cut()
            line, noticed = run.noticed(run.nodes[0])
            run.wait_for_line(run.nodes[1], "error: ")
            run.nodes[1].join()
            codes = run.codes()
        return Result(f"exit codes {codes}", noticed, reached - run.resumed_from(), line, self.compared(run))

    def slow(self, name: str, begin: Callable[[Node], None], end: Callable[[Node], None]) -> Result:
        """A node or its link is slow until rank 0 has named it."""
        with self.disturbed(name) as run:
            begin(run.nodes[1])
            try:
                line, noticed = run.noticed(run.nodes[0], "s so far|is slow")
            finally:
                end(run.nodes[1])
            codes = run.codes()
        return Result(f"{run.restarts_seen()} restarts, exit codes {codes}", noticed, 0, line, self.compared(run))

    def slow_node(self) -> Result:
        """A node gets a quarter of the time."""
        over = threading.Event()

        def interrupt(node: Node) -> None:
            while not over.wait(0.05):
                node.signal_ranks(signal.SIGSTOP)
                time.sleep(0.15)
                node.signal_ranks(signal.SIGCONT)

        thread = None

        def begin(node: Node) -> None:
            nonlocal thread
            thread = threading.Thread(target=interrupt, args=(node,))
            thread.start()

        def end(node: Node) -> None:
            over.set()
            thread.join()

        return self.slow("slow_node", begin, end)


CASES: dict[str, Callable[[Lab], Result]] = {
    "two nodes": lambda lab: lab.equal(2),
    "four nodes": lambda lab: lab.equal(4),
    "a node dies, and comes back (torchrun --max-restarts)": Lab.node_returns,
    "a node dies, no restarts": Lab.no_restarts,
    "a node dies for good (--nnodes 1:2)": lambda lab: lab.node_stays_away(Node.kill),
    "a node dies, and joins later (--nnodes 1:2)": Lab.node_joins,
    "a node dies, and comes back (train.py --restarts)": lambda lab: lab.node_returns(by_torchrun=False),
    "the first node dies, and comes back (train.py --restarts)": lambda lab: lab.node_returns(0, by_torchrun=False),
    "a link is silent for 5 s": Lab.silent_for_a_moment,
    "a link is silent for longer than ddp_timeout": Lab.silent_until_noticed,
    "a link is silent for good (--nnodes 1:2)": lambda lab: lab.node_stays_away(Node.cut),
    "a rank stands still": lambda lab: lab.slow(
        "stands", lambda node: node.signal_ranks(signal.SIGSTOP), lambda node: node.signal_ranks(signal.SIGCONT)
    ),
    "a slow node": Lab.slow_node,
    "a slow link": lambda lab: lab.slow(
        "slow_link", lambda node: node.throttle("1mbit"), lambda node: node.throttle(None)
    ),
}


def main() -> int:
    """Run the cases and print a table; returns the exit code, 1 where a case hung or ended with other bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="the cases whose name this regular expression finds")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which stays; must be new or empty")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    end_on_sigterm()
    chosen = {name: case for name, case in CASES.items() if re.search(options.only, name)}
    with tempfile.TemporaryDirectory(prefix="mateconv-nodes-") as temporary:
        lab = Lab(options.keep or Path(temporary))
        lab.undisturbed(1)
        print(ROW.format("case", "what happened", "noticed after, s", "steps repeated", "final weights"))
        print("|---|---|---:|---:|---|")
        failed = 0
        for name, case in chosen.items():
            try:
                result = case(lab)
            except (TimeoutError, OSError, subprocess.CalledProcessError) as error:
                result, failed = Result(f"FAILED: {error}"), failed + 1
            failed += result.weights.startswith(OTHER)
            said = f"{result.happened}: `{result.line}`" if result.line else result.happened
            noticed = "" if result.noticed is None else f"{result.noticed:.1f}"
            lost = "" if result.lost is None else result.lost
            print(ROW.format(name, said, noticed, lost, result.weights), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything a GPU should do, tried on this machine: correct results, the same results after a kill, and speed.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only machine smoke tests
    python benchmarks/gpu.py --out gpu_results --nanogpt ../nanoGPT --minimind ../minimind

All parts take about fifteen minutes on an H100 with 16 cores. `--seconds` (540) limits all of them together: no part
starts after it, and one that still runs is cut off. Each part has its own processes and time limit, and the next one
starts whatever the outcome. Ctrl-C ends what runs. `summary.md` and `results.json` in the folder
are rewritten after each part and logs are written as they come, so an interrupted run leaves what it found. With
`--device cpu` all shapes are tiny, to test the parts themselves.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from model.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
TOKENS = ROOT / "dataset" / "classics_zh.bin"
SHOWN = 75  # last lines of a part that the summary shows
SIDE_BY_SIDE = {"tests", "resume", "training_tests"}  # nothing in them is timed
RUNNING: set[subprocess.Popen] = set()
ORDER = (  # the most important first
    "machine", "smoke", "tests", "resume", "training_tests", "graph", "documents", "train_speed", "profile",
    "train_speed_110M", "graph_110M", "decode", "demo", "training", "decode_135M", "dry_run", "saving", "decode_fp32",
    "decode_135M_fp32",
)  # fmt: skip
LARGE = ("--dim", 768, "--n_layers", 16, "--max_seq_len", 1024, "--batch_size", 16)
TINY = ("--dim", 64, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2, "--max_seq_len", 64, "--batch_size", 2)


@dataclass
class Part:
    """Commands that run one after another until one fails."""

    name: str
    question: str
    seconds: float  # for all of them together
    commands: list[list[str]]
    log: str = "log.txt"
    outcome: str = "not run"
    took: float = 0.0
    said: list[str] = field(default_factory=list)


def python(script: str, *arguments) -> list[str]:
    """The command line of a script in this repository, or of a module: `-m`, its name."""
    return [sys.executable, script if script == "-m" else str(ROOT / script), *map(str, arguments)]


def all_parts(options: argparse.Namespace, work: Path) -> list[Part]:
    """The parts, in order."""
    parts = {part.name: part for make in (checks, speeds, trainings) for part in make(options, work)}
    for part in parts.values():
        part.seconds *= 5 if options.device == "cpu" else 1
    return [parts[name] for name in ORDER]


def checks(options: argparse.Namespace, work: Path) -> list[Part]:
    """Are the results correct?"""
    in_parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--durations=5"]
    rooms = {
        "training": ("cuda", "recipe", "optimizer"),
        "model": ("model",),
        "generation": ("sampling", "cuda_decode"),
    }
    files = [f"tests/{room}/test_{name}.py" for room, names in rooms.items() for name in names]
    parts = "benchmarks/gpu_parts.py"
    demo = ["train.py", "--config", "config_demo.yaml", "--device", options.device, "--compile", "false"]
    write = ["inference.py", "--device", options.device, "--model_path", work / "smoke" / "best_model.pth"]
    return [
        Part("machine", "what is here, and what are its limits", 60, [python(parts, "machine", options.device, work)]),
        Part("smoke", "do training and generation run at all", 120, [
            python(*demo, "--max_steps", 20, "--eval_interval", 10, "--out_dir", work / "smoke"),
            python(*write, "--prompt", "春风", "--max_new_tokens", 40, "--seed", 1, "--show_speed"),
        ]),
        Part("tests", "are the numbers those of the CPU", 180, [[*pytest, *in_parallel, *files]], "tests.log"),
        Part("resume", "do killed and resumed runs end with the same bits", 240,
             [python("-m", "tests.reliability.device_resume", options.device)], "resume.log"),
        Part("training_tests", "do the tests of training pass here", 240,
             [[*pytest, *in_parallel, "tests/training/test_training.py", "tests/training/test_running_ahead.py", "-k",
               "not two_processes and not two_ranks"]],
             "training_tests.log"),
    ]  # fmt: skip


def speeds(options: argparse.Namespace, work: Path) -> list[Part]:
    """How fast is each piece?"""
    small, device = options.device == "cpu", ("--device", options.device)
    middle = TINY if small else ("--batch_size", 32)
    large = TINY if small else LARGE
    ours, others, folders = ["ours", "ours-compiled"], ["llama", "llama-compiled"], []
    if options.nanogpt:
        others, folders = [*others, "nanogpt", "nanogpt-compiled"], ["--nanogpt", options.nanogpt]
    if options.minimind:
        others, folders = [*others, "minimind"], [*folders, "--minimind", options.minimind]
    step = ["benchmarks/train_step.py", *device, "--dtype", "bfloat16", "--rounds", 2 if small else 6]
    all_of_them = [*folders, "--together", "--only", *ours, *others]
    decode = ["benchmarks/decode.py", *device, "--together"]
    decode += ["--tokens", 4, "--only", "transformers", "eager"] if small else ["--tokens", 64]
    eager = [] if small else ["--only", "transformers", "eager", "graph", "sampled_eager", "sampled_graph"]
    middle_shape = "26.9M" if small else "135M"
    any_order, joined = ("ours-any-order", "ours-any-order-compiled"), ("ours-joined", "ours-joined-compiled")
    return [
        Part("train_speed", "how fast is a step of 26.9M parameters", 190,
             [python(*step, *middle, *all_of_them, *any_order, *joined)]),
        Part("train_speed_110M", "how fast is a step of 110M parameters", 190,
             [python(*step, *large, *all_of_them, *joined)]),
        Part("profile", "where a step's time goes", 90,
             [python(*step, *middle, "--profile"), python(*step, *middle, "--profile", "--only", "ours-compiled")]),
        Part("decode", "how fast is generation with 26.9M parameters", 240,
             [python(*decode, "--rounds", 3, "--shapes", "26.9M", "--formats", "bf16")]),
        Part("decode_135M", "how fast is generation with 135M parameters", 300,
             [python(*decode, "--rounds", 2, "--shapes", middle_shape, "--formats", "bf16")]),
        Part("decode_fp32", "the same with 26.9M in float32, not compiled", 100,
             [python(*decode, *eager, "--rounds", 3, "--shapes", "26.9M", "--formats", "fp32")]),
        Part("decode_135M_fp32", "the same with 135M in float32, not compiled", 100,
             [python(*decode, *eager, "--rounds", 2, "--shapes", middle_shape, "--formats", "fp32")]),
        Part("saving", "how long does a save stop training", 60,
             [python("benchmarks/saving.py", *device, *(TINY[:4] if small else ()))]),
    ]  # fmt: skip


def trainings(options: argparse.Namespace, work: Path) -> list[Part]:
    """train.py itself."""
    small, device = options.device == "cpu", ("--device", options.device)
    shape = TINY if small else ("--batch_size", 32)
    demo = ["train.py", "--config", "config_demo.yaml", *device, *(("--max_steps", 20) if small else ())]
    run = ["train.py", "--train_data_path", TOKENS, "--raw_data_path", TOKENS.with_suffix(".jsonl"), *device, *shape]
    run += ["--log_interval", 20, "--eval_steps", 4]
    run += ["--max_steps", 40 if small else 300, "--eval_interval", 100, "--learning_rate", "1e-3"]
    dry = ["train.py", "--train_data_path", TOKENS, *device, *shape, "--epochs", 2, "--dry_run"]
    dry += [] if small else ["--batch_size", "auto", "--learning_rate", "auto"]

    def told(name: str) -> list[str]:
        return python("benchmarks/gpu_parts.py", "told", options.device, work / name)

    def graph_part(name: str, seconds: float, shape: tuple, compiled: Sequence[str]) -> Part:
        """The same run with its steps launched and as a graph, one pair after another."""
        commands = []
        for compile_ in compiled:
            pair = [work / f"{name}_{compile_}_{kind}" for kind in ("launched", "graph")]
            for folder, on in zip(pair, ("false", "auto"), strict=True):
                steps = ("--max_steps", 40 if small else 200, "--eval_interval", 100, "--log_interval", 10)
                flags = ("--compile", compile_, "--cuda_graph", on, "--out_dir", folder)
                commands.append(python(*run, *shape, *steps, *flags))
            commands.append(python("benchmarks/gpu_parts.py", "pair", options.device, *pair))
        question = "what is a step as one CUDA graph worth, and has it the bits of launched kernels"
        return Part(name, question, seconds, commands)

    documents = []
    for way in ("pytorch", "auto"):
        flags = ("--document_mask", "--qk_norm", "--compile", "true", "--attention", way)
        documents += [python(*run, *flags, "--out_dir", work / f"documents_{way}"), told(f"documents_{way}")]

    return [
        Part("documents", "what is attention that skips other documents worth, beside a mask", 150, documents),
        Part("demo", "the demo, compiled", 90,
             [python(*demo, "--compile", "true", "--out_dir", work / "demo"), told("demo")]),
        Part("training", "is train.py as fast as the bare steps, compiled and eager", 120, [
            python(*run, "--compile", "true", "--out_dir", work / "compiled"), told("compiled"),
            python(*run, "--compile", "false", "--use_ema", "--out_dir", work / "eager"), told("eager"),
        ]),
        graph_part("graph", 180, shape, ("true", "false")),
        graph_part("graph_110M", 150, LARGE if not small else shape, ("true",)),
        Part("dry_run", "what would a run take, with the largest batch that fits", 90,
             [python(*dry, "--compile", "true")]),
    ]  # fmt: skip


def run(part: Part, out: Path, environment: dict[str, str], left: float) -> None:
    """Run a part's commands; their output goes to its log, and the last lines into `part.said`."""
    start, limit = time.monotonic(), min(part.seconds, left)
    with open(out / part.log, "a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n======== {part.name}: {part.question}\n")
        log.flush()
        begin = log.tell()
        part.outcome = "passed"
        for command in part.commands:
            log.write(f"$ {' '.join(command[1:])}\n")
            log.flush()
            code = finish(command, log, environment, limit - (time.monotonic() - start))
            if code != 0:
                part.outcome = f"cut off after {limit:.0f} s" if code is None else f"failed with code {code}"
                break
        part.took = time.monotonic() - start
        log.seek(begin)
        part.said = [line.rstrip() for line in log.read().splitlines() if line.strip()]


def finish(command: list[str], log, environment: dict[str, str], seconds: float) -> int | None:
    """A command's exit code; None: it took too long and was killed with all its children."""
    own_group = {"start_new_session": True} if os.name == "posix" else {}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **own_group
    )
    RUNNING.add(process)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        kill(process)
        process.wait()
        return None
    finally:
        RUNNING.discard(process)


def kill(process: subprocess.Popen) -> None:
    """End a command with all its children."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def write_summary(parts: list[Part], out: Path) -> None:
    """Write the results so far, for readers and for programs."""
    (out / "results.json").write_text(json.dumps([asdict(part) for part in parts], indent=1), encoding="utf-8")
    lines = ["| part | question | outcome | seconds |", "|---|---|---|---:|"]
    lines += [f"| {part.name} | {part.question} | {part.outcome} | {part.took:.0f} |" for part in parts]
    for part in parts:
        if part.said:
            lines += ["", f"## {part.name}", "```", *part.said[-SHOWN:], "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def keep_curves(out: Path, work: Path) -> None:
    """Copy the demo's curve and events into the folder of results."""
    for name in ("curves.png", "metrics.jsonl"):
        if (work / "demo" / name).exists():
            shutil.copy(work / "demo" / name, out / name)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu", metavar="FOLDER", help="for the results [out/gpu]"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for tiny shapes [cuda]")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--seconds", type=float, default=540, metavar="N", help="for all parts together [540]")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of nanoGPT")
    parser.add_argument("--minimind", metavar="FOLDER", help="a checkout of MiniMind at its tag minimind-v1")
    options = parser.parse_args()
    options.device = str(utils.pick_device(options.device)[0])
    names = [part.name for part in all_parts(options, options.out)]
    if unknown := sorted(set(options.only or []) - set(names)):
        raise InputError(f"--only: {unknown[0]} found, of {', '.join(names)} expected")
    return options


def main() -> int:
    """Run the parts; 0 if all of them passed."""
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"MATECONV_TEST_DEVICE": options.device}
    with tempfile.TemporaryDirectory(prefix="mateconv_gpu_") as name:
        work = Path(name)
        parts = [part for part in all_parts(options, work) if options.only is None or part.name in options.only]
        waiting = list(parts)
        while waiting and end - time.monotonic() > 10:
            count = 1
            while count < len(waiting) and {waiting[0].name, waiting[count].name} <= SIDE_BY_SIDE:
                count += 1
            some, waiting = waiting[:count], waiting[count:]
            with ThreadPoolExecutor(count) as pool:
                try:
                    list(pool.map(lambda part: run(part, options.out, environment, end - time.monotonic()), some))
                except KeyboardInterrupt:  # the commands, in groups of their own, did not get it
                    for process in [*RUNNING]:
                        kill(process)
                    raise
            for part in some:
                print(f"\n=== {part.name}: {part.outcome}, {part.took:.0f} s")
                print("\n".join(part.said[-15:]), flush=True)
            keep_curves(options.out, work)
            write_summary(parts, options.out)
    print("\n".join(["", *(f"{part.name:18} {part.took:5.0f} s  {part.outcome}" for part in parts)]))
    return 0 if all(part.outcome == "passed" for part in parts) else 1


if __name__ == "__main__":
    utils.run_command(main)

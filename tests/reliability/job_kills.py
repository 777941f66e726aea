"""A case is two processes that train together, one of which kills itself (SIGKILL) at a named point: while it reads a
batch, computes, steps or evaluates, or while a file is written. It passes if the other process ends within a minute
with exit code 3 and names the rank, if both then resume with at most one save interval lost, and if the end has the
bits of an uninterrupted run: the SHA-256 of the last state, both files of weights, every line of metrics.jsonl, and the
same files in the folder, with no temporary file and no second copy.
"""

import functools
import itertools
import json
from pathlib import Path

from tests.reliability.harness import Counts, Data, finish, last_line, make_data, run_cases, start
from tests.reliability.states import differences, file_names, left_lying, logged, state_of

STEPS, INTERVAL, ACCUMULATION = 12, 4, 2
FLAGS = {
    "batch_size": 2, "accumulation_steps": ACCUMULATION, "max_steps": STEPS, "save_interval": INTERVAL,
    "eval_interval": INTERVAL, "keep_last": 1, "use_ema": "true", "dropout": 0.1,
}  # fmt: skip
# In step 7, once the checkpoint of step 4 is there; in the evaluation at step 8, of two batches; while that is saved;
# at the end. Where only rank 0 passes a point, rank 1 takes what it does at that time.
READ = 6 * ACCUMULATION + 2
POINTS = {
    "reading a batch": [("reading a batch", READ)] * 2,
    "forward": [("forward", READ)] * 2,
    "backward": [("backward", READ)] * 2,
    "before the optimizer's step": [("before the optimizer's step", 7)] * 2,
    "after the optimizer's step": [("after the optimizer's step", 7)] * 2,
    "evaluation": [("evaluation", 3)] * 2,
    "best_model.json": [("best_model.json", 2), ("evaluation", 4)],
    "best_model.pth": [("best_model.pth", 2), ("gathering the states", 2)],
    "within torch.save of a checkpoint": [("within torch.save of a checkpoint", 2), ("reading a batch", 17)],
    "before the rename": [("before the rename of a checkpoint", 2), ("forward", 17)],
    "after the rename, before pruning": [("after the rename of a checkpoint", 2), ("backward", 17)],
    "the final save": [("final weights", 1), ("barrier", 1)],
}


def case(data: Data, folder: Path, whole: Path, name: str, rank: int, endings: list) -> list[str]:
    """Kill a rank at a point of POINTS, resume, compare."""
    point, occurrence = POINTS[name][rank]
    out, final = folder / f"{list(POINTS).index(name)}_{rank}", name == "the final save"
    saved = 2 * INTERVAL if final else INTERVAL
    after_file = None if final else str(out / f"checkpoint_step_{saved}.pth")
    return kill_and_resume(
        data.flags(out, **FLAGS), whole, (point, occurrence, rank, "kill", after_file), saved, endings
    )


def kill_and_resume(
    flags: dict[str, str], whole: Path, fault: tuple, saved: int, endings: list, ranks: int = 2
) -> list[str]:
    """Kill a rank, wait, resume, compare.

    Args:
        whole: the folder of an uninterrupted run.
        fault: that kills a rank, see `harness.start`.
        saved: the step that the run must have saved by then.
        endings: gets the exit code of another rank.
    """
    rank = fault[2]
    job = start(flags, ranks, fault)
    job.code(rank, 60)
    other = 0 if rank else 1
    code = job.code(other, 60)
    job.kill()
    if not job.struck(rank):
        return [f"the point was not reached: {last_line(job)}"]
    endings.append(code)
    problems = []
    if code is None:
        problems.append("the other process hung for a minute")
    elif code != 3:
        problems.append(f"the other process ended with {code}: {last_line(job)}")
    elif f"rank {rank}" not in job.stderr(other):
        problems.append(f"rank {rank} is not named: {last_line(job)}")
    return problems + resume_problems(flags, whole, saved, ranks)


def resume_problems(flags: dict[str, str], whole: Path, saved: int, ranks: int = 2) -> list[str]:
    """Resume, and compare the end with that of an uninterrupted run."""
    resumed = start(flags | {"resume": "true"}, ranks)
    codes = resumed.wait()
    said, problems = resumed.stderr(), []
    went_on = [int(word.replace(",", "")) for word in _after(said, "resuming from", " at step ")]
    if any(codes) or not went_on:
        return [f"resuming ended with {codes}: {last_line(resumed)}"]
    if went_on[0] < saved:
        problems.append(f"went on from step {went_on[0]}: more than one save interval is lost")
    return problems + compare(whole, Path(flags["out_dir"]))


def _after(text: str, start_of_line: str, mark: str) -> list[str]:
    """The last word of each line that begins so, behind the mark."""
    lines = [line for line in text.splitlines() if line.startswith(start_of_line) and mark in line]
    return [line.rsplit(mark, 1)[1].split()[0] for line in lines]


def compare(whole: Path, out: Path, last: int = STEPS) -> list[str]:
    """What a resumed run's folder holds otherwise than an uninterrupted one's."""
    name = f"checkpoint_step_{last}.pth"
    if not (out / name).exists():
        return [f"{name} is missing"]
    problems = [f"the last checkpoint differs in {part}" for part in differences(whole / name, out / name)]
    if logged(out) != logged(whole):
        problems.append("metrics.jsonl differs")
    for weights in ("pretrain_32.pth", "best_model.pth"):
        if not (out / weights).exists() or (out / weights).read_bytes() != (whole / weights).read_bytes():
            problems.append(f"{weights} differs")
    files = [file_names(folder) - {".lock"} for folder in (whole, out)]
    if files[0] != files[1]:
        problems.append(f"files that should not be there, or are not: {', '.join(sorted(files[0] ^ files[1]))}")
    status = json.loads((out / "status.json").read_text()) if (out / "status.json").exists() else {}
    if (status.get("state"), status.get("exit_code")) != ("finished", 0):
        problems.append(f"status.json says {status.get('state')}, exit code {status.get('exit_code')}")
    return problems + [f"left lying: {name}" for name in left_lying(out)]


def run(scale: str, folder: Path) -> Counts:
    """12 points of 2 ranks; "fast": rank 1 in backward, and rank 0 between a checkpoint's rename and the pruning."""
    data = make_data(folder / "data")
    whole = folder / "whole"
    finish(data.flags(whole, **FLAGS), 2)
    assert state_of(whole / f"checkpoint_step_{STEPS}.pth")["progress"]["step"] == STEPS
    chosen = list(itertools.product(POINTS, (0, 1)))
    if scale == "fast":
        chosen = [("backward", 1), ("after the rename, before pruning", 0)]
    endings: list[int | None] = []
    counts = run_cases(
        {
            f"rank {rank} at {name}": functools.partial(case, data, folder, whole, name, rank, endings)
            for name, rank in chosen
        }
    )
    hung, three = sum(code is None for code in endings), sum(code == 3 for code in endings)
    counts.figures = (
        f"of {len(endings)} processes left behind {three} ended by themselves with exit code 3, {hung} hung"
    )
    return counts

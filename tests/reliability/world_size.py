"""A case is a run that is killed and then resumed with another number of processes, at the same global batch. It passes
if both parts together read the samples that an uninterrupted run reads, in its order, each once per epoch, and if the
loss of every step is within 1e-5 of that run's (float32, dropout 0).
"""

import functools
import itertools
from pathlib import Path

from tests.reliability.harness import Counts, Job, finish, last_line, make_data, run_cases, start
from tests.reliability.states import losses

CHANGES = ((1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1))
ROWS, ACCUMULATION = 4, 2  # of all processes together at once; batches a step
EPOCHS, STEPS_AN_EPOCH = 2, 7
SAMPLES = ROWS * ACCUMULATION * (STEPS_AN_EPOCH - 1) + 3  # the last step of an epoch has three rows
CUT = 3  # the step of the checkpoint
TOLERANCE = 1e-5  # nats a token
FLAGS = {
    "max_steps": None, "epochs": EPOCHS, "accumulation_steps": ACCUMULATION, "save_interval": CUT, "eval_interval": 99,
    "use_ema": "true",
}  # fmt: skip


def global_reads(job: Job) -> list[list[int]]:
    """The samples of each micro-batch of all processes together, in order."""
    return [sum(parts, []) for parts in zip(*(job.reads(rank) for rank in range(job.ranks)), strict=False)]


def flags_for(data, out: Path, ranks: int) -> dict[str, str]:
    """The same run for another number of processes."""
    return data.flags(out, **FLAGS, batch_size=ROWS // ranks)


def case(data, folder: Path, whole: Job, whole_out: Path, before: int, after: int, largest: list) -> list[str]:
    """Kill in mid-epoch, resume with another number of processes, compare."""
    out = folder / f"{before}_{after}"
    checkpoint = out / f"checkpoint_step_{CUT}.pth"
    kill = ("reading a batch", (CUT + 1) * ACCUMULATION + 1, None, "kill", str(checkpoint))
    killed = start(flags_for(data, out, before), before, [kill])
    killed.code(0, 60)
    killed.kill()
    if not any(killed.struck(rank) for rank in range(before)):
        return [f"was not killed: {last_line(killed)}"]
    resumed = start(flags_for(data, out, after) | {"resume": "true"}, after)
    codes = resumed.wait()
    if any(codes) or f"at step {CUT}" not in resumed.stderr():
        return [f"resuming ended with {codes}: {last_line(resumed)}"]
    problems = []
    expected = global_reads(whole)
    read = global_reads(killed)[: CUT * ACCUMULATION] + global_reads(resumed)
    if read != expected:
        problems.append(f"the samples differ from those of the uninterrupted run: {len(read)} of {len(expected)} reads")
    for epoch in range(EPOCHS):
        reads = STEPS_AN_EPOCH * ACCUMULATION
        if sorted(sum(read[epoch * reads : (epoch + 1) * reads], [])) != list(range(SAMPLES)):
            problems.append(f"epoch {epoch}: not each sample once")
    there, here = losses(whole_out), losses(out)
    apart = max(abs(there[step] - here.get(step, float("inf"))) for step in there)
    largest.append(apart)
    if apart > TOLERANCE or there.keys() != here.keys():
        problems.append(f"the losses are up to {apart:.2g} apart")
    return problems


def run(scale: str, folder: Path) -> Counts:
    """1 to 2, 2 to 4, 1 to 4 processes, and back; "fast": 2 to 1."""
    data = make_data(folder / "data", samples=SAMPLES, validation_samples=2)
    changes = CHANGES if scale == "full" else CHANGES[1:2]
    whole = {}
    for ranks in sorted({before for before, _ in changes}):
        out = folder / f"whole_{ranks}"
        whole[ranks] = finish(flags_for(data, out, ranks), ranks), out
    largest: list[float] = []
    cases = {
        f"{before} to {after} processes": functools.partial(case, data, folder, *whole[before], before, after, largest)
        for before, after in changes
    }
    counts = run_cases(cases, at_once=1)
    for (a, b), (c, d) in itertools.combinations(whole.values(), 2):
        if global_reads(a) != global_reads(c):
            counts.failures.append(f"uninterrupted runs in {b.name} and {d.name} read other samples")
            counts.passed = min(counts.passed, counts.cases - 1)
    counts.figures = f"losses at most {max(largest, default=0):.1e} nats apart over {EPOCHS * STEPS_AN_EPOCH} steps"
    return counts

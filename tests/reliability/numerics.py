"""A case is a run whose loss, gradient or weights become NaN, infinite or 1,000 times too large, on its only process or
on one of two, once or from then on. It passes if such a step is skipped (it does not count, its samples do) and the run
ends with 0, or, where the fault persists, if the run ends as diverged with 1 and says at which step and why; if no file
of weights ever holds a non-finite value; and if each logged learning rate is that of the steps really taken. If the
weights of one process change silently, the run ends with 3 at the next checkpoint and names the process.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness import Counts, Data, Job, last_line, make_data, run_cases, start
from tests.reliability.states import events, resumed_from

TITLE = "Numbers that are not finite, and spikes"
MODULE = "tests.reliability.numerics"
FOR_EVER = 10**9
VALUES = {"NaN": "nan", "+inf": "inf", "-inf": "-inf"}
SAID = {"loss": "the loss is ", "gradient": "the gradient is not finite", "weight": "the loss is "}
FIRST = 7  # the step that goes wrong first, counted from 1
SPIKE = 40  # a spike is detected by the 32 losses before it
WARMUP = 3


@dataclass
class Case:
    """What goes wrong, and what must come of it.

    Args:
        where: "loss", "gradient", "weight", "weight before a save".
        value: what it is multiplied by.
        times: in so many steps in a row.
        ranks: processes; of two, only the second one's goes wrong.
        code: of the processes, and in status.json.
        skipped: steps that are skipped.
        says: in rank 0's last line, or in any of its lines where the run ends with 0.
    """

    where: str
    value: str
    times: int = 1
    ranks: int = 1
    code: int = 0
    skipped: int = 1
    says: str = ""
    first: int = FIRST
    flags: dict | None = None


def all_cases() -> dict[str, Case]:
    """The name and content of each case."""
    cases = {}
    for ranks in (1, 2):
        on = "one of 2 processes" if ranks == 2 else "1 process"
        for name, value in VALUES.items():
            for where in ("loss", "gradient"):
                cases[f"{name} in the {where} once, {on}"] = Case(where, value, 1, ranks, says=SAID[where])
            cases[f"{name} in the loss for ever, {on}"] = diverging("loss", value, ranks)
        cases[f"NaN in the gradient for ever, {on}"] = diverging("gradient", "nan", ranks)
        for name, value in (("NaN", "nan"), ("+inf", "inf")):
            cases[f"{name} in a weight, {on}"] = diverging("weight", value, ranks)
        spike = {"first": SPIKE, "flags": {"max_steps": 44, "save_interval": 8}}
        cases[f"a spike of the loss once, {on}"] = Case("loss", "1e3", 1, ranks, says="the loss spiked to", **spike)
    spiking = spike | {
        "ranks": 1,
        "times": FOR_EVER,
        "code": 1,
        "skipped": 11,
        "says": f"step {SPIKE}: the loss spiked",
    }
    cases["a spike of the loss for ever"] = Case("loss", "1e3", **spiking)
    cases["a spike of the weights"] = Case("weight", "all * 1e3", **spiking)
    cases["a spike of the loss, not looked for"] = Case(
        "loss", "1e3", skipped=0, first=SPIKE, flags=spike["flags"] | {"spike_threshold": 0}
    )
    cases["a spike of the gradient, which is clipped"] = Case("gradient", "1e3", skipped=0, **spike)
    cases["NaN in the loss once, with max_skipped_steps 0"] = Case(
        "loss", "nan", code=1, says=f"step {FIRST}: the loss is nan", flags={"max_skipped_steps": 0}
    )
    cases["NaN in the loss twice, with max_skipped_steps 2"] = Case(
        "loss", "nan", 2, skipped=2, says=f"step {FIRST}: the loss is nan", flags={"max_skipped_steps": 2}
    )
    saved = {"first": 2, "code": 1, "skipped": 0, "says": "not finite and were not saved"}
    cases["a weight that is NaN right before a save"] = Case("weight before a save", "nan", **saved)
    cases["a weight that is NaN right before the last save"] = Case(
        "weight before a save", "nan", **saved | {"first": 3}
    )
    altered = {"skipped": 0, "code": 3, "ranks": 2, "says": "the weights of rank 1 "}
    cases["weights of one process 1.01 times too large"] = Case("weight", "all * 1.01", **altered)
    cases["a weight of one process 1,000 times too large"] = Case("weight before a save", "1e3", first=2, **altered)
    return cases


def diverging(where: str, value: str, ranks: int) -> Case:
    """A case whose fault stays, until the run ends as diverged."""
    says = f"step {FIRST}: {SAID[where]}"
    return Case(where, value, FOR_EVER, ranks, code=1, skipped=11, says=says)


def run(scale: str, folder: Path) -> Counts:
    """All cases; "fast": four of them."""
    data = make_data(folder / "data")
    chosen = all_cases()
    if scale == "fast":
        names = (
            "NaN in the loss once, one of 2 processes",
            "-inf in the loss for ever, 1 process",
            "a weight that is NaN right before a save",
            "weights of one process 1.01 times too large",
        )
        chosen = {name: chosen[name] for name in names}
    cases: dict[str, Callable] = {
        name: functools.partial(play, data, folder / f"case_{number}", case)
        for number, (name, case) in enumerate(chosen.items())
    }
    if scale == "full":
        for ranks in (1, 2):
            cases[f"float16 that overflows, {ranks} processes"] = functools.partial(
                overflow, data, folder / f"overflow_{ranks}", ranks
            )
    counts = run_cases(cases)
    files = sum(1 for _ in folder.rglob("*.pth"))
    counts.figures = f"{files} files of weights, all finite" if not counts.failures else f"{files} files of weights"
    return counts


def play(data: Data, out: Path, case: Case) -> list[str]:
    """Run one case; returns what is not as it should be."""
    flags = data.flags(out, warmup_steps=WARMUP, ddp_timeout=8, cuda_graph="false", **(case.flags or {}))  # by Python
    rank = case.ranks - 1
    setup = {"where": case.where, "value": case.value, "first": case.first, "times": case.times, "rank": rank}
    job = start(flags, case.ranks, setup=(f"{MODULE}:poison", setup))
    codes = job.wait()
    problems = [] if codes == [case.code] * case.ranks else [f"ended with {codes}: {last_line(job)}"]
    problems += finite_problems(out) + rate_problems(out, int(flags["max_steps"]))
    lines = job.stderr().strip().splitlines()
    said = lines if case.code == 0 else [line for line in lines if line.startswith("error: ")]
    if not any(case.says in line for line in said):
        problems.append(f"did not say {case.says!r}: {said[-1:]}")
    if "Traceback" in job.stderr():
        problems.append("a traceback")
    if case.code:
        return problems + status_problems(out, case.code) + resume_problems(out)
    return problems + skipped_problems(job, out, case, int(flags["max_steps"]))


def finite_problems(out: Path) -> list[str]:
    """Whether each file of weights can be read and is finite."""
    from model.storage.archive import is_finite, load_torch

    files = sorted(out.glob("*.pth"))
    found = [f"{path.name} holds numbers that are not finite" for path in files if not is_finite(load_torch(path))]
    return found + ([] if files else ["there is no file of weights"])


def rate_problems(out: Path, total_steps: int) -> list[str]:
    """Whether each logged learning rate is that of its step."""
    from model.training.schedule import Schedule

    schedule = Schedule(total_steps, WARMUP, 3e-3, 3e-3 / 10, "cosine")
    rates = [(event["step"], event["lr"]) for event in events(out) if "lr" in event]
    if [step for step, _ in rates] != list(range(1, len(rates) + 1)):
        return [f"steps {[step for step, _ in rates]} were logged"]
    return [f"step {step} has learning rate {rate}" for step, rate in rates if rate != schedule.at(step - 1)]


def status_problems(out: Path, code: int) -> list[str]:
    """Whether status.json tells the same as the exit code."""
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    wanted = {"state": "diverged" if code == 1 else "failed", "exit_code": code}
    found = {key: status[key] for key in wanted}
    return [] if found == wanted and status["message"] else [f"status.json says {status}"]


def resume_problems(out: Path) -> list[str]:
    """Whether there is a checkpoint to go on from."""
    found, passed_over = resumed_from(out)
    return [] if found is not None and not passed_over else ["no whole checkpoint is there"]


def skipped_problems(job: Job, out: Path, case: Case, total_steps: int) -> list[str]:
    """Whether as many steps were skipped as should be: not counted, with their samples read."""
    from model.runs.resume import load_checkpoint

    progress = load_checkpoint(out / f"checkpoint_step_{total_steps}.pth")["progress"]
    logged = [event for event in events(out) if "loss" in event]
    problems = []
    if progress["skipped_steps"] != case.skipped or logged[-1]["skipped_steps"] != case.skipped:
        problems.append(f"{progress['skipped_steps']} steps are counted as skipped, expected {case.skipped}")
    if logged[case.first - 2]["skipped_steps"] != 0 or logged[case.first - 1]["skipped_steps"] != case.skipped:
        problems.append("another step was skipped")
    if progress["samples"] != (total_steps + case.skipped) * 4 * case.ranks:
        problems.append(f"{progress['samples']} samples were read in {total_steps} steps")
    if any(len(job.reads(rank)) != total_steps + case.skipped for rank in range(case.ranks)):
        problems.append("a process read another number of batches")
    return problems


def overflow(data: Data, out: Path, ranks: int) -> list[str]:
    """A loss scale that begins and rises so high that real gradients overflow float16 again and again."""
    setup = ("tests.reliability.exact_resume:scale_high", {"init_scale": 2.0**22, "growth_interval": 4})
    flags = data.flags(out, warmup_steps=WARMUP, dtype="float16")
    job = start(flags, ranks, setup=setup, environment={"MATECONV_EMULATE_DTYPE": "1"})
    codes = job.wait()
    if any(codes):
        return [f"ended with {codes}: {last_line(job)}"]
    scales = [2.0**22, *job.reads(0, "scale")]
    overflows = sum(after < before for before, after in zip(scales, scales[1:], strict=False))
    case = Case("gradient", "inf", ranks=ranks, skipped=overflows)
    problems = skipped_problems(job, out, case, 12)
    problems = [problem for problem in problems if problem != "another step was skipped"]
    problems += [] if overflows >= 2 else [f"only {overflows} steps overflowed"]
    problems += ["ranks have other scales"] if ranks == 2 and job.reads(1, "scale") != job.reads(0, "scale") else []
    return problems + finite_problems(out) + rate_problems(out, 12)


# ----------------------------------------------------------------------------------------- in the training process


def poison(where: str, value: str, first: int, times: int, rank: int) -> None:
    """Multiply the loss, the gradient or a weight by a value, in some steps of one process.

    Args:
        where: see `Case`.
        first: the step, counted from 1 (before a save: the save) in which it happens first.
        times: in so many in a row.
    """
    import os

    if rank == int(os.environ.get("RANK", "0")):
        {"loss": _poison_loss, "gradient": _poison_gradient}.get(where, _poison_weight)(where, value, first, times)


def _now(count: list, first: int, times: int) -> bool:
    count.append(1)
    return first <= len(count) < first + times


def _poison_loss(where: str, value: str, first: int, times: int) -> None:
    from torch import Tensor

    from model.model import Transformer

    forward, count = Transformer.forward, []

    def poisoned(self, tokens, *args, **kwargs):
        result = forward(self, tokens, *args, **kwargs)
        is_step = self.training and type(tokens) is Tensor  # passes over fake tensors measure memory
        return result * float(value) if is_step and _now(count, first, times) else result

    Transformer.forward = poisoned


def _poison_gradient(where: str, value: str, first: int, times: int) -> None:
    import torch

    clip, count = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *args, **kwargs):
        parameters = list(parameters)
        if _now(count, first, times):
            parameters[1].grad.mul_(float(value))
        return clip(parameters, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = poisoned


def _poison_weight(where: str, value: str, first: int, times: int) -> None:
    import torch

    from optimized_pretrain import Trainer

    name = "_save_checkpoint" if where == "weight before a save" else "_take_step"
    method, count = getattr(Trainer, name), []

    @torch.no_grad()
    def spoil(self) -> None:
        weight = self.model.layers[0].attention.wq.weight
        if value == "all * 1.01":
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        elif value == "all * 1e3":
            self.model.tok_embeddings.weight.mul_(1e3)
        else:
            weight[0, 0] *= float(value)

    def poisoned(self, *args, **kwargs):
        if _now(count, first, 1):
            spoil(self)
        return method(self, *args, **kwargs)

    setattr(Trainer, name, poisoned)

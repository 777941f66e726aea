"""A case is a run of several processes that write each checkpoint together (`--checkpoint_writers all`). One of them is
killed before, within or after its part, around the index or while older parts are removed; or its disk is full, or its
folder is not that of the others; or a part is damaged, missing, or another one. It passes if the older checkpoint stays
whole and is resumed from, the fault is one line that names the file or the rank, nothing is left lying, and the end has
the bits of an undisturbed run. Runs that resume with other numbers of processes, sharing or not, must have the weights,
averages and optimizer states of the checkpoint to the bit.
"""

import functools
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.reliability.disks import contents, limit_files
from tests.reliability.harness import Counts, Data, finish, last_line, make_data, run_cases, start
from tests.reliability.job_kills import compare, kill_and_resume, resume_problems
from tests.reliability.states import copy_run, hash_of, left_lying, resumed_from, state_of

TITLE = "Checkpoints that all processes write"
MODULE = "tests.reliability.part_saves"
STEPS, INTERVAL = 12, 4
FLAGS = {
    "batch_size": 2, "max_steps": STEPS, "save_interval": INTERVAL, "eval_interval": INTERVAL, "keep_last": 1,
    "use_ema": "true", "dropout": 0.1, "optimizer_type": "muon", "shard": "optimizer", "checkpoint_writers": "all",
}  # fmt: skip
OLD, NEXT = f"checkpoint_step_{INTERVAL}.pth", f"checkpoint_step_{2 * INTERVAL}.pth"
KILLS = [  # while the second checkpoint is saved: (point, rank, processes)
    *((point, rank, 2) for point in ("before a part", "within a part", "after a part") for rank in (0, 1)),
    *(("after a part is reported", rank, 2) for rank in (0, 1)),
    *((point, 0, 2) for point in ("before the index", "after the index", "removing a part")),
    ("within a part", 2, 3),
    ("after a part is reported", 1, 3),
]  # fmt: skip
FAST_KILLS = [("within a part", 1, 2), ("before the index", 0, 2)]
DAMAGES = {"full": 200, "fast": 24}
WORLDS = [
    (4, "optimizer", "all"),
    (1, "none", "one"),
    (2, "none", "all"),
    (3, "optimizer", "all"),
    (2, "optimizer", "one"),
    (2, "full", "all"),
    (4, "full", "all"),
    (1, "none", "one"),
    (3, "full", "one"),
]


def run(scale: str, folder: Path) -> Counts:
    """All cases; "fast": two kills, a full disk, a tenth of the damages, two changes of the number of processes."""
    lab, is_full = Lab(folder), scale == "full"
    cases: dict[str, Callable] = {}
    for number, (point, rank, ranks) in enumerate(KILLS if is_full else FAST_KILLS):
        cases[f"rank {rank} of {ranks} killed {point}"] = functools.partial(lab.killed, number, point, rank, ranks)
    cases["a disk of rank 1 that is full"] = functools.partial(lab.full_disk, 1)
    if is_full:
        cases |= {
            "a disk of rank 0 that is full": functools.partial(lab.full_disk, 0),
            "a disk that is full once": lab.full_once,
            "a rank with a folder of its own": lab.other_folder,
            "killed while it is interrupted": lab.interrupted,
            "interrupted twice and killed": lab.interrupted_twice,
        }
    cases["other numbers of processes"] = functools.partial(lab.worlds, WORLDS if is_full else WORLDS[:2])
    counts = run_cases(cases)
    damaged = run_cases({name: case for name, case in lab.damages(DAMAGES[scale])}, at_once=1)
    figures = f"{sum('killed' in name for name in cases)} kills, {damaged.cases} damaged parts"
    return Counts(
        counts.cases + damaged.cases, counts.passed + damaged.passed, counts.failures + damaged.failures, figures
    )


class Lab:
    """Runs that were never disturbed, by number of processes, and others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data: Data = make_data(folder / "data")
        self.whole = {ranks: folder / f"whole_{ranks}" for ranks in (2, 3)}
        for ranks, out in self.whole.items():
            finish(self.flags(out), ranks)
        kept = self.flags(folder / "kept", keep_last=9)
        finish(kept, 2)

    def flags(self, out: Path, **changes) -> dict[str, str]:
        return self.data.flags(out, **FLAGS | changes)

    def begun(self, name: str) -> Path:
        """A folder in which a run of two processes has come to its first checkpoint."""
        out = copy_run(self.folder / "kept", self.folder / name)
        for path in [*out.glob("checkpoint_step_*"), *out.glob("pretrain_*")]:
            if not path.name.startswith(OLD.removesuffix("pth")):
                path.unlink()
        return out

    # ------------------------------------------------------------------------------------------------------- kills

    def killed(self, number: int, point: str, rank: int, ranks: int) -> list[str]:
        out = self.folder / f"killed_{number}"
        fault = (point, 1 if point == "removing a part" else 2, rank, "kill", str(out / OLD))
        if point in ("after the index", "removing a part"):  # the older checkpoint may be gone
            fault = (*fault[:4], str(out / NEXT))
        saved = 2 * INTERVAL if fault[4].endswith(NEXT) else INTERVAL
        return kill_and_resume(self.flags(out), self.whole[ranks], fault, saved, [], ranks)

    def interrupted(self) -> list[str]:
        """Rank 1 is killed while it writes its part of the interrupted checkpoint."""
        out = self.folder / "interrupted"
        faults = [("forward", 6, 0, "int", str(out / OLD)), ("within a part", 2, 1, "kill")]
        job = start(self.flags(out), 2, faults)
        codes = job.wait(120)
        if codes != [3, -9]:
            return [f"ended with {codes}: {last_line(job)}"]
        return resume_problems(self.flags(out), self.whole[2], INTERVAL)

    def interrupted_twice(self) -> list[str]:
        """Interrupted at step 5, resumed, and killed while it is interrupted at step 5 again: the first one stays."""
        out = self.folder / "interrupted_twice"
        job = start(self.flags(out), 2, ("forward", 6, 0, "int", str(out / OLD)))
        codes = job.wait(120)
        first = [path.name for path in out.glob("checkpoint_interrupted*")]
        if codes != [130, 130] or len(first) != 3:
            return [f"ended with {codes}, {', '.join(first)} are there: {last_line(job)}"]
        faults = [("reading a batch", 1, 0, "int"), ("before the index", 1, 0, "kill")]
        job = start(self.flags(out, resume="true"), 2, faults)
        codes = job.wait(120)
        if codes != [-9, 3]:
            return [f"ended with {codes}: {last_line(job)}"]
        return resume_problems(self.flags(out), self.whole[2], INTERVAL + 1)

    # ------------------------------------------------------------------------------------------------------- disks

    def full_disk(self, rank: int) -> list[str]:
        """No file of one rank may grow past half of its part; later the disk is empty again."""
        out = self.begun(f"full_{rank}")
        old = {name: content for name, content in contents(out).items() if name.startswith(OLD.removesuffix("pth"))}
        part = f"checkpoint_step_8.part-0000{rank}-of-00002.pth"
        size = (self.folder / "kept" / part).stat().st_size // 2
        job = start(self.flags(out, resume="true"), 2, setup=(f"{MODULE}:limit_one", {"rank": rank, "size": size}))
        codes, said = job.wait(), job.stderr()
        problems = [] if codes[0] == 2 and codes[1] in (2, 3) else [f"ended with {codes}: {last_line(job)}"]
        if f"not saved: rank {rank}: {out / part}: cannot be written (File too large: " not in said:
            problems.append(f"did not say what failed: {last_line(job)}")
        problems += [f"{name} is not what it was" for name in old if contents(out).get(name) != old[name]]
        problems += [f"{path.name} is left" for path in out.glob("checkpoint_step_8.*")]
        return problems + resume_problems(self.flags(out), self.whole[2], INTERVAL)

    def full_once(self) -> list[str]:
        """The second of three saves fails on rank 1; the third one succeeds, and the run ends as if nothing was."""
        out = self.begun("full_once")
        setup = (f"{MODULE}:limit_one", {"rank": 1, "size": 100_000, "parts": 1})
        job = start(self.flags(out, resume="true"), 2, setup=setup)
        codes = job.wait()
        problems = [] if codes == [0, 0] else [f"ended with {codes}: {last_line(job)}"]
        if job.stderr().count("not saved: rank 1: ") != 1:
            problems.append("did not say once that a save failed")
        return problems + compare(self.whole[2], out)

    def other_folder(self) -> list[str]:
        """What rank 1 writes is nowhere for rank 0, as on two machines without a shared file system."""
        out, others = self.folder / "not_shared", self.folder / "not_shared_of_rank_1"
        setup = (f"{MODULE}:folder_of_one", {"rank": 1, "folder": str(others)})
        job = start(self.flags(out, max_steps=INTERVAL), 2, setup=setup)
        codes = job.wait(120)
        problems = [] if codes[0] == 2 else [f"ended with {codes}: {last_line(job)}"]
        if "rank 1 has written it, but rank 0 does not see it; give all ranks one out_dir" not in job.stderr():
            problems.append(f"did not say that the folder is not shared: {last_line(job)}")
        return problems + [f"{path.name} is left" for path in out.glob("checkpoint_*")]

    # ------------------------------------------------------------------------------------ other numbers of processes

    def worlds(self, worlds: list[tuple[int, str, str]]) -> list[str]:
        """Resume with other processes, and be interrupted before a step is taken: what is saved is what was loaded."""
        out, problems = self.begun("worlds"), []
        source, first = out / OLD, self.folder / "kept" / OLD
        for ranks, shard, writers in worlds:
            # A signal in the first of two batches cuts the step short.
            more = {"accumulation_steps": 2, "resume_from": source, "shard": shard, "checkpoint_writers": writers}
            flags = self.flags(out, **more)
            job = start(flags, ranks, ("reading a batch", 1, 0, "int"))
            codes, where = job.wait(), f"{ranks} processes, shard {shard}, checkpoint_writers {writers}"
            source = out / "checkpoint_interrupted.pth"
            if codes != [130] * ranks or not source.exists():
                return [*problems, f"{where}: ended with {codes}: {last_line(job)}"]
            parts = len([*out.glob("checkpoint_interrupted*.part-*")])
            if parts != (ranks if writers == "all" else 0):
                problems.append(f"{where}: {parts} parts")
            saved, loaded = state_of(first), state_of(source)
            for state in (saved, loaded):  # the groups' numbers are those of the settings
                state["optimizer"] = state["optimizer"]["state"]
            for section in ("model", "ema", "ema_updates", "optimizer"):
                if hash_of(saved[section]) != hash_of(loaded[section]):
                    problems.append(f"{where}: {section} differs")
        return problems + [f"left lying: {name}" for name in left_lying(out)]

    # ------------------------------------------------------------------------------------------------------ damage

    def damages(self, count: int) -> list[tuple[str, Callable]]:
        """Flipped bits, and parts that are cut off, missing, zero, empty, another one's, or of another checkpoint."""
        bench = copy_run(self.folder / "kept", self.folder / "bench")
        newest = f"checkpoint_step_{STEPS}"
        parts = sorted(bench.glob(f"{newest}.part-*"))
        chance, found = random.Random(0), []
        for number in range(count):
            part = parts[number % 2]
            position, bit = chance.randrange(part.stat().st_size), number % 8
            found.append(
                (f"bit {bit} of byte {position} of {part.name}", part, _flipped(part.read_bytes(), position, bit))
            )
        for part, other in zip(parts, parts[::-1], strict=True):
            content = part.read_bytes()
            older = part.with_name(part.name.replace(newest, "checkpoint_step_8")).read_bytes()
            middle = len(content) // 2
            instead = {
                "missing": None, "empty": b"", "cut off": content[:-1], "half": content[:middle], "longer": content * 2,
                "with a hole": content[:middle] + bytes(4096) + content[middle + 4096 :],
                "the other one": other.read_bytes(), "of another checkpoint": older,
            }  # fmt: skip
            found += [(f"{part.name}: {what}", part, damaged) for what, damaged in instead.items()]
        return [(name, functools.partial(_damaged, part, content)) for name, part, content in found]


def _flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def _damaged(part: Path, damaged: bytes | None) -> list[str]:
    """Put other bytes in a part's place: `--resume` must take the older checkpoint, and say why."""
    kept = part.read_bytes()
    try:
        part.unlink() if damaged is None else part.write_bytes(damaged)
        found, passed_over = resumed_from(part.parent)
    finally:
        part.write_bytes(kept)
    if found.path.name != NEXT or len(passed_over) != 1:
        return [f"resume took {found.path.name}, and passed over {len(passed_over)}"]
    is_one_line = "\n" not in passed_over[0] and part.name in passed_over[0]
    return [] if is_one_line else [f"the line does not name the file: {passed_over[0]}"]


# ----------------------------------------------------------------------------------------- in the training process


def limit_one(rank: int, size: int, parts: int | None = None) -> None:
    """Let no file of one rank grow past so many bytes.

    Args:
        parts: of checkpoints, after which the limit is gone; None: it stays.
    """
    if os.environ["RANK"] != str(rank):
        return
    limit_files(size)
    if parts is not None:
        import resource

        from model.runs.part_saving import PartSaver
        from tests.reliability.faults import wrap

        written, most = [], resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def after(*args, **kwargs):
            written.append(1)
            if len(written) == parts:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        wrap(PartSaver, "_write", after=after)


def folder_of_one(rank: int, folder: str) -> None:
    """Let one rank have another out_dir."""
    if os.environ["RANK"] == str(rank):
        shutil.rmtree(folder, ignore_errors=True)
        sys.argv.append(f"--out_dir={folder}")

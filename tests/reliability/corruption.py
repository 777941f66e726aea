"""A case is one damaged checkpoint: flipped bits, cut off, zeros or foreign bytes in it, another file under its name, a
part that is missing or has another shape although the SHA-256 is right. It passes if reading it is refused with one
line that names the file, and if an automatic resume then takes the older checkpoint that is whole and says why. Five
cases are real runs, which must resume from the older checkpoint and end with the SHA-256 of the full state of an
uninterrupted run.
"""

import functools
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.reliability.harness import Counts, Data, finish, last_line, make_data, run_cases, start
from tests.reliability.states import copy_run, fingerprint, resumed_from

TITLE = "Damaged checkpoints are refused"
FLAGS = {"dtype": "float16", "use_ema": "true"}
OPTIONS = {"environment": {"MATECONV_EMULATE_DTYPE": "1"}}
OLDER, NEWEST = "checkpoint_step_8.pth", "checkpoint_step_12.pth"
NUMBERS = {  # flips, of those with a resume; truncations; holes and the like of each kind
    "full": (1000, 100, 100, 20),
    "fast": (60, 6, 10, 2),
}


def run(scale: str, folder: Path) -> Counts:
    """1,000 flips, 100 truncations and all other kinds; "fast": 60 flips, a tenth of the rest, one real run."""
    data = make_data(folder / "data")
    whole, other = folder / "whole", folder / "other"
    finish(data.flags(whole, **FLAGS), **OPTIONS)
    time.sleep(1.1)  # the second in which a run started tells it from others
    finish(data.flags(other, **FLAGS, seed=1), **OPTIONS)

    flips, resumed_flips, truncations, of_each = NUMBERS[scale]
    bench = Bench(copy_run(whole, folder / "bench"))
    cases: dict[str, Callable] = {}
    content = (whole / NEWEST).read_bytes()
    for number, (region, position) in enumerate(flip_positions(whole / NEWEST, flips)):
        bit = number % 8
        check_resume = number % (flips // resumed_flips) == 0
        name = f"bit {bit} of byte {position} ({region})"
        cases[name] = functools.partial(bench.flip, position, bit, check_resume)
    for name, damaged in bytes_cases(content, truncations, of_each):
        cases[name] = functools.partial(bench.bytes_instead, damaged)
    for name, path, loads in swapped_files(whole, other, folder):
        cases[name] = functools.partial(bench.file_instead, path, loads)
    for number, (name, change) in enumerate(state_cases()):
        if scale == "full" or number % 8 == 0:
            cases[name] = functools.partial(bench.state_instead, change)
    counts = run_cases(cases, at_once=1)
    real = run_cases(real_cases(scale, data, whole, other, folder))
    shutil.rmtree(bench.folder)
    figures = f"{flips} flips, {truncations} truncations, {len(cases) - flips - truncations} others,"
    figures += f" {real.cases} real runs"
    return Counts(
        counts.cases + real.cases, counts.passed + real.passed, counts.failures + real.failures, figures=figures
    )


class Bench:
    """A run's folder in which the newest checkpoint is damaged, tried and put back, again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NEWEST
        self.content = self.path.read_bytes()

    def flip(self, position: int, bit: int, check_resume: bool) -> list[str]:
        """Turn one bit over, and back."""
        self._write(position, self.content[position] ^ 1 << bit)
        problems = self.problems(resume=check_resume)
        self._write(position, self.content[position])
        return problems

    def _write(self, position: int, byte: int) -> None:
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(bytes([byte]))

    def bytes_instead(self, damaged: bytes) -> list[str]:
        """Other bytes in the newest checkpoint's place."""
        assert damaged != self.content
        self.path.write_bytes(damaged)
        return self._problems_then_restore()

    def file_instead(self, path: Path, loads: bool) -> list[str]:
        """Another file in its place; `loads`: by itself nothing is wrong with it."""
        shutil.copyfile(path, self.path)
        return self._problems_then_restore(loads)

    def state_instead(self, change: Callable[[dict], None]) -> list[str]:
        """Its own content, changed and saved again with a right SHA-256."""
        from model.storage.archive import save_torch

        self.path.write_bytes(self.content)
        content = torch.load(self.path, weights_only=True)
        change(content)
        save_torch(self.path, content)
        return self._problems_then_restore()

    def _problems_then_restore(self, loads: bool = False) -> list[str]:
        try:
            return self.problems(loads)
        finally:
            self.path.write_bytes(self.content)

    def problems(self, loads: bool = False, resume: bool = True) -> list[str]:
        """What is wrong with how the damaged file is refused."""
        from model.errors import InputError
        from model.runs.resume import load_checkpoint

        problems = []
        try:
            load_checkpoint(self.path)
            problems += [] if loads else ["it was loaded"]
        except InputError as error:
            problems += one_line_problems(str(error))
        if resume:
            found, passed_over = resumed_from(self.folder)
            if found.path.name != OLDER or len(passed_over) != 1:
                problems.append(f"resume took {found.path.name}, and passed over {len(passed_over)}")
            else:
                problems += one_line_problems(passed_over[0])
        return problems


def one_line_problems(message: str) -> list[str]:
    """What a message lacks: it must be one line, and name the file."""
    problems = [] if "\n" not in message else ["the message has several lines"]
    return problems + ([] if NEWEST in message else [f"the message does not name the file: {message[:80]}"])


# ------------------------------------------------------------------------------------------------------- the damages


def flip_positions(path: Path, count: int) -> Iterator[tuple[str, int]]:
    """Where bits are flipped: (what lies there, position), so many from each part of the file."""
    from model.storage.archive import TRAILER_BYTES

    size, chance = path.stat().st_size, random.Random(0)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        directory = range(archive.start_dir, size - TRAILER_BYTES)
    pickled = next(entry for entry in entries if entry.filename.endswith("data.pkl"))
    headers = [position for entry in entries for position in range(entry.header_offset, entry.header_offset + 30)]
    parts = {
        "trailer": range(size - TRAILER_BYTES, size),
        "zip directory": directory,
        "pickle": range(pickled.header_offset, pickled.header_offset + pickled.compress_size),
        "zip headers": headers,
        "anywhere": range(size),
    }
    left = count
    for number, (name, positions) in enumerate(parts.items()):
        share = left // (len(parts) - number)
        chosen = chance.sample(positions, min(share, len(positions)))
        left -= len(chosen)
        yield from ((name, position) for position in chosen)


def bytes_cases(content: bytes, truncations: int, of_each: int) -> Iterator[tuple[str, bytes]]:
    """The newest checkpoint cut off, overwritten, longer and shorter."""
    size, chance = len(content), random.Random(1)
    ends = [0, 1, 4, size - 1, size - 81, size - 82, size - 103]
    ends += [size * number // truncations for number in range(1, truncations)]
    for end in ends[:truncations]:
        yield f"cut off after {end} bytes", content[:end]
    for number in range(of_each):
        place = 4096 * chance.randrange(size // 4096)
        while not any(content[place : place + 4096]):
            place = 4096 * chance.randrange(size // 4096)
        yield f"a hole of zeros at {place} (number {number})", content[:place] + bytes(4096) + content[place + 4096 :]
        place = chance.randrange(size - 512)
        yield f"0xFF at {place}", content[:place] + b"\xff" * 512 + content[place + 512 :]
        place, length = chance.randrange(size), chance.choice((1, 2, 64, 4096))
        yield f"{length} bytes put in at {place}", content[:place] + chance.randbytes(length) + content[place:]
        place = chance.randrange(size - length)
        yield f"{length} bytes taken out at {place}", content[:place] + content[place + length :]
    for name, more in {
        "a zero": b"\0",
        "a line's end": b"\n",
        "its own trailer": content[-81:],
        "itself": content,
        "4 KiB of zeros": bytes(4096),
    }.items():
        yield f"{name} appended", content + more


def swapped_files(whole: Path, other: Path, folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Other files under its name: (what, path, whether the file by itself is a whole checkpoint of its name)."""
    from model.storage.archive import save_torch

    yield "the checkpoint of another step", whole / "checkpoint_step_4.pth", False
    yield "another run's checkpoint", other / NEWEST, True
    yield "weights", whole / "pretrain_32.pth", False
    yield "a text", whole / "config.yaml", False
    plain, version, empty = folder / "plain.pth", folder / "version.pth", folder / "empty.pth"
    torch.save(torch.load(whole / NEWEST, weights_only=True), plain)
    yield "the same state without a SHA-256", plain, False
    save_torch(version, torch.load(whole / NEWEST, weights_only=True) | {"format_version": 1})
    yield "a checkpoint of another version", version, False
    save_torch(empty, {})
    yield "an empty dict", empty, False


def state_cases() -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Changes of what a checkpoint holds, after which training could not go on from it."""
    from model.runs.checkpoint import KINDS, SCALER_STATE
    from model.training.progress import Progress

    yield from missing_parts(KINDS, Progress.__dataclass_fields__, SCALER_STATE)
    yield from wrong_values(KINDS, Progress.__dataclass_fields__)
    yield from wrong_tensors()


def missing_parts(kinds, progress, scaler) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Each part left out."""
    for key in kinds:
        yield f"without {key}", lambda content, key=key: content.pop(key)
    for key in progress:
        yield f"without progress.{key}", lambda content, key=key: content["progress"].pop(key)
    for key in scaler:
        yield f"without scaler.{key}", lambda content, key=key: content["scaler"].pop(key)
    for key in ("python", "numpy", "torch", "cuda", "mps"):
        yield f"without random_states.{key}", lambda content, key=key: content["random_states"][0].pop(key)
    yield "without any random state", lambda content: content["random_states"].clear()
    for key in ("state", "param_groups"):
        yield f"without optimizer.{key}", lambda content, key=key: content["optimizer"].pop(key)
    for key in ("params", "param_names", "lr", "betas", "eps"):
        yield (
            f"without {key} of an optimizer's group",
            lambda content, key=key: content["optimizer"]["param_groups"][0].pop(key),
        )
    yield "without an optimizer's group", lambda content: content["optimizer"]["param_groups"].pop()
    yield "without a parameter's state", lambda content: content["optimizer"]["state"].pop(0)
    yield "without all parameters' states", lambda content: content["optimizer"]["state"].clear()
    for key in ("step", "exp_avg", "exp_avg_sq"):
        yield f"without a parameter's {key}", lambda content, key=key: content["optimizer"]["state"][0].pop(key)
    for part in ("model", "ema"):
        yield f"{part} without a weight", lambda content, part=part: content[part].pop("norm.weight")
    yield "without a layer", remove_layer
    yield "config without dim", lambda content: content["config"].pop("dim")
    yield "settings without training", lambda content: content["settings"].pop("training")


def remove_layer(content: dict) -> None:
    """Take the last layer's weights away."""
    for key in [key for key in content["model"] if key.startswith("layers.1.")]:
        content["model"].pop(key)


def wrong_values(kinds, progress) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Each part replaced by something else."""
    for key in kinds:
        yield f"{key} is a set of numbers", lambda content, key=key: content.update({key: (1, 2)})
    for key in progress:
        yield f"progress.{key} is a text", lambda content, key=key: content["progress"].update({key: "1"})
    yield "progress with something more", lambda content: content["progress"].update({"more": 1})
    yield "another step than in its name", lambda content: content["progress"].update({"step": 11})
    yield "samples below 0", lambda content: content["progress"].update({"samples": -32})
    yield "a best loss that is no number", lambda content: content["progress"].update({"best_val_loss": float("nan")})
    yield "no steps in all", lambda content: content.update({"total_steps": 0})
    yield "config of another width", lambda content: content["config"].update({"dim": 64})
    yield "config of more layers", lambda content: content["config"].update({"n_layers": 3})
    yield "config with a text", lambda content: content["config"].update({"n_heads": "4"})
    yield "scaler with a text", lambda content: content["scaler"].update({"scale": "high"})
    yield "betas is a text", lambda content: content["optimizer"]["param_groups"][0].update({"betas": "high"})
    yield "an unknown optimizer", lambda content: content["settings"]["training"].update({"optimizer_type": "sgd"})
    yield "a random state cut short", cut_random_state
    yield "a random state of another kind", lambda content: content["random_states"][0].update({"python": (1, 2, 3)})
    for part in ("model", "ema"):
        yield f"NaN in {part}", lambda content, part=part: content[part]["norm.weight"].fill_(float("nan"))
    yield "inf in the optimizer", lambda content: content["optimizer"]["state"][3]["exp_avg"].fill_(float("inf"))


def cut_random_state(content: dict) -> None:
    """Make torch's random state of rank 0 one byte shorter."""
    state = content["random_states"][0]
    state["torch"] = state["torch"][:-1].clone()


def wrong_tensors() -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Tensors of another shape or dtype, or none."""
    changes = {
        "flattened": lambda tensor: tensor.flatten().clone(),
        "with a row less": lambda tensor: tensor[:-1].clone(),
        "of one number": lambda tensor: torch.ones(()),
        "in float16": lambda tensor: tensor.half(),
        "in int64": lambda tensor: tensor.long(),
        "as a list": lambda tensor: tensor.tolist(),
    }
    for name, change in changes.items():
        for part in ("model", "ema"):
            yield f"a weight of {part} {name}", functools.partial(change_weight, part, change)
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{key} {name}", functools.partial(change_moment, key, change)
    yield "steps of an optimizer with a shape", functools.partial(change_moment, "step", lambda _: torch.ones(300, 32))
    yield "steps of an optimizer as a number", functools.partial(change_moment, "step", float)


def change_weight(part: str, change: Callable, content: dict) -> None:
    """Change the embedding of a part, the model or the average."""
    content[part]["tok_embeddings.weight"] = change(content[part]["tok_embeddings.weight"])


def change_moment(key: str, change: Callable, content: dict) -> None:
    """Change one part of the optimizer's state of the first parameter."""
    state = content["optimizer"]["state"][0]
    state[key] = change(state[key])


# -------------------------------------------------------------------------------------------------------- real runs


def real_cases(scale: str, data: Data, whole: Path, other: Path, folder: Path) -> dict[str, Callable]:
    """Runs that end after the checkpoint of step 8, which is then damaged."""
    content = (whole / OLDER).read_bytes()
    state = torch.load(whole / OLDER, weights_only=True)
    state["progress"].pop("samples")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1

    def save_state(path: Path) -> None:
        from model.storage.archive import save_torch

        save_torch(path, state)

    damages = {
        "a flipped bit": lambda path: path.write_bytes(flipped),
        "cut off": lambda path: path.write_bytes(content[: len(content) // 3]),
        "zeros": lambda path: path.write_bytes(bytes(len(content))),
        "another run's file": lambda path: shutil.copyfile(other / OLDER, path),
        "a part missing": save_state,
    }
    chosen = list(damages.items())[: 5 if scale == "full" else 1]
    return {
        f"a real run, {name}": functools.partial(real_case, data, whole, folder / f"real_{number}", damage)
        for number, (name, damage) in enumerate(chosen)
    }


def real_case(data: Data, whole: Path, out: Path, damage: Callable[[Path], None]) -> list[str]:
    """Damage the newest checkpoint of a run, resume, and compare the end with that of the uninterrupted run."""
    copy_run(whole, out)
    (out / NEWEST).unlink()
    damage(out / OLDER)
    job = start(data.flags(out, **FLAGS, resume="true"), **OPTIONS)
    codes = job.wait()
    lines = [line for line in job.stderr().splitlines() if line.startswith("resume: passed over ")]
    problems = [] if codes == [0] else [f"ended with {codes}: {last_line(job)}"]
    if len(lines) != 1 or OLDER not in lines[0]:
        problems.append(f"said of what it passed over: {lines}")
    if "at step 4" not in job.stderr():
        problems.append("did not go on from step 4")
    if not problems and fingerprint(out / NEWEST) != fingerprint(whole / NEWEST):
        problems.append("ended with another state than the uninterrupted run")
    return problems

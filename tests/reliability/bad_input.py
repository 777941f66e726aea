"""Configs, flags and data files with one thing wrong at a time: each must end in one clear line and exit code 2.

Each case passes if every line of the error names the key or the file that is wrong, there is one line for each thing
that is wrong and no traceback, nothing was made or changed, and all of it took under a second after start-up.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import forks
from tests.reliability.bad_config import CONFIGS, FLAGS
from tests.reliability.harness import Counts
from tests.reliability.scripts import ROOT, Case, run_cases

TITLE = "Bad configs and data files: one clear line, exit code 2, under a second"
FAST = 20  # in the fast scale each twentieth case is run
OWN_EVERY = 10  # and of the full scale each tenth by an interpreter of its own as well
BASE = """\
data: {train_data_path: train.bin}
model: {dim: 32, n_layers: 1, n_heads: 2, n_kv_heads: 1, max_seq_len: 16}
training: {max_steps: 1, batch_size: 2, warmup_steps: 0, device: cpu, dtype: float32}
"""
TOKENS = 3000


def run(scale: str, folder: Path) -> Counts:
    """Run the cases: all of them in scale "full", some in "fast"."""
    return run_cases(all_cases(folder), folder / "runs", scale, FAST, OWN_EVERY)


def all_cases(folder: Path) -> list[Case]:
    """Every case, each with another input."""
    good = folder / "good"
    write_good_files(good)
    cases = [config_case(n, text, expected, good) for n, (text, *expected) in enumerate(CONFIGS)]
    cases += [file_case(name, put, expected) for name, put, *expected in CONFIG_FILES]
    cases += [flag_case(n, arguments, expected, good) for n, (arguments, *expected) in enumerate(FLAGS)]
    cases += [data_case(name, change, expected, good) for name, change, *expected in DATA]
    cases += [tokenizer_case(name, change, expected, good) for name, change, *expected in TOKENIZERS]
    cases += [raw_case(name, change, expected, good) for name, change, *expected in RAW]
    cases += [resume_case(name, arguments, change, expected, good) for name, arguments, change, *expected in RESUME]
    return cases


# ------------------------------------------------------------------------------------------------- what is right


def write_good_files(good: Path) -> None:
    """A config, a token file and a run's folder with which training would begin."""
    import torch

    good.mkdir(parents=True)
    (good / "config.yaml").write_text(BASE)
    write_tokens(good / "train.bin", [number % 5000 + 5 for number in range(TOKENS)])
    command = [sys.executable, str(ROOT / "train.py"), "--config", "config.yaml", "--out_dir", "made"]
    forks.run(command, cwd=good, check=True, capture_output=True)
    shutil.copy(good / "made" / "checkpoint_step_1.pth", good / "checkpoint.pth")
    torch.save({"tok_embeddings.weight": torch.zeros(6400, 32)}, good / "weights.pth")


def write_tokens(path: Path, ids, stored: str = "uint16", **changes) -> None:
    """A token file of numbers `stored` so, with its manifest; `changes` are fields of the manifest."""
    import numpy as np

    from model.text.tokenization import tokenizer_sha256
    from model.token_file.manifest import Manifest, file_sha256, write_manifest

    np.asarray(ids, dtype=stored).tofile(path)
    values = {
        "dtype": stored, "vocab_size": 6400, "bos_id": 1, "eos_id": 2, "tokens": len(ids), "documents": 1,
        "tokenizer_sha256": tokenizer_sha256(), "encoder": "test", "sha256": file_sha256(path),
    }  # fmt: skip
    write_manifest(path, Manifest(**(values | changes)))


def lay_out(good: Path, here: Path) -> None:
    """The good files that training reads."""
    for name in ("config.yaml", "train.bin", "train.json"):
        shutil.copy(good / name, here / name)


# --------------------------------------------------------------------------------------------------- config files


def config_case(number: int, text: str | bytes, expected: Sequence[str], good: Path) -> Case:
    """A config file with this content, beside a good token file."""
    content = text.encode() if isinstance(text, str) else text

    def prepare(here: Path) -> None:
        lay_out(good, here)
        (here / "config.yaml").write_bytes(content)

    return Case(f"config {number}: {content[:60]!r}", ["--config", "config.yaml"], prepare, expected)


def file_case(name: str, put: Callable[[Path], object], expected: Sequence[str]) -> Case:
    """A config that is no plain file of YAML."""
    return Case(f"config: {name}", ["--config", "c.yaml"], lambda here: put(here / "c.yaml"), expected)


def loop(path: Path) -> None:
    """Two links that lead to each other."""
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


CONFIG_FILES = [
    ("missing", lambda path: None, "c.yaml"),
    ("a folder", Path.mkdir, "c.yaml"),
    ("a loop of links", loop, "c.yaml"),
    ("a link to nowhere", lambda path: path.symlink_to("nowhere"), "c.yaml"),
    ("a pipe that nobody writes to", lambda path: os.mkfifo(path), "c.yaml"),
    ("a device that never ends", lambda path: path.symlink_to("/dev/zero"), "c.yaml"),
    ("the null device", lambda path: path.symlink_to("/dev/null"), "c.yaml"),
    ("a file of a gigabyte", lambda path: (path.touch(), os.truncate(path, 1 << 30)), "c.yaml"),
    ("JSON of another program", lambda path: path.write_text('{"lr": 1, "bs": 2}'), "'lr'", "'bs'"),
    ("a tokenizer", lambda path: shutil.copy(ROOT / "model" / "tokenizer" / "tokenizer.json", path), "c.yaml"),
    ("a picture", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9), "c.yaml"),
]


def flag_case(number: int, arguments: list[str], expected: Sequence[str], good: Path) -> Case:
    """Flags on top of the good config."""
    name = f"flags {number}: {' '.join(arguments)[:60]!r}"
    return Case(name, ["--config", "config.yaml", *arguments], lambda here: lay_out(good, here), expected)


# ----------------------------------------------------------------------------------------------------- token files


def data_case(name: str, change: Callable[[Path], object], expected: Sequence[str], good: Path) -> Case:
    """The good files, of which the token file or its manifest is changed."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        change(here / "train.bin")

    return Case(f"data: {name}", ["--config", "config.yaml", "--out_dir", "out"], prepare, expected)


def manifest(text: str | bytes) -> Callable[[Path], None]:
    """Put another manifest beside the token file."""
    content = text.encode() if isinstance(text, str) else text
    return lambda path: path.with_suffix(".json").write_bytes(content)


def field(name: str, value) -> Callable[[Path], None]:
    """Change a field of the manifest; `...` takes it out."""
    import json

    def change(path: Path) -> None:
        values = json.loads(path.with_suffix(".json").read_text())
        values[name] = value
        if value is ...:
            del values[name]
        path.with_suffix(".json").write_text(json.dumps(values))

    return change


def tokens(ids: Sequence[int], stored: str = "uint16", bare: bool = False, **changes) -> Callable[[Path], None]:
    """Write these tokens; `bare`: without a manifest."""

    def change(path: Path) -> None:
        write_tokens(path, ids, stored, **changes)
        if bare:
            path.with_suffix(".json").unlink()

    return change


def content(data: bytes, bare: bool = False) -> Callable[[Path], None]:
    """Write these bytes; `bare`: without a manifest."""

    def change(path: Path) -> None:
        path.write_bytes(data)
        if bare:
            path.with_suffix(".json").unlink()

    return change


def flip(offset: int, bits: int = 1) -> Callable[[Path], None]:
    """Change bits of one byte and nothing else."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= bits
        path.write_bytes(data)

    return change


def instead(put: Callable[[Path], object], of: str = ".bin") -> Callable[[Path], None]:
    """Put something else in the place of the token file or its manifest."""

    def change(path: Path) -> None:
        path.with_suffix(of).unlink()
        put(path.with_suffix(of))

    return change


def validation(change: Callable[[Path], object] | None) -> Callable[[Path], None]:
    """The training file stays good; the validation file is changed, or is not there."""

    def both(path: Path) -> None:
        if change is not None:
            for suffix in (".bin", ".json"):
                shutil.copy(path.with_suffix(suffix), path.with_name("val.bin").with_suffix(suffix))
            change(path.with_name("val.bin"))
        config = path.with_name("config.yaml")
        config.write_text(config.read_text().replace("train.bin", "train.bin, val_data_path: val.bin"))

    return both


ORDINARY = [number % 5000 + 5 for number in range(TOKENS)]
DATA = [
    ("missing, with a manifest", lambda path: path.unlink(), "train.bin"),
    ("missing", lambda path: (path.unlink(), path.with_suffix(".json").unlink()), "train_data_path"),
    ("an odd number of bytes", content(b"\1" * 6001, bare=True), "train.bin"),
    ("an odd number of bytes and a manifest", content(b"\1" * 6001), "train.bin"),
    ("empty", content(b"", bare=True), "train.bin"),
    ("empty, with a manifest", content(b""), "train.bin"),
    ("one byte", content(b"\1", bare=True), "train.bin"),
    ("one token", content(b"\1\0", bare=True), "train.bin"),
    ("a token short of a sample", tokens(range(16)), "max_seq_len"),
    ("a token short of a sample, bare", tokens(range(16), bare=True), "max_seq_len"),
    ("cut short by a token", lambda path: os.truncate(path, 2 * TOKENS - 2), "train.bin"),
    ("cut in half", lambda path: os.truncate(path, TOKENS), "train.bin"),
    ("longer than its manifest says", lambda path: os.truncate(path, 2 * TOKENS + 2), "train.bin"),
    ("uint32 with a manifest of uint16", tokens(ORDINARY, "uint32", dtype="uint16"), "train.bin"),
    ("uint16 with a manifest of uint32", field("dtype", "uint32"), "train.bin"),
    ("uint16 that a manifest calls half as many uint32", tokens(ORDINARY, dtype="uint32", tokens=1500), "train.bin"),
    ("uint32 without a manifest", tokens([*ORDINARY[:2000], 72_000], "uint32", bare=True), "train.bin"),
    ("an id past the vocabulary at the start", tokens([6400, *ORDINARY]), "6400"),
    ("an id past the vocabulary in the middle", tokens([*ORDINARY, 6401, *ORDINARY]), "6401"),
    ("an id past the vocabulary at the end", tokens([*ORDINARY, 6402]), "6402"),
    ("the largest uint16", tokens([*ORDINARY, 65535], bare=True), "65535"),
    ("the largest uint32", tokens([*ORDINARY, 2**32 - 1], "uint32"), "4294967295"),
    ("an id past the vocabulary, bare", tokens([*ORDINARY, 6400], bare=True), "train.bin"),
    ("text", content("床前明月光，疑是地上霜。".encode() * 200, bare=True), "train.bin"),
    ("JSONL", content(b'{"text": "a page"}\n' * 300, bare=True), "train.bin"),
    ("a NumPy file", lambda path: content(b"\x93NUMPY\1\0" + b"\xff\xfe" * 900, bare=True)(path), "train.bin"),
    ("a bit changed at the start", flip(0), "changed since"),
    ("a bit changed in the middle", flip(TOKENS), "changed since"),
    ("a bit changed at the end", flip(2 * TOKENS - 2, 2), "changed since"),
    ("a high bit changed", flip(2 * TOKENS - 1, 0x80), "changed since"),
    ("tokens in another order", content(bytes(reversed(range(250))) * 24), "train.bin"),
    ("another file of that size", content(b"\1\0" * TOKENS), "changed since"),
    ("zeros of that size", content(b"\0\0" * TOKENS), "changed since"),
    ("a folder", instead(Path.mkdir), "train.bin"),
    ("a loop of links", instead(loop), "train"),
    ("a link to nowhere", instead(lambda path: path.symlink_to("nowhere")), "train"),
    ("a pipe", instead(lambda path: os.mkfifo(path)), "train.bin"),
    ("a device", instead(lambda path: path.symlink_to("/dev/zero")), "train.bin"),
    ("a manifest that is empty", manifest(""), "train.json"),
    ("a manifest that is no JSON", manifest("dtype: uint16\n"), "train.json"),
    ("a manifest that was cut off", manifest('{"dtype": "uint16", "vocab'), "train.json"),
    ("a manifest in UTF-16", manifest('{"dtype": "uint16"}'.encode("utf-16")), "train.json"),
    ("a manifest of odd bytes", manifest(bytes(range(256))), "train.json"),
    ("a manifest that is a list", manifest("[1, 2]"), "train.json"),
    ("a manifest that is null", manifest("null"), "train.json"),
    ("a manifest that is a number", manifest("5"), "train.json"),
    ("a manifest that is a text", manifest('"uint16"'), "train.json"),
    ("a manifest without fields", manifest("{}"), "train.json"),
    ("a manifest nested without end", manifest("[" * 100_000), "train.json"),
    ("a manifest of nested objects", manifest('{"a":' * 100_000), "train.json"),
    ("a manifest with a number of 5,000 digits", manifest('{"tokens": ' + "9" * 5000 + "}"), "train.json"),
    ("a manifest of a gigabyte", lambda path: os.truncate(path.with_suffix(".json"), 1 << 30), "train.json"),
    ("a manifest that is a folder", instead(Path.mkdir, ".json"), "train.json"),
    ("a manifest that is a pipe", instead(lambda path: os.mkfifo(path), ".json"), "train.json"),
    ("a manifest of a newer version", field("format_version", 2), "format_version"),
    ("a manifest of version text", field("format_version", "1"), "format_version"),
    ("a manifest of version true", field("format_version", True), "format_version"),
    ("a manifest without a version", field("format_version", ...), "format_version"),
    ("a manifest without dtype", field("dtype", ...), "dtype"),
    ("a manifest without tokens", field("tokens", ...), "tokens"),
    ("a manifest without its tokenizer", field("tokenizer_sha256", ...), "tokenizer_sha256"),
    ("a manifest without sha256", field("sha256", ...), "sha256"),
    ("dtype int8", field("dtype", "int8"), "int8"),
    ("dtype float32", field("dtype", "float32"), "float32"),
    ("dtype object", field("dtype", "O"), "dtype"),
    ("dtype as a number", field("dtype", 16), "dtype"),
    ("dtype of 10,000 characters", field("dtype", "u" * 10_000), "dtype"),
    ("tokens as text", field("tokens", "3000"), "tokens"),
    ("tokens as a fraction", field("tokens", 3000.0), "tokens"),
    ("tokens null", field("tokens", None), "tokens"),
    ("tokens true", field("tokens", True), "tokens"),
    ("negative tokens", field("tokens", -3000), "tokens"),
    ("tokens of 4,000 digits", field("tokens", 10**3999), "tokens"),
    ("tokens infinite", field("tokens", float("inf")), "tokens"),
    ("negative vocab_size", field("vocab_size", -1), "vocab_size"),
    ("vocab_size true", field("vocab_size", True), "vocab_size"),
    ("bos_id past the vocabulary", field("bos_id", 6400), "bos_id"),
    ("eos_id negative", field("eos_id", -2), "eos_id"),
    ("documents a list", field("documents", [1]), "documents"),
    ("sources an object", field("sources", {}), "sources"),
    ("processing a list", field("processing", []), "processing"),
    ("sha256 null", field("sha256", None), "sha256"),
    ("sha256 of another file", field("sha256", "0" * 64), "changed since"),
    ("another tokenizer", field("tokenizer_sha256", "f" * 64), "another tokenizer"),
    ("a tokenizer's hash of 10,000 characters", field("tokenizer_sha256", "f" * 10_000), "another tokenizer"),
    ("validation file missing", validation(None), "val.bin"),
    ("validation file empty", validation(content(b"")), "val.bin"),
    ("validation file odd", validation(content(b"\1" * 333, bare=True)), "val.bin"),
    ("validation file too short", validation(tokens(range(9))), "val.bin"),
    ("validation file with an id past the vocabulary", validation(tokens([*ORDINARY, 6400])), "val.bin"),
    ("validation file changed", validation(flip(77)), "val.bin"),
    ("validation manifest damaged", validation(manifest("{")), "val.json"),
    ("validation file of another tokenizer", validation(field("tokenizer_sha256", "e" * 64)), "val.bin"),
    ("validation file a folder", validation(instead(Path.mkdir)), "val.bin"),
]

# ------------------------------------------------------------------------------------------------------ tokenizers


def tokenizer_case(name: str, change: Callable[[Path], object], expected: Sequence[str], good: Path) -> Case:
    """The good files, with a tokenizer folder `tok` that is changed."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        shutil.copytree(ROOT / "model" / "tokenizer", here / "tok")
        change(here / "tok")

    arguments = ["--config", "config.yaml", "--tokenizer_path", "tok", "--out_dir", "out"]
    return Case(f"tokenizer: {name}", arguments, prepare, ("tok", *expected)[-1:] if expected else ("tok",))


def written(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Write a file of the tokenizer's folder."""
    return lambda tok: (tok / name).write_bytes(text.encode() if isinstance(text, str) else text)


def edited(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change a JSON file of the tokenizer's folder."""
    import json

    def change(tok: Path) -> None:
        values = json.loads((tok / name).read_text(encoding="utf-8"))
        edit(values)
        (tok / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    return change


def without_control_tokens(values: dict) -> None:
    """Take away every name of a control token."""
    for name in ("bos_token", "eos_token", "extra_special_tokens", "additional_special_tokens"):
        values.pop(name, None)


def last_id(number: int) -> Callable[[dict], None]:
    """Give the last token of the vocabulary another id."""

    def edit(values: dict) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = number

    return edit


CONFIG = "tokenizer_config.json"
TOKENIZERS = [
    ("missing", shutil.rmtree),
    ("empty", lambda tok: (shutil.rmtree(tok), tok.mkdir())),
    ("a file", lambda tok: (shutil.rmtree(tok), tok.write_text("{}"))),
    ("without tokenizer.json", lambda tok: (tok / "tokenizer.json").unlink()),
    ("tokenizer.json a folder", lambda tok: ((tok / "tokenizer.json").unlink(), (tok / "tokenizer.json").mkdir())),
    ("tokenizer.json empty", written("tokenizer.json", "")),
    ("tokenizer.json no JSON", written("tokenizer.json", "<s> </s>")),
    ("tokenizer.json binary", written("tokenizer.json", bytes(range(256)) * 50)),
    ("tokenizer.json a list", written("tokenizer.json", "[]")),
    ("tokenizer.json without a model", written("tokenizer.json", "{}")),
    ("tokenizer.json null", written("tokenizer.json", "null")),
    ("tokenizer.json nested without end", written("tokenizer.json", "[" * 100_000)),
    ("tokenizer.json of an unknown kind", edited("tokenizer.json", lambda v: v["model"].update(type="Wonder"))),
    ("tokenizer.json with merges of nothing", edited("tokenizer.json", lambda v: v["model"].update(merges=["x y"]))),
    ("an id of a billion", edited("tokenizer.json", last_id(10**9)), "1,000,000,000"),
    ("an id of four billion", edited("tokenizer.json", last_id(2**32 - 1)), "4,294,967,295"),
    ("an id past 32 bits", edited("tokenizer.json", last_id(2**40))),
    ("a negative id", edited("tokenizer.json", last_id(-1))),
    ("tokenizer_config.json no JSON", written(CONFIG, "{")),
    ("tokenizer_config.json a list", written(CONFIG, "[]")),
    ("tokenizer_config.json nested without end", written(CONFIG, "[" * 100_000)),
    ("no bos and no eos", edited(CONFIG, without_control_tokens)),
    ("no eos", edited(CONFIG, lambda values: values.pop("eos_token"))),
    ("bos a number", edited(CONFIG, lambda values: values.update(bos_token=5))),
    ("eos a number", edited(CONFIG, lambda values: values.update(eos_token=5))),
    ("of other ids than the token file's", edited("tokenizer.json", lambda v: v["model"]["vocab"].update(zzz=6400))),
]

# ------------------------------------------------------------------------------------------- raw data and resuming


def raw_case(name: str, change: Callable[[Path], object], expected: Sequence[str], good: Path) -> Case:
    """No token file; it would have to be made from `raw.jsonl`."""

    def prepare(here: Path) -> None:
        shutil.copy(good / "config.yaml", here / "config.yaml")
        change(here / "raw.jsonl")

    arguments = ["--config", "config.yaml", "--raw_data_path", "raw.jsonl", "--out_dir", "out"]
    return Case(f"raw data: {name}", arguments, prepare, expected, may_write=("train.",))


RAW = [
    ("missing", lambda path: None, "raw.jsonl"),
    ("an empty folder", Path.mkdir, "raw.jsonl"),
    ("a folder of other files", lambda path: (path.mkdir(), (path / "a.png").write_text("x")), "raw.jsonl"),
    ("empty", lambda path: path.touch(), "raw.jsonl"),
    ("blank lines", lambda path: path.write_text("\n\n\n"), "raw.jsonl"),
    ("no text in it", lambda path: path.write_text('{"title": "x"}\n' * 20), "raw.jsonl"),
    ("not UTF-8", lambda path: path.write_bytes('{"text": "床前明月光"}\n'.encode("gbk") * 20), "raw.jsonl"),
    ("not JSON", lambda path: path.write_text("plain text\n" * 20), "raw.jsonl"),
    ("a loop of links", loop, "raw.jsonl"),
    ("a link to nowhere", lambda path: path.symlink_to("nowhere"), "raw.jsonl"),
]


def resume_case(
    name: str, arguments: list[str], change: Callable[[Path], object], expected: Sequence[str], good: Path
) -> Case:
    """The good files, and a folder `run` that is changed; the flags ask to go on from something."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        (here / "run").mkdir()
        shutil.copy(good / "checkpoint.pth", here / "run" / "checkpoint_step_1.pth")
        shutil.copy(good / "weights.pth", here / "run" / "pretrain_32.pth")
        change(here / "run")

    return Case(f"resuming: {name}", arguments, prepare, expected)


WITH_CONFIG = ["--config", "config.yaml"]
FROM = [*WITH_CONFIG, "--out_dir", "out", "--resume_from"]
STEP = "run/checkpoint_step_1.pth"
NOTHING = lambda run: None  # noqa: E731
RESUME = [
    ("from a file that is not there", [*FROM, "run/none.pth"], NOTHING, "run/none.pth"),
    ("from a folder", [*FROM, "run"], NOTHING, "run"),
    ("from weights", [*FROM, "run/pretrain_32.pth"], NOTHING, "run/pretrain_32.pth"),
    ("from a config", [*FROM, "config.yaml"], NOTHING, "config.yaml"),
    ("from a token file", [*FROM, "train.bin"], NOTHING, "train.bin"),
    ("from an empty file", [*FROM, STEP], lambda run: os.truncate(run / "checkpoint_step_1.pth", 0), STEP),
    ("from half a file", [*FROM, STEP], lambda run: os.truncate(run / "checkpoint_step_1.pth", 2000), STEP),
    ("from a loop of links", [*FROM, "run/loop"], lambda run: loop(run / "loop"), "run/loop"),
    ("from another model's", [*FROM, STEP, "--dim", "64"], NOTHING, "another model"),
    ("from another data's", [*FROM, STEP], lambda run: write_tokens(run.with_name("train.bin"), [7] * TOKENS), "data"),
    ("without a config, from nothing", ["--resume", "--out_dir", "none"], NOTHING, "resume"),
    ("without a config, from a file that is not there", ["--resume_from", "none.pth"], NOTHING, "none.pth"),
    ("without a config, from weights", ["--resume_from", "run/pretrain_32.pth"], NOTHING, "run/pretrain_32.pth"),
    (
        "from a folder whose only checkpoint is damaged",
        [*WITH_CONFIG, "--resume", "--out_dir", "run"],
        lambda run: os.truncate(run / "checkpoint_step_1.pth", 999),
        "run",
    ),
    ("from a folder that is a file", [*WITH_CONFIG, "--resume", "--out_dir", "train.bin"], NOTHING, "train.bin"),
    ("into a folder that is a file", [*WITH_CONFIG, "--out_dir", "train.bin"], NOTHING, "train.bin"),
    ("into a folder under a file", [*WITH_CONFIG, "--out_dir", "train.bin/out"], NOTHING, "train.bin is a file"),
    ("into a device", [*WITH_CONFIG, "--out_dir", "/dev/null"], NOTHING, "/dev/null"),
    ("into a folder of no file system", [*WITH_CONFIG, "--out_dir", "/proc/none/out"], NOTHING, "/proc/none/out"),
    ("into a name of 300 characters", [*WITH_CONFIG, "--out_dir", "o" * 300], NOTHING, "out_dir"),
    (
        "into a loop of links",
        [*WITH_CONFIG, "--out_dir", "loop"],
        lambda run: loop(run.with_name("loop")),
        "out_dir",
    ),
    (
        "into a folder whose config.yaml is no run's",
        [*WITH_CONFIG, "--out_dir", "run"],
        lambda run: (run / "config.yaml").write_text("mine: true\n"),
        "config.yaml",
    ),
]

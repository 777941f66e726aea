"""What a model learns from the same text: recipes, rates, and what text to give it, compared by held-out bits per byte.

    python benchmarks/learning.py recipes
    python benchmarks/learning.py recipes --tokens 10e6 --data my.bin --only best "adamw 1e-3" --seeds 1
    python benchmarks/learning.py parts --tokens 1e6 --jobs 2            # of recipe best: each left out, others added
    python benchmarks/learning.py rates --model 10M                      # around the rate that auto gives
    python benchmarks/learning.py passes --texts my.jsonl                # how often to read little text
    python benchmarks/learning.py data --texts my.jsonl --other more.jsonl  # passes, copies, order, sources, tokenizers

Each run is `train.py` itself, with a schedule that ends with its tokens: a shorter run is a finished one, not a part of
a longer one. Held-out samples are the same for all runs of a study. Finished runs are kept and not repeated, so the
command can be stopped and started again. Seconds are what a run's tokens take at the rate that its settings reach
alone: with --speed each trains for a few seconds, one after another, when the runs are done.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.training.recipe import automatic_tokens_per_step  # noqa: E402

MODELS = {  # by their parameters
    "1M": {"dim": 96, "n_layers": 4, "n_heads": 3, "n_kv_heads": 3, "max_seq_len": 256},
    "3M": {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 256},  # the demo's
    "10M": {"dim": 320, "n_layers": 7, "n_heads": 10, "n_kv_heads": 5, "max_seq_len": 256},
    "27M": {"dim": 512, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "max_seq_len": 512},  # MiniMind v1's
}
# MiniMind v1's recipe: Adam at 1e-4, no decay, no warm-up, a cosine to a tenth (there without shuffling).
MINIMIND = {"optimizer_type": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "warmup_steps": 0, "batch_size": 4}
ADAMW = {"optimizer_type": "adamw", "lr_scheduler": "cosine", "batch_size": 4}
ADAMW_RATES = (1e-3, 2e-3, 4e-3)
SHARES = (0.05, 0.1, 0.3, 0.4, 0.5, 1.0)  # of the tokens, for recipe best
FACTORS = (0.5, 0.71, 1.0, 1.41, 2.0)  # of the rate that auto gives
PARTS = {  # what is left out of recipe best, or added to it, by section
    "best": {},
    "without qk_norm": {"model": {"qk_norm": False}},
    "without document_mask": {"training": {"document_mask": False}},
    "cosine": {"training": {"lr_scheduler": "cosine"}},
    "wsd": {"training": {"lr_scheduler": "wsd"}},
    "linear to 0": {"training": {"min_lr": 0.0}},
    "a quarter of the batch": {"batch": 0.25},
    "half the batch": {"batch": 0.5},
    "twice the batch": {"batch": 2.0},
    "untied output layer": {"model": {"tie_embeddings": False}},
    "documents begin samples": {"data": {"sample_start": "document"}},
    "no weight decay": {"training": {"weight_decay": 0.0}},
    "moving average 0.99": {"training": {"use_ema": True, "ema_decay": 0.99}},
}
PASSES = (1, 2, 4, 8)
OWN, OWN_SHARES = 0.25, (0.75, 0.5, 0.25)  # own text of so many of a run's tokens; its part of the samples
VOCABULARIES = (6400, 12800, 25600)
HELD_OUT = 0.03  # of the documents, in study data
SPEED_TOKENS, SPEED_TURNS = 100_000, 3
IN_ORDER = """
from model.training import order
order.permuted = lambda places, samples, keys: places
import train
train.run_command(train.main)
"""  # train.py that reads its samples as they lie in the file


@dataclass(frozen=True)
class Case:
    """One run: what the table calls it, its tokens, its seed, and settings by section."""

    name: str
    tokens: float
    seed: int
    settings: dict = field(hash=False)  # and "in_order", whether samples are read as they lie in the file

    @property
    def folder(self) -> str:
        """Of its files: equal for equal runs alone."""
        told = json.dumps([self.settings, self.tokens, self.seed], sort_keys=True)
        word = "".join(c if c.isalnum() else "-" for c in self.name)
        return f"{word}-{round(self.tokens)}-{self.seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def best(tokens: float, model: dict, more: dict) -> dict:
    """Settings of recipe best for so many tokens: the batch is that which auto gives for a text of this length."""
    length = model["max_seq_len"]
    per_step, _ = automatic_tokens_per_step(round(tokens), 1, None)
    rows = max(1, round(per_step * more.get("batch", 1.0)) // length)
    training = {"recipe": "best", "batch_size": rows} | more.get("training", {})
    return {"model": model | more.get("model", {}), "training": training, "data": more.get("data", {})}


def plain(training: dict, model: dict) -> dict:
    """Settings without recipe best."""
    return {"model": model, "training": training, "data": {}}


def recipes(options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """Others' recipes with all tokens, recipe best with shares of them."""
    model, tokens = options.model, options.tokens
    yield "minimind", tokens, plain(MINIMIND, model)
    for rate in options.adamw_rates:
        yield f"adamw {rate:g}", tokens, plain(ADAMW | {"learning_rate": rate}, model)
    for share in options.shares:
        yield "best", share * tokens, best(share * tokens, model, {})


def parts(options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """Recipe best, each of its parts left out, and others added."""
    for name, more in PARTS.items():
        yield name, options.tokens, best(options.tokens, options.model, more)


def rates(options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """Recipe best with the rate that auto gives, and multiples of it."""
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.training.recipe import automatic_learning_rate

    settings = best(options.tokens, options.model, {})
    parameters = Transformer(LMConfig(**settings["model"])).active_parameter_count()
    per_step = settings["training"]["batch_size"] * options.model["max_seq_len"]
    rate = automatic_learning_rate("muon", parameters, per_step)
    for factor in options.factors:
        more = {"training": {"learning_rate": float(f"{factor * rate:.3g}")}}
        yield f"{factor:g} x {rate:g}", options.tokens, best(options.tokens, options.model, more)


def process(texts: Path, output: Path, *more: str) -> Path:
    """A token file of texts, made unless it is there."""
    if not output.exists():
        run_data_processing("--input_path", str(texts), "--output_path", str(output), *more)
    return output


def run_data_processing(*options: str) -> None:
    """Run optimized_data_processing.py."""
    script = [sys.executable, str(ROOT / "optimized_data_processing.py"), *options]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)


def divided_texts(options: argparse.Namespace) -> tuple[list[str], Path]:
    """The lines to train on, in a random order, and a file of those held out."""
    lines = shuffled_lines(options.texts)
    held_out = max(1, round(HELD_OUT * len(lines)))
    validation = options.out / "held_out.jsonl"
    validation.write_text("\n".join(lines[:held_out]) + "\n", encoding="utf-8")
    return lines[held_out:], validation


class OwnTexts:
    """Token files of parts of the text, and what is held out of it.

    Attributes:
        validation: the file of the lines that are held out.
        held_out: the setting that evaluates on them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._lines, self.validation = divided_texts(options)
        self._folder, self._model = options.out, options.model
        self.held_out = {"val_data_path": str(process(self.validation, self._folder / "held_out.bin"))}
        every = process(share_of(self._lines, 1, self._folder / "all.jsonl"), self._folder / "all.bin")
        self._tokens = tokens_in(every)

    def file_with(self, tokens: float, times: int = 1) -> Path:
        """A token file of about so many tokens, each document so many times."""
        path = self._folder / f"own-{round(tokens)}-{times}.jsonl"
        texts = share_of(self._lines, tokens / self._tokens / times, path, times)
        return process(texts, texts.with_suffix(".bin"), "--deduplicate", "false")

    def sorted_file(self, tokens: float, hard_first: bool) -> Path:
        """The texts of `file_with`, sorted by how rare their characters are."""
        lines = self.file_with(tokens).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        counts = collections.Counter(itertools.chain.from_iterable(lines))
        lines.sort(key=lambda line: statistics.fmean(math.log(counts[c]) for c in line), reverse=not hard_first)
        path = self._folder / f"{'hard' if hard_first else 'easy'}-first-{round(tokens)}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return process(path, path.with_suffix(".bin"), "--deduplicate", "false")

    def passes(self, tokens: float, times: int) -> tuple[str, float, dict]:
        """A run of so many passes over so many tokens."""
        made = {"data": self.held_out | {"train_data_path": str(self.file_with(tokens))}}
        return f"{times} x {tokens / 1e6:.3g}M tokens", times * tokens, best(times * tokens, self._model, made)


def shuffled_lines(path: Path) -> list[str]:
    """A file's lines in a random order, the same each time."""
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    return lines


def tokens_in(token_file: Path) -> int:
    """How many it has, by its manifest."""
    return json.loads(token_file.with_suffix(".json").read_text(encoding="utf-8"))["tokens"]


def share_of(lines: list[str], share: float, path: Path, times: int = 1) -> Path:
    """A file of the first lines, by their characters, each so many times."""
    if not path.exists():
        left, kept = share * sum(map(len, lines)), []
        for line in lines:
            if left <= 0:
                break
            kept.append(line)
            left -= len(line)
        path.write_text("\n".join(kept * times) + "\n", encoding="utf-8")
    return path


def data(options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """The same tokens from all of the text or several passes over less of it, with copies in it, sorted, with other
    texts beside it; and tokenizers of several sizes for the same seconds."""
    texts = OwnTexts(options)
    folder, tokens, model, held_out = options.out, options.tokens, options.model, texts.held_out
    for times in PASSES:
        yield texts.passes(tokens / times, times)
    made = held_out | {"train_data_path": str(texts.file_with(tokens, times=2))}
    yield "every document twice", tokens, best(tokens, model, {"data": made})
    for order in ("easy", "hard"):
        made = held_out | {"train_data_path": str(texts.sorted_file(tokens, hard_first=order == "hard"))}
        yield f"{order} texts first", tokens, best(tokens, model, {"data": made}) | {"in_order": True}

    if options.other is not None:
        own = texts.file_with(tokens * OWN)
        other = process(options.other, folder / f"{options.other.stem}.bin")
        for share in OWN_SHARES:
            made = held_out | {"train_data_path": [str(own), str(other)], "train_data_weights": [share, 1 - share]}
            name = f"{tokens * OWN / 1e6:.3g}M own tokens, {share:.0%} of the samples, and other texts"
            yield name, tokens, best(tokens, model, {"data": made})
        made = held_out | {"train_data_path": str(other)}
        yield "other texts alone", tokens, best(tokens, model, {"data": made})
    yield from with_tokenizers(folder / "all.jsonl", texts.validation, options)


def passes(options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """One to eight passes over parts of the text, each run with a schedule that ends with it."""
    texts = OwnTexts(options)
    for part in PASSES:
        for times in PASSES:
            if times <= part * options.most_passes:
                yield texts.passes(options.tokens / part, times)


def with_tokenizers(texts: Path, validation: Path, options: argparse.Namespace) -> Iterator[tuple[str, float, dict]]:
    """Tokenizers of several sizes, trained on the text, for the seconds that the first takes for the tokens."""
    folder, tokens, model, speed = options.out, options.tokens, options.model, None
    for size in options.vocabularies:
        tokenizer = folder / f"tokenizer{size}"
        if not tokenizer.exists():
            trained = ["--train_tokenizer", "--vocab_size", str(size), "--tokenizer_output", str(tokenizer)]
            run_data_processing("--input_path", str(texts), *trained)
        files = [process(file, folder / f"{file.stem}{size}.bin", "--tokenizer_path", str(tokenizer))
                 for file in (texts, validation)]  # fmt: skip
        made = dict(zip(("train_data_path", "val_data_path"), map(str, files), strict=True))
        more = {"data": made | {"tokenizer_path": str(tokenizer)}}
        case = Case(f"tokenizer {size}", tokens, 1, best(tokens, model, more))
        rate = tokens_per_second([case], options)[0]
        speed = speed or rate
        trained_on = tokens * rate / speed
        yield f"tokenizer of {size:,}, own text, equal seconds", trained_on, best(trained_on, model, more)


STUDIES = {study.__name__: study for study in (recipes, parts, rates, passes, data)}


def run(case: Case, folder: Path, threads: int) -> list[dict]:
    """Train once, unless that was done before; returns the lines of `metrics.jsonl`.

    Args:
        folder: for the run's files; its output goes to "FOLDER.log" beside it.
    """
    training, length = case.settings["training"], case.settings["model"]["max_seq_len"]
    steps = round(case.tokens / (training["batch_size"] * length))
    fixed = {
        "max_steps": steps, "seed": case.seed, "eval_interval": max(1, steps // 8), "save_interval": steps,
        "log_interval": max(1, steps // 50), "out_dir": str(folder), "compile": False, "keep_last": 1,
    }  # fmt: skip
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text(encoding="utf-8"))["state"] != "finished":
        config = case.settings | {"training": training | fixed}
        program = ["-c", IN_ORDER] if config.pop("in_order", False) else [str(ROOT / "train.py")]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "asked.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, *program, "--config", str(folder / "asked.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learned(case: Case, options: argparse.Namespace) -> dict:
    """What a run learned: name, seed, tokens, val_loss (nats/token), bits_per_byte, and the curve: a list of (tokens,
    val_loss, bits_per_byte)."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    events = run(case, options.out / case.folder, threads)
    curve = [(e["tokens"], e["val_loss"], e["bits_per_byte"]) for e in events if "val_loss" in e]
    tokens, loss, bits = curve[-1]
    print(f"{case.name}, {tokens:,} tokens, seed {case.seed}: {loss:.4f}, {bits:.4f} bits per byte", flush=True)
    row = {"name": case.name, "seed": case.seed, "tokens": tokens, "case": case}
    return row | {"val_loss": loss, "bits_per_byte": bits, "curve": curve}


def tokens_per_second(cases: list[Case], options: argparse.Namespace) -> list[float]:
    """How fast each trains alone on all cores: the best of a few short runs, taking turns."""
    best_rates = [0.0] * len(cases)
    for turn in range(SPEED_TURNS):
        for number, case in enumerate(cases):
            short = dataclasses.replace(case, tokens=SPEED_TOKENS, seed=1)
            events = run(short, options.out / "speed" / f"{short.folder}-{turn}", os.cpu_count() or 1)
            found = [e["tokens_per_second"] for e in events if "tokens_per_second" in e]
            best_rates[number] = max(best_rates[number], statistics.median(found))
    return best_rates


def summarised(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """One row for each name and number of tokens: means over seeds, and standard deviations; with --speed seconds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["tokens"]), []).append(row)
    summary = []
    for (name, tokens), same in groups.items():
        row = {"name": name, "tokens": tokens, "seeds": len(same), "case": same[0]["case"], "seconds": math.nan}
        for key in ("val_loss", "bits_per_byte"):
            values = [one[key] for one in same]
            row[key] = statistics.mean(values)
            row[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(row)
    if options.speed:
        for row, rate in zip(summary, tokens_per_second([row["case"] for row in summary], options), strict=True):
            row["seconds"] = row["tokens"] / rate
    return summary


def comparison(summary: list[dict], other: dict) -> str | None:
    """The share of another recipe's tokens after which recipe best has its bits per byte, interpolated between two
    finished runs on a logarithmic scale of tokens; None: it does not reach them, or has them from the first run on."""
    ours = sorted((row for row in summary if row["name"] == "best"), key=lambda row: row["tokens"])
    for fewer, more in zip(ours, ours[1:], strict=False):
        if fewer["bits_per_byte"] > other["bits_per_byte"] >= more["bits_per_byte"]:
            way = (fewer["bits_per_byte"] - other["bits_per_byte"]) / (fewer["bits_per_byte"] - more["bits_per_byte"])
            tokens = math.exp((1 - way) * math.log(fewer["tokens"]) + way * math.log(more["tokens"]))
            return f"best has the bits per byte of {other['name']} after {tokens / other['tokens']:.2f} of its tokens"
    return None


def print_table(summary: list[dict]) -> None:
    """Print the runs, and what recipe best needs for the loss of each other recipe."""
    print("| | tokens | seeds | loss, nats/token (deviation) | bits per byte (deviation) | seconds, alone |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in summary:
        loss = f"{row['val_loss']:.4f} ({row['val_loss_deviation']:.4f})"
        bits = f"{row['bits_per_byte']:.4f} ({row['bits_per_byte_deviation']:.4f})"
        seconds = "" if math.isnan(row["seconds"]) else f"{row['seconds']:,.0f}"
        print(f"| {row['name']} | {row['tokens']:,.0f} | {row['seeds']} | {loss} | {bits} | {seconds} |")
    others = [row for row in summary if row["name"] != "best"]
    print("\n".join(["", *filter(None, (comparison(summary, row) for row in others))]))


def draw(rows: list[dict], path: Path) -> None:
    """Draw every run's held-out bits per byte over its tokens, with a point where it ends, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows))
    for row in rows:
        tokens, _, bits = zip(*row["curve"], strict=True)
        millions, colour = [count / 1e6 for count in tokens], f"C{names.index(row['name'])}"
        axes.plot(millions, bits, color=colour, alpha=0.5)
        axes.plot(millions[-1], bits[-1], "o", color=colour)
    for number, name in enumerate(names):
        axes.plot([], [], "o-", color=f"C{number}", label=name)
    axes.set(title="What each learns: a line is a run, which ends at its point")
    axes.set(xlabel="tokens trained on, millions", ylabel="bits per byte of held-out text (lower is better)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def read_options() -> argparse.Namespace:
    """The command line, with the paths made absolute and the model's shape in `model`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES, nargs="?", default="recipes")
    parser.add_argument("--data", type=Path, default=ROOT / "dataset" / "classics_zh.bin", help="token file")
    parser.add_argument(
        "--texts", type=Path, default=ROOT / "dataset" / "classics_zh.jsonl", help="of studies data and passes"
    )
    parser.add_argument("--other", type=Path, help="texts of another kind, of study data")
    parser.add_argument("--most_passes", type=float, default=1, help="of study passes, over --tokens [1]")
    parser.add_argument("--model", choices=MODELS, default="3M", help="[3M]")
    parser.add_argument("--tokens", type=float, default=2e6, help="of the longest runs [2e6]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="[1 2 3]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs of these names")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of --tokens, for recipe best")
    parser.add_argument("--adamw_rates", type=float, nargs="+", default=ADAMW_RATES)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of study rates")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES, help="of study data")
    parser.add_argument("--extra", default="", help="settings of training on top of every run's, as YAML")
    parser.add_argument("--speed", action="store_true", help="measure seconds too, after the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, except those that measure seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learning", help="folder for the runs")
    options = parser.parse_args()
    options.data, options.out, options.texts = options.data.resolve(), options.out.resolve(), options.texts.resolve()
    options.other = options.other and options.other.resolve()
    options.model = MODELS[options.model]
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    """Run what is missing, then print and draw everything."""
    options = read_options()
    if options.study not in ("data", "passes") and options.data.with_suffix(".jsonl").exists():
        process(options.data.with_suffix(".jsonl"), options.data)
    extra = yaml.safe_load(options.extra) or {}
    wanted = []
    for name, tokens, settings in STUDIES[options.study](options):
        if options.only is None or name in options.only:
            chosen = {"train_data_path": str(options.data)} | settings["data"]
            changed = settings | {"data": chosen, "training": settings["training"] | extra}
            wanted += [Case(name, tokens, seed, changed) for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda case: learned(case, options), wanted))
    print()
    print_table(summarised(rows, options))
    draw(rows, options.out / f"{options.study}.png")
    print(f"\ndrawn: {options.out / f'{options.study}.png'}")


if __name__ == "__main__":
    main()

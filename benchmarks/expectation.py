"""Fit and check the rule for the held-out bits per byte that a run will reach (`model/training/expectation.py`).

    python benchmarks/expectation.py out/learning            # finished runs of recipe best, by benchmarks/learning.py
    python benchmarks/expectation.py out/learning --check out/other

Prints the constants that fit best (floor, and for size and tokens a factor and a power), how far each run lies from
them, and, for the runs of --check, how many lie in the range that the program's own constants give.
"""

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.config_file import load_settings
from model.training.data import TrainingData
from model.training.expectation import (
    RULE,
    SPREAD,
    Outlook,
    share_of_text_bits,
    text_bits_of_data,
    worth,
)
from model.training.recipe import learns_by_heart

POWERS = np.arange(0.05, 0.61, 0.05)
OF_RECIPE_BEST = re.compile("best-|1-x-|[0-9]+-x-[0-9].*-tokens-")  # runs of studies; others change a part of it
ROUNDS = 20  # of fitting the rule, then the texts' factors
MOST_OFF = 0.02  # of nine in ten runs, beside what the fit leaves, for texts that it has not seen


def finished(folder: Path) -> list[dict]:
    """Every finished run of recipe best as it is, below a folder: text, text_bits, parameters, tokens, epoch_tokens and
    bits, and the curve, a list of (share of the run, tokens, bits)."""
    texts: dict[str, tuple[float, float]] = {}
    runs = []
    for asked in sorted(folder.rglob("asked.yaml")):
        metrics, status = asked.with_name("metrics.jsonl"), asked.with_name("status.json")
        values = yaml.safe_load(asked.read_text(encoding="utf-8"))
        if not OF_RECIPE_BEST.match(asked.parent.name) or not status.exists():
            continue
        if json.loads(status.read_text(encoding="utf-8"))["state"] != "finished" or "speed" in asked.parts:
            continue
        text = json.dumps(values["data"], sort_keys=True)
        if text not in texts:
            data = TrainingData(load_settings(asked), False, lambda line: None)
            texts[text] = text_bits_of_data(data), data.training_samples * data.config.max_seq_len
        text_bits, epoch_tokens = texts[text]
        events = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        curve = [(e["tokens"], e["bits_per_byte"]) for e in events if "bits_per_byte" in e]
        tokens, bits = curve[-1]
        parameters = Transformer(LMConfig(**{"qk_norm": True} | values["model"])).parameter_count()
        if learns_by_heart(parameters, epoch_tokens, tokens / epoch_tokens):
            continue  # of which the rule says nothing
        run = {"name": asked.parent.name, "text": Path(values["data"]["train_data_path"]).stem, "text_bits": text_bits}
        run |= {"parameters": parameters, "tokens": tokens, "epoch_tokens": epoch_tokens, "bits": bits}
        runs.append(run | {"curve": [(own / tokens, own, reached) for own, reached in curve]})
    return runs


def fit(runs: list[dict]) -> tuple[float, float, float, float, float]:
    """Floor, and factor and power of size and of tokens: the least squares of the relative errors, no term negative.

    Texts differ by more than their frequencies say, and not each has runs of all sizes: each gets a factor of its own,
    so that a difference between texts is not taken for one of sizes. The result is for their mean.
    """
    shares = np.array([run["bits"] / run["text_bits"] for run in runs])
    texts = np.array([run["text"] for run in runs])
    factors = np.ones_like(shares)
    for _ in range(ROUNDS):
        found = _fit_one_text(runs, shares / factors)
        errors = shares / rule(runs, found)
        for text in set(texts.tolist()):
            factors[texts == text] = errors[texts == text].mean()
    mean = float(np.mean([factors[texts == text][0] for text in sorted(set(texts.tolist()))]))
    floor, by_size, size_power, by_tokens, tokens_power = found
    return floor * mean, by_size * mean, size_power, by_tokens * mean, tokens_power


def _fit_one_text(runs: list[dict], shares: np.ndarray) -> tuple[float, ...]:
    sizes = np.array([run["parameters"] for run in runs], dtype=float)
    taught = np.array([worth(run["tokens"], run["epoch_tokens"]) for run in runs])
    best = (math.inf, ())
    for size_power, tokens_power in itertools.product(POWERS, POWERS):
        terms = np.stack([np.ones_like(sizes), sizes**-size_power, taught**-tokens_power], 1) / shares[:, None]
        found, *_ = np.linalg.lstsq(terms, np.ones_like(shares), rcond=None)
        error = float(((terms @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < best[0]:
            best = error, (found[0], found[1], size_power, found[2], tokens_power)
    return best[1]


def rule(runs: list[dict], constants: tuple[float, ...], tokens: float | None = None) -> np.ndarray:
    """The shares of the frequencies' bits that the rule gives runs; after `tokens`, or at their ends."""
    return np.array(
        [
            share_of_text_bits(
                run["parameters"], worth(run["tokens"] if tokens is None else tokens, run["epoch_tokens"]), constants
            )
            for run in runs
        ]
    )


def described(run: dict) -> str:
    """A run in a line."""
    millions = {name: run[name] / 1e6 for name in ("parameters", "tokens", "epoch_tokens")}
    size = "{parameters:5.2f}M {tokens:6.2f}M of {epoch_tokens:6.2f}M tokens".format(**millions)
    return f"{run['text']:20} {size}: {run['bits']:.4f}"


def main() -> None:
    """Print the fit and the check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs to fit")
    parser.add_argument("--check", type=Path, nargs="+", default=[], help="folders of runs that the fit may not see")
    options = parser.parse_args()
    runs = [run for folder in options.runs for run in finished(folder)]
    constants = fit(runs)
    print(f"{len(runs)} runs: FLOOR, BY_SIZE, SIZE_POWER, BY_TOKENS, TOKENS_POWER = "
          + ", ".join(f"{constant:.4g}" for constant in constants))  # fmt: skip
    errors = []
    for run, share in zip(runs, rule(runs, constants), strict=True):
        errors.append(run["bits"] / (run["text_bits"] * share) - 1)
        print(f"  {described(run)}, by the rule {run['text_bits'] * share:.4f} ({errors[-1]:+.1%})")
    print(f"nine of ten within {np.quantile(np.abs(errors), 0.9) + MOST_OFF:.3f} (SPREAD is {SPREAD}, RULE {RULE})")
    for run in (run for folder in options.check for run in finished(folder)):
        expected = Outlook(run["text_bits"], run["parameters"], run["epoch_tokens"], run["tokens"]).at_end
        inside = "inside" if expected.low <= run["bits"] <= expected.high else "OUTSIDE"
        print(f"  check {described(run)}, expected {expected}: {inside}")
    print("while a run goes on, its bits over those of a run that ends there (share of the run: ratio):")
    by_share: dict[float, list[float]] = {}
    for run in runs:
        off = run["bits"] / (run["text_bits"] * rule([run], constants)[0])  # of this text
        for share, own, bits in run["curve"][:-1]:
            ended = run["text_bits"] * rule([run], constants, own)[0] * off
            by_share.setdefault(round(share * 8) / 8, []).append(bits / ended)
    print("  " + ", ".join(f"{share:.3g}: {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
                           for share, found in sorted(by_share.items())))  # fmt: skip


if __name__ == "__main__":
    main()

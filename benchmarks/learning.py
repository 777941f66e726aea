"""How much does a recipe learn from the same tokens, and in the same seconds?

    python benchmarks/learning.py
    python benchmarks/learning.py --tokens 10000000 --data my.bin --seeds 1 2 3 --jobs 2
    python benchmarks/learning.py --only ours --extra "dropout: 0.1"       # any setting on top of a recipe

Each run is `train.py` itself, with a schedule that ends with its tokens: a shorter run is a finished one, not a part of
a longer one. Recipes differ only in the settings that RECIPES shows. The table compares the loss and the bits per byte
on held-out samples, the same for all. Finished runs are kept and not repeated, so the command can be stopped and
started again. Seconds are what a recipe's tokens take at the rate that it reaches alone: after the runs each recipe
trains for a few seconds, one after another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 256}  # the demo's
ADAMW = {"optimizer_type": "adamw", "lr_scheduler": "cosine", "batch_size": 4}
RECIPES = {  # name: settings, and the shares of --tokens to train with
    "minimind": (
        # MiniMind v1's: Adam at 1e-4, no decay, no warm-up, a cosine to a tenth (there without shuffling)
        {"optimizer_type": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "warmup_steps": 0, "batch_size": 4},
        (1.0,),
    ),
    "adamw 1e-3": (ADAMW | {"learning_rate": 1e-3}, (1.0,)),
    "adamw 2e-3": (ADAMW | {"learning_rate": 2e-3}, (1.0,)),
    "adamw 4e-3": (ADAMW | {"learning_rate": 4e-3}, (1.0,)),
    "ours": (
        {"optimizer_type": "muon", "learning_rate": 5e-3, "lr_scheduler": "linear", "batch_size": 8},
        (0.1, 0.3, 0.5, 1.0),
    ),
}
TITLES = {  # in the picture
    "minimind": "MiniMind v1: Adam 1e-4",
    "adamw 1e-3": "AdamW 1e-3",
    "adamw 2e-3": "AdamW 2e-3",
    "adamw 4e-3": "AdamW 4e-3",
    "ours": "MateConv: Muon 5e-3, linear",
}
SPEED_TOKENS, SPEED_TURNS = 100_000, 3


def run(recipe: str, tokens: float, seed: int, folder: Path, threads: int, options: argparse.Namespace) -> list[dict]:
    """Train once, unless that was done before; returns the lines of `metrics.jsonl`.

    Args:
        folder: for the run's files; its output goes to "FOLDER.log" beside it.
    """
    settings = RECIPES[recipe][0] | (yaml.safe_load(options.extra) or {})
    steps = round(tokens / (settings["batch_size"] * MODEL["max_seq_len"]))
    fixed = {
        "max_steps": steps, "seed": seed, "eval_interval": max(1, steps // 8), "save_interval": steps,
        "log_interval": max(1, steps // 50), "out_dir": str(folder),
    }  # fmt: skip
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text(encoding="utf-8"))["state"] != "finished":
        config = {"data": {"train_data_path": str(options.data)}, "model": MODEL, "training": settings | fixed}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "asked.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(folder / "asked.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learned(recipe: str, share: float, seed: int, options: argparse.Namespace) -> dict:
    """What a recipe learns from this share of the tokens.

    Returns:
        recipe, share, seed, tokens, val_loss (nats/token), bits_per_byte, and the curve: a list of
        (tokens, val_loss, bits_per_byte).
    """
    folder = options.out / f"{recipe.replace(' ', '-')}-{round(options.tokens * share)}-{seed}"
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    events = run(recipe, options.tokens * share, seed, folder, threads, options)
    curve = [(e["tokens"], e["val_loss"], e["bits_per_byte"]) for e in events if "val_loss" in e]
    tokens, loss, bits = curve[-1]
    row = {"recipe": recipe, "share": share, "seed": seed, "tokens": tokens}
    return row | {"val_loss": loss, "bits_per_byte": bits, "curve": curve}


def tokens_per_second(recipes: list[str], options: argparse.Namespace) -> dict[str, float]:
    """How fast each recipe trains alone on all cores: the best of a few short runs, taking turns."""
    best = dict.fromkeys(recipes, 0.0)
    for turn in range(SPEED_TURNS):
        for recipe in recipes:
            folder = options.out / "speed" / f"{recipe.replace(' ', '-')}-{turn}"
            events = run(recipe, SPEED_TOKENS, 1, folder, os.cpu_count() or 1, options)
            rates = [e["tokens_per_second"] for e in events if "tokens_per_second" in e]
            best[recipe] = max(best[recipe], statistics.median(rates))
    return best


def summarised(rows: list[dict], speed: dict[str, float]) -> list[dict]:
    """One row for each recipe and share: the mean over seeds, and the standard deviation of the loss.

    Args:
        speed: each recipe's tokens per second.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["share"]), []).append(row)
    summary = []
    for (recipe, share), same in groups.items():
        losses = [row["val_loss"] for row in same]
        means = {key: statistics.mean(row[key] for row in same) for key in ("tokens", "bits_per_byte")}
        means["seconds"] = means["tokens"] / speed[recipe]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        row = {"recipe": recipe, "share": share, "seeds": len(same), "val_loss": statistics.mean(losses)}
        summary.append(row | means | {"deviation": spread})
    return summary


def comparison(summary: list[dict], other: dict) -> list[str]:
    """What ours needs to reach the loss of another recipe's run, and what it learns in that run's seconds."""
    ours = sorted((row for row in summary if row["recipe"] == "ours"), key=lambda row: row["tokens"])
    first = f"{other['recipe']} has {other['val_loss']:.4f} after {other['tokens']:,.0f} tokens"
    lines = [f"{first} and {other['seconds']:.0f} s"]
    reached = next((row for row in ours if row["val_loss"] <= other["val_loss"]), None)
    if reached is not None:
        tokens, seconds = (reached[key] / other[key] for key in ("tokens", "seconds"))
        lines.append(
            f"ours has {reached['val_loss']:.4f} after {tokens:.2f} of the tokens and {seconds:.2f} of the seconds"
        )
    in_time = [row for row in ours if row["seconds"] <= other["seconds"]]
    if in_time:
        last = in_time[-1]
        lines.append(
            f"ours has {last['val_loss']:.4f} after {last['seconds']:.0f} s, the longest of its runs in that time"
        )
    return lines


def print_tables(summary: list[dict]) -> None:
    """Print the runs, and what ours needs to reach the loss of each other recipe."""
    print("| recipe | tokens | seeds | validation loss, nats/token (deviation) | bits per byte | seconds, alone |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in summary:
        loss = f"{row['val_loss']:.4f} ({row['deviation']:.4f}) | {row['bits_per_byte']:.4f}"
        print(f"| {row['recipe']} | {row['tokens']:,.0f} | {row['seeds']} | {loss} | {row['seconds']:,.0f} |")
    print()
    for row in summary:
        if row["recipe"] != "ours" and any(other["recipe"] == "ours" for other in summary):
            print("; ".join(comparison(summary, row)))


def draw(rows: list[dict], path: Path) -> None:
    """Draw every run's held-out bits per byte over its tokens, with a point where it ends, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    for row in rows:
        tokens, _, bits = zip(*row["curve"], strict=True)
        millions, colour = [count / 1e6 for count in tokens], f"C{recipes.index(row['recipe'])}"
        axes.plot(millions, bits, color=colour, alpha=0.5)
        axes.plot(millions[-1], bits[-1], "o", color=colour)
    for number, recipe in enumerate(recipes):
        axes.plot([], [], "o-", color=f"C{number}", label=TITLES[recipe])
    axes.set(title="What each recipe learns: a line is a run, which ends at its point")
    axes.set(xlabel="tokens trained on, millions", ylabel="bits per byte of held-out text (lower is better)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then print and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "dataset" / "classics_zh.bin", help="token file")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of the longest runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="recipes")
    parser.add_argument("--shares", type=float, nargs="+", help="run only these shares of --tokens")
    parser.add_argument("--extra", default="", help="settings on top of each recipe's, as YAML; give another --out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, except those that measure seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learning", help="folder for the runs")
    options = parser.parse_args()
    texts = options.data.with_suffix(".jsonl")
    if not options.data.exists() and texts.exists():
        process = [sys.executable, str(ROOT / "optimized_data_processing.py"), "--input_path", str(texts)]
        subprocess.run([*process, "--output_path", str(options.data)], check=True)
    options.data, options.out = options.data.resolve(), options.out.resolve()
    wanted = [
        (recipe, share, seed)
        for seed in options.seeds
        for recipe in options.only
        for share in RECIPES[recipe][1]
        if options.shares is None or share in options.shares
    ]
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda case: learned(*case, options), wanted):
            rows.append(row)
            print(f"{row['recipe']}, {row['tokens']:,} tokens, seed {row['seed']}: {row['val_loss']:.4f}", flush=True)
    print()
    print_tables(summarised(rows, tokens_per_second(options.only, options)))
    draw(rows, options.out / "learning.png")
    print(f"\ndrawn: {options.out / 'learning.png'}")


if __name__ == "__main__":
    main()

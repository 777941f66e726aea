"""How much a recipe learns from the same tokens, and in the same seconds.

    python benchmarks/learning.py
    python benchmarks/learning.py --tokens 10000000 --data my.bin --seeds 1 2 3 --jobs 2
    python benchmarks/learning.py --only ours --extra "dropout: 0.1"       # any setting on top of a recipe

Each run is `train.py` itself, with a schedule that ends with its tokens: a shorter run is a finished one, not a
piece of a longer one. Recipes differ in nothing but the settings that RECIPES shows. Compared are the loss and the bits
per byte on held-out samples, the same for all. Finished runs are kept and not run again: the command can be stopped and
repeated.
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
RECIPES = {  # name: settings, and the shares of --tokens that it is trained with
    "minimind": (
        # MiniMind v1's: Adam at 1e-4, no decay, no warm-up, a cosine to a tenth. (It does not shuffle; here it is.)
        {"optimizer_type": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "warmup_steps": 0, "batch_size": 4},
        (1.0,),
    ),
    "adamw 1e-3": (ADAMW | {"learning_rate": 1e-3}, (1.0,)),
    "adamw 2e-3": (ADAMW | {"learning_rate": 2e-3}, (1.0,)),
    "adamw 4e-3": (ADAMW | {"learning_rate": 4e-3}, (1.0,)),
    "ours": (
        {"optimizer_type": "muon", "learning_rate": 5e-3, "lr_scheduler": "linear", "min_lr": 0.0, "batch_size": 8},
        (0.1, 0.3, 0.5, 1.0),
    ),
}


def run(recipe: str, share: float, seed: int, options: argparse.Namespace) -> dict:
    """Train once, unless it was done before.

    Returns:
        recipe, share, seed, tokens, val_loss (nats a token), bits_per_byte, seconds (of training alone) and the curve:
        a list of (tokens, val_loss, bits_per_byte).
    """
    settings = RECIPES[recipe][0] | (yaml.safe_load(options.extra) or {})
    folder = options.out / f"{recipe.replace(' ', '-')}-{round(options.tokens * share)}-{seed}"
    row = {"recipe": recipe, "share": share, "seed": seed}
    steps = round(options.tokens * share / (settings["batch_size"] * MODEL["max_seq_len"]))
    fixed = {
        "max_steps": steps, "seed": seed, "eval_interval": max(1, steps // 8), "save_interval": steps,
        "log_interval": max(1, steps // 50), "out_dir": str(folder),
    }  # fmt: skip
    metrics = folder / "metrics.jsonl"
    if (
        not (folder / "best_model.pth").exists()
        or json.loads((folder / "status.json").read_text())["state"] != "finished"
    ):
        config = {"data": {"train_data_path": str(options.data)}, "model": MODEL, "training": settings | fixed}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "asked.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(folder / "asked.yaml")]
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": threads}, cwd=ROOT
            )
    events = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    curve = [(e["tokens"], e["val_loss"], e["bits_per_byte"]) for e in events if "val_loss" in e]
    speed = statistics.median(e["tokens_per_second"] for e in events if "tokens_per_second" in e)
    row |= {"tokens": curve[-1][0], "val_loss": curve[-1][1], "bits_per_byte": curve[-1][2]}
    return row | {"seconds": curve[-1][0] / speed, "curve": curve}


def summarised(rows: list[dict]) -> list[dict]:
    """One row for each recipe and share: the mean over seeds, and the standard deviation of the loss."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["share"]), []).append(row)
    summary = []
    for (recipe, share), same in groups.items():
        losses = [row["val_loss"] for row in same]
        means = {key: statistics.mean(row[key] for row in same) for key in ("tokens", "bits_per_byte", "seconds")}
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        row = {"recipe": recipe, "share": share, "seeds": len(same), "val_loss": statistics.mean(losses)}
        summary.append(row | means | {"deviation": spread})
    return summary


def tokens_to_reach(summary: list[dict], recipe: str, loss: float) -> str:
    """With how many tokens a recipe's own finished runs reach a loss: the first that does, "more" where none does."""
    runs = sorted((row for row in summary if row["recipe"] == recipe), key=lambda row: row["tokens"])
    return next((f"{row['tokens']:,.0f}" for row in runs if row["val_loss"] <= loss), "more")


def print_tables(summary: list[dict]) -> None:
    """Print the runs, and with how many tokens ours reaches the loss of each other recipe."""
    print(
        "| recipe | tokens | seeds | validation loss, nats a token (deviation) | bits per byte | seconds of training |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for row in summary:
        loss = f"{row['val_loss']:.4f} ({row['deviation']:.4f}) | {row['bits_per_byte']:.4f}"
        print(f"| {row['recipe']} | {row['tokens']:,.0f} | {row['seeds']} | {loss} | {row['seconds']:,.0f} |")
    print()
    for row in summary:
        if row["recipe"] != "ours" and any(other["recipe"] == "ours" for other in summary):
            reached = tokens_to_reach(summary, "ours", row["val_loss"])
            print(f"what {row['recipe']} has after {row['tokens']:,.0f} tokens, ours has after {reached}")


def draw(rows: list[dict], path: Path) -> None:
    """Draw every run's held-out bits per byte over its tokens, and the finished ones as points, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = {recipe: f"C{number}" for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows))}
    for row in rows:
        tokens, _, bits = zip(*row["curve"], strict=True)
        label = row["recipe"] if row["seed"] == rows[0]["seed"] and row["share"] == 1.0 else None
        axes.plot([t / 1e6 for t in tokens], bits, color=colours[row["recipe"]], alpha=0.5, label=label)
        axes.plot(tokens[-1] / 1e6, bits[-1], "o", color=colours[row["recipe"]])
    axes.set_xlabel("million tokens")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is not there yet, then print and draw all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "dataset" / "classics_zh.bin", help="token file")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of the longest runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="recipes")
    parser.add_argument("--shares", type=float, nargs="+", help="run only these shares of --tokens")
    parser.add_argument("--extra", default="", help="settings on top of each recipe's, as YAML; give another --out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; with more than 1 the seconds mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learning", help="folder for the runs")
    options = parser.parse_args()
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
        for row in pool.map(lambda case: run(*case, options), wanted):
            rows.append(row)
            print(f"{row['recipe']}, {row['tokens']:,} tokens, seed {row['seed']}: {row['val_loss']:.4f}", flush=True)
    print()
    print_tables(summarised(rows))
    draw(rows, options.out / "learning.png")
    print(f"\ndrawn: {options.out / 'learning.png'}")


if __name__ == "__main__":
    main()

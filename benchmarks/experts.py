"""Do experts pay? Dense and mixtures with as many active parameters, after equal tokens and after equal seconds.

    python benchmarks/experts.py
    python benchmarks/experts.py --shape wide --tokens 2000000 5000000 --seeds 1 2 --dtype float32
    python benchmarks/experts.py --shape wide --decode --formats bf16

Each run is `train.py` itself, with a schedule that ends with its tokens. First every contender trains for a few seconds
alone, in turns, which gives its tokens per second. Then all train on the same tokens; and, for each mixture, the dense
model on as many as it reads in the mixture's seconds. Finished runs are kept and not repeated, so the command can be
stopped and started again. With --decode instead: how fast a text is written by random weights of each shape, the
contender and the dense model taking turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decode_contenders

from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import Weights, save_weights

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "demo": {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 256, "vocab_size": 6400},
    "wide": {"dim": 512, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "max_seq_len": 256, "vocab_size": 6400},
}
HALF = {"n_active_experts": 2, "expert_hidden_dim": 1 / 2}  # shares of the dense width
CONTENDERS = {  # name: fields of the shape, settings of training
    "dense": ({}, {}),
    "8 experts, 2 active": ({"n_experts": 8} | HALF, {}),
    "8 experts, 2 active, bias": ({"n_experts": 8, "expert_score": "sigmoid", "expert_bias": True} | HALF, {}),
    "16 experts, 4 active": ({"n_experts": 16, "n_active_experts": 4, "expert_hidden_dim": 1 / 4}, {}),
    "4 experts, 2 active": ({"n_experts": 4} | HALF, {}),
    "8 experts, 1 active, 1 shared": (
        {"n_experts": 8, "n_active_experts": 1, "n_shared_experts": 1, "expert_hidden_dim": 1 / 2}
        | {"normalize_expert_weights": False},
        {},
    ),
    "8 experts, 2 active, no balance": ({"n_experts": 8} | HALF, {"balance_loss": 0.0}),
}
TRAINING = {"optimizer_type": "muon", "learning_rate": 5e-3, "lr_scheduler": "linear", "batch_size": 8}
SPEED_STEPS, SPEED_TURNS = 40, 3
ROW = "| {} | {} | {} | {} | {} | {} | {} |"
WRITING_ROW = "| {} | {} | {} | {} | {} | {} |"
FORMATS = ("fp32", "bf16", "int8")
WRITTEN_TOKENS, PROMPT_TOKENS, TEXT_TURNS = 128, 32, 9


def shape_of(name: str, options: argparse.Namespace) -> dict:
    """The section `model` of a contender."""
    dense = SHAPES[options.shape]
    fields = dict(CONTENDERS[name][0])
    if "expert_hidden_dim" in fields:
        fields["expert_hidden_dim"] = int(LMConfig(**dense).hidden_dim * fields["expert_hidden_dim"])
    return dense | fields


def train(name: str, steps: int, seed: int, folder: Path, options: argparse.Namespace) -> list[dict]:
    """Train once, unless that was done before; returns the lines of `metrics.jsonl`."""
    fixed = {"max_steps": steps, "seed": seed, "eval_interval": steps, "save_interval": steps, "dtype": options.dtype}
    fixed |= {"log_interval": max(1, steps // 20), "out_dir": str(folder)}
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text(encoding="utf-8"))["state"] != "finished":
        training = TRAINING | CONTENDERS[name][1] | fixed
        config = {
            "data": {"train_data_path": str(options.data)},
            "model": shape_of(name, options),
            "training": training,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "asked.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(folder / "asked.yaml")]
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=ROOT, env=os.environ)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tokens_per_second(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """How fast each contender trains alone: the best of a few short runs, taking turns."""
    best = dict.fromkeys(names, 0.0)
    for turn in range(SPEED_TURNS):
        for name in names:
            events = train(name, SPEED_STEPS, 1, options.out / "speed" / f"{file_name(name)}-{turn}", options)
            rates = [event["tokens_per_second"] for event in events if "tokens_per_second" in event]
            best[name] = max(best[name], statistics.median(rates))
    return best


def learned(name: str, tokens: float, options: argparse.Namespace) -> tuple[list[float], dict]:
    """The held-out losses of all seeds after so many tokens, and the last line that has the experts' loads."""
    step_tokens = TRAINING["batch_size"] * SHAPES[options.shape]["max_seq_len"]
    steps, losses, last = max(1, round(tokens / step_tokens)), [], {}
    for seed in options.seeds:
        events = train(name, steps, seed, options.out / f"{file_name(name)}-{steps}-{seed}", options)
        losses.append([event["val_loss"] for event in events if "val_loss" in event][-1])
        last = next((event for event in reversed(events) if "dead_experts" in event), {})
    return losses, last


def file_name(name: str) -> str:
    """A contender's name without what a shell would take apart."""
    return name.replace(", ", "-").replace(" ", "_")


def shown(losses: list[float]) -> str:
    """Mean and, of several seeds, the standard deviation."""
    spread = f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.4f}{spread}"


def writer(name: str, weights_format: str, options: argparse.Namespace):
    """What decode.py calls a contender: writes one text by the compiled step with random weights of that shape."""
    config = LMConfig(**shape_of(name, options))
    torch.manual_seed(0)
    model = Transformer(config)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "weights.pth", Weights(model.state_dict(), config))
        order = {"folder": folder, "format": weights_format, "kind": "compiled", "device": "cpu"}
        order |= {"batch": 1, "prompt": PROMPT_TOKENS, "vocab_size": config.vocab_size}
        return decode_contenders.ours(argparse.Namespace(**order))


def compare_writing(names: list[str], options: argparse.Namespace) -> None:
    """Print, for each format, how long each model takes to the first token (a mixture reads the experts of all of the
    prompt's tokens, which are most of them), its tokens a second after that, and the ratios of a mixture's times to
    dense's."""
    titles = ("format", "model", "to the first token", "then, tok/s", "times dense's seconds", "whole text")
    print(WRITING_ROW.format(*titles), "|---|---|---:|---:|---:|---:|", sep="\n")
    for weights_format in options.formats:
        writers = {name: writer(name, weights_format, options) for name in names}
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        for turn in range(TEXT_TURNS + 1):
            for name, write in writers.items():
                first, whole, _ = write(WRITTEN_TOKENS)
                if turn:  # the first one compiles
                    times[name].append((first, whole - first, whole))
        for name in names:
            first, then, _ = map(statistics.median, zip(*times[name], strict=True))
            ratios = [
                [a / b for a, b in zip(*pair, strict=True)] for pair in zip(times[name], times["dense"], strict=True)
            ]
            _, after, whole = map(statistics.median, zip(*ratios, strict=True))
            rate = (WRITTEN_TOKENS - 1) / then
            cells = weights_format, name, f"{1e3 * first:.1f} ms", f"{rate:,.0f}", f"{after:.2f}", f"{whole:.2f}"
            print(WRITING_ROW.format(*cells), flush=True)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "dataset" / "classics_zh.bin", help="token file")
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[600_000, 2_000_000], help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="beside dense")
    parser.add_argument("--dtype", default="bfloat16", help="of the matrix products")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "experts", help="folder for the runs")
    parser.add_argument("--decode", action="store_true", help="instead: compare how fast texts are written")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of --decode [all]")
    options = parser.parse_args()
    options.data, options.out = options.data.resolve(), (options.out / options.shape).resolve()
    names = list(dict.fromkeys(["dense", *options.only]))
    if options.decode:
        compare_writing(names, options)
        return
    speed = tokens_per_second(names, options)
    titles = (
        "model",
        "parameters, active",
        "tokens",
        "loss",
        "tokens/s alone",
        "dense in its seconds",
        "load, dead experts",
    )
    print(ROW.format(*titles), "|---|---|---:|---:|---:|---:|---|", sep="\n")
    for tokens in options.tokens:
        for name in names:
            model = Transformer(LMConfig(**shape_of(name, options)))
            size = f"{model.parameter_count() / 1e6:.2f}M, {model.active_parameter_count() / 1e6:.2f}M"
            losses, last = learned(name, tokens, options)
            dense, loads = "", ""
            if name != "dense":
                dense = shown(learned("dense", tokens * speed["dense"] / speed[name], options)[0])
                loads = f"{last['expert_load_min']:.2f} to {last['expert_load_max']:.2f}, {last['dead_experts']}"
            print(ROW.format(name, size, f"{tokens:,}", shown(losses), f"{speed[name]:,.0f}", dense, loads), flush=True)


if __name__ == "__main__":
    main()

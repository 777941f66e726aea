"""The page that `train.py --config … --dry_run --on 8xH100` prints."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.LMConfig import LMConfig
from model.storage.files import size_text
from model.text.tokenization import open_tokenizer, vocabulary_size
from model.training.absent_gpu import AbsentGPU
from model.training.data import TrainingData
from model.training.devices import Cluster
from model.training.forecast import (
    LINK_REACHED,
    WRITER_BANDWIDTH,
    Forecast,
    ModelCost,
    forecast,
    made_to_fit,
    model_cost,
    reached_share,
    ways_on,
)
from model.training.memory import CLOSE
from model.training.plan import Hardware
from model.training.recipe import (
    MOST_TOKENS,
    automatic_batch_size,
    automatic_epochs,
    automatic_tokens_per_step,
    batch_text,
    count_text,
    duration_text,
    rough_duration_text,
)
from model.training.report import aligned, model_text
from model.training.settings import AUTO, Settings, TrainingSettings

NO_GAIN = 1.05  # a way that is slower by less is chosen where it is simpler


@dataclass(frozen=True)
class RunForecast:
    """What a run would take on a cluster, one forecast for each way."""

    cluster: Cluster
    config: LMConfig
    training: TrainingSettings  # with the batch_size and the epochs that are assumed where they are auto
    cost: ModelCost
    steps: int | None  # None: nothing says how many
    forecasts: list[Forecast]

    @property
    def tokens_per_step(self) -> int:
        t = self.training
        return t.batch_size * t.accumulation_steps * self.cluster.gpus * self.config.max_seq_len

    @property
    def checkpoint_bytes(self) -> int:
        memory = self.cost.memory
        return memory.weights + memory.average + memory.optimizer


def forecast_run(settings: Settings, cluster: Cluster, say: Callable[[str], None]) -> RunForecast:
    """Forecast a run from its settings and, if it is there, its token file; nothing is made or written.

    Args:
        say: prints one line for the user.

    Raises:
        InputError: the tokenizer or the token file cannot be used.
    """
    settings = copy.deepcopy(settings)
    data = TrainingData(settings, verify=False, say=say) if Path(settings.data.train_data_path).exists() else None
    if data is None:
        config = settings.lm_config(vocabulary_size(open_tokenizer(settings.data.tokenizer_path)))
    else:
        config = data.config
        settings.training.document_mask |= data.is_chat
    training = settings.training
    dtype = getattr(torch, training.dtype)
    if dtype == torch.bfloat16 and not cluster.device.has_bfloat16:
        dtype = torch.float16
    cost = model_cost(config, training, Hardware(torch.device("cuda"), dtype, AbsentGPU(dtype)))
    training = _without_auto(training, cluster, cost, config.max_seq_len, data)
    micro_batches, length = training.accumulation_steps, config.max_seq_len
    return RunForecast(
        cluster=cluster,
        config=config,
        training=training,
        cost=cost,
        steps=_steps(training, cluster, data),
        forecasts=[
            forecast(way, cluster, cost, training.batch_size, micro_batches, length) for way in ways_on(cluster)
        ],
    )


def _without_auto(
    training: TrainingSettings, cluster: Cluster, cost: ModelCost, length: int, data: TrainingData | None
) -> TrainingSettings:
    """The epochs and the batch_size that `auto` would come to there; without data, for the largest step."""
    epochs, samples = training.epochs, MOST_TOKENS if data is None else len(data.train_samples)
    if epochs == AUTO:
        kind = "texts" if data is None or not data.is_chat else "pairs" if data.is_pairs else "chats"
        epochs, _ = automatic_epochs(kind, samples * length)
    rows = training.batch_size
    if rows == AUTO:
        shares = training.accumulation_steps * cluster.gpus
        tokens = MOST_TOKENS
        if data is not None:
            tokens, _ = automatic_tokens_per_step(samples * length, epochs, training.max_steps)
        fits = max(forecast(way, cluster, cost, 1, 1, length).most_rows for way in ways_on(cluster) if way.exists)
        rows = automatic_batch_size(tokens, length * shares, max(1, samples // shares), fits)
    return dataclasses.replace(training, epochs=epochs, batch_size=rows)


def _steps(training: TrainingSettings, cluster: Cluster, data: TrainingData | None) -> int | None:
    if training.max_steps is not None or data is None:
        return training.max_steps
    rows_per_step = training.batch_size * training.accumulation_steps * cluster.gpus
    return data.order(training.seed, rows_per_step).steps_left(0, training.epochs)


def forecast_lines(run: RunForecast, data_path: str) -> list[str]:
    """The page, line by line.

    Args:
        data_path: of the token file, for where it is missing.
    """
    return [
        *aligned([*_cluster_rows(run), *_run_rows(run, data_path)]),
        "",
        *_table(run),
        "",
        *_advice(run),
    ]


def _cluster_rows(run: RunForecast) -> list[tuple[str, str]]:
    c, d, gpus = run.cluster, run.cluster.device, run.cluster.gpus
    nodes = f": {c.nodes:,} nodes of {c.gpus_per_node:,}" if c.nodes > 1 else ""
    link = f"; each way {size_text(d.link)}/s between GPUs" if gpus > 1 else ""
    network = f", {size_text(d.network)}/s a GPU between nodes" if c.nodes > 1 else ""
    sheet = f"{size_text(d.memory)}, {d.flops / 1e12:,.0f} TFLOP/s, memory {size_text(d.memory_bandwidth)}/s"
    links = f" and {LINK_REACHED:.0%} of the links" if gpus > 1 else ""
    assumed = f"{reached_share(run.cost.parameters):.0%} of the FLOP/s{links} are reached"
    rows = [
        ("on", f"{gpus:,} x {c.name}{nodes}"),
        ("data sheet", f"{sheet}{link}{network}"),
        ("assumed", f"{assumed}; all below is computed, nothing was measured there"),
        ("dtype", _dtype_text(run)),
    ]
    return rows if d.is_supported else [*rows, ("but", f"this version does not train on {c.name}")]


def _dtype_text(run: RunForecast) -> str:
    asked = run.training.dtype
    if asked == "float32":
        return "float32; the FLOP/s are of 16 bits, so computing takes several times as long as said here"
    return "float16, since it has no bfloat16" if asked == "bfloat16" and not run.cluster.device.has_bfloat16 else asked


def _run_rows(run: RunForecast, data_path: str) -> list[tuple[str, str]]:
    t, cost, tokens = run.training, run.cost, run.tokens_per_step
    batch = batch_text(t.batch_size, t.accumulation_steps, run.cluster.gpus)
    rows = [
        ("parameters", model_text(run.config, cost.parameters)),
        ("a step", f"{tokens:,} tokens ({batch} samples of {run.config.max_seq_len})"),
    ]
    if run.steps is None:
        unknown = f"unknown: there is no {data_path}, and max_steps is null; give one of them to learn the time"
        return [*rows, ("steps", unknown)]
    flops = run.steps * tokens * cost.flops_per_token
    return [*rows, ("steps", f"{run.steps:,}: {count_text(run.steps * tokens)} tokens, {flops:.2e} FLOPs")]


def _table(run: RunForecast) -> list[str]:
    """The ways side by side."""
    forecasts, gpus = run.forecasts, run.cluster.gpus

    def row(name: str, of: Callable[[Forecast], str]) -> tuple[str, ...]:
        return (name, *map(of, forecasts))

    def size(of: Callable[[Forecast], float]) -> Callable[[Forecast], str]:
        return lambda f: size_text(of(f))

    def seconds(of: Callable[[Forecast], float]) -> Callable[[Forecast], str]:
        return lambda f: f"{of(f):.3g} s"

    rows = [
        row("each GPU holds", lambda f: f.way.name + ("" if f.way.exists else "*")),
        row("  weights", size(lambda f: f.memory.weights)),
        row("  gradients", size(lambda f: f.memory.gradients)),
        row("  optimizer", size(lambda f: f.memory.optimizer)),
        *([row("  moving average", size(lambda f: f.memory.average))] if run.training.use_ema else []),
        *([row("  for the exchange", size(lambda f: f.buffers))] if gpus > 1 else []),
        row("  activations", size(lambda f: f.memory.activations)),
        row("  together", size(lambda f: f.together)),
        row(f"fits in {CLOSE:.0%} of it", lambda f: "yes" if f.fits else "no"),
        row("largest batch_size", lambda f: f"{f.most_rows:,}"),
        row("a step", lambda f: ""),
        *([row("  sent by a GPU", size(lambda f: f.sent))] if gpus > 1 else []),
        *([row("  exchange", seconds(lambda f: f.exchanging))] if gpus > 1 else []),
        *([row("  not hidden", seconds(lambda f: f.waiting))] if gpus > 1 else []),
        row("  computing", seconds(lambda f: f.computing)),
        row("  update", seconds(lambda f: f.updating)),
        row("  together", seconds(lambda f: f.step_seconds)),
        row("tokens/s", lambda f: count_text(run.tokens_per_step / f.step_seconds)),
    ]
    if run.steps is not None:
        rows.append(row("the run", lambda f: rough_duration_text(run.steps * f.step_seconds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]


def _advice(run: RunForecast) -> list[str]:
    lines = [_checkpoint_line(run)]
    if run.cluster.gpus > 1:
        lines += [f"{f.way.name}: {f.way.about}" for f in run.forecasts]
    if not all(f.way.exists for f in run.forecasts):
        lines.append("*: not in this version")
    return [*lines, "", *_choice_lines(run)]


def _checkpoint_line(run: RunForecast) -> str:
    writers, one = run.cluster.gpus_per_node, run.checkpoint_bytes / WRITER_BANDWIDTH
    several = f"; in {duration_text(one / writers)} by {writers}, not in this version" if writers > 1 else ""
    return (
        f"checkpoint: {size_text(run.checkpoint_bytes)}, written in {duration_text(one)} by one process at"
        f" {size_text(WRITER_BANDWIDTH)}/s, while training goes on{several}"
    )


def _choice_lines(run: RunForecast) -> list[str]:
    """Which way to choose and why; and which in this version, where it cannot train so."""
    length = run.config.max_seq_len
    able = [made_to_fit(found, run.cluster, run.cost, length) for found in run.forecasts]
    able = [found for found in able if found is not None]
    if not able:
        return [f"choose a smaller model or larger GPUs: in no way does one sample fit {CLOSE:.0%} of their memory"]
    best = _simplest_of_fastest(able)
    if run.cluster.gpus == 1:
        return [_fit_text(best, run)]
    lines = [f"choose {best.way.name}: {'; '.join(_reasons(best, able, run))}"]
    if not best.way.exists:
        ours = [found for found in able if found.way.exists]
        fitting = f"{ours[0].way.name}: {'; '.join(_reasons(ours[0], ours[:1], run))}" if ours else "none of them fits"
        lines.append(f"in this version: {fitting}")
    return lines


def _fit_text(found: Forecast, run: RunForecast) -> str:
    held = f"{size_text(found.together)} of {size_text(run.cluster.device.memory)}"
    if found.rows == run.training.batch_size:
        return f"it fits ({held})"
    smaller = f"with batch_size {found.rows:,} and accumulation_steps {found.micro_batches:,}"
    return f"{smaller}, the same step, it fits ({held})"


def _simplest_of_fastest(able: list[Forecast]) -> Forecast:
    """The first way that is nearly as fast as the fastest one: they stand in the order of what they need."""
    fastest = min(found.step_seconds for found in able)
    return next(found for found in able if found.step_seconds <= NO_GAIN * fastest)


def _reasons(chosen: Forecast, able: list[Forecast], run: RunForecast) -> list[str]:
    """Why this way: that it fits, and what is wrong with each simpler one."""
    reasons = [_fit_text(chosen, run)]
    by_name = {found.way.name: found for found in able}
    for asked in run.forecasts[: [found.way for found in run.forecasts].index(chosen.way)]:
        other = by_name.get(asked.way.name)
        if other is None:
            reasons.append(f"{asked.way.name} fits with no batch_size")
        else:
            reasons.append(f"{other.way.name} takes {other.step_seconds / chosen.step_seconds - 1:.0%} longer")
    if len(able) > 1 and chosen is able[0]:
        reasons.append(f"no other way is more than {NO_GAIN - 1:.0%} faster")
    return reasons

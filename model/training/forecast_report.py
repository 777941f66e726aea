"""The page that `train.py --config … --dry_run --on 8xH100` prints."""

from collections.abc import Callable

from model.storage.files import size_text
from model.training.forecast import LINK_REACHED, WRITER_BANDWIDTH, Forecast, Way, reached_share
from model.training.memory import CLOSE
from model.training.recipe import batch_text, count_text, duration_text
from model.training.report import aligned, model_text
from model.training.run_forecast import RunForecast

NO_GAIN = 1.1  # a way that is slower by less is chosen where it is simpler


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
    assumed = f"{reached_share(run.cost.active_parameters):.0%} of the FLOP/s{links} are reached"
    rows = [
        ("on", f"{gpus:,} x {c.name}{nodes}"),
        ("data sheet", f"{sheet}{link}{network}"),
        ("assumed", f"{assumed}; all below is computed, nothing was measured there"),
        ("dtype", _dtype_text(run)),
    ]
    return [*rows, ("but", f"{c.name} was tried with a simulated device only")] if d.is_simulated else rows


def _dtype_text(run: RunForecast) -> str:
    asked = run.training.dtype
    if asked == "float32":
        return "float32; the FLOP/s are of 16 bits, so computing takes several times as long as said here"
    return "float16, since it has no bfloat16" if asked == "bfloat16" and not run.cluster.device.has_bfloat16 else asked


def _run_rows(run: RunForecast, data_path: str) -> list[tuple[str, str]]:
    t, cost, tokens = run.training, run.cost, run.tokens_per_step
    batch = batch_text(t.batch_size, t.accumulation_steps, run.cluster.gpus)
    rows = [
        ("parameters", model_text(run.config, cost.parameters, cost.active_parameters)),
        ("a step", f"{tokens:,} tokens ({batch} samples of {run.config.max_seq_len})"),
    ]
    if run.steps is None:
        unknown = f"unknown: there is no {data_path}, and max_steps is null; give one of them to learn the time"
        return [*rows, ("steps", unknown)]
    flops = run.steps * tokens * cost.flops_per_token
    return [*rows, ("steps", f"{run.steps:,}: {count_text(run.steps * tokens)} tokens, {flops:.2e} FLOPs")]


def _table(run: RunForecast) -> list[str]:
    """The ways side by side: a row for each name, with what it is of each way."""
    several, averages, ends = run.cluster.gpus > 1, run.training.use_ema, run.steps is not None
    rows: list[tuple[bool, str, Callable[[Forecast], str]]] = [  # whether to show it, its name, its cells
        (True, "each GPU holds", lambda f: f.way.name),
        (True, "  weights", lambda f: size_text(f.memory.weights)),
        (True, "  gradients", lambda f: size_text(f.memory.gradients)),
        (True, "  optimizer", lambda f: size_text(f.memory.optimizer)),
        (averages, "  moving average", lambda f: size_text(f.memory.average)),
        (several, "  for the exchange", lambda f: size_text(f.buffers)),
        (True, "  activations", lambda f: size_text(f.memory.activations)),
        (True, "  together", lambda f: size_text(f.together)),
        (True, f"fits in {CLOSE:.0%} of memory", lambda f: "yes" if f.fits else "no"),
        (True, "largest batch_size", lambda f: f"{f.most_rows:,}"),
        (True, "a step", lambda f: ""),
        (several, "  sent by a GPU", lambda f: size_text(f.sent)),
        (several, "  exchange", lambda f: f"{f.exchanging:.3g} s"),
        (True, "  computing", lambda f: f"{f.computing:.3g} s"),
        (True, "  update", lambda f: f"{f.updating:.3g} s"),
        (True, "  together", lambda f: f"{f.step_seconds:.3g} s"),
        (several, "  if nothing overlaps", lambda f: f"{f.worst_seconds:.3g} s"),
        (True, "tokens/s", lambda f: count_text(run.tokens_per_step / f.step_seconds)),
        (ends, "the run", lambda f: duration_text(run.steps * f.step_seconds)),
        (ends and several, "  if nothing overlaps", lambda f: duration_text(run.steps * f.worst_seconds)),
    ]
    cells = [(name, *map(of, run.forecasts)) for is_shown, name, of in rows if is_shown]
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))]).rstrip()
        for name, *row in cells
    ]


def _advice(run: RunForecast) -> list[str]:
    lines = [_checkpoint_line(run)]
    if run.cluster.gpus > 1:
        lines += [f"{f.way.name}: {f.way.about}" for f in run.forecasts]
    return [*lines, "", *_choice_lines(run)]


def _checkpoint_line(run: RunForecast) -> str:
    writers, one = run.cluster.gpus_per_node, run.checkpoint_bytes / WRITER_BANDWIDTH
    several = f"; in {duration_text(one / writers)} by {writers} (checkpoint_writers all)" if writers > 1 else ""
    return (
        f"checkpoint: {size_text(run.checkpoint_bytes)}, written in {duration_text(one)} by one process at"
        f" {size_text(WRITER_BANDWIDTH)}/s, while training goes on{several}"
    )


def _choice_lines(run: RunForecast) -> list[str]:
    """Which way to choose and why."""
    fitting, ways = run.fitting, [found.way for found in run.forecasts]
    if not fitting:
        return [f"choose a smaller model or larger GPUs: no way fits one sample into {CLOSE:.0%} of their memory"]
    best = _simplest_of_fastest(fitting)
    if run.cluster.gpus == 1:
        return [_fit_text(best, run)]
    return [f"choose {_choice_text(fitting, ways, run)}"]


def _simplest_of_fastest(fitting: list[Forecast]) -> Forecast:
    """The first way that is nearly as fast as the fastest one: the simplest ones come first.

    They are compared as if nothing overlapped: how much does, only the machine itself can tell.
    """
    fastest = min(found.worst_seconds for found in fitting)
    return next(found for found in fitting if found.worst_seconds <= NO_GAIN * fastest)


def _choice_text(fitting: list[Forecast], ways: list[Way], run: RunForecast) -> str:
    """The way to choose: that it fits, and what is wrong with each simpler one.

    Args:
        fitting: those to choose from, at least one.
        ways: those that are considered, the simplest ones first; some of them may not fit.
    """
    chosen, by_way = _simplest_of_fastest(fitting), {found.way: found for found in fitting}
    reasons = [_fit_text(chosen, run)]
    for way in ways[: ways.index(chosen.way)]:
        if way in by_way:
            reasons.append(f"{way.name} takes {by_way[way].worst_seconds / chosen.worst_seconds - 1:.0%} longer")
        else:
            reasons.append(f"{way.name} does not fit with any batch_size")
    if len(fitting) > 1 and chosen is fitting[0]:
        reasons.append(f"no other way is more than {NO_GAIN - 1:.0%} faster")
    return f"{chosen.way.name}: {'; '.join(reasons)}"


def _fit_text(found: Forecast, run: RunForecast) -> str:
    held = f"{size_text(found.together)} of {size_text(run.cluster.device.memory)}"
    if found.rows == run.training.batch_size:
        return f"it fits ({held})"
    smaller = f"with batch_size {found.rows:,} and accumulation_steps {found.micro_batches:,}"
    return f"{smaller}, the same step, it fits ({held})"

"""What a run reports about itself: at its start, while it trains, and as a page for `train.py --config … --dry_run`."""

import time
from collections.abc import Callable
from pathlib import Path

from model import accelerator
from model.dataset import PretrainDataset
from model.errors import counted
from model.LMConfig import LMConfig
from model.storage.files import free_bytes, size_text
from model.training.clock import EVALUATION_SHARE
from model.training.expectation import Outlook
from model.training.memory import free_memory, step_memory
from model.training.plan import RunPlan
from model.training.progress import Progress, StepResult
from model.training.recipe import MOST_BY_HEART, batch_text, count_text, duration_text, rough_duration_text

MEASURED_SECONDS, MOST_STEPS = 5.0, 50  # the dry run measures for this long or for this many steps, and at least one


def describe(plan: RunPlan) -> list[str]:
    """The model, the data and the schedule, one line each; one if a step has more rows than there are samples, and one
    if early_stopping cannot stop the run."""
    t, schedule = plan.training, plan.schedule
    size = _parameters_text(plan.parameters, plan.active_parameters)
    model = (
        f"model: {size}; {plan.flops_per_token / 1e6:,.0f} MFLOP per token; mfu is the share of"
        f" the {plan.hardware.peak_flops / 1e9:,.0f} GFLOP/s that matrix products reach here"
    )
    rows = f"{t.batch_size} x {t.accumulation_steps} accumulated x {counted(plan.world_size, 'process', 'processes')}"
    if t.global_batch_size is not None:
        rows = f"global_batch_size, at most {rows}"
    decides = f"epochs {t.epochs}" if t.max_steps is None else f"max_steps, which overrides epochs {t.epochs}"
    data = (
        f"data: {counted(plan.train_samples, 'sample')} of {counted(plan.config.max_seq_len, 'token')}; a step reads"
        f" {plan.order.rows_per_step} ({rows}); {counted(plan.order.steps_per_epoch, 'step')} per epoch,"
        f" {plan.total_steps:,} in total ({decides})"
    )
    rise = f"{counted(schedule.warmup_steps, 'step')} up to" if schedule.warmup_steps else "from"
    rate = (
        f"schedule: {rise} {t.learning_rate:g}, then down to {schedule.min_lr:g} ({t.lr_scheduler});"
        f" {t.optimizer_type}{f', clipped at {t.grad_clip:g}' if t.grad_clip else ''}{', EMA' if t.use_ema else ''}"
    )
    lines = [model, data, rate] if not t.lora_rank else [model, f"lora: {_adapters_text(plan)}", data, rate]
    if plan.config.n_experts:
        lines.insert(1, f"experts: {_experts_text(plan)}")
    if plan.outlook is not None and len(plan.val_samples) and plan.steps_done == 0:
        lines.append(f"expected: {_expected_text(plan.outlook)}")
    if plan.by_heart and plan.steps_done == 0:
        lines.append(f"expected: {_by_heart_text(plan)}")
    if plan.is_fully_sharded:
        lines.append(_shared_text(plan))
    if (line := _patience_line(plan)) is not None:
        lines.append(line)
    padding = plan.order.rows_per_step - plan.train_samples
    if padding > 0:
        most = max(1, plan.train_samples // (t.accumulation_steps * plan.world_size))
        remedy = f"lower batch_size to {most:,}" if t.batch_size > most else "fewer processes would do"
        lines.append(
            f"batch_size: {padding:,} of the {plan.order.rows_per_step:,} rows of each step are padding, since an epoch"
            f" has only {counted(plan.train_samples, 'sample')}; {remedy}"
        )
    return lines


def _patience_line(plan: RunPlan) -> str | None:
    """Where early_stopping cannot stop the run, which evaluates too rarely: a line that says so, and what helps."""
    t, evaluations = plan.training, plan.evaluations_left(0)
    needed = t.patience + 2  # the first one is always a gain, and with the last one the run ends anyway
    if not t.early_stopping or not 0 < evaluations < needed:
        return None
    most = (plan.total_steps - 1) // (needed - 1)
    remedy = f"lower eval_interval ({t.eval_interval:,}) to {most:,}, or patience" if most else "lower patience"
    return (
        f"early_stopping: it cannot stop this run: patience {t.patience:,} takes at least {needed:,} evaluations,"
        f" and this run has {evaluations:,}; {remedy}"
    )


def _expected_text(outlook: Outlook) -> str:
    expected = f"{outlook.at_end} bits per byte of held-out text at the end"
    return f"{expected}, as texts differ, with --recipe best or settings as good (docs/training.md)"


def _by_heart_text(plan: RunPlan) -> str:
    tokens = plan.train_samples * plan.config.max_seq_len
    passes, text = plan.total_steps * plan.tokens_per_step / tokens, count_text(tokens)
    fewer = "epochs" if plan.training.max_steps is None else "--max_steps null --epochs auto"
    return (
        f"in {passes:.1f} passes, {plan.active_parameters:,} parameters will learn {text} tokens by heart;"
        f" at most {MOST_BY_HEART} passes ({fewer}), more text or a smaller model help (docs/training.md)"
    )


def _shared_text(plan: RunPlan) -> str:
    """Who holds what, where processes share the weights."""
    replicas = plan.world_size // plan.shards
    of = f", and {replicas} such groups are replicas" if replicas > 1 else ""
    return (
        f"shard {plan.training.shard}: {plan.shards} processes share one copy of weights, gradients and optimizer{of};"
        " sample texts are written on rank 0's CPU"
    )


def _parameters_text(parameters: int, active: int) -> str:
    """How many parameters a model has, and how many of them compute a token."""
    return f"{parameters:,} parameters" + (f", {active:,} of them active" if active < parameters else "")


def _experts_text(plan: RunPlan) -> str:
    """How many experts there are, and what balances them."""
    c, t = plan.config, plan.training
    shared = f" beside {counted(c.n_shared_experts, 'shared expert')}" if c.n_shared_experts else ""
    by = []
    if t.balance_loss > 0:
        by.append(f"a loss that counts {t.balance_loss:g}")
    if c.expert_bias and t.expert_bias_rate and not t.lora_rank:
        by.append(f"a bias that each step moves by {t.expert_bias_rate:g}")
    balanced = f"balanced by {' and '.join(by)}" if by else "balanced by nothing"
    rate = "routers are frozen" if t.lora_rank else f"routers learn at {t.router_rate * t.learning_rate:g}"
    return f"a token passes through {c.n_active_experts} of {c.n_experts} in each layer{shared}; {balanced}; {rate}"


def _adapters_text(plan: RunPlan) -> str:
    t, share = plan.training, plan.trained_parameters / plan.parameters
    return (
        f"rank {t.lora_rank}, alpha {t.lora_alpha:g}: {plan.trained_parameters:,} parameters are trained, {share:.2%}"
        " of the model's, which are frozen; files of weights hold both, merged"
    )


def preference_line(measured: dict) -> str:
    """How well pairs of answers are told apart, and how probable the chosen ones are."""
    return (
        f"{measured['val_accuracy']:.1%} of the chosen answers above the rejected ones, margin"
        f" {measured['val_margin']:.3f}; a chosen answer's log-probability is"
        f" {measured['val_chosen_log_probability']:.2f}, {measured['val_chosen_log_probability_per_token']:.3f} a token"
    )


def evaluation_lines(progress: Progress, measured: dict, is_chat: bool) -> list[str]:
    """What an evaluation measured, and whether it is the best so far.

    Args:
        progress: which has counted this evaluation.
        measured: as metrics.jsonl has it.
    """
    first, *more = measured_lines(f"step {progress.step:,}: ", measured, is_chat)
    is_best = progress.evaluations_without_gain == 0
    return [first + (", the best so far" if is_best else f" (best: {progress.best_val_loss:.4f})"), *more]


def measured_lines(when: str, measured: dict, is_chat: bool) -> list[str]:
    """The losses of an evaluation, of which there is one at least: of held-out samples, of held-out texts.

    Args:
        when: what the first line begins with.
        measured: as metrics.jsonl has it.
    """
    lines = []
    if "val_loss" in measured:
        line = f"validation loss {measured['val_loss']:.4f}"
        if "bits_per_byte" in measured:
            line += f", {measured['bits_per_byte']:.4f} bits per byte{' of the answers' if is_chat else ''}"
        lines.append(line)
    if "val_accuracy" in measured:
        lines.append(preference_line(measured))
    if "text_bits_per_byte" in measured:
        lines.append(f"{measured['text_bits_per_byte']:.4f} bits per byte of held-out texts of mix_data_path")
    return [when + lines[0], *(f"    {line}" for line in lines[1:])]


def position(plan: RunPlan, progress: Progress, data: PretrainDataset, seconds: float) -> dict[str, float]:
    """Where the run is, as metrics.jsonl has it.

    Args:
        data: that is trained on.
        seconds: spent on the run.
    """
    return {
        "step": progress.step,
        "epoch": round(progress.samples / plan.train_samples, 4),
        "tokens": plan.order.count_targets(progress.samples, data),
        "elapsed": round(seconds, 2),
    }


def step_metrics(
    plan: RunPlan, progress: Progress, result: StepResult, loss: float, tokens_per_second: float
) -> dict[str, float]:
    """The last step and the mean of those since the last line, as metrics.jsonl has them."""
    return {
        "loss": loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": round(tokens_per_second * plan.flops_per_token / plan.peak_flops, 4),
        "skipped_steps": progress.skipped_steps,
    } | dict(result.measured)


def bar_text(seconds_left: float | None, loss: float, tokens_per_second: float) -> str:
    """What stands beside the bar: the time left, once it is known, the loss and the speed."""
    time_left = f"{rough_duration_text(seconds_left)} left, " if seconds_left else ""
    return f"{time_left}loss {loss:.3f}, {tokens_per_second:,.0f} tok/s"


def dry_run(plan: RunPlan, measure: Callable[[float, int], float]) -> list[str]:
    """Measure a few real steps and describe the run. Nothing is written; every process of the run must call it.

    Args:
        measure: (seconds, most steps) -> tokens per second of all processes; trains for that long, at least one step.

    Returns:
        lines to print: name and value, the values aligned.

    Raises:
        TrainingDiverged, ProcessLost: as training itself.
    """
    device = plan.hardware.device
    accelerator.begin_peak(device)
    start = time.perf_counter()
    measure(0, 1)  # allocates memory, compiles
    first_seconds = time.perf_counter() - start
    tokens_per_second = measure(MEASURED_SECONDS, MOST_STEPS)
    rows = [
        *_model_rows(plan),
        *_memory_rows(plan),
        *_data_rows(plan),
        *_outlook_rows(plan),
        *_time_rows(plan, tokens_per_second, first_seconds),
        *_disk_rows(plan),
    ]
    return aligned(rows)


def aligned(rows: list[tuple[str, str]]) -> list[str]:
    """A line for each name and value, the values one below the other."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}".rstrip() for name, value in rows]


def model_text(config: LMConfig, parameters: int, active: int) -> str:
    """The size and the shape of a model.

    Args:
        active: parameters that compute a token.
    """
    embedding = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    shape = f"{counted(config.n_layers, 'layer')} of {config.dim}, {config.vocab_size:,} tokens"
    if config.n_experts:
        shape += f", {config.n_active_experts} of {config.n_experts} experts"
    shape += f", context {config.max_seq_len}"
    computing = f", {active:,} active" if active < parameters else ""
    return f"{parameters:,}{computing}, {embedding:,} of them in embedding and output ({shape})"


def _model_rows(plan: RunPlan) -> list[tuple[str, str]]:
    rows = [("parameters", model_text(plan.config, plan.parameters, plan.active_parameters))]
    return rows + ([("lora", _adapters_text(plan))] if plan.training.lora_rank else [])


def _memory_rows(plan: RunPlan) -> list[tuple[str, str]]:
    t, device = plan.training, plan.hardware.device
    memory = step_memory(plan.config, t, t.batch_size, device, plan.hardware.autocast, plan.shards)
    peak = accelerator.peak_bytes(device)
    measured = "" if peak is None else f"; measured peak {size_text(peak)}"
    free = size_text(free_memory(device, plan.local_world_size))
    shared = f", shared among {plan.shards} processes" if plan.shards > 1 else ""
    return [
        ("memory:  weights", size_text(memory.weights)),
        *([("         moving average", size_text(memory.average) + shared)] if t.use_ema else []),
        ("         gradients", size_text(memory.gradients)),
        ("         optimizer", size_text(memory.optimizer) + shared),
        (
            "         activations",
            f"{size_text(memory.activations)} for a batch of {t.batch_size} x {plan.config.max_seq_len} tokens",
        ),
        ("         together", f"{size_text(memory.together)} per process; {free} are free on {device}{measured}"),
    ]


def _data_rows(plan: RunPlan) -> list[tuple[str, str]]:
    t, length, steps = plan.training, plan.config.max_seq_len, plan.total_steps
    epoch = plan.train_samples * length
    if t.max_steps is None:
        run, why = t.epochs * epoch, counted(t.epochs, "epoch")
    else:
        run, why = steps * plan.tokens_per_step, f"{steps * plan.tokens_per_step / epoch:.2f} epochs"
    batch = batch_text(t.batch_size, t.accumulation_steps, plan.world_size)
    return [
        ("tokens:  an epoch", f"{epoch:,}, and {plan.tokens_per_evaluation:,} to validate on"),
        ("         the run", f"{run:,} ({why})"),
        ("         a step", f"{plan.tokens_per_step:,} ({batch} samples of {length} tokens)"),
        ("steps", f"{steps:,}" + (f", {plan.steps_done:,} of them done" if plan.steps_done else "")),
        ("FLOPs of the run", f"{run * plan.flops_per_token:.2e} ({plan.flops_per_token / 1e6:,.0f} MFLOP per token)"),
    ]


def _outlook_rows(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.by_heart:
        return [("expected", _by_heart_text(plan))]
    return [] if plan.outlook is None else [("expected", _expected_text(plan.outlook))]


def _time_rows(plan: RunPlan, tokens_per_second: float, first_seconds: float) -> list[tuple[str, str]]:
    share = tokens_per_second * plan.flops_per_token / plan.peak_flops
    training = plan.tokens_left(plan.steps_done, plan.samples_done) / tokens_per_second + first_seconds
    evaluations = plan.evaluations_left(plan.steps_done)
    evaluating = evaluations * plan.tokens_per_evaluation * EVALUATION_SHARE / tokens_per_second
    first = duration_text(first_seconds) + (", with compiling" if plan.training.compile else "")
    return [
        ("speed", f"{tokens_per_second:,.0f} tokens/s, measured just now; other work on this machine slows a run"),
        ("mfu", f"{share:.1%} of the {plan.peak_flops / 1e9:,.0f} GFLOP/s that matrix products reach here"),
        (
            "time left" if plan.steps_done else "time",
            f"{rough_duration_text(training + evaluating)}: {rough_duration_text(training)} of training (its"
            f" first step took {first}), {rough_duration_text(evaluating)} for"
            f" {counted(evaluations, 'evaluation')}; not counted: samples of text, curves and saving",
        ),
    ]


def _disk_rows(plan: RunPlan) -> list[tuple[str, str]]:
    space, out_dir = plan.space, Path(plan.training.out_dir)
    free = size_text(free_bytes(out_dir))
    checkpoint, weights = size_text(space.checkpoint_bytes), size_text(space.weights_bytes)
    return [
        ("disk:    a checkpoint", f"{checkpoint}, {space.checkpoints} of them kept; best and last weights {weights}"),
        (
            "         together",
            f"{size_text(space.most)} at most; {free} are free in {out_dir}",
        ),
    ]

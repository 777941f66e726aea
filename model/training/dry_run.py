"""What a run would take, told before it starts: `python train.py --config … --dry_run`."""

import time
from typing import TYPE_CHECKING

import torch

from model.storage.archive import tensor_bytes
from model.storage.files import free_bytes, size_text
from model.training.memory import free_memory, saved_bytes
from model.training.recipe import batch_text, duration_text

if TYPE_CHECKING:
    from optimized_pretrain import Trainer

MEASURED_SECONDS, MOST_STEPS = 5.0, 50  # measured: so long, or so many; a longer step is measured once
EVALUATION_SHARE = 1 / 3  # of a training step's time for as many tokens: forward without backward


def dry_run(trainer: "Trainer") -> list[str]:
    """Measure a few real steps, and describe the run; nothing is written. Every process of the run must call it.

    The trainer's weights have moved on afterwards: it is of no more use.

    Returns:
        lines to print: name and value, the values below each other.

    Raises:
        TrainingDiverged, ProcessLost: as training itself.
    """
    done = trainer.progress.step, trainer.progress.samples  # of the run that it goes on with
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)  # of what was measured before
    start = time.perf_counter()
    trainer.measure_steps(seconds=0, most=1)  # allocates memory, compiles
    first_seconds = time.perf_counter() - start
    tokens_per_second = trainer.measure_steps(MEASURED_SECONDS, MOST_STEPS)
    peak = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else None
    rows = [
        *_model_rows(trainer),
        *_memory_rows(trainer, peak),
        *_data_rows(trainer, done[0]),
        *_time_rows(trainer, done, tokens_per_second, first_seconds),
        *_disk_rows(trainer),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}".rstrip() for name, value in rows]


def _model_rows(trainer: "Trainer") -> list[tuple[str, str]]:
    config, model = trainer.config, trainer.model
    embedding = model.tok_embeddings.weight.numel() * (1 if config.tie_embeddings else 2)
    shape = f"{config.n_layers} layers of {config.dim}, {config.vocab_size:,} tokens, context {config.max_seq_len}"
    return [("parameters", f"{model.parameter_count():,}, {embedding:,} of them embedding and output ({shape})")]


def _memory_rows(trainer: "Trainer", peak: int | None) -> list[tuple[str, str]]:
    """`peak`: bytes of a GPU that the steps took at most."""
    model, device, rows = trainer.model, trainer.device, trainer.training.batch_size
    weights = tensor_bytes(model.state_dict()) + (tensor_bytes(trainer.ema.state_dict()) if trainer.ema else 0)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    optimizer = tensor_bytes(trainer.optimizer.state_dict())
    activations = saved_bytes(model, rows, trainer.autocast)
    together = weights + gradients + optimizer + activations
    measured = "" if peak is None else f"; the steps' peak was {size_text(peak)}"
    free = free_memory(device, trainer.processes.local_world_size)
    return [
        ("memory:  weights", size_text(weights) + (", the average's included" if trainer.ema else "")),
        ("         gradients", size_text(gradients)),
        ("         optimizer", size_text(optimizer)),
        (
            "         activations",
            f"{size_text(activations)} for a batch of {rows} x {trainer.config.max_seq_len} tokens",
        ),
        ("         together", f"{size_text(together)} a process, {size_text(free)} are free on {device}{measured}"),
    ]


def _data_rows(trainer: "Trainer", steps_done: int) -> list[tuple[str, str]]:
    t, length, steps = trainer.training, trainer.config.max_seq_len, trainer.schedule.total_steps
    epoch = len(trainer.data.train_samples) * length
    if t.max_steps is None:
        run, why = t.epochs * epoch, f"{t.epochs} epochs"
    else:
        run, why = steps * trainer.tokens_per_step, f"{steps * trainer.tokens_per_step / epoch:.2f} epochs"
    batch = batch_text(t.batch_size, t.accumulation_steps, trainer.processes.world_size)
    flops = run * trainer.flops_per_token
    return [
        ("tokens:  an epoch", f"{epoch:,}, and {len(trainer.data.val_samples) * length:,} to validate on"),
        ("         the run", f"{run:,} ({why})"),
        ("         a step", f"{trainer.tokens_per_step:,} ({batch} samples of {length} tokens)"),
        ("steps", f"{steps:,}" + (f", {steps_done:,} of them done" if steps_done else "")),
        ("FLOPs of the run", f"{flops:.2e} ({trainer.flops_per_token / 1e6:,.0f} MFLOP a token)"),
    ]


def _time_rows(
    trainer: "Trainer", done: tuple[int, int], tokens_per_second: float, first_seconds: float
) -> list[tuple[str, str]]:
    """`done`: steps and samples."""
    t, steps = trainer.training, trainer.schedule.total_steps - done[0]
    peak = trainer.peak_flops * trainer.processes.world_size
    share = tokens_per_second * trainer.flops_per_token / peak
    # The last step of an epoch may be a shorter one: what is left is counted in tokens.
    epoch = len(trainer.data.train_samples)
    samples = steps * trainer.order.rows_per_step
    if t.max_steps is None:
        samples = max(0, t.epochs * epoch - done[1])
    training = samples * trainer.config.max_seq_len / tokens_per_second + first_seconds
    evaluations = -(-steps // t.eval_interval) if len(trainer.data.val_samples) else 0
    validated = evaluations * len(trainer.data.val_samples) * trainer.config.max_seq_len
    evaluating = validated * EVALUATION_SHARE / tokens_per_second
    first = duration_text(first_seconds) + (", which compiles" if t.compile else "")
    return [
        ("speed", f"{tokens_per_second:,.0f} tokens/s, measured"),
        ("mfu", f"{share:.1%} of the {peak / 1e9:,.0f} GFLOP/s that matrix products reach here"),
        (
            "time",
            f"about {duration_text(training + evaluating)}: {duration_text(training)} of training (its first step"
            f" {first}), {duration_text(evaluating)} for {evaluations} evaluations",
        ),
    ]


def _disk_rows(trainer: "Trainer") -> list[tuple[str, str]]:
    space, free = trainer.space(), size_text(free_bytes(trainer.out_dir))
    checkpoint, weights = size_text(space.checkpoint_bytes), size_text(space.weights_bytes)
    sizes = f"{checkpoint}, {space.checkpoints} of them kept; best and last weights {weights}"
    return [
        ("disk:    a checkpoint", sizes),
        ("         together", f"{size_text(space.most)} at most, {free} are free in {trainer.out_dir}"),
    ]

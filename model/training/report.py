"""What a run says of itself when it starts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimized_pretrain import Trainer


def describe_run(trainer: "Trainer") -> list[str]:
    """The model, the data and the schedule, a line each."""
    t, order, schedule = trainer.training, trainer.order, trainer.schedule
    model = (
        f"model: {trainer.model.parameter_count():,} parameters; {trainer.flops_per_token / 1e6:,.0f} MFLOP a"
        f" token; matrix products reach {trainer.peak_flops / 1e9:,.0f} GFLOP/s here, which mfu is measured by"
    )
    rows = f"{t.batch_size} x {t.accumulation_steps} accumulated x {trainer.processes.world_size} processes"
    decides = f"epochs {t.epochs}" if t.max_steps is None else f"max_steps, which beats epochs {t.epochs}"
    data = (
        f"data: {len(trainer.data.train_samples):,} samples of {trainer.config.max_seq_len} tokens; a step takes"
        f" {order.rows_per_step} ({rows}); {order.steps_per_epoch:,} steps an epoch,"
        f" {schedule.total_steps:,} in all ({decides})"
    )
    rise = f"{schedule.warmup_steps} steps up to" if schedule.warmup_steps else "from"
    rate = (
        f"schedule: {rise} {t.learning_rate:g}, then down to {schedule.min_lr:g} ({t.lr_scheduler});"
        f" {t.optimizer_type}{f', clipped at {t.grad_clip:g}' if t.grad_clip else ''}{', EMA' if t.use_ema else ''}"
    )
    return [model, data, rate]

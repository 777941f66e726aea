"""What a run will do, settled before its first step: one value, which the loop, the report and the dry run read."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from model.errors import counted
from model.LMConfig import LMConfig
from model.model import Transformer
from model.storage.archive import tensor_bytes
from model.training.choices import Choices, FoundCheckpoint, Ranks
from model.training.data import TrainingData
from model.training.expectation import Outlook, text_bits_of_data
from model.training.memory import trained_bytes
from model.training.optimizer import build_optimizer, optimizer_bytes, trained_parameters
from model.training.order import SampleOrder
from model.training.recipe import learns_by_heart, run_seconds
from model.training.schedule import Schedule, plan_schedule
from model.training.settings import FULLY_SHARDED, Settings, TrainingSettings
from model.training.step import runs_ahead
from model.training.step_graph import graph_problem


@dataclass(frozen=True)
class Hardware:
    """What this process computes on."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products
    autocast: AbstractContextManager  # in which the model runs
    peak_flops: float = math.nan  # FLOP/s that matrix products reach here; nan: not measured yet

    def casting_once(self) -> AbstractContextManager:
        """A context within which `autocast` casts a layer's weights once, however often it is entered: its copies are
        dropped where the outermost context ends. This one casts nothing itself. Compiled code and the loss cast by
        themselves."""
        is_off = isinstance(self.autocast, nullcontext)
        return nullcontext() if is_off else torch.autocast(self.device.type, enabled=False)


@dataclass(frozen=True)
class RunSpace:
    """What a run will write: its checkpoints, one of them being written, and its weights."""

    checkpoint_bytes: int  # of one checkpoint file
    weights_bytes: int  # of one file of weights
    checkpoints: int  # that stay until the end

    @property
    def most(self) -> int:
        """Bytes on the disk at any time; of weights, there are the best, the last, and one file being written."""
        return (self.checkpoints + 1) * self.checkpoint_bytes + 3 * self.weights_bytes


@dataclass(frozen=True)
class RunPlan:
    """What a run will do. A step is one optimizer step of all processes together."""

    training: TrainingSettings  # as resolved: no `auto` is left
    chosen: Mapping  # what `auto` resolved to, by setting; a checkpoint keeps it
    config: LMConfig
    hardware: Hardware  # of this process
    world_size: int
    local_world_size: int  # processes on this machine
    shards: int  # processes that share one copy of what they share (training.shard); 1: each has all of it
    writers: int  # processes that write a checkpoint, each its part; 1: one file
    parameters: int  # of the model, adapters not counted
    active_parameters: int  # those of them that compute a token: of experts, the chosen ones'
    trained_parameters: int  # fewer, or those of the adapters
    flops_per_token: int  # of training
    train_samples: int  # of an epoch
    val_samples: np.ndarray  # numbers of the samples that an evaluation reads, int64
    order: SampleOrder
    pace: Mapping  # what total_steps was computed from; a checkpoint keeps it
    schedule: Schedule
    peak_flops: float  # FLOP/s of matrix products on all processes together: the slowest one's times world_size
    space: RunSpace
    steps_done: int  # by the run that this one resumes
    samples_done: int
    outlook: Outlook | None  # what it will reach; None: no texts, not from random weights, or no rule knows it
    by_heart: bool  # from random weights, it reads its text so often that it learns it by heart

    @property
    def is_fully_sharded(self) -> bool:
        """Whether processes share the weights too."""
        return self.training.shard in FULLY_SHARDED

    @property
    def batch_rows(self) -> int:
        """Samples of one micro-batch of all processes."""
        return self.training.batch_size * self.world_size

    def samples_of(self, rank: int, samples: np.ndarray, micro: int) -> np.ndarray:
        """Of the samples of all processes, those that one reads in micro-batch `micro`; fewer, or none, at the end."""
        rows = self.training.batch_size
        start = micro * self.batch_rows + rank * rows
        return samples[start : start + rows]

    def samples_of_step(self, rank: int, position: int) -> np.ndarray:
        """Those that one process reads in the step that begins at `position`."""
        samples = self.order.next_step(position)
        return np.concatenate([self.samples_of(rank, samples, m) for m in range(self.training.accumulation_steps)])

    @property
    def tokens_per_step(self) -> int:
        return self.order.rows_per_step * self.config.max_seq_len

    @property
    def tokens_per_evaluation(self) -> int:
        return len(self.val_samples) * self.config.max_seq_len

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    def is_done(self, step: int, samples: int) -> bool:
        """Whether the run ends after `step` steps and `samples` samples."""
        t = self.training
        if t.max_steps is not None:
            return step >= t.max_steps
        return samples >= t.epochs * self.train_samples

    def pauses_after(self, step: int, samples: int) -> bool:
        """Whether an evaluation, a save or the end comes after `step` steps and `samples` samples: these need the
        weights of that step, and no later ones."""
        t = self.training
        return self.is_done(step, samples) or step % t.eval_interval == 0 or step % t.save_interval == 0

    def tokens_left(self, step: int, samples: int) -> int:
        """Tokens left to read after `step` steps and `samples` samples."""
        t = self.training
        if t.max_steps is None:  # counted in samples: the last step of an epoch may be a shorter one
            return max(0, t.epochs * self.train_samples - samples) * self.config.max_seq_len
        return max(0, self.total_steps - step) * self.tokens_per_step

    def evaluations_left(self, step: int) -> int:
        """Evaluations left after `step` steps."""
        if len(self.val_samples) == 0 or step >= self.total_steps:
            return 0
        interval = self.training.eval_interval
        return self.total_steps // interval - step // interval + (self.total_steps % interval > 0)

    def resolved(self, settings: Settings) -> dict[str, dict]:
        """All settings of the run with the values that it uses, by section, as in a config file; `cuda_graph`, which
        changes no bit, as asked for."""
        values = settings.as_dict()
        values["model"] |= dataclasses.asdict(self.config)
        values["training"] |= dataclasses.asdict(self.training)
        values["training"] |= {"min_lr": self.schedule.min_lr, "warmup_steps": self.schedule.warmup_steps}
        values["training"]["cuda_graph"] = settings.training.cuda_graph  # else another machine might refuse this one's
        return values


def plan_run(
    settings: Settings,
    data: TrainingData,
    model: Transformer,
    hardware: Hardware,
    found: FoundCheckpoint | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> RunPlan:
    """Settle every `auto`, the steps and the schedule. Every process must call it; all arrive at the same plan.

    Args:
        model: on its device, in training mode.
        found: the checkpoint that the run resumes from.
        say: prints one line for the user.

    Raises:
        InputError: not even one sample fits the memory, the resulting learning rate or warm-up is impossible, a setting
            is asked for that this device or this torch cannot do, or the checkpoint's values for auto are invalid.
    """
    t, checkpoint = settings.training.shared_among(ranks.world_size), None if found is None else found.content
    done = {"step": 0, "samples": 0} if checkpoint is None else checkpoint["progress"]
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    adapters = trained if t.lora_rank else 0
    parameters, active = model.parameter_count() - adapters, model.active_parameter_count() - adapters

    # Each choice takes what it depends on: passes, a step's rows, then its tokens, the number of steps, and their time.
    choices = Choices(t, found, ranks, hardware.device, say)
    epochs = choices.epochs(data, active)
    shard, shards = choices.shard(model)
    batch_size = choices.batch_size(model, data, epochs, hardware.autocast, shards)
    choices.attention(data, batch_size, hardware.dtype)
    choices.joined_products(data.config, batch_size, hardware.dtype)
    choices.balance_loss(data)
    choices.expert_products(data.config, batch_size, hardware.dtype)
    order = data.order(t.seed, dataclasses.replace(t, batch_size=batch_size).rows_per_step(ranks.world_size))
    if checkpoint is not None and (line := _smaller_or_larger_step(order, checkpoint, ranks)) is not None:
        say(line)
    tokens_per_step = order.rows_per_step * data.config.max_seq_len
    choices.learning_rate(active, tokens_per_step, data)
    pace = {"rows_per_step": order.rows_per_step, "epochs": epochs, "max_steps": t.max_steps}
    total_steps = _total_steps(pace, order, done, checkpoint)
    choices.warmup_steps(total_steps)
    flops_per_token = model.training_flops_per_token()
    peak_flops = ranks.smallest(hardware.peak_flops) * ranks.world_size  # the same on all processes
    choices.compile(run_seconds((total_steps - done["step"]) * tokens_per_step * flops_per_token, peak_flops))

    space = _space(model, t, total_steps)
    writers = choices.writers(shards, space.checkpoint_bytes)
    # The user's values, and those chosen where they said auto.
    shared = {"shard": shard, "checkpoint_writers": "all" if writers > 1 else "one"}
    training = dataclasses.replace(t, **choices.made, **shared)
    ahead = runs_ahead(hardware.device, build_optimizer(model, t.optimizer_type, training.learning_rate, 0.0))
    problem = graph_problem(hardware.device, hardware.dtype, data, training, ranks.world_size, ahead)
    training = dataclasses.replace(training, cuda_graph=choices.cuda_graph(problem))
    epoch_tokens, total_tokens = order.per_epoch * data.config.max_seq_len, total_steps * tokens_per_step
    on_texts = not data.is_chat and t.init_from is None
    by_heart = on_texts and learns_by_heart(active, epoch_tokens, total_tokens / epoch_tokens)
    return RunPlan(
        training=training,
        chosen=choices.made,
        config=data.config,
        hardware=hardware,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        shards=shards,
        writers=writers,
        parameters=parameters,
        active_parameters=active,
        trained_parameters=trained,
        flops_per_token=flops_per_token,
        train_samples=order.per_epoch,
        val_samples=data.spread_validation(
            t.eval_steps and t.eval_steps * (t.global_batch_size or batch_size * ranks.world_size)
        ),
        order=order,
        pace=pace,
        schedule=plan_schedule(training, total_steps),
        peak_flops=peak_flops,
        space=space,
        steps_done=done["step"],
        samples_done=done["samples"],
        outlook=_outlook(data, t, active, epoch_tokens, total_tokens) if on_texts and not by_heart else None,
        by_heart=by_heart,
    )


def _smaller_or_larger_step(order: SampleOrder, checkpoint: Mapping, ranks: Ranks) -> str | None:
    """A line where a step has other samples than before, only because the number of processes has changed."""
    before, processes = checkpoint["pace"].get("rows_per_step"), checkpoint["environment"].get("world_size")
    if None in (before, processes) or processes == ranks.world_size:
        return None
    if before * ranks.world_size != order.rows_per_step * processes:
        return None
    kept = f"--global_batch_size {before} keeps them whatever the number of processes"
    return f"a step has {counted(order.rows_per_step, 'sample')}, {before:,} with {processes} processes; {kept}"


def _total_steps(pace: Mapping, order: SampleOrder, done: Mapping, checkpoint: Mapping | None) -> int:
    """The steps of the whole run: as its checkpoint says, unless what they were computed from has changed since."""
    if checkpoint is not None and checkpoint["pace"] == pace:
        return checkpoint["total_steps"]
    if pace["max_steps"] is not None:
        return pace["max_steps"]
    return done["step"] + order.steps_left(done["samples"], pace["epochs"])


def _outlook(
    data: TrainingData, training: TrainingSettings, parameters: int, epoch_tokens: int, total_tokens: int
) -> Outlook | None:
    outlook = Outlook(text_bits_of_data(data), parameters, epoch_tokens, total_tokens, training.optimizer_type)
    return outlook if outlook.is_known else None


def _space(model: Transformer, training: TrainingSettings, total_steps: int) -> RunSpace:
    weights, trained = tensor_bytes(model.state_dict()), trained_bytes(model)
    state = optimizer_bytes(model, training.optimizer_type)
    kept = min(training.keep_last, -(-total_steps // training.save_interval))
    checkpoint = weights + state + (trained if training.use_ema else 0)
    return RunSpace(checkpoint, weights - (trained if training.lora_rank else 0), kept)

"""How much memory a training step takes, known before any of it is allocated, and how much is free."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # a private name, but documented ("Fake tensor")

from model import accelerator
from model.errors import InputError
from model.experts import ExpertsFeedForward
from model.LMConfig import LMConfig
from model.lora import add_adapters
from model.model import Transformer
from model.storage.files import size_text
from model.storage.system import available_memory, free_swap
from model.training.optimizer import optimizer_bytes, trained_parameters
from model.training.settings import AUTO, FULLY_SHARDED, TrainingSettings

# Shares of the free memory. A step's peak is up to a fourth above what `step_memory` counts (measured on a CPU).
FULL = 0.6  # that an automatic batch_size may fill
CLOSE = 0.8  # above which a run is warned
MOST_ROWS = 2**20  # of a batch, as in the settings


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one process holds when the forward pass of a training step ends. Its peak is higher."""

    weights: int
    average: int  # of the weights, where one is kept
    gradients: int
    optimizer: int
    activations: int  # what the forward pass keeps for the backward pass, which may compute a layer's others again

    @property
    def together(self) -> int:
        return self.weights + self.average + self.gradients + self.optimizer + self.activations


def step_memory(
    config: LMConfig,
    training: TrainingSettings,
    rows: int,
    device: torch.device,
    autocast: AbstractContextManager,
    ranks: int = 1,
) -> StepMemory:
    """The memory of a step, to the byte, from fake tensors: these have shapes and dtypes and take no memory.

    Models of one and two layers are run; all other layers take as much as the second.

    Args:
        rows: samples of the batch.
        autocast: context in which the model runs.
        ranks: that share one copy of what `shard` has them share, the optimizer and the moving average if it is `auto`.
            The mean of their shares counts; one may be larger by a matrix.
    """
    sizes, is_divided = [], training.shard in FULLY_SHARDED and ranks > 1
    with FakeTensorMode(), torch.device(device.type):
        for layers in (1, 2):
            model = Transformer(dataclasses.replace(config, n_layers=layers)).train()
            if training.lora_rank:
                add_adapters(model, training.lora_rank, training.lora_alpha)
            model.checkpointing = training.activation_checkpointing
            parameters = sum(parameter.nbytes for parameter in model.parameters())
            state, trained = optimizer_bytes(model, training.optimizer_type), trained_bytes(model)
            kept = kept_gathered(model, autocast, device) if is_divided else 0
            activations = saved_bytes(model, rows, autocast, training.document_mask)
            sizes.append((parameters, trained, state, activations, kept))
    parameters, trained, state, activations, kept = (
        one + (two - one) * (config.n_layers - 1) for one, two in zip(*sizes, strict=True)
    )
    shards = 1 if training.shard == "none" else ranks
    average = -(-trained // shards) if training.use_ema else 0
    gradients = trained
    if is_divided:
        parameters = -(-parameters // shards) + kept
        are_whole = training.shard == "full" and training.accumulation_steps > 1  # until the last micro-batch
        gradients = trained if are_whole else -(-trained // shards)
    return StepMemory(parameters, average, gradients, -(-state // shards), activations)


def passing_parts(model: Transformer) -> list[nn.Module]:
    """The parts of a model whose weights are gathered only while they are used, where ranks share them. Routers of
    experts are not among them, since they compute in float32."""
    parts: list[nn.Module] = []
    for layer in model.layers:
        feed_forward = layer.feed_forward
        has_experts = isinstance(feed_forward, ExpertsFeedForward)
        parts += [layer.attention, *([feed_forward.experts, feed_forward.shared] if has_experts else [feed_forward])]
    return [part for part in parts if part is not None]


def kept_gathered(model: Transformer, autocast: AbstractContextManager, device: torch.device) -> int:
    """Bytes of the weights that stay gathered for a whole step where ranks share them (`fully_sharded.divide`): all but
    the layers' matrices, which `model` gets here, in place, in the dtype in which they are gathered."""
    with autocast:
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    passing = passing_parts(model)
    kept = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for part in passing for p in part.parameters())
    for module in (module for part in passing for module in part.modules() if not isinstance(module, nn.RMSNorm)):
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    return kept


def state_bytes(model: nn.Module, training: TrainingSettings, shards: int = 1) -> int:
    """Bytes that a rank keeps of the optimizer's state and of the moving average: the mean of their shares.

    Args:
        shards: ranks that share them.
    """
    average = trained_bytes(model) if training.use_ema else 0
    return -(-(optimizer_bytes(model, training.optimizer_type) + average) // shards)


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are trained, and so of the gradients and of a moving average."""
    return sum(parameter.nbytes for parameter in trained_parameters(model).values())


def check_memory(
    config: LMConfig,
    training: TrainingSettings,
    device: torch.device,
    autocast: AbstractContextManager,
    processes: int,
    ranks: int = 1,
) -> str | None:
    """Compare a step with the free memory before anything is allocated; returns a warning where it is close.

    An automatic batch_size counts as one sample.

    Args:
        processes: how many share this machine's memory.
        ranks: that train together, see `step_memory`.

    Raises:
        InputError: the step can't fit; the message names the settings that make it so large.
    """
    rows = 1 if training.batch_size == AUTO else training.batch_size
    memory, free = step_memory(config, training, rows, device, autocast, ranks), free_memory(device, processes)
    if memory.together <= CLOSE * free:
        return None
    state = memory.together - memory.activations
    parts = f"weights, gradients and optimizer {size_text(state)}, activations {size_text(memory.activations)}"
    found = f"a step takes at least {size_text(memory.together)} ({parts}), {size_text(free)} are free on {device}"
    if memory.activations < state:
        experts = ", n_experts" if config.n_experts else ""
        remedy = f"make the model smaller (dim, n_layers{experts}, vocab_size)"
        if processes > 1 and training.shard not in FULLY_SHARDED:
            remedy += ", or set shard full"
    elif rows == 1:
        remedy = f"lower max_seq_len ({config.max_seq_len:,})"
    else:
        remedy = f"lower batch_size ({rows:,}) and raise accumulation_steps, or lower max_seq_len"
    if memory.activations >= state and training.activation_checkpointing != "full":
        remedy += ", or set activation_checkpointing full"
    swap = free_swap() if device.type == "cpu" else 0
    if memory.together > free + swap:
        raise InputError(f"out of memory: {found}; {remedy}")
    return f"memory is short: {found}; if the run fails, {remedy}"


def saved_bytes(model: nn.Module, rows: int, autocast: AbstractContextManager, with_documents: bool) -> int:
    """Bytes that a forward pass over `rows` full samples keeps for the backward pass, without the weights.

    Args:
        model: a Transformer in training mode.
        autocast: context in which the model runs.
        with_documents: run it as document_mask does.
    """
    weights = {id(storage): storage for storage in (parameter.untyped_storage() for parameter in model.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # by identity: a storage that is kept twice counts once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, rows, autocast, with_documents)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def _loss(model: nn.Module, rows: int, autocast: AbstractContextManager, with_documents: bool) -> Tensor:
    device = next(model.parameters()).device
    tokens = torch.zeros(rows, model.config.max_seq_len, dtype=torch.int64, device=device)
    with autocast:
        return model(tokens, tokens, documents=tokens if with_documents else None)


def _peak_bytes(model: nn.Module, rows: int, autocast: AbstractContextManager, with_documents: bool) -> int | None:
    """The peak of a forward and backward pass in bytes, above what was in use before; None: out of memory. For devices
    that measure it."""
    device = next(model.parameters()).device
    before = accelerator.begin_peak(device)
    try:
        _loss(model, rows, autocast, with_documents).backward()
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        accelerator.empty_cache(device)
    return accelerator.peak_bytes(device) - before


def rows_that_fit(
    model: nn.Module,
    autocast: AbstractContextManager,
    wanted: int,
    beside: int,
    free: int,
    with_documents: bool,
    every_step: Callable[[], None] = lambda: None,
) -> int:
    """How many samples a batch may have, so that a step takes at most 60 % of the free memory.

    On a GPU from the peak of real forward and backward passes over 1, 2, 4 … samples, until that share or `wanted` is
    reached. Elsewhere, where no peak can be read, from the bytes that forward passes over 1 and 2 samples keep, which
    grow linearly with the samples.

    Args:
        model: a Transformer on its device, in training mode; its gradients are cleared.
        wanted: on a GPU, the most that is tried.
        beside: bytes of a step that these passes don't show: the optimizer's state and the moving average.
        free: bytes, see `free_memory`.
        with_documents: run the model as document_mask does, whose mask takes memory too.
        every_step: called after each pass.

    Returns:
        0 if not even one sample fits.
    """
    device = next(model.parameters()).device
    room = FULL * free - beside
    if accelerator.measures_peak(device):
        rows, fits = 1, 0
        while rows <= min(2 * wanted, MOST_ROWS):
            peak = _peak_bytes(model, min(rows, wanted), autocast, with_documents)
            every_step()
            if peak is None or peak > room:
                return fits
            fits, rows = min(rows, wanted), 2 * rows
        return fits
    one = saved_bytes(model, 1, autocast, with_documents)
    every_step()
    two = saved_bytes(model, 2, autocast, with_documents)
    every_step()
    per_row, fixed = max(1, two - one), max(0, 2 * one - two)
    return max(0, min(MOST_ROWS, int((room - trained_bytes(model) - fixed) // per_row)))


def divided_rows_that_fit(
    config: LMConfig,
    training: TrainingSettings,
    device: torch.device,
    autocast: AbstractContextManager,
    shards: int,
    free: int,
    beside: int,
) -> int:
    """The same for ranks that share the weights, which are on none of them whole: counted with fake tensors.

    Args:
        shards: ranks that share one copy.
        free, beside: as above.
    """
    one, two = (step_memory(config, training, rows, device, autocast, shards) for rows in (1, 2))
    per_row = max(1, two.activations - one.activations)
    fixed = one.weights + one.gradients + max(0, one.activations - per_row)
    return max(0, min(MOST_ROWS, int((FULL * free - beside - fixed) // per_row)))


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a process may still take on this device.

    Args:
        processes: how many share this machine's memory.
    """
    on_device = None if device.type == "cpu" else accelerator.free_bytes(device)
    return system_memory() // processes if on_device is None else on_device


def system_memory() -> int:
    """Bytes of the machine's memory that are free, within the limits of this process's control groups (containers)."""
    return int(max(0, min(available_memory(), _left_to_group())))


def _left_to_group() -> float:
    """What the control groups of this process leave (Linux, version 2 and the memory group of version 1)."""
    left = [math.inf]
    root = Path("/sys/fs/cgroup")
    names = {".": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = {kinds: path for _, kinds, path in (line.split(":", 2) for line in lines)}
    except (OSError, ValueError):
        own = {}
    for folder, (limit, used) in names.items():
        path = own.get("" if folder == "." else "memory", "/").strip("/")
        places = [root / folder / part for part in (Path(path), *Path(path).parents)]
        for place in dict.fromkeys(places):
            try:
                most = int((place / limit).read_text(encoding="ascii"))  # "max" where there is no limit
                now = int((place / used).read_text(encoding="ascii"))
                stat = dict(line.split() for line in (place / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):
                continue
            left.append(most - now + int(stat.get("inactive_file", 0)))  # cached files give way
    return min(left)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory was too small. For the latter torch raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)

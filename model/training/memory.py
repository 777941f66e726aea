"""How much memory training takes, measured on the model itself, and how much is free."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

FULL = 0.6  # of the free memory that a run may take: in use is up to a fourth more than what is kept (measured, CPU)
UNKNOWN = 4 << 30  # bytes, where the system does not say what is free
MOST_ROWS = 2**20  # of a batch, as in the settings


def saved_bytes(model: nn.Module, rows: int, autocast) -> int:
    """Bytes that a forward pass over `rows` full samples keeps for the backward pass, the weights not counted.

    Args:
        model: a Transformer in training mode.
        autocast: context in which the model runs.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by address, so that what is kept twice counts once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, rows, autocast)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def _loss(model: nn.Module, rows: int, autocast) -> Tensor:
    device = next(model.parameters()).device
    tokens = torch.zeros(rows, model.config.max_seq_len, dtype=torch.int64, device=device)
    with autocast:
        return model(tokens, tokens)


def _peak_bytes(model: nn.Module, rows: int, autocast) -> int | None:
    """CUDA: bytes in use at the peak of a forward and backward pass, above those before it; None: out of memory."""
    device = next(model.parameters()).device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        _loss(model, rows, autocast).backward()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(device) - before


def rows_that_fit(
    model: nn.Module, autocast, wanted: int, beside: int, free: int, every_step: Callable[[], None] = lambda: None
) -> int:
    """How many samples a batch may have, so that a step takes at most 60 % of the memory that is free.

    On a CUDA GPU by the peak of real forward and backward passes, of 1, 2, 4 … samples, until that share or `wanted`
    is reached. Elsewhere, where no peak can be read, by the bytes that a forward pass over 1 and 2 samples keeps,
    which grow evenly with the samples.

    Args:
        model: a Transformer on its device, in training mode; its gradients are cleared.
        wanted: more are not tried on a GPU.
        beside: bytes that are not there yet, and that a step does not show: the optimizer's state.
        free: bytes, see `free_memory`.
        every_step: called after each pass.

    Returns:
        0 where not even one sample fits.
    """
    device = next(model.parameters()).device
    room = FULL * free - beside
    if device.type == "cuda":
        rows, fits = 1, 0
        while rows <= min(2 * wanted, MOST_ROWS):
            peak = _peak_bytes(model, min(rows, wanted), autocast)
            every_step()
            if peak is None or peak > room:
                return fits
            fits, rows = min(rows, wanted), 2 * rows
        return fits
    one = saved_bytes(model, 1, autocast)
    every_step()
    two = saved_bytes(model, 2, autocast)
    every_step()
    per_row, fixed = max(1, two - one), max(0, 2 * one - two)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    return max(0, min(MOST_ROWS, int((room - gradients - fixed) // per_row)))


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a process may still take on this device.

    Args:
        processes: on this machine, which share a CPU's memory.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return system_memory() // processes


def system_memory() -> int:
    """Bytes of the machine's memory that are free, within what the group of processes (a container's) may take."""
    if sys.platform == "win32":
        return _windows_memory() or UNKNOWN
    found = [_linux_memory(), *_group_memory()]
    known = [value for value in found if value is not None]
    if known:
        return max(0, min(known))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: of all that there is, half
    except (ValueError, OSError):
        return UNKNOWN


def _linux_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _group_memory() -> list[int]:
    """What the control groups of this process leave, Linux: those of version 2 and the memory group of version 1."""
    left = []
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
                most = int((place / limit).read_text(encoding="ascii"))  # "max" where there is none
                now = int((place / used).read_text(encoding="ascii"))
                stat = dict(line.split() for line in (place / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):
                continue
            left.append(most - now + int(stat.get("inactive_file", 0)))  # cached files give way
    return left


def _windows_memory() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = [("size", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "total_page", "free_page", "total_virtual", "free_virtual", "extended")
        ]

    status = Status(size=ctypes.sizeof(Status))
    found = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free) if found else None

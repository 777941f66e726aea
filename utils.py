"""What the scripts share and the model does not need: the console, devices, seeds, the process group."""

import contextlib
import ctypes
import gc
import inspect
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from model import accelerator
from model.command import (  # noqa: F401 (the scripts' too)
    CommandParser,
    add_option,
    heavy_imports,
    path_flag,
    print_error,
    print_message,
    print_text,
    run_command,
    say,
    screen,
    true_or_false,
)
from model.errors import InputError, counted
from model.runs.processes import Processes  # noqa: F401 (the scripts' too)
from model.runs.signals import StopSignal  # noqa: F401 (the scripts' too)
from model.training.determinism import deterministic_kernels, random_state, restore_random_state
from model.unusable_gpus import why_kernels_lack, why_unused

# ---------------------------------------------------------------------------------------------------- the console


def progress_bar(total: int, initial: int, show: bool):
    """A bar over training steps; its postfix has the time left. In a log file it can't move: see `progress_line`."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    return tqdm(total=total, initial=initial, disable=not show, bar_format=layout, mininterval=0.5, file=screen())


def progress_line(bar, every_seconds: float = 30) -> None:
    """Print what the bar shows as a line now and then, where there is no terminal to move it on."""
    now = time.perf_counter()
    if not sys.stderr.isatty() and now - getattr(bar, "last_line", 0) > every_seconds:
        bar.last_line = now
        say(str(bar).strip())


# -------------------------------------------------------------------------------------------------------- devices

DEVICES = "one of auto, cpu, cuda, cuda:N, npu, xpu, musa, mlu, mps"


def pick_device(asked: str = "auto", local_rank: int = 0):
    """The torch device to use, and why it was chosen.

    Args:
        asked: "auto", or a device that torch knows: "cpu", "mps", "cuda", "cuda:1", "npu:0".
        local_rank: this process's number on its machine, which picks its GPU.

    Raises:
        InputError: no such device here.
    """
    import torch

    if asked == "auto":
        threads = counted(torch.get_num_threads(), "thread")
        if not (types := accelerator.available_types()):
            return torch.device("cpu"), f"{why_unused() or 'no GPU found'}; {threads}"
        device = _numbered(types[0], local_rank)
        if (lacks := accelerator.missing_kernels(device)) is not None:
            return torch.device("cpu"), f"{why_kernels_lack(accelerator.name(device), *lacks)}; {threads}"
        return device, accelerator.name(device)
    failed = accelerator.load_packages()
    device_type = asked.partition(":")[0]
    package = accelerator.kind_of(device_type).package
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        if package is not None:
            why = f"fails to load ({failed[package]})" if package in failed else "is not installed"
            raise InputError(f"device: {asked!r} found, but {package}, which adds it to torch, {why}") from error
        raise InputError(f"device: {asked!r} found, {DEVICES} expected") from error
    if device.type == "cpu" and not device.index:
        return device, "as asked"
    if device.type not in {*accelerator.KINDS, *accelerator.available_types()} or device.type == "cpu":
        raise InputError(f"device: {asked!r} found, {DEVICES} expected")
    if (device.index or 0) >= (devices := accelerator.count(device.type)):
        seen = counted(devices, f"{accelerator.vendor(device.type)} device")
        unused = why_unused() if devices == 0 else None
        raise InputError(f"device: {asked!r} found, but torch sees {seen} here" + (f": {unused}" if unused else ""))
    device = device if device.index is not None else _numbered(device.type, local_rank)
    if (lacks := accelerator.missing_kernels(device)) is not None:
        raise InputError(f"device: {asked!r} cannot be used: {why_kernels_lack(accelerator.name(device), *lacks)}")
    return device, "as asked"


def _numbered(device_type: str, local_rank: int):
    """The device of a type that this rank uses; ranks take turns."""
    import torch

    if accelerator.kind_of(device_type).is_single:
        return torch.device(device_type)
    return torch.device(device_type, local_rank % accelerator.count(device_type))


def pick_dtype(asked: str, device):
    """The dtype of the matrix products on this device, and why.

    A processor without instructions for 16-bit floats emulates them, over a hundred times slower than float32: there
    float32 is used instead. MATECONV_EMULATE_DTYPE=1 keeps the dtype that was set, for tests.
    """
    import torch

    dtype = getattr(torch, asked)
    if dtype == torch.float32:
        return dtype, "as asked"
    if device.type == "cpu" and os.environ.get("MATECONV_EMULATE_DTYPE") != "1":
        needed = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16"), "float16": ("avx512_fp16", "amx_fp16", "fp16_arith")}
        features = cpu_features()
        found = [name for name in needed[asked] if name in features]
        if not found:
            return torch.float32, f"{asked} would be over 100 times slower, since this CPU has no instructions for it"
        faster = asked == "float16" and "amx_bf16" in features and "amx_fp16" not in features
        return dtype, f"this CPU has {found[0]}" + (
            "; bfloat16 is several times as fast on it (amx_bf16)" if faster else ""
        )
    if device.type != "cpu" and not accelerator.has_autocast(device):
        return torch.float32, f"torch has no autocast to {asked} for {device.type}"
    if asked == "bfloat16" and device.type != "cpu" and not accelerator.has_bfloat16(device):
        before = " (before Ampere)" if accelerator.vendor(device.type) == "NVIDIA" else ""
        return torch.float16, f"this GPU{before} has no instructions for bfloat16"
    return dtype, "as asked"


def choose_hardware(asked_device: str, asked_dtype: str, local_rank: int):
    """The device and dtype to use, printed with the reasons: a `plan.Hardware`, whose speed was not measured yet.

    Args:
        asked_device, asked_dtype: as in the settings.

    Raises:
        InputError: no such device here.
    """
    import torch

    from model.training.plan import Hardware

    device, why = pick_device(asked_device, local_rank)
    say(f"device {device}: {why}")
    dtype, why = pick_dtype(asked_dtype, device)
    say(f"dtype {str(dtype).removeprefix('torch.')}: {why}")
    if device.type == "cpu":
        keep_freed_memory()
        # Compiling imports it; it warns where nvcc is installed and there is no GPU, which this run does not want.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    else:
        accelerator.use(device)
    # qk_norm's weights are float32, and what it normalizes has 16 bits: right, only not by torch's fused kernel.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic kernels require it of cuBLAS
    return Hardware(device, dtype, autocast)


def cpu_features() -> set[str]:
    """The instruction sets of this CPU, as `torch.cpu.get_capabilities` names them. Before torch 2.13, which has it,
    from Linux's /proc/cpuinfo, and none are known elsewhere."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there}
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()
    return words | ({"fp16_arith"} if "asimdhp" in words else set())  # ARM's name for it


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep the memory that tensors free; returns whether malloc is glibc's.

    By default glibc returns each large block to the system when it is freed. Training on a CPU allocates the same
    tensors at each step, so the system would clear gigabytes of pages per step, a tenth of the time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def measure_matmul_flops(device, dtype, weights: Iterable[tuple[int, int]] = ()) -> float:
    """FLOP/s that matrix products reach on this device: the limit that MFU is measured against.

    The best of square products and of those with weights of a model, since a processor's best shape differs: with AMX
    a product of 1,024 reaches half of what a layer's does.

    Args:
        weights: shapes [outputs, inputs], which 2,048 rows are multiplied with.
    """
    import torch
    import torch.nn.functional as F

    seconds = 0.1 if device.type == "cpu" else 0.3  # to spend, about, shared among the shapes
    longest = 0.3  # seconds that one product may be expected to take
    sizes = (256, 1024) if accelerator.kind_of(device).shares_memory else (256, 2048, 8192)
    shapes = [(size, size, size) for size in sizes] + [(2048, *weight) for weight in weights]
    best = 0.0
    for rows, outputs, inputs in sorted(shapes, key=math.prod):
        flops = 2 * rows * outputs * inputs
        if best and flops / best > longest:
            break  # emulated dtype, or a small GPU: the smaller products are enough
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        F.linear(x, weight)  # a GPU's first product loads cuBLAS, for up to a second
        accelerator.synchronize(device)
        end = time.perf_counter() + seconds / len(shapes)
        while time.perf_counter() < end:
            start = time.perf_counter()
            F.linear(x, weight)
            accelerator.synchronize(device)
            best = max(best, flops / (time.perf_counter() - start))
    return best


@contextlib.contextmanager
def garbage_left() -> Iterator[None]:
    """Python collects no garbage by itself meanwhile: looking through all objects of torch takes a fifth of a second,
    in which a GPU waits. `gc.collect()` then only looks through what is new."""
    enabled = gc.isenabled()
    gc.freeze()  # what is here now is not looked through again
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


# -------------------------------------------------------------------------------------------------- process group


def distributed(model, processes: Processes, rows: int, seq_len: int, hardware):
    """The model that averages its gradients over all processes; a single process gets it back as it is.

    Args:
        model: the plain or the compiled one.
        rows, seq_len: of a micro-batch.
        hardware: `plan.Hardware`, on which the model is.
    """
    from torch.nn.parallel import DistributedDataParallel

    if processes.world_size == 1:
        return model
    device = hardware.device
    # Buffers never change. torch renamed the option that says so.
    names = ("forward_sync_buffers", "broadcast_buffers")
    option = next(name for name in names if name in inspect.signature(DistributedDataParallel).parameters)
    device_ids = None if accelerator.kind_of(device).shares_memory else [device]
    wrapped = DistributedDataParallel(model, device_ids=device_ids, **{option: False})
    # The gradient of what comes first is computed last; then this process waits for the others.
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.register_post_accumulate_grad_hook(lambda _: processes.arrive())
    if processes.world_size > 2:
        with deterministic_kernels(device):
            settle_buckets(wrapped, rows, seq_len, device, hardware.autocast)
        model.zero_grad(set_to_none=True)
    return wrapped


def settle_buckets(model, rows: int, seq_len: int, device, autocast) -> None:
    """Make DistributedDataParallel order its gradient buckets now; by itself it does so after its first step.

    With three or more processes, a gradient's place in its bucket decides the order of the sum, and so the last bit
    (two numbers have only one order). Without this, a resumed run would differ in that bit.

    Args:
        model: a DistributedDataParallel; its parameters have gradients afterwards, which the caller clears.
        rows, seq_len: of a batch.
        autocast: context in which the model runs.
    """
    import torch

    state = random_state()
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
    with autocast:
        loss = model(tokens, tokens)
    loss.backward()
    restore_random_state(state)

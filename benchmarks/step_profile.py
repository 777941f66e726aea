"""Where one of our training steps spends its time: what `train_step.py --profile` prints."""

import argparse
from collections import defaultdict

import step_contenders
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

import utils

PRODUCTS, ATTENTION, LOSS = "matrix products of the layers", "attention", "the vocabulary's loss"
UPDATE, COPIES, ELEMENTWISE = "clipping and optimizer", "copies, casts and fills", "norms and elementwise"
REST = "Python, and waiting"

# An operation's whole time belongs to the first group that contains it or an operation that called it.
CALLERS = {
    "update of the weights": UPDATE,
    "mateconv::chunked_attention": ATTENTION,
    "mateconv::chunked_cross_entropy": LOSS,
    "aten::scaled_dot_product_attention": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "aten::cross_entropy": LOSS,
    "LogSoftmaxBackward": LOSS,
    "NllLossBackward": LOSS,
}
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "aten::mkldnn_linear")
MOVES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_")


def group_of(event: FunctionEvent, vocab_size: int) -> str:
    """The group of an operation; a product with the vocabulary's matrix is part of the loss."""
    caller = event
    while caller is not None:
        name = caller.name.removeprefix("autograd::engine::evaluate_function: ")
        for start, group in CALLERS.items():
            if name.startswith(start):
                return group
        caller = caller.cpu_parent
    if event.name in MATRIX_PRODUCTS:
        shapes = [shape for shape in event.input_shapes or [] if isinstance(shape, list)]
        return LOSS if any(vocab_size in shape for shape in shapes) else PRODUCTS
    return COPIES if event.name in MOVES else ELEMENTWISE


def step_groups(
    steps: step_contenders.Steps, vocab_size: int, count: int
) -> tuple[dict[str, float], float, list[FunctionEvent]]:
    """Seconds of each group in the fastest of `count` steps, of that whole step, and its events; on a GPU the seconds
    in which it computes, in a step that is slower than without the profiler."""
    on_gpu = steps.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    best: tuple[dict[str, float], float, list[FunctionEvent]] = ({}, float("inf"), [])
    for _ in range(count):
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            whole = steps.seconds()
        groups: dict[str, float] = defaultdict(float)
        events = list(profiler.events())
        for event in events:
            if event.device_type == torch.autograd.DeviceType.CPU:  # a GPU's kernels count for their launcher
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                groups[group_of(event, vocab_size)] += microseconds / 1e6
        if whole < best[1]:
            best = groups, whole, events
    return best


def kernel_lines(events: list[FunctionEvent], shown: int = 24) -> list[str]:
    """What a GPU executed: how many kernels, for how long, the gaps between them, and those that took most."""
    on_gpu = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)
    kernels = sorted(on_gpu, key=lambda kernel: kernel.time_range.start)
    busy, end, waits = 0.0, 0.0, []  # microseconds
    for kernel in kernels:
        start = max(kernel.time_range.start, end)
        if end and start > end:
            waits.append(start - end)
        busy, end = busy + max(0.0, kernel.time_range.end - start), max(end, kernel.time_range.end)
    span = end - kernels[0].time_range.start
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.time_range.end - kernel.time_range.start)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    lines = [
        f"{len(kernels)} kernels and copies of {len(by_name)} kinds in {span / 1000:.2f} ms: the GPU works for"
        f" {busy / 1000:.2f} ms and waits {len(waits)} times for {sum(waits) / 1000:.2f} ms (longest"
        f" {max(waits, default=0.0):.0f} us)"
    ]
    lines += [f"{sum(times) / 1000:8.3f} ms {len(times):4}x  {name[:100]}" for name, times in ranked[:shown]]
    rest = ranked[shown:]
    return [*lines, f"{sum(sum(t) for _, t in rest) / 1000:8.3f} ms {sum(len(t) for _, t in rest):4}x  others"]


def print_profile(options: argparse.Namespace) -> None:
    """Profile ours, eager unless only the compiled one is requested, and print a table."""
    utils.keep_freed_memory()
    torch.manual_seed(0)
    contender = step_contenders.build("ours", options)
    compiled = options.only == ["ours-compiled"]
    steps = step_contenders.Steps(contender, compiled, options)
    steps.first_seconds()
    plain = min(steps.seconds() for _ in range(options.rounds))
    steps.count = 1
    groups, profiled, events = step_groups(steps, options.vocab_size, options.rounds)
    whole = plain if steps.device.type == "cuda" else profiled  # profiling does not slow down the GPU itself
    rate = utils.measure_matmul_flops(steps.device, getattr(torch, options.dtype), contender.model.layer_shapes())
    groups[REST] = max(0.0, whole - sum(groups.values()))

    tokens = options.batch_size * options.max_seq_len
    matrices = sum(p.numel() for p in contender.model.layers.parameters() if p.dim() == 2)
    flops = {
        PRODUCTS: 6 * matrices * tokens,
        LOSS: 6 * options.vocab_size * options.dim * tokens,
        ATTENTION: 6 * options.n_layers * options.dim * options.max_seq_len * tokens,
    }
    name = step_contenders.NAMES["ours-compiled" if compiled else "ours"]
    print(f"\n{name}, the fastest of {options.rounds}: {plain:.4f} s, profiled {profiled:.4f} s; of {whole:.4f} s")
    for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        speed = f"{flops[group] / seconds / 1e9:>9,.0f} GFLOP/s" if group in flops and seconds else ""
        print(f"{group:30} {seconds:8.4f} s {seconds / whole:>5.0%} {speed}")
    print(f"(a large matrix product: {rate / 1e9:,.0f} GFLOP/s)")
    if steps.device.type == "cuda":
        print("\n".join(["", *kernel_lines(events)]))

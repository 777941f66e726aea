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


def step_groups(steps: step_contenders.Steps, vocab_size: int, count: int) -> tuple[dict[str, float], float]:
    """Seconds of each group in the fastest of `count` steps, and of that whole step; on a GPU the seconds in which it
    computes, in a step that is slower than without the profiler."""
    on_gpu = steps.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    best: tuple[dict[str, float], float] = ({}, float("inf"))
    for _ in range(count):
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            whole = steps.seconds()
        groups: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CPU:  # a GPU's kernels count for their launcher
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                groups[group_of(event, vocab_size)] += microseconds / 1e6
        if whole < best[1]:
            best = groups, whole
    return best


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
    groups, profiled = step_groups(steps, options.vocab_size, options.rounds)
    whole = plain if steps.device.type == "cuda" else profiled  # profiling does not slow down the GPU itself
    rate = utils.measure_matmul_flops(steps.device, getattr(torch, options.dtype))
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

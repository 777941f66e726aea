"""Who takes part in train_step.py: each one's model, optimizer, and training step, run in a separate process.

Every contender trains as its own project does: MateConv as `Trainer` does, transformers' Llama with the fused AdamW
that is its Trainer's default, nanoGPT with its `configure_optimizers`, MiniMind v1 with the Adam of its 1-pretrain.py.
On a GPU only MateConv uses kernels that give the same bits each time and checks loss and norm before it changes the
weights. There `Trainer` itself does more than is timed here: it launches the next step before it reads this one's loss,
and replays steps as a graph; benchmarks/gpu.py times it so in its parts `graph` and `training`.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from model import accelerator
from model.training.determinism import deterministic_kernels

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1

NAMES = {
    "ours": "MateConv, eager",
    "ours-compiled": "MateConv, compiled",
    "llama": "transformers Llama, eager",
    "llama-compiled": "transformers Llama, compiled",
    "nanogpt": "nanoGPT, eager",
    "nanogpt-compiled": "nanoGPT, compiled",
    "minimind": "MiniMind v1, eager",  # it disables compiling itself
    "ours-any-order": "MateConv, eager, any order",
    "ours-any-order-compiled": "MateConv, compiled, any order",
    "ours-joined": "MateConv, eager, joined",
    "ours-joined-compiled": "MateConv, compiled, joined",
}
# Sums on a GPU in any order, unlike Trainer; products of the same input as one.
ONLY_IF_ASKED = tuple(name for name in NAMES if name.startswith(("ours-any-order", "ours-joined")))


@dataclass
class Contender:
    """A model that takes training steps."""

    model: nn.Module
    mean_loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> nats/token
    optimizer: torch.optim.Optimizer
    flops_per_token: int
    looks_first: bool = False  # whether loss and norm are checked before the weights change
    deterministic: bool = False  # whether a GPU gives the same bits each time


def build(name: str, options: argparse.Namespace) -> Contender:
    """The contender of that name (without "-compiled"), on options.device."""
    if name.startswith("ours"):
        contender = _ours(options)
        contender.model.join_products(name == "ours-joined")
    else:
        contender = {"llama": _llama, "nanogpt": _nanogpt, "minimind": _minimind}[name](options)
    contender.deterministic = name in ("ours", "ours-joined")
    return contender


def our_config(options: argparse.Namespace):
    """The shape, as an LMConfig."""
    from model.LMConfig import LMConfig

    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    return LMConfig(**{name: getattr(options, name) for name in names})


def _ours(options: argparse.Namespace) -> Contender:
    from model.attention import has_ways
    from model.model import Transformer
    from model.training.attention_trial import fastest_attention
    from model.training.optimizer import build_optimizer

    config, device = our_config(options), torch.device(options.device)
    model = Transformer(config).to(device)
    if has_ways(config.flash_attn, device, config.max_seq_len, config.dropout):  # as a run of train.py chooses
        model.training_attention, why = fastest_attention(config, options.batch_size, getattr(torch, options.dtype))
        print(f"attention {model.training_attention}: {why}", file=sys.stderr)
    optimizer = build_optimizer(model, "adamw", LEARNING_RATE, WEIGHT_DECAY)
    flops = model.training_flops_per_token()
    return Contender(model, lambda m, x, y: m(x, y) / y.numel(), optimizer, flops, looks_first=True)


def _llama(options: argparse.Namespace) -> Contender:
    from transformers import LlamaConfig, LlamaForCausalLM

    from model.weights.transformers_folder import config_json

    shape = config_json(our_config(options), "llama", torch.float32)
    config = LlamaConfig(**shape, use_cache=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    # shift_labels: the targets are already shifted, so that as many count as for the others.
    return Contender(
        model,
        lambda m, x, y: m(input_ids=x, labels=y, shift_labels=y).loss,
        optimizer,
        _flops_per_token(sum(p.numel() for p in model.parameters()), options),
    )


def _nanogpt(options: argparse.Namespace) -> Contender:
    code = _import_from(Path(options.nanogpt), "nanogpt", "model")
    config = code.GPTConfig(
        block_size=options.max_seq_len,
        vocab_size=options.vocab_size,
        n_layer=options.n_layers,
        n_head=options.n_heads,
        n_embd=options.dim,
        bias=False,
    )
    model = code.GPT(config).to(options.device)
    device_type = torch.device(options.device).type
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, (0.9, 0.95), device_type)
    flops = _flops_per_token(model.get_num_params(), options)  # which omits the positions: they are only looked up
    return Contender(model, lambda m, x, y: m(x, y)[1], optimizer, flops)


def _minimind(options: argparse.Namespace) -> Contender:
    folder = Path(options.minimind) / "model"
    config_code, code = (_import_from(folder, "minimind", name) for name in ("LMConfig", "model"))
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    model = code.Transformer(config_code.LMConfig(**{name: getattr(options, name) for name in names}))
    model = model.to(options.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    flops = _flops_per_token(sum(p.numel() for p in model.parameters()), options)
    return Contender(model, lambda m, x, y: m(x, y).last_loss, optimizer, flops)


def _import_from(folder: Path, package: str, name: str):
    """The module folder/name.py as package.name: MiniMind's own package is called `model`, as ours is."""
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


def _flops_per_token(weights: int, options: argparse.Namespace) -> int:
    """Counted as in our Transformer.training_flops_per_token."""
    return 6 * weights + 6 * options.n_layers * options.dim * options.max_seq_len


# ------------------------------------------------------------------------------------------------------- its steps


class Steps:
    """Training steps of one contender, always on the same random batch.

    Attributes:
        count: steps that are timed together.
    """

    def __init__(self, contender: Contender, compiled: bool, options: argparse.Namespace) -> None:
        self.contender, self.device, self.count = contender, torch.device(options.device), options.steps
        self.run_model = torch.compile(contender.model) if compiled else contender.model
        dtype = getattr(torch, options.dtype)
        self.autocast = contextlib.nullcontext()
        if dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        size = (options.batch_size, options.max_seq_len + 1)
        tokens = torch.randint(options.vocab_size, size, device=self.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def take(self) -> None:
        """Forward, backward, clipping, optimizer step, zero_grad."""
        contender, optimizer = self.contender, self.contender.optimizer
        with deterministic_kernels(self.device) if contender.deterministic else contextlib.nullcontext():
            with self.autocast:
                loss = contender.mean_loss(self.run_model, self.inputs, self.targets)
            self.scaler.scale(loss).backward()
        with torch.profiler.record_function("update of the weights"):
            self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(contender.model.parameters(), 1.0)
            if contender.looks_first:
                torch.stack((norm, loss.detach())).tolist()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Seconds that one step takes, of `count` in a row."""
        accelerator.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.count):
            self.take()
        accelerator.synchronize(self.device)
        return (time.perf_counter() - start) / self.count

    def first_seconds(self) -> float:
        """Seconds of the first step, which compiles; a second one follows, to warm up."""
        count, self.count = self.count, 1
        first, _ = self.seconds(), self.seconds()
        self.count = count
        return first

    def peak_bytes(self) -> int:
        """Peak bytes of GPU memory since the last call; 0 on other devices."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def serve(name: str, keeps_freed_memory: bool, options: argparse.Namespace) -> None:
    """A contender's process: warm up, report it in a line of JSON, then take a step for every line on stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nanoGPT prints
    if options.threads:
        torch.set_num_threads(options.threads)
    if keeps_freed_memory:
        utils.keep_freed_memory()
    torch.manual_seed(0)
    contender = build(name.removesuffix("-compiled"), options)
    steps = Steps(contender, name.endswith("-compiled"), options)
    first = steps.first_seconds()
    steps.peak_bytes()
    parameters = sum(p.numel() for p in contender.model.parameters())
    ready = {"parameters": parameters, "flops_per_token": contender.flops_per_token, "first_step_seconds": first}
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps([steps.seconds(), steps.peak_bytes()]), file=answers, flush=True)

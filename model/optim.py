"""The optimizer, the learning rate as a function of the step, and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def build_optimizer(
    model: nn.Module, optimizer_type: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) or Adam (Kingma & Ba, 2015); matrices decay, norms do not.

    Parameters keep their names in the optimizer's state, so that a checkpoint of another model is noticed.
    """
    named = dict(model.named_parameters())  # a tied matrix once
    groups = [
        {"params": [(n, p) for n, p in named.items() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    covered = sum(len(group["params"]) for group in groups)
    if covered != len(named):
        raise AssertionError(f"the groups hold {covered} of {len(named)} parameters")
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer_type]
    return kind(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_at(
    step: int, *, total_steps: int, warmup_steps: int, learning_rate: float, min_lr: float, lr_scheduler: str
) -> float:
    """The learning rate of a step (from 0): a linear rise, then a fall that ends at `min_lr` with the last step."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    falling = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / falling)  # 0 to 1
    remaining = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,  # Loshchilov & Hutter, 2017
        "linear": 1 - progress,
        "polynomial": (1 - progress) ** 2,
    }[lr_scheduler]
    return min_lr + (learning_rate - min_lr) * remaining


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, updated with `update_parameters(model)` after each step.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first steps are soon forgotten.
    """

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)

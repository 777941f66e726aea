"""The optimizer, the learning rate as a function of the step, and the moving average of the weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from model.errors import InputError
from model.training.muon import Muon
from model.training.settings import TrainingSettings

BESIDE_MUON = 6.0  # times the learning rate: AdamW's for the embedding and the norms (benchmarks/RESULTS.md)
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_STEPS = 0.85, 0.95, 300  # of Muon, in the first step and after so many
DECAY_SHARE = 0.5  # of a run's steps after the warm-up: "wsd" stays at the highest rate before them


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for this parameter: a matrix of a layer, but neither the embedding nor the output layer."""
    return name.startswith("layers.") and parameter.dim() == 2


def build_optimizer(
    model: nn.Module,
    optimizer_type: str,
    learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Muon (Jordan, 2024), AdamW (Loshchilov & Hutter, 2019) or Adam (Kingma & Ba, 2015); matrices decay, norms do not.

    Parameters keep their names in the optimizer's state, so that a checkpoint of another model is noticed.

    Args:
        dtype: of Muon's own matrix products.
    """
    named = dict(model.named_parameters())  # a tied matrix once
    hidden = [(n, p) for n, p in named.items() if optimizer_type == "muon" and is_hidden_matrix(n, p)]
    others = [(n, p) for n, p in named.items() if optimizer_type != "muon" or not is_hidden_matrix(n, p)]
    groups = [
        {"params": hidden, "weight_decay": weight_decay, "muon": True},
        {"params": [(n, p) for n, p in others if p.dim() >= 2], "weight_decay": weight_decay, "muon": False},
        {"params": [(n, p) for n, p in others if p.dim() < 2], "weight_decay": 0.0, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    covered = sum(len(group["params"]) for group in groups)
    if covered != len(named):
        raise AssertionError(f"the groups hold {covered} of {len(named)} parameters")
    if optimizer_type == "muon":
        for group in groups:
            group["lr_scale"] = 1.0 if group["muon"] else BESIDE_MUON
        return Muon(groups, lr=learning_rate, dtype=torch.float32 if dtype == torch.float16 else dtype)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer_type]
    return kind(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def optimizer_bytes(model: nn.Module, optimizer_type: str) -> int:
    """Bytes of the state that the optimizer will have: two numbers for each of Adam's weights, one for Muon's."""
    return sum(
        parameter.nbytes * (1 if optimizer_type == "muon" and is_hidden_matrix(name, parameter) else 2)
        for name, parameter in model.named_parameters()
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: a linear rise, then a fall that ends with the last step."""

    total_steps: int
    warmup_steps: int
    learning_rate: float  # after the rise
    min_lr: float  # of the last step
    lr_scheduler: str  # the shape of the fall: "cosine", "linear", "polynomial" or "wsd"

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        falling = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling)  # 0 to 1
        remaining = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,  # Loshchilov & Hutter, 2017
            "linear": 1 - progress,
            "polynomial": (1 - progress) ** 2,
            "wsd": min(1.0, (1 - progress) / DECAY_SHARE),  # warm-up, stable, decay (Hu et al., 2024)
        }[self.lr_scheduler]
        return self.min_lr + (self.learning_rate - self.min_lr) * remaining


def momentum_at(step: int) -> float:
    """Muon's momentum in a step, counted from 0: it rises, as in modded-nanogpt, while gradients change fast."""
    return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * min(1.0, step / MOMENTUM_STEPS)


def plan_schedule(training: TrainingSettings, total_steps: int) -> Schedule:
    """The schedule that the settings ask for, with what they leave open: see `warmup_steps` and `min_lr` there.

    Raises:
        InputError: the warm-up is as long as the run.
    """
    warmup_steps = training.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(1000, total_steps // 50)
    elif warmup_steps >= total_steps:
        raise InputError(f"warmup_steps: {warmup_steps} leaves none of the {total_steps} steps of this run")
    min_lr = training.learning_rate / 10 if training.min_lr is None else training.min_lr
    return Schedule(total_steps, warmup_steps, training.learning_rate, min_lr, training.lr_scheduler)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state, but keep the groups' own numbers: they belong to the settings, which may have changed."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [{**theirs, **numbers} for theirs, numbers in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


class MovingAverage(AveragedModel):
    """An exponential moving average of the weights, updated with `update_parameters(model)` after each step.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first steps are soon forgotten.
    The count of updates stays on the CPU: PyTorch's own update sends it to the GPU and back, and waits there for all
    that the GPU still has to do.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count the weights in; the first ones are taken as they are."""
        updates = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + updates) / (10 + updates)) if updates else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        self.n_averaged += 1

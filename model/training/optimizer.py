"""The optimizers, by name, in `OPTIMIZERS`.

A new one is a function that builds it and an entry there: settings, `auto`, the memory estimate, each step's values and
the check of a checkpoint take what they need from the entry. Supported are optimizers whose state is, per parameter, a
number of tensors of the parameter's shape and dtype, and a step count. Not supported: factored state (Adafactor), 8-bit
state, and optimizers whose step needs a closure (LBFGS). One that heeds `found_inf`, as torch's fused ones do, lets a
GPU run ahead of the host (`step.py`). torch is imported where an optimizer is built, so that settings are checked
without it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.accelerator import kind_of
from model.errors import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BETAS = (0.9, 0.95)  # of Adam and AdamW
# AdamW's beside Muon, for the embedding and the norms: times the learning rate, and betas (benchmarks/RESULTS.md).
BESIDE_MUON, BETAS_BESIDE_MUON = 6.0, (0.6, 0.98)
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_STEPS = 0.85, 0.95, 300  # of Muon, in the first step and after this many


def is_hidden_matrix(name: str, parameter: "Tensor") -> bool:
    """Whether Muon is for this parameter: a matrix of a layer or a stack of them, but neither the embedding nor the
    output layer nor a router."""
    return name.startswith("layers.") and parameter.dim() >= 2 and not is_router(name)


def is_router(name: str) -> bool:
    """Whether this is the name of a matrix that chooses experts."""
    return name.endswith("router.weight")


def decay_groups(parameters: Mapping[str, "nn.Parameter"], weight_decay: float) -> list[dict]:
    """Parameter groups with names: matrices decay, norms and biases do not. Routers are a group of their own, whose
    "router_rate" multiplies the learning rate."""
    matrices = [(n, p) for n, p in parameters.items() if p.dim() >= 2]
    groups = [
        {"params": [(n, p) for n, p in matrices if not is_router(n)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in matrices if is_router(n)], "weight_decay": weight_decay, "router_rate": 1.0},
        {"params": [(n, p) for n, p in parameters.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _can_be_fused(parameters: Mapping[str, "nn.Parameter"]) -> bool:
    """Whether one kernel of torch's can take Adam's steps on their device; else each operation takes a kernel."""
    return all(kind_of(parameter.device).has_fused_optimizers for parameter in parameters.values())


def adamw(parameters: Mapping, learning_rate: float, weight_decay: float, dtype: "torch.dtype"):
    """Loshchilov & Hutter, 2019."""
    from torch.optim import AdamW

    groups = decay_groups(parameters, weight_decay)
    return AdamW(groups, lr=learning_rate, betas=BETAS, eps=1e-8, fused=_can_be_fused(parameters))


def adam(parameters: Mapping, learning_rate: float, weight_decay: float, dtype: "torch.dtype"):
    """Kingma & Ba, 2015: the decay is added to the gradient."""
    from torch.optim import Adam

    groups = decay_groups(parameters, weight_decay)
    return Adam(groups, lr=learning_rate, betas=BETAS, eps=1e-8, fused=_can_be_fused(parameters))


def muon(parameters: Mapping, learning_rate: float, weight_decay: float, dtype: "torch.dtype"):
    """Jordan, 2024: for the matrices of the layers, with its own products in `dtype`; AdamW for all else."""
    import torch

    from model.training.muon import Muon

    hidden = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p)}
    others = {name: p for name, p in parameters.items() if name not in hidden}
    groups = [{**group, "muon": True, "lr_scale": 1.0} for group in decay_groups(hidden, weight_decay)]
    for group in decay_groups(others, weight_decay):
        scale, betas = BESIDE_MUON, BETAS_BESIDE_MUON
        if "router_rate" in group:  # at 6 times the rate, routers forget some experts
            scale, betas = 1.0, BETAS
        groups.append({**group, "muon": False, "lr_scale": scale, "betas": betas})
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return Muon(groups, lr=learning_rate, dtype=dtype, fused=_can_be_fused(parameters))


def _adams_state(name: str, parameter: "Tensor") -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq")


def _muons_state(name: str, parameter: "Tensor") -> tuple[str, ...]:
    return ("momentum_buffer",) if is_hidden_matrix(name, parameter) else _adams_state(name, parameter)


@dataclass(frozen=True)
class OptimizerKind:
    """What the program needs to know of an optimizer.

    Attributes:
        build: (parameters by name, learning rate, weight decay, dtype of the run's products) -> the optimizer, whose
            groups hold the parameters with their names.
        state: (name, parameter) -> names of the tensors that the optimizer keeps for it, each of the parameter's shape
            and dtype, except "step", a float32 scalar.
        numbers: what every group of a saved state must hold, each a float or a tuple of floats; a checkpoint without
            them is damaged. Their values come from the settings when it is loaded.
        base_rate: the learning rate behind `auto` (see recipe.py); None: there is none, so the user has to give one.
        per_step: (step, counted from 0) -> the values, beside the learning rate, that all groups get for that step;
            None: only the learning rate changes.
        is_elementwise: (name, parameter) -> whether each element's update needs only its own gradient and state, so
            that ranks may share it by ranges (see sharding.py); otherwise one rank updates all of the parameter.
    """

    build: Callable[..., "torch.optim.Optimizer"]
    state: Callable[[str, "Tensor"], tuple[str, ...]]
    numbers: tuple[str, ...] = ("lr",)
    base_rate: float | None = None
    per_step: Callable[[int], dict[str, float]] | None = None
    is_elementwise: Callable[[str, "Tensor"], bool] = lambda name, parameter: False


def momentum_at(step: int) -> float:
    """Muon's momentum in a step, counted from 0: it rises, as in modded-nanogpt, while gradients change fast."""
    return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * min(1.0, step / MOMENTUM_STEPS)


OPTIMIZERS = {
    "adamw": OptimizerKind(adamw, _adams_state, ("lr", "eps", "betas"), 2e-3, is_elementwise=lambda name, p: True),
    "adam": OptimizerKind(adam, _adams_state, ("lr", "eps", "betas"), 2e-3, is_elementwise=lambda name, p: True),
    "muon": OptimizerKind(
        muon,
        _muons_state,
        ("lr", "eps", "betas"),
        base_rate=5e-3,
        per_step=lambda step: {"momentum": momentum_at(step)},
        is_elementwise=lambda name, parameter: not is_hidden_matrix(name, parameter),
    ),
}


def trained_parameters(model: "nn.Module") -> dict[str, "nn.Parameter"]:
    """The parameters that are not frozen, by name; a tied matrix once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(
    model: "nn.Module",
    optimizer_type: str,
    learning_rate: float,
    weight_decay: float,
    dtype: "torch.dtype | None" = None,
    router_rate: float = 1.0,
) -> "torch.optim.Optimizer":
    """The optimizer of the parameters that a model trains, a tied matrix once.

    Parameters keep their names in the optimizer's state, so that a checkpoint of another model is noticed.

    Args:
        dtype: of the run's matrix products; None: float32.
        router_rate: of the routers of experts, times the learning rate.
    """
    import torch

    parameters = trained_parameters(model)
    kind = OPTIMIZERS[optimizer_type]
    optimizer = kind.build(parameters, learning_rate, weight_decay, torch.float32 if dtype is None else dtype)
    covered = sum(len(group["params"]) for group in optimizer.param_groups)
    if covered != len(parameters):
        raise AssertionError(f"the groups hold {covered} of {len(parameters)} parameters")
    for group in optimizer.param_groups:
        if "router_rate" in group:
            group.update(router_rate=router_rate, lr=learning_rate * router_rate)
    return optimizer


def optimizer_bytes(model: "nn.Module", optimizer_type: str) -> int:
    """Bytes of the state that the optimizer will have."""
    state = OPTIMIZERS[optimizer_type].state
    return sum(p.nbytes * len({*state(name, p)} - {"step"}) for name, p in trained_parameters(model).items())


def rates_of(
    optimizer: "torch.optim.Optimizer", optimizer_type: str, learning_rate: float, step: int
) -> list[dict[str, float]]:
    """What depends on the step, counted from 0: every group's learning rate, and what the optimizer adds.

    Rounded to float32, as torch's fused kernels read a rate that is on the device: so a step has the same bits whether
    it gets them from the host or from there.
    """
    per_step = OPTIMIZERS[optimizer_type].per_step
    values = {"lr": learning_rate} | (per_step(step) if per_step is not None else {})
    return [
        {name: float(np.float32(value * _share(group, name))) for name, value in values.items()}
        for group in optimizer.param_groups
    ]


def _share(group: Mapping, name: str) -> float:
    """Of a value of all groups, what a group takes."""
    return group.get("router_rate", 1.0) if name == "lr" else 1.0


def set_rates(optimizer: "torch.optim.Optimizer", optimizer_type: str, learning_rate: float, step: int) -> None:
    """Give every group what `rates_of` returns."""
    for group, rates in zip(
        optimizer.param_groups, rates_of(optimizer, optimizer_type, learning_rate, step), strict=True
    ):
        group.update(rates)


@contextlib.contextmanager
def rates_on_device(optimizer: "torch.optim.Optimizer", rates: Sequence[Mapping[str, "Tensor"]]) -> Iterator[None]:
    """A context in which the groups hold rates as tensors, which a captured step reads again at each replay. Afterwards
    they hold numbers again, as a checkpoint does.

    Args:
        rates: of each group, float32 scalars on the device.
    """
    before = [{**group} for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, rates, strict=True):
        group.update(values)
        if "capturable" in group:  # torch refuses to capture without it; its fused kernels do not read it
            group["capturable"] = True
    try:
        yield
    finally:
        for group, numbers in zip(optimizer.param_groups, before, strict=True):
            group.update(numbers)


def load_optimizer_state(optimizer: "torch.optim.Optimizer", state: dict) -> None:
    """Load a state, but keep the groups' own numbers: they belong to the settings, which may have changed."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [
        {"params": theirs["params"], **numbers} for theirs, numbers in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def state_problem(
    optimizer_type: str, optimizer: Mapping, model: Mapping[str, "Tensor"], has_stepped: bool
) -> str | None:
    """Why a saved state can't be loaded; None where it can.

    Args:
        optimizer: its `state_dict()`.
        model: the parameters that are trained, by name.
        has_stepped: whether every parameter must have a state.
    """
    import torch

    if not isinstance(optimizer_type, str) or optimizer_type not in OPTIMIZERS:
        return f"optimizer_type is {shown(optimizer_type)}"
    kind = OPTIMIZERS[optimizer_type]
    try:
        groups, states = optimizer["param_groups"], optimizer["state"]
        names = {number: name for g in groups for number, name in zip(g["params"], g["param_names"], strict=True)}
        if set(names.values()) != model.keys():
            return "optimizer is not this model's"
        for group in groups:
            for name in kind.numbers:
                numbers = group[name] if isinstance(group[name], tuple) else (group[name],)
                if not all(type(number) is float for number in numbers):
                    return f"optimizer: {name} is {shown(group[name])}"
        if has_stepped and states.keys() != names.keys():
            return "optimizer lacks the state of some parameters"
        for number, state in states.items():
            name, weight = names[number], model[names[number]]
            found = {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}
            scalar, like_weight = ((), torch.float32), (weight.shape, weight.dtype)
            if found != {key: scalar if key == "step" else like_weight for key in kind.state(name, weight)}:
                return f"optimizer: the state of {name} has other parts, shapes or dtypes"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"optimizer cannot be understood ({error!r})"
    return None

"""Muon for the matrices of the layers, AdamW for all else, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

SAFETY = 1.01
# Applied in turn, these odd polynomials a x + b x³ + c x⁵ bring singular values from 0.001 to 1 as near to 1 as any of
# their degree can: Polar Express (Amsel et al., 2025). They grow steeply past 1, where bfloat16's rounding may take a
# value, so all but the last are applied to x / SAFETY, as in the paper: training broke down without it.
EXACT = (
    (8.287212, -23.595887, 17.300387),
    (4.107059, -2.947850, 0.544843),
    (3.948691, -2.908902, 0.551819),
    (3.318420, -2.488488, 0.510049),
    (2.300652, -1.668904, 0.418807),
)
POLYNOMIALS = tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in EXACT[:-1]) + EXACT[-1:]


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows or columns: U V^T of the decomposition U S V^T.

    Args:
        matrices: float32 [N, rows, columns]
        dtype: of the products; bfloat16 is enough (Jordan, 2024).
    """
    x = matrices.to(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT  # the Gram matrix of the smaller side is cheaper
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def orthogonalization_flops(*shape: int) -> int:
    """Floating-point operations of `orthogonalized` for a matrix [rows, columns] or a stack [N, rows, columns]."""
    return len(POLYNOMIALS) * polynomial_flops(*shape)


def polynomial_flops(*shape: int) -> int:
    """The same of one of its polynomials; a product of [m, n] and [n, m] takes 2 m² n."""
    *count, (small, large) = *shape[:-2], sorted(shape[-2:])
    return math.prod(count) * (4 * small**2 * large + 2 * small**3)


def by_shape(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of the same shape together."""
    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.shape].append(tensor)
    return [*found.values()]


def _rate(group: Mapping) -> float | Tensor:
    """A group's learning rate, rounded to float32: a float, or a scalar on the device."""
    rate = group["lr"] * group["lr_scale"]
    return rate if isinstance(rate, Tensor) else float(np.float32(rate))


def _in_float64(number: float | Tensor) -> float | Tensor:
    """What is computed from it on the device then has the bits that Python computes."""
    return number.double() if isinstance(number, Tensor) else number


class MatricesOfRanks(Protocol):
    """Matrices whose rows lie on several ranks (`divided_matrices.py`)."""

    def turned(
        self, updates: Mapping[Tensor, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[list[Tensor], Tensor, int]]:
        """Orthogonalize whole matrices."""


class Muon(torch.optim.Optimizer):
    """Steps of one size in every direction of a matrix (Jordan, 2024); other parameters are AdamW's.

    An update of Muon is scaled to the root mean square of one of AdamW's, 0.2, so that both share a learning rate and a
    weight decay (Liu et al., 2025). Matrices of one shape are processed together, and their momentum is one tensor, of
    which the state of each is a part.

    As in torch's fused optimizers, a step changes nothing where the attribute `found_inf`, a float32 scalar on the
    device, is 1; so a device can leave out a step by itself. A group's "lr" and "momentum" may be float32 scalars there
    too: the bits are those of the same floats.

    Args:
        groups: parameter groups with names; those with "muon": True hold matrices and stacks of matrices; the others
            are AdamW's.
        lr: learning rate; a group's "lr_scale" multiplies it.
        momentum: of Muon, Nesterov's.
        betas, eps: of AdamW.
        dtype: of Muon's matrix products.
        fused: whether AdamW takes its steps in one kernel.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
    ) -> None:
        defaults = {"lr": lr, "lr_scale": 1.0, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        defaults["fused"] = fused  # of AdamW; a loaded state then has its step on the device of the parameters
        super().__init__(groups, defaults)
        self.dtype = dtype
        self.divided: MatricesOfRanks | None = None  # where parameters are this rank's rows of matrices
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = True  # torch's name for heeding found_inf

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take a step with the parameters' gradients."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient:
                (self._step_muon if group["muon"] else self._step_adamw)(group, with_gradient)

    def _step_muon(self, group: dict, parameters: list[Tensor]) -> None:
        lr, veto = _in_float64(_rate(group)), self.found_inf
        decay = 1 - lr * group["weight_decay"]
        torch._foreach_mul_(parameters, decay if veto is None else torch.where(veto > 0, 1.0, decay).float())
        for some, updates, longer in self._turned(parameters, group["momentum"]):
            if veto is not None:
                updates = updates.masked_fill_(veto > 0, 0.0)
            updates = updates.mul_(-lr * 0.2 * longer**0.5)
            torch._foreach_add_(some, updates.unbind(0))

    def _turned(self, parameters: list[Tensor], momentum: float | Tensor) -> Iterator[tuple[list[Tensor], Tensor, int]]:
        """Parameters of one shape, the directions of their steps [N, …, rows, columns], and a matrix's longer side."""
        updates = [(some, self._updates(some, momentum)) for some in by_shape(parameters)]
        if self.divided is not None:  # but of a stack, which a rank holds whole matrices of
            rows = {p: row for some, whole in updates for p, row in zip(some, whole, strict=True) if p.dim() == 2}
            yield from self.divided.turned(rows, self.dtype)
            updates = [(some, whole) for some, whole in updates if some[0].dim() > 2]
        for some, matrices in updates:
            turned = orthogonalized(matrices.flatten(0, -3), self.dtype).view_as(matrices)
            yield some, turned, max(some[0].shape[-2:])

    def _updates(self, parameters: list[Tensor], momentum: float | Tensor) -> Tensor:
        """Count the gradients of parameters of one shape into their momentum; what is to be orthogonalized [N, …, rows,
        columns]."""
        gradients, buffers = torch.stack([p.grad for p in parameters]), self._momentum(parameters)
        if self.found_inf is not None:  # the momentum of itself and itself is itself
            gradients = torch.where(self.found_inf > 0, buffers, gradients)
        rest = 1 - _in_float64(momentum)
        buffers.lerp_(gradients, rest.float() if isinstance(rest, Tensor) else rest)
        return gradients.lerp_(buffers, momentum)

    def _momentum(self, parameters: Sequence[Tensor]) -> Tensor:
        """The momentum of parameters of one shape [N, …, rows, columns], whose parts their states are from now on."""
        states = [self.state[p] for p in parameters]
        views = [state.get("momentum_buffer") for state in states]
        whole = None if views[0] is None else views[0]._base
        is_whole = whole is not None and len(whole) == len(views)
        if is_whole and all(view is not None and view._base is whole for view in views):
            return whole
        parts = [torch.zeros_like(p) if view is None else view for p, view in zip(parameters, views, strict=True)]
        whole = torch.stack(parts)
        for state, part in zip(states, whole.unbind(0), strict=True):
            state["momentum_buffer"] = part
        return whole

    def _step_adamw(self, group: dict, parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in parameters],
            found_inf=self.found_inf,
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=_rate(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

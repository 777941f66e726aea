"""A step of training between its launch and its count, and what a device decides before the host has read anything."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import accelerator
from model.training.choices import Ranks


def runs_ahead(device: torch.device, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a device gets a step before the last one was read, as CUDA's does: a CPU would compute nothing meanwhile,
    some have no float64, and with others it was not tried. For tests, MATECONV_RUN_AHEAD=1 has a CPU do so too, and 0
    has a GPU not do so.

    The optimizer has to leave out a step by `found_inf`, which the device itself sets, as torch's fused ones do.
    """
    does = accelerator.kind_of(device).runs_ahead
    asked = os.environ.get("MATECONV_RUN_AHEAD", str(int(does)))
    able = (does or device.type == "cpu") and getattr(optimizer, "_step_supports_amp_scaling", False)
    return able and asked == "1"


BEFORE_SUMS = 3  # numbers of a step before its sums: the norm, ranks with a bad gradient, and signals to stop


class StepDropped(Exception):
    """A signal to stop came between two micro-batches of a step."""


@dataclass(frozen=True)
class Step:
    """A step whose gradients were computed, or launched on a device that runs ahead."""

    number: int  # steps taken before it
    position: int  # samples read before it, by all ranks
    samples: np.ndarray  # numbers of those that it reads, of all ranks
    terms: int  # of its loss
    lr: float
    recent_losses: list[float]  # that its loss is compared with, see `divergence.fault_of_step`
    random_state: dict | None  # before it, where it may have to be taken back
    loss_scale: list[Tensor]  # float16's and the steps since it grew, before it
    ema_updates: int  # of the moving average before it
    numbers: Callable[[], list[float]]  # own gradient norm, then sums over ranks: see `read_numbers`; waits for them

    @property
    def end(self) -> int:
        """Samples read after it, by all ranks."""
        return self.position + len(self.samples)


@dataclass(frozen=True)
class StepNumbers:
    """What a step takes from the host beside its batches: numbers, or, where it is captured, scalars on the device.

    On the device they are float64 where the host would compute in float64, and float32 where a kernel would round them.
    """

    factor: float | Tensor  # that the loss, a sum, is multiplied with before its gradient is computed
    terms: float | Tensor  # of the loss of all ranks
    stop_signals: float | Tensor  # that this rank got
    limit: float | Tensor  # the highest loss that is no spike
    average_weight: float | Tensor  # of the weights in their moving average; 0 without one
    rates: list[dict[str, float | Tensor]]  # of each of the optimizer's groups

    def flat(self) -> list[float]:
        """All of them, one after another."""
        rates = [value for group in self.rates for value in group.values()]
        return [self.factor, self.terms, self.stop_signals, self.limit, self.average_weight, *rates]

    def on_device(self, numbers: Tensor) -> "StepNumbers":
        """The same as scalars.

        Args:
            numbers: float64 [N], as `flat` returns them.
        """
        factor, terms, stop_signals, limit, average_weight, *values = numbers.unbind()
        rates = iter(values)
        groups = [{name: next(rates).float() for name in group} for group in self.rates]
        return StepNumbers(factor.float(), terms, stop_signals, limit, average_weight.float(), groups)


def read_numbers(norm: Tensor, sums: Tensor, stop_signals: int, processes: Ranks) -> list[float]:
    """A step's own gradient norm, and summed over ranks: those whose gradient is not finite, signals to stop, `sums`.

    All in one copy from the device, which is waited for.

    Args:
        norm: float32 scalar.
        sums: float32 [N], the loss first.
    """
    grad_norm, *own = torch.cat((norm[None], sums)).tolist()
    return [grad_norm, *processes.all_sum([float(not math.isfinite(grad_norm)), float(stop_signals), *own])]


class DeviceVerdict:
    """Which steps may be taken, decided on the device as `divergence.fault_of_step` decides on the host.

    After a step that can't be used, no other is taken either, until the host has read it and calls `reset`.
    """

    def __init__(self, device: torch.device, processes: Ranks) -> None:
        self._processes = processes
        self.veto = torch.zeros((), device=device)  # float32, 1: no step is taken, as fused optimizers' found_inf

    def reset(self) -> None:
        """Steps may be taken again."""
        self.veto.zero_()

    def judge(self, norm: Tensor, sums: Tensor, numbers: StepNumbers) -> Tensor:
        """Set `veto`, in place, since a captured step reads it there; and return what `read_numbers` returns, on the
        device.

        Args:
            norm, sums: as there.

        Returns:
            float64 [BEFORE_SUMS + N]: the norm, two sums, and those of `sums`.
        """
        signals, terms = (_scalar(number, norm.device) for number in (numbers.stop_signals, numbers.terms))
        summed = torch.cat((torch.stack(((~norm.isfinite()).double(), signals)), sums.double()))
        self._processes.sum_on_device(summed)
        loss = summed[2] / terms
        usable = (summed[0] == 0) & loss.isfinite() & (loss <= numbers.limit)
        torch.maximum(self.veto, (~usable).float(), out=self.veto)
        return torch.cat((norm.double()[None], summed))


def _scalar(number: float | Tensor, device: torch.device) -> Tensor:
    """A float64 scalar on the device, without a copy from the host, which would wait. Divided by it, a number has the
    same bits whether it was there before or not: CUDA multiplies with the inverse of one from the host."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.float64, device=device)


def copied_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Copy numbers behind the device's other work; what is returned waits for that."""
    if numbers.device.type == "cpu":
        return numbers.clone().tolist  # a captured step overwrites them
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    copied = accelerator.record_event(numbers.device)

    def read() -> list[float]:
        copied.synchronize()
        return pinned.tolist()

    return read

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
        self._device, self._processes = device, processes
        self.reset()

    def reset(self) -> None:
        """Steps may be taken again."""
        self.sums = torch.zeros(0)  # of the last step, over ranks, on the device: float64 [N], see `judge`
        self.veto = torch.zeros((), device=self._device)  # float32, 1: no step is taken, as fused optimizers' found_inf

    def judge(
        self, norm: Tensor, sums: Tensor, stop_signals: int, terms: int, limit: float
    ) -> Callable[[], list[float]]:
        """Set `veto` and `sums`, and return what reads the numbers that `read_numbers` returns.

        Args:
            norm, sums, stop_signals: as there.
            terms: of the loss of all ranks.
            limit: the highest loss that is no spike.
        """
        signals = torch.full_like(norm, stop_signals, dtype=torch.float64)  # no copy from the host, which would wait
        summed = torch.cat((torch.stack(((~norm.isfinite()).double(), signals)), sums.double()))
        self._processes.sum_on_device(summed)
        self.sums = summed[2:]
        loss = self.sums[0] / terms
        usable = (summed[0] == 0) & loss.isfinite() & (loss <= limit)
        self.veto = torch.maximum(self.veto, (~usable).float())
        return _copied_to_host(torch.cat((norm.double()[None], summed)))


def _copied_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Copy numbers behind the device's other work; what is returned waits for that."""
    if numbers.device.type == "cpu":
        return numbers.tolist
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    copied = accelerator.record_event(numbers.device)

    def read() -> list[float]:
        copied.synchronize()
        return pinned.tolist()

    return read

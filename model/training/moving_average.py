"""The moving average of the weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from model.storage.slices import copy_by_name


class MovingAverage(AveragedModel):
    """An exponential moving average of the weights, updated with `update_parameters(model)` after each step.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first steps are soon forgotten.
    The count of updates stays on the CPU: PyTorch's own update sends it to the GPU and back, and waits there for all
    that the GPU still has to do. Frozen weights, as LoRA leaves them, and buffers, such as the biases of experts, are
    the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        for own, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            if not theirs.requires_grad:
                own.data = theirs.data
        for own, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            own.data = theirs.data
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, veto: torch.Tensor | None = None) -> None:
        """Count the weights in; the first ones are taken as they are.

        Args:
            veto: on the weights' device, 1 where they must not be counted in; the caller then restores `n_averaged`.
        """
        self.average(model, self.next_weight(), veto)
        self.n_averaged += 1

    def next_weight(self) -> float:
        """How much the next weights count."""
        return weight_of_update(int(self.n_averaged), self.decay)

    def average(self, model: nn.Module, weight: float | torch.Tensor, veto: torch.Tensor | None = None) -> None:
        """Count the weights in, but do not count the update: on the device alone, as a captured step needs it.

        Args:
            weight, veto: see `average_in`.
        """
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        own, theirs = zip(*((own, theirs) for own, theirs in pairs if theirs.requires_grad), strict=True)
        average_in(own, theirs, weight, veto)

    def averaged_model(self) -> nn.Module:
        """The model whose weights are the average."""
        return self.module

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """The average's state dict; its tensors are those in use."""
        return self.module.state_dict()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on from this average."""
        copy_by_name(weights, self.module.state_dict())


@torch.no_grad()
def average_in(
    own: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    weight: float | torch.Tensor,
    veto: torch.Tensor | None,
) -> None:
    """Count weights into their averages `own`, in place.

    Args:
        weight: from 0 to 1, how much they count; a float32 scalar on the device gives the bits of the same float.
        veto: on the weights' device, 1 where they must not be counted in.
    """
    if veto is not None:
        weights = [torch.where(veto > 0, *pair) for pair in zip(own, weights, strict=True)]
    torch._foreach_lerp_(own, weights, [weight] * len(own) if isinstance(weight, torch.Tensor) else weight)


def weight_of_update(updates: int, decay: float) -> float:
    """How much weights count in their average after so many updates; the first ones are taken as they are."""
    return 1 - min(decay, (1 + updates) / (10 + updates)) if updates else 1.0

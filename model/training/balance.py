"""How evenly the routers of a mixture of experts choose: what keeps it even, and what a run logs of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.model import Transformer
from model.training.settings import TrainingSettings


class Routing:
    """What the routers counted in a step, and what follows from it; of a dense model nothing.

    Args:
        model: that is trained.
        training: as resolved, without `auto`.
    """

    def __init__(self, model: Transformer, training: TrainingSettings) -> None:
        self._model, self._config = model, model.config
        self._rate = 0.0 if training.lora_rank else training.expert_bias_rate
        routers = [layer.feed_forward.router for layer in model.layers] if model.config.expert_bias else []
        self._biases = [router.bias for router in routers]
        self._last: dict[str, float] = {}

    def begin_step(self) -> None:
        """Forget what was counted."""
        if self._config.n_experts:
            self._model.routing.zero_()

    def counted(self) -> Tensor:
        """What this rank's routers have counted since, float32 [n_layers * (n_experts + 2)]: sums, which add up over
        ranks; empty of a dense model."""
        return self._model.routing.flatten() if self._config.n_experts else torch.zeros(0, device=self._model.device)

    @torch.no_grad()
    def move_biases(self, counted: Tensor, veto: Tensor | None = None) -> None:
        """Raise the biases of experts with fewer tokens than the mean, and lower the others' (Wang et al., 2024, arXiv
        2408.15664); their mean stays 0.

        Args:
            counted: as `counted` returns it, summed over ranks.
            veto: on the device, 1 where the biases must stay as they are.
        """
        if not self._biases:
            return
        for bias, load in zip(self._biases, self._by_layer(counted)[:, :-2].float(), strict=True):
            step = torch.sign(load.mean() - load)
            step -= step.mean()
            bias.add_(step if veto is None else step.where(veto == 0, 0.0), alpha=self._rate)

    def measure(self, counted: Sequence[float]) -> dict[str, float]:
        """What metrics.jsonl has of a step: the largest and the smallest load over the mean of a layer, the entropy of
        the loads over that of even ones, the experts of all layers without a token, and the means of the losses.

        Args:
            counted: as `counted` returns it, summed over ranks.
        """
        if len(counted) == 0:
            return {}
        by_layer = self._by_layer(torch.tensor(counted, dtype=torch.float64))
        load, losses = by_layer[:, :-2], by_layer[:, -2:]
        total = load.sum(1, keepdim=True).clamp(min=1)
        tokens = total / self._config.n_active_experts
        over_mean = load / total * self._config.n_experts
        entropy = torch.special.entr(load / total).sum(1) / math.log(max(2, self._config.n_experts))
        means = (losses / tokens).mean(0).tolist()
        self._last = {
            "expert_load_max": round(float(over_mean.max()), 4),
            "expert_load_min": round(float(over_mean.min()), 4),
            "expert_entropy": round(float(entropy.mean()), 6),
            "dead_experts": int((load == 0).sum()),
            "balance_loss": round(means[0], 6),
            "router_z_loss": round(means[1], 6),
        }
        return self._last

    def line(self) -> str | None:
        """The last of these in words; None before the first step and of a dense model."""
        if not self._last:
            return None
        found, experts = self._last, self._config.n_layers * self._config.n_experts
        return (
            f"experts: {found['expert_load_min']:.2f} to {found['expert_load_max']:.2f} times the mean load in the last"
            f" step, {found['dead_experts']} of {experts:,} without a token"
        )

    def _by_layer(self, counted: Tensor) -> Tensor:
        return counted.view(self._config.n_layers, -1)

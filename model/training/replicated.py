"""A model that every process has whole: the usual way. `fully_sharded.py` is the other one, with the same methods."""

import contextlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from model.lora import merged
from model.model import Transformer
from model.storage.slices import copy_by_name
from model.training.clipping import clip_gradients
from model.training.moving_average import MovingAverage
from model.training.optimizer import trained_parameters
from model.training.sharded_optimizer import SharedAverage


class Replicated:
    """A model of which each process has a copy, and whose gradients DistributedDataParallel averages.

    Args:
        model: the plain one.
        called: compiled and distributed as set.
        processes: how many have a copy.

    Attributes:
        called: what is trained: it must be called, its parts not by themselves.
        averaged_over: processes over which the backward pass averages the gradients.
        shards: processes that have different shares of the weights.
        holdings: who holds what of the weights; None: everybody everything.
    """

    shards, holdings = 1, None

    def __init__(self, model: Transformer, called: nn.Module, processes: int) -> None:
        self.model, self.called, self.averaged_over = model, called, processes

    def exchanging(self, is_last: bool) -> contextlib.AbstractContextManager:
        """A context for the forward and backward pass of a micro-batch; that of a step's last one exchanges the
        gradients."""
        return contextlib.nullcontext() if is_last or self.averaged_over == 1 else self.called.no_sync()

    def clip(self, most: float) -> Tensor:
        """Scale the gradients so that their norm is at most that; returns the norm before, float32 scalar."""
        if self.averaged_over == 1:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), most or math.inf)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return clip_gradients(gradients, most or math.inf, lambda squares: None)

    def own_weights(self) -> Iterable[Tensor]:
        """What this process holds of the weights that are trained."""
        return trained_parameters(self.model).values()

    def weights(self) -> dict[str, Tensor]:
        """The state dict."""
        return self.model.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take a state dict."""
        copy_by_name(weights, self.model.state_dict())

    def evaluated_model(self, average: MovingAverage | SharedAverage | None) -> Transformer:
        """The weights, or their average, without adapters: with these it is a new model. Every process must call it."""
        return merged(self.model if average is None else average.averaged_model())

    def evaluating(
        self, model: Transformer | None, average: MovingAverage | SharedAverage | None
    ) -> contextlib.AbstractContextManager[Transformer]:
        """A context whose value all processes can evaluate.

        Args:
            model: what `evaluated_model` returned; None: it is made.
        """
        return contextlib.nullcontext(self.evaluated_model(average) if model is None else model)

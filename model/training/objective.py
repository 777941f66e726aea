"""What a step minimizes: how a micro-batch is read, and what its loss is."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from model.dataset import PretrainDataset
from model.training.data import TrainingData
from model.training.next_token import NextToken
from model.training.plan import RunPlan
from model.training.preferences import Preference


class Objective(Protocol):
    """What the training loop asks of an objective. To it a batch is whatever `read` returns and `loss` takes.

    The loss is a sum, and the loop divides the sum of all micro-batches of all ranks by `count`. So a step computes the
    same however its samples are divided into micro-batches and ranks.

    Attributes:
        names: of what `loss` returns beside the loss, as metrics.jsonl has it.
    """

    names: ClassVar[tuple[str, ...]]

    def count(self, data: PretrainDataset, samples: np.ndarray) -> int:
        """The terms of the loss in these samples, those of all micro-batches and ranks."""
        ...

    def read(self, data: PretrainDataset, samples: np.ndarray):
        """One micro-batch of one rank, on its device."""
        ...

    def loss(self, model: nn.Module, batch) -> Tensor:
        """Sums over a micro-batch: the loss, and what `names` name; float32 [1 + len(names)]. Called within autocast.

        Args:
            model: compiled and distributed as set: it must be called, its parts not by themselves.
        """
        ...

    def measure(self, model: nn.Module, batches: Iterable, autocast, asked_to_stop: Callable[[], bool]):
        """The sums of an evaluation, which add up over ranks: list[float]; None if `asked_to_stop`, which is called
        after each batch, said so."""
        ...

    def means(self, sums: list[float]) -> dict[str, float]:
        """What metrics.jsonl has of an evaluation, from its sums over all ranks; `val_loss` among it."""
        ...


def choose_objective(data: TrainingData, plan: RunPlan, references: Mapping[Path, np.ndarray]) -> Objective:
    """DPO for pairs of answers, the next token for texts and chats.

    Args:
        references: of pairs, as `find_references` returns them.
    """
    t, device = plan.training, plan.hardware.device
    if data.is_pairs:
        return Preference(t.batch_size, t.dpo_beta, device, references)
    return NextToken(data, t, device)

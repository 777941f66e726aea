"""What a step minimizes: how a micro-batch is read, and what its loss is."""

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.dataset import PretrainDataset, number_documents
from model.training.data import TrainingData
from model.training.evaluation import mean_losses, validation_sums
from model.training.settings import TrainingSettings

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, numbers of documents; int64 [B, T] each


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


class NextToken:
    """Predict each token from those before it: of texts all of them, of chats those of the answers.

    Args:
        data: what is trained on.
        training: as resolved, without `auto`.
        device: that receives the batches.
    """

    names = ()

    def __init__(self, data: TrainingData, training: TrainingSettings, device: torch.device) -> None:
        self._data, self._device = data, device
        self._rows, self._document_mask = training.batch_size, training.document_mask

    def count(self, data: PretrainDataset, samples: np.ndarray) -> int:
        """The tokens to predict in these samples."""
        return data.count_targets(samples)

    def read(self, data: PretrainDataset, samples: np.ndarray) -> Batch:
        """Inputs, targets and, with document_mask, their document numbers; int64 [batch_size, max_seq_len] each.

        Args:
            samples: at most batch_size; padding, which does not count, fills the other rows.
        """
        inputs, targets = data.batch(samples, self._rows)
        if self._device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        inputs, targets = (tensor.to(self._device, non_blocking=True) for tensor in (inputs, targets))
        if not self._document_mask:
            return inputs, targets, None
        if self._data.is_chat:
            numbers = data.number_runs(samples, self._rows)
            return inputs, targets, numbers.to(self._device, non_blocking=True)
        marks = self._data.delimiters
        return inputs, targets, number_documents(inputs, targets, marks.bos_id, marks.eos_id)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """In nats, summed over the tokens to predict; float32 [1]."""
        inputs, targets, documents = batch
        return model(inputs, targets, documents=documents)[None]

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], autocast, asked_to_stop: Callable[[], bool]
    ) -> list[float] | None:
        """As `validation_sums`."""
        return validation_sums(model, batches, self._data.token_bytes, autocast, asked_to_stop)

    def means(self, sums: list[float]) -> dict[str, float]:
        """Nats per token, and bits per byte of text."""
        return dict(zip(("val_loss", "bits_per_byte"), mean_losses(sums), strict=True))

"""What a step minimizes: how a micro-batch is read, and what its loss is."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.dataset import PretrainDataset, number_documents
from model.training.data import TrainingData
from model.training.settings import TrainingSettings

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, numbers of documents; int64 [B, T] each


class Objective(Protocol):
    """What the training loop asks of an objective. To it a batch is whatever `read` returns and `loss` takes.

    The loss is a sum, and the loop divides the sum of all micro-batches of all ranks by `count`. So a step computes the
    same however its samples are divided into micro-batches and ranks.
    """

    def count(self, samples: np.ndarray) -> int:
        """The terms of the loss in these samples, those of all micro-batches and ranks."""
        ...

    def read(self, data: PretrainDataset, samples: np.ndarray):
        """One micro-batch of one rank, on its device."""
        ...

    def loss(self, model: nn.Module, batch) -> Tensor:
        """The summed loss of a micro-batch, a scalar; called within autocast.

        Args:
            model: compiled and distributed as set: it must be called, its parts not by themselves.
        """
        ...


class NextToken:
    """Predict each token from those before it: of texts all of them, of chats those of the answers.

    Args:
        data: what is trained on.
        training: as resolved, without `auto`.
        device: that receives the batches.
    """

    def __init__(self, data: TrainingData, training: TrainingSettings, device: torch.device) -> None:
        self._data, self._device = data, device
        self._rows, self._document_mask = training.batch_size, training.document_mask

    def count(self, samples: np.ndarray) -> int:
        """The tokens to predict in these samples."""
        return self._data.train.count_targets(samples)

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
        """In nats, summed over the tokens to predict."""
        inputs, targets, documents = batch
        return model(inputs, targets, documents=documents)

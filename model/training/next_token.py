"""Pre-training and tuning on chats: predict each token from those before it."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from model import accelerator
from model.attention import VARLEN
from model.dataset import PretrainDataset, number_documents
from model.document_attention import document_starts
from model.loss import bits_per_byte
from model.model import Transformer
from model.training.data import TrainingData
from model.training.settings import TrainingSettings

# Inputs, targets and numbers of documents, int64 [B, T] each; where documents begin, int32 [N + 1].
Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


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
        self._tells_starts = training.attention == VARLEN
        self._places = 0  # of `document_starts`

    def count(self, data: PretrainDataset, samples: np.ndarray) -> int:
        """The tokens to predict in these samples."""
        return data.count_targets(samples)

    def read(self, data: PretrainDataset, samples: np.ndarray) -> Batch:
        """Inputs, targets and, with document_mask, their document numbers, int64 [batch_size, max_seq_len] each; and,
        where attention is by them, the documents' beginnings.

        Args:
            samples: at most batch_size; padding, which does not count, fills the other rows.
        """
        inputs, targets = data.batch(samples, self._rows)
        documents = starts = None
        if self._document_mask and self._data.is_chat:
            documents = data.number_runs(samples, self._rows)
        elif self._document_mask:
            marks = self._data.delimiters
            documents = number_documents(inputs, targets, marks.bos_id, marks.eos_id)
        if documents is not None and self._tells_starts:
            starts = document_starts(documents, self._places)
            self._places = len(starts) - 1
        batch = inputs, targets, documents, starts
        return tuple(tensor if tensor is None else accelerator.send(tensor, self._device) for tensor in batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """In nats, summed over the tokens to predict; float32 [1]."""
        inputs, targets, documents, starts = batch
        return model(inputs, targets, documents=documents, starts=starts)[None]

    @torch.no_grad()
    def measure(
        self, model: Transformer, batches: Iterable[Batch], autocast, asked_to_stop: Callable[[], bool]
    ) -> list[float] | None:
        """Sums over batches: loss in nats, tokens, the loss of those that are text, and its bytes; None after a stop.

        Control tokens count in the loss of all tokens only: so a text has the bits per byte that `--score_file` says.

        Args:
            model: evaluated without dropout; returned to the mode that it was in.
            autocast: context in which the model runs.
            asked_to_stop: called after each batch, by every process.
        """
        token_bytes = self._data.token_bytes
        sums, is_text = [0.0] * 4, torch.from_numpy(token_bytes.is_text)
        was_training, stopped = model.training, False
        model.eval()
        for inputs, targets, documents, starts in batches:
            counted = targets >= 0
            before, ids = inputs[counted].cpu(), targets[counted].cpu()
            control = torch.zeros_like(counted)
            control[counted] = ~is_text[ids].to(control.device)
            with autocast:
                losses = model(inputs, targets, documents=documents, per_token=True, starts=starts)
            nats, silent = float(losses.sum()), float(losses[control].sum())
            text_bytes = token_bytes.count(before.numpy(), ids.numpy())
            for place, value in enumerate((nats, len(ids), nats - silent, text_bytes)):
                sums[place] += value
            if stopped := asked_to_stop():
                break
        model.train(was_training)
        return None if stopped else sums

    def means(self, sums: list[float]) -> dict[str, float]:
        """Nats per token and bits per byte of text, from the sums of `measure` over all ranks."""
        nats, tokens, text_nats, byte_count = sums
        return {"val_loss": nats / tokens, "bits_per_byte": bits_per_byte(text_nats, byte_count)}

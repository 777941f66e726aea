"""Texts mixed into chats, so that a model that learns to answer does not forget what it learned in pre-training."""

import numpy as np
import torch

from model.dataset import PretrainDataset


class MixedDataset:
    """Chats and texts as one dataset: the samples of the texts follow those of the chats.

    It stands for a `PretrainDataset` where training reads samples; all tokens of the texts are learned.
    """

    def __init__(self, chats: PretrainDataset, texts: PretrainDataset) -> None:
        self.chats, self._of_chats, self._texts = chats.chats, chats, texts
        self.packing = chats.packing  # not None: samples differ in what they predict
        self._parts = (chats, texts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _split(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places in `samples` of those of the chats, and of the texts."""
        is_text = samples >= len(self._of_chats)
        return np.flatnonzero(~is_text), np.flatnonzero(is_text)

    def _own(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples by the numbers that each part gives them."""
        chats, texts = self._split(samples)
        return samples[chats], samples[texts] - len(self._of_chats)

    def count_targets(self, samples: np.ndarray) -> int:
        """Tokens that these samples predict."""
        return sum(part.count_targets(own) for part, own in zip(self._parts, self._own(samples), strict=True))

    def count_tokens(self, samples: np.ndarray) -> int:
        """Tokens that the model reads of these samples."""
        return sum(part.count_tokens(own) for part, own in zip(self._parts, self._own(samples), strict=True))

    def batch(self, samples: np.ndarray, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [rows, seq_len] each, as `PretrainDataset.batch`."""
        inputs, targets = self._of_chats.batch(samples[:0], rows)  # padding
        for part, places, own in zip(self._parts, self._split(samples), self._own(samples), strict=True):
            if len(own):
                inputs[places], targets[places] = part.batch(own, len(own))
        return inputs, targets

    def number_runs(self, samples: np.ndarray, rows: int) -> torch.Tensor:
        """The numbers of the runs, int64 [rows, seq_len], as `PretrainDataset.number_runs`."""
        numbers = self._of_chats.number_runs(samples[:0], rows)
        for part, places, own in zip(self._parts, self._split(samples), self._own(samples), strict=True):
            if len(own):
                numbers[places] = part.number_runs(own, len(own))
        return numbers

"""Texts mixed into chats, so that a model that learns to answer does not forget what it learned in pre-training."""

import numpy as np
import torch

from model.dataset import PretrainDataset, SampleOrder, epoch_order


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


class MixedOrder(SampleOrder):
    """The order of chats with texts spread evenly among them, a pure function of (seed, epoch) as well.

    An epoch reads every sample of the chats once. Of the texts it reads the next `share` of their order, from which
    a later epoch continues: they pass once before any of them is read again.

    Args:
        samples: of the chats, int64.
        texts: of the texts, int64.
        share: of the texts in all samples, 0 to 1.
    """

    def __init__(self, samples: np.ndarray, texts: np.ndarray, share: float, seed: int, rows_per_step: int) -> None:
        super().__init__(samples, seed, rows_per_step)
        self._texts, self._texts_per_epoch = texts, max(1, round(len(samples) * share / (1 - share)))
        self.per_epoch = len(samples) + self._texts_per_epoch
        self._counted = [0]  # tokens that the texts of the first N epochs predict

    def _texts_of(self, epoch: int) -> np.ndarray:
        places = epoch * self._texts_per_epoch + np.arange(self._texts_per_epoch)
        passes, places = np.divmod(places, len(self._texts))
        orders = {number: epoch_order(len(self._texts), self.seed, number) for number in np.unique(passes).tolist()}
        found = [orders[number][places[passes == number]] for number in orders]
        return self._texts[np.concatenate(found)]

    def _order_of(self, epoch: int) -> np.ndarray:
        own, texts = super()._order_of(epoch), self._texts_of(epoch)
        places = [(np.arange(len(samples)) + 0.5) / len(samples) for samples in (own, texts)]
        return np.concatenate((own, texts))[np.argsort(np.concatenate(places), kind="stable")]

    def _count_epochs(self, epochs: int, dataset: PretrainDataset) -> int:
        while len(self._counted) <= epochs:
            self._counted.append(self._counted[-1] + dataset.count_targets(self._texts_of(len(self._counted) - 1)))
        return super()._count_epochs(epochs, dataset) + self._counted[epochs]

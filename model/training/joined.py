"""Several token files as one dataset."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from model.dataset import PretrainDataset, SampleRange, hold_out


class JoinedDataset:
    """The samples of several datasets, one after the other: of texts, or of chats and then texts.

    It stands for a `PretrainDataset` where training reads samples. A part may be joined too.

    Args:
        parts: at least one, of equal `seq_len`. If there are chats they are first; all tokens of texts are learned.
    """

    def __init__(self, parts: "Sequence[PretrainDataset | JoinedDataset]") -> None:
        self.parts, self.seq_len, self.chats = parts, parts[0].seq_len, parts[0].chats
        self.packing = parts[0].packing  # not None: samples differ in what they predict
        self.begins = np.cumsum([0, *map(len, parts)], dtype=np.int64)  # [parts + 1], in samples

    def __len__(self) -> int:
        return int(self.begins[-1])

    def token_arrays(self) -> list[np.ndarray]:
        """The ids of each file, as `PretrainDataset.token_arrays`."""
        return sum((part.token_arrays() for part in self.parts), [])

    def hold_out(self) -> tuple[SampleRange, np.ndarray]:
        """Set samples aside for validation, spread over all parts: (for training, held out); see `hold_out`."""
        return hold_out(len(self))

    def fingerprint(self) -> dict:
        """What identifies this data: how many tokens and parts there are, and what identifies each part."""
        found = [part.fingerprint() for part in self.parts]
        of_all = {"tokens": sum(one["tokens"] for one in found), "files": len(found)}
        return of_all | {f"{number}_{key}": one[key] for number, one in enumerate(found, 1) for key in one}

    def _split(self, samples: np.ndarray) -> "Iterator[tuple[PretrainDataset | JoinedDataset, np.ndarray, np.ndarray]]":
        """Each part that some samples are of, their places in `samples`, and the numbers that the part gives them."""
        numbers = np.searchsorted(self.begins, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield self.parts[number], places, samples[places] - self.begins[number]

    def count_targets(self, samples: np.ndarray) -> int:
        """Tokens that these samples predict."""
        return sum(part.count_targets(own) for part, _, own in self._split(samples))

    def count_tokens(self, samples: np.ndarray) -> int:
        """Tokens that the model reads of these samples."""
        return sum(part.count_tokens(own) for part, _, own in self._split(samples))

    def read_ahead(self, samples: np.ndarray) -> None:
        """As `PretrainDataset.read_ahead`."""
        for part, _, own in self._split(samples):
            part.read_ahead(own)

    def batch(self, samples: np.ndarray, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [rows, seq_len] each, as `PretrainDataset.batch`."""
        inputs, targets = self.parts[0].batch(samples[:0], rows)  # padding
        for part, places, own in self._split(samples):
            inputs[places], targets[places] = part.batch(own, len(own))
        return inputs, targets

    def number_runs(self, samples: np.ndarray, rows: int) -> torch.Tensor:
        """The numbers of the runs, int64 [rows, seq_len], as `PretrainDataset.number_runs`."""
        numbers = self.parts[0].number_runs(samples[:0], rows)
        for part, places, own in self._split(samples):
            numbers[places] = part.number_runs(own, len(own))
        return numbers

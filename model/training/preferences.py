"""Preference tuning on pairs of answers: direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290)."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import accelerator
from model.dataset import PretrainDataset
from model.training.reference import answer_log_probabilities, answers_of

PairBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # inputs, targets, documents; reference, is_pair


class Preference:
    """Make the chosen answer of each pair more probable than the rejected one, against what `init_from` gave them.

    The loss of a pair is -log sigmoid(margin). The margin is beta times what the chosen answer's log-probability has
    gained on its reference, minus the same of the rejected one. An answer's log-probability is the sum over its learned
    tokens.

    Args:
        rows: samples of a batch.
        beta: how strongly the model is held to the reference.
        device: that receives the batches.
        references: of each token file, by path: the log-probability of each document, float64 [documents].
    """

    names = ("margin", "accuracy", "chosen_log_probability")

    def __init__(self, rows: int, beta: float, device: torch.device, references: Mapping[Path, np.ndarray]) -> None:
        self._rows, self._beta, self._device, self._references = rows, beta, device, references

    def count(self, data: PretrainDataset, samples: np.ndarray) -> int:
        """The pairs in these samples."""
        first = data.packing.first
        return int((first[samples + 1] - first[samples]).sum()) // 2

    def read(self, data: PretrainDataset, samples: np.ndarray) -> PairBatch:
        """Inputs, targets and numbers of answers, int64 [rows, max_seq_len] each; the reference of each pair's answers,
        float32 [rows, pairs, 2]; and whether there is such a pair, bool [rows, pairs].

        Args:
            samples: at most `rows`; padding, which does not count, fills the others.
        """
        inputs, targets = data.batch(samples, self._rows)
        numbers = answers_of(data, samples, self._rows)
        reference = np.where(numbers >= 0, self._references[data.path][numbers], 0.0).astype(np.float32)
        batch = (
            inputs,
            targets,
            data.number_runs(samples, self._rows),
            torch.from_numpy(reference).unflatten(1, (-1, 2)),
            torch.from_numpy(numbers[:, ::2] >= 0),
        )
        return tuple(accelerator.send(tensor, self._device) for tensor in batch)

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """Sums over the pairs: the loss, and what `names` name; float32 [4]."""
        inputs, targets, documents, reference, is_pair = batch
        found = answer_log_probabilities(model, inputs, targets, documents, 2 * is_pair.shape[1])
        chosen, rejected = found.unflatten(1, (-1, 2)).unbind(-1)  # [rows, pairs] each
        margin = self._beta * ((chosen - reference[..., 0]) - (rejected - reference[..., 1]))
        columns = -F.logsigmoid(margin), margin, (margin > 0).float(), chosen
        return torch.stack([column.where(is_pair, 0.0).sum() for column in columns])

    @torch.no_grad()
    def measure(
        self, model: nn.Module, batches: Iterable[PairBatch], autocast, asked_to_stop: Callable[[], bool]
    ) -> list[float] | None:
        """Sums over batches: those of `loss`, the pairs, and the learned tokens of chosen answers; None after a stop.

        Args:
            model: evaluated without dropout; returned to the mode that it was in.
            autocast: context in which the model runs.
            asked_to_stop: called after each batch, by every process.
        """
        sums = np.zeros(len(self.names) + 3)
        was_training, stopped = model.training, False
        model.eval()
        for batch in batches:
            _, targets, documents, _, is_pair = batch
            with autocast:
                losses = self.loss(model, batch)
            of_chosen = (targets >= 0) & (documents % 2 == 0)
            sums += [*losses.tolist(), int(is_pair.sum()), int(of_chosen.sum())]
            if stopped := asked_to_stop():
                break
        model.train(was_training)
        return None if stopped else sums.tolist()

    def means(self, sums: list[float]) -> dict[str, float]:
        """What metrics.jsonl has of an evaluation, from the sums of `measure` over all ranks."""
        *totals, pairs, tokens = sums
        found = {f"val_{name}": total / pairs for name, total in zip(("loss", *self.names), totals, strict=True)}
        return found | {"val_chosen_log_probability_per_token": totals[-1] / tokens}

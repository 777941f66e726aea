"""What an evaluation measures: the validation loss, and how well texts mixed into chats are still predicted."""

from collections.abc import Callable

import numpy as np

from model.dataset import PretrainDataset
from model.model import Transformer
from model.training.choices import Ranks
from model.training.data import TrainingData
from model.training.objective import Objective
from model.training.plan import RunPlan


class Evaluator:
    """Measures models on the held-out samples; every process of a run measures its share of them.

    Args:
        objective: that is measured.
        asked_to_stop: called after each batch, by every process: an evaluation that it ends measures nothing.
    """

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        plan: RunPlan,
        ranks: Ranks,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._objective, self._data, self._plan = objective, data, plan
        self._ranks, self._asked_to_stop = ranks, asked_to_stop

    def measure(self, model: Transformer) -> dict[str, float] | None:
        """Validation loss and what the objective measures beside it, as metrics.jsonl has them; with texts mixed into
        chats, also what `measure_texts` returns. None after a signal to stop."""
        measured = self._measure(model, self._data.val, self._plan.val_samples)
        if measured is None or (texts := self.measure_texts(model)) is None:
            return None
        return measured | texts

    def measure_texts(self, model: Transformer) -> dict[str, float] | None:
        """What is forgotten, as metrics.jsonl has it: the loss of held-out texts of those that are mixed into chats;
        empty where none are. None after a signal to stop."""
        samples = self._data.held_out_texts
        if len(samples) == 0:
            return {}
        if (measured := self._measure(model, self._data.texts, samples)) is None:
            return None
        return {"text_loss": measured["val_loss"], "text_bits_per_byte": measured["bits_per_byte"]}

    def _measure(self, model: Transformer, data: PretrainDataset, samples: np.ndarray) -> dict[str, float] | None:
        micro_batches = range(-(-len(samples) // self._plan.batch_rows))
        mine = (self._plan.samples_of(self._ranks.rank, samples, micro) for micro in micro_batches)
        batches = (self._objective.read(data, numbers) for numbers in mine)
        sums = self._objective.measure(model, batches, self._plan.hardware.autocast, self._asked_to_stop)
        return None if sums is None else self._objective.means(self._ranks.all_sum(sums))

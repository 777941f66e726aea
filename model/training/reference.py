"""The reference of preference tuning: how probable each answer is by the weights that a run begins with.

These weights do not change, so their log-probabilities are computed once and kept beside the token file, in
`X.reference_<key>.npz`. The key is a hash of the tokens, the weights and the dtype that they are computed in. So
training needs no second model, and a resumed run reads the same numbers again.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.dataset import PretrainDataset
from model.model import Transformer
from model.storage.files import replacing
from model.training.choices import Ranks
from model.training.plan import RunPlan

BATCH_TIMEOUTS = 3  # the first batch may compile kernels: it may take this many times ddp_timeout
DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)  # what np.load raises for it


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the names, shapes and float32 values of weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.numpy())
    return digest.hexdigest()


def answer_log_probabilities(
    model: nn.Module, inputs: Tensor, targets: Tensor, documents: Tensor, answers: int
) -> Tensor:
    """The log-probability of each answer, in nats, summed over its learned tokens: float32 [B, answers].

    Args:
        model: returns the loss of each token; it is called, so it may be compiled and distributed.
        inputs, targets, documents: int64 [B, T] each, as `PretrainDataset.batch` and `number_runs` give them.
        answers: the most that a row has; those that it lacks are 0.
    """
    losses = model(inputs, targets, documents=documents, per_token=True)
    sums = losses.new_zeros(len(losses), answers + 1)  # the padding's number is the last
    return -sums.scatter_add(1, documents.clamp(max=answers), losses)[:, :answers]


class ReferenceFile:
    """The log-probabilities of a token file's answers by some weights.

    Args:
        dataset: of pairs.
        weights: SHA-256 (hex) of the weights.
        dtype: of the matrix products.
    """

    def __init__(self, dataset: PretrainDataset, weights: str, dtype: torch.dtype) -> None:
        self.dataset = dataset
        self.key = {
            "tokens": dataset.manifest.sha256,
            "learned": dataset.manifest.chat["learn_sha256"],
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
        }
        short = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:12]
        self.path = dataset.path.with_name(f"{dataset.path.stem}.reference_{short}.npz")

    def read(self) -> np.ndarray | None:
        """The log-probability of each document, float64 [documents], NaN where none is known; None if the file is
        missing, damaged, of others, or lacks one that the dataset needs."""
        try:
            with np.load(self.path, allow_pickle=False) as content:
                key, values = json.loads(content["key"].tobytes()), content["log_probabilities"]
        except DAMAGE:
            return None
        fits = values.dtype == np.float64 and values.shape == (self.dataset.manifest.documents,)
        if key != self.key or not fits or not np.isfinite(values[self.dataset.chats.numbers]).all():
            return None
        return values

    def write(self, values: np.ndarray) -> None:
        """Write what `read` returns, in one step.

        Raises:
            InputError: the file cannot be written.
        """
        with replacing(self.path, values.nbytes) as file:
            key = np.frombuffer(json.dumps(self.key).encode(), np.uint8)
            np.savez(file, key=key, log_probabilities=values)

    @torch.no_grad()
    def compute(self, model: nn.Module, rows: int, autocast, beat: Callable[[], None]) -> np.ndarray:
        """What `read` returns, computed without dropout.

        Args:
            model: on its device, with the weights.
            rows: samples read at once.
            autocast: context in which the model runs.
            beat: called before each batch.
        """
        dataset, device = self.dataset, next(model.parameters()).device
        values = np.full(dataset.manifest.documents, np.nan)
        was_training = model.training
        model.eval()
        for first in range(0, len(dataset), rows):
            beat()
            samples = np.arange(first, min(first + rows, len(dataset)))
            inputs, targets = dataset.batch(samples, rows)
            documents = dataset.number_runs(samples, rows)
            numbers = answers_of(dataset, samples, rows)
            with autocast:
                batch = (tensor.to(device) for tensor in (inputs, targets, documents))
                found = answer_log_probabilities(model, *batch, numbers.shape[1])
            is_answer = numbers >= 0
            values[numbers[is_answer]] = found.cpu().double().numpy()[is_answer]
        model.train(was_training)
        return values


def answers_of(dataset: PretrainDataset, samples: np.ndarray, rows: int) -> np.ndarray:
    """The documents that each sample's runs are, int64 [rows, answers]; -1 where a row has fewer."""
    first = dataset.packing.first
    counts = first[samples + 1] - first[samples]
    found = np.full((rows, max(2, int(counts.max(initial=0)))), -1)
    for row, (sample, count) in enumerate(zip(samples.tolist(), counts.tolist(), strict=True)):
        starts = dataset.packing.starts[first[sample] : first[sample] + count]
        found[row, :count] = dataset.chats.numbers[dataset.chats.find(starts)]
    return found


def find_references(
    datasets: Iterable[PretrainDataset],
    sha256: str,
    load: Callable[[], Mapping[str, Tensor]],
    plan: RunPlan,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[Path, np.ndarray]:
    """What `ReferenceFile.read` returns for token files of pairs, by their paths; computed and written where missing.

    Args:
        sha256: of the weights.
        load: returns the weights; called only if something is missing.

    Raises:
        InputError: a file cannot be written.
    """
    hardware = plan.hardware

    def build() -> Transformer:
        model = Transformer(plan.config)
        model.load_state_dict(load())
        return model.to(hardware.device)

    def beat() -> None:
        ranks.beat("the reference", BATCH_TIMEOUTS)

    files = {dataset.path: ReferenceFile(dataset, sha256, hardware.dtype) for dataset in datasets}
    about = build, plan.training.batch_size, hardware.autocast, beat, say
    return {path: _find_reference(file, *about) for path, file in files.items()}


def _find_reference(
    file: ReferenceFile, build: Callable[[], nn.Module], rows: int, autocast, beat: Callable[[], None], say
) -> np.ndarray:
    """The file's values, computed by the model that `build` returns unless the file has them."""
    values = file.read()
    if values is not None:
        say(f"reference: {file.path}")
        return values
    answers = len(file.dataset.chats.numbers)
    say(f"reference: computing the log-probabilities of {answers:,} answers by the weights of init_from")
    values = file.compute(build(), rows, autocast, beat)
    file.write(values)
    say(f"reference: {file.path}, which later runs from these weights read")
    return values

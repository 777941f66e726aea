"""A run on GPUs that are not here: from its settings and, if it is there, its token file to a forecast for each way."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.LMConfig import LMConfig
from model.text.tokenization import open_tokenizer, vocabulary_size
from model.training.absent_gpu import absent_gpu, counts_kernels
from model.training.data import TrainingData
from model.training.devices import Cluster
from model.training.forecast import Forecast, ModelCost, Way, forecast, made_to_fit, model_cost, ways_on
from model.training.recipe import (
    MOST_TOKENS,
    automatic_batch_size,
    automatic_epochs,
    automatic_tokens_per_step,
)
from model.training.settings import AUTO, Settings, TrainingSettings
from model.training.token_files import is_one_file


@dataclass(frozen=True)
class RunForecast:
    """What a run would take on a cluster, one forecast for each way."""

    cluster: Cluster
    config: LMConfig
    training: TrainingSettings  # with the batch_size and the epochs that are assumed where they are auto
    cost: ModelCost
    steps: int | None  # None: nothing says how many
    forecasts: list[Forecast]

    @property
    def tokens_per_step(self) -> int:
        return self.training.rows_per_step(self.cluster.gpus) * self.config.max_seq_len

    @property
    def fitting(self) -> list[Forecast]:
        """The ways that fit, in smaller micro-batches where those of the settings do not fit."""
        length = self.config.max_seq_len
        made = [made_to_fit(found, self.cluster, self.cost, length) for found in self.forecasts]
        return [found for found in made if found is not None]

    @property
    def checkpoint_bytes(self) -> int:
        memory = self.cost.memory
        return memory.weights + memory.average + memory.optimizer


def forecast_run(settings: Settings, cluster: Cluster, say: Callable[[str], None]) -> RunForecast:
    """Forecast a run from its settings and, if it is there, its token file; nothing is made or written.

    Args:
        say: prints one line for the user.

    Raises:
        InputError: the tokenizer or the token file cannot be used, or shard_degree does not divide the GPUs.
    """
    settings = copy.deepcopy(settings)
    path = settings.data.train_data_path
    is_missing = is_one_file(path) and not Path(path).exists()
    data = None if is_missing else TrainingData(settings, verify=False, say=say)
    if data is None:
        config = settings.lm_config(vocabulary_size(open_tokenizer(settings.data.tokenizer_path)))
    else:
        config = data.config
        settings.training.document_mask |= data.is_chat
    training = settings.training
    ways = ways_on(cluster, training.shard_degree)
    dtype = getattr(torch, training.dtype)
    if dtype == torch.bfloat16 and not cluster.device.has_bfloat16:
        dtype = torch.float16
    if not counts_kernels():
        say("this torch was built without CUDA: activations are counted as a CPU keeps them, up to a fifth too many")
    cost = model_cost(config, training, absent_gpu(dtype))
    training = _without_auto(training, cluster, ways, cost, config.max_seq_len, data)
    micro_batches, length = training.accumulation_steps, config.max_seq_len
    return RunForecast(
        cluster=cluster,
        config=config,
        training=training,
        cost=cost,
        steps=_steps(training, cluster, data),
        forecasts=[forecast(way, cluster, cost, training.batch_size, micro_batches, length) for way in ways],
    )


def _without_auto(
    training: TrainingSettings,
    cluster: Cluster,
    ways: list[Way],
    cost: ModelCost,
    length: int,
    data: TrainingData | None,
) -> TrainingSettings:
    """The epochs and the batch_size that `auto` would come to there; without data, for the largest step."""
    epochs, samples = training.epochs, MOST_TOKENS if data is None else data.training_samples
    if epochs == AUTO:
        kind = "texts" if data is None or not data.is_chat else "pairs" if data.is_pairs else "chats"
        epochs, _ = automatic_epochs(kind, samples * length, cost.active_parameters)
    rows = training.batch_size
    if rows == AUTO:
        shares = training.accumulation_steps * cluster.gpus
        tokens = MOST_TOKENS
        if data is not None:
            tokens, _ = automatic_tokens_per_step(samples * length, epochs, training.max_steps)
        fits = max(forecast(way, cluster, cost, 1, 1, length).most_rows for way in ways)
        rows = automatic_batch_size(tokens, length * shares, max(1, samples // shares), fits)
    return dataclasses.replace(training, epochs=epochs, batch_size=rows).shared_among(cluster.gpus)


def _steps(training: TrainingSettings, cluster: Cluster, data: TrainingData | None) -> int | None:
    if training.max_steps is not None or data is None:
        return training.max_steps
    return data.order(training.seed, training.rows_per_step(cluster.gpus)).steps_left(0, training.epochs)

"""What a run begins with: the checkpoint that it resumes from, weights of `init_from`, or random weights; and the data,
which must be the checkpoint's."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from model.errors import InputError
from model.LMConfig import LMConfig, untrained_router
from model.lora import add_adapters
from model.model import Transformer
from model.runs.folder import is_within, recorded_source
from model.runs.processes import Processes
from model.runs.resume import check_checkpoint, find_checkpoint
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_folder, tokenizer_sha256
from model.text.tokenizer_folder import same_tokenizer
from model.token_file.manifest import Manifest
from model.training.choices import FoundCheckpoint
from model.training.data import TrainingData
from model.training.plan import RunPlan
from model.training.reference import find_references, weights_sha256
from model.training.settings import ADAPTERS_NEED_WEIGHTS, ModelSettings, Settings, TrainingSettings
from model.training.token_files import first_manifest
from model.weights import Weights, load_weights
from model.weights.find import find_weights
from model.weights.load import fitting_tokenizer, recorded_tokenizer
from model.weights.shapes import read_shape

# Settings of the model that its weights do not determine.
FREE = ("max_seq_len", "dropout", "flash_attn")
GIVEN_BY_WEIGHTS = tuple(f.name for f in dataclasses.fields(ModelSettings) if f.name not in FREE)


@dataclass(frozen=True)
class Beginning:
    """What a run begins with. Files are read once, and this is handed on."""

    checkpoint: FoundCheckpoint | None = None  # to resume from
    weights: dict[str, Tensor] | None = None  # of init_from
    weights_context: int = 0  # tokens: positions that these weights know

    @property
    def context(self) -> int:
        """Positions that the weights know, in tokens; of random ones 0."""
        return self.weights_context if self.checkpoint is None else self.checkpoint.content["context"]

    def build_model(self, config: LMConfig, training: TrainingSettings) -> Transformer:
        """The model, on the CPU: its weights random or those of `init_from`, and with LoRA its adapters.

        Raises:
            InputError: lora_rank is larger than a matrix.
        """
        model = Transformer(config)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        if training.lora_rank:
            add_adapters(model, training.lora_rank, training.lora_alpha)
        return model

    def references(
        self, data: TrainingData, plan: RunPlan, processes: Processes, say: Callable[[str], None]
    ) -> dict[Path, np.ndarray]:
        """Of pairs of answers, what `find_references` returns for the weights that the run begins, or has begun, with;
        empty for other data. `data.fingerprint` gets these weights' hash. Every process must call it.

        Raises:
            InputError: a reference is missing, and cannot be computed or written.
        """
        if not data.is_pairs:
            return {}
        sha256 = processes.decided(self._reference_sha256)
        data.fingerprint["reference_sha256"] = sha256

        def load() -> Mapping[str, Tensor]:
            return self.weights or _load_reference(plan.training, sha256, say)

        return processes.decided(lambda: find_references((data.train, data.val), sha256, load, plan, processes, say))

    def _reference_sha256(self) -> str:
        if self.checkpoint is None:
            return weights_sha256(self.weights)
        return self.checkpoint.content["data"]["reference_sha256"]


def find_beginning(settings: Settings, say: Callable[[str], None]) -> Beginning:
    """Read the checkpoint to resume from or, without one, the weights of `init_from`.

    Where `init_from` is set, `settings` get the weights' shape and, if they name no tokenizer, the weights' tokenizer;
    when the run resumes, its checkpoint gives both, and `init_from` is not read again.

    Raises:
        InputError: a file cannot be read, the tokenizer is not that of the weights, or LoRA has no weights to adapt.
    """
    checkpoint = find_checkpoint(settings.training, say)
    if checkpoint is not None:
        if settings.training.init_from is not None:
            take_shape_of_checkpoint(settings, *checkpoint)
        return Beginning(checkpoint)
    if settings.training.resume:
        where = " or ".join(filter(None, (settings.training.out_dir, settings.training.copy_to)))
        say(f"resume: no checkpoint in {where}, so training starts from the beginning")
        _take_moved_source(settings.training, say)
    return _load_initial(settings, say)


def open_data(
    settings: Settings,
    resumed: FoundCheckpoint | None,
    environment: Mapping,
    processes: Processes,
    say: Callable[[str], None],
) -> TrainingData:
    """Open tokenizer and token files, and check that they and the checkpoint belong together, on every rank.

    With chats, `settings` get document_mask: they are hidden from each other, whatever it says.

    Args:
        environment: as `resume.environment` gives it.

    Raises:
        InputError: they do not, or a file is missing or damaged.
    """
    order = {} if resumed is None else {"order": resumed.content["data"]["order"]}
    data = TrainingData(settings, verify=processes.local_rank == 0, say=say, **order)
    data.agree(processes.decided)
    if data.is_chat:
        settings.training.document_mask = True
    if resumed is not None:
        check_checkpoint(resumed, settings.training, data, environment, say)
    elif settings.training.init_from is None:
        data.check_random_weights(say)
    processes.check_same("the step to resume from", None if resumed is None else resumed.content["progress"]["step"])
    return data


def _take_moved_source(training: TrainingSettings, say: Callable[[str], None]) -> None:
    """Find the weights of `init_from` again that the run took when it first started: it may have moved them out of its
    own folder, and in a folder others may be the newest by now."""
    out_dir = Path(training.out_dir)
    if training.init_from is None or (source := recorded_source(out_dir)) in (None, training.init_from):
        return
    if is_within(training.init_from, out_dir) or Path(training.init_from).resolve() in Path(source).resolve().parents:
        say(f"init_from: {source}, which this run took as {training.init_from} when it started")
        training.init_from = source


def take_shape_of_checkpoint(settings: Settings, path: Path, checkpoint: Mapping) -> None:
    """Give the settings a checkpoint's shape and, if they name no tokenizer, its tokenizer."""
    _take_shape(settings.model, read_shape(checkpoint["config"], path))
    if checkpoint["chat"]:  # as the run's first start did
        settings.model.max_seq_len = min(settings.model.max_seq_len, checkpoint["context"])
    settings.data.tokenizer_path = settings.data.tokenizer_path or checkpoint["tokenizer_path"]


def _load_initial(settings: Settings, say: Callable[[str], None]) -> Beginning:
    training, data, model = settings.training, settings.data, settings.model
    if training.init_from is None:
        if training.lora_rank:
            raise InputError(ADAPTERS_NEED_WEIGHTS.format(training.lora_rank))
        return Beginning()
    try:
        path, choice = find_weights(training.init_from)
    except InputError as error:
        raise InputError(f"init_from: {error}") from error
    if choice is not None:
        say(choice)
        training.init_from = str(path)  # what is recorded: a restart takes the same, whatever is the newest by then
    weights = load_weights(path)
    if weights.inferred:
        say(weights.inferred)
    fitting_tokenizer(path, weights, data.tokenizer_path)
    manifest = first_manifest(data.train_data_path)
    data.tokenizer_path = data.tokenizer_path or _folder_of(weights, manifest)
    taken = "training begins with these weights"
    if _take_shape(model, weights.config):
        taken = "the model takes its shape from these weights, not from the settings' section model"
    if not training.lora_rank and (problem := untrained_router(model)) is not None:
        raise InputError(
            f"init_from {path}: {problem}; or tune it with lora_rank, which leaves the routers as they are"
        )
    say(f"init_from {path}: {taken}")
    known = weights.config.max_seq_len
    chat = {} if manifest is None else manifest.chat
    if chat.get("pairs") and weights.chat == {}:
        say(
            f"warning: init_from {path}: these weights continue texts and do not answer; pairs teach which answer is"
            " preferred, so tune them on chats first (config_chat.yaml)"
        )
    if model.max_seq_len > known and (chat or data.train_data_kind in ("chats", "pairs")):
        say(f"max_seq_len {known}: what these weights know; {model.max_seq_len} is more than chats can teach them")
        model.max_seq_len = known
    if model.max_seq_len > known:
        say(
            f"init_from {path}: these weights know positions up to {known:,}, max_seq_len is {model.max_seq_len:,}: the"
            " others have to be learned"
        )
    return Beginning(weights=weights.state_dict, weights_context=known)


def _load_reference(training: TrainingSettings, sha256: str, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The weights of `init_from` for a resumed run whose reference file is gone.

    Args:
        sha256: of these weights, as the run recorded it.

    Raises:
        InputError: they are not there, or are others.
    """
    lost = "the reference file of this run is missing beside the token file, and computing it again needs init_from"
    if training.init_from is None:
        raise InputError(f"{lost}: give the weights that the run began with")
    _take_moved_source(training, say)
    try:
        weights = load_weights(find_weights(training.init_from)[0]).state_dict
    except InputError as error:
        raise InputError(f"{lost}: {error}; give the weights that the run began with") from error
    if (found := weights_sha256(weights)) != sha256:
        raise InputError(
            f"{lost}, but {training.init_from} holds other weights than the run began with (sha256 {sha256[:12]}… then,"
            f" {found[:12]}… now); give those"
        )
    return weights


def _folder_of(weights: Weights, manifest: Manifest | None) -> str | None:
    """The weights' tokenizer; None if it is the embedded one, which is the default.

    Args:
        manifest: of the token file, which may have been made with a copy of the embedded one, as a GGUF file holds it.
    """
    path = recorded_tokenizer(weights)
    if path is None or not same_tokenizer(tokenizer_folder(path), EMBEDDED_TOKENIZER):
        return path
    is_of_data = manifest is not None and manifest.tokenizer_sha256 == tokenizer_sha256(path)
    return path if is_of_data else None


def _take_shape(model: ModelSettings, shape: LMConfig) -> bool:
    """Set what the weights determine; returns whether that changed anything."""
    theirs = {name: getattr(shape, name) for name in GIVEN_BY_WEIGHTS}
    changed = theirs != {name: getattr(model, name) for name in GIVEN_BY_WEIGHTS}
    for name, value in theirs.items():
        setattr(model, name, value)
    return changed


def refuse_shape(names: list[str]) -> None:
    """Refuse flags that the weights of `init_from` determine.

    Args:
        names: of the flags given.

    Raises:
        InputError: naming the refused ones.
    """
    if refused := [f"--{name}" for name in names if name in GIVEN_BY_WEIGHTS]:
        pronoun = "it" if len(refused) == 1 else "them"
        raise InputError(f"{', '.join(refused)}: init_from's weights determine the shape; omit {pronoun}")

"""Every setting of training: its name, type, default, limits and help, declared once.

The config file's sections, the flags of `train.py`, `out/config.yaml` and the settings inside a checkpoint are made
from the dataclasses below. Flags beat the file, the file beats the defaults. All problems are reported together.
"""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import MOST_CHARACTERS, InputError, shown
from model.LMConfig import MOST_TOKENS, LMConfig, impossible_shape, untrained_router
from model.options import parse_value, setting
from model.training.optimizer import OPTIMIZERS
from model.training.recipe import RECIPES, value_text
from model.training.schedule import SHAPES

MOST_PROBLEMS = 20  # shown; the rest is counted
MOST_PARAMETERS = 10**12  # of a model, which every process holds in full
ESCAPES = "in YAML, \\ in double quotes begins an escape: put a path in single quotes, or write it with /"
EATEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what "C:\temp\new.bin" in double quotes becomes
DRIVE_ALONE = re.compile(r"[A-Za-z]:[^\\/]")  # and "C:\x64ata"
OF_EXPERTS = ("expert_products", "balance_loss", "expert_bias_rate", "router_z_loss", "router_rate")
ADAPTERS_NEED_WEIGHTS = "lora_rank: {} adapts given weights, but init_from is null; give init_from, or omit lora_rank"
FULLY_SHARDED = ("full", "hybrid")  # ways to share weights too
AUTO = "auto"  # the program chooses, see recipe.py
Auto = typing.Literal["auto"]  # in a setting's type: accepted too


@dataclass
class DataSettings:
    """Section `data`."""

    tokenizer_path: str | None = setting(
        None, "folder of the tokenizer; null: the embedded one, model/tokenizer", path=True
    )
    train_data_path: str | list[str] = setting(
        "./dataset/pretrain_data.bin",
        "token file to train on; or several of texts, globs too, that are read as one",
        path=True,
        several=True,
    )
    train_data_weights: float | list[float] | None = setting(
        None,
        "shares in the samples, relative to each other, of each path or glob of train_data_path; null: by their tokens",
        above=0,
        at_most=1e9,
        several=True,
    )
    train_data_kind: str | None = setting(
        None,
        "what train_data_path has to hold: texts, chats or pairs (of answers); null: what it holds decides",
        choices=("texts", "chats", "pairs"),
    )
    val_data_path: str | None = setting(
        None, "token file to validate on; null: 1 % of the samples are held out", path=True
    )
    raw_data_path: str | None = setting(
        None,
        "JSONL, or a folder of texts, from which a missing train_data_path is made; null: for the default path, what "
        "is in dataset/",
        path=True,
    )
    mix_data_path: str | None = setting(
        None, "token file of texts that are mixed into chats, against forgetting; null: none", path=True
    )
    mix_share: float = setting(0.1, "share of these texts in the samples of each step", above=0, below=1)
    sample_start: str = setting(
        "packed",
        "where samples of texts begin: packed, anywhere; document, where a document begins or its last sample ended",
        choices=("packed", "document"),
    )


def _model_section() -> type:
    """Section `model`: the fields of LMConfig, but for vocab_size, which null takes from the tokenizer."""
    vocab_size = setting(None, "rows of the embedding; null: from the tokenizer", at_least=1, at_most=MOST_TOKENS)
    made = [
        (f.name, f.type, field(default=f.default, metadata=f.metadata))
        if f.name != "vocab_size"
        else (f.name, int | None, vocab_size)
        for f in dataclasses.fields(LMConfig)
    ]
    return dataclasses.make_dataclass("ModelSettings", made, namespace={"__module__": __name__})


ModelSettings = _model_section()


@dataclass
class TrainingSettings:
    """Section `training`. A step is one optimizer step; intervals count steps."""

    recipe: str | None = setting(
        None,
        "a word for several settings, each of which can still be set: as a flag it overrides the file's lines; best:"
        " what learned the most in our measurements (optimizer, schedule, rate, batch, warm-up, epochs, document_mask,"
        " qk_norm); null: none",
        choices=tuple(RECIPES),
    )
    epochs: int | Auto = setting(15, "passes over the training samples; auto: few, but many over few chats", at_least=1)
    max_steps: int | None = setting(None, "steps to train, whatever epochs says; null: epochs decide", at_least=1)
    max_hours: float | None = setting(
        None,
        "stop and save, to be resumed, when training has lasted this long in this session; null: no limit",
        above=0,
    )
    batch_size: int | Auto = setting(
        32, "samples that a process reads at once; auto: to suit this run and the memory", at_least=1, at_most=2**20
    )
    accumulation_steps: int = setting(1, "batches per process that make up one step", at_least=1, at_most=2**20)
    global_batch_size: int | None = setting(
        None,
        "samples of a step of all processes, however many they are: accumulation_steps follows from it; null: as many"
        " as batch_size, accumulation_steps and processes give",
        at_least=1,
        at_most=2**30,
    )
    learning_rate: float | Auto = setting(
        3e-4, "highest learning rate, reached after the warm-up; auto: to suit model and batch", above=0, at_most=100
    )
    min_lr: float | None = setting(None, "learning rate at the end; null: a tenth of learning_rate", at_least=0)
    warmup_steps: int | Auto | None = setting(
        None,
        "steps in which the learning rate rises from 0; null: 2 % of all steps, at most 1000; auto: about 5 %",
        at_least=0,
    )
    lr_scheduler: str = setting("cosine", "how the learning rate falls", choices=SHAPES)
    optimizer_type: str = setting("adamw", "optimizer", choices=OPTIMIZERS)
    weight_decay: float = setting(0.1, "of matrices only; adam adds it to the gradient", at_least=0, at_most=100)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped", at_least=0)
    max_skipped_steps: int = setting(
        10,
        "steps skipped in a row, non-finite or with a loss spike, before training stops as diverged",
        at_least=0,
    )
    spike_threshold: float = setting(
        10.0, "standard deviations above the mean of the last 128 losses that make a spike; 0: none does", at_least=0
    )
    document_mask: bool = setting(
        False, "a token sees only its own document, not those before it in the sample; always so with chats"
    )
    dtype: str = setting(
        "bfloat16", "of the matrix products; weights stay float32", choices=("float32", "float16", "bfloat16")
    )
    use_ema: bool = setting(False, "evaluate and save a moving average of the weights")
    ema_decay: float = setting(0.999, "decay of that average per step", at_least=0, below=1)
    early_stopping: bool = setting(False, "stop when the validation loss no longer falls")
    patience: int = setting(5, "evaluations without a lower loss before early stopping", at_least=1)
    eval_interval: int = setting(500, "steps between evaluations", at_least=1)
    eval_steps: int | None = setting(
        None, "batches of one evaluation, spread over the validation data; null: all", at_least=1
    )
    save_interval: int = setting(1000, "steps between checkpoints", at_least=1)
    keep_last: int = setting(3, "checkpoints kept; older ones are removed", at_least=1)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", at_least=1)
    seed: int = setting(42, "of weights, dropout and the order of samples", at_least=0, at_most=2**32 - 1)
    compile: bool | Auto = setting(
        AUTO, "compile the model with torch.compile, which needs a C++ compiler; auto: if it pays"
    )
    cuda_graph: bool | Auto = setting(
        AUTO,
        "on a CUDA GPU, capture a whole step as one graph, which the host launches at once, with the same bits; auto:"
        " where steps can be captured",
    )
    attention: str = setting(
        AUTO,
        "how training computes attention, on a CPU in chunks, by PyTorch's kernels, or mixed; on a GPU varlen skips"
        " other documents; auto: the fastest here",
        choices=(AUTO, "chunks", "mixed", "pytorch", "varlen"),
    )
    joined_products: bool | Auto = setting(
        AUTO,
        "compute queries, keys and values by one matrix product, and the feed-forward's two hidden states; auto: if"
        " that is faster on a GPU",
    )
    expert_products: str = setting(
        AUTO,
        "how the experts' matrix products are computed, with the same bits: in a loop over experts, or by PyTorch's"
        " grouped kernel; auto: the faster here",
        choices=(AUTO, "loop", "grouped"),
    )
    balance_loss: float | Auto = setting(
        AUTO,
        "weight of the loss that spreads a sequence's tokens over the experts; auto: 0.01, or 0 where a bias does so,"
        " routers are frozen or pairs are trained on",
        at_least=0,
        at_most=100,
    )
    expert_bias_rate: float = setting(
        0.001, "how far each step moves the experts' biases, with expert_bias", at_least=0, at_most=1
    )
    router_z_loss: float = setting(
        0.0, "weight of the loss that keeps the routers' logits small; 0.001 is usual", at_least=0, at_most=100
    )
    router_rate: float = setting(
        1.0, "the routers' learning rate, times learning_rate; AdamW's with muon too", at_least=0, at_most=100
    )
    activation_checkpointing: str = setting(
        "none",
        "compute activations again in the backward pass instead of keeping them: of the feed-forward (selective) or of"
        " whole layers (full); less memory, more time, the same bits",
        choices=("none", "selective", "full"),
    )
    deterministic: bool = setting(
        True, "on a GPU, kernels that give the same bits each time; false: a resumed run may differ in the last bits"
    )
    device: str = setting("auto", "cuda, cuda:1, npu, xpu, musa, mlu, mps or cpu; auto: the best there is")
    ddp: bool = setting(False, "train in several processes, started by torchrun")
    ddp_timeout: float = setting(600.0, "seconds without progress after which several processes fail", above=0)
    shard: str = setting(
        AUTO,
        "what several ranks share instead of each having all: nothing; the optimizer's state, its work and the moving"
        " average; weights and gradients too (full), or these within groups that are replicas (hybrid); auto: the"
        " optimizer where it pays",
        choices=(AUTO, "none", "optimizer", *FULLY_SHARDED),
    )
    shard_degree: int | None = setting(
        None, "of hybrid: ranks that share one copy; null: those of a machine", at_least=2, at_most=2**20
    )
    checkpoint_writers: str = setting(
        AUTO,
        "which ranks write a checkpoint: one, as one file, or all, each its part; auto: all where they share"
        " anything (shard) on one machine and a checkpoint has 1 GB or more",
        choices=(AUTO, "one", "all"),
    )
    init_from: str | None = setting(
        None, "weights to begin with, in any format; they give the model its shape; null: drawn at random", path=True
    )
    lora_rank: int = setting(
        0, "LoRA: train low-rank adapters of this rank, and not init_from's weights; 0: off", at_least=0, at_most=2**16
    )
    lora_alpha: float = setting(16.0, "the adapters count lora_alpha / lora_rank times", above=0, at_most=1e6)
    dpo_beta: float = setting(
        0.1, "of pairs of answers: how strongly the model is held to what init_from answers", above=0, at_most=100
    )
    resume: bool = setting(False, "resume from the newest whole checkpoint in out_dir")
    resume_from: str | None = setting(None, "resume from this checkpoint", path=True)
    out_dir: str = setting("out", "folder for checkpoints, metrics and curves", path=True)
    copy_to: str | None = setting(
        None,
        "another folder, such as a mounted drive, that gets copies of the newest checkpoint and of the weights; resume"
        " looks there where out_dir has no checkpoint; null: none",
        path=True,
    )

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint is to be resumed from."""
        return self.resume or self.resume_from is not None

    def rows_per_step(self, processes: int) -> int:
        """Samples of a step of so many processes."""
        return self.global_batch_size or self.batch_size * self.accumulation_steps * processes

    def shared_among(self, processes: int) -> "TrainingSettings":
        """With the accumulation_steps, and at most the batch_size, that global_batch_size calls for."""
        if self.global_batch_size is None:
            return self
        rows = min(self.batch_size, -(-self.global_batch_size // processes))
        batches = -(-self.global_batch_size // (rows * processes))
        return dataclasses.replace(self, batch_size=rows, accumulation_steps=batches)


@dataclass
class LoggingSettings:
    """Section `logging`."""

    tracker: str | list[str] | None = setting(
        None,
        "trackers to send the metrics to, one or several; null: none",
        choices=("wandb", "swanlab", "trackio"),
        several=True,
    )
    use_wandb: bool = setting(False, "send the metrics to Weights & Biases, as --tracker wandb does")
    wandb_project: str = setting("MateConv-Pretrain", "project in the trackers")
    wandb_run_name: str | None = setting(None, "name of the run in the trackers; null: they choose one")

    @property
    def trackers(self) -> list[str]:
        """The trackers that are set, each once."""
        named = [self.tracker] if isinstance(self.tracker, str) else self.tracker or []
        return list(dict.fromkeys([*named, *(["wandb"] if self.use_wandb else [])]))


@dataclass
class Settings:
    """All settings of a run."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def as_dict(self) -> dict[str, dict]:
        """Plain values by section, as in a config file."""
        return dataclasses.asdict(self)

    def lm_config(self, tokens: int) -> LMConfig:
        """The model's shape.

        Args:
            tokens: of the tokenizer.

        Raises:
            InputError: `vocab_size` is too small for it.
        """
        vocab_size = tokens if self.model.vocab_size is None else self.model.vocab_size
        if vocab_size < tokens:
            raise InputError(f"vocab_size: {vocab_size} found, but the tokenizer has {tokens} tokens")
        return LMConfig(**dataclasses.asdict(self.model) | {"vocab_size": vocab_size})


SECTIONS = {"data": DataSettings, "model": ModelSettings, "training": TrainingSettings, "logging": LoggingSettings}
SECTION_OF = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
FIELDS = {f.name: f for cls in SECTIONS.values() for f in dataclasses.fields(cls)}


def build_settings(
    file_values: Mapping[str, Mapping],
    flags: Mapping[str, object],
    source: str | Path = "config",
    problems: Sequence[str] = (),
    checkpoint_follows: bool = False,
    prefix: str = "--",
) -> Settings:
    """Merge a config file's sections and the flags' texts over the defaults, and check everything.

    Args:
        file_values: what `config_file.read_config` returned.
        flags: name to text, as on the command line, or to value.
        source: the config file's name, for messages.
        problems: found before, to be reported with the rest.
        checkpoint_follows: where these resume, they are merged over a checkpoint's settings later; only then can it be
            judged whether they contradict each other.
        prefix: of the flags' names in messages.

    Raises:
        InputError: with one line for each thing that is wrong.
    """
    settings, problems = Settings(), list(problems)
    of_training = file_values.get("training")
    _take_recipe(settings, of_training.get("recipe") if isinstance(of_training, Mapping) else None)
    for section, values in file_values.items():
        if section not in SECTIONS:
            problems.append(f"{source}: section {shown(section)} is unknown; {_nearest(section, SECTIONS)}")
        elif not isinstance(values, Mapping):
            if values is not None:  # not a section whose keys are all commented out
                problems.append(f"{source}: section {section!r} is {shown(values)}, expected keys with values")
        else:
            _merge_section(settings, section, values, source, problems)
    _take_recipe(settings, flags.get("recipe"))
    for name, value in flags.items():
        if name in FIELDS:
            _assign(settings, name, value, f"{prefix}{name}", problems)
        else:
            problems.append(f"{prefix}{shown(name)[1:-1]} is unknown; {_nearest(name, FIELDS)}")
    if not (checkpoint_follows and settings.training.resumes):
        problems += _impossible_combinations(settings)
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS:,} more"]
    if problems:
        raise InputError(*problems)
    return settings


def _take_recipe(settings: Settings, name) -> None:
    """Set what a recipe sets: of the file, before its other lines; of a flag, over the file and before other flags. A
    name that is none is reported where it is merged."""
    for setting_name, (value, _) in RECIPES.get(name, {}).items() if isinstance(name, str) else ():
        setattr(getattr(settings, SECTION_OF[setting_name]), setting_name, value)


def recipe_lines(settings: Settings) -> list[str]:
    """What the recipe of these settings says, and which of them are others: a line for each; none without a recipe."""
    recipe = settings.training.recipe
    lines = []
    for name, (value, why) in RECIPES.get(recipe, {}).items():
        given = getattr(getattr(settings, SECTION_OF[name]), name)
        lines.append(
            f"recipe {recipe}: {name} {value_text(value)}, {why}"
            if given == value
            else f"recipe {recipe}: {name} would be {value_text(value)}; {value_text(given)} is set"
        )
    return lines


def _merge_section(settings: Settings, section: str, values: Mapping, source: str, problems: list[str]) -> None:
    for name, value in values.items():
        if SECTION_OF.get(name) == section:
            if FIELDS[name].metadata["path"] and (wrong := _eaten_by_escapes(value)):
                problems.append(f"{source}: {section}.{name}: {shown(value)} found, {wrong} expected ({ESCAPES})")
            else:
                _assign(settings, name, value, f"{source}: {section}.{name}", problems)
        elif name in SECTION_OF:
            problems.append(f"{source}: {section}.{name} belongs in section {SECTION_OF[name]!r}")
        else:
            own = [key for key, owner in SECTION_OF.items() if owner == section]
            written = shown(str(name))[1:-1]
            nearest = _nearest(name, own) if len(problems) < MOST_PROBLEMS else ""  # the search is slow
            problems.append(f"{source}: {section}.{written} is unknown; {nearest}")


def as_list(value) -> list:
    """The values of a setting that takes several: one, or a list of them."""
    return value if isinstance(value, list) else [value]


def _eaten_by_escapes(value) -> str | None:
    """What to expect of a path that YAML's escapes left a trace in: "C:\\temp\\new.bin" with its tab and newline."""
    return next((wrong for path in as_list(value) if isinstance(path, str) and (wrong := _trace(path))), None)


def _trace(path: str) -> str | None:
    if EATEN.search(path):
        return "a path without control characters"
    return "a path with / or \\ after the drive's colon" if DRIVE_ALONE.match(path) else None


def _assign(settings: Settings, name: str, value, where: str, problems: list[str]) -> None:
    try:
        setattr(getattr(settings, SECTION_OF[name]), name, parse_value(FIELDS[name], value))
    except ValueError as error:
        problems.append(f"{where}: {shown(value)} found, {error} expected")


def _nearest(name, known) -> str:
    close = difflib.get_close_matches(str(name)[:MOST_CHARACTERS], list(known), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if len(known) < 20 else "config.yaml shows all that are known"


def _impossible_combinations(settings: Settings) -> list[str]:
    training, shape = settings.training, dataclasses.asdict(settings.model)
    problems = impossible_shape(shape)
    data = settings.data
    if data.mix_data_path is None and data.mix_share != DataSettings.mix_share:
        problems.append(
            f"mix_share: {data.mix_share} of no texts; set mix_data_path to a token file of texts, or omit mix_share"
        )
    if data.train_data_weights is not None:
        weights, paths = len(as_list(data.train_data_weights)), len(as_list(data.train_data_path))
        if weights != paths:
            problems.append(f"train_data_weights: {weights} found, but train_data_path has {paths}; give one for each")
    if training.copy_to is not None and os.path.realpath(training.copy_to) == os.path.realpath(training.out_dir):
        problems.append(f"copy_to: {training.copy_to} is out_dir; give another folder, best on another disk")
    if training.shard_degree is not None and training.shard != "hybrid":
        problems.append(
            f"shard_degree: {training.shard_degree} found, but shard is {training.shard}; set shard hybrid, or omit it"
        )
    if training.global_batch_size is not None:
        if training.batch_size == AUTO:
            problems.append(
                "batch_size: auto chooses the samples of a step too; give a number, or omit global_batch_size"
            )
        if training.accumulation_steps != 1:
            problems.append("accumulation_steps: it follows from global_batch_size; omit one of them")
    if (parameters := _least_parameters(settings.model)) > MOST_PARAMETERS:
        problems.append(f"dim, n_layers: {parameters:,} parameters or more, at most {MOST_PARAMETERS:,} expected")
    if not training.resumes:  # else the checkpoint has the weights, and its adapters are compared with these
        if training.lora_rank and training.init_from is None:
            problems.append(ADAPTERS_NEED_WEIGHTS.format(training.lora_rank))
        if not training.lora_rank and training.lora_alpha != TrainingSettings.lora_alpha:
            problems.append(f"lora_alpha: {training.lora_alpha:g} of no adapters; set lora_rank, or omit lora_alpha")
        if training.init_from is None:  # else the weights decide whether there are experts
            problems += _impossible_routing(settings)
    if training.learning_rate != AUTO and (training.min_lr or 0) > training.learning_rate:
        problems.append(f"min_lr: {training.min_lr} is above learning_rate {training.learning_rate}")
    warmup_steps = 0 if training.warmup_steps in (None, AUTO) else training.warmup_steps
    if training.max_steps is not None and warmup_steps >= training.max_steps:
        problems.append(f"warmup_steps: {training.warmup_steps} leaves none of max_steps {training.max_steps}")
    return problems


def _impossible_routing(settings: Settings) -> list[str]:
    model, training = settings.model, settings.training
    if model.n_experts == 0:
        return of_no_experts(training)
    problem = None if training.lora_rank else untrained_router(model)
    problems = [] if problem is None else [problem]
    if training.expert_bias_rate != TrainingSettings.expert_bias_rate and not model.expert_bias:
        problems.append("expert_bias_rate: given without a bias; set expert_bias, or omit it")
    return problems


def of_no_experts(training: TrainingSettings) -> list[str]:
    """What is wrong with the settings of a dense model: a line for each that is given and says how to train experts."""
    given = {name: getattr(training, name) for name in OF_EXPERTS}
    return [
        f"{name}: {shown(value)} of no experts; set n_experts, or omit it"
        for name, value in given.items()
        if value != getattr(TrainingSettings, name)
    ]


def _least_parameters(model: ModelSettings) -> int:
    """Weights of the matrices that any such model has: queries, outputs and the feed-forwards of each layer."""
    hidden_dim = model.hidden_dim or 8 * model.dim // 3
    if model.n_experts:
        hidden_dim = model.n_experts * (model.expert_hidden_dim or hidden_dim) + (model.shared_hidden_dim or 0)
    heads = model.n_heads * model.head_dim if model.head_dim else model.dim
    of_a_layer = 2 * model.dim * heads + 3 * model.dim * hidden_dim
    return model.n_layers * of_a_layer + model.dim * (model.vocab_size or 0)

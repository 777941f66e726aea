"""Every setting of training: its name, type, default, limits and help, declared once.

The config file's sections, the flags of `train.py`, the file `out/config.yaml` and the settings inside a checkpoint
are all made from the dataclasses below. Flags beat the file, the file beats the defaults. Whatever is wrong is
collected and reported together.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from model.errors import InputError
from model.LMConfig import LMConfig, config_problems

MAX_CONFIG_BYTES = 1 << 20  # a config file is a page of text; anything larger is another file


def setting(
    default,
    help: str,
    *,
    choices: tuple = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
):
    """A dataclass field with what the flag's help says and what values are accepted."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"help": help, "choices": choices, **limits})


@dataclass
class DataSettings:
    """Section `data`."""

    tokenizer_path: str | None = setting(None, "folder of the tokenizer; null: the embedded one, model/tokenizer")
    train_data_path: str = setting("./dataset/pretrain_data.bin", "token file to train on")
    val_data_path: str | None = setting(None, "token file to validate on; null: 1 %% of the samples are held out")
    raw_data_path: str | None = setting(
        None, "JSONL from which a missing train_data_path is made; null: for the default path, what is in dataset/"
    )


@dataclass
class ModelSettings:
    """Section `model`: the fields of LMConfig, but for vocab_size, which null takes from the tokenizer."""

    dim: int = setting(512, "width of the model", at_least=1)
    n_layers: int = setting(8, "layers", at_least=1)
    n_heads: int = setting(16, "query heads", at_least=1)
    n_kv_heads: int = setting(8, "key and value heads; must divide n_heads", at_least=1)
    vocab_size: int | None = setting(None, "rows of the embedding; null: from the tokenizer", at_least=1)
    hidden_dim: int | None = setting(None, "width of the feed-forward; null: 8/3 of dim", at_least=1)
    multiple_of: int = setting(64, "an automatic hidden_dim is rounded up to a multiple of this", at_least=1)
    norm_eps: float = setting(1e-5, "added under the root of RMSNorm", above=0)
    max_seq_len: int = setting(512, "tokens of a training sample and of the context", at_least=1)
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", above=0)
    dropout: float = setting(0.0, "probability of dropout, below 1", at_least=0)
    flash_attn: bool = setting(True, "scaled_dot_product_attention; false: written out in plain PyTorch, slower")
    tie_embeddings: bool = setting(True, "output layer and embedding share one matrix")
    qk_norm: bool = setting(False, "normalise query and key heads (not in MiniMind v1)")


@dataclass
class TrainingSettings:
    """Section `training`. A step is one optimizer step; intervals count steps."""

    epochs: int = setting(15, "passes over the training samples", at_least=1)
    max_steps: int | None = setting(None, "steps to train, whatever epochs says; null: epochs decide", at_least=1)
    batch_size: int = setting(32, "samples a process reads at once", at_least=1)
    accumulation_steps: int = setting(1, "batches of every process that make up one step", at_least=1)
    learning_rate: float = setting(3e-4, "highest learning rate, reached after the warm-up", above=0)
    min_lr: float | None = setting(None, "learning rate at the end; null: a tenth of learning_rate", at_least=0)
    warmup_steps: int | None = setting(
        None, "steps in which the learning rate rises from 0; null: 2 %% of all steps, at most 1000", at_least=0
    )
    lr_scheduler: str = setting("cosine", "how the learning rate falls", choices=("cosine", "linear", "polynomial"))
    optimizer_type: str = setting("adamw", "optimizer", choices=("adamw", "adam"))
    weight_decay: float = setting(0.1, "of matrices only; adam's is added to the gradient", at_least=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped", at_least=0)
    max_skipped_steps: int = setting(
        10, "steps in a row that are skipped, not finite or leaping, before training stops as diverged", at_least=0
    )
    spike_threshold: float = setting(
        10.0, "a loss so many standard deviations above the last 128 is a leap; 0: not looked for", at_least=0
    )
    dtype: str = setting(
        "bfloat16", "numbers of the matrix products; weights stay float32", choices=("float32", "float16", "bfloat16")
    )
    use_ema: bool = setting(False, "evaluate and save a moving average of the weights")
    ema_decay: float = setting(0.999, "decay of that average a step, below 1", at_least=0)
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
    compile: bool = setting(False, "compile the model with torch.compile; needs a C++ compiler on a CPU")
    device: str = setting("auto", "cuda, cuda:1, mps or cpu; auto: the best there is")
    ddp: bool = setting(False, "train in several processes, started by torchrun")
    ddp_timeout: float = setting(600.0, "seconds without progress after which several processes give up", above=0)
    resume: bool = setting(False, "go on from the newest whole checkpoint in out_dir")
    resume_from: str | None = setting(None, "go on from this checkpoint")
    out_dir: str = setting("out", "folder for checkpoints, metrics and curves")


@dataclass
class LoggingSettings:
    """Section `logging`."""

    use_wandb: bool = setting(False, "send the metrics to Weights & Biases; offline if it cannot be reached")
    wandb_project: str = setting("MateConv-Pretrain", "project in wandb")
    wandb_run_name: str | None = setting(None, "name of the run in wandb; null: wandb makes one up")


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
        """The model's shape, for a tokenizer of so many tokens.

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
TYPES = {name: hint for cls in SECTIONS.values() for name, hint in typing.get_type_hints(cls).items()}


def build_settings(
    file_values: Mapping[str, Mapping],
    flags: Mapping[str, str],
    source: str = "config",
    problems: Sequence[str] = (),
) -> Settings:
    """Merge a config file's sections and the flags' texts over the defaults, and check everything.

    Args:
        file_values: what `read_config` returned.
        flags: name to text, as on the command line.
        source: the config file's name, for messages.
        problems: what is known to be wrong already, to be reported with the rest.

    Raises:
        InputError: with one line for each thing that is wrong.
    """
    settings, problems = Settings(), list(problems)
    for section, values in file_values.items():
        if section not in SECTIONS:
            problems.append(f"{source}: section {section!r} is unknown; {_nearest(str(section), SECTIONS)}")
        elif not isinstance(values, Mapping):
            if values is not None:  # a section whose keys are all commented out
                problems.append(f"{source}: section {section!r} is {values!r}, expected keys with values")
        else:
            _merge_section(settings, section, values, source, problems)
    for name, text in flags.items():
        _assign(settings, name, text, f"--{name}", problems)
    problems += _impossible_combinations(settings)
    if problems:
        raise InputError("\n       ".join(problems))
    return settings


def _merge_section(settings: Settings, section: str, values: Mapping, source: str, problems: list[str]) -> None:
    for name, value in values.items():
        if SECTION_OF.get(name) == section:
            _assign(settings, name, value, f"{source}: {section}.{name}", problems)
        elif name in SECTION_OF:
            problems.append(f"{source}: {section}.{name} belongs in section {SECTION_OF[name]!r}")
        else:
            own = [key for key, owner in SECTION_OF.items() if owner == section]
            problems.append(f"{source}: {section}.{name} is unknown; {_nearest(str(name), own)}")


def _assign(settings: Settings, name: str, value, where: str, problems: list[str]) -> None:
    try:
        setattr(getattr(settings, SECTION_OF[name]), name, parse_value(name, value))
    except ValueError as error:
        problems.append(f"{where}: {value!r} found, {error} expected")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def parse_value(name: str, value):
    """Turn a YAML value or a flag's text into the setting's type.

    Raises:
        ValueError: its text says what would be accepted.
    """
    hint, limits = TYPES[name], FIELDS[name].metadata
    optional = type(None) in typing.get_args(hint)
    kind = next(t for t in (typing.get_args(hint) or (hint,)) if t is not type(None))
    expected = _describe(kind, optional, limits)
    if value is None or (optional and isinstance(value, str) and value.strip().lower() in ("null", "none", "~")):
        if optional:
            return None
        raise ValueError(expected)
    try:
        parsed = _CONVERT[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(expected) from None
    if limits["choices"] and parsed not in limits["choices"]:
        raise ValueError(expected)
    if limits["at_least"] is not None and not parsed >= limits["at_least"]:
        raise ValueError(expected)
    if limits["above"] is not None and not parsed > limits["above"]:
        raise ValueError(expected)
    if limits["at_most"] is not None and not parsed <= limits["at_most"]:
        raise ValueError(expected)
    return parsed


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _to_bool(value) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.strip().lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[value.strip().lower()]


def _to_int(value) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise ValueError
    return int(value)


def _to_float(value) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)  # YAML reads 3e-4, without a point, as text
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_str(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


_CONVERT = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _describe(kind: type, optional: bool, limits: Mapping) -> str:
    text = f"one of {', '.join(limits['choices'])}" if limits["choices"] else _NAMES[kind]
    if limits["at_least"] is not None:
        text += f" of at least {limits['at_least']:g}"
    if limits["above"] is not None:
        text += f" above {limits['above']:g}"
    if limits["at_most"] is not None:
        text += f" and at most {limits['at_most']}"
    return text + (" or null" if optional else "")


def _impossible_combinations(settings: Settings) -> list[str]:
    training, shape = settings.training, dataclasses.asdict(settings.model)
    problems = config_problems(shape | {"vocab_size": shape["vocab_size"] or 1})
    if training.ema_decay >= 1:
        problems.append(f"ema_decay: {training.ema_decay} found, a number below 1 expected")
    if training.min_lr is not None and training.min_lr > training.learning_rate:
        problems.append(f"min_lr: {training.min_lr} is above learning_rate {training.learning_rate}")
    if training.max_steps is not None and (training.warmup_steps or 0) >= training.max_steps:
        problems.append(f"warmup_steps: {training.warmup_steps} leaves none of max_steps {training.max_steps}")
    return problems


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without its traps: keys given twice, aliases that unfold without end, text that becomes a date."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not accepted", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path) -> dict:
    """Read a config file into its sections.

    Raises:
        InputError: the file is missing, not UTF-8, not YAML, or no mapping.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise InputError(f"--config: no file {path}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"--config: {path} has {path.stat().st_size:,} bytes, a config file has a few thousand")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {path} is not UTF-8 (byte {error.start})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"--config: {path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config: {path} holds {type(values).__name__}, expected the sections {', '.join(SECTIONS)}")
    return values

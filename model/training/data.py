"""What a run trains and validates on: the tokenizer, the token files, and which of their samples are for what."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.dataset import VERIFY_BYTES, PretrainDataset, hold_out, verify_tokens
from model.errors import InputError
from model.storage.files import size_text
from model.text.token_bytes import token_bytes
from model.text.tokenization import delimiters, load_tokenizer, tokenizer_sha256, vocabulary_size
from model.training.settings import Settings

TEXT_HEAD = 4096  # bytes that show whether a file is text


def refuse_text(name: str, path: str | None) -> None:
    """Refuse text, as JSONL, where a token file is expected: read as tokens it would train on nonsense.

    Args:
        name: of the setting.
        path: of the file; one that does not exist is refused by its ending alone.

    Raises:
        InputError: it is text; with what to do.
    """
    if path is None or not (_is_text(Path(path)) or Path(path).suffix.lower() in (".jsonl", ".json", ".txt")):
        return
    remedy = f"give it as raw_data_path, and as {name} the .bin to be made of it"
    if name != "train_data_path":
        remedy = "make a .bin of it with optimized_data_processing.py"
    raise InputError(f"{name}: {path} is text, a token file (.bin) expected; {remedy}")


def _is_text(path: Path) -> bool:
    """Whether a file begins with UTF-8 text. Token files have zeros or control characters in their first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(TEXT_HEAD)
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character that is cut off
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


class TrainingData:
    """Opens the tokenizer and the token files, and holds samples out for validation if no file is given for it.

    Attributes:
        config: LMConfig, the model's shape for this tokenizer.
        tokenizer_sha256: of the tokenizer.
        token_bytes: TokenBytes, the bytes of text that ids stand for.
        delimiters: the tokens that begin and end a document.
        train, val: PretrainDataset.
        train_samples, val_samples: which of their samples to use, int64.
        fingerprint, validation: identify the training and the validation data.

    Args:
        verify: read the token files through, as one process of each machine does.

    Raises:
        InputError: a file is missing, is text, its bytes have changed, or they do not fit together.
    """

    def __init__(self, settings: Settings, verify: bool, say: Callable[[str], None]) -> None:
        data, self._verify = settings.data, verify
        tokenizer = load_tokenizer(data.tokenizer_path)
        self.tokenizer_sha256, self.delimiters = tokenizer_sha256(data.tokenizer_path), delimiters(tokenizer)
        self._sample_start = data.sample_start
        tokens = vocabulary_size(tokenizer)
        self.config = settings.lm_config(tokens)
        self.token_bytes = token_bytes(tokenizer, self.config.vocab_size)

        for name in ("train_data_path", "val_data_path"):
            refuse_text(name, getattr(data, name))
        self.train = self._open(data.train_data_path, say)
        if data.val_data_path is not None:
            self.val = self._open(data.val_data_path, say)
            self.train_samples, self.val_samples = np.arange(len(self.train)), np.arange(len(self.val))
        else:
            self.val = self.train
            self.train_samples, self.val_samples = hold_out(len(self.train))
            say(
                f"val_data_path is null: {len(self.val_samples):,} of {len(self.train):,} samples are held out for"
                " validation and not trained on"
            )
        if settings.training.early_stopping and len(self.val_samples) == 0:
            say("early_stopping: there are no validation samples, so training will not stop early")
        self.fingerprint = self.train.fingerprint() | {"training_samples": len(self.train_samples)}
        self.validation = self.val.fingerprint() | {"validation_samples": len(self.val_samples)}

    def agree(self, decided: Callable[[Callable[[], tuple[dict, dict]]], tuple[dict, dict]]) -> None:
        """Take rank 0's `fingerprint` and `validation`: without a manifest only the process that reads a file through
        knows its hash, and ranks that know different things would stop at different steps.

        Args:
            decided: `utils.Processes.decided`.

        Raises:
            InputError: this rank's files are others than rank 0's.
        """
        mine = self.fingerprint, self.validation
        self.fingerprint, self.validation = decided(lambda: mine)
        for here, there in zip(mine, (self.fingerprint, self.validation), strict=True):
            if different := [key for key in there if here[key] != there[key] and here[key] is not None]:
                found = "; ".join(f"{key} {there[key]} on rank 0, {here[key]} here" for key in different)
                raise InputError(f"train_data_path, val_data_path: other files than rank 0's ({found})")

    def _open(self, path: str, say: Callable[[str], None]) -> PretrainDataset:
        config = self.config
        marks = dataclasses.asdict(self.delimiters) if self._sample_start == "document" else {}
        dataset = PretrainDataset(path, config.max_seq_len, config.vocab_size, self.tokenizer_sha256, **marks)
        if dataset.packing is not None:
            empty = 1 - dataset.packing.targets.mean() / config.max_seq_len
            say(f"{path}: documents packed into {len(dataset):,} samples, {empty:.1%} of them padding")
        if dataset.manifest is None:
            only = f"only that its ids are below {config.vocab_size} (vocab_size) can be checked"
            say(f"{path}: no manifest beside it; read as {dataset.layout.origin}; {only}")
        if self._verify and dataset.tokens.nbytes <= VERIFY_BYTES:
            dataset.verified_sha256 = verify_tokens(dataset)
        elif self._verify:
            say(f"{path}: {size_text(dataset.tokens.nbytes)} are too large to be verified before training")
        return dataset

    def spread_validation(self, most: int | None) -> np.ndarray:
        """The samples to validate on: all, or `most` of them, spread evenly; int64."""
        if most is None or most >= len(self.val_samples):
            return self.val_samples
        return self.val_samples[np.linspace(0, len(self.val_samples) - 1, most).astype(np.int64)]

"""What a run trains and validates on: the tokenizer, the token files, and which of their samples are for what."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from model.dataset import PretrainDataset, SampleRange
from model.errors import InputError, command_line, counted
from model.storage.files import size_text
from model.text.chat_template import template_sha256
from model.text.token_bytes import token_bytes
from model.text.tokenization import control_ids, delimiters, open_tokenizer, tokenizer_sha256, vocabulary_size
from model.token_file.packing import find_documents
from model.training.joined import JoinedDataset
from model.training.order import SampleOrder, Source, apportioned
from model.training.settings import DataSettings, Settings, TrainingSettings
from model.training.sorted_order import SortedOrder
from model.training.token_files import files_text, find_token_files
from model.training.verification import verify

# What a token file holds: data processing's name for it.
FORMAT_OF_KIND = {"texts": "text", "chats": "chat", "pairs": "pairs"}
KEY_TEXTS = {  # of a fingerprint
    "samples_per_epoch": "samples of each source in an epoch (train_data_weights)",
    "training_samples": "training samples",
    "learn_sha256": "sha256 of which tokens are learned",
    "reference_sha256": "sha256 of the reference's weights",
    "seq_len": "max_seq_len",
}
ORDERS = {"feistel": SampleOrder, "philox": SortedOrder}  # of samples, by the name that a checkpoint has for it
VERIFY_BYTES = 8 << 30  # of token files that are verified before training, which takes some ten seconds
MOST_HELD_OUT_TEXTS = 100  # samples that tell what is forgotten
TEXT_HEAD = 4096  # bytes that show whether a file is text
BEGINNING_TOKENS = 100_000  # in which openings of documents are looked for
OPENING_TOKENS = 6  # the delimiter among them


def refuse_text(name: str, path: str | None) -> None:
    """Refuse text, as JSONL, where a token file is expected: read as tokens it would train on nonsense.

    Args:
        name: of the setting.
        path: of the file; one that does not exist is refused by its ending alone.

    Raises:
        InputError: it is text, or a file beside a token file; with what to do.
    """
    if path is not None and Path(path).suffix.lower() in (".learn", ".ends"):
        raise InputError(f"{name}: {path} lies beside a token file; give that, {Path(path).with_suffix('.bin')}")
    if path is None or not (_is_text(Path(path)) or Path(path).suffix.lower() in (".jsonl", ".json", ".txt")):
        return
    remedy = f"give it as raw_data_path, and as {name} the .bin to be made of it"
    if name != "train_data_path":
        remedy = "make a .bin of it with optimized_data_processing.py"
    raise InputError(f"{name}: {path} is text, a token file (.bin) expected; {remedy}")


def data_command(kind: str | None, output_path: str | Path | None = None) -> str:
    """The command that makes a token file.

    Args:
        kind: of FORMAT_OF_KIND; None: data processing finds out.
    """
    words = ["--output_path", output_path] if output_path is not None else []
    words += ["--format", FORMAT_OF_KIND[kind]] if kind is not None else []
    return command_line("python", "optimized_data_processing.py", "--input_path", "YOUR.jsonl", *words)


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


def fingerprint_text(key: str, keys: Collection[str]) -> str:
    """What a key of a fingerprint stands for, in a message: "tokens of file 2" for 2_tokens.

    Args:
        keys: all of that fingerprint, which show what is an entry of several files (see `JoinedDataset.fingerprint`).
    """
    if key.startswith("mix_") and key != "mix_share":
        return f"{fingerprint_text(key.removeprefix('mix_'), keys)} of mix_data_path"
    numbers, name = re.fullmatch(r"((?:\d+_)*)(.+)", key).groups()
    first, *more = numbers.split("_")[:-1] or [""]
    where = f"{'entry' if f'{first}_files' in keys else 'file'} {first}" if first else ""
    where = f"file {more[0]} of {where}" if more else where
    return f"{KEY_TEXTS.get(name, name)}{' of ' if where else ''}{where}"


def chats_text(dataset: PretrainDataset) -> str:
    """One line on the chats of a token file: how many there are, what of them is learned, and what is left out."""
    chats, packing = dataset.chats, dataset.packing
    tokens, learned = int(chats.lengths.sum()), int(chats.targets.sum())
    most = dataset.seq_len + 1
    truncates = f"optimized_data_processing.py --long_documents truncate --max_length {most}"
    remedy = f" ({truncates} drops their oldest turns instead)"
    left_out = {
        f"longer than max_seq_len + 1 = {most} tokens{' together' if chats.are_pairs else remedy}": chats.too_long,
        "without a learned token": chats.unlearned,
    }
    named = [f"{count:,} {why}" for why, count in left_out.items() if count]
    unit = counted(len(chats), "pair" if chats.are_pairs else "chat")
    empty = 1 - packing.tokens.mean() / dataset.seq_len
    return (
        f"{unit} with {counted(int(chats.answers.sum()), 'answer')}; {learned:,} of {tokens:,}"
        f" tokens are learned ({learned / tokens:.1%}); packed whole into {counted(len(dataset), 'sample')},"
        f" {empty:.1%} of them padding, and hidden from each other, whatever document_mask is; left out:"
        f" {' and '.join(named) or 'none'}"
    )


def _kind(dataset: PretrainDataset) -> str:
    """What a token file holds: texts, chats or pairs."""
    if dataset.chats is None:
        return "texts"
    return "pairs" if dataset.chats.are_pairs else "chats"


def _joined(parts: list[PretrainDataset | JoinedDataset]) -> PretrainDataset | JoinedDataset:
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


class TrainingData:
    """Opens the tokenizer and the token files, and holds samples out for validation if no file is given for it.

    Attributes:
        config: LMConfig, the model's shape for this tokenizer.
        tokenizer, tokenizer_sha256: the tokenizer, as `open_tokenizer` gives it, and its hash.
        token_bytes: TokenBytes, the bytes of text that ids stand for.
        delimiters: the tokens that begin and end a document.
        train, val: PretrainDataset; JoinedDataset of several files, or, `train`, of chats and texts that are mixed in.
        chat: of chats, what weights that learn them record: `template`, `template_sha256` and `end_ids`; else empty.
        sources: which samples of `train` to train on, and how many of them an epoch reads, for each share that is set.
        training_samples: how many samples there are to train on, without texts that are mixed in.
        val_samples: which samples of `val` to use, int64.
        texts, held_out_texts: these texts, a PretrainDataset, and the samples of it that are not trained on, int64.
        fingerprint, validation: identify the training and the validation data.
        unverified: the token files that are too large to be verified here, for a `BackgroundVerification`.

    Args:
        verify: read the token files through, as one process of each machine does.
        order: of the samples, one of ORDERS.

    Raises:
        InputError: a file is missing, is text, its bytes have changed, or they do not fit together.
    """

    def __init__(self, settings: Settings, verify: bool, say: Callable[[str], None], order: str = "feistel") -> None:
        data = settings.data
        self.unverified, self._verify, self._verified_bytes = [], verify, 0
        self.tokenizer = tokenizer = open_tokenizer(data.tokenizer_path)
        self.tokenizer_sha256, self.delimiters = tokenizer_sha256(data.tokenizer_path), delimiters(tokenizer)
        self._sample_start = data.sample_start
        self._template = tokenizer.chat_template and tokenizer.get_chat_template()
        tokens = vocabulary_size(tokenizer)
        self.config = settings.lm_config(tokens)
        self.token_bytes = token_bytes(tokenizer, self.config.vocab_size)

        for name in ("val_data_path", "mix_data_path"):
            refuse_text(name, getattr(data, name))
        entries = self._open_training(data, say)
        self.train = train = self._trained = _joined(entries)
        self._check_kind(data, settings.training.dpo_beta)
        if train.chats is None and settings.training.init_from is not None:
            say(f"{self._path} holds texts, not chats: all tokens are learned, and the model continues texts")
        self.chat = {} if train.chats is None else self._chat(self._path, train)
        self._divide(entries, data, say)
        self.held_out_texts = np.arange(0)
        if data.mix_data_path is not None:
            self._mix(data, say)
        if settings.training.early_stopping and len(self.val_samples) == 0:
            say("early_stopping: there are no validation samples, so training will not stop early")
        self.fingerprint = train.fingerprint() | {"training_samples": self.training_samples, "order": order}
        if isinstance(train, JoinedDataset):
            self.fingerprint |= {"samples_per_epoch": [source.per_epoch for source in self.sources[: len(entries)]]}
        if self.is_chat:
            self.fingerprint |= {"mix_share": 0.0 if data.mix_data_path is None else data.mix_share}
        if data.mix_data_path is not None:
            self.fingerprint |= {f"mix_{name}": value for name, value in self.texts.fingerprint().items()}
        self.validation = self.val.fingerprint() | {"validation_samples": len(self.val_samples)}

    def _open_training(self, data: DataSettings, say: Callable[[str], None]) -> list[PretrainDataset | JoinedDataset]:
        """The dataset of each entry of train_data_path; without weights all of them are one.

        Raises:
            InputError: a file cannot be used, or there are several and one holds chats.
        """
        entries = find_token_files(data.train_data_path, leave_out=(data.val_data_path, data.mix_data_path))
        paths = sum(entries, [])
        self._path, self._paths = files_text(paths), paths  # the first for messages
        for path in paths:
            refuse_text("train_data_path", path)
        opened = [[self._open(path, say) for path in its] for its in entries]
        for dataset in sum(opened, []):
            if dataset.chats is not None and len(paths) > 1:
                raise InputError(
                    f"train_data_path: {dataset.path} holds {_kind(dataset)}, but of {len(paths)} token files each must"
                    " hold texts; make one file of all chats (optimized_data_processing.py reads several inputs)"
                )
        return [_joined(its) for its in (opened if data.train_data_weights is not None else [sum(opened, [])])]

    def _divide(
        self, entries: list[PretrainDataset | JoinedDataset], data: DataSettings, say: Callable[[str], None]
    ) -> None:
        """Settle which samples are trained on, in which shares, and which are validated on."""
        begins = [0, *itertools.accumulate(map(len, entries[:-1]))]  # the number of each one's first sample
        if data.val_data_path is not None:
            self.val = self._open(data.val_data_path, say, "val_data_path")
            self._check_same_kind(data.val_data_path)
            if os.path.realpath(data.val_data_path) in {os.path.realpath(path) for path in self._paths}:
                say(
                    f"warning: val_data_path: {data.val_data_path} is trained on too, so its loss says nothing of other"
                    " text; give another file, or null"
                )
            training = [SampleRange(len(entry)) for entry in entries]
            self.val_samples = np.arange(len(self.val))
        else:
            self.val = self.train
            training, held_out = zip(*(entry.hold_out() for entry in entries), strict=True)
            self.val_samples = np.concatenate([own + begin for own, begin in zip(held_out, begins, strict=True)])
            say(self._held_out_line())
        self.training_samples = sum(map(len, training))
        per_epoch = [len(samples) for samples in training]
        if len(entries) > 1:
            weights = data.train_data_weights
            per_epoch = apportioned(self.training_samples, weights)
            for path, samples, count, weight in zip(data.train_data_path, training, per_epoch, weights, strict=True):
                share, passes = count / self.training_samples, count / len(samples)
                say(f"train_data_weights: {share:.1%} of the samples are of {path}, read {passes:.2f} times an epoch")
                if weight / sum(weights) * self.training_samples < 1:
                    say(
                        f"warning: train_data_weights: {weight:g} of {sum(weights):g} for {path} is less than one of"
                        f" {self.training_samples:,} samples; one is read in each epoch; raise it, or omit the file"
                    )
        self.sources = [
            Source(dataclasses.replace(samples, begin=begin), count)
            for samples, begin, count in zip(training, begins, per_epoch, strict=True)
        ]

    @property
    def is_chat(self) -> bool:
        """Whether the training data are chats."""
        return bool(self.chat)

    @property
    def is_pairs(self) -> bool:
        """Whether the training data are pairs of answers."""
        return _kind(self._trained) == "pairs"

    def check_random_weights(self, say: Callable[[str], None]) -> None:
        """Chats hardly teach random weights the language, which is said; pairs tune weights that answer.

        Raises:
            InputError: these are pairs.
        """
        if self.is_pairs:
            raise InputError(
                f"init_from: null found, but {self._path} holds pairs of answers, which tune a model that answers; give"
                " its weights"
            )
        if self.is_chat:
            say("init_from is null: random weights learn the form of an answer from chats, but hardly the language")

    def _chat(self, path: str, dataset: PretrainDataset) -> dict:
        """What weights record of the chats that they learn.

        Raises:
            InputError: they were made with another template than the tokenizer's.
        """
        found, recorded = template_sha256(self._template or ""), dataset.manifest.chat["template_sha256"]
        if found != recorded:
            raise InputError(
                f"{path}: made with another chat template (sha256 {recorded[:12]}…, the tokenizer's is {found[:12]}…);"
                " set tokenizer_path to that one, or make the file again with optimized_data_processing.py"
            )
        end_ids = dataset.manifest.chat["end_ids"]
        return {"template": self._template, "template_sha256": found, "end_ids": end_ids}

    def _check_kind(self, data: DataSettings, dpo_beta: float) -> None:
        """Refuse training data of another kind than the settings expect."""
        found, expected = _kind(self.train), data.train_data_kind
        if expected not in (None, found):
            raise InputError(
                f"train_data_path: {self._path} holds {found}, but train_data_kind is {expected}; make it of"
                f" {expected} ({data_command(expected)}), or set train_data_kind to {found} or null"
            )
        if found != "pairs" and dpo_beta != TrainingSettings.dpo_beta:
            raise InputError(
                f"dpo_beta: {dpo_beta:g} is of pairs, but train_data_path {self._path} holds {found}; omit it"
            )

    def _check_same_kind(self, val_path: str) -> None:
        kinds = [_kind(data) for data in (self.train, self.val)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"val_data_path: {val_path} holds {kinds[1]}, train_data_path {self._path} holds {kinds[0]}; give a"
                f" token file of {kinds[0]}, or null"
            )
        if self.is_chat:
            self._chat(val_path, self.val)

    def _mix(self, data: DataSettings, say: Callable[[str], None]) -> None:
        """Mix the texts of mix_data_path into the chats.

        Raises:
            InputError: the one are no texts, or the other no chats.
        """
        if (kind := _kind(self.train)) != "chats":
            raise InputError(
                f"mix_data_path: texts are mixed into chats, but train_data_path {self._path} holds {kind};"
                " omit mix_data_path"
            )
        self.texts, share = self._open(data.mix_data_path, say, "mix_data_path"), data.mix_share
        if self.texts.chats is not None:
            found = f"{data.mix_data_path} holds {_kind(self.texts)}"
            raise InputError(f"mix_data_path: {found}, a token file of texts expected")
        texts, self.held_out_texts = self.texts.hold_out()
        most = MOST_HELD_OUT_TEXTS
        self.held_out_texts = self.held_out_texts[:: -(-len(self.held_out_texts) // most) or 1]
        per_epoch = max(1, round(self.training_samples * share / (1 - share)))
        self.sources.append(Source(dataclasses.replace(texts, begin=len(self.train)), per_epoch))
        self.train = JoinedDataset([self.train, self.texts])
        say(f"mix_data_path: {share:.1%} of the samples are texts of {data.mix_data_path}, wholly learned")

    def order(self, seed: int, rows_per_step: int) -> SampleOrder:
        """The order in which training reads its samples."""
        return ORDERS[self.fingerprint["order"]](self.sources, seed, rows_per_step)

    def _held_out_line(self) -> str:
        if not self.is_chat:
            held_out, of_all = len(self.val_samples), f"{len(self.train):,} samples"
        elif len(self.val_samples) == 0:
            return (
                f"val_data_path is null, and fewer than 100 {_kind(self.train)} are too few to hold some of them out:"
                " training reads all of them, and nothing is validated"
            )
        else:
            held_out, of_all = len(self.train.held_out_chats), f"{len(self.train.chats):,} {_kind(self.train)}"
        return f"val_data_path is null: {held_out:,} of {of_all} are held out for validation and not trained on"

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
                named = {key: fingerprint_text(key, there) for key in different}
                found = "; ".join(f"{text} {there[key]} on rank 0, {here[key]} here" for key, text in named.items())
                raise InputError(f"train_data_path, val_data_path: other files than rank 0's ({found})")

    def _open(self, path: str, say: Callable[[str], None], name: str = "train_data_path") -> PretrainDataset:
        """The dataset of a token file; `name`: of its setting."""
        config = self.config
        marks = dataclasses.asdict(self.delimiters) if self._sample_start == "document" else {}
        try:
            dataset = PretrainDataset(path, config.max_seq_len, config.vocab_size, self.tokenizer_sha256, **marks)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if dataset.chats is not None:
            say(f"{path}: {chats_text(dataset)}")
        elif dataset.packing is not None:
            empty = 1 - dataset.packing.targets.mean() / config.max_seq_len
            say(f"{path}: documents packed into {counted(len(dataset), 'sample')}, {empty:.1%} of them padding")
        if dataset.manifest is None:
            only = f"only that its ids are below {config.vocab_size} (vocab_size) can be checked"
            say(f"{path}: no manifest beside it; read as {dataset.layout.origin}; {only}")
        if self._verify and self._verified_bytes + dataset.tokens.nbytes <= VERIFY_BYTES:
            self._verified_bytes += dataset.tokens.nbytes
            verify(dataset)
        elif self._verify:
            self.unverified.append(dataset)
            say(f"{path}: {size_text(dataset.tokens.nbytes)}, which are verified while training takes its first steps")
        return dataset

    def validation_turns(self, most: int) -> list[tuple[list[int], list[int]]]:
        """Of answers in the validation chats: the ids up to where each begins, and its own, the end included.

        Args:
            most: chats, spread evenly; of pairs those with the chosen answer.
        """
        chats = np.arange(len(self.val.chats)) if self.val is not self._trained else self.val.held_out_chats
        if len(chats) > most:
            chats = chats[np.linspace(0, len(chats) - 1, most).astype(np.int64)]
        self.val.refuse_shortened()
        return self.val.chats.turns(self.val.tokens, self.val.chats.chosen(chats))

    def contains(self, text: str) -> bool:
        """Whether the beginning of the training texts has it."""
        return text in self.decoded(self._beginning().tolist())

    def openings(self, count: int) -> list[str]:
        """How some documents at the beginning of the training texts begin, a few characters each: at most `count`, none
        where they cannot be told apart."""
        tokens = self._beginning()
        begins = find_documents(tokens, self.delimiters.bos_id, self.delimiters.eos_id)
        spread = begins[np.linspace(0, max(0, len(begins) - 1), count if len(begins) else 0).astype(np.int64)]
        texts = [self.decoded(tokens[begin : begin + OPENING_TOKENS].tolist()) for begin in spread]
        lines = [text.replace("\ufffd", "").strip().split("\n")[0] for text in texts]
        return list(dict.fromkeys(line for line in lines if line))

    def _beginning(self) -> np.ndarray:
        return self._trained.token_arrays()[0][:BEGINNING_TOKENS]

    def decoded(self, ids: list[int]) -> str:
        """The text of ids, without control tokens."""
        control = control_ids(self.tokenizer)
        return self.tokenizer.decode([index for index in ids if index not in control])

    def spread_validation(self, most: int | None) -> np.ndarray:
        """The samples to validate on: all, or `most` of them, spread evenly; int64."""
        if most is None or most >= len(self.val_samples):
            return self.val_samples
        return self.val_samples[np.linspace(0, len(self.val_samples) - 1, most).astype(np.int64)]

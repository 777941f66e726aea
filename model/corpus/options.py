"""The options of data processing; each is a flag of optimized_data_processing.py of the same name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from model.corpus.cleaning import Cleaner, CleaningOptions, option
from model.corpus.near_duplicates import require_library
from model.errors import InputError

LONG_DOCUMENTS = ("keep", "split", "truncate", "drop")


@dataclass(frozen=True)
class ProcessingOptions:
    """What is done with the input; `cleaning` apart, every field is a flag.

    Raises:
        InputError: values that cannot be, all of them in one message.
    """

    tokenizer_path: str | Path | None = option(None, "folder of a tokenizer; default: the embedded one")
    max_length: int = option(512, "tokens, bos and eos counted; what becomes of longer documents: see long_documents")
    chunk_size: int = option(50000, "lines that are handled together at most")
    save_interval: int = option(1000000, "tokens, about, after which a worker's progress is made final")
    text_field: str = option("text", "key of the text in each JSON object, or the column")
    long_documents: str = option("keep", "documents of more than max_length tokens", choices=LONG_DOCUMENTS)
    deduplicate: bool = option(True, "leave out a text that was there before, exactly")
    near_duplicates: float = option(
        0.0, "leave out a text of at least this similarity to an earlier one, such as 0.8 (needs rensa); 0: none"
    )
    val_share: float = option(0.0, "share of the documents, chosen by hash, that goes to a validation file X.val.bin")
    workers: int | None = option(None, "worker processes; 0: only this one; default: one a core, 0 for small inputs")
    cleaning: CleaningOptions = dataclasses.field(default_factory=CleaningOptions)

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.tokenizer_path, str | Path | None):
            problems.append(f"tokenizer_path: {self.tokenizer_path!r}; a folder expected")
        if not isinstance(self.text_field, str):
            problems.append(f"text_field: {self.text_field!r}; the name of a key expected")
        if not isinstance(self.deduplicate, bool):
            problems.append(f"deduplicate: {self.deduplicate!r}; true or false expected")
        for name in ("max_length", "chunk_size", "save_interval", "workers"):
            value = getattr(self, name)
            least = 0 if name == "workers" else 1
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (name == "workers" and value is None):
                problems.append(f"{name}: {value!r} is not a whole number of at least {least}")
        if self.long_documents not in LONG_DOCUMENTS:
            problems.append(f"long_documents: {self.long_documents!r}; one of {', '.join(LONG_DOCUMENTS)} expected")
        elif not problems and self.long_documents != "keep" and self.max_length < 8:
            problems.append(f"max_length: {self.max_length} is too short to shorten documents to; at least 8 expected")
        for name in ("near_duplicates", "val_share"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                problems.append(f"{name}: {value!r}; a number from 0 to below 1 expected")
        try:
            if not isinstance(self.cleaning, CleaningOptions):
                raise InputError(f"cleaning: {self.cleaning!r}; CleaningOptions expected")
            Cleaner(self.cleaning)
        except InputError as error:
            problems.append(str(error))
        if problems:
            raise InputError("; ".join(problems))
        if self.near_duplicates:
            require_library()

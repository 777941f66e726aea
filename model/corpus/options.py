"""The options of data processing; each is a flag of optimized_data_processing.py of the same name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from model.corpus.cleaning import Cleaner, CleaningOptions
from model.corpus.near_duplicates import require_library
from model.corpus.plain_text import TXT_DOCUMENTS
from model.errors import InputError, shown
from model.options import check_options, setting

FORMATS = ("auto", "text", "chat", "pairs")
LONG_DOCUMENTS = ("keep", "split", "truncate", "drop")


@dataclass(frozen=True)
class ProcessingOptions:
    """What becomes of the input; every field but `cleaning` is a flag.

    Raises:
        InputError: naming every value that is refused.
    """

    tokenizer_path: str | Path | None = setting(None, "folder of a tokenizer; null: the embedded one", path=True)
    max_length: int = setting(
        512, "tokens, bos and eos counted; long_documents says what becomes of longer documents", at_least=1
    )
    chunk_size: int = setting(50000, "most lines to process at a time", at_least=1)
    save_interval: int = setting(1000000, "tokens, about, after which a worker's progress is made final", at_least=1)
    format: str = setting(
        "auto",
        "what the lines are: texts, chats in any of the common forms, or pairs of answers, chosen and rejected; auto: "
        "what the first objects are",
        choices=FORMATS,
    )
    text_field: str = setting("text", "key of the text in each JSON object, or the column")
    txt_documents: str = setting(
        "file",
        "what becomes a document of plain .txt: the file (past 1 MiB cut at a line's end), a paragraph between empty "
        "lines, or a line",
        choices=TXT_DOCUMENTS,
    )
    long_documents: str = setting(
        "keep",
        "documents of more than max_length tokens; truncate cuts texts at the end, and drops a chat's oldest turns",
        choices=LONG_DOCUMENTS,
    )
    deduplicate: bool = setting(True, "drop a text that is exactly an earlier one")
    near_duplicates: float = setting(
        0.0,
        "drop a text of at least this similarity to an earlier one, such as 0.8 (needs rensa); 0: none",
        at_least=0,
        below=1,
    )
    val_share: float = setting(
        0.0, "share of the documents, chosen by hash, that goes to a validation file X.val.bin", at_least=0, below=1
    )
    workers: int | None = setting(
        None, "worker processes; 0: only this one; null: one a core, 0 for small inputs", at_least=0
    )
    cleaning: CleaningOptions = dataclasses.field(default_factory=CleaningOptions)

    @property
    def is_chat(self) -> bool:
        """Whether the documents are chats, or pairs of them; a job decides what auto is before it asks."""
        return self.format in ("chat", "pairs")

    @property
    def is_pairs(self) -> bool:
        """Whether the documents are pairs of answers."""
        return self.format == "pairs"

    def __post_init__(self) -> None:
        problems = check_options(self)
        if not problems and self.long_documents != "keep" and self.max_length < 8:
            problems.append(f"max_length: {self.max_length} is too short to shorten documents to; at least 8 expected")
        if not problems and self.is_chat and self.long_documents == "split":
            problems.append("long_documents: chats cannot be split; truncate drops their oldest turns")
        if not problems and self.is_pairs and self.long_documents == "truncate":
            problems.append("long_documents: pairs of answers cannot be truncated; keep or drop them")
        try:
            if not isinstance(self.cleaning, CleaningOptions):
                raise InputError(f"cleaning: {shown(self.cleaning)} found, CleaningOptions expected")
            Cleaner(self.cleaning)
        except InputError as error:
            problems += error.args
        if problems:
            raise InputError(*problems)
        if self.near_duplicates:
            require_library()

"""Trains a byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) on JSONL text.

The result is a tokenizer like that in `model/tokenizer`: GPT-2's split over all 256 bytes, so that every string
survives encoding and decoding unchanged; single digits; `<unk>`, `<s>`, `</s>` as ids 0, 1, 2; MiniMind v1's chat form.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.command import say
from model.corpus.chats import contents_of, parse_chat
from model.corpus.inspection import EXAMPLES, describe_lines, nothing_read
from model.corpus.jsonl import parse_line
from model.corpus.opening import EXPECTED, Source
from model.corpus.options import ProcessingOptions
from model.corpus.pairs import parse_pair
from model.corpus.parts import line_offsets, lines_of, stream_parts
from model.corpus.recognition import recognise_format
from model.corpus.sources import find_sources
from model.errors import InputError, counted
from model.storage.files import replacing, size_text
from model.text.chat_template import MESSAGES_TEMPLATE

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # the bytes alone
TOKEN_BYTES_BELOW = 12  # three Chinese characters or a long English word: longer tokens are formulas, not words
MAX_FILE_BYTES = 64 << 20  # of each source: the trainer holds all pieces in memory
BLOCK_BYTES = 8 << 20  # of input read at once
MAX_EXAMPLE_BYTES = 4096  # of a rejected line
MAX_KNOWN_LINES = 2_000_000  # lines remembered, to skip repeats

LONG_SYMBOL_RUN = re.compile(r"([^\w\s])\1{4,}")
LONG_SPACE_RUN = re.compile(r"( {8}) +")


@dataclass
class TrainingText:
    """Iterates over the texts of sources for the trainer, and counts documents, characters and rejected lines.

    Removes what would waste tokens: a line seen before (a site's boilerplate), the rest of a long run of one symbol or
    of spaces, and the difference between a no-break space and a space.
    """

    sources: Sequence[Source]
    text_field: str = "text"
    format: str = "text"  # of the lines, as in ProcessingOptions; of chats and pairs, the contents are the texts
    documents: int = 0
    characters: int = 0
    rejected: Counter = field(default_factory=Counter)  # bad lines by reason (reasons.REASONS)
    examples: dict[str, list[bytes]] = field(default_factory=dict)  # the first lines rejected for each reason

    def __iter__(self) -> Iterator[str]:
        known: set[int] = set()
        for source in self.sources:
            share = min(1.0, MAX_FILE_BYTES / max(source.size, 1))
            for _, block, _ in stream_parts(source, BLOCK_BYTES, self.text_field):
                if not source.size and block.offset >= MAX_FILE_BYTES:  # a stream of unknown length
                    break
                lines = lines_of(block)
                for raw, offset in zip(lines, line_offsets(block), strict=True):
                    if zlib.crc32(offset.to_bytes(8, "little")) >= share * 2**32:
                        continue  # chosen by position, so the same lines each time
                    text, reason = self._parse(raw)
                    if text is None:
                        self.rejected[reason] += 1
                        if self.rejected[reason] <= EXAMPLES:
                            self.examples.setdefault(reason, []).append(bytes(raw[:MAX_EXAMPLE_BYTES]))
                        continue
                    self.documents += 1
                    text = _without_noise(text, known)
                    self.characters += len(text)
                    yield text

    def _parse(self, raw: bytes) -> tuple[str | None, str | None]:
        """(text, None) of a line, or (None, why it has none)."""
        if self.format == "text":
            return parse_line(raw, self.text_field)
        chat, form_or_reason = (parse_pair if self.format == "pairs" else parse_chat)(raw)
        return (None, form_or_reason) if chat is None else ("\n".join(contents_of([chat])), None)

    def what_was_rejected(self) -> str:
        """What the lines hold that were rejected for the most frequent reason, as `describe_lines` says it."""
        if not self.rejected:
            return ""
        [(reason, _)] = self.rejected.most_common(1)
        form = self.format, self.text_field
        return describe_lines(self.examples[reason], reason, *form, self.sources[0].location)


def _without_noise(text: str, known: set[int]) -> str:
    kept = []
    for line in text.replace("\xa0", " ").split("\n"):
        if line and (key := hash(line)) not in known:
            kept.append(line)
            if len(known) < MAX_KNOWN_LINES:
                known.add(key)
    text = LONG_SYMBOL_RUN.sub(r"\1\1\1\1", "\n".join(kept))
    return LONG_SPACE_RUN.sub(r"\1", text)


def train_tokenizer(
    input_paths: Sequence[str | Path],
    output_dir: str | Path,
    vocab_size: int = 6400,
    text_field: str = "text",
    overwrite: bool = False,
    format: str = "auto",
    say: Callable[[str], None] = say,
) -> TrainingText:
    """Train a tokenizer of exactly `vocab_size` tokens on files (`model.corpus.sources`); save it into `output_dir`.

    The same files give the same tokenizer, byte for byte. To bound memory, it reads at most 64 MiB of each file (as
    stored, for a compressed one), sampled evenly, and the first 64 MiB of a streamed dataset. A file given twice counts
    once, since its lines are known. `format` is as in data processing: of chats, the contents are the texts.

    Args:
        say: called with a line once all arguments are checked, before the long work.

    Returns:
        the text read, with its counts of documents, characters, and bad lines by reason.

    Raises:
        InputError: a file is missing, nothing in the files can be read, the folder holds a tokenizer and `overwrite` is
            false, the vocabulary is smaller than the 259 bytes and control tokens, or the text is too short for
            `vocab_size` tokens.
    """
    folder = Path(output_dir)
    _check_target(folder, vocab_size, overwrite)
    sources = find_sources(input_paths, text_field=text_field)  # all must exist before the first is read
    sources, options = recognise_format(sources, ProcessingOptions(text_field=text_field, format=format), say)
    files = sum(len(source.files.names) if source.files else 1 for source in sources)
    say(f"training a tokenizer of {vocab_size:,} tokens on {counted(files, 'file')}; it can take minutes")
    for source in sources:
        if source.size > MAX_FILE_BYTES:
            size, most = size_text(source.size), size_text(MAX_FILE_BYTES)
            say(f"{source.name}: of its {size}, {most} are read, in lines all over it")

    text = TrainingText(sources, text_field, options.format)
    tokenizer = _train_bpe(text, vocab_size)
    _check_was_read(text)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise InputError(
            f"vocab_size: {text.characters:,} characters in"
            f" {counted(text.documents, 'document')} give only {found} tokens that "
            f"occur twice, not {vocab_size}; give more text or a smaller --vocab_size"
        )
    _save(tokenizer, folder)
    return text


def _check_target(folder: Path, vocab_size: int, overwrite: bool) -> None:
    """Refuse to replace a tokenizer unasked, or to make one too small for its first tokens."""
    if (folder / "tokenizer.json").exists() and not overwrite:
        raise InputError(
            f"tokenizer_output: {folder} already holds a tokenizer, which token files and models may depend on; "
            "give another folder, or --overwrite_tokenizer to replace it"
        )
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size: {vocab_size} is too small; the bytes and control tokens are {SMALLEST_VOCABULARY}"
        )


def _train_bpe(text: Iterable[str], vocab_size: int):
    """A `tokenizers.Tokenizer` trained on texts, of `vocab_size` tokens or, where the texts are too short, fewer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=TOKEN_BYTES_BELOW,  # the trainer excludes this length too
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    # No merge is learnt across a digit, so digits stay single even without the Digits step when encoding. With it,
    # llama.cpp and fastokens would not recognise GPT-2's plain split, and fastokens would be slower.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _check_was_read(text: TrainingText) -> None:
    """Explain why no document was read, if none was."""
    if text.documents:
        return
    names = ", ".join(source.location for source in text.sources[:3]) + (", …" if len(text.sources) > 3 else "")
    if not text.rejected:
        raise InputError(f"input_path: {names}: no line found; {EXPECTED}")
    form = text.format, text.text_field
    raise InputError(f"input_path: {nothing_read(names, text.rejected, text.what_was_rejected(), *form)}")


def _save(tokenizer, folder: Path) -> None:
    """Write tokenizer.json, then tokenizer_config.json, each atomically."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,  # neither the token file nor the sampler pads; whoever does chooses one
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # decoding restores exactly what was encoded
        "model_max_length": int(1e30),  # the model's limit counts, not the tokenizer's
        "chat_template": MESSAGES_TEMPLATE,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write((content + "\n").encode("utf-8"))

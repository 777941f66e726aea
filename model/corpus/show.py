"""Prints the first documents of a token file as training reads them; of chats, what is learned and what is not."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from model.corpus.export import REMAKE, checked_manifest
from model.errors import InputError, printable
from model.text.detokenize import new_detokenizer
from model.text.tokenization import control_ids, load_tokenizer, tokenizer_sha256
from model.token_file.manifest import Manifest, ends_path, learn_path

COLOURS = {True: "\x1b[32m", False: "\x1b[2m"}  # learned: green; not: dim
RESET = "\x1b[0m"
MOST_TOKENS = 4096  # of a document that are shown


def shown_documents(
    token_path: str | Path, count: int, tokenizer_path: str | Path | None = None, coloured: bool = False
) -> Iterator[str]:
    """The first `count` documents of a token file, control tokens by name, each under a line of its counts.

    What is learned is green and the rest dim, or between [learned] and [/learned]. Of what is in the texts, a terminal
    obeys nothing but newlines and tabs.

    Raises:
        InputError: a file is missing, the files do not belong together, or another tokenizer made them.
    """
    token_path = Path(token_path)
    manifest = checked_manifest(token_path)
    if tokenizer_sha256(tokenizer_path) != manifest.tokenizer_sha256:
        raise InputError(
            f"tokenizer_path: {tokenizer_path or 'the embedded tokenizer'} did not make {token_path}; give the one that"
            f" did (sha256 {manifest.tokenizer_sha256[:12]}…)"
        )
    tokenizer = load_tokenizer(tokenizer_path)
    tokens = np.memmap(token_path, np.dtype(manifest.dtype).newbyteorder("<"), "r")
    learned = _learned(token_path, manifest)
    ends = np.fromfile(ends_path(token_path), "<u8", count=count).astype(np.int64).tolist()
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
        flags = learned[start:end] if manifest.chat else np.zeros(end - start, dtype=np.uint8)
        for path, found, most in (
            (token_path, tokens[start:end].max(), manifest.vocab_size - 1),
            (learn_path(token_path), flags.max(), 1),
        ):
            if found > most:
                raise InputError(f"{path}: {found:,} found in document {number:,}, at most {most:,} expected; {REMAKE}")
        said = f", {int(flags.sum()):,} learned" if manifest.chat else ""
        said += f", {('rejected', 'chosen')[number % 2]}" if manifest.chat.get("pairs") else ""
        shown = slice(start, min(end, start + MOST_TOKENS))
        in_colours = coloured and bool(manifest.chat)
        text = _text(tokenizer, tokens[shown].tolist(), flags[:MOST_TOKENS].astype(bool).tolist(), in_colours)
        cut = f"\n… ({end - start - MOST_TOKENS:,} more tokens)" if end - start > MOST_TOKENS else ""
        yield f"document {number:,} of {manifest.documents:,}: {end - start:,} tokens{said}\n{text}{cut}"


def _learned(token_path: Path, manifest: Manifest) -> np.ndarray | None:
    """Which tokens are learned, uint8 [tokens]; None for texts."""
    if not manifest.chat:
        return None
    path = learn_path(token_path)
    if not path.is_file() or path.stat().st_size != manifest.tokens:
        raise InputError(f"{path}: {manifest.tokens:,} bytes expected, one a token of {token_path}; {REMAKE}")
    return np.memmap(path, np.uint8, "r")


def _text(tokenizer, ids: list[int], flags: list[bool], coloured: bool) -> str:
    control, detokenizer = control_ids(tokenizer), new_detokenizer(tokenizer)
    pieces = []  # (learned, text)
    for index, flag in zip(ids, flags, strict=True):
        if index in control:
            token = tokenizer.convert_ids_to_tokens(index)
            pieces.append((flag, detokenizer.flush() + (token if isinstance(token, str) else f"<{index}>")))
        else:
            pieces.append((flag, detokenizer.push(index)))
    pieces.append((flags[-1] if flags else False, detokenizer.flush()))
    shown = []
    for flag, group in groupby(pieces, key=lambda piece: piece[0]):
        text = printable("".join(piece for _, piece in group))
        if coloured:
            shown.append(f"{COLOURS[flag]}{text}{RESET}")
        else:
            shown.append(f"[learned]{text}[/learned]" if flag else text)
    return "".join(shown)

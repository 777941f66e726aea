"""Text to ids. No text yields a control token, and a tokenizer that fails, hangs or panics ends in one clear error.

Most libraries turn the text `</s>` into the token that ends a document. Skipping their search for special tokens is not
enough: a Unigram, WordLevel or WordPiece model, or BPE with `ignore_merges`, finds the token in its vocabulary. So the
control tokens get secret names here, and `</s>` becomes ordinary pieces, as in SentencePiece.
"""

import base64
import contextlib
import functools
import json
import os
import re
import secrets
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence

from model.errors import InputError, first_line

MOST_GROWTH = 64  # characters that a normalizer or decoder may make of one; NFKC makes up to 18
SECONDS, SECONDS_PER_MILLION = 30, 120  # limit of one encoding; the slowest take one or two a million


class TextEncoder:
    """Encodes texts with a copy of a tokenizer whose control tokens have secret names.

    Attributes:
        json: the copy's tokenizer.json, without truncation, padding and post-processor; ids are the original's.
        control: original name -> id of each control token.

    Args:
        tokenizer_json: as the `tokenizers` library writes it.
        names: control tokens besides those that the file marks as special.
    """

    def __init__(self, tokenizer_json: str, names: Collection[str] = ()) -> None:
        tokenizer = json.loads(tokenizer_json)
        # Private-use characters have no case and are no white space; nobody can guess a random sequence.
        self._secret = "".join(chr(0xE000 + secrets.randbelow(6400)) for _ in range(9))
        self._names = sorted(_control_tokens(tokenizer, names), key=len, reverse=True)
        self.control = _rename(tokenizer, {name: self._hidden(n) for n, name in enumerate(self._names)})
        self.json = json.dumps(tokenizer | {"truncation": None, "padding": None, "post_processor": None})
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or "(?!)")  # the longest first
        escaped = re.escape(json.dumps(self._secret)[1:-1])  # by a template that writes JSON in ASCII
        self._guards = re.compile(rf"(?:{self._secret}|{escaped})(\d+)(?:\ue000|\\ue000)")
        self._quiet = can_panic(self.json)
        self._backend = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos. A control token spelled out in a text stays text.

        Raises:
            InputError: the tokenizer fails, or takes too long.
        """
        return self._encode(texts, as_text=True)

    def guarded(self, value):
        """A copy of a message (texts in dicts and lists) with its control tokens marked, unlike a template's."""
        if isinstance(value, str):
            return self._spelled.sub(lambda found: f"{self._secret}{self._names.index(found[0])}\ue000", value)
        if isinstance(value, dict):
            return {key: self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list | tuple) else value

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a chat rendered from guarded messages, with control tokens only where the template wrote them.

        Raises:
            InputError: as `encode`.
        """
        return self.encode_all_rendered([text])[0]

    def encode_all_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_rendered` of each text, in one call of the library."""
        return self._encode([self._rendered(text) for text in texts], as_text=False)

    @property
    def marks(self) -> tuple[str, str]:
        """Two texts that no message holds, to mark where a part of one begins and ends in a rendered text."""
        return f"{self._secret}\ue002", f"{self._secret}\ue003"

    def count_control(self, rendered: str) -> int:
        """How many control tokens the template wrote in a text rendered from guarded messages."""
        return len(self._spelled.findall(rendered))

    @property
    def secret(self) -> str:
        """Private-use characters that no text holds: part of all marks, guards and placeholders."""
        return self._secret

    def placeholder(self, number: int) -> str:
        """A text that stands for the content of a message in a rendered text; see `split_placeholders`."""
        return f"{self._secret}{number}\ue004"

    def split_placeholders(self, rendered: str) -> tuple[list[str], list[int]]:
        """The texts around the placeholders in a rendered text, and the placeholders' numbers."""
        parts = re.split(rf"{self._secret}(\d+)\ue004", rendered)
        return parts[::2], [*map(int, parts[1::2])]

    def split_control(self, rendered: str) -> list[str | int]:
        """The texts between the control tokens that a rendered text spells, and the ids of these tokens, in order."""
        parts, at = [], 0
        for found in self._spelled.finditer(rendered):
            parts += [rendered[at : found.start()], self.control[found[0]]]
            at = found.end()
        return [part for part in (*parts, rendered[at:]) if part != ""]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_backend": None}  # a process that it is sent to loads its own

    def _rendered(self, text: str) -> str:
        """A rendered text with secret names for the control tokens that the template wrote, and no guards."""
        text = self._spelled.sub(lambda found: self._hidden(self._names.index(found[0])), text)
        return self._guards.sub(lambda found: self._names[int(found[1])], text)

    def _hidden(self, number: int) -> str:
        return f"{self._secret}{number}\ue001"

    def _encode(self, texts: Sequence[str], as_text: bool) -> list[list[int]]:
        if self._backend is None:
            self._backend = load_backend(self.json)
        self._backend.encode_special_tokens = as_text  # covers those without a secret name: see _control_tokens
        return encode_batch(self._backend, texts, self._quiet)


def _control_tokens(tokenizer: dict, names: Collection[str]) -> set[str]:
    """Names of the control tokens in a tokenizer.json: its special tokens, the model's unknown token, and `names`.

    A single character, such as CLIP's padding `!`, stays an ordinary character unless `names` holds it.
    """
    model = tokenizer["model"]
    unknown = model.get("unk_token")
    if isinstance(model.get("vocab"), list) and model.get("unk_id") is not None:  # Unigram's
        unknown = model["vocab"][model["unk_id"]][0]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]} | {unknown}
    return {name for name in special if name and len(name) > 1} | set(names)


def _rename(tokenizer: dict, names: dict[str, str]) -> dict[str, int]:
    """Rename tokens of a tokenizer.json in place and mark them special; returns old name -> id."""
    ids, model = {}, tokenizer["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: [token, score], by id
        ids = {token: index for index, (token, _) in enumerate(vocabulary) if token in names}
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    else:
        ids = {token: index for token, index in vocabulary.items() if token in names}
        model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):  # a merge that involves a control token could yield it
        model["merges"] = [
            merge for merge in model["merges"] if not {*_pair(merge), "".join(_pair(merge))} & names.keys()
        ]
    for token in tokenizer["added_tokens"]:
        if token["content"] in names:
            ids[token["content"]] = token["id"]
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    return ids


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge  # older files write "a b"


def unknown_id(tokenizer_json: str) -> int | None:
    """The id of the unknown token; None if the tokenizer has none."""
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def check_growth(normalizer, decoder) -> None:
    """Check that a tokenizer cannot blow up a text until memory runs out.

    Args:
        normalizer, decoder: of the `tokenizers` library; None where there is none.

    Raises:
        InputError: one of them can make more than MOST_GROWTH characters out of one.
    """
    for name, part in (("normalizer", normalizer), ("decoder", decoder)):
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > MOST_GROWTH:
            made = f"{growth:,}" if growth < 1e15 else "countless"
            raise InputError(f"its {name} can make {made} characters out of one, at most {MOST_GROWTH} expected")


def _growth(step: dict) -> int:
    """Upper estimate of the characters that a normalizer or decoder makes of one, apart from Unicode normalization."""
    growth = 1
    for inner in step.get("normalizers") or step.get("decoders") or []:
        growth *= _growth(inner)
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String") or ""  # a regular expression can match the empty string
        growth = -(-len(step["content"]) // len(pattern)) if pattern else len(step["content"]) + 1
    elif step.get("type") == "Prepend":
        growth = len(step["prepend"]) + 1
    elif step.get("type") == "Precompiled":  # SentencePiece's: the size of a trie, the trie, and what it maps to
        table = base64.b64decode(step["precompiled_charsmap"] or "")
        growth = max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    return max(1, growth)


# ------------------------------------------------------------------------------------------------------ the library


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into an InputError, a Rust panic (no subclass of Exception) included.

    Raises:
        InputError: `what`, and the library's reason.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, InputError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what} ({type(error).__name__}: {first_line(error)})") from error
        raise


def can_panic(tokenizer_json: str) -> bool:
    """Whether a tokenizer has regular expressions: the library panics if one backtracks too far, and prints pages."""
    return '"Regex":' in tokenizer_json


@functools.lru_cache(maxsize=1)
def load_backend(tokenizer_json: str):
    """A tokenizer of the library that finds no special tokens in texts; the last one is kept.

    Raises:
        InputError: the tokenizer is damaged.
    """
    from tokenizers import Tokenizer

    with library_errors("the tokenizer cannot be loaded"):
        backend = Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True
    return backend


def encode_batch(backend, texts: Sequence[str], quiet: bool) -> list[list[int]]:
    """Ids of texts, encoded by the library's threads in one call.

    The call runs in a daemon thread, which is abandoned at the time limit: nothing can interrupt a regular expression.

    Args:
        quiet: print nothing on a panic; stderr goes through a file during the call.

    Raises:
        InputError: the library fails, panics, or takes too long.
    """
    texts, outcome = list(texts), []
    characters = sum(map(len, texts))
    seconds = SECONDS + SECONDS_PER_MILLION * characters / 1e6

    def run() -> None:
        try:
            with library_errors("the tokenizer fails on this text"):
                outcome.append((backend.encode_batch_fast(texts, add_special_tokens=False), None))
        except BaseException as error:  # raised in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    with _quiet_errors() if quiet else contextlib.nullcontext():
        thread.start()
        thread.join(seconds)
        if not outcome:
            what = f"the tokenizer was still busy with a text of {characters:,} characters after {seconds:.0f} s"
            raise InputError(what)
        encoded, error = outcome[0]
        if error is not None:
            raise error
    return [encoding.ids for encoding in encoded]


def decode(backend, ids: Sequence[int]) -> str:
    """Text of ids, none of them a control token.

    Raises:
        InputError: the library fails or panics.
    """
    with library_errors("the tokenizer cannot turn its tokens into text"):
        return backend.decode(list(ids), skip_special_tokens=False)


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """Hold back what is written to stderr; write it after the block, or drop it if the block raises."""
    try:
        sys.stderr.flush()
        stderr = os.dup(2)
    except (OSError, AttributeError, ValueError):  # no stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
            held.seek(0)
            os.write(stderr, held.read())
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)

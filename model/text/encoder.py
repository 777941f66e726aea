"""Text to ids: a text never yields a control token, and whatever a tokenizer does ends as ids or as one clear error.

Most libraries find `</s>` in a text and make it the token that ends a document. Skipping that search is not enough: a
Unigram, WordLevel or WordPiece model, or BPE with `ignore_merges`, finds the token in its own vocabulary. So here the
control tokens get secret names: the text `</s>` then is what SentencePiece makes of it, ordinary pieces.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence

from model.errors import InputError, first_line

MOST_GROWTH = 64  # characters that a normalizer or decoder may make of one; NFKC makes at most 18
SECONDS, SECONDS_PER_MILLION = 30, 120  # for encoding, and for each million characters; the slowest take one or two


class TextEncoder:
    """A tokenizer for texts, whose control tokens have secret names.

    Attributes:
        json: its tokenizer.json, without truncation, padding and post-processor; the ids are the original's.
        control: the control tokens, by their original names -> ids.

    Args:
        tokenizer_json: of the `tokenizers` library.
        names: of tokens that are control tokens besides those that the file calls special.

    Raises:
        InputError: the tokenizer is damaged.
    """

    def __init__(self, tokenizer_json: str, names: Collection[str] = ()) -> None:
        tokenizer = json.loads(tokenizer_json)
        # Private-use characters have no case, are no spaces, and nobody can guess these.
        self._secret = "".join(chr(0xE000 + secrets.randbelow(6400)) for _ in range(9))
        self._names = sorted(_control_tokens(tokenizer, names), key=len, reverse=True)
        self.control = _rename(tokenizer, {name: self._hidden(n) for n, name in enumerate(self._names)})
        self.json = json.dumps(tokenizer | {"truncation": None, "padding": None, "post_processor": None})
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or "(?!)")  # the longest first
        self._guards = re.compile(f"{self._secret}(\\d+)\ue000")
        self._quiet = can_panic(self.json)
        self._backend = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos. A control token that a text spells out stays text.

        Raises:
            InputError: the tokenizer fails, or takes too long.
        """
        return self._encode(texts, as_text=True)

    def guarded(self, value):
        """A copy of a message (texts within dicts and lists) in which control tokens are told from a template's own."""
        if isinstance(value, str):
            return self._spelled.sub(lambda found: f"{self._secret}{self._names.index(found[0])}\ue000", value)
        if isinstance(value, dict):
            return {key: self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list | tuple) else value

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a chat rendered from guarded messages: control tokens where the template wrote them, nowhere else.

        Raises:
            InputError: as `encode`.
        """
        text = self._spelled.sub(lambda found: self._hidden(self._names.index(found[0])), text)
        text = self._guards.sub(lambda found: self._names[int(found[1])], text)
        return self._encode([text], as_text=False)[0]

    def _hidden(self, number: int) -> str:
        return f"{self._secret}{number}\ue001"

    def _encode(self, texts: Sequence[str], as_text: bool) -> list[list[int]]:
        if self._backend is None:
            self._backend = load_backend(self.json)
        self._backend.encode_special_tokens = as_text  # also of those without a secret name: see _control_tokens
        return encode_batch(self._backend, texts, self._quiet)


def _control_tokens(tokenizer: dict, names: Collection[str]) -> set[str]:
    """Names of the control tokens in a tokenizer.json: those it calls special, the model's unknown token, and `names`.

    One that is a single character, as CLIP's padding `!`, is a character like others unless it is among `names`.
    """
    model = tokenizer["model"]
    unknown = model.get("unk_token")
    if isinstance(model.get("vocab"), list) and model.get("unk_id") is not None:  # Unigram's
        unknown = model["vocab"][model["unk_id"]][0]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]} | {unknown}
    return {name for name in special if name and len(name) > 1} | set(names)


def _rename(tokenizer: dict, names: dict[str, str]) -> dict[str, int]:
    """Rename tokens of a tokenizer.json, in place, as control tokens; ids by their old names."""
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
    if model.get("merges"):  # one that makes or takes a control token would make it out of text
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


def check_growth(normalizer, decoder) -> None:
    """See that no text becomes very much longer within a tokenizer.

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
    """Characters that a normalizer or decoder can make of one, roughly: those that it writes itself."""
    growth = 1
    for inner in step.get("normalizers") or step.get("decoders") or []:
        growth *= _growth(inner)
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String") or ""  # a regular expression can match nothing at all
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
    """Turn whatever the tokenizers library raises into an InputError; a panic of its Rust is no Exception.

    Raises:
        InputError: with `what` and the library's reason.
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
    """Whether a tokenizer has regular expressions, over which the library can panic, and prints pages then."""
    return '"Regex":' in tokenizer_json


def load_backend(tokenizer_json: str):
    """A tokenizer of the library, for texts: what they spell is no special token.

    Raises:
        InputError: it is damaged.
    """
    from tokenizers import Tokenizer

    with library_errors("the tokenizer cannot be loaded"):
        backend = Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True
    return backend


def encode_batch(backend, texts: Sequence[str], quiet: bool) -> list[list[int]]:
    """Ids of texts, encoded by the library's threads in one call.

    That call has a thread around it, which is left behind if it takes too long: nothing can interrupt a regular
    expression.

    Args:
        quiet: nothing is printed on a panic; until the call is over, stderr goes through a file.

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


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """Hold back what is written to stderr: if the block raises, the exception says it all, else it is written after."""
    try:
        sys.stderr.flush()
        stderr = os.dup(2)
    except (OSError, AttributeError, ValueError):  # there is none
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

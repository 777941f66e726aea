"""OpenAI's shapes of what is answered, of whole answers and of the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from model.generation.decoding import Event
from model.serving.model_loop import Writing
from model.serving.requests import Defaults, Request
from model.text.detokenize import new_detokenizer

FINISH_REASONS = {"eos": "stop", "stop_string": "stop", "repeats": "stop", "length": "length", "context": "length"}
UNLIKELY = -9999.0  # in place of minus infinity, which JSON lacks
Likely = list[tuple[int, float]] | None


class Token(NamedTuple):
    """A token that is told with its log-probability."""

    id: int
    logprob: float | None  # None: the first of a prompt
    likely: Likely


def to_json(value) -> bytes:
    """Without NaN; half a surrogate pair, which a request may hold, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def as_event(value) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Answer:
    """One request's answer: what has been told of it, and its shapes.

    Args:
        model: the id that it names.
        fingerprint: changes with the weights.
    """

    def __init__(self, request: Request, writing: Writing, tokenizer, model: str, fingerprint: str) -> None:
        self.request, self.writing, self._model, self._fingerprint = request, writing, model, fingerprint
        self._tokenizer = tokenizer
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        self.id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self.new_tokens = [0] * len(writing.prompts)
        # With `echo` the prompt's tokens are told too.
        self._detokenizers = [new_detokenizer(tokenizer, () if request.echo else ids) for ids in writing.prompts]
        self._characters = [0] * len(writing.prompts)  # told so far, for text_offset
        self.first: float | None = None
        self.last = time.monotonic()

    def note(self, index: int, event: Event, at: float) -> Token | None:
        """Count an event of that time -> its token, None for an end without one."""
        self.last = at
        if self.first is None:
            self.first = self.last
        if event.token is None:
            # Whoever scores a text with one new token after it, as lm_eval does, counts on it whatever it is.
            is_told = self.request.echo and self.request.logprobs and event.eos is not None
            return Token(event.eos, event.logprob, event.likely) if is_told else None
        self.new_tokens[index] += 1
        return Token(event.token, event.logprob, event.likely)

    # ------------------------------------------------------------------------------------------------ whole answers

    def whole(self, choices: Sequence[dict]) -> dict:
        """The answer to a request without `stream`."""
        name = "chat.completion" if self.request.is_chat else "text_completion"
        return {**self._head(name), "choices": list(choices), **self._sums()}

    def choice(self, index: int, text: str, tokens: Sequence[Token], end: str) -> dict:
        """One whole text."""
        choice = {"index": index, "finish_reason": FINISH_REASONS[end], "logprobs": self.logprobs(index, tokens)}
        if self.request.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice | self._ids(index, tokens, first=True)

    # ----------------------------------------------------------------------------------------------------- streams

    def begin(self, index: int) -> dict | None:
        """The chunk before a text's first: a chat's role."""
        if not self.request.is_chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, **self._unfinished()})

    def piece(self, index: int, text: str, tokens: Sequence[Token], first: bool) -> dict:
        """A chunk with some text."""
        choice = {"index": index, **self._unfinished(), "logprobs": self.logprobs(index, tokens)}
        choice |= {"delta": {"content": text}} if self.request.is_chat else {"text": text}
        return self._chunk(choice | self._ids(index, tokens, first))

    def finish(self, index: int, end: str) -> dict:
        """A text's last chunk."""
        choice = {"index": index, "finish_reason": FINISH_REASONS[end], "logprobs": None}
        return self._chunk(choice | ({"delta": {}} if self.request.is_chat else {"text": ""}))

    def last_chunk(self) -> dict:
        """The chunk with the usage, after all texts."""
        return {**self._chunk(None), **self._sums()}

    # ------------------------------------------------------------------------------------------------------- parts

    def _head(self, name: str) -> dict:
        return {
            "id": self.id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(self, choice: dict | None) -> dict:
        name = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        chunk = {**self._head(name), "choices": [] if choice is None else [choice]}
        return chunk | ({"usage": None} if self.request.include_usage else {})

    @staticmethod
    def _unfinished() -> dict:
        return {"finish_reason": None, "logprobs": None}

    def _ids(self, index: int, tokens: Sequence[Token], first: bool) -> dict:
        if not self.request.token_ids:
            return {}
        prompt = {"prompt_token_ids": list(self.writing.prompts[index])} if first else {}
        return {"token_ids": [token.id for token in tokens], **prompt}

    def _sums(self) -> dict:
        left_out = {"left_out_messages": self.request.left_out} if self.request.left_out else {}
        return {"usage": self.usage(), "timings": self.timings(), **left_out}

    def usage(self) -> dict:
        """Tokens read and written; a prompt with several texts counts once."""
        read, written = sum(map(len, self.request.prompts)), sum(self.new_tokens)
        pairs = list(zip(self.writing.prompts, self.writing.cached, strict=True))
        cached = sum(dict(reversed(pairs)).values())  # of each prompt's first text, which was read
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def timings(self) -> dict:
        """As llama-server tells them."""
        began = self.writing.began or self.last
        first = self.first or self.last
        written, seconds = sum(self.new_tokens), self.last - first
        later = max(0, written - len(self.new_tokens))  # each text's first comes with its prompt
        return {
            "prompt_n": sum(map(len, self.request.prompts)),
            "cache_n": self.usage()["prompt_tokens_details"]["cached_tokens"],
            "prompt_ms": round(1000 * (first - began), 3),
            "predicted_n": written,
            "predicted_ms": round(1000 * seconds, 3),
            "predicted_per_second": round(later / seconds, 2) if seconds > 0 else 0.0,
            "queue_ms": round(1000 * (began - self.writing.submitted), 3),
        }

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict | None:
        """Some tokens' log-probabilities; None: not asked for."""
        if not self.request.logprobs or not tokens:
            return None
        detokenizer = self._detokenizers[index]
        content, offsets = [], []
        for token in tokens:
            # What it adds, and what the others would have added in its place.
            likely = [self._told(detokenizer.content(other), other, value) for other, value in token.likely or ()]
            content.append(self._told(detokenizer.content(token.id), token.id, token.logprob))
            content[-1]["top_logprobs"] = likely
            offsets.append(self._characters[index])
            self._characters[index] += len(detokenizer.push(token.id))
        if self.request.is_chat:
            return {"content": content, "refusal": None}
        tops = [
            None
            if token["logprob"] is None
            else {_name(one): one["logprob"] for one in [*token["top_logprobs"], token]}
            for token in content
        ]
        return {
            "tokens": [_name(token) for token in content],
            "token_logprobs": [token["logprob"] for token in content],
            "top_logprobs": tops if self.request.likely else None,
            "text_offset": offsets,
            "content": content,  # as in a chat: with ids and bytes
        }

    def _told(self, content: bytes, index: int, logprob: float | None) -> dict:
        if not content:  # a control token
            content = (self._tokenizer.backend_tokenizer.id_to_token(index) or "").encode("utf-8", "replace")
        told = None if logprob is None else max(logprob, UNLIKELY)
        return {"token": content.decode("utf-8", "replace"), "id": index, "logprob": told, "bytes": list(content)}


def _name(token: dict) -> str:
    """A token's text; bytes that are no whole character are spelled as OpenAI's completions did."""
    content = bytes(token["bytes"])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def model_entry(name: str, created: int, context: int, is_chat: bool, defaults: Defaults) -> dict:
    """A model in /v1/models; of our own, what the page shows: what a request gets that does not ask otherwise."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "mateconv"}
    names = ("top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    config = defaults.config
    sampling = {name: getattr(config, name) for name in names}
    sampling |= {"temperature": 0 if config.greedy else config.temperature, "stop": list(config.stop_strings)}
    if defaults.max_tokens is not None:
        sampling["max_tokens"] = defaults.max_tokens
    return {**entry, "max_model_len": context, "chat": is_chat, "sampling": sampling}


def metrics(values: Iterable[tuple[str, str, str, float]]) -> str:
    """Prometheus' text of (name, kind, help, value)."""
    lines = []
    for name, kind, help, value in values:
        lines += [f"# HELP mateconv_{name} {help}", f"# TYPE mateconv_{name} {kind}", f"mateconv_{name} {value:.15g}"]
    return "\n".join(lines) + "\n"

"""What a request's JSON asks for, checked: OpenAI's parameters, and a few of our own."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from model.errors import InputError, shown
from model.generation.generation_config import GenerationConfig
from model.options import is_number, is_whole
from model.text.chat_template import valid_text
from model.text.prompts import Message, PromptEncoder, TooLong
from model.text.tokenization import encode_texts

MOST_TEXTS = 64  # of one request: prompts times n
MOST_N = 16
MOST_MESSAGES = 500
MOST_LIKELY = 20  # tokens beside the chosen one
MOST_STOPS = 4
COMPLETION_TOKENS = 16  # of /v1/completions, where max_tokens is not given
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Would give another result than was asked for, and are refused; what is unknown is ignored, as clients send a lot.
UNSUPPORTED = ("tools", "functions", "audio", "suffix", "best_of", "prediction", "web_search_options", "grammar")


class ApiError(Exception):
    """An answer with an error's status, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def body(self) -> dict:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Request:
    """A checked request: what to write, and what to tell of it."""

    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    config: GenerationConfig
    n: int = 1  # texts for each prompt
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: bool = False
    likely: int = 0  # tokens beside the chosen one
    token_ids: bool = False  # tell them too
    writes: bool = True  # False: only reads the prompt (max_tokens 0)
    left_out: int = 0  # messages of a chat, the oldest, that its context has no room for


def parse_json(body: bytes) -> dict:
    """A request's body.

    Raises:
        ApiError: it is not JSON in UTF-8, holds NaN, or is no object.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON number")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {type(found).__name__}, expected a JSON object")
    return found


class _Fields:
    """A body's fields; null is the same as absent."""

    def __init__(self, body: Mapping) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._body

    def get(self, name: str, default=None):
        return self._body.get(name, default)

    def number(self, name: str, default, least: float, most: float, above: bool = False):
        """A number from `least` (or above it) to `most`."""
        value = self.get(name, default)
        if name not in self:
            return default
        if not is_number(value) or not least <= value <= most or (above and value == least):
            limits = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            raise ApiError(400, f"{name}: {shown(value)} found, a number {limits} expected", name)
        return float(value)

    def whole(self, name: str, default, least: int, most: int):
        """A whole number from `least` to `most`."""
        if name not in self:
            return default
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_whole(value) or not least <= value <= most:
            raise ApiError(400, f"{name}: {shown(value)} found, a whole number from {least} to {most} expected", name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name}: {shown(value)} found, true or false expected", name)
        return value


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not ask otherwise."""

    config: GenerationConfig = field(default_factory=GenerationConfig)
    max_tokens: int | None = None  # None: nobody said; a chat may fill the context


def chat_request(body: Mapping, prompts: PromptEncoder, defaults: Defaults) -> Request:
    """A request to /v1/chat/completions.

    Raises:
        ApiError: naming the parameter.
    """
    fields = _Fields(body)
    _refuse_unsupported(fields)
    ids, left_out = _chat_ids(fields, prompts)
    logprobs = fields.flag("logprobs")
    likely = fields.whole("top_logprobs", 0, 0, MOST_LIKELY)
    if likely and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    most = min(fields.whole(name, defaults.max_tokens or prompts.context, 1, 10**9), prompts.context)
    request = _request(fields, True, (ids,), most, logprobs, likely, prompts, defaults)
    return dataclasses.replace(request, left_out=left_out)


def completion_request(body: Mapping, prompts: PromptEncoder, defaults: Defaults) -> Request:
    """A request to /v1/completions.

    Raises:
        ApiError: naming the parameter.
    """
    fields = _Fields(body)
    _refuse_unsupported(fields)
    if isinstance(fields.get("logprobs"), bool):  # as of a chat
        logprobs, likely = fields.flag("logprobs"), 0
    else:
        logprobs, likely = "logprobs" in fields, fields.whole("logprobs", 0, 0, MOST_LIKELY)
    most = fields.whole("max_tokens", defaults.max_tokens or COMPLETION_TOKENS, 0, 10**9)
    ids = _completion_ids(fields, prompts)
    return _request(fields, False, ids, min(most, prompts.context), logprobs, likely, prompts, defaults)


def _request(
    fields: _Fields,
    is_chat: bool,
    ids: tuple[tuple[int, ...], ...],
    most: int,
    logprobs: bool,
    likely: int,
    prompts: PromptEncoder,
    defaults: Defaults,
) -> Request:
    n = fields.whole("n", 1, 1, MOST_N)
    if n * len(ids) > MOST_TEXTS:
        raise ApiError(400, f"{len(ids)} prompts times n {n} are more than {MOST_TEXTS} texts", "n")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, f"stream_options: {shown(options)} found, an object expected", "stream_options")
    return Request(
        is_chat=is_chat,
        prompts=ids,
        config=_config(fields, max(1, most), logprobs, likely, defaults.config),
        n=n,
        stream=fields.flag("stream"),
        include_usage=_Fields(options).flag("include_usage"),
        echo=fields.flag("echo") and not is_chat,
        logprobs=logprobs,
        likely=likely,
        token_ids=fields.flag("return_token_ids"),
        writes=most > 0,
    )


def _config(fields: _Fields, most: int, logprobs: bool, likely: int, defaults: GenerationConfig) -> GenerationConfig:
    temperature = fields.number("temperature", defaults.temperature, 0, 2)
    seed = fields.whole("seed", defaults.seed, -(2**63), 2**63 - 1)
    try:
        return dataclasses.replace(
            defaults,
            do_sample=defaults.do_sample or "temperature" in fields,
            temperature=temperature,
            top_p=fields.number("top_p", defaults.top_p, 0, 1, above=True),
            top_k=fields.whole("top_k", defaults.top_k, 0, 10**9),
            min_p=fields.number("min_p", defaults.min_p, 0, 1),
            max_new_tokens=most,
            min_new_tokens=min(defaults.min_new_tokens, most),
            repetition_penalty=fields.number("repetition_penalty", defaults.repetition_penalty, 0, 10, above=True),
            presence_penalty=fields.number("presence_penalty", defaults.presence_penalty, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", defaults.frequency_penalty, -2, 2),
            stop_strings=_stop(fields, defaults),
            logit_bias=_logit_bias(fields) or defaults.logit_bias,
            logprobs=logprobs,
            top_logprobs=likely,
            seed=None if seed is None else seed % 2**63,
        )
    except InputError as error:
        raise ApiError(400, str(error)) from None


def _refuse_unsupported(fields: _Fields) -> None:
    for name in UNSUPPORTED:
        if fields.get(name) and not (name == "best_of" and fields.get(name) == 1):
            raise ApiError(400, f"{name} is not supported", name)
    form = fields.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type", "text") != "text"):
        raise ApiError(400, 'response_format: only {"type": "text"} is supported', "response_format")
    if fields.get("modalities", ["text"]) != ["text"]:
        raise ApiError(400, 'modalities: only ["text"] is supported', "modalities")


def _stop(fields: _Fields, defaults: GenerationConfig) -> tuple[str, ...]:
    if "stop" not in fields:
        return tuple(defaults.stop_strings)
    value = fields.get("stop")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or len(texts) > MOST_STOPS or not all(_is_text(text) for text in texts):
        raise ApiError(400, f"stop: {shown(value)} found, a text or up to {MOST_STOPS} of them expected", "stop")
    return tuple(texts)


def _is_text(value) -> bool:
    try:
        return bool(valid_text("stop", value))
    except InputError:
        return False


def _logit_bias(fields: _Fields) -> dict[int, float]:
    value = fields.get("logit_bias", {})
    expected = 'an object such as {"42": -100}, ids and numbers from -100 to 100, expected'
    if not isinstance(value, dict):
        raise ApiError(400, f"logit_bias: {shown(value)} found, {expected}", "logit_bias")
    biases = {}
    for index, bias in value.items():
        fits = is_number(bias) and -100 <= bias <= 100
        if not (index.isascii() and index.isdigit() and len(index) < 10 and fits):
            raise ApiError(400, f"logit_bias: {shown(index)}: {shown(bias)} found, {expected}", "logit_bias")
        biases[int(index)] = float(bias)
    return biases


def _chat_ids(fields: _Fields, prompts: PromptEncoder) -> tuple[tuple[int, ...], int]:
    """The prompt of a chat's next answer, and how many of the messages it leaves out."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, f"messages: {shown(messages)} found, a list of messages expected", "messages")
    truncation = fields.get("truncation", "disabled")
    if truncation not in ("auto", "disabled"):
        raise ApiError(400, f"truncation: {shown(truncation)} found, auto or disabled expected", "truncation")
    told = len(messages)
    if told > MOST_MESSAGES and truncation == "auto":
        messages = _newest(messages)
    if len(messages) > MOST_MESSAGES:
        raise ApiError(400, f"messages: {told} found, at most {MOST_MESSAGES} expected", "messages")
    history = [_message(n, message) for n, message in enumerate(messages)]
    begun: list[int] = []
    name = "continue_final_message"
    if fields.flag(name):
        if history[-1]["role"] != "assistant" or len(history) < 2:
            raise ApiError(400, f"{name}: the last message must be the assistant's, after another", name)
        begun = encode_texts(prompts.tokenizer, [history.pop()["content"]])[0]
        told -= 1
    try:
        if truncation == "auto":  # the oldest turns are left out
            history = prompts.fit_history(history, prompts.context // 4 + len(begun))
        ids = prompts.fitting("chat", [*prompts.encode_chat(history), *begun])
    except InputError as error:
        raise _unusable(error, "messages") from None
    return tuple(ids), told - len(history)


def _newest(messages: list) -> list:
    """A system message at the beginning, and of the others the newest that may be, beginning with a user's."""
    is_system = isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer")
    head = messages[:1] if is_system else []
    tail = messages[len(messages) - MOST_MESSAGES + len(head) :]
    while tail and isinstance(tail[0], dict) and tail[0].get("role") == "assistant":
        tail = tail[1:]
    return [*head, *tail]


def _message(number: int, message) -> Message:
    """A message with its content as one text."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where}: {shown(message)} found, an object with role and content expected", where)
    if message["role"] not in ROLES:
        raise ApiError(400, f"{where}.role: {shown(message['role'])} found, one of {', '.join(ROLES)} expected", where)
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ApiError(400, f"{where}.content: only parts of type text are supported", where)
        if not all(isinstance(part.get("text"), str) for part in content):
            raise ApiError(400, f"{where}.content: a part's text is missing or no text", where)
        content = "".join(part["text"] for part in content)
    try:
        return {"role": ROLES[message["role"]], "content": valid_text(f"{where}.content", content)}
    except InputError as error:
        raise ApiError(400, str(error), where) from None


def _completion_ids(fields: _Fields, prompts: PromptEncoder) -> tuple[tuple[int, ...], ...]:
    """The prompts of a completion: a text, ids, or a list of either."""
    prompt = fields.get("prompt", "")
    if isinstance(prompt, str) or _are_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, f"prompt: {shown(prompt)} found, a text, ids, or a list of either expected", "prompt")
    if len(prompt) > MOST_TEXTS:
        raise ApiError(400, f"prompt: {len(prompt)} prompts found, at most {MOST_TEXTS} expected", "prompt")
    found = []
    for one in prompt:
        if not isinstance(one, str) and not _are_ids(one):
            raise ApiError(400, f"prompt: {shown(one)} found, a text or ids expected", "prompt")
        try:
            ids = prompts.encode_prompt(one) if isinstance(one, str) else prompts.fitting("prompt", one)
        except InputError as error:
            raise _unusable(error, "prompt") from None
        found.append(tuple(ids))
    return tuple(found)


def _are_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_whole, value))


def _unusable(error: InputError, param: str) -> ApiError:
    return ApiError(400, str(error), param, "context_length_exceeded" if isinstance(error, TooLong) else None)

"""The HTTP application: OpenAI's paths and the page, in front of the model's loop."""

import asyncio
import hmac
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from model.command import print_fault
from model.errors import InputError
from model.serving.address import ANY_ADDRESS, LOOPBACK, is_address
from model.serving.answers import Answer, Token, as_event, metrics, model_entry, to_json
from model.serving.model_loop import Busy, Job, ModelLoop, Told, Writing, prompt_logprobs
from model.serving.requests import ApiError, Defaults, Request, chat_request, completion_request, parse_json
from model.text.detokenize import new_detokenizer

PREFLIGHT = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
CALLERS_HEADERS = "Authorization, Content-Type"  # and what a client of OpenAI's tells of itself: x-stainless-…
MOST_BYTES = 1 << 20  # of a request's body
DISCARDED = 16  # times as many bytes that are read of a body that is too large
BODY_SECONDS = 30.0  # that a client may take to send it
PING_SECONDS = 15.0  # after which a comment keeps a silent stream open, again and again
GONE = 499  # nginx's status for a client that went away; nobody reads it
PAGE = Path(__file__).with_name("page.html")
SECURITY = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


@dataclass(frozen=True)
class Limits:
    """Who may call the server."""

    # Of the Host header, in lower case, without brackets; with "*" any name, with ANY_ADDRESS any address.
    hosts: tuple[str, ...] = LOOPBACK
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # other sites' pages that may call it
    any_model: bool = False  # a request may name any model

    def lets_in(self, host: str) -> bool:
        """Whether the server may be called by this name or address."""
        return "*" in self.hosts or host in self.hosts or (ANY_ADDRESS in self.hosts and is_address(host))


@dataclass
class Server:
    """What the paths' functions share."""

    loop: ModelLoop
    model: str  # its id
    fingerprint: str
    defaults: Defaults
    is_chat: bool
    limits: Limits
    draining: bool = False
    bodies: set[asyncio.Future] = field(default_factory=set)  # of requests, while they come
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))
    started: int = field(default_factory=lambda: int(time.time()))
    statuses: dict[int, int] = field(default_factory=dict)  # how often each was answered

    @property
    def prompts(self):
        return self.loop.generator.prompts


def make_app(server: Server) -> "Guard":
    """The application, behind its guard."""

    async def models(request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [_entry(server)]})

    async def one_model(request: HttpRequest) -> Response:
        _check_model(server, request.path_params["name"])
        return _json(_entry(server))

    async def health(request: HttpRequest) -> Response:
        if server.loop.fault is not None:
            raise ApiError(503, "the model has failed")
        if server.draining:
            raise ApiError(503, "the server is shutting down", retry_after=5)
        return _json({"status": "ok"})

    async def told(request: HttpRequest) -> Response:
        return PlainTextResponse(metrics(_metrics(server)))

    async def page(request: HttpRequest) -> Response:
        return _page()

    async def chat(request: HttpRequest) -> Response:
        return await _answer(server, request, chat_request)

    async def complete(request: HttpRequest) -> Response:
        return await _answer(server, request, completion_request)

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", told),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _client_gone, Exception: _fault}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), server)


# ------------------------------------------------------------------------------------------------------------ the guard


class Guard:
    """Refuses requests before they reach the application: a foreign Host or Origin, a wrong key, another content type.

    A page of another site can send requests to this machine's servers. Its browser tells its origin, asks before it
    sends JSON, and sends the name that the user's address bar shows as Host, even where that name's address was changed
    to this machine's (DNS rebinding).
    """

    def __init__(self, app: Callable, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, headers = self.server.limits, {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        allowed = origin is not None and ("*" in limits.origins or origin in limits.origins)

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self.server.statuses[message["status"]] = self.server.statuses.get(message["status"], 0) + 1
                if allowed:
                    extra = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
                    message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            self._check(scope, headers, origin, allowed)
        except ApiError as error:
            return await _error(error)(scope, receive, counted)
        if scope["method"] == "OPTIONS" and allowed:
            named = headers.get(b"access-control-request-headers", "")
            names = named if re.fullmatch(r"[\w, -]{1,2000}", named, re.ASCII) else CALLERS_HEADERS
            preflight = PREFLIGHT | {"access-control-allow-headers": names}
            return await Response(status_code=204, headers=preflight)(scope, receive, counted)
        await self.app(scope, receive, counted)

    def _check(self, scope, headers: dict[bytes, str], origin: str | None, allowed: bool) -> None:
        limits, host = self.server.limits, headers.get(b"host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if not limits.lets_in(name.lower().strip("[]")):
            raise ApiError(403, f"the Host header names {name!r}; --allowed_host lets it in")
        own = {f"http://{host}", f"https://{host}"}
        if origin is not None and origin not in own and not allowed:
            raise ApiError(403, f"a page of {origin} may not call this server; --cors_origin lets it")
        if scope["method"] == "OPTIONS":
            return
        if limits.api_key is not None and scope["path"] not in ("/", "/health"):
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), limits.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401, "the API key is wrong or missing: Authorization: Bearer KEY", None, "invalid_api_key"
                )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the content type is {kind or 'missing'}, application/json expected")


# -------------------------------------------------------------------------------------------------------------- answers


async def _answer(server: Server, http: HttpRequest, read: Callable) -> Response:
    """Check a request, let it be written, and answer it whole or as a stream."""
    if server.draining or server.loop.fault is not None:
        raise ApiError(503, "the server is shutting down", retry_after=5)
    body = parse_json(await _body(server, http))
    if body.get("model") is not None:
        _check_model(server, body["model"])
    # Templates and long texts take milliseconds to seconds: other requests go on meanwhile. One thread, since
    # libraries' tokenizers do not promise to be safe for several.
    request = await asyncio.get_running_loop().run_in_executor(
        server.encoding, read, body, server.prompts, server.defaults
    )
    try:
        request.config.check_ids(server.loop.generator.model.config.vocab_size)
    except InputError as error:
        raise ApiError(400, str(error), "logit_bias") from None
    _check_ids(server, request)
    loop, news = asyncio.get_running_loop(), asyncio.Queue()

    def deliver(writing: Writing, told: list[Told]) -> None:
        try:
            loop.call_soon_threadsafe(news.put_nowait, told)
        except RuntimeError:  # the loop has ended
            writing.cancelled = True

    texts = [prompt for prompt in request.prompts for _ in range(request.n)]
    writing = Writing(texts, request.config, deliver, request.stream, n=request.n)
    answer = Answer(request, writing, server.loop.generator.tokenizer, server.model, server.fingerprint)
    try:
        echoes = await _unless_gone(http, _echoes(server, answer)) if request.echo else None
        if request.writes:
            server.loop.submit(writing)
    except Busy:
        wait = math.ceil(server.loop.seconds_per_text)
        raise ApiError(429, "the queue is full; try again later", None, "queue_full", wait) from None
    except (RuntimeError, TimeoutError) as error:
        raise ApiError(503, str(error)) from None
    if request.stream:
        stream = _stream(server, answer, news, echoes)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", "x-request-id": answer.id}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    return await _whole(server, http, answer, news, echoes)


def _check_ids(server: Server, request: Request) -> None:
    rows = server.loop.generator.model.config.vocab_size
    if any(not 0 <= index < rows for prompt in request.prompts for index in prompt):
        raise ApiError(400, f"prompt: an id outside 0 to {rows - 1} found", "prompt")


async def _whole(server: Server, http: HttpRequest, answer: Answer, news: asyncio.Queue, echoes) -> Response:
    """The answer in one piece; a client that goes away frees its rows.

    Raises:
        ClientDisconnect: it has.
    """
    count, unwritten = len(answer.writing.prompts), None if answer.request.writes else "length"
    pieces = {index: _Piece(*(echoes[index] if echoes else ("", [])), unwritten) for index in range(count)}

    def ended() -> bool:
        return all(piece.end for piece in pieces.values())

    async def gather() -> None:
        while not ended():
            _gather(answer, await news.get(), pieces)

    try:
        await _unless_gone(http, gather())
    finally:
        if not ended():
            server.loop.cancel(answer.writing)
    choices = [answer.choice(index, piece.text, piece.tokens, piece.end) for index, piece in pieces.items()]
    return _json(answer.whole(choices), {"x-request-id": answer.id})


async def _stream(server: Server, answer: Answer, news: asyncio.Queue, echoes) -> AsyncIterator[bytes]:
    """The answer in server-sent events; where it is closed early, its rows are freed."""
    count, done = len(answer.writing.prompts), 0 if answer.request.writes else len(answer.writing.prompts)
    begun, loop = [False] * count, asyncio.get_running_loop()

    def ping() -> None:  # cheaper than a time limit for each piece
        nonlocal timer
        news.put_nowait([])
        timer = loop.call_later(PING_SECONDS, ping)

    timer = loop.call_later(PING_SECONDS, ping)
    try:
        for index in range(count):
            if (chunk := answer.begin(index)) is not None:
                yield as_event(chunk)
            if echoes:
                begun[index] = True
                yield as_event(answer.piece(index, *echoes[index], first=True))
            if not answer.request.writes:
                yield as_event(answer.finish(index, "length"))
        while done < count:
            told = await news.get()
            if not told:
                yield b": ping\n\n"
                continue
            while not news.empty():  # what came meanwhile goes with it
                told = [*told, *news.get_nowait()]
            for chunk in _chunks(answer, told, begun):
                done += chunk["choices"][0]["finish_reason"] is not None
                yield as_event(chunk)
        if answer.request.include_usage:
            yield as_event(answer.last_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield as_event(error.body())
    finally:
        timer.cancel()
        if done < count:
            server.loop.cancel(answer.writing)


@dataclass
class _Piece:
    """What a text got since something was told of it."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: str | None = None


def _gather(answer: Answer, told: list[Told], pieces: dict[int, _Piece]) -> dict[int, _Piece]:
    """Add what happened to the pieces, by text.

    Raises:
        ApiError: a text could not be written.
    """
    for index, event, error, at in told:
        if error is not None:
            raise _as_api_error(error)
        piece = pieces.setdefault(index, _Piece())
        if (token := answer.note(index, event, at)) is not None:
            piece.tokens.append(token)
        piece.text += event.text
        piece.end = piece.end or event.end
    return pieces


def _chunks(answer: Answer, told: list[Told], begun: list[bool]) -> list[dict]:
    """The chunks for what is new: for each text one with all that it got, and its last."""
    chunks = []
    for index, piece in _gather(answer, told, {}).items():
        if piece.text or piece.tokens and (answer.request.logprobs or answer.request.token_ids):
            chunks.append(answer.piece(index, piece.text, piece.tokens, first=not begun[index]))
            begun[index] = True
        if piece.end is not None:
            chunks.append(answer.finish(index, piece.end))
    return chunks


async def _echoes(server: Server, answer: Answer) -> list[tuple[str, list[Token]]]:
    """Each text's prompt, and its tokens where log-probabilities are asked for."""
    request, loop = answer.request, asyncio.get_running_loop()
    found = []
    for prompt in request.prompts:
        logprobs = [(None, None)] * len(prompt)
        if request.logprobs:
            done = loop.create_future()

            def fail(error: Exception, done=done) -> None:
                loop.call_soon_threadsafe(_settle, done, done.set_exception, error)

            def job(prompt=prompt, done=done, fail=fail) -> None:
                if done.cancelled():  # its client has gone away
                    return
                try:
                    result = prompt_logprobs(server.loop.generator.engine(), prompt, request.likely)
                    loop.call_soon_threadsafe(_settle, done, done.set_result, result)
                except Exception as error:  # it is told
                    fail(error)

            server.loop.call(Job(job, fail))
            logprobs = [pair or (None, None) for pair in await done]
        tokens = [Token(index, *pair) for index, pair in zip(prompt, logprobs, strict=True)]
        detokenizer = new_detokenizer(server.loop.generator.tokenizer)
        text = "".join(map(detokenizer.push, prompt)) + ("" if request.writes else detokenizer.flush())
        found += [(text, list(tokens)) for _ in range(request.n)]
    return found


def _settle(future: asyncio.Future, settle: Callable, value) -> None:
    if not future.done():
        settle(value)


async def _unless_gone(http: HttpRequest, doing):
    """What a coroutine returns, which is cancelled once the client has gone away.

    Raises:
        ClientDisconnect: it has.
    """
    task, gone = asyncio.ensure_future(doing), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(http: HttpRequest) -> None:
    """Return once the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _body(server: Server, http: HttpRequest) -> bytes:
    """The request's body.

    Raises:
        ApiError: it is too large, comes too slowly, or the server shuts down.
    """
    body, size = bytearray(), 0

    async def read() -> None:
        nonlocal size
        async for chunk in http.stream():
            size += len(chunk)
            if size <= MOST_BYTES:
                body.extend(chunk)
            elif size > DISCARDED * MOST_BYTES:  # a client that still sends would not see an earlier answer
                break

    reading = asyncio.ensure_future(read())
    server.bodies.add(reading)
    try:
        await asyncio.wait_for(reading, BODY_SECONDS)
    except asyncio.CancelledError:
        if not server.draining:
            raise
        raise ApiError(503, "the server is shutting down", retry_after=5) from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the body is cut off") from None
    finally:
        server.bodies.discard(reading)
    if size > MOST_BYTES:
        raise ApiError(413, f"the body has more than {MOST_BYTES:,} bytes")
    return bytes(body)


# --------------------------------------------------------------------------------------------------------------- others


def _check_model(server: Server, name) -> None:
    if not isinstance(name, str):
        raise ApiError(400, "model: a name expected", "model")
    if name != server.model and not server.limits.any_model:
        raise ApiError(404, f"there is no model {name[:100]!r} here, only {server.model!r}", "model", "model_not_found")


def _entry(server: Server) -> dict:
    return model_entry(server.model, server.started, server.prompts.context, server.is_chat, server.defaults)


def _metrics(server: Server) -> list[tuple[str, str, str, float]]:
    loop, counts = server.loop, server.loop.counts
    rows = [
        ("requests_running", "gauge", "texts being written", loop.running),
        ("requests_waiting", "gauge", "texts that wait for a row", loop.waiting),
        ("prompt_tokens_total", "counter", "tokens of prompts", counts.prompt_tokens),
        ("cached_tokens_total", "counter", "of these, not read again", counts.cached_tokens),
        ("generated_tokens_total", "counter", "tokens written", counts.new_tokens),
        ("steps_total", "counter", "steps of the decode loop", counts.steps),
        ("step_seconds_total", "counter", "seconds that they took", counts.step_seconds),
        ("cancelled_total", "counter", "texts whose client went away, or that took too long", counts.cancelled),
    ]
    for status, count in sorted(server.statuses.items()):
        rows.append((f"responses_{status}_total", "counter", f"answers with status {status}", count))
    return rows


def _page() -> Response:
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
    headers = {"content-security-policy": policy, "cache-control": "no-store", **SECURITY}
    return Response(text, media_type="text/html", headers=headers)


def _json(value: dict, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), media_type="application/json", headers={**SECURITY, **(headers or {})})


def _error(error: ApiError) -> Response:
    headers = dict(SECURITY)
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return Response(to_json(error.body()), error.status, headers, "application/json")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):  # the settings leave no token to choose
        return ApiError(400, str(error))
    return ApiError(503 if isinstance(error, TimeoutError) else 500, str(error))


async def _api_error(request: HttpRequest, error: ApiError) -> Response:
    return _error(error)


async def _client_gone(request: HttpRequest, error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    paths = "/v1/models, /v1/chat/completions and /v1/completions"
    message = {
        404: f"there is no such path; there are {paths}",
        405: f"the method {request.method} is not for this path",
    }
    return _error(ApiError(error.status_code, message.get(error.status_code, str(error.detail))))


async def _fault(request: HttpRequest, error: Exception) -> Response:
    print_fault(error)
    return _error(ApiError(500, f"a fault of the server: {type(error).__name__}"))

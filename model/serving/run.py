"""Starts the server, and ends it: `python inference.py --serve`."""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import signal
import socket
import threading

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from model.command import say
from model.generation.checksum import checksum
from model.serving.address import BACKLOG, WILDCARDS, listen
from model.serving.app import Limits, Server, make_app
from model.serving.model_loop import ModelLoop
from model.serving.requests import Defaults

DRAIN_SECONDS = 30  # that running texts get after SIGTERM or Ctrl-C; a second signal ends them
TOLD_SECONDS = 2  # to tell those that did not end so, before their connections are cut
SHUT_DOWN = "the server has been shut down"
KEEP_ALIVE_SECONDS = 5
HEAD_SECONDS = 20.0  # that a client may take to send a request's head


def serve(
    generator,
    model: str,
    defaults: Defaults,
    listening: socket.socket,
    rows: int,
    queue: int,
    limits: Limits,
    reproducible: bool = False,
) -> int:
    """Serve until a signal ends it -> the exit code, 1 after a fault of the model.

    Args:
        generator: a TextGenerator.
        model: the id under which it is called.
        listening: has the address (`bound_socket`), a name more that it may be called by; it is closed at the end.
        rows: texts that are written together.
        queue: texts that may wait.
        reproducible: one text at a time, and nothing kept of earlier ones: the same seed gives the same text.

    Raises:
        InputError: another server has begun to listen there meanwhile.
    """

    def stop() -> None:
        web.should_exit = True

    loop = ModelLoop(generator, 1 if reproducible else rows, queue, on_fault=stop, reproducible=reproducible)
    host, port = listening.getsockname()[:2]
    listen(listening)
    fingerprint = f"fp_{hashlib.sha256(checksum(generator.model)).hexdigest()[:10]}"
    if host not in WILDCARDS:
        limits = dataclasses.replace(limits, hosts=(*limits.hosts, host))
    server = Server(loop, model, fingerprint, defaults, _chats(generator), limits)
    web = _Web(server)
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {model} at http://{shown}:{port} (OpenAI's API under /v1); Ctrl-C ends it")

    faults: list[Exception] = []

    def run_web() -> None:
        try:
            with listening:
                web.run([listening])
        except Exception as error:
            faults.append(error)
        finally:
            loop.close()

    serving = threading.Thread(target=run_web, name="web")
    with _Signals(web):
        serving.start()
        loop.run()
        serving.join()
    if loop.fault is not None:
        say(f"error: the model failed: {type(loop.fault).__name__}: {loop.fault}")
    for error in faults:
        say(f"error: the web server failed: {type(error).__name__}: {error}")
    return 1 if faults or loop.fault is not None else 0


def _chats(generator) -> bool:
    """The weights were tuned on chats; where they do not say, the tokenizer has a template."""
    if generator.chat_format is None:
        return bool(getattr(generator.tokenizer, "chat_template", None))
    return bool(generator.chat_format)


class _Protocol(AutoHTTPProtocol):
    """uvicorn's connection, which is closed where no whole head of a request comes in time: otherwise clients that send
    nothing, or never an end, would hold all file descriptors."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._watch()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watching.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.loop.time() - self._idle_since >= HEAD_SECONDS:
            self.transport.close()
        self._watching = self.loop.call_later(HEAD_SECONDS / 2, self._watch)


class _Web(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 after a signal, and tells /health that it is ending."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            make_app(server),
            http=_Protocol,
            log_level="critical",  # requests may hold what is nobody's business
            backlog=BACKLOG,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            lifespan="off",
            ws="none",
        )
        super().__init__(config)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # a client that goes away is no news
        self._server, self._is_hurried = server, False

    def capture_signals(self):
        return contextlib.nullcontext()  # they come to the main thread, which is another

    async def shutdown(self, sockets=None) -> None:
        """Let running texts end; those that do not are told so, before their connections are cut. Requests that have
        not come whole are refused."""
        for body in self._server.bodies:
            body.cancel()
        late = asyncio.get_running_loop().call_later(
            DRAIN_SECONDS - TOLD_SECONDS, self._server.loop.end_all, TimeoutError(SHUT_DOWN)
        )
        await super().shutdown(sockets)
        late.cancel()

    def handle_exit(self, number: int, frame) -> None:
        if self._is_hurried:
            self.force_exit = True
        elif self.should_exit:
            self._is_hurried = True
            self._server.loop.end_all(TimeoutError(SHUT_DOWN))
            cut = threading.Timer(TOLD_SECONDS, setattr, (self, "force_exit", True))
            cut.daemon = True
            cut.start()
        else:
            self._server.draining = self.should_exit = True
            if self._server.loop.running:
                say(f"ending: running texts get {DRAIN_SECONDS} s; once more ends them now")


class _Signals:
    """Signals go to the server while it runs."""

    def __init__(self, web: _Web) -> None:
        self._web = web
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in names):
                self._before[number] = signal.signal(number, self._web.handle_exit)

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""A server with a tiny model, as a process, and ways to call it."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from model.weights import Weights, save_weights
from tests import forks
from tests.conftest import random_model

pytest.importorskip("starlette", reason="the server needs starlette and uvicorn (requirements.txt)")
pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn (requirements.txt)")

STARTS = 60  # seconds that a server may take to begin


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory, tokenizer_folder):
    """Weights of two layers and 300 tokens, with a context of 128."""
    from model.LMConfig import LMConfig
    from model.text.tokenization import tokenizer_sha256

    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    sha256 = tokenizer_sha256(tokenizer_folder)
    save_weights(path, Weights(random_model(config).state_dict(), config, str(tokenizer_folder), sha256))
    return path


@contextlib.contextmanager
def running_server(weights_file, *flags, log=subprocess.DEVNULL):
    """`inference.py --serve` on a free port -> its process, host, port, and `call`."""
    command = [sys.executable, "inference.py", "--serve", "--port", "0", "--model_path", str(weights_file)]
    command += ["--compile", "false", *flags]  # else a compiler runs beside the tests that follow
    process = forks.Popen(command, cwd=forks.ROOT, stdout=log, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving .* at http://\S+?:(\d+) ", line):
                break
        else:
            raise AssertionError("".join(lines))
        port = int(found[1])
        wait_until(lambda: call_server(port, "GET", "/health")[0] == 200)
        yield SimpleNamespace(process=process, port=port, call=lambda *args, **more: call_server(port, *args, **more))
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by now
            process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait()
        process.stderr.close()


def wait_until(condition, seconds: float = STARTS) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def call_server(port: int, method: str, path: str, body=None, headers=None):
    """A request -> (status, headers, what the body is: JSON, or its text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, raw, given | (headers or {}))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    kind = answer.headers.get("content-type", "")
    return answer.status, answer.headers, json.loads(text) if kind.startswith("application/json") else text


def events_of(text: str) -> list:
    """The JSON of a stream's events; [DONE] as it is."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            content = block.removeprefix("data: ")
            found.append(content if content == "[DONE]" else json.loads(content))
        else:
            assert block == "" or block.startswith(":"), block
    return found


@pytest.fixture(scope="module")
def server(weights_file):
    with running_server(weights_file) as found:
        yield found


@pytest.fixture
def metric(server):
    """A number of /metrics by its name."""

    def read(name: str) -> float:
        text = server.call("GET", "/metrics")[2]
        return float(re.search(rf"^mateconv_{name} (\S+)$", text, re.M)[1])

    return read


@pytest.fixture
def connect(server):
    """Open plain connections to the server."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))

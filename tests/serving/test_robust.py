"""Bad requests, clients that go away, full queues, signals: right answers, and nobody else is harmed."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from model.errors import InputError
from model.serving.address import bound_socket, checked_origins, names_of, read_key
from tests.serving.conftest import call_server, events_of, running_server, wait_until

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "你好"}]
LONG = {"prompt": "春", "max_tokens": 120, "temperature": 0, "logit_bias": {"2": -100}}  # never ends by itself


@contextlib.contextmanager
def served_here(weights_file, monkeypatch):
    """A server with two rows in a thread of this process -> its port, and uvicorn's server; it is ended."""
    from model.serving import run
    from model.serving.app import Limits
    from model.serving.requests import Defaults
    from optimized_inference import load_generator

    webs, lines, made = [], [], run._Web.__init__
    monkeypatch.setattr(run._Web, "__init__", lambda web, *given: (made(web, *given), webs.append(web))[0])
    monkeypatch.setattr(run, "say", lines.append)
    generator, listening = load_generator(weights_file, compile=False), bound_socket("127.0.0.1", 0, None)
    given = (generator, "tiny", Defaults(), listening, 2, 8, Limits())
    serving = threading.Thread(target=run.serve, args=given)
    serving.start()
    wait_until(lambda: lines)
    port = int(re.search(r":(\d+) ", lines[0])[1])
    wait_until(lambda: call_server(port, "GET", "/health")[0] == 200)
    yield port, webs[0]
    webs[0].should_exit = True
    serving.join(30)
    assert not serving.is_alive()


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("POST", CHAT, b"{", {}, 400),
        ("POST", CHAT, b"[]", {}, 400),
        ("POST", CHAT, b"\xff\xfe", {}, 400),
        ("POST", CHAT, b"", {}, 400),
        ("POST", CHAT, b'{"messages": [], "temperature": NaN}', {}, 400),
        ("POST", CHAT, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400),
        ("POST", CHAT, b'{"seed": ' + b"9" * 5_000 + b"}", {}, 400),
        ("POST", CHAT, b'{"temperature": 1e400}', {}, 400),
        ("POST", CHAT, b" " * (1 << 20) + b"{}", {}, 413),
        ("POST", CHAT, b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", CHAT, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", CHAT, b"{}", {"Host": "evil.example"}, 403),
        ("POST", CHAT, b"{}", {"Origin": "http://evil.example"}, 403),
        ("OPTIONS", CHAT, None, {"Origin": "http://evil.example"}, 403),
        ("GET", "/v1/models", None, {"Host": "evil.example:8000"}, 403),
        ("GET", CHAT, None, {}, 405),
        ("DELETE", "/v1/models", None, {}, 405),
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("POST", "/", b"{}", {}, 405),
    ],
)
def test_what_is_no_request_is_refused_in_openais_form(server, method, path, body, headers, status):
    found = server.call(method, path, body, headers)
    assert found[0] == status and found[2]["error"]["message"], found
    assert "access-control-allow-origin" not in found[1]


def test_hosts_of_this_machine_are_let_in(server):
    for host in (f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}", f"LOCALHOST:{server.port}"):
        assert server.call("GET", "/v1/models", None, {"Host": host})[0] == 200
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.call("POST", TEXT, {"prompt": "春", "max_tokens": 1}, own)[0] == 200


def test_a_key_and_other_sites(weights_file, tmp_path):
    (tmp_path / "key").write_text("sekret\n")
    flags = ["--api_key_file", str(tmp_path / "key"), "--cors_origin", "https://chat.example"]
    flags += ["--allowed_host", "box", "fd00::7"]
    with running_server(weights_file, *flags) as server:
        assert server.call("GET", "/health")[0] == server.call("GET", "/")[0] == 200
        for key in (None, "Bearer wrong", "Bearer ", "sekret1", "Bearer sekré"):
            status, _, found = server.call("GET", "/v1/models", None, {} if key is None else {"Authorization": key})
            assert status == 401 and found["error"]["code"] == "invalid_api_key"
            assert "sekret" not in json.dumps(found)
        own = {"Authorization": "bearer sekret"}
        assert server.call("GET", "/v1/models", None, own)[0] == 200
        own = {"Authorization": "Bearer sekret"}
        assert server.call("GET", "/v1/models", None, own)[0] == 200
        site = {"Origin": "https://chat.example"}
        status, headers, _ = server.call("OPTIONS", CHAT, None, site | {"Access-Control-Request-Method": "POST"})
        assert status == 204 and headers["access-control-allow-origin"] == "https://chat.example"
        assert "Authorization" in headers["access-control-allow-headers"]
        status, headers, _ = server.call("POST", TEXT, {"prompt": "春", "max_tokens": 1}, own | site)
        assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in headers
        for host in ("box:80", "[fd00::7]:80", "[fd00::7]"):
            assert server.call("GET", "/v1/models", None, own | {"Host": host})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, metric, stream):
    before = metric("cancelled_total")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(
        "POST", TEXT, json.dumps({**LONG, "n": 16, "stream": stream}), {"Content-Type": "application/json"}
    )
    wait_until(lambda: metric("requests_running") >= 1 or metric("cancelled_total") > before)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: metric("requests_running") == metric("requests_waiting") == 0, 10)


def test_a_full_queue_says_when_to_come_again(weights_file):
    with running_server(weights_file, "--rows", "1", "--queue", "2") as server, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: server.call("POST", TEXT, LONG), range(12)))
        refused = [one for one in found if one[0] == 429]
        assert refused and all(int(one[1]["retry-after"]) >= 1 for one in refused)
        assert {one[0] for one in found} == {200, 429} and refused[0][2]["error"]["code"] == "queue_full"
        assert server.call("POST", TEXT, LONG)[0] == 200


def test_half_requests_and_idle_connections_harm_nobody(server, connect):
    idle = [connect() for _ in range(200)]
    half = connect()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    half.sendall(head + b"Content-Length: 100\r\n\r\n{")
    broken = connect()
    broken.sendall(b"nonsense\r\n\r\n")
    assert broken.recv(100).startswith(b"HTTP/1.1 400")
    assert server.call("POST", TEXT, {"prompt": "春", "max_tokens": 2})[0] == 200
    for connection in idle:
        connection.close()


def test_a_body_that_comes_too_slowly_is_given_up(weights_file, monkeypatch):
    """A server in this process, with half a second in place of half a minute."""
    monkeypatch.setattr("model.serving.app.BODY_SECONDS", 0.5)
    with served_here(weights_file, monkeypatch) as (port, _), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(30)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert call_server(port, "POST", TEXT, {"prompt": "春", "max_tokens": 2})[0] == 200
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_connection_whose_request_never_begins_is_closed(weights_file, monkeypatch):
    """Neither a silent one nor half a head stays; a request that takes longer than that does."""
    monkeypatch.setattr("model.serving.run.HEAD_SECONDS", 0.3)
    with served_here(weights_file, monkeypatch) as (port, _):
        with (
            socket.create_connection(("127.0.0.1", port)) as silent,
            socket.create_connection(("127.0.0.1", port)) as half,
        ):
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
            for connection in (silent, half):
                connection.settimeout(30)
                assert connection.recv(1000) == b""
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.settimeout(30)
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 2\r\n\r\n{")
            time.sleep(1)
            slow.sendall(b"}")
            assert slow.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_text_that_takes_too_long_ends_with_what_it_has(weights_file, monkeypatch):
    monkeypatch.setattr("model.serving.model_loop.WRITING_SECONDS", 0.0)
    with served_here(weights_file, monkeypatch) as (port, _):
        for stream in (False, True):
            body = {"prompt": "春", "max_tokens": 100, "logit_bias": {"2": -100}, "stream": stream}
            status, _, found = call_server(port, "POST", TEXT, body)
            last = events_of(found)[-2] if stream else found
            assert status == 200 and last["choices"][0]["finish_reason"] == "length"


def test_many_requests_leave_memory_as_it_is(server):
    process = psutil.Process(server.process.pid)

    def ask(n: int) -> int:
        return server.call("POST", TEXT, {"prompt": f"春{n}", "max_tokens": 2})[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(200))) == {200}
        before = process.memory_info().rss
        assert set(pool.map(ask, range(400))) == {200}
    assert process.memory_info().rss - before < 30e6


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
def test_sigterm_lets_running_texts_end(weights_file):
    with running_server(weights_file) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", TEXT, json.dumps({**LONG, "stream": True}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        first = answer.read1(100)
        server.process.send_signal(signal.SIGTERM)
        text = (first + answer.read()).decode()
        assert events_of(text)[-1] == "[DONE]" and '"finish_reason":"length"' in text
        assert server.process.wait(30) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
def test_texts_that_do_not_end_in_time_are_told_so(weights_file, monkeypatch):
    """A server in this process, with half a second in place of half a minute."""
    from model.serving.model_loop import ModelLoop

    monkeypatch.setattr("model.serving.run.DRAIN_SECONDS", 2.5)
    monkeypatch.setattr("model.serving.app.PING_SECONDS", 0.02)
    step = ModelLoop._step
    monkeypatch.setattr(ModelLoop, "_step", lambda self: (time.sleep(0.05), step(self)))
    with served_here(weights_file, monkeypatch) as (port, web), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(call_server, port, "POST", TEXT, {**LONG, "stream": n < 2}) for n in range(4)]
        wait_until(lambda: web._server.loop.running == 2)
        web.handle_exit(signal.SIGTERM, None)
        answers = [one.result() for one in asked]
    for status, _, found in answers:
        assert isinstance(found, dict) or "\n\n: ping\n\n" in found
        error = found["error"] if isinstance(found, dict) else events_of(found)[-1]["error"]
        assert status == (503 if isinstance(found, dict) else 200)
        assert error["message"] == "the server has been shut down"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
def test_a_second_signal_ends_running_texts_and_they_are_told_so(weights_file, monkeypatch):
    from model.serving.model_loop import ModelLoop

    step = ModelLoop._step
    monkeypatch.setattr(ModelLoop, "_step", lambda self: (time.sleep(0.5), step(self)))  # a minute for a text
    with served_here(weights_file, monkeypatch) as (port, web), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(call_server, port, "POST", TEXT, {**LONG, "stream": stream}) for stream in (False, True)]
        wait_until(lambda: web._server.loop.running == 2)
        web.handle_exit(signal.SIGINT, None)
        web.handle_exit(signal.SIGINT, None)
        (status, _, whole), (_, _, stream) = [one.result() for one in asked]
    assert status == 503 and whole["error"]["message"] == "the server has been shut down"
    assert events_of(stream)[-1]["error"]["message"] == "the server has been shut down"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
def test_a_request_that_has_not_come_whole_does_not_delay_the_end(weights_file, monkeypatch):
    with served_here(weights_file, monkeypatch) as (port, web):
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.settimeout(60)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            half.sendall(head + b"Content-Length: 100\r\n\r\n{")
            wait_until(lambda: web._server.bodies)
            web.handle_exit(signal.SIGTERM, None)
            assert half.recv(1000).startswith(b"HTTP/1.1 503")  # not 408, as after half a minute


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_server_that_was_killed_starts_again_at_its_port(weights_file):
    with running_server(weights_file) as server:
        socket.create_connection(("127.0.0.1", server.port)).close()
        server.process.kill()
        server.process.wait()
        with running_server(weights_file, "--port", str(server.port)) as again:
            assert again.port == server.port


def test_a_fault_of_the_model_ends_all_requests_and_the_process(weights_file, monkeypatch, capsys):
    """In this process: the thread's step fails once."""
    from model.serving import run
    from model.serving.app import Limits
    from model.serving.model_loop import ModelLoop
    from model.serving.requests import Defaults
    from optimized_inference import load_generator

    step = ModelLoop._step

    def failing(self) -> None:
        if self.counts.steps >= 3:
            raise MemoryError("no memory for this")
        step(self)

    monkeypatch.setattr(ModelLoop, "_step", failing)
    found, answers = [], []
    said = run.say
    monkeypatch.setattr(run, "say", lambda line: (said(line), found.append(line)))
    generator = load_generator(weights_file, compile=False)

    def serve() -> None:
        listening = bound_socket("127.0.0.1", 0, None)
        answers.append(run.serve(generator, "tiny", Defaults(), listening, 4, 8, Limits()))

    server = threading.Thread(target=serve)
    server.start()
    wait_until(lambda: found)
    port = int(re.search(r":(\d+) ", found[0])[1])
    wait_until(lambda: call_server(port, "GET", "/health")[0] == 200)
    with ThreadPoolExecutor(3) as pool:
        statuses = list(pool.map(lambda _: call_server(port, "POST", TEXT, LONG), range(3)))
    assert {status for status, _, _ in statuses} <= {500, 503} and statuses[0][2]["error"]["type"] == "server_error"
    server.join(30)
    assert answers == [1] and "MemoryError: no memory for this" in found[-1]


def test_other_work_of_the_model_is_counted_and_told_of_a_fault(weights_file):
    from model.serving.model_loop import Busy, Job, ModelLoop
    from optimized_inference import load_generator

    loop, told = ModelLoop(load_generator(weights_file, compile=False), 2, 3), []
    for _ in range(3):
        loop.call(Job(lambda: told.append("ran"), told.append))
    with pytest.raises(Busy):
        loop.call(Job(lambda: None))
    assert loop._has_work() and told == ["ran"]  # one between two steps
    loop._fail(MemoryError("gone"))
    assert [str(one) for one in told[1:]] == ["the model failed: gone"] * 2
    with pytest.raises(RuntimeError, match="the model has failed"):
        loop.call(Job(lambda: None))


def test_an_echo_whose_client_goes_away_is_not_read(server, metric):
    body = {"prompt": [[1] + [5] * 100] * 64, "max_tokens": 0, "echo": True, "logprobs": 20}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", TEXT, json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(0.1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: metric("responses_499_total") > 0, 10)


def test_a_request_of_more_texts_than_the_queue_holds_waits_for_an_empty_one(weights_file):
    from model.generation.generation_config import GenerationConfig
    from model.serving.model_loop import Busy, ModelLoop, Writing
    from optimized_inference import load_generator

    loop = ModelLoop(load_generator(weights_file, compile=False), 2, 3)
    for texts in (1, 1, 3):  # two rows are free, and three may wait
        loop.submit(Writing([[1]] * texts, GenerationConfig(), lambda *told: None))
    with pytest.raises(Busy):
        loop.submit(Writing([[1]], GenerationConfig(), lambda *told: None))
    loop = ModelLoop(loop.generator, 2, 3)
    loop.submit(Writing([[1]] * 60, GenerationConfig(), lambda *told: None))


@pytest.mark.skipif(os.name == "nt", reason="two sockets cannot have one port there")
def test_of_two_servers_that_begin_at_once_one_says_so(weights_file):
    from model.serving import run
    from model.serving.app import Limits
    from model.serving.requests import Defaults
    from optimized_inference import load_generator

    with bound_socket("127.0.0.1", 0, None) as first:
        port = first.getsockname()[1]
        with bound_socket("127.0.0.1", port, None) as second:
            first.listen()
            generator = load_generator(weights_file, compile=False)
            with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be listened at"):
                run.serve(generator, "tiny", Defaults(), second, 2, 8, Limits())


def test_large_numbers_are_told_whole():
    from model.serving.answers import metrics

    assert "mateconv_tokens_total 12345678" in metrics([("tokens_total", "counter", "", 12345678)]).splitlines()


def test_addresses_that_cannot_be_used_are_one_line(weights_file, tmp_path):
    from tests import forks

    def run(*flags):
        command = [sys.executable, "inference.py", "--serve", "--model_path", str(weights_file), *flags]
        done = forks.run(command, cwd=forks.ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120)
        return done.returncode, done.stderr.strip().splitlines()[-1]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = run("--port", str(taken.getsockname()[1]))
        assert code == 2 and line.startswith("error: 127.0.0.1:") and "--port" in line
    code, line = run("--host", "0.0.0.0", "--port", "0")
    assert code == 2 and "--api_key_file" in line
    unusable = [("--port", "70000"), ("--host", "192.0.2.1"), ("--rows", "0"), ("--queue", "-1")]
    for flags in [*unusable, ("--cors_origin", "chat.example"), ("--cors_origin", "https://chat.example/")]:
        code, line = run(*flags)
        assert code == 2 and line.startswith("error: "), line
    (tmp_path / "key").write_text("two words")
    code, line = run("--api_key_file", str(tmp_path / "key"))
    assert code == 2 and "holds no key" in line


@pytest.mark.parametrize(
    "host, allowed, has_key, calls, refuses",
    [
        ("127.0.0.1", [], False, ["localhost", "::1"], ["box", "192.0.2.1"]),
        ("MyPC", ["Box", "[fd00::7]"], False, ["mypc", "box", "fd00::7"], ["other"]),
        ("0.0.0.0", [], True, ["evil.example"], []),
        ("0.0.0.0", ["proxy"], False, ["192.0.2.1", "::1", "proxy", socket.gethostname().lower()], ["evil.example"]),
        ("::", ["*"], False, ["evil.example"], []),
    ],
)
def test_by_which_names_a_server_may_be_called(host, allowed, has_key, calls, refuses):
    from model.serving.app import Limits

    limits = Limits(names_of(host, allowed, has_key))
    assert all(map(limits.lets_in, calls)) and not any(map(limits.lets_in, refuses))


@pytest.mark.parametrize("name", ["box:8000", "http://box", "[::1]:80"])
def test_a_name_with_a_port_is_refused(name):
    with pytest.raises(InputError, match="^allowed_host: .* a name alone expected"):
        names_of("127.0.0.1", [name], has_key=False)


def test_origins_are_compared_in_lower_case():
    assert checked_origins(["https://Chat.Example", "*"]) == ("https://chat.example", "*")
    with pytest.raises(InputError, match="own port"):
        checked_origins(["https://chat.example:443"])


def test_a_key_of_the_environment_is_checked_as_that_of_a_file(monkeypatch):
    monkeypatch.setenv("MATECONV_API_KEY", "key\n")
    assert read_key(None) == "key"
    monkeypatch.setenv("MATECONV_API_KEY", "two words")
    with pytest.raises(InputError, match="^MATECONV_API_KEY holds no key"):
        read_key(None)


def test_no_prompt_is_logged(weights_file):
    with running_server(weights_file) as server:
        server.call("POST", TEXT, {"prompt": "绝密", "max_tokens": 2})
        server.call("POST", TEXT, {"prompt": "绝密", "temperature": "绝密"})
        time.sleep(0.2)
        server.process.terminate()
        assert "绝密" not in server.process.stderr.read()

"""Scripts of the project as processes that need not import torch: forked from one that has.

`run` and `Popen` take what `subprocess.run` and `subprocess.Popen` take. On Linux, a script that lies in the project's
folder, or torch's launcher, is forked from `fork_server.py`, and so is what it starts as torch's launcher or as our
supervisor; anything else, and everything elsewhere, is started.
What concerns the start itself (imports, encodings, signals during them) is tested with `subprocess`.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from model.children import SPIN

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("fork_server.py")
MODULES = ("torch.distributed.run", "torch.distributed.launch")
# Variables that a process reads as it begins, or a library as it is imported; but for those that are read later.
AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "GOMP_", "MKL_", "LD_", "TORCH", "CC")
READ_LATER = {*SPIN, "TORCHINDUCTOR_CACHE_DIR"}
WITHOUT_EFFECT = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}  # in a forked process
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
BEFORE = dict(os.environ)  # which programs that ran in this process may have added to
TimeoutExpired = subprocess.TimeoutExpired
KNOWN_OPTIONS = {"stdin", "stdout", "stderr", "start_new_session", "text", "encoding"}


class Server:
    """The process that others are forked from, started when the first one is wanted.

    Args:
        connection: to one that runs already.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._lock, self._ended = threading.Lock(), threading.Condition()
        self._codes: dict[int, int] = {}
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        if connection is not None:
            self._listen_to(connection)

    def fork(self, function: str, arguments: dict, streams: tuple[int, int, int] | None = None) -> int:
        """Fork a process that calls a function; returns its id.

        Args:
            function: "package.module:function"; ":function" is one of `fork_server.py`.
            arguments: of the function; JSON.
            streams: descriptors of its standard input, output and error; None: nothing, and the tests' own.
        """
        with self._lock:
            if self._socket is None:
                self._begin()
            nothing = os.open(os.devnull, os.O_RDWR)
            try:
                message = json.dumps({"function": function, "arguments": arguments}).encode()
                socket.send_fds(self._socket, [message], list(streams or (nothing, 1, 2)))
            finally:
                os.close(nothing)
            self._started.acquire()
            return self._new_pids.pop(0)

    def _begin(self) -> None:
        if sys.platform == "win32":
            raise RuntimeError("these tests fork processes and kill them, which Windows cannot")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {name: value for name, value in environment.items() if name not in NOT_INHERITED}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(SCRIPT), str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        theirs.close()
        self._listen_to(ours)
        atexit.register(self.end)

    def _listen_to(self, connection: socket.socket) -> None:
        self._socket = connection
        self._new_pids: list[int] = []
        self._started = threading.Semaphore(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while line := self._socket.recv(100):
            what, pid, *code = line.decode().split()
            if what == "started":
                with self._ended:
                    self._codes.pop(int(pid), None)  # of an earlier process of this id
                self._new_pids.append(int(pid))
                self._started.release()
            else:
                with self._ended:
                    self._codes[int(pid)] = int(code[0])
                    self._ended.notify_all()
        self._started.release()  # the server has died: whoever waits gets an IndexError in place of a process

    def code(self, pid: int, timeout: float | None = 0) -> int | None:
        """The exit code of a forked process, negative for a signal; None if it still runs after `timeout` seconds."""
        with self._ended:
            self._ended.wait_for(lambda: pid in self._codes, timeout)
            return self._codes.get(pid)

    def end(self) -> None:
        """End the server, and with it every process that it forked."""
        if self._process is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._process.wait()
            self._socket.close()
            self._process = self._socket = None


SERVER = Server()


_PORTS: set[int] = set()


def free_port() -> int:
    """A port of this machine that nothing listens on, and that was not given before."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port not in _PORTS:
            _PORTS.add(port)
            return port


# -------------------------------------------------------------------------------------------- as subprocess has them


def Popen(arguments: list, *, env: dict | None = None, **options):  # noqa: N802 (as subprocess has it)
    """`subprocess.Popen`, or a `Fork` that does the same."""
    arguments, environment = list(map(str, arguments)), dict(os.environ if env is None else env)
    if can_fork(arguments, environment, **options):
        return Fork(arguments[1:], environment, **options)
    return subprocess.Popen(arguments, env=environment, **options)


def run(arguments: list, *, capture_output=False, timeout=None, input=None, check=False, **options):  # noqa: A002
    """`subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(arguments, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def can_fork(arguments: list[str], environment: dict[str, str], cwd=None, **options) -> bool:
    """Whether a child of the server does what this command does."""
    if sys.platform != "linux" or arguments[0] != sys.executable or options.keys() - KNOWN_OPTIONS:
        return False
    words = arguments[2:] if arguments[1] == "-u" else arguments[1:]
    if words[0] == "-m":
        known = words[1] in MODULES
    else:
        known = words[0] == "-c" or Path(cwd or ".", words[0]).resolve().parent == ROOT
    names = {name for name in {*BEFORE, *environment} if name.startswith(AT_START)} - READ_LATER
    return known and all(
        environment.get(name) == BEFORE.get(name)
        or (name in WITHOUT_EFFECT and environment.get(name) in (None, WITHOUT_EFFECT[name]))
        for name in names
    )


class Fork:
    """A forked process, with the part of `subprocess.Popen` that the tests use."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        *,
        cwd=None,
        stdin=None,
        stdout=None,
        stderr=None,
        start_new_session: bool = False,
        text: bool = False,
        encoding: str | None = None,
    ) -> None:
        self.returncode: int | None = None
        encoding = encoding or ("utf-8" if text else None)
        how = {"encoding": encoding} if encoding else {"buffering": -1}
        self._to_close: list[int] = []
        ours, theirs = [None, None, None], []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                theirs.append(read if number == 0 else write)
                self._to_close.append(theirs[-1])
                ours[number] = (
                    open(write, "w" if encoding else "wb", **how)
                    if number == 0
                    else open(read, "r" if encoding else "rb", **how)
                )
            elif stream == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
                self._to_close.append(theirs[-1])
            elif stream == subprocess.STDOUT:
                theirs.append(theirs[1])
            else:
                theirs.append(number if stream is None else stream if isinstance(stream, int) else stream.fileno())
        self.stdin, self.stdout, self.stderr = ours
        what = {
            "arguments": arguments,
            "folder": str(Path(cwd or ".").absolute()),
            "environment": environment,
            "session": start_new_session,
        }
        try:
            self.pid = SERVER.fork(":run_script", what, tuple(theirs))
        finally:
            for descriptor in self._to_close:
                os.close(descriptor)

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        self.returncode = SERVER.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = SERVER.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, input=None, timeout: float | None = None):  # noqa: A002
        results: list = [None, None]

        def read(number, stream):
            results[number] = stream.read()

        streams = [(number, stream) for number, stream in enumerate((self.stdout, self.stderr)) if stream is not None]
        readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams]
        for reader in readers:
            reader.start()
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                if input is not None:
                    self.stdin.write(input)
                self.stdin.close()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return tuple(results)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

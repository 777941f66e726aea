"""Nodes on one machine: Linux network namespaces, joined by a bridge, with links that can be cut or made slow.

with Network(2) as (first, second):
    first.start(["torchrun", ...], log)
    second.cut()

Each node has a host name, an address that all nodes know it by, and separate process numbers, so that it dies as a
whole. They share the file system. A namespace is named mateconv-node0, a link's end on the machine mateconv0: what an
earlier network left, killed with -9, is removed first. Only one network can be there at a time.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SYSTEM_FOLDERS = "/usr/sbin:/sbin"  # where `ip` and `tc` are, which a user's PATH may lack
BRIDGE = "mateconv"
# Begins as the node's first process: its name, and all nodes' addresses, before the command.
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class Node:
    """One node, whose processes a `Network` ends.

    Args:
        number: from 0 on.
        hosts: a file like /etc/hosts, of all nodes.
    """

    def __init__(self, number: int, hosts: Path) -> None:
        self.number, self.name = number, f"node{number}"
        self._hosts, self._link, self._namespace = hosts, f"{BRIDGE}{number}", f"{BRIDGE}-{self.name}"
        self._process: subprocess.Popen | None = None

    def create(self, bridge: str) -> None:
        """Make the namespace and its link to the bridge."""
        link, space = self._link, self._namespace
        system("ip", "netns", "add", space)
        system("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        system("ip", "link", "set", link, "master", bridge, "up")
        system("ip", "-n", space, "addr", "add", f"{address(self.number)}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            system("ip", "-n", space, "link", "set", name, "up")

    def remove(self) -> None:
        """Kill what runs there, and remove link and namespace; nothing where they do not exist."""
        self.kill()
        for command in (["link", "del", self._link], ["netns", "del", self._namespace]):
            subprocess.run([tool("ip"), *command], capture_output=True, check=False)

    def start(self, command: list, log: Path, environment: dict[str, str]) -> None:
        """Run a command there; what it says is appended to `log`."""
        enter = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER]
        words = [tool("ip"), "netns", "exec", self._namespace, *enter, self.name, self._hosts, *command]
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                list(map(str, words)), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    def code(self, timeout: float = 0) -> int | None:
        """What the command ended with; None: it still runs after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to every process of the node."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # its first process, and with that all others, die with it
            self._process.wait()

    def signal_ranks(self, number: int) -> None:
        """Send a signal to the node's ranks, not to their launcher."""
        for pid in descendants(self._process.pid):
            with contextlib.suppress(OSError):  # it has ended
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, number)

    def cut(self) -> None:
        """Let the link fall silent: nothing arrives, and nobody is told."""
        system("ip", "link", "set", self._link, "down")

    def join(self) -> None:
        """Connect the link again."""
        system("ip", "link", "set", self._link, "up")

    def throttle(self, rate: str | None) -> None:
        """Limit what the node receives, such as to "1mbit"; None: as fast as it can."""
        if rate is None:
            system("tc", "qdisc", "del", "dev", self._link, "root")
        else:
            shape = ["tbf", "rate", rate, "burst", "16kb", "latency", "1s"]
            system("tc", "qdisc", "replace", "dev", self._link, "root", *shape)


class Network:
    """Nodes that reach each other; removed with all that runs on them at the end of its `with` block."""

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mateconv-nodes-")
        hosts = Path(self._folder.name) / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address(number)} node{number}" for number in range(count))]
        hosts.write_text("\n".join(lines) + "\n")
        self.nodes = [Node(number, hosts) for number in range(count)]

    def __enter__(self) -> list[Node]:
        self._remove()
        try:
            system("ip", "link", "add", "name", BRIDGE, "type", "bridge")
            system("ip", "link", "set", BRIDGE, "up")
            for node in self.nodes:
                node.create(BRIDGE)
        except BaseException:
            self.__exit__()
            raise
        return self.nodes

    def __exit__(self, *error) -> None:
        self._remove()
        self._folder.cleanup()

    def _remove(self) -> None:
        for node in self.nodes:
            node.remove()
        subprocess.run([tool("ip"), "link", "del", BRIDGE], capture_output=True, check=False)


def descendants(pid: int) -> list[int]:
    """The processes that this one, and those that it started, have started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found + [below for child in found for below in descendants(child)]


def address(number: int) -> str:
    """A node's address."""
    return f"10.77.0.{number + 1}"


def tool(name: str) -> str:
    """The path of a system's program, or its mere name where it is missing."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}") or name


def system(name: str, *arguments: str) -> None:
    """Run a system's program.

    Raises:
        OSError: it failed, with what it said.
    """
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{name} {' '.join(arguments)}: {result.stderr.strip()}")


def why_not() -> str | None:
    """Why this machine can have no such nodes, in one line; None: it can."""
    if sys.platform != "linux" or not hasattr(os, "geteuid"):
        return f"{sys.platform} found, Linux expected: nodes are network namespaces"
    if os.geteuid() != 0:
        return "root expected: nodes are network namespaces, which only root can make; start it with sudo"
    missing = [name for name in ("ip", "tc", "unshare", "mount") if shutil.which(tool(name)) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    trial = subprocess.run([tool("unshare"), "--net", "true"], capture_output=True, text=True, check=False)
    return f"no network namespaces here: {trial.stderr.strip()}" if trial.returncode else None


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, through its `with` blocks."""

    def leave(number: int, frame) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)

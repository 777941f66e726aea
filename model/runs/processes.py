"""The processes that train together: how they meet, agree, and name a lost one."""

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from model import accelerator
from model.command import say
from model.errors import InputError, OneLineError, ProcessLost, first_line, shown
from model.runs.watchdog import FAREWELL_SECONDS, Watchdog

T = TypeVar("T")
SILENT_SECONDS = 20.0  # without a report, after which a process counts as gone


class Processes:
    """The processes that train together: one, or those that torchrun started.

    `all_sum` and the like use gloo on the CPU, in a separate group from the gradients', so that agreeing on a flag
    never waits for the GPU.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._control = None
        self._keys = None  # the store that all processes share
        self._turns = 0  # of main_first
        self._give_up: list[Callable[[str], None]] = []  # the last one counts
        self._watchdog = None

    @classmethod
    def alone(cls) -> "Processes":
        """A group of this process alone, whatever started it."""
        processes = cls()
        processes.rank, processes.local_rank, processes.world_size, processes.local_world_size = 0, 0, 1, 1
        return processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def by_torchrun(self) -> bool:
        """Whether torchrun started this process. It takes any exit code but 0 for a failure."""
        return "TORCHELASTIC_RUN_ID" in os.environ

    def start(self, device=None, timeout: float = 1800, give_up: Callable[[str], None] | None = None) -> None:
        """Join the other processes: by the device's backend for gradients, such as NCCL. Nothing to do for one process.

        Args:
            device: the torch device that this process computes on; None: none, only the control group is wanted.
            timeout: seconds to wait for each other.
            give_up: called in a thread when no process made progress for `timeout` seconds (see `beat`), with a
                sentence on the rank that the others wait for; must end this process. None: nobody watches. A later call
                replaces it.

        Raises:
            InputError: a machine of several has an address that the others cannot reach, or torchrun kept its store.
            ProcessLost: not all of them came in time, or they cannot connect to each other.
        """
        self._give_up += [] if give_up is None else [give_up]
        if self.world_size == 1 or self._control is not None:
            return
        import torch.distributed as dist

        patience = datetime.timedelta(seconds=timeout)
        # The watchdog, if there is one, decides first.
        group_timeout = datetime.timedelta(seconds=timeout if give_up is None else 4 * timeout + 60)
        try:
            self._keys = store = self._fresh_keys(self._store(patience))
            hosts = self._wait_for_all(store, patience)
            if give_up is not None:
                self._watchdog = self._watch(dist.PrefixStore("watch", store.clone()), hosts, timeout)
        except RuntimeError as error:  # all that torch raises for the network and the store
            reason = first_line(error)
            raise ProcessLost(f"not all of {self.world_size} processes came within {timeout:g} s ({reason})") from error
        try:
            group = {"store": dist.PrefixStore("group", store), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group(accelerator.backend(device), timeout=group_timeout, **group)
            self._control = dist.new_group(backend="gloo", timeout=group_timeout)
        except RuntimeError as error:
            message = f"no connection to the other processes ({first_line(error)})"
            if self._watchdog is not None:
                self._watchdog.announce(message)
            raise ProcessLost(message) from error

    def _watch(self, store, hosts: list[str], timeout: float) -> Watchdog:
        kept_by = None if self._store_of_launcher else 0
        ends = self._give_up  # its thread must not keep this object, and so the store, alive at exit
        told = say if self.is_main else None
        return Watchdog(store, self.rank, hosts, timeout, lambda message: ends[-1](message), kept_by, told)

    @property
    def _store_of_launcher(self) -> bool:
        """Whether torchrun hosts the store, not rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _store(self, patience: datetime.timedelta):
        """The store that all processes share. torch's own rendezvous waits for all and can't name the missing."""
        import torch.distributed as dist

        keeps_it = self.is_main and not self._store_of_launcher
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            options = {"wait_for_workers": False, "multi_tenant": True}
            options["use_libuv"] = os.environ.get("USE_LIBUV", "1") == "1"  # torch's switch, for Windows
            return dist.TCPStore(host, port, is_master=keeps_it, timeout=patience, **options)
        except RuntimeError as error:
            if keeps_it:
                raise
            keeper = "the launcher" if self._store_of_launcher else "rank 0"
            reason = f"{keeper} could not be reached at {host}:{port} within {patience.total_seconds():g} s"
            raise ProcessLost(f"{reason}; {self.world_size} processes were expected") from error

    def _fresh_keys(self, shared):
        """The part of the shared store in which this attempt's processes find no key of an earlier one: torchrun may
        keep its store when it restarts them.

        Raises:
            InputError: it did so on several machines, each of which counts its restarts separately.
        """
        import torch.distributed as dist

        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            return dist.PrefixStore(f"mateconv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
        if self._store_of_launcher and shared.add(f"mateconv/starts/{self.rank}", 1) > 1:
            raise InputError(
                "torchrun restarted the ranks with the store of the last attempt; on several nodes it makes a new one"
                " if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set on each: set it, and start again"
            )
        return dist.PrefixStore("mateconv/0", shared)

    def _wait_for_all(self, store, patience: datetime.timedelta) -> list[str]:
        """Wait until every process has reported, and name those that do not; returns each rank's host.

        Raises:
            InputError: there are several hosts, and one of them has an address of no use to the others.
            ProcessLost: a process did not come.
        """
        import torch.distributed as dist

        store.set(f"here/{self.rank}", f"{gloo_address()} {socket.gethostname()}")
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        try:
            store.wait(keys, patience)
        except dist.DistStoreError as error:
            missing = [self._with_machine(rank) for rank, key in enumerate(keys) if not store.check([key])]
            reason = f"rank {', '.join(missing)} did not come within {patience.total_seconds():g} s"
            raise ProcessLost(f"{reason}; {self.world_size} processes were expected") from error
        addresses, hosts = zip(*(store.get(key).decode().split(" ", 1) for key in keys), strict=True)
        if len(set(hosts)) > 1:
            for address, host in zip(addresses, hosts, strict=True):
                if address and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                    self._leave_store()
                    raise InputError(
                        f"{host}: its own name stands for {address}, which other nodes cannot reach; correct /etc/hosts"
                        " there, or name its network card on each node: GLOO_SOCKET_IFNAME=eth0"
                    )
        return list(hosts)

    def _with_machine(self, rank: int) -> str:
        """A rank that has not reported; with the number of its machine if there are several."""
        machines = -(-self.world_size // self.local_world_size)
        return f"{rank} (machine {rank // self.local_world_size} of 0 to {machines - 1})" if machines > 1 else str(rank)

    def close(self) -> None:
        """Leave the group. Where rank 0 hosts the store, it waits a moment for the others, whose watchdogs ask it."""
        failed = False
        if self._watchdog is not None:
            self._watchdog.stop()
            failed = self._watchdog.failed
            self._watchdog = None
        if self._control is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
            if not failed and not self._store_of_launcher:
                self._leave_store()
            self._control = self._keys = None

    def _leave_store(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, or another process does not leave
            self._keys.set(f"left/{self.rank}", "")
            if self.is_main:
                left = [f"left/{rank}" for rank in range(self.world_size)]
                self._keys.wait(left, datetime.timedelta(seconds=FAREWELL_SECONDS))

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Report progress to the watchdog, if there is one: what this process does next, and how many timeouts that
        may take."""
        if self._watchdog is not None:
            self._watchdog.beat(doing, patience)

    def arrive(self) -> None:
        """Report progress to the watchdog: from here this process waits for the others."""
        if self._watchdog is not None:
            self._watchdog.arrive()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time a step of training for the watchdog, which says whom slow ones wait for."""
        if self._watchdog is None:
            yield
            return
        times = self._watchdog.times
        times.begin()
        yield
        times.end()

    def announce(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, so that they can name the cause.

        They end too, and torchrun then sends this one SIGTERM, which must not change the exit code that says why.
        """
        if self._watchdog is not None and not isinstance(error, ProcessLost):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._watchdog.announce(str(error) or type(error).__name__)

    def lost(self, error: RuntimeError, exchanging: bool = False) -> ProcessLost | None:
        """Which process is gone, where that is why `error` was raised; None: this process failed by itself.

        gloo raises a plain RuntimeError for a broken connection, in the middle of a backward pass too. Its text
        decides nothing here: the watchdog knows whether another process has ended.

        Args:
            exchanging: the error came out of a collective of ours, which nothing else can fail.
        """
        import torch.distributed as dist

        if self._control is None:
            return None
        certain = exchanging or isinstance(error, dist.DistError)
        if self._watchdog is not None:
            reason = self._watchdog.whom_to_blame() if certain else self._watchdog.who_is_gone()
            return None if reason is None else ProcessLost(reason)
        if certain:
            return ProcessLost(f"another process ended or no longer answers ({first_line(error)})")
        return None

    def store_for_threads(self, name: str):
        """A separate connection to the store that all processes share, for threads; keys of other names are others."""
        import torch.distributed as dist

        return dist.PrefixStore(name, self._keys.clone())

    def lost_one(self) -> str | None:
        """A sentence on a process that failed or has not reported for SILENT_SECONDS; None: there is none. For threads,
        which ask now and then while they wait."""
        if self._watchdog is None:
            return None
        return self._watchdog.who_is_gone() if self._watchdog.failed else self._watchdog.who_is_silent(SILENT_SECONDS)

    def all_sum(self, values: list[float]) -> list[float]:
        """Add each number up over all processes, in float64."""
        if self._control is None:
            return values
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        with self._others_alive():
            dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def sum_on_device(self, numbers) -> None:
        """Add a tensor up over all processes, in place, by the gradients' group: on GPUs nobody waits for the sums."""
        if self._control is not None:
            import torch.distributed as dist

            with self._others_alive():
                dist.all_reduce(numbers)

    def gather_on_device(self, part, whole) -> Callable[[], None]:
        """Start to gather the ranks' parts, by the gradients' group; returns what waits for them. On GPUs only what the
        device is given later waits.

        Args:
            part: tensor [N], of the same length on every rank.
            whole: tensor [world_size * N], to hold all parts in the ranks' order.
        """
        import torch.distributed as dist

        # torch 2.14 renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._others_alive():
            work = gather(whole, part, async_op=True)

        def wait() -> None:
            with self._others_alive():
                work.wait()

        return wait

    def send_to_main(self, source: int, part, target) -> None:
        """Copy a tensor of one rank into one of rank 0, both on the CPU and contiguous. Every rank must call it.

        Args:
            source: the rank that sends.
            part: on that rank, what is sent.
            target: on rank 0, of the same shape and dtype.
        """
        import torch.distributed as dist

        with self._others_alive():
            if source == 0 and self.is_main:
                target.copy_(part)
            elif self.is_main:
                dist.recv(target, src=source, group=self._control)
            elif self.rank == source:
                dist.send(part, dst=0, group=self._control)

    def any(self, flag) -> bool:
        """Whether the flag is set on any rank."""
        return self.all_sum([float(flag)])[0] > 0

    def smallest(self, value: float) -> float:
        """The smallest of all processes' values."""
        return min(self.all_sum([float(value) if rank == self.rank else 0.0 for rank in range(self.world_size)]))

    def gather(self, value) -> list | None:
        """Every process's value in a list, on rank 0; None elsewhere."""
        if self._control is None:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size if self.is_main else None
        with self._others_alive():
            dist.gather_object(value, values, dst=0, group=self._control)
        return values

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank: the rule for all that one process alone could see otherwise, such as
        whether a file is there, which checkpoint is the newest, what is free.

        Raises:
            OneLineError: rank 0 raised it; every rank does then.
        """
        if self._control is None:
            return decide()
        import torch.distributed as dist

        sent: list = [None]
        if self.is_main:
            try:
                sent = [(decide(), None)]
            except OneLineError as error:
                sent = [(None, error)]
        with self._others_alive():
            dist.broadcast_object_list(sent, src=0, group=self._control)
        value, error = sent[0]
        if error is not None:
            raise error
        return value

    def check_same(self, what: str, value, remedy: str = "") -> None:
        """Check that a value is the same on every rank.

        Args:
            what: names the value in the error.
            remedy: what to do, appended to the error.

        Raises:
            InputError: it differs, on every rank; naming `what`, the first rank that differs and both values.
        """
        theirs = self.decided(lambda: value)
        if not self.any(value != theirs):
            return
        values = self.gather(value)

        def refuse() -> None:
            rank = next(rank for rank, other in enumerate(values) if other != theirs)
            found = f"rank {rank} has {shown(values[rank])}, rank 0 {shown(theirs)}"
            raise InputError(f"{what}: {found}; they must agree" + (f": {remedy}" if remedy else ""))

        self.decided(refuse)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self._control is not None:
            import torch.distributed as dist

            with self._others_alive():
                dist.barrier(group=self._control)

    @contextlib.contextmanager
    def _others_alive(self) -> Iterator[None]:
        self.arrive()
        try:
            yield
        except RuntimeError as error:  # gloo's for a connection that broke or a wait that took too long
            raise self.lost(error, exchanging=True) or error from error

    @contextlib.contextmanager
    def main_first(self, doing: str = "what rank 0 does first", timeouts: float = 1.0) -> Iterator[None]:
        """Rank 0 runs the block first, the others after it has finished.

        Args:
            doing, timeouts: as for `beat`.

        Raises:
            ProcessLost: rank 0 has failed.
        """
        self._turns += 1
        turn = f"turn/{self._turns}"
        self.beat(doing, timeouts)
        if self.is_main:
            self.arrive()  # as the others do below: ranks in the same place must have the same count
        if self._control is not None and not self.is_main:
            with self._others_alive():
                while not self._keys.check([turn]):  # a barrier would end with the group's timeout
                    if self._watchdog is not None and (said := self._watchdog.heard) is not None:
                        raise ProcessLost(said)
                    time.sleep(0.1)
        yield
        if self._control is not None and self.is_main:
            self._keys.set(turn, "1")


def gloo_address() -> str:
    """The address by which gloo lets other processes find this one; "": GLOO_SOCKET_IFNAME names a network card."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ""
    try:
        return socket.getaddrinfo(socket.gethostname(), None)[0][4][0]
    except OSError:  # a name that stands for no address: gloo takes the loopback
        return "127.0.0.1"

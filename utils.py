"""What the scripts share and the model does not need: the console, devices, seeds, the process group."""

import contextlib
import ctypes
import datetime
import os
import platform
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from model.command import (  # noqa: F401 (the scripts' too)
    CommandParser,
    add_option,
    path_flag,
    print_error,
    print_message,
    print_text,
    run_command,
    say,
    screen,
    true_or_false,
)
from model.errors import InputError, OneLineError, ProcessLost, first_line, shown
from model.runs.signals import StopSignal  # noqa: F401 (the scripts' too)

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------- the console


def progress_bar(total: int, initial: int, show: bool):
    """A bar over training steps; its postfix has the time left. In a log file it can't move: see `progress_line`."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    return tqdm(total=total, initial=initial, disable=not show, bar_format=layout, mininterval=0.5, file=screen())


def progress_line(bar, every_seconds: float = 30) -> None:
    """Print what the bar shows as a line now and then, where there is no terminal to move it on."""
    now = time.perf_counter()
    if not sys.stderr.isatty() and now - getattr(bar, "last_line", 0) > every_seconds:
        bar.last_line = now
        say(str(bar).strip())


# -------------------------------------------------------------------------------------------------------- devices


def pick_device(asked: str = "auto", local_rank: int = 0):
    """The torch device to use, and why it was chosen.

    Args:
        asked: "auto", or a device that torch knows: "cpu", "mps", "cuda", "cuda:1".
        local_rank: this process's number on its machine, which picks its GPU.

    Raises:
        InputError: no such device here.
    """
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            return device, torch.cuda.get_device_name(device)
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InputError(f"device: {asked!r} found, one of auto, cpu, cuda, cuda:N, mps expected") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {asked!r} found, but torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: 'mps' found, but torch sees no Apple GPU here")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
        raise InputError(f"device: {asked!r} found, one of auto, cpu, cuda, cuda:N, mps expected")
    return device, "as asked"


def pick_dtype(asked: str, device):
    """The dtype of the matrix products on this device, and why.

    A processor without instructions for 16-bit floats emulates them, over a hundred times slower than float32: there
    float32 is used instead. MATECONV_EMULATE_DTYPE=1 keeps the dtype that was set, for tests.
    """
    import torch

    dtype = getattr(torch, asked)
    if dtype == torch.float32:
        return dtype, "as asked"
    if device.type == "cpu" and os.environ.get("MATECONV_EMULATE_DTYPE") != "1":
        needed = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16"), "float16": ("avx512_fp16", "amx_fp16", "fp16_arith")}
        features = cpu_features()
        found = [name for name in needed[asked] if name in features]
        if not found:
            return torch.float32, f"{asked} would be over 100 times slower, since this CPU has no instructions for it"
        return dtype, f"this CPU has {found[0]}"
    if asked == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "bfloat16 was asked for, but this GPU (before Ampere) has no instructions for it"
    return dtype, "as asked"


def choose_hardware(asked_device: str, asked_dtype: str, local_rank: int):
    """The device and dtype to use, printed with the reasons, and the speed of its matrix products: a `plan.Hardware`.

    Args:
        asked_device, asked_dtype: as in the settings.

    Raises:
        InputError: no such device here.
    """
    import torch

    from model.training.plan import Hardware

    device, why = pick_device(asked_device, local_rank)
    say(f"device {device}: {why}")
    dtype, why = pick_dtype(asked_dtype, device)
    say(f"dtype {str(dtype).removeprefix('torch.')}: {why}")
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic kernels require it of cuBLAS
    return Hardware(device, dtype, autocast, measure_matmul_flops(device, dtype))


def cpu_features() -> set[str]:
    """The instruction sets of this CPU, as `torch.cpu.get_capabilities` names them. Before torch 2.13, which has it,
    from Linux's /proc/cpuinfo, and none are known elsewhere."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there}
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()
    return words | ({"fp16_arith"} if "asimdhp" in words else set())  # ARM's name for it


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep the memory that tensors free; returns whether malloc is glibc's.

    By default glibc returns each large block to the system when it is freed. Training on a CPU allocates the same
    tensors at each step, so the system would clear gigabytes of pages per step, a tenth of the time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def measure_matmul_flops(device, dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product on this device: the limit that MFU is measured against."""
    import torch

    sizes = (256, 2048, 8192) if device.type == "cuda" else (256, 1024)
    best = 0.0
    for size in sizes:
        if best and 2 * size**3 / best > 4 * seconds:
            break  # emulated dtype, or a small GPU: the smaller product is enough
        a = torch.randn(size, size, device=device, dtype=dtype)
        a @ a  # a GPU's first product loads cuBLAS, for up to a second
        synchronize(device)
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            start = time.perf_counter()
            a @ a
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device) -> None:
    """Wait until the device has finished its queue; a CPU has none."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def deterministic_kernels(device) -> Iterator[None]:
    """On a CUDA GPU, use kernels that give the same bits each time. By default, gradients of attention and, when
    compiled, of the embedding are summed in whatever order threads arrive, and cuBLAS may choose another algorithm.

    CUBLAS_WORKSPACE_CONFIG must be set before this process's first matrix product there, see `Trainer`.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    options = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False  # it only helps to find bugs
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fills


# ---------------------------------------------------------------------------------------------------------- seeds


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (torch's on every device)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The state of every global generator, in plain values that `torch.load(weights_only=True)` accepts."""
    import numpy as np
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: dict) -> None:
    """Restore every global generator to what `random_state` returned."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# -------------------------------------------------------------------------------------------------- process group


def settle_buckets(model, rows: int, seq_len: int, device, autocast) -> None:
    """Make DistributedDataParallel order its gradient buckets now; by itself it does so after its first step.

    With three or more processes, a gradient's place in its bucket decides the order of the sum, and so the last bit
    (two numbers have only one order). Without this, a resumed run would differ in that bit.

    Args:
        model: a DistributedDataParallel; its parameters have gradients afterwards, which the caller clears.
        rows, seq_len: of a batch.
        autocast: context in which the model runs.
    """
    import torch

    state = random_state()
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
    with autocast:
        loss = model(tokens, tokens)
    loss.backward()
    restore_random_state(state)


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
        """Join the other processes: NCCL for gradients on GPUs, gloo elsewhere. Nothing to do for one process.

        Args:
            device: the torch device that this process computes on; None: none, only the control group is wanted.
            timeout: seconds to wait for each other.
            give_up: called in a thread when no process made progress for `timeout` seconds (see `beat`), with a
                sentence on the one that the others wait for; must end this process. None: nobody watches. A later call
                replaces it.

        Raises:
            ProcessLost: not all of them came in time.
        """
        self._give_up += [] if give_up is None else [give_up]
        if self.world_size == 1 or self._control is not None:
            return
        import torch.distributed as dist

        on_gpu = device is not None and device.type == "cuda"
        patience = datetime.timedelta(seconds=timeout)
        # The watchdog, if there is one, decides first.
        group_timeout = datetime.timedelta(seconds=timeout if give_up is None else 4 * timeout + 60)
        try:
            shared = self._store(patience)
            # torchrun keeps its store when it restarts the processes: they must find no key of the last attempt.
            # (With several machines, each counts its restarts separately.)
            one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
            self._keys = store = dist.PrefixStore(f"mateconv/{attempt}", shared)
            hosts = self._wait_for_all(store, patience)
            group = {"store": dist.PrefixStore("group", store), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=group_timeout, **group)
            self._control = dist.new_group(backend="gloo", timeout=group_timeout)
        except RuntimeError as error:  # all that torch raises for the network and the store
            reason = first_line(error)
            raise ProcessLost(f"not all of {self.world_size} processes came within {timeout:g} s ({reason})") from error
        if give_up is not None:
            from model.runs.watchdog import Watchdog

            watched = dist.PrefixStore("watch", store.clone())
            kept_by = None if self._store_of_launcher else 0
            ends = self._give_up  # its thread must not keep this object, and so the store, alive at exit
            self._watchdog = Watchdog(watched, self.rank, hosts, timeout, lambda message: ends[-1](message), kept_by)

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

    def _wait_for_all(self, store, patience: datetime.timedelta) -> list[str]:
        """Wait until every process has reported, and name those that do not; returns each rank's host."""
        import torch.distributed as dist

        store.set(f"here/{self.rank}", socket.gethostname())
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        try:
            store.wait(keys, patience)
        except dist.DistStoreError as error:
            missing = [self._with_machine(rank) for rank, key in enumerate(keys) if not store.check([key])]
            reason = f"rank {', '.join(missing)} did not come within {patience.total_seconds():g} s"
            raise ProcessLost(f"{reason}; {self.world_size} processes were expected") from error
        return [store.get(key).decode() for key in keys]

    def _with_machine(self, rank: int) -> str:
        """A rank that has not reported; where there are several machines, with the number of its own."""
        machines = -(-self.world_size // self.local_world_size)
        return f"{rank} (machine {rank // self.local_world_size} of 0 to {machines - 1})" if machines > 1 else str(rank)

    def close(self) -> None:
        """Leave the group."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self._control is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._control = self._keys = None

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Report progress to the watchdog, if there is one: what this process does next, and how many timeouts that
        may take."""
        if self._watchdog is not None:
            self._watchdog.beat(doing, patience)

    def arrive(self) -> None:
        """Report progress to the watchdog: from here this process waits for the others."""
        if self._watchdog is not None:
            self._watchdog.arrive()

    def announce(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, so that they can name the cause."""
        if self._watchdog is not None and not isinstance(error, ProcessLost):
            self._watchdog.announce(str(error) or type(error).__name__)

    def lost(self, error: RuntimeError, exchanging: bool = False) -> ProcessLost | None:
        """Which process is gone, where that is why `error` was raised; None: this process failed by itself.

        gloo raises a plain RuntimeError for a broken connection, in the middle of a backward pass too. No word in its
        text decides here: the watchdog knows whether another process has ended.

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

    def check_same(self, what: str, value) -> None:
        """See that a value is the same on every rank.

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
            raise InputError(f"{what}: {found}; they must agree")

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
        if self._control is not None and not self.is_main:
            with self._others_alive():
                while not self._keys.check([turn]):  # a barrier would end with the group's timeout
                    if self._watchdog is not None and (said := self._watchdog.heard) is not None:
                        raise ProcessLost(said)
                    time.sleep(0.1)
        yield
        if self._control is not None and self.is_main:
            self._keys.set(turn, "1")

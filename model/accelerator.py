"""What a device is and can do: the only file that asks of which type it is.

PyTorch answers through `torch.accelerator` and the module of each type (`torch.cuda`, `torch.npu` …). What it does not
say is in KINDS. An AMD GPU has the type "cuda" too.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from model.errors import first_line

if TYPE_CHECKING:  # settings are checked without torch
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What PyTorch does not say about a type of device."""

    vendor: str
    backend: str = "gloo"  # by which ranks exchange gradients
    package: str | None = None  # that adds the type to torch; None: torch itself has it
    is_single: bool = False  # there is one device at most, which takes no number
    shares_memory: bool = False  # with the CPU
    has_float64: bool = True
    has_complex: bool = False  # numbers, with which RoPE reads memory once
    has_fused_optimizers: bool = True
    has_flash_kernels: bool = False  # flash, efficient and cuDNN's attention, between which PyTorch chooses
    has_grouped_products: bool = False  # of matrices of different heights, for experts
    has_deterministic_kernels: bool = False  # behind `torch.use_deterministic_algorithms`
    runs_ahead: bool = False  # it may get a step before the last one was read
    compiles: bool = False  # torch.compile is complete there


# npu comes first, since torch_npu's `transfer_to_npu` has torch.cuda answer for it. Of the packages only their names,
# backends and modules' functions are known here: what each of them computes faster or not at all is not.
KINDS = {
    "cpu": Kind("CPU", shares_memory=True, has_complex=True, compiles=True),
    "npu": Kind("Huawei Ascend", "hccl", "torch_npu", has_float64=False),
    "musa": Kind("Moore Threads", "mccl", "torch_musa", has_fused_optimizers=False),
    "mlu": Kind("Cambricon", "cncl", "torch_mlu", has_fused_optimizers=False),
    "cuda": Kind(
        "NVIDIA",
        "nccl",
        has_complex=True,
        has_flash_kernels=True,
        has_grouped_products=True,
        has_deterministic_kernels=True,
        runs_ahead=True,
        compiles=True,
    ),
    "xpu": Kind("Intel", "xccl"),
    "mps": Kind("Apple", is_single=True, shares_memory=True, has_float64=False),
}


def kind_of(device: "torch.device | str") -> Kind:
    """What is known about the type of a device, or of one that has this type. Of an unknown one, the least."""
    device_type = device if isinstance(device, str) else device.type
    return KINDS.get(device_type) or Kind(device_type)


# -------------------------------------------------------------------------------------------------------- finding one


@functools.cache
def load_packages() -> dict[str, str]:
    """Import the installed packages that add types of devices to torch; returns why others of them failed, by name."""
    failed = {}
    for package in (kind.package for kind in KINDS.values() if kind.package is not None):
        try:
            if importlib.util.find_spec(package) is not None:
                importlib.import_module(package)
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # a library of the driver is missing
            failed[package] = first_line(error)
    return failed


def _module(device: "torch.device | str"):
    """torch's module for a type of device, such as `torch.cuda`; None where this torch has none."""
    import torch

    try:
        return torch.get_device_module(device)
    except RuntimeError:
        return None


def count(device_type: str) -> int:
    """How many devices of this type torch can use here."""
    load_packages()
    module = _module(device_type)
    if module is None or not getattr(module, "is_available", lambda: True)():
        return 0
    return module.device_count()


@functools.cache
def available_types() -> tuple[str, ...]:
    """The types of the accelerators that torch can use here, the best first; () where there is only the CPU."""
    import torch

    load_packages()
    first = torch.accelerator.current_accelerator(check_available=True)
    names = dict.fromkeys([*([] if first is None else [first.type]), *KINDS])
    return tuple(name for name in names if name != "cpu" and count(name))


def vendor(device_type: str) -> str:
    """Who makes the devices of this type that this torch is built for."""
    import torch

    return "AMD" if device_type == "cuda" and torch.version.hip else kind_of(device_type).vendor


def name(device: "torch.device") -> str:
    """What the vendor calls this device, such as "NVIDIA H100 80GB HBM3"."""
    own_name, maker = getattr(_module(device), "get_device_name", None), vendor(device.type)
    found = "GPU" if own_name is None else str(own_name(device))
    return found if maker.split()[-1].lower() in found.lower() else f"{maker} {found}"


def platforms() -> dict[str, str]:
    """What this torch has for each vendor, available here or not: {"NVIDIA": "CUDA 13.0"}."""
    import torch

    failed = load_packages()
    built = {
        "AMD": torch.version.hip and f"ROCm {torch.version.hip}",
        "NVIDIA": torch.version.cuda and f"CUDA {torch.version.cuda}",
        "Intel": getattr(torch.version, "xpu", None) and "XPU support",
        "Apple": torch.backends.mps.is_built() and "MPS",
    }
    added = {kind.vendor: kind.package for kind in KINDS.values() if kind.package in sys.modules.keys() - failed.keys()}
    return {vendor: has for vendor, has in (built | added).items() if has}


def package_of(maker: str) -> str | None:
    """The package that adds a vendor's devices to torch; None: torch itself has them, or nothing is known of them."""
    return next((kind.package for kind in KINDS.values() if kind.vendor == maker), None)


def problems() -> dict[str, str]:
    """Why a vendor's devices can't be used that this torch is built for or has a package for, where it says so."""
    import torch

    failed = load_packages()
    found = {kind.vendor: failed[kind.package] for kind in KINDS.values() if kind.package in failed}
    if torch.backends.cuda.is_built():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            found[vendor("cuda")] = first_line(error).partition(". ")[0]
    return found


def missing_kernels(device: "torch.device") -> tuple[str, list[str], bool] | None:
    """The capability of a GPU that this torch has no kernels for, those that it was built for, and whether the GPU is
    newer than these; None: it has kernels, or torch does not say."""
    import torch

    if device.type != "cuda" or not (architectures := torch.cuda.get_arch_list()):
        return None
    if torch.version.hip:  # names of architectures, such as gfx1100
        own = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if own in architectures else (own, architectures, False)
    capability = torch.cuda.get_device_capability(device)
    if not _parsed(architectures) or runs_on(capability, architectures):
        return None
    known = sorted(version for version, *_ in _parsed(architectures))
    return _dotted(capability), [*dict.fromkeys(map(_dotted, known))], capability > known[-1]


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for any of these runs on a GPU of this compute capability.

    Code for sm_86 runs on 8.6 and later ones of 8, sm_90a on 9.0 alone; compute_90 is translated for all later ones.

    Args:
        architectures: as `torch.cuda.get_arch_list` names them.
    """
    for version, is_source, is_exact in _parsed(architectures):
        same_family = version[0] == capability[0] and version <= capability
        if version == capability or (not is_exact and (same_family or (is_source and version <= capability))):
            return True
    return False


def _parsed(architectures: Sequence[str]) -> list[tuple[tuple[int, int], bool, bool]]:
    """The compute capability in names such as sm_90a, whether it is source code, and whether for that GPU alone."""
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in architectures]
    return [((int(f[2]), int(f[3])), f[1] == "compute", f[4] == "a") for f in found if f is not None]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def use(device: "torch.device") -> None:
    """Make it the device that this process uses where none is named."""
    if device.index is not None and (set_device := getattr(_module(device), "set_device", None)) is not None:
        set_device(device)


def has_bfloat16(device: "torch.device") -> bool:
    """Whether an accelerator has instructions for bfloat16; where its module does not say, a product is tried."""
    import torch

    supported = getattr(_module(device), "is_bf16_supported", None)
    if supported is not None:
        try:
            return bool(supported(including_emulation=False))
        except TypeError:  # not every module can emulate it
            return bool(supported())
    try:
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        return float((x @ x).sum()) == 8**3
    except (RuntimeError, TypeError):
        return False


def has_autocast(device: "torch.device") -> bool:
    """Whether torch can run a model there in 16 bits with float32 weights."""
    import torch

    return torch.amp.is_autocast_available(device.type)


def backend(device: "torch.device | None") -> str:
    """The backend of torch.distributed by which ranks exchange tensors on this device; None: on the CPU."""
    return kind_of("cpu" if device is None else device).backend


def type_with_countable_kernels() -> str:
    """The type whose kernels can be counted with fake tensors, without a GPU: a torch that was built without CUDA does
    not even name its tensors."""
    import torch

    return "cuda" if torch.backends.cuda.is_built() else "cpu"


def bits_may_differ(device: "torch.device", deterministic: bool) -> str | None:
    """A line to print where a resumed run may not have the bits of an uninterrupted one; None where it has.

    Args:
        deterministic: the setting.
    """
    if device.type == "cpu" or (deterministic and kind_of(device).has_deterministic_kernels):
        return None
    asked = str(deterministic).lower()
    why = f", which does nothing on {device.type}" if deterministic else ""
    return f"deterministic {asked}{why}: a resumed run may differ from an uninterrupted one in the last bits"


def size_step(tensor: "Tensor") -> int:
    """Sizes of its products that differ from step to step should be multiples of this.

    In 16 bits a CPU's library (oneDNN) compiles a kernel for every new shape, in 1.5 to 3 ms, which is ten times what a
    product of some hundred rows takes.
    """
    return 64 if tensor.device.type == "cpu" and tensor.element_size() == 2 else 1


# -------------------------------------------------------------------------------------------------------------- queue


def synchronize(device: "torch.device") -> None:
    """Wait until the device has finished its queue; a CPU has none."""
    if device.type != "cpu":
        _module(device).synchronize(*([] if kind_of(device).is_single else [device]))


def record_event(device: "torch.device"):
    """An event behind all that the device was given so far; its `synchronize()` waits for that."""
    event = _module(device).Event()
    event.record()
    return event


@functools.cache
def pins_memory(device_type: str) -> bool:
    """Whether a CPU's memory can be pinned, so that copies to the device wait behind its queue and not on the host."""
    import torch

    if kind_of(device_type).shares_memory:
        return False
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


def send(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """Copy a tensor of the CPU to a device; where memory can be pinned, nothing waits for it."""
    if not pins_memory(device.type):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fill(tensor: "Tensor", numbers: Sequence[float]) -> None:
    """Copy numbers into a device's tensor, behind its other work; where memory can be pinned, nothing waits for it."""
    import torch

    found = torch.tensor(numbers, dtype=tensor.dtype)
    tensor.copy_(found.pin_memory() if pins_memory(tensor.device.type) else found, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------- graphs


class CUDAGraph:
    """Work that a CUDA device is given once, operation by operation, and then as a whole: a launch of thousands of
    kernels takes Python's time for one.

    A replay runs the kernels on the addresses that they had. So what they read must lie where it lay, and must be kept;
    what they allocated stays theirs, in a pool apart from other memory.

    Args:
        beside: a graph whose stream and pool this one shares. They must not run at the same time, and a replay of one
            overwrites what the other has computed in between.
    """

    def __init__(self, device: "torch.device", beside: "CUDAGraph | None" = None) -> None:
        import torch

        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device) if beside is None else beside._stream
        self._pool = torch.cuda.graph_pool_handle() if beside is None else beside._pool

    def launch(self, work: Callable[[], T]) -> T:
        """Run work once without capturing it, on the stream that captures: PyTorch asks for such warm-ups, in which
        libraries allocate what they need for a stream."""
        import torch

        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], T]) -> T:
        """Capture work, which is not run: what it returns is computed by each replay. Other threads may go on using the
        device meanwhile.

        Raises:
            RuntimeError: something in it waits for the device, or needs what a capture does not allow.
        """
        import torch

        synchronize(self._device)
        empty_cache(self._device)  # the pool cannot use what earlier launches left
        collects = gc.isenabled()
        gc.disable()  # a graph of somebody else must not be destroyed meanwhile
        try:
            with torch.cuda.stream(self._stream):
                self._graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    result = work()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the first error says more
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
        except BaseException:
            self._leave_capture()
            raise
        finally:
            if collects:
                gc.enable()
        return result

    def _leave_capture(self) -> None:
        """After a capture that failed. PyTorch before 2.13 then takes it to go on: memory is no longer given back, and
        whatever draws a random number fails (pytorch #180395, #171263). A capture that succeeds ends that."""
        import torch

        with contextlib.suppress(RuntimeError, AttributeError):  # not counted any more, or not known here
            torch._C._cuda_endAllocateToPool(torch.zeros((), device=self._device).get_device(), self._pool)
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream):
            something, graph = torch.zeros((), device=self._device), torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            something.add_(1)
            graph.capture_end()

    def replay(self) -> None:
        """Launch what was captured, behind the device's other work."""
        self._graph.replay()


GRAPHS = {"cuda": CUDAGraph}  # by the type of device


def graph_problem(device: "torch.device") -> str | None:
    """Why no work can be captured on this device; None where it can."""
    if device.type not in GRAPHS:
        return f"no graphs are known of {kind_of(device).vendor} devices"
    maker = vendor(device.type)
    return None if maker == kind_of(device).vendor else f"graphs were not tried on {maker} GPUs"


# ------------------------------------------------------------------------------------------------------------- memory


def free_bytes(device: "torch.device") -> int | None:
    """Bytes that this process may still allocate there, with what its allocator keeps; None: torch does not say."""
    module = _module(device)
    if device.type == "mps":
        return module.recommended_max_memory() - module.driver_allocated_memory()
    try:
        return module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)
    except (AttributeError, RuntimeError):  # the module or the driver cannot tell
        return None


def measures_peak(device: "torch.device") -> bool:
    """Whether the peak of the allocated memory can be read."""
    needed = ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "empty_cache")
    return all(hasattr(_module(device), function) for function in needed)


def begin_peak(device: "torch.device") -> int:
    """Begin to measure a new peak where it can be measured; returns the bytes that are allocated now."""
    if not measures_peak(device):
        return 0
    _module(device).reset_peak_memory_stats(device)
    return _module(device).memory_allocated(device)


def peak_bytes(device: "torch.device") -> int | None:
    """The most bytes that were allocated since `begin_peak`; None: it can't be measured."""
    return _module(device).max_memory_allocated(device) if measures_peak(device) else None


def empty_cache(device: "torch.device") -> None:
    """Give memory that is kept for later tensors back to the device."""
    if (empty := getattr(_module(device), "empty_cache", None)) is not None:
        empty()


# ------------------------------------------------------------------------------------------------------ random states


def random_states() -> dict:
    """The states of the accelerators' generators by type: a list, one for each device; of a type with a single device
    the state, or None."""
    states: dict = {"cuda": [], "mps": None}  # every checkpoint has both
    for device_type in available_types():
        module = _module(device_type)
        if (get_all := getattr(module, "get_rng_state_all", None)) is not None:
            states[device_type] = get_all()
        elif hasattr(module, "get_rng_state"):
            states[device_type] = module.get_rng_state()
    return states


def restore_random_states(states: Mapping) -> None:
    """Restore what `random_states` returned, as far as the same devices are here."""
    for device_type in available_types():
        saved, module = states.get(device_type), _module(device_type)
        if isinstance(saved, list):
            if saved and len(saved) == module.device_count():
                module.set_rng_state_all(saved)
        elif saved is not None:
            module.set_rng_state(saved)


def are_random_states(states: Mapping) -> bool:
    """Whether `restore_random_states` can take these, which a file holds.

    Raises:
        KeyError: one is missing that every checkpoint has.
    """
    import torch

    for device_type in ["cuda", "mps", *(name for name in states if name in KINDS)]:
        found = states[device_type]
        is_list = isinstance(found, list) and not kind_of(device_type).is_single
        states_of_type = found if is_list else [] if found is None else [found]
        if not all(isinstance(state, torch.Tensor) for state in states_of_type):
            return False
    return True

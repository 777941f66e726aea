"""A device "npu", as torch_npu adds one, that computes on the CPU: `install()` adds it to this process's torch.

Its tensors are no CPU's: mixing both in an operation fails as it would on real hardware, its random numbers have their
own generator, and bits depend on nothing but those. It does not compute faster, in bfloat16's kernels, or compiled.

    python -c "from tests.fake_npu import run_script; run_script()" train.py --device npu …
"""

import runpy
import sys

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # a private name, experimental

CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
MAY_MIX = (*MOVES, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class NPUTensor(torch.Tensor):
    """A tensor of the device; `on_cpu` holds its numbers."""

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        about = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset(), "dtype": on_cpu.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, **about, device=torch.device("npu", 0))

    def __init__(self, on_cpu: torch.Tensor) -> None:
        self.on_cpu = on_cpu

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"npu: {self.on_cpu!r}"

    def tolist(self) -> list:
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def __deepcopy__(self, memo: dict):
        if id(self) not in memo:
            copied = NPUTensor(self.on_cpu.clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args: tuple, kwargs: dict):
    """What an operation gives, computed by the CPU's kernel."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    foreign = [leaf for leaf in leaves if not isinstance(leaf, NPUTensor) and leaf.dim()]
    if foreign and len(foreign) < len(leaves) and function not in MAY_MIX:
        raise RuntimeError(f"{function}: expected all tensors on npu:0, found one on {foreign[0].device}")
    npu_tensors = {id(leaf.on_cpu): leaf for leaf in leaves if isinstance(leaf, NPUTensor)}
    asked = kwargs.get("device")
    inner_args, inner_kwargs = pytree.tree_map(_inner, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad(), Random(function):  # a wrapper cannot be an inference tensor
        found = function(*inner_args, **inner_kwargs)
    if function in MOVES[1:]:
        return args[function is MOVES[2]]
    goes_to_cpu = asked is not None and torch.device(asked).type == "cpu"
    if goes_to_cpu:
        return found

    def outer(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in npu_tensors:
            return npu_tensors[id(value)]
        with torch.inference_mode(False):
            return NPUTensor(value)

    return pytree.tree_map(outer, found)


def _inner(value):
    if isinstance(value, NPUTensor):
        return value.on_cpu
    return CPU if isinstance(value, torch.device) and value.type == "npu" else value


def copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between the devices, where torch asks for it below `__torch_dispatch__`."""
    _inner(target).copy_(_inner(source))
    return target


def in_16_bits(product):
    """A product as autocast computes it."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            dtype = torch.get_autocast_dtype("npu")
            return product(*[arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args])

    return cast


class Random:
    """A context in which an operation that draws numbers draws them from the device's generator.

    Args:
        function: the operation.
    """

    state = torch.Generator().get_state()

    def __init__(self, function) -> None:
        self._draws = torch.Tag.nondeterministic_seeded in function.tags

    def __enter__(self) -> None:
        if self._draws:
            self._before = torch.get_rng_state()
            torch.set_rng_state(Random.state)

    def __exit__(self, *error) -> None:
        if self._draws:
            Random.state = torch.get_rng_state()
            torch.set_rng_state(self._before)


class Module:
    """What `torch.npu` has of torch_npu's functions."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        assert torch.device(device) == torch.device("npu", 0)

    def get_device_name(self, device=None) -> str:
        return "Ascend910B3"

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device=None) -> None:
        pass

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return 8 * 10**9, 64 * 10**9

    def memory_reserved(self, device=None) -> int:
        return 10**9

    def memory_allocated(self, device=None) -> int:
        return 10**8

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [Random.state.clone()]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        (Random.state,) = states

    def manual_seed_all(self, seed: int) -> None:
        Random.state = torch.Generator().manual_seed(seed).get_state()


class HCCL(dist.ProcessGroup):
    """The backend by which ranks exchange tensors of the device: gloo's, on what they hold.

    Args:
        gloo: the group that does the work.
    """

    def __init__(self, gloo: dist.ProcessGroup) -> None:
        super().__init__(gloo.rank(), gloo.size())
        self._gloo = gloo

    def allreduce(self, tensors, options):
        return self._gloo.allreduce([_inner(tensor) for tensor in tensors], options)

    def broadcast(self, tensors, options):
        return self._gloo.broadcast([_inner(tensor) for tensor in tensors], options)

    def allgather(self, found, tensors, options):
        found = [[_inner(tensor) for tensor in some] for some in found]
        return self._gloo.allgather(found, [_inner(tensor) for tensor in tensors], options)

    def getBackendName(self) -> str:  # noqa: N802 (torch's)
        return "hccl"


def install() -> None:
    """Add the device and its backend to torch, once in a process."""
    _setup_privateuseone_for_python_backend("npu", Module())
    dist.Backend.register_backend("hccl", lambda *about: HCCL(dist.ProcessGroupGloo(*about)), devices=["npu"])
    for name in ("empty.memory_format", "empty_strided"):
        function = getattr(aten, name.partition(".")[0])
        function = getattr(function, name.partition(".")[2] or "default")

        def made(*args, function=function, **kwargs):
            given = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
            return NPUTensor(function(*args, **given, device=CPU))

        torch.library.impl(f"aten::{name}", "PrivateUse1", made)
    torch.library.impl("aten::_copy_from", "PrivateUse1", copied)
    Module.kept = torch.library.Library("_", "IMPL")  # it ends with its last reference
    Module.kept.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for product in (aten.linear.default, aten.matmul.default):
        torch.library.impl(product.name(), "AutocastPrivateUse1", in_16_bits(product))


def run_script() -> None:
    """Run the script that is this process's first argument, with the arguments after it, where torch has the device."""
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""A CUDA graph on the CPU: it records the operations of a piece of work, and replays them on the same memory.

What a real graph does, so does this one:
- A capture changes no memory. What it returns holds garbage (NaN) until the first replay.
- A replay runs the recorded kernels in order, on the addresses that they had. Python does not run again: a number that
  came from the host, such as a float learning rate, is the captured one for ever.
- Work that waits for the device (`item`, `tolist`, `nonzero`, `if tensor:`), makes a tensor of numbers of the host, or
  draws random numbers fails during a capture.
- Memory that was allocated outside the graph must still be there in a replay: if it was freed, the replay fails. A real
  one would read what lies there now.

It cannot see what a custom operator does inside, nor tell a CPU's tensor from the device's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

T = TypeVar("T")
aten = torch.ops.aten
ALLOCATIONS = {  # no kernels: the memory has its address for ever, and a replay leaves in it what is there
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.empty_permuted,
}  # fmt: skip
FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy}  # torch.tensor(…), torch.as_tensor(…)
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class FakeGraph:
    """Stands in for a class of `accelerator.GRAPHS`.

    Attributes:
        replays: how many there were.
        operations: what a replay runs.
    """

    def __init__(self, device: torch.device, beside: "FakeGraph | None" = None) -> None:
        self.replays = 0
        self.operations: list[_Operation] = []

    def launch(self, work: Callable[[], T]) -> T:
        """Run it, as warm-up steps run."""
        return work()

    def capture(self, work: Callable[[], T]) -> T:
        """Record it."""
        recorder = _Recorder()
        try:
            with _NothingToHost(), recorder:
                result = work()
        finally:
            recorder.restore()
        self.operations = recorder.operations
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run what was recorded."""
        assert self.operations, "nothing was captured"
        self.replays += 1
        for operation in self.operations:
            operation.run()


@dataclass(frozen=True)
class _Outside:
    """A tensor that was there before the capture: its memory is not kept alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Outside":
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"the graph uses memory that was freed: {self.dtype} {list(self.shape)}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Operation:
    function: Callable
    args: tuple  # its tensors are of the graph, or `_Outside`
    kwargs: dict
    results: list[Tensor | None]  # those with memory of their own; None: the others

    def run(self) -> None:
        if self.function.overloadpacket in ALLOCATIONS:
            return
        kwargs = {name: _found(value) for name, value in self.kwargs.items()}
        results = _tensors(self.function(*_found(self.args), **kwargs))
        for old, new in zip(self.results, results, strict=True):
            if old is not None:
                old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Runs operations and records them; below autograd and autocast, so it sees kernels, also those of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # allocated by the graph, by address
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # others, and what they held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(function, args):
            raise RuntimeError(f"{function} waits for the device, during a capture")
        if function.overloadpacket in FROM_HOST:
            raise RuntimeError("a tensor is made of the host's numbers, during a capture")
        self._keep(_written(function, args, kwargs))
        draws = torch.Tag.nondeterministic_seeded in function.tags
        state = torch.get_rng_state() if draws else None

        result = function(*args, **kwargs)

        if draws and not torch.equal(state, torch.get_rng_state()):
            raise RuntimeError(f"{function} draws random numbers, during a capture")
        recorded = tree_map(self._recorded, (args, kwargs))
        shared = {_address(tensor) for tensor in _tensors((args, kwargs))}
        results = [None if _address(tensor) in shared else tensor.detach() for tensor in _tensors(result)]
        for tensor in results:
            if tensor is not None:
                self._own[_address(tensor)] = tensor.untyped_storage()
        self.operations.append(_Operation(function, *recorded, results))
        return result

    def _recorded(self, value):
        """What is kept of an argument."""
        if not isinstance(value, Tensor):
            return value
        return value.detach() if _address(value) in self._own else _Outside.of(value)

    def _keep(self, written: list[Tensor]) -> None:
        """Remember what memory from outside holds before it is written for the first time."""
        for tensor in written:
            address, storage = _address(tensor), tensor.untyped_storage()
            if address not in self._own and address not in self._before:
                self._before[address] = storage, storage.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what recording has changed."""
        for storage, content in self._before.values():
            storage.copy_(content)
        for operation in self.operations:
            for tensor in operation.results:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)


class _NothingToHost(TorchFunctionMode):
    """Notices methods that read a CPU's tensor without an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in TO_HOST:
            raise RuntimeError(f"{function.__name__} waits for the device, during a capture")
        return function(*args, **(kwargs or {}))


def _found(value):
    """An argument of a recorded operation as it is now; arguments nest in lists and tuples only."""
    if isinstance(value, _Outside):
        return value.tensor()
    return type(value)(map(_found, value)) if type(value) in (list, tuple) else value


def _tensors(tree) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(function, args: Sequence, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    by_name = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    written = (a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return _tensors([by_name.get(argument.name) for argument in written])


def _waits(function, args: Sequence) -> bool:
    """Whether the host needs numbers of the device for this: of an index, only where it is boolean and is counted."""
    if function.overloadpacket in {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}:
        return any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
    return bool(WAITING & set(function.tags))

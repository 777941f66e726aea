"""A whole step of training as one captured graph: the host launches it at once, instead of kernel by kernel.

A small model's step is thousands of kernels of a few microseconds, and the device waits for Python between them
(benchmarks/RESULTS.md, "What a CUDA graph is worth"). A replay computes the bits that launching computes. That is not
taken on trust: the first replay is compared with the same step launched, and whatever goes wrong, launching goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import accelerator
from model.errors import first_line
from model.storage.files import size_text
from model.training.data import TrainingData
from model.training.memory import system_memory
from model.training.settings import TrainingSettings
from model.training.step import StepNumbers

WARM_UP = 3  # launched steps before a capture: in them libraries choose kernels, and the optimizer makes its state
MOST_SHAPES = 8  # of batches, each with a graph; steps of other shapes are launched
CLOSE = 1e-2  # relative difference of the numbers of one step computed twice by kernels that add up in any order

Batch = tuple[Tensor | None, ...]  # whatever an objective reads
Take = Callable[[Sequence[Batch], StepNumbers], Tensor]


def graph_problem(
    device: torch.device, dtype: torch.dtype, data: TrainingData, training: TrainingSettings, ranks: int, ahead: bool
) -> str | None:
    """Why a run's steps can't be captured; None where they can.

    Args:
        dtype: of the matrix products.
        training: as resolved, but for cuda_graph.
        ranks: processes that train together.
        ahead: whether the device gets a step before the last one was read (`step.runs_ahead`).
    """
    if (problem := accelerator.graph_problem(device)) is not None:
        return problem
    if ranks > 1:
        return f"{ranks} processes exchange gradients, which was not tried in a graph"
    if not ahead:
        return f"the host decides whether each step of {training.optimizer_type} counts"
    if data.config.dropout > 0:
        return f"dropout {data.config.dropout:g} draws random numbers, which was not tried in a graph"
    if dtype == torch.float16:
        return "float16's loss scale was not tried in a graph"
    if data.is_pairs:
        return "the loss of pairs takes the learned tokens alone, and waits for their number"
    if data.config.n_experts and training.expert_products == "loop":
        return "a loop over experts waits for the numbers of their tokens"
    return None


@dataclass
class _Captured:
    """A graph, and what it reads and writes. Its memory must live as long as the graph."""

    graph: accelerator.CUDAGraph
    batches: list[Batch]
    numbers: Tensor
    result: Tensor

    def replay(self, batches: Sequence[Batch], numbers: StepNumbers) -> Tensor:
        for own, theirs in zip(_tensors(self.batches), _tensors(batches), strict=True):
            own.copy_(theirs)
        accelerator.fill(self.numbers, numbers.flat())
        self.graph.replay()
        return self.result


class StepGraph:
    """Takes steps on a device: some are launched, and then those of a known shape are replayed.

    Args:
        device: that has graphs.
        launch: takes a step as it is taken without a graph: (micro-batches, what else it needs, from the host) -> its
            numbers, on the device.
        work: the same, but all that it needs is on the device, and it does nothing else: at a replay no Python runs.
        state: all tensors that they change in place.
        veto: the state's scalar that is 1 where a step was not taken.
        exact: whether kernels give the same bits each time, so that a replay can be compared with a launched step.
        say: prints one line for the user.

    Attributes:
        failed: nothing can be captured: from the next step on, the caller launches its steps by itself.
    """

    def __init__(
        self,
        device: torch.device,
        launch: Take,
        work: Take,
        state: Callable[[], Sequence[Tensor]],
        veto: Tensor,
        exact: bool,
        say: Callable[[str], None],
    ) -> None:
        self._device, self._state, self._veto = device, state, veto
        self._take_launched, self._take_on_device = launch, work
        self._exact, self._say, self.failed = exact, say, False
        self._graph = accelerator.GRAPHS[device.type](device)  # the next one to capture
        self._captured: dict[tuple, _Captured] = {}
        self._warmed_up = 0

    @property
    def is_settled(self) -> bool:
        """Whether steps are captured by now."""
        return len(self._captured) > 0

    def step(self, batches: Sequence[Batch], numbers: StepNumbers) -> Tensor:
        """Take a step; its numbers, which the next step may overwrite.

        Args:
            numbers: of the host.
        """
        shape = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for batch in batches for tensor in batch)
        if shape in self._captured:
            return self._captured[shape].replay(batches, numbers)
        if len(self._captured) == MOST_SHAPES:
            return self._take_launched(batches, numbers)
        if self._warmed_up < WARM_UP:
            self._warmed_up += 1
            sent = accelerator.send(_vector(numbers), self._device)
            return self._graph.launch(lambda: self._take_on_device(batches, numbers.on_device(sent)))
        return self._first_of(shape, batches, numbers)

    def _first_of(self, shape: tuple, batches: Sequence[Batch], numbers: StepNumbers) -> Tensor:
        """Take a step by launching it, then capture it, and see that a replay ends in the same bits.

        Copies lie on the CPU: beside a graph's memory, the device may have no room for them.
        """
        state = self._state()
        needed, free = 2 * sum(tensor.nbytes for tensor in state), system_memory()
        if needed > free:
            self._give_up(
                f"comparing a replay needs {size_text(needed)} of the machine's memory, {size_text(free)} are free"
            )
            return self._take_launched(batches, numbers)
        before = _copies(state)
        launched = self._graph.launch(lambda: self._take_launched(batches, numbers))
        after = _copies([launched, *state])
        if float(self._veto) > 0:  # the step changed nothing, so that comparing it would say nothing
            return launched
        problem = None
        try:
            _restore(state, before)
            captured = self._capture(batches, numbers)
            replayed = captured.replay(batches, numbers)
            if not self._is_same([replayed, *state], after):
                problem = "the first replay has other bits than the launched step"
        except Exception as error:  # of the driver, of PyTorch, or of memory: the run can go on without a graph
            problem = first_line(error)
        if problem is None:
            self._captured[shape] = captured
            self._graph = accelerator.GRAPHS[self._device.type](self._device, beside=captured.graph)
            return replayed
        _restore(state, after[1:])
        self._give_up(problem)
        return launched

    def _give_up(self, problem: str) -> None:
        self.failed = True
        self._say(f"cuda_graph: steps are launched as without it: {problem}")

    def _capture(self, batches: Sequence[Batch], numbers: StepNumbers) -> _Captured:
        own = [tuple(None if tensor is None else tensor.clone() for tensor in batch) for batch in batches]
        vector = _vector(numbers).to(self._device)
        result = self._graph.capture(lambda: self._take_on_device(own, numbers.on_device(vector)))
        return _Captured(self._graph, own, vector, result)

    def _is_same(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Whether all bits are equal; where kernels add up in any order, whether the step's numbers are close."""
        if not self._exact:
            return torch.allclose(found[0].cpu(), expected[0], rtol=CLOSE)
        return all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def _vector(numbers: StepNumbers) -> Tensor:
    return torch.tensor(numbers.flat(), dtype=torch.float64)


def _tensors(batches: Sequence[Batch]) -> list[Tensor]:
    return [tensor for batch in batches for tensor in batch if tensor is not None]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.copy_(copy)

"""The next token of several texts on a GPU, as graphs: all kernels of a step are launched at once.

Launched one by one, the 200 small kernels of a step take the host milliseconds, in which the GPU mostly waits. A graph
does the same in the same memory each time. So there is a graph for each number of rows (1, 2, 4, …) and of slots that
attention reads (128, 256, …); a step takes the next that hold its texts, whose rows without a text compute for nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model import accelerator
from model.errors import first_line
from model.generation.sampling import PADDING, Choice, Shortlist, largest
from model.kv_cache import KVCache, StepCache

FEWEST_SLOTS, FEWEST_SLOTS_OF_FEW = 128, 512
LAUNCHED = 4  # times before a capture, which takes as long: kernels are loaded by then, and rare sizes not captured
MOST_CHOICES = 8  # whose graphs are kept

Forward = Callable[[Tensor, StepCache], Tensor]  # int64 [rows, 1] -> logits of the next tokens, [rows, V]


class Step:
    """Kernels that read and write the same memory each time: launched at first, then captured, and then replayed.

    Args:
        graph: one that has captured nothing yet.
        launch: launches them; done twice, it gives the same again.
        result: what they write.
    """

    def __init__(self, graph: accelerator.CUDAGraph, launch: Callable[[], None], result: Tensor) -> None:
        self.graph, self.result, self.is_captured = graph, result, False
        self._launch, self._launched = launch, 0

    def __call__(self) -> None:
        """Compute the result.

        Raises:
            RuntimeError: they cannot be captured, or the graph computes something else.
        """
        if self.is_captured:
            self.graph.replay()
        elif self._launched == LAUNCHED:
            self._capture()
        else:
            self.graph.launch(self._launch)
            self._launched += 1

    def _capture(self) -> None:
        """Capture them, run the graph once, and see that it gives what launching gives."""
        self.graph.launch(self._launch)
        expected = self.result.clone()
        self.graph.capture(self._launch)
        self.result.zero_()
        self.graph.replay()
        if not torch.equal(self.result.view(torch.uint8), expected.view(torch.uint8)):  # as bytes: NaN is not itself
            raise RuntimeError("its numbers are not those of the launched kernels")
        self.is_captured = True


class GraphSteps:
    """The steps of a Rows' texts, for all numbers of rows and slots.

    Args:
        forward: the network, whose weights stay where they are.
        graph_type: of its device, one of `accelerator.GRAPHS`.
        cache, ids: the Rows' keys and values and ids, int64 [capacity, context].
        vocab_size: of the logits.
        report: called with None when a graph was captured, and with the reason, in a few words, when one cannot be:
            then there are no more.
        few: fewer sizes, which compute more for nothing: one row or all, 512, 2,048, … slots.
    """

    def __init__(
        self, forward: Forward, graph_type: type[accelerator.CUDAGraph], cache: KVCache, ids: Tensor, vocab_size: int,
        report: Callable[[str | None], None], few: bool = False,
    ) -> None:  # fmt: skip
        self._forward, self._graph_type, self._cache, self._ids, self._report = forward, graph_type, cache, ids, report
        self._capacity, self._context = ids.shape
        self._inputs = torch.zeros(2, self._capacity, dtype=torch.int64, device=ids.device)
        self._logits, self._scores = (torch.zeros(self._capacity, vocab_size, device=ids.device) for _ in range(2))
        self._few = few
        self._steps: dict[tuple[int, ...], Step] | None = {}  # by rows, slots and choice; None: given up
        self._first: accelerator.CUDAGraph | None = None  # whose stream and memory the others share
        self._choices: list[Choice] = []
        self._size = (0, 0, 0)  # texts, rows and slots of the last step

    def logits(self, lengths: Sequence[int], prompt_lengths: Sequence[int]) -> Tensor | None:
        """Run the newest token of each of the first rows -> logits of the next ones, float32 [n, V], which hold until
        the next call. None: there is no graph, kernels must be launched one by one.

        Args:
            lengths: tokens of each text in the cache, which lacks the newest only. The cache's own lengths stay.
            prompt_lengths: tokens of each text's prompt.
        """
        if self._steps is None:
            return None
        texts, empty = len(lengths), self._capacity - len(lengths)
        rows, slots = self._sizes(texts, max(lengths) + 1)
        inputs = [[*lengths, *[self._cache.capacity - 1] * empty], [*prompt_lengths, *[0] * empty]]
        accelerator.fill(self._inputs, inputs)
        self._size = texts, rows, slots
        return None if self._run((rows, slots), self._network) is None else self._logits[:texts]

    def shortlist(self, choice: Choice) -> Shortlist | None:
        """What tells the next token of all texts of the last step, where they choose alike, in one copy; waits for the
        device. None: there is no graph, all of the logits are needed."""
        if not choice.shortlisted(self._logits.shape[1]):
            return None
        number = next((n for n, known in enumerate(self._choices) if known is choice or known == choice), None)
        if number is None:
            if len(self._choices) == MOST_CHOICES:
                self._choices.clear()
                self._steps = {key: step for key, step in self._steps.items() if len(key) == 2}
            self._choices.append(choice)
            number = len(self._choices) - 1
        texts, rows, slots = self._size
        step = self._run((rows, slots if choice.processors else 0, number), self._choosing)
        if step is None:
            return None
        values, ids = step.result[:, :texts].tolist()
        scores = (self._scores if choice.processors else self._logits)[:texts]
        return Shortlist(values, [list(map(int, row)) for row in ids], scores)

    def _sizes(self, texts: int, tokens: int) -> tuple[int, int]:
        """The rows and slots of the step for so many texts, the longest of which has so many tokens."""
        rows, slots = _next_power(2, texts), max(FEWEST_SLOTS, _next_power(2, tokens))
        if self._few:
            rows, slots = 1 if texts == 1 else self._capacity, max(FEWEST_SLOTS_OF_FEW, 2 * _next_power(4, tokens / 2))
        return min(rows, self._capacity), min(slots, self._context)

    def _run(self, key: tuple[int, ...], make: Callable[..., Step]) -> Step | None:
        """Run the step of this key, made at its first time; None: it cannot be captured, and there are no more."""
        try:
            step = self._steps.get(key) or self._steps.setdefault(key, make(*key))
            was_captured = step.is_captured
            step()
        except RuntimeError as error:
            self._steps = None
            self._report(first_line(error))
            return None
        if step.is_captured and not was_captured:
            self._report(None)
        return step

    def _new_step(self, launch: Callable[[], None], result: Tensor) -> Step:
        graph = self._graph_type(self._ids.device, self._first)
        self._first = self._first or graph
        return Step(graph, launch, result)

    def _network(self, rows: int, slots: int) -> Step:
        """From the newest tokens to logits."""
        cache = StepCache(self._cache, self._inputs[0, :rows], slots, self._context)
        logits = self._logits[:rows]
        return self._new_step(partial(_compute_logits, self._forward, self._ids[:rows], cache, logits), logits)

    def _choosing(self, rows: int, slots: int, number: int) -> Step:
        """From logits to a shortlist."""
        choice, logits, scores = self._choices[number], self._logits[:rows], self._scores[:rows]
        count = choice.shortlisted(logits.shape[1])
        found = torch.zeros(2, rows, count, dtype=torch.float64, device=logits.device)
        numbers = torch.arange(slots, device=logits.device)
        ids, inputs = self._ids[:rows], self._inputs[:, :rows]
        return self._new_step(partial(_compute_shortlist, choice, ids, inputs, numbers, logits, scores, found), found)


def _compute_logits(forward: Forward, ids: Tensor, cache: StepCache, logits: Tensor) -> None:
    """Of the next token of each row of ids, int64 [rows, context], into float32 [rows, V]."""
    tokens = ids.gather(1, cache.positions(1)).clamp(min=0)  # [rows, 1]; of a row without a text any id
    logits.copy_(forward(tokens, cache))


def _compute_shortlist(
    choice: Choice, ids: Tensor, inputs: Tensor, numbers: Tensor, logits: Tensor, scores: Tensor, found: Tensor
) -> None:
    """The largest scores and their ids, into float64 [2, rows, count]; if they are not the logits, all into `scores`.

    Args:
        ids: int64 [rows, context].
        inputs: int64 [2, rows], positions of the newest tokens, and where the output begins.
        numbers: int64 [slots], 0, 1, …; no text is longer. Processors alone need it.
        logits: float32 [rows, V].
    """
    if choice.processors:
        positions = numbers + (inputs[0] + 1 - len(numbers))[:, None]  # [rows, slots], below 0: no token
        tokens = ids.gather(1, positions.clamp(0, ids.shape[1] - 1)).where(positions >= 0, PADDING)
        tokens[:, -1].clamp_(min=0)  # of a row without a text, any id
        output = tokens.where(positions >= inputs[1][:, None], PADDING)
        for process in choice.processors:
            logits = process(logits, tokens, output)
        scores.copy_(logits)
    for target, source in zip(found, largest(logits, found.shape[2]), strict=True):
        target.copy_(source)


def _next_power(base: int, number: float) -> int:
    """The least power of the base that is no less than a number."""
    power = 1
    while power < number:
        power *= base
    return power

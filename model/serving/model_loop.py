"""The loop that runs the model: the requests of all clients become rows of one decode loop.

It has the main thread, and the web server another one: OpenMP keeps a pool of threads for each thread that uses it, and
one for the thread that loaded the model and another for a thread that runs it would be more threads than cores, which
no longer spin at barriers: a compiled step then took a third more time.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from model.errors import InputError, first_line
from model.generation.decoding import Decoding, Event, told_logprobs
from model.generation.engine import Engine
from model.generation.generation_config import GenerationConfig
from model.generation.prefixes import Prefixes
from model.generation.rows import Rows, fitting_rows
from model.kv_cache import KVCache
from model.text.detokenize import Text, new_detokenizer

PREFIX_BYTES = 256 << 20  # of keys and values that are kept of texts that ended
PROMPT_TOKENS, PROMPT_TOKENS_ON_GPU = 256, 4096  # that a step reads at most, while others wait for it
QUEUE_SECONDS = 60.0  # that a text may wait for a row
TELLING_SECONDS = 0.03  # between two pieces of a text, where few are written
MOST_TELLING_SECONDS = 0.1
WRITING_SECONDS = 600.0  # that it may take then


class Busy(Exception):
    """The queue is full."""


class Told(NamedTuple):
    """What happened to one of a request's texts."""

    index: int  # of the text within its request
    event: Event | None
    error: Exception | None = None
    at: float = 0.0  # when, of time.monotonic


@dataclass(eq=False)
class Writing:
    """A request's texts while they are written.

    Args:
        deliver: called in the model's thread with what is new.
    """

    prompts: Sequence[Sequence[int]]  # one for each text
    config: GenerationConfig
    deliver: Callable[["Writing", list[Told]], None]
    streams: bool = False  # somebody reads along: the first piece is told at once
    n: int = 1  # texts of each prompt, one after another: the first draws from the seed, the next from seed + 1
    cached: list[int] = field(init=False)  # tokens of each text's prompt that were not read again
    cancelled: bool = False
    begun: bool = False  # something was told
    submitted: float = field(default_factory=time.monotonic)
    began: float | None = None  # when its first text got a row

    def __post_init__(self) -> None:
        self.cached = [0] * len(self.prompts)


class Job(NamedTuple):
    """Something else that runs in the model's thread, between two steps."""

    run: Callable[[], None]
    fail: Callable[[Exception], None] = lambda error: None  # called instead, where it does not come to that


class _Waiting(NamedTuple):
    writing: Writing
    index: int
    after: int | None  # the number of a text with the same prompt, which is read first


class _Running(NamedTuple):
    writing: Writing
    index: int
    began: float  # of time.monotonic


@dataclass
class Counts:
    """Since the start; what /metrics tells."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    step_seconds: float = 0.0


class ModelLoop:
    """Writes the texts of all requests, as many together as there are rows, in the order of their arrival.

    Args:
        generator: a TextGenerator; nobody else may use it meanwhile.
        rows: texts that are written together, if memory holds so many.
        queue: texts that may wait for a row.
        on_fault: called when the loop ends because of an error.
        reproducible: a text's bits depend on nothing but its request: nothing is kept of earlier texts, and whether
            compiled code exists yet decides nothing. With one row.

    Attributes:
        fault: the error that ended the loop.
    """

    def __init__(
        self, generator, rows: int, queue: int, on_fault: Callable[[], None] = lambda: None, reproducible: bool = False
    ) -> None:
        self.generator, self.queue_size, self.fault, self.counts = generator, queue, None, Counts()
        engine = generator.engine()
        self._rows = Rows(engine, fitting_rows(engine, rows), prefixes=None if reproducible else Prefixes(PREFIX_BYTES))
        self._reproducible = reproducible
        on_cpu = engine.device.type == "cpu"
        self._decoding = Decoding(
            self._rows,
            generator.eos_ids,
            prompt_tokens=PROMPT_TOKENS if on_cpu else PROMPT_TOKENS_ON_GPU,
            on_error=self._refuse,
        )
        self._choose_decoder()  # which compiles now what the first requests would wait for
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[int, _Running] = {}  # by number
        self._errors: list[tuple[int, InputError]] = []
        self._news: dict[int, tuple[Writing, list[Told]]] = {}  # that was not told yet
        self._told = 0.0  # when
        self._jobs: deque[Job] = deque()
        self._numbers = itertools.count()
        self._on_fault, self._closing = on_fault, False

    def _choose_decoder(self) -> None:
        self._rows.compiled = self._rows.engine.choose_decoder(
            repeatable=self._reproducible, more_to_come=True, several=self._rows.capacity > 1
        )

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that have a row."""
        return len(self._running)

    @property
    def seconds_per_text(self) -> float:
        """A guess of how long a row stays taken."""
        tokens = max(1, self.counts.new_tokens)
        return max(1.0, self.counts.step_seconds / tokens * self.generator.model.config.max_seq_len / 4)

    def submit(self, writing: Writing) -> None:
        """Put a request's texts into the queue.

        Raises:
            Busy: it is full. An empty one takes a request of any size.
        """
        with self._changed:
            self._check_running()
            if self._waiting and len(self._waiting) + len(writing.prompts) > self.queue_size + self._rows.free:
                raise Busy
            first: dict[tuple[int, ...], int] = {}
            for index, prompt in enumerate(writing.prompts):
                key = tuple(prompt)
                self._waiting.append(_Waiting(writing, index, first.get(key)))
                first.setdefault(key, index)
            self._changed.notify()

    def cancel(self, writing: Writing) -> None:
        """Let its texts end; their rows are free after the present step."""
        with self._changed:
            writing.cancelled = True
            self._changed.notify()

    def call(self, job: Job) -> None:
        """Run something else between two steps, each time one.

        Raises:
            Busy: too many wait.
        """
        with self._changed:
            self._check_running()
            if len(self._jobs) >= self.queue_size:
                raise Busy
            self._jobs.append(job)
            self._changed.notify()

    def _check_running(self) -> None:
        if self.fault is not None:
            raise RuntimeError("the model has failed")

    def end_all(self, error: Exception) -> None:
        """End all texts, running and waiting, with an error, after the present step."""

        def end() -> None:
            for number in list(self._running):
                self._decoding.cancel(number)
            self._tell_all(error)

        with self._changed:
            self._jobs.appendleft(Job(end))
            self._changed.notify()

    def _tell_all(self, error: Exception) -> None:
        """Tell everybody who waits, or whose text runs, of an error."""
        with self._changed:
            writings = self._writings()
            jobs = list(self._jobs)
            for waiting in (self._waiting, self._running, self._jobs):
                waiting.clear()
        for writing in writings:
            writing.deliver(writing, [Told(0, None, error)])
        for job in jobs:
            job.fail(error)

    def _writings(self) -> list[Writing]:
        """All that wait or run."""
        writings = [*(one.writing for one in self._waiting), *(running.writing for running in self._running.values())]
        return list({id(writing): writing for writing in writings}.values())

    def close(self) -> None:
        """Let `run` return after the present step."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        """Write texts until `close`, or a fault."""
        try:
            while self._has_work():
                self._drop_cancelled()
                self._admit()
                if self._rows.live:
                    self._step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._fail(error)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False: the loop is to end."""
        with self._changed:
            while not (self._closing or self._waiting or self._running or self._jobs):
                self._changed.wait(1)  # Windows serves no Ctrl-C within a longer one
            if self._closing:
                return False
            job = self._jobs.popleft() if self._jobs else None
        if job is not None:
            job.run()
        return True

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
            late = {
                id(one.writing): one.writing
                for one in waiting
                if one.writing.began is None and now - one.writing.submitted > QUEUE_SECONDS
            }
            kept = [one for one in waiting if not one.writing.cancelled and id(one.writing) not in late]
            if len(kept) < len(waiting):
                self._waiting = deque(kept)
        for writing in late.values():
            writing.deliver(writing, [Told(0, None, TimeoutError("the server is too busy: no row became free"))])
        for number, (writing, index, began) in list(self._running.items()):
            is_slow = now - began > WRITING_SECONDS
            if writing.cancelled or is_slow:
                self._decoding.cancel(number)
                del self._running[number]
                self.counts.cancelled += 1
            if is_slow and not writing.cancelled:  # it ends with what it has
                self._note(writing, Told(index, Event(number, None, "", "length", None), None, now))
                self._tell(now)

    def _admit(self) -> None:
        """Give free rows to the texts that wait longest."""
        while self._rows.free:
            with self._changed:
                if not self._waiting:
                    return
                writing, index, after = self._waiting[0]
                if after is not None and self._is_being_read(writing, after):
                    return
                self._waiting.popleft()
            if writing.began is None:
                writing.began = time.monotonic()
            self._choose_decoder()
            number, prompt, config = next(self._numbers), writing.prompts[index], writing.config
            text = Text(new_detokenizer(self.generator.tokenizer, prompt), config.stop_strings, config.max_repeats)
            self._running[number] = _Running(writing, index, time.monotonic())
            writing.cached[index] = self._decoding.admit(number, prompt, config, text, seed_offset=index % writing.n)
            self.counts.prompt_tokens += len(prompt)
            self.counts.cached_tokens += writing.cached[index]

    def _is_being_read(self, writing: Writing, index: int) -> bool:
        numbers = {number for number, running in self._running.items() if running[:2] == (writing, index)}
        return any(row.is_new for row in self._rows.live if row.number in numbers)

    def _step(self) -> None:
        start = time.perf_counter()
        events = self._decoding.step()
        self.counts.steps += 1
        self.counts.step_seconds += time.perf_counter() - start
        urgent, now = False, time.monotonic()
        found = [(event.number, event, None) for event in events]
        found += [(number, None, error) for number, error in self._errors]
        self._errors.clear()
        for number, event, error in found:
            writing, index, _ = self._running[number]
            if event is None or event.end is not None:
                del self._running[number]
                urgent = True
            self.counts.new_tokens += event is not None and event.token is not None
            self._note(writing, Told(index, event, error, now))
            if writing.streams and not writing.begun:
                urgent = writing.begun = True
        interval = min(MOST_TELLING_SECONDS, TELLING_SECONDS * max(1, len(self._running) / 4))
        if urgent or now - self._told > interval:
            self._tell(now)

    def _note(self, writing: Writing, told: Told) -> None:
        """Have something told the next time."""
        self._news.setdefault(id(writing), (writing, []))[1].append(told)

    def _tell(self, now: float) -> None:
        """Hand over what is new. Each time wakes the other thread, which takes a core from the model's: so a text's
        first piece goes at once, and its last, and what is between in pieces that a reader does not notice, larger ones
        where many texts are written."""
        self._told, news = now, self._news
        self._news = {}
        for writing, told in news.values():
            writing.deliver(writing, told)

    def _refuse(self, number: int, error: InputError) -> None:
        self._errors.append((number, error))

    def _fail(self, error: BaseException) -> None:
        """Tell everybody, and end."""
        with self._changed:
            self.fault = error
        self._tell_all(RuntimeError(f"the model failed: {first_line(error)}"))
        self._on_fault()


@torch.inference_mode()
def prompt_logprobs(
    engine: Engine, ids: Sequence[int], likely: int
) -> list[tuple[float, list[tuple[int, float]] | None] | None]:
    """The log-probability of each of a prompt's tokens given those before it, and the likeliest; None for the first."""
    if len(ids) < 2:
        return [None] * len(ids)
    cache = KVCache(engine.config, 1, engine.config.max_seq_len, device=engine.device, dtype=engine.dtype)
    hidden = engine.hidden_states(torch.tensor([list(ids[:-1])], device=engine.device), cache)[0]
    told: list[tuple[float, list[tuple[int, float]] | None] | None] = [None]
    for begin in range(0, len(hidden), PROMPT_TOKENS):  # the logits of a long prompt may be gigabytes
        end = begin + PROMPT_TOKENS
        told += told_logprobs(engine.output(hidden[begin:end]).float(), ids[begin + 1 : end + 1], likely)
    return told

"""Compiled code of a model: loaded where it is kept, else made in the background."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

from model.errors import InputError, first_line
from model.generation.compiled_step import NO_COMPILER, CompiledFiles, Compiler
from model.model import Transformer

T = TypeVar("T")

ATTEMPTS = 2  # at compiling in the background; the first may have been killed


class KeptCode(Generic[T]):
    """Some compiled code of a model.

    Args:
        job: the model, whether its matrices are int8, and the dtype of the cache.
        kinds: of compiled code (see `CompiledFiles`).
        what: names it in messages.
        load: makes of the files what is called. Raises RuntimeError or OSError: a file is damaged.
        say: called with a line on each choice.
    """

    def __init__(
        self,
        job: tuple[Transformer, bool, torch.dtype],
        kinds: Iterable[str],
        what: str,
        load: Callable[[CompiledFiles], T],
        say: Callable[[str], None],
    ) -> None:
        self.files = CompiledFiles.of(*job, kinds)
        self._job, self._what, self._load_files, self._say = job, what, load, say
        self.compiler: Compiler | None = None  # while one runs in the background
        self._loaded: T | None = None
        self._attempts, self._given_up = 0, False

    def make(self, takes: str) -> None:
        """Compile it, and wait, if it is not there.

        Args:
            takes: how long, in words.

        Raises:
            InputError: it cannot be compiled.
        """
        if self._loaded is not None or self.files.exist():
            return
        self._say(f"compiling {self._what}, once for this shape and machine: {takes}")
        try:
            problem = self._new_compiler().wait()
        except OSError as error:
            problem = first_line(error)
        if problem is not None:
            raise InputError(f"compile: {self._what} cannot be compiled ({problem}); omit --compile")

    def get(self, worth_making: bool = False) -> T | None:
        """The code; None where there is none, or not yet.

        Args:
            worth_making: start compiling it in the background, if it is not there.
        """
        if self._loaded is None and not self._given_up:
            self._poll()
            if self.compiler is None and not self._given_up:
                if self.files.exist():
                    self._load()
                elif self._attempts < ATTEMPTS and worth_making:
                    self._start()
        return self._loaded

    def _poll(self) -> None:
        """Take note of a background compiler that has ended; after its last failure, give up."""
        if self.compiler is None or self.compiler.running:
            return
        problem, self.compiler = self.compiler.problem(), None
        if problem is not None:
            self._note_failure(problem, last=problem == NO_COMPILER or self._attempts == ATTEMPTS)

    def _start(self) -> None:
        self._attempts += 1
        try:
            self.compiler = self._new_compiler()
        except OSError as error:  # a cache that cannot be written, no memory for a process
            self._note_failure(first_line(error), last=True)
            return
        if self._attempts == 1:
            self._say(
                f"decoding: {self._what} is being compiled in the background, and kept for later; eager until then"
            )

    def _note_failure(self, problem: str, last: bool) -> None:
        self._say(f"decoding: eager; compiling {self._what} failed ({problem}){'' if last else ', trying once more'}")
        self._given_up = last

    def _new_compiler(self) -> Compiler:
        return Compiler(*self._job, self.files)

    def _load(self) -> None:
        try:
            self._loaded = self._load_files(self.files)
            self._say(f"decoding: {self._what}, compiled, kept in {self.files.folder}")
        except (RuntimeError, OSError) as error:  # damaged; eager code does the same
            self._say(f"decoding: eager; {self._what} as compiled cannot be used and is deleted ({first_line(error)})")
            self.files.delete()
            self._given_up = True

"""Runs the forward pass: on a GPU the model itself; on a CPU a packed copy of its weights, or compiled code.

`Engine.__init__` chooses packed or int8 weights, `Engine.choose_decoder` eager or compiled code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.errors import InputError, first_line
from model.generation.checksum import checksum
from model.generation.compiled_step import NO_COMPILER, Compiled, CompiledAttention, CompiledFiles, Compiler
from model.generation.inference_model import InferenceModel
from model.kv_cache import KVCache
from model.LMConfig import LMConfig
from model.model import Transformer

WORTH_COMPILING = 500  # eager steps, after which more are likely to follow
ATTEMPTS = 2  # at compiling in the background; the first may have been killed


class Engine:
    """The forward pass that `Rows` calls.

    Args:
        model: on a CPU its weights are copied: make a new engine when they change (see `fits`). A model in training
            mode stays in it, but no dropout is applied.
        int8: hold the matrices as int8 with a scale for each row; on a CPU.
        compile: on a CPU, whether compiled code decodes (see `decode_step.py`). True: wait for it; False: never; None:
            use it as soon as it exists (it is compiled in the background for a chat and after long texts), except for
            texts that must be repeatable.
        say: called with a line on each choice.

    Raises:
        InputError: int8 or compiled code on a GPU, or `compile` is True and compiling fails.
    """

    def __init__(
        self,
        model: Transformer,
        int8: bool = False,
        compile: bool | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        on_cpu = model.device.type == "cpu"
        if (int8 or compile) and not on_cpu:
            raise InputError(f"int8 and compiled code are for CPUs; the model is on {model.device}")
        self._weights = _identity(model)
        self._model, self._int8, self._compile, self._say = model, int8, compile, say
        self._module = model
        if on_cpu:
            self._module = InferenceModel(model, int8)
            self._module.try_layouts(say)
        self._compiled: Compiled | None = None
        self._files: CompiledFiles | None = None  # None: there will be no compiled code
        self._compiler: Compiler | None = None  # while one runs
        self._attempts = 0
        self._eager_steps = 0
        if on_cpu and compile is not False:
            self._files = CompiledFiles.of(model, int8, self.dtype)
            if compile and not self._files.exist():
                say("compiling the decode step, once for this shape and machine: half a minute or so")
                try:
                    problem = self._new_compiler().wait()
                except OSError as error:
                    problem = first_line(error)
                if problem is not None:
                    raise InputError(f"compile: the decode step cannot be compiled ({problem}); omit --compile")

    def fits(self, model: Transformer, int8: bool, compile: bool | None) -> bool:
        """Whether this engine has that model's present weights and these settings; reads all weights once."""
        same = self._model is model and self._int8 == int8 and self._compile == compile
        return same and self._weights == _identity(model)

    @property
    def config(self) -> LMConfig:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._module.dtype

    def hidden_states(
        self, tokens: Tensor, cache: KVCache, compiled_attention: CompiledAttention | None = None
    ) -> Tensor:
        """As Transformer.hidden_states.

        Args:
            compiled_attention: for a batch of several rows with one token each; None: eager attention.
        """
        if compiled_attention is not None:
            return self._module.hidden_states(tokens, cache, compiled_attention)
        self._eager_steps += tokens.shape[1] == 1
        with evaluating(self._module):
            return self._module.hidden_states(tokens, cache)

    def output(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] -> logits [..., V]."""
        return self._module.output(hidden)

    def choose_decoder(self, repeatable: bool, more_to_come: bool = False) -> Compiled | None:
        """The compiled code, or None for eager code. Loads compiled code that exists, and starts compiling if it pays.

        Args:
            repeatable: the text must not depend on whether compiled code exists yet.
            more_to_come: many tokens will follow, as in a chat: compiling pays.
        """
        if self._files is None or (repeatable and not self._compile):
            return None
        if self._compiled is None:
            self._poll_compiler()
            if self._files is not None and self._compiler is None:
                if self._files.exist():
                    self._load()
                elif self._attempts < ATTEMPTS and (more_to_come or self._eager_steps >= WORTH_COMPILING):
                    self._compile_in_background()
        return self._compiled

    def _poll_compiler(self) -> None:
        """Take note of a background compiler that has ended; after its last failure, give up compiled code."""
        if self._compiler is None or self._compiler.running:
            return
        problem, self._compiler = self._compiler.problem(), None
        if problem is not None:
            self._note_failure(problem, last=problem == NO_COMPILER or self._attempts == ATTEMPTS)

    def _compile_in_background(self) -> None:
        self._attempts += 1
        try:
            self._compiler = self._new_compiler()
        except OSError as error:  # a cache that cannot be written, no memory for a process
            self._note_failure(first_line(error), last=True)
            return
        if self._attempts == 1:
            self._say("decoding: eager; a faster, compiled step is being made in the background and kept for later")

    def _note_failure(self, problem: str, last: bool) -> None:
        self._say(f"decoding: eager; compiling the step failed ({problem}){'' if last else ', trying once more'}")
        if last:
            self._files = None

    def _new_compiler(self) -> Compiler:
        return Compiler(self._model, self._int8, self.dtype, self._files)

    def _load(self) -> None:
        try:
            self._compiled = self._files.load(self._model, self._int8)
            self._say(f"decoding: a compiled step, kept in {self._files.step.parent}")
        except (RuntimeError, OSError) as error:  # damaged; eager code does the same
            self._say(f"decoding: eager; the compiled step cannot be used and is deleted ({first_line(error)})")
            self._files.delete()
            self._files = None


@contextmanager
def evaluating(model: Transformer | InferenceModel) -> Iterator[None]:
    """Switch dropout off within the block; afterwards each module is back in its mode."""
    training = [module for module in model.modules() if module.training] if isinstance(model, Transformer) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _identity(model: Transformer) -> tuple[torch.device, bytes]:
    """Changes when any weight does. PyTorch's version counter would miss changes through `weight.data`."""
    return model.device, checksum(model)

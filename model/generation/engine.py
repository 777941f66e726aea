"""Runs the forward pass: on a GPU the model itself; on a CPU a packed copy of its weights, or compiled code.

`Engine.__init__` chooses packed or int8 weights, `Engine.choose_decoder` eager or compiled code on a CPU, and
`Engine.graph_steps` graphs on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from model import accelerator
from model.errors import InputError
from model.generation.checksum import checksum
from model.generation.compiled_step import (
    GROUPS,
    SINGLE,
    Compiled,
    CompiledAttention,
    CompiledFiles,
    CompiledGroup,
    CompiledStep,
    kept_path,
)
from model.generation.decode_graph import GraphSteps
from model.generation.inference_model import InferenceModel
from model.generation.kept_code import KeptCode
from model.generation.trial import fastest_way
from model.kv_cache import SPARE, KVCache, StepCache, cache_bytes
from model.LMConfig import LMConfig
from model.model import Transformer

WORTH_COMPILING = 500  # steps that compiled code would have made faster, after which more are likely to follow
TRIED_TEXTS = (4, 8, 16, 32)  # with which groups are tried; for more, products of all are faster everywhere
TRIED_LENGTH = 32  # tokens
TRIED_BYTES = 1 << 30  # of keys and values
CLEARLY = 1.05  # times faster groups must be
MOST_COMPILED = 64  # steps of a GPU for different numbers of texts and slots, in a process


class Engine:
    """The forward pass that `Rows` calls.

    Args:
        model: on a CPU its weights are copied: make a new engine when they change (see `fits`). A model in training
            mode stays in it, but no dropout is applied.
        int8: hold the matrices as int8 with a scale for each row; on a CPU.
        compile: on a CPU, whether compiled code decodes (see `decode_step.py`). True: wait for it; False: never; None:
            use it as soon as it exists (it is compiled in the background for a chat and after long texts), except for
            texts that must be repeatable. On a GPU that has graphs, True: compile a step before it is captured; False:
            launch kernels one by one; None: capture them as they are.
        say: called with a line on each choice.

    Raises:
        InputError: int8 or compiled code on a device that has none, or `compile` is True and compiling fails.
    """

    def __init__(
        self,
        model: Transformer,
        int8: bool = False,
        compile: bool | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        graph_type = _graph_type(model.device)
        on_cpu = model.device.type == "cpu" and graph_type is None
        if int8 and not on_cpu:
            raise InputError(f"int8 is for CPUs; the model is on {model.device}")
        if compile and not can_compile(model.device):
            raise InputError(f"compiled code is for CPUs and CUDA GPUs; the model is on {model.device}")
        self._weights = _identity(model)
        self._model, self._int8, self._compile, self._say = model, int8, compile, say
        self._module = model
        if on_cpu:
            self._module = InferenceModel(model, int8)
            self._module.try_layouts(say)
        self._graph_type = None if compile is False else graph_type
        self._memory = [] if self._graph_type is None else _memory(model)  # that graphs read
        self._told_graphs = False
        self._next_logits = _next_logits
        if compile and not on_cpu:
            say("compiling the step of a token, anew for other numbers of texts: a minute or so each time")
            many = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED)
            self._next_logits = many(torch.compile(_next_logits, fullgraph=True, dynamic=False))
        self._slow_steps = 0
        self._single: KeptCode[Compiled] | None = None  # None: there will be no compiled code
        if on_cpu and compile is not False:
            job = model, int8, self.dtype
            self._single = KeptCode(job, SINGLE, "the decode step", self._load_single, say)
            self._groups = KeptCode(job, GROUPS, "the step of several texts", self._load_groups, say)
            if compile:
                self._single.make("half a minute or so")

    def fits(self, model: Transformer, int8: bool, compile: bool | None) -> bool:
        """Whether this engine has that model's present weights and these settings; reads all weights once."""
        same = self._model is model and self._int8 == int8 and self._compile == compile
        moved = self._memory and [t.data_ptr() for t in self._memory] != [t.data_ptr() for t in _memory(model)]
        return same and not moved and self._weights == _identity(model)

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
        self._slow_steps += tokens.shape[1] == 1
        if compiled_attention is not None:
            return self._module.hidden_states(tokens, cache, compiled_attention)
        with evaluating(self._module):
            return self._module.hidden_states(tokens, cache)

    def output(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] -> logits [..., V]."""
        return self._module.output(hidden)

    def choose_decoder(self, repeatable: bool, more_to_come: bool = False, several: bool = False) -> Compiled | None:
        """The compiled code, or None for eager code. Loads compiled code that exists, and starts compiling if it pays.

        Args:
            repeatable: the text must not depend on whether compiled code exists yet.
            more_to_come: many tokens will follow, as in a chat: compiling pays.
            several: for several texts at once too.

        Raises:
            InputError: the code for several is to be waited for, and cannot be compiled.
        """
        if self._single is None or (repeatable and not self._compile):
            return None
        worth_it = more_to_come or self._slow_steps >= WORTH_COMPILING
        if (single := self._single.get(worth_it)) is None or not several:
            return single
        if self._compile:
            self._groups.make("a minute or a few")
        return self._groups.get(worth_it) or single

    def graph_steps(self, cache: KVCache, ids: Tensor) -> GraphSteps | None:
        """The steps of a Rows' texts as graphs; None: there are none, kernels are launched one by one.

        Args:
            cache, ids: as GraphSteps takes them.

        Raises:
            InputError: there are none, but compiled ones are asked for.
        """
        if self._graph_type is not None and (problem := _cannot_capture(self._model)) is not None:
            self._note_graphs(problem)
        if self._graph_type is None:
            return None
        few = bool(self._compile)  # each takes long to compile
        vocab_size, note = self.config.vocab_size, self._note_graphs
        return GraphSteps(self._token_logits, self._graph_type, cache, ids, vocab_size, note, few)

    def _token_logits(self, tokens: Tensor, cache: StepCache) -> Tensor:
        """int64 [B, 1] -> logits of the next tokens [B, V]."""
        with evaluating(self._model):
            return self._next_logits(self._model, tokens, cache)

    def _note_graphs(self, problem: str | None) -> None:
        """Say once that there are graphs, or, with a problem, that there are none any more.

        Raises:
            InputError: a problem, but compiled graphs are asked for.
        """
        if problem is not None and self._compile and not self._told_graphs:
            raise InputError(f"compile: a step cannot be compiled as a graph ({problem}); omit --compile")
        if problem is not None and self._graph_type is not None:
            self._say(f"decoding: kernels are launched one by one, since there is no graph of them ({problem})")
            self._graph_type = None
        elif problem is None and not self._told_graphs:
            self._say("decoding: a token's kernels are launched together, as a graph")
            self._told_graphs = True

    def _load_single(self, files: CompiledFiles) -> Compiled:
        paths = dict(files.paths)
        attention = CompiledAttention(paths["attention"], self._model)
        return Compiled(CompiledStep(paths["step"], self._model, self._int8), attention)

    def _load_groups(self, files: CompiledFiles) -> Compiled:
        single = self._single.get()
        tensors = single.step.tensors
        groups = tuple(CompiledGroup(path, GROUPS[kind], self.config, tensors) for kind, path in files.paths)
        code = single._replace(groups=groups)
        return code._replace(most=self._most_in_groups(code))

    def _most_in_groups(self, code: Compiled) -> int:
        """Up to how many texts groups are faster than products of all texts at once, found by trying."""
        slots = self.config.max_seq_len + SPARE
        fitting = max(TRIED_TEXTS[0], TRIED_BYTES // (cache_bytes(self.config, self.dtype) * slots))
        tried = [texts for texts in TRIED_TEXTS if texts <= fitting]
        cache = KVCache(self.config, tried[-1], slots, dtype=self.dtype)
        lengths = [min(TRIED_LENGTH, self.config.max_seq_len - 1)] * tried[-1]

        def at_once(tokens: Tensor) -> None:
            part = cache.part(0, len(tokens))
            part.lengths = lengths[: len(tokens)]
            self.output(self._module.hidden_states(tokens[:, None], part, code.attention)[:, -1])

        def in_groups(tokens: Tensor) -> None:
            cache.lengths = lengths
            code.group_logits(tokens, cache)

        most, dtypes = 1, f"{self._model.dtype}, {self.dtype}"
        for texts in tried:
            kept, tokens = kept_path(f"texts{texts}", self.config, dtypes, self._int8), torch.zeros(texts).long()
            ways = {name: partial(way, tokens) for name, way in (("at once", at_once), ("in groups", in_groups))}
            tell = partial(self._tell_texts, texts)
            with torch.inference_mode():
                if fastest_way(kept, ways, tell, CLEARLY) == "at once":
                    break
            most = texts
        return most

    def _tell_texts(self, texts: int, way: str, times: str) -> None:
        self._say(f"decoding: {texts} texts {way} ({times})")


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


def can_compile(device: torch.device) -> bool:
    """Whether compiled code can decode there."""
    return device.type == "cpu" or (_graph_type(device) is not None and accelerator.kind_of(device).compiles)


def _graph_type(device: torch.device) -> type[accelerator.CUDAGraph] | None:
    return None if accelerator.graph_problem(device) else accelerator.GRAPHS[device.type]


def _next_logits(model: Transformer, tokens: Tensor, cache: StepCache) -> Tensor:
    """int64 [B, 1] -> logits of the next tokens [B, V]."""
    return model.output(model.hidden_states(tokens, cache)[:, -1])


def _cannot_capture(model: Transformer) -> str | None:
    """Why a step of a model is no graph; None: it may be."""
    if not model.config.n_experts:
        return None
    loops = any(layer.feed_forward.experts.way == "loop" for layer in model.layers)
    waits = accelerator.kind_of(model.device).has_grouped_products and model.dtype != torch.bfloat16  # PyTorch's kernel
    return "the experts' products wait to know how many rows each has" if loops or waits else None


def _memory(model: Transformer) -> list[Tensor]:
    """What a step reads: kept, since `Module.to` gives a model other memory."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def _identity(model: Transformer) -> tuple[torch.device, bytes]:
    """Changes when any weight does. PyTorch's version counter would miss changes through `weight.data`."""
    return model.device, checksum(model)

"""What a model's tokens are read with: on a CPU its weights laid out anew, and its compiled step once there is one."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.children import OWN_GROUP
from model.errors import InputError, first_line
from model.generation.compiled_step import CompiledAttention, CompiledStep, compile_attention, compile_step, kept_path
from model.generation.inference_model import InferenceModel
from model.kv_cache import KVCache
from model.LMConfig import LMConfig
from model.model import Transformer

WORTH_COMPILING = 500  # steps after which more are to be expected


class Engine:
    """A Transformer as `Rows` reads with it.

    Args:
        model: not in training mode. Its weights are copied: make a new engine when they change (see `fits`).
        int8: hold the matrices as int8 with a scale for each row; on a CPU.
        compile: on a CPU, whether compiled code reads single tokens (see `compiled_step.py`). True: wait for it;
            False: never; None: where it is on the disk or comes there (it is made in the background for a chat and for
            long texts), except for what must be repeatable.
        say: where the choice between them is told, a line each time it changes.

    Raises:
        InputError: int8 or a compiled step on a GPU, or `compile` is True and it cannot be compiled.
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
        self._weights = _fingerprint(model)
        self._model, self._int8, self._compile, self._say = model, int8, compile, say
        self._reader = InferenceModel(model, int8) if on_cpu else model
        self._step: CompiledStep | None = None
        self._attention: CompiledAttention | None = None
        self._paths: tuple[Path, Path] | None = None  # of step and attention; None: there will be none
        self._compiler: BackgroundCompiler | None = None
        self._steps = 0
        if on_cpu and compile is not False:
            self._paths = (
                kept_path("step", model.config, model.dtype, int8),
                kept_path("attention", model.config, self.dtype, False),
            )
            if compile and not self._on_disk():
                say("compiling the decode step, once for this shape and machine: half a minute or so")
                self._new_compiler().wait()

    def fits(self, model: Transformer, int8: bool, compile: bool | None) -> bool:
        """Whether this is an engine of that model, with the weights that it has now."""
        return (self._int8, self._compile) == (int8, compile) and self._weights == _fingerprint(model)

    @property
    def config(self) -> LMConfig:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._reader.dtype

    def hidden_states(self, tokens: Tensor, cache: KVCache, repeatable: bool = True) -> Tensor:
        """As Transformer.hidden_states.

        Args:
            repeatable: compute them the same way each time, whether or not compiled code is there by now.
        """
        if tokens.shape[0] > 1 == tokens.shape[1] and self._may_use_compiled(repeatable):
            return self._reader.hidden_states(tokens, cache, self._attention)
        return self._reader.hidden_states(tokens, cache)

    def output(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] -> logits [..., V]."""
        return self._reader.output(hidden)

    def step(self, repeatable: bool) -> CompiledStep | None:
        """The compiled step for the next token of a single text, if it is there and to be used."""
        return self._step if self._may_use_compiled(repeatable) else None

    def expect_more(self) -> None:
        """Many more tokens will be written: have what reads them compiled meanwhile."""
        if self._paths is None or self._step is not None or self._compiler is not None or self._on_disk():
            return
        self._compiler = self._new_compiler()
        self._say("decoding: eager; a compiled step, which is faster, is made in the background and kept for later")

    def _on_disk(self) -> bool:
        return all(path.exists() for path in self._paths)

    def _new_compiler(self) -> "BackgroundCompiler":
        return BackgroundCompiler(self._model, self._int8, self.dtype, *self._paths)

    def _may_use_compiled(self, repeatable: bool) -> bool:
        """Whether there is compiled code for a step that eager code could take."""
        if self._paths is None or (repeatable and not self._compile):
            return False
        self._steps += 1
        return self._step is not None

    def look_for_compiled(self, repeatable: bool) -> None:
        """Use compiled code from now on if it is there. When a text begins: no text changes on its way."""
        if self._paths is None or self._step is not None or (repeatable and not self._compile):
            return
        if self._steps >= WORTH_COMPILING:
            self.expect_more()
        if self._compiler is not None:
            if not self._compiler.done():
                return
            if self._compiler.problem is not None:
                self._say(f"decoding: eager; the step could not be compiled ({self._compiler.problem})")
                self._paths = None
                return
        if self._on_disk():
            step, attention = self._paths
            try:
                self._attention = CompiledAttention(attention, self._model)
                self._step = CompiledStep(step, self._model, self._int8)
                self._say(f"decoding: a compiled step, kept in {step.parent}")
            except (RuntimeError, OSError) as error:  # a damaged file; it is only the faster way
                self._say(f"decoding: eager; what was compiled cannot be used and is deleted ({first_line(error)})")
                for path in self._paths:
                    path.unlink(missing_ok=True)
                self._paths = None


class BackgroundCompiler:
    """A process of low priority that compiles a model's step and attention into files; it ends with this one."""

    def __init__(self, model: Transformer, int8: bool, cache_dtype: torch.dtype, step: Path, attention: Path) -> None:
        step.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        job = {
            "config": dataclasses.asdict(model.config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "cache_dtype": str(cache_dtype).removeprefix("torch."),
            "int8": int8,
            "step": str(step),
            "attention": str(attention),
            "threads": torch.get_num_threads(),
        }
        self.problem: str | None = None
        self._errors = tempfile.TemporaryFile()
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model.generation.engine", json.dumps(job)],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            **OWN_GROUP,
        )
        weakref.finalize(self, self._process.kill)

    def done(self) -> bool:
        """Whether it has ended; `problem` then says why without a file, if so."""
        if self._process.poll() is None:
            return False
        if self._process.returncode and self.problem is None:
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            self.problem = lines[-1][:200] if lines else f"exit code {self._process.returncode}"
            if "InvalidCxxCompiler" in self.problem:
                self.problem = "there is no C++ compiler"
        return True

    def wait(self) -> None:
        """Wait for the file.

        Raises:
            InputError: it could not be made.
        """
        self._process.wait()
        self.done()
        if self.problem is not None:
            raise InputError(f"compile: the decode step could not be compiled ({self.problem}); leave --compile away")


def _fingerprint(model: Transformer) -> list:
    """Changes when a weight does."""
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]


def _main() -> None:
    job = json.loads(sys.argv[1])
    if hasattr(os, "nice"):
        os.nice(10)
    torch.set_num_threads(job["threads"])
    with contextlib.suppress(KeyboardInterrupt):
        config, dtype = LMConfig(**job["config"]), getattr(torch, job["dtype"])
        compile_attention(config, getattr(torch, job["cache_dtype"]), Path(job["attention"]))
        compile_step(config, dtype, job["int8"], Path(job["step"]))


if __name__ == "__main__":
    _main()

"""Compiled code for generating on a CPU: where it is kept, how it is made in another process, and how it runs.

python -m model.generation.compiled_step JOB    what `Compiler` starts
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.children import OWN_GROUP, when_parent_ends
from model.generation import decode_step
from model.generation.decode_step import DecodeStep, compile_attention, compile_group, compile_step
from model.kv_cache import SPARE, KVCache
from model.LMConfig import LMConfig
from model.model import Transformer
from model.storage.files import cache_folder

ROOT = Path(__file__).resolve().parents[2]  # which holds the package `model`
NO_COMPILER = "there is no C++ compiler"


class CompiledStep:
    """A compiled DecodeStep with a model's weights, and the keys and values of one text.

    Attributes:
        owner: the Rows whose text it holds; set by them.
        tensors: the weights, by name.
    """

    def __init__(self, path: Path, model: Transformer, int8: bool = False) -> None:
        step = DecodeStep(model, int8)
        config, slots = model.config, model.config.max_seq_len + SPARE
        self.owner: object = None
        self.keys = torch.zeros(config.n_layers, config.n_kv_heads, config.head_dim, slots)
        self.values = torch.zeros(config.n_layers, config.n_kv_heads, slots, config.head_dim)
        for cache, keys, values in zip(step.caches, self.keys, self.values, strict=True):
            cache.keys, cache.values = keys, values
        self._places = torch.zeros(config.max_seq_len)
        self.tensors = dict(step.named_buffers(remove_duplicate=False))  # compiled code keeps only pointers
        self._function = _loaded(path, self.tensors)

    def copy_from(self, cache: KVCache, begin: int, end: int) -> None:
        """Copy slots begin:end of row 0 of a cache."""
        if begin < end:
            self.keys[..., begin:end] = cache.keys[:, 0, :, begin:end].transpose(-1, -2)
            self.values[:, :, begin:end] = cache.values[:, 0, :, begin:end]

    def __call__(self, token: Tensor, cache: KVCache) -> Tensor:
        """The logits that follow `token`: int64 [1] -> float32 [V]. Row 0 of the cache holds it afterwards."""
        place = cache.lengths[0]
        logits = self._function.boxed_run([token, torch.tensor([place]), self._places[: place + 1]])[0]
        cache.keys[:, 0, :, place] = self.keys[..., place]
        cache.values[:, 0, :, place] = self.values[:, :, place]
        cache.lengths[0] = place + 1
        return logits


class CompiledGroup:
    """A compiled GroupStep with a model's weights.

    Args:
        rows: texts of the group.
        tensors: the weights, which a CompiledStep has.
    """

    def __init__(self, path: Path, rows: int, config: LMConfig, tensors: dict[str, Tensor]) -> None:
        self.rows, self._tensors = rows, tensors
        self._places = torch.arange(config.max_seq_len)
        self._function = _loaded(path, tensors)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The logits that follow a token of each of the cache's first rows: int64 [n] -> float32 [n, V]. The cache has
        `rows` rows, which hold the tokens afterwards."""
        texts = len(tokens)
        empty = self.rows - texts
        positions = torch.tensor(cache.lengths[:texts] + [cache.capacity - 1] * empty)
        tokens = torch.cat((tokens, tokens.new_zeros(empty))) if empty else tokens
        layers = [layer for pair in zip(cache.keys, cache.values, strict=True) for layer in pair]
        places = self._places[: max(cache.lengths[:texts]) + 1]
        return self._function.boxed_run([tokens, positions, places, *layers])[0][:texts]


class CompiledAttention:
    """A compiled BatchAttention, for all layers."""

    def __init__(self, path: Path, model: Transformer) -> None:
        self._function = _loaded(path)
        self._places = torch.arange(model.config.max_seq_len)

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, longest: int, keys: Tensor, values: Tensor
    ) -> Tensor:
        """As BatchAttention, `longest` being the largest position."""
        return self._function.boxed_run([qkv, cos, sin, positions, self._places[: longest + 1], keys, values])[0]


def _loaded(path: Path, tensors: Mapping[str, Tensor] | None = None):
    """A compiled function, which uses these tensors where they are: they must be kept."""
    # What torch._inductor.aoti_load_package wraps: importing that takes a second, and its wrapper 50 µs a call.
    function = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    if tensors is not None:
        own = {name: tensors[name] for name in function.get_constant_fqns()}
        function.load_constants(own, use_inactive=False, check_full_update=True, user_managed=True)
    return function


class Compiled(NamedTuple):
    """The compiled code of a model."""

    step: CompiledStep  # for one text
    attention: CompiledAttention  # for several
    groups: tuple[CompiledGroup, ...] = ()  # for a few, the smallest first
    most: int = 1  # texts that groups continue faster than oneDNN's products with `attention`

    def group_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The logits that follow a token of each of a cache's first rows, by groups: int64 [n] -> float32 [n, V]. The
        cache has rows for whole groups; its lengths stay."""
        parts, begin = [], 0
        while begin < len(tokens):
            left = len(tokens) - begin
            group = next((group for group in self.groups if group.rows >= left), self.groups[-1])
            parts.append(group(tokens[begin : begin + group.rows], cache.part(begin, begin + group.rows)))
            begin += group.rows
        return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------- the files


SINGLE = ("step", "attention")  # kinds of compiled code
ATTENTION_FIELDS = ("n_heads", "n_kv_heads", "head_dim", "max_seq_len")  # of LMConfig: what "attention" depends on
GROUPS = {f"group{rows}": rows for rows in (4, 8)}  # kinds, and their texts


@dataclass(frozen=True)
class CompiledFiles:
    """Where kinds of compiled code for a shape are kept, there or not, for this machine and these versions of the code
    and of PyTorch."""

    paths: tuple[tuple[str, Path], ...]

    @classmethod
    def of(
        cls, model: Transformer, int8: bool, cache_dtype: torch.dtype, kinds: Iterable[str] = SINGLE
    ) -> "CompiledFiles":
        """Those for a model of this shape and dtype."""
        paths = []
        for kind in kinds:
            attends_only = kind == "attention"
            dtype = f"{cache_dtype}" if attends_only else f"{model.dtype}, {cache_dtype}"
            paths.append((kind, kept_path(kind, model.config, dtype, int8 and not attends_only)))
        return cls(tuple(paths))

    @property
    def folder(self) -> Path:
        return self.paths[0][1].parent

    def exist(self) -> bool:
        return all(os.path.exists(path) for _, path in self.paths)  # False for a folder that may not be read

    def delete(self) -> None:
        for _, path in self.paths:
            path.unlink(missing_ok=True)


def kept_path(kind: str, config: LMConfig, dtype: torch.dtype | str, int8: bool) -> Path:
    """The file that holds one kind of compiled code; its name is a hash of all that the code depends on.

    Args:
        dtype: those of the weights and the cache.
    """
    shape = {**dataclasses.asdict(config), "dropout": 0, "flash_attn": True}
    if kind == "attention":
        shape = {name: getattr(config, name) for name in ATTENTION_FIELDS}
    parts = [json.dumps(shape), str(dtype), str(int8), torch.__version__, str(torch.get_num_threads()), _processor()]
    parts += [text for _, text in sorted(sources_of(decode_step.__name__).items())]
    return cache_folder() / f"{kind}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.pt2"


@functools.cache
def sources_of(module: str) -> dict[str, str]:
    """The source of a module and of all of ours that it imports, directly or not, by name."""
    package = module.partition(".")[0]
    sources, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # `from module import name`, where the name is no module
            spec = None
        if name in sources or spec is None or spec.origin is None:
            continue
        sources[name] = Path(spec.origin).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(sources[name])):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [name for name in names if name.partition(".")[0] == package]
    return sources


def _processor() -> str:
    """The instructions of this machine's processor, on which compiled code depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


# ------------------------------------------------------------------------------------------------- the compiler


class Compiler:
    """A process of low priority that compiles a model's code into its files; it ends with this process, even if that
    is killed.

    Ctrl-C in the terminal does not reach it: the user stops an answer with it, and did not start this.

    Raises:
        OSError: the folder cannot be written, or the process cannot be started.
    """

    def __init__(self, model: Transformer, int8: bool, cache_dtype: torch.dtype, files: CompiledFiles) -> None:
        files.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        job = {
            "config": dataclasses.asdict(model.config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "cache_dtype": str(cache_dtype).removeprefix("torch."),
            "int8": int8,
            "paths": {kind: str(path) for kind, path in files.paths},
            "threads": torch.get_num_threads(),
            "parent": os.getpid(),
        }
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model.generation.compiled_step", json.dumps(job)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            **OWN_GROUP,
        )
        weakref.finalize(self, _kill, self._process)

    def wait(self) -> str | None:
        """Wait for the files; returns as `problem`."""
        self._process.wait()
        return self.problem()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def problem(self) -> str | None:
        """Why the process that ended made no files, in a few words; None: it made them."""
        code = self._process.returncode
        if not code:
            return None
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        if lines and "InvalidCxxCompiler" in lines[-1]:
            return NO_COMPILER
        if lines:
            return lines[-1][:200]
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _kill(process: subprocess.Popen) -> None:
    """End the compiler, and the C++ compiler that it started."""
    if process.poll() is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _end_with_compilers() -> None:
    """End this process and the C++ compilers that it started."""
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)  # a group that began with this process
    os._exit(1)


def _main() -> None:
    job = json.loads(sys.argv[1])
    when_parent_ends(job["parent"], _end_with_compilers)
    if hasattr(os, "nice"):
        os.nice(10)
    torch.set_num_threads(job["threads"])
    with contextlib.suppress(KeyboardInterrupt):
        config, int8 = LMConfig(**job["config"]), job["int8"]
        dtype, cache_dtype = (getattr(torch, job[name]) for name in ("dtype", "cache_dtype"))
        for kind, name in job["paths"].items():
            path = Path(name)
            if path.exists():  # another process was faster
                continue
            if kind == "attention":
                compile_attention(config, cache_dtype, path)
            elif kind == "step":
                compile_step(config, dtype, int8, path)
            else:
                compile_group(config, dtype, int8, cache_dtype, GROUPS[kind], path)


if __name__ == "__main__":
    _main()

"""Every format of weights: how it is recognised, read and written. A new one is a module and an entry in FORMATS."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from model.errors import InputError
from model.storage.gguf_header import is_gguf
from model.storage.parts import load_parted
from model.weights.gguf import MATRIX_TYPES, load_gguf, save_gguf
from model.weights.llama2c import (
    is_llama2c_bin,
    load_llama2c,
    read_llama2c_checkpoint,
    save_llama2c,
    save_llama2c_checkpoint,
)
from model.weights.meta_folder import PARAMS, PARTS, is_meta_folder, load_meta_folder, save_meta_folder
from model.weights.own_files import companions, load_own, save_own
from model.weights.transformers_folder import (
    CONFIG,
    MATRIX_DTYPES,
    is_transformers,
    load_transformers_path,
    save_transformers,
)
from model.weights.weights import Weights


class Source:
    """A file or folder to read weights from."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @functools.cached_property
    def content(self) -> dict:
        """Of a pickled file, which is read once however many formats look at it.

        Raises:
            InputError: as `load_parted`, or the path is a folder.
        """
        if self.path.is_dir():
            markers = sorted(f"{known.marker} ({known.title})" for known in FORMATS.values() if known.marker)
            ours = "pretrain_*.pth or best_model.pth (MateConv)"
            raise InputError(f"{self.path}: no weights in this folder; {ours}, {' or '.join(markers)} expected")
        return load_parted(self.path)


class Format(NamedTuple):
    """A format of weights.

    Attributes:
        title: of the program that owns it, for messages.
        recognise: whether a source is in this format; decides by names and first bytes, or by `Source.content`.
        load: raises InputError if the source is damaged or the model unsupported.
        save: called with target, weights, dtype and default sampling options; returns remarks for the user, or None.
        readers: programs that read what is written, for messages.
        suffix: of a target in this format, "" for a folder; None: only --to selects it.
        marker: the file that shows that a folder is in this format; None: files only.
        dtypes: that matrices can be written in, the default first.
        companions: what `save` writes beside the target.
    """

    title: str
    recognise: Callable[[Source], bool]
    load: Callable[[Source], Weights]
    save: Callable[[Path, Weights, str, Mapping], list[str] | None]
    readers: str
    suffix: str | None = None
    marker: str | None = None
    dtypes: tuple[str, ...] = ("F32",)
    companions: Callable[[Path], tuple[Path, ...]] = lambda target: ()


def _meta_folder(path: Path) -> Path:
    """The folder that a path within one of Meta's releases stands for."""
    return path.parent if path.is_file() and path.match(PARTS) else path


# In the order in which they are tried: those that look at the content of a pickled file come last.
FORMATS = {
    "meta": Format(
        "Meta",
        recognise=lambda source: is_meta_folder(_meta_folder(source.path)),
        load=lambda source: load_meta_folder(_meta_folder(source.path)),
        save=lambda target, weights, dtype, sampling: save_meta_folder(target, weights),
        readers="what reads Meta's params.json and consolidated.00.pth; without a tokenizer",
        marker=PARAMS,
    ),
    "transformers": Format(
        "transformers",
        recognise=lambda source: is_transformers(source.path),
        load=lambda source: load_transformers_path(source.path),
        save=lambda target, weights, dtype, sampling: save_transformers(
            target, weights, MATRIX_DTYPES[dtype], sampling
        ),
        readers="transformers: AutoModelForCausalLM.from_pretrained",
        suffix="",
        marker=CONFIG,
        dtypes=tuple(MATRIX_DTYPES),
    ),
    "gguf": Format(
        "llama.cpp",
        recognise=lambda source: source.path.is_file() and is_gguf(source.path),
        load=lambda source: load_gguf(source.path),
        save=lambda target, weights, dtype, sampling: save_gguf(target, weights, dtype),
        readers="llama.cpp and what builds on it",
        suffix=".gguf",
        dtypes=MATRIX_TYPES,
    ),
    "llama2c": Format(
        "llama2.c",
        recognise=lambda source: is_llama2c_bin(source.path),
        load=lambda source: load_llama2c(source.path),
        save=lambda target, weights, dtype, sampling: save_llama2c(target, weights),
        readers="llama2.c's run; it needs a tokenizer.bin, which cannot express byte-level BPE and is not written",
        suffix=".bin",
    ),
    "llama2c_checkpoint": Format(
        "llama2.c",
        recognise=lambda source: "model_args" in source.content,
        load=lambda source: read_llama2c_checkpoint(source.content, source.path),
        save=lambda target, weights, dtype, sampling: save_llama2c_checkpoint(target, weights),
        readers="llama2.c's Python scripts",
        suffix=".pt",
    ),
    "mateconv": Format(
        "MateConv",
        recognise=lambda source: "progress" in source.content or source.path.with_suffix(".json").is_file(),
        load=lambda source: load_own(source.content, source.path),
        save=lambda target, weights, dtype, sampling: save_own(target, weights),
        readers="MateConv: python inference.py --model_path, python train.py --init_from",
        suffix=".pth",
        companions=companions,
    ),
}

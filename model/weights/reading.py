"""Which program's weights a file or folder holds."""

from pathlib import Path

from model.errors import InputError
from model.weights.load import Weights


def load_foreign(path: Path) -> Weights | None:
    """Weights in another program's format; None where the file is to be read as one of torch's, ours or MiniMind's.

    Raises:
        InputError: it is such a file, but cannot be read.
    """
    from model.weights.gguf import is_gguf, load_gguf
    from model.weights.llama2c import is_llama2c_model, load_llama2c
    from model.weights.meta_folder import is_meta_folder, load_meta_folder
    from model.weights.transformers_folder import load_transformers

    if path.is_dir():
        if is_meta_folder(path):
            return load_meta_folder(path)
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: neither config.json (transformers) nor params.json (Meta) in this folder")
        return load_transformers(path)
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return load_transformers(path.parent, path.name)  # where its config.json lies
    if is_gguf(path):
        return load_gguf(path)
    return load_llama2c(path) if is_llama2c_model(path) else None

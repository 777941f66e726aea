"""Our own file of weights: a plain state dict, `X.pth`, and beside it `X.json` with the shape and the tokenizer."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.storage.archive import save_torch
from model.storage.files import read_json, write_json
from model.weights.names import on_cpu
from model.weights.shapes import read_shape

MAX_SIDECAR_BYTES = 1 << 16
FORMAT_VERSION = 1  # of the JSON beside weights


@dataclass
class Weights:
    """A model's weights with what is needed to use them."""

    state_dict: dict[str, Tensor]
    config: LMConfig
    tokenizer_path: str | None = None  # None: the embedded tokenizer
    tokenizer_sha256: str | None = None  # None: not known
    begins_with_bos: bool = True  # a text is read behind the tokenizer's bos, as in the documents of our token files
    inferred: str | None = None  # what no file says and was read off or assumed, on one line; None: nothing

    def with_state(self, state_dict: dict[str, Tensor]) -> "Weights":
        """The same description of other weights."""
        return replace(self, state_dict=state_dict)


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write `X.pth`, a plain state dict on the CPU in float32, and `X.json` beside it."""
    path = Path(path)
    sidecar = {
        "format_version": FORMAT_VERSION,
        "config": asdict(weights.config),
        "tokenizer_path": weights.tokenizer_path,
        "tokenizer_sha256": weights.tokenizer_sha256,
        "begins_with_bos": weights.begins_with_bos,
    }
    write_json(path.with_suffix(".json"), sidecar)
    save_torch(path, on_cpu(weights.state_dict))


def read_sidecar(path: str | Path) -> tuple[LMConfig, str | None, str | None, bool]:
    """What lies beside weights, `{stem}.json`: the shape, the tokenizer's folder and its SHA-256, and whether texts
    begin with its bos.

    Raises:
        InputError: it is no such file, or holds what no shape or tokenizer has.
    """
    described = read_json(Path(path), MAX_SIDECAR_BYTES)
    try:
        config, *tokenizer = (described[key] for key in ("config", "tokenizer_path", "tokenizer_sha256"))
        if any(value is not None and not isinstance(value, str) for value in tokenizer):
            raise TypeError(f"tokenizer {tokenizer!r}")
        begins_with_bos = described.get("begins_with_bos", True)  # earlier versions knew nothing else
        if not isinstance(begins_with_bos, bool):
            raise TypeError(f"begins_with_bos {begins_with_bos!r}")
    except (LookupError, TypeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")[1:-1]
        raise InputError(
            f"{path}: does not describe weights ({reason}); remove it to have the shape read off"
        ) from error
    return read_shape(config, path), *tokenizer, begins_with_bos

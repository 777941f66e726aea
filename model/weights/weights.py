"""Our own format: `X.pth`, a plain state dict, and beside it `X.json` with the model's shape and tokenizer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import MOST_TOKENS, LMConfig
from model.storage.archive import save_torch
from model.storage.files import read_json, write_json
from model.weights.names import on_cpu
from model.weights.shapes import read_shape

MAX_SIDECAR_BYTES = 8 << 20  # chat templates have a megabyte at most
FORMAT_VERSION = 1  # of the JSON beside weights


@dataclass
class Weights:
    """A model's weights and what is needed to use them."""

    state_dict: dict[str, Tensor]
    config: LMConfig
    tokenizer_path: str | None = None  # None: the embedded tokenizer
    tokenizer_sha256: str | None = None  # None: unknown
    begins_with_bos: bool = True  # a text begins with the tokenizer's bos, as documents in our token files do
    # Of a chat model: `template`, `template_sha256` (hex), and `end_ids`, which end an answer. Empty: it was trained on
    # texts, and continues them. None: unknown.
    chat: dict | None = None
    step: int | None = None  # of the run that saves them; None: unknown
    inferred: str | None = None  # one line on what was inferred because no file says it; None: nothing

    def with_state(self, state_dict: dict[str, Tensor]) -> "Weights":
        """The same description with other weights."""
        return replace(self, state_dict=state_dict)

    def all_ends(self, end_ids: Sequence[int]) -> list[int]:
        """The ids that end a text: the tokenizer's, then those that end an answer."""
        return list(dict.fromkeys([*end_ids, *(self.chat or {}).get("end_ids", [])]))


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write `X.pth`, a plain state dict on the CPU in float32, and `X.json` beside it."""
    path = Path(path)
    sidecar = {
        "format_version": FORMAT_VERSION,
        "config": asdict(weights.config),
        "tokenizer_path": weights.tokenizer_path,
        "tokenizer_sha256": weights.tokenizer_sha256,
        "begins_with_bos": weights.begins_with_bos,
        "chat": weights.chat,
        "step": weights.step,
    }
    write_json(path.with_suffix(".json"), sidecar)
    save_torch(path, on_cpu(weights.state_dict))


def saved_step(path: Path) -> int | None:
    """The step at which a run saved weights, as the description beside them says; None where it does not."""
    try:
        step = read_json(path.with_suffix(".json"), MAX_SIDECAR_BYTES).get("step")
    except InputError:
        return None
    return step if type(step) is int else None


def read_sidecar(path: str | Path) -> tuple[LMConfig, str | None, str | None, bool, dict | None]:
    """The description beside weights: shape, tokenizer's folder and SHA-256, whether texts begin with its bos, and what
    `Weights.chat` holds.

    Raises:
        InputError: the file is damaged or describes no weights.
    """
    described = read_json(Path(path), MAX_SIDECAR_BYTES)
    try:
        config, *tokenizer = (described[key] for key in ("config", "tokenizer_path", "tokenizer_sha256"))
        if any(value is not None and not isinstance(value, str) for value in tokenizer):
            raise TypeError(f"tokenizer {tokenizer!r}")
        begins_with_bos = described.get("begins_with_bos", True)  # earlier versions had no other
        if not isinstance(begins_with_bos, bool):
            raise TypeError(f"begins_with_bos {begins_with_bos!r}")
        chat = checked_chat(described.get("chat"))
    except (LookupError, TypeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")[1:-1]
        raise InputError(
            f"{path}: does not describe weights ({reason}); remove it to have the shape read off"
        ) from error
    return read_shape(config, path), *tokenizer, begins_with_bos, chat


def checked_chat(chat: object) -> dict | None:
    """What was read as `Weights.chat`.

    Raises:
        TypeError: it is something else.
    """
    if chat is None or chat == {}:
        return chat
    kinds = {"template": str, "template_sha256": str, "end_ids": list}
    if not isinstance(chat, dict) or {name: type(value) for name, value in chat.items()} != kinds:
        raise TypeError(f"chat {chat!r}")
    if not chat["end_ids"] or not all(type(index) is int and 0 <= index < MOST_TOKENS for index in chat["end_ids"]):
        raise TypeError(f"end_ids of chat {chat['end_ids']!r}")
    return chat

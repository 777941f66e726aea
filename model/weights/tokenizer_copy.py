"""A tokenizer's folder beside weights: copied as it is, or so that other programs add the bos that ours adds."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from model.errors import InputError
from model.storage.files import read_json, write_json
from model.text.tokenization import EMBEDDED_TOKENIZER, load_tokenizer, tokenizer_folder
from model.weights.weights import Weights

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "tokenizer.model",
)  # fmt: skip


def copy_tokenizer(source: str | Path | None, target: Path) -> None:
    """Copy a tokenizer's files from a folder (None: the embedded one's) into another.

    Raises:
        InputError: as `check_links`.
    """
    folder = tokenizer_folder(source)
    check_links(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def check_links(folder: Path, names: Iterable[str] = FILES) -> None:
    """Check that no file of a folder is a link out of it: an export would leak what lies there.

    In the Hugging Face cache the files of `snapshots/*/` are links into `blobs/`, which are followed.

    Args:
        names: of the files; by default a tokenizer's.

    Raises:
        InputError: one is.
    """
    own = folder.resolve()
    places = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    for file in (folder / name for name in names):
        if file.is_file() and not any((found := file.resolve()).is_relative_to(place) for place in places):
            raise InputError(
                f"{file} is a link to {found}, outside its folder, and is not exported; copy it there first"
            )


def export_tokenizer(weights: Weights, target: Path) -> None:
    """Copy the weights' tokenizer for other programs.

    A model that was trained on documents that begin with the bos expects it before a prompt. transformers leaves it to
    the tokenizer, so one that does not add its bos gets a post-processor that does.

    Raises:
        InputError: as `check_links`.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import Sequence, TemplateProcessing

    copy_tokenizer(weights.tokenizer_path or EMBEDDED_TOKENIZER, target)
    tokenizer = load_tokenizer(target)
    if weights.chat and tokenizer.chat_template != weights.chat["template"]:  # the one that the answers were trained in
        (target / "chat_template.jinja").write_bytes(weights.chat["template"].encode())
    if not weights.begins_with_bos or tokenizer.bos_token_id is None or adds_bos(target):
        return
    bos = tokenizer.bos_token
    template = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    backend = Tokenizer.from_file(str(target / "tokenizer.json"))
    before = backend.post_processor
    backend.post_processor = template if before is None else Sequence([before, template])
    backend.save(str(target / "tokenizer.json"))
    path = target / "tokenizer_config.json"
    write_json(path, read_json(path) | {"add_bos_token": True})


def adds_bos(source: str | Path) -> bool:
    """Whether a tokenizer adds its bos to a text, which shows that its model was trained so.

    The post-processor is read, not run: the library panics on a damaged one.
    """
    tokenizer = load_tokenizer(source)
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None or tokenizer.bos_token_id is None:
        return False
    return _first_ids(json.loads(processor.__getstate__()))[:1] == [tokenizer.bos_token_id]


def _first_ids(processor: dict) -> list[int]:
    """Ids that a post-processor puts before a text."""
    if processor["type"] == "Sequence":
        return next((ids for ids in map(_first_ids, reversed(processor["processors"])) if ids), [])
    if processor["type"] == "TemplateProcessing":
        first = processor["single"][0] if processor["single"] else {}
        token = first.get("SpecialToken", {}).get("id")
        return processor["special_tokens"].get(token, {"ids": []})["ids"]
    return [processor["cls"][1]] if "cls" in processor else []  # BERT's and RoBERTa's

"""What a job leaves beside its output: the manifests, and whether a finished output is still what a job would make."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from model.corpus.job_folder import JobFolder, describe_changes
from model.corpus.merge import DocumentFile
from model.corpus.sources import Source, read_part, stream_parts
from model.dataset import FORMAT_VERSION, file_sha256, manifest_path
from model.errors import InputError
from model.files import write_json

Records = dict[tuple[int, int], dict]  # of the parts, by (source, index), in order


def describe_sources(sources: Sequence[Source], records: Records) -> list[dict]:
    """The manifest's `sources`: name, size, and the SHA-256 of its parts' SHA-256."""
    described = []
    for number, source in enumerate(sources):
        parts = [record["sha256"] for (of, _), record in records.items() if of == number]
        described.append({"name": source.name, "size": source.size, "sha256_of_parts": _digest(parts)})
    return described


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def finish_files(
    folder: JobFolder, main: DocumentFile, validation: DocumentFile, common: dict, processing: dict, summary: dict
) -> None:
    """Write the manifests of the merged files, and the list of all files that are to get their names.

    Args:
        common: what both manifests hold besides counts: sources and, of tokens, dtype and the tokenizer.
        processing: plan and part_bytes.
        summary: the counts.
    """
    made, manifests = [], []
    for file in (main, validation):
        if file is validation and not file.documents:
            continue
        content = {"documents": file.documents, "sha256": file.sha256, **common, "processing": dict(processing)}
        if file is main:
            content["processing"]["statistics"] = summary
        if file.ends_path:
            content["tokens"] = file.items
            made.append(file.ends_path.name)
        content["format_version"] = FORMAT_VERSION
        write_json(manifest_path(file.path), content)
        made.append(file.path.name)
        manifests.append(manifest_path(file.path).name)
    gone = []
    for name in ("rejects", "changes"):
        path, final = folder.merged / name, f"{main.path.stem}.{name}.jsonl"
        if path.stat().st_size:
            path.rename(path.with_name(final))
            made.append(final)
        else:
            gone.append(final)
    folder.finish([*made, *reversed(manifests)], gone)


def read_summary(output: Path) -> dict:
    """The counts that a finished output's manifest holds."""
    return json.loads(manifest_path(output).read_text(encoding="utf-8"))["processing"]["statistics"]


def check_finished(output: Path, sources: Sequence[Source], plan: dict) -> dict:
    """Check that a finished output is what a job of this plan would make; returns its manifest.

    Raises:
        InputError: it is not, it is damaged, or it was not made by this program.
    """
    remedy = "give another output_path, or replace it with resume=False (--resume false)"
    try:
        manifest = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        before, part_bytes = manifest["processing"]["plan"], manifest["processing"]["part_bytes"]
        digests = [source["sha256_of_parts"] for source in manifest["sources"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{output} is there and was not made by this program from this input; {remedy}") from None
    changed = describe_changes(before, plan)
    if not changed:
        for source, digest in zip(sources, digests, strict=True):
            if _digest(_part_digests(source, part_bytes, plan["text_field"])) != digest:
                changed = f"the content of {source.location}"
    if changed:
        raise InputError(f"{output} is there, and this changed since it was made: {changed}; {remedy}")
    if file_sha256(output) != manifest["sha256"]:
        raise InputError(f"{output} is damaged: not the bytes that its manifest describes; {remedy}")
    return manifest


def _part_digests(source: Source, part_bytes: int, text_field: str) -> list[str]:
    if source.is_plain:
        blocks = (read_part(source, index, part_bytes) for index in range(source.part_count(part_bytes)))
    else:
        blocks = (block for _, block, _ in stream_parts(source, part_bytes, text_field))
    return [block.sha256 for block in blocks if block is not None]

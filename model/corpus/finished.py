"""The files beside an output, and whether a finished output is what a job would make now."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from model.corpus.job_folder import JobFolder, describe_changes
from model.corpus.merge import DocumentFile
from model.corpus.opening import Source
from model.corpus.parts import MAX_LINE_BYTES, read_part, stream_parts
from model.corpus.sources import OUR_ENDINGS
from model.errors import InputError
from model.storage.files import write_json
from model.token_file.manifest import (
    FORMAT_VERSION,
    Manifest,
    ends_path,
    file_sha256,
    learn_path,
    manifest_path,
    write_manifest,
)

Records = dict[tuple[int, int], dict]  # of the parts, by (source, index), in order


def describe_sources(sources: Sequence[Source], records: Records) -> list[dict]:
    """The manifest's `sources`: name, size, the SHA-256 of its parts' SHA-256; of several files, how many."""
    parts: list[list[str]] = [[] for _ in sources]
    for (number, _), record in records.items():
        parts[number].append(record["sha256"])
    return [
        {"name": source.name, "size": source.size, "sha256_of_parts": _digest(digests)}
        | ({"files": len(source.files.names)} if source.files else {})
        for source, digests in zip(sources, parts, strict=True)
    ]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def finish_files(
    folder: JobFolder, main: DocumentFile, validation: DocumentFile, common: dict, processing: dict, summary: dict
) -> None:
    """Write the manifests of the merged files, and the list of all files to be renamed.

    Args:
        common: what both manifests hold besides counts: sources and, of tokens, dtype and the tokenizer.
        processing: plan and part_bytes.
        summary: the counts.
    """
    made, manifests, gone = [], [], []
    for file in (main, validation):
        if file is validation and not file.documents:
            earlier = folder.output.with_name(validation.path.name)
            gone += [path.name for path in (earlier, *_beside(earlier)) if _made_with_another(earlier)]
            continue
        content = {"documents": file.documents, "sha256": file.sha256, **common, "processing": dict(processing)}
        if file is main:
            content["processing"]["statistics"] = summary
        if file.ends_path:
            if file.learn_path:
                hashes = {"learn_sha256": file.learn_sha256, "ends_sha256": file.ends_sha256}
                content["chat"] = hashes | {"learned": file.learned, "turns": file.turns} | content["chat"]
                made.append(file.learn_path.name)
            elif earlier := _learn_of_earlier_job(folder.output.with_name(file.path.name)):
                gone.append(earlier.name)
            write_manifest(file.path, Manifest(tokens=file.items, **content))
            made.append(file.ends_path.name)
        else:
            write_json(manifest_path(file.path), {**content, "format_version": FORMAT_VERSION})
        made.append(file.path.name)
        manifests.append(manifest_path(file.path).name)
    for name in ("rejects", "changes"):
        path, final = folder.merged / name, f"{main.path.stem}.{name}.jsonl"
        if path.stat().st_size:
            path.rename(path.with_name(final))
            made.append(final)
        else:
            gone.append(final)
    folder.finish([*made, *reversed(manifests)], gone)


def _learn_of_earlier_job(file: Path) -> Path | None:
    """The `.learn` beside a token file that a job before this one wrote; None where there is none."""
    path = learn_path(file)
    return path if path.is_file() and _read_json(manifest_path(file)).get("chat") else None


def validation_path(output: Path) -> Path:
    """`X.bin` -> `X.val.bin`."""
    return output.with_name(f"{output.stem}.val{output.suffix}")


def written_paths(output: Path) -> list[Path]:
    """Every file that a job leaves beside its output, or may leave."""
    files = [path for file in (output, validation_path(output)) for path in (file, *_beside(file))]
    return [*files, *(output.with_name(output.stem + ending) for ending in OUR_ENDINGS)]


def _beside(file: Path) -> tuple[Path, Path, Path]:
    return manifest_path(file), ends_path(file), learn_path(file)


def check_names_are_free(output: Path, tokenize: bool, chats: bool, validates: bool, replace: bool) -> None:
    """Check that a new job overwrites and removes only files of earlier jobs of this output.

    Args:
        tokenize: whether the job writes tokens, and so where its documents end.
        chats: whether the tokens are those of chats.
        validates: whether it writes a validation file.
        replace: whether the user asked to replace the output.

    Raises:
        InputError: a file of another origin has a name that the job needs.
    """
    manifest = manifest_path(output)
    if manifest.exists():
        try:
            owner = _read_json(manifest)["processing"]["statistics"]["output"]
        except (KeyError, TypeError):
            owner = output.name if output.exists() else "something else"  # the first manifests named no output
        if owner != output.name:
            raise InputError(
                f"output_path: {manifest}, the name of {output}'s manifest, is there already and belongs to {owner}; "
                "give another name"
            )
    validation = validation_path(output)
    if validates and validation.exists() and not replace:
        raise InputError(
            f"output_path: {validation} is there already; give another name, or replace it with --resume false"
        )
    foreign = [output.with_name(output.stem + ending) for ending in OUR_ENDINGS]
    foreign = [path for path in foreign if not _holds_our_records(path)]
    if tokenize and not manifest.exists():
        foreign.append(ends_path(output))
    if chats:
        files = [output, validation] if validates else [output]
        foreign += [learn_path(file) for file in files if not _learn_of_earlier_job(file)]
    if validates and "processing" not in _read_json(manifest_path(validation)):
        foreign += [manifest_path(validation), *[ends_path(validation)] * tokenize]
    if taken := next((path for path in foreign if path.exists()), None):
        raise InputError(
            f"output_path: {taken} is there already, and no earlier job wrote it; give another name, or remove it"
        )


def _holds_our_records(path: Path) -> bool:
    """Whether a file of rejects or changes is one that data processing wrote, or empty."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(MAX_LINE_BYTES)
        record = json.loads(line) if line else {"line": 0, "reason": ""}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "line" in record and bool({"reason", "change"} & record.keys())


def _made_with_another(validation: Path) -> bool:
    """Whether a validation file was split off by a job, rather than being the output of one."""
    try:
        processing = _read_json(manifest_path(validation))["processing"]
        return "statistics" not in processing and processing["plan"]["val_share"] > 0
    except (KeyError, TypeError):
        return False


def check_finished(output: Path, sources: Sequence[Source], plan: dict) -> dict:
    """Check that a finished output is what a job of this plan would make; returns its manifest.

    Raises:
        InputError: it is not, it is damaged, or another program made it.
    """
    remedy = "give another output_path, or replace it with --resume false"
    manifest = _read_json(manifest_path(output))
    try:
        before, part_bytes = manifest["processing"]["plan"], manifest["processing"]["part_bytes"]
        digests = [source["sha256_of_parts"] for source in manifest["sources"]]
        has_validation = bool(manifest["processing"]["statistics"]["validation"])
    except (KeyError, TypeError):
        raise InputError(f"{output} exists already, not made by this program from this input; {remedy}") from None
    recorded = {name: manifest[name] for name in ("bos_id", "eos_id") if name in manifest}  # earlier plans lack them
    changed = describe_changes(recorded | before, plan)
    if not changed:
        for source, digest in zip(sources, digests, strict=True):
            if _digest(_part_digests(source, part_bytes, plan["text_field"])) != digest:
                changed = f"the content of {source.location}"
    if changed:
        raise InputError(f"{output} exists already, and this changed since it was made: {changed}; {remedy}")
    files = [(output, manifest)]
    if has_validation:
        validation = validation_path(output)
        files.append((validation, _read_json(manifest_path(validation))))
    for path, described in files:
        if not path.is_file() or file_sha256(path) != described.get("sha256"):
            raise InputError(f"{path} is damaged: not the bytes that its manifest describes; {remedy}")
        ends = ends_path(path)
        if "tokens" in described and (not ends.is_file() or ends.stat().st_size != 8 * described["documents"]):
            raise InputError(f"{ends} is damaged: not the {described['documents']:,} documents of {path}; {remedy}")
        if described.get("chat"):
            learn = learn_path(path)
            if not learn.is_file() or file_sha256(learn) != described["chat"].get("learn_sha256"):
                raise InputError(f"{learn} is damaged: not the bytes that {path}'s manifest describes; {remedy}")
    return manifest


def _read_json(path: Path) -> dict:
    """A manifest; an empty one where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _part_digests(source: Source, part_bytes: int, text_field: str) -> list[str]:
    if source.is_plain:
        blocks = (read_part(source, index, part_bytes) for index in range(source.part_count(part_bytes)))
    else:
        blocks = (block for _, block, _ in stream_parts(source, part_bytes, text_field))
    return [block.sha256 for block in blocks if block is not None]

"""The files of a long job that may be killed at any instant and, run again, ends with the same bytes.

For the output `X.bin` (or `X.jsonl`) these lie beside it while the job runs:

    X.bin.partial               what becomes X.bin
    X.rejects.jsonl.partial     what becomes X.rejects.jsonl
    X.bin.seen.sqlite           the texts seen so far (SeenTexts)
    X.bin.progress.json         the record: how much of each is final, and where the input goes on

At a commit the data is flushed to the disk first and the record is then renamed into place. A job that goes on cuts the
files to the record's lengths, so whatever was written after the last commit is written again.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from model.dataset import Manifest, manifest_path, write_manifest
from model.errors import InputError
from model.files import write_json
from model.seen_texts import SeenTexts

RECORD_VERSION = 1


@dataclass
class Progress:
    """What is final. `identity` is all that the output depends on; a job goes on only where it is unchanged."""

    identity: dict
    statistics: dict  # Statistics.to_record()
    input_offset: int = 0  # bytes
    input_sha256: str = ""  # of the input before the offset
    output_bytes: int = 0
    rejects_bytes: int = 0
    seconds: float = 0.0  # spent so far
    encoder: str = ""  # what made the ids (BulkEncoder.name)
    finished: bool = False  # everything is written, only the renames are to do
    manifest: dict | None = field(default=None)  # of a finished token file
    version: int = RECORD_VERSION


class ResumableJob:
    """Opens, commits and publishes the files. Use as a context manager; on an error what was committed stays."""

    def __init__(self, output_path: str | Path, identity: dict, statistics: dict, resume: bool) -> None:
        """Lock the output, and find the record to go on from.

        Raises:
            InputError: another process makes this output, the record cannot be read, or it is of another input,
                tokenizer or option.
        """
        self.output = Path(output_path)
        self.rejects = self.output.with_name(self.output.stem + ".rejects.jsonl")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._beside(".partial")
        self._rejects_partial = self.rejects.with_name(self.rejects.name + ".partial")
        self._record = self._beside(".progress.json")
        self._files = []
        self.seen = SeenTexts(self._beside(".seen.sqlite"))
        try:
            if not resume:
                self._record.unlink(missing_ok=True)
            self.resumed = self._record.exists()
            self.progress = self._read_record(identity) if self.resumed else Progress(identity, statistics)
        except BaseException:
            self.seen.close()
            raise

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    def _read_record(self, identity: dict) -> Progress:
        remedy = f"start over with resume=False (--resume false), or delete {self._record}"
        try:
            progress = Progress(**json.loads(self._record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._record} is not a record that this program can read; {remedy}") from error
        changed = describe_changes(progress.identity, identity)
        if changed:
            raise InputError(
                f"{self.output} is half made, and this changed since: {changed}; change it back, or {remedy}"
            )
        return progress

    def __enter__(self) -> "ResumableJob":
        return self

    def __exit__(self, *error) -> None:
        self._close_files()
        self.seen.close()

    def open_files(self) -> None:
        """Open the partial files, cut to what the record calls final."""
        self.seen.forget_after(self.progress.statistics["lines"])
        for path, size in (
            (self._partial, self.progress.output_bytes),
            (self._rejects_partial, self.progress.rejects_bytes),
        ):
            if size and (not path.exists() or path.stat().st_size < size):
                raise InputError(
                    f"{path} is shorter than its record says, or gone; start over with resume=False (--resume false)"
                )
            file = open(path, "r+b" if size else "wb")
            file.truncate(size)
            file.seek(size)
            self._files.append(file)
        self._output_file, self._rejects_file = self._files

    def write(self, content: bytes) -> None:
        self._output_file.write(content)

    def write_rejects(self, lines: list[str]) -> None:
        self._rejects_file.write("".join(lines).encode("utf-8"))

    def commit(self) -> None:
        """Make everything written so far final; the caller has brought `progress` up to date, file sizes excepted."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.seen.commit()
        self.progress.output_bytes = self._output_file.tell()
        self.progress.rejects_bytes = self._rejects_file.tell()
        self._write_record()

    def _write_record(self) -> None:
        write_json(self._record, asdict(self.progress))

    @property
    def partial(self) -> Path:
        """The output so far; complete once all was committed."""
        return self._partial

    def publish(self, manifest: Manifest | None = None) -> None:
        """Give the finished files their names, the manifest last, and remove the job's own.

        A job that is killed in here is published when it is run again.
        """
        if not self.progress.finished:
            self._close_files()
            self.progress.finished = True
            self.progress.manifest = asdict(manifest) if manifest else None
            self._write_record()
        if self._partial.exists():
            if self.progress.manifest:  # an older file's manifest must not stand beside the new one
                manifest_path(self.output).unlink(missing_ok=True)
            os.replace(self._partial, self.output)
        if self.progress.rejects_bytes:
            if self._rejects_partial.exists():
                os.replace(self._rejects_partial, self.rejects)
        else:
            self._rejects_partial.unlink(missing_ok=True)
            self.rejects.unlink(missing_ok=True)  # of an earlier input
        if self.progress.manifest:
            write_manifest(self.output, Manifest(**self.progress.manifest))
        self.seen.close(delete=True)
        self._record.unlink()

    def abandon(self) -> Path:
        """There is nothing to publish but the rejects: give them their name, remove the rest, return their path."""
        self._close_files()
        os.replace(self._rejects_partial, self.rejects)
        self._record.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
        self.seen.close(delete=True)
        return self.rejects

    def _close_files(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def describe_changes(before: dict, now: dict) -> str:
    """'the tokenizer (was 1a2b…, is 3c4d…), text_field (was text, is content)'; '' where nothing changed."""
    return ", ".join(
        f"{name} (was {_short(before.get(name))}, is {_short(now.get(name))})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def _short(value) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"

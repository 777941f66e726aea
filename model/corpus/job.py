"""A data processing job, from its plan to the files it leaves."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import numpy as np

from model.corpus.bulk_encoder import CHECKED_CHARACTERS, choose_encoder
from model.corpus.chats import FORMS, contents_of, parse_chat
from model.corpus.finished import (
    Records,
    check_finished,
    check_names_are_free,
    describe_sources,
    finish_files,
    validation_path,
)
from model.corpus.inspection import EXAMPLES, counts_text, describe_lines, nothing_read
from model.corpus.job_folder import FILES_OF, SIZES, JobFolder, job_path
from model.corpus.jsonl import parse_line, read_rejects
from model.corpus.merge import DocumentFile, Merger, RawLines
from model.corpus.opening import EXPECTED, Source
from model.corpus.options import ProcessingOptions
from model.corpus.pairs import parse_pair
from model.corpus.part_file import Damaged
from model.corpus.part_maker import PartOptions
from model.corpus.parts import lines_of, stream_parts
from model.corpus.plain_text import TXT_DOCUMENTS
from model.corpus.reasons import REASONS
from model.corpus.statistics import Statistics
from model.corpus.worker import Crew, Task
from model.errors import InputError, counted
from model.text.chat_ids import ChatFormat, load_chat_format
from model.text.encoder import unknown_id
from model.text.tokenization import BulkTokenizer, load_bulk_tokenizer, tokenizer_sha256
from model.token_file.manifest import ends_path, learn_path

BYTES_OF_A_TOKEN = 8  # more than a Chinese token has, so that a part holds somewhat less than save_interval
SMALLEST_PART, LARGEST_PART = 4 << 10, 64 << 20  # bytes
FIRST_BYTES = 4 << 20  # of the input, used to choose the encoder
WARNED_SHARE = 0.2  # of the lines; a warning if more are rejected, EXPECTED_REASONS not counted
EXPECTED_REASONS = ("empty", "not_sampled")
WAIT_FOR_OTHERS = 3600 * 24 * 7  # seconds: merging a large corpus takes long


class Job:
    """Makes one output: `run` shows the steps.

    Args:
        output: the token file or, where `tokenize` is false, the cleaned JSONL.
        processes: the group that shares the work (utils.Processes).
        say: prints one line for the user.
        progress_bar: takes the input's size in bytes; a context manager whose bar has `advance(bytes, postfix)`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        output: Path,
        options: ProcessingOptions,
        tokenize: bool,
        processes,
        say: Callable[[str], None],
        progress_bar: Callable[[int], AbstractContextManager],
    ) -> None:
        self.sources, self.output, self.options, self.tokenize = sources, output, options, tokenize
        self.processes, self.say, self.progress_bar = processes, say, progress_bar
        self.plan = self._plan()

    @cached_property
    def tokenizer(self) -> BulkTokenizer:
        """The tokenizer, loaded when first needed."""
        return load_bulk_tokenizer(self.options.tokenizer_path)

    @cached_property
    def chat_format(self) -> ChatFormat | None:
        """How the tokenizer writes chats; None where nothing is tokenised, or the documents are texts."""
        if not (self.tokenize and self.options.is_chat):
            return None
        return load_chat_format(self.options.tokenizer_path, self.tokenizer)

    @property
    def size(self) -> int:
        """Bytes of the input; streamed datasets count 0."""
        return sum(source.size for source in self.sources)

    def run(self, resume: bool) -> dict:
        """Plan, make the missing parts, merge them, give the files their names; returns the counts."""
        self.processes.start(timeout=WAIT_FOR_OTHERS)
        finished = resume and self.output.exists() and not job_path(self.output).exists()
        if self.processes.any(self.processes.is_main and finished):
            return self._keep_finished() if self.processes.is_main else {}
        with JobFolder(self.output, self.processes.is_main) as folder:
            if self.processes.is_main and not (resume and folder.is_finished):
                self._begin(folder, resume)
            if self.processes.any(self.processes.is_main and folder.is_finished):  # killed while publishing
                if self.processes.is_main:
                    folder.publish()
                    return self._keep_finished()  # checks that it was this job
                return {}
            since = time.perf_counter()
            records = self.processes.gather(self._make_parts(folder))
            summary = {}
            if self.processes.is_main:
                summary = self._merge(folder, dict(sorted(item for share in records for item in share.items())))
                folder.publish()
                self._report(summary, time.perf_counter() - since)
            self.processes.barrier()  # the others wait: torchrun ends all when one fails
        return summary

    def _plan(self) -> dict:
        """Everything that the output depends on."""
        depends = dataclasses.asdict(self.options)
        for name in ("tokenizer_path", "chunk_size", "save_interval", "workers"):  # the output does not depend on these
            del depends[name]
        depends |= depends.pop("cleaning")
        if not any(source.form in TXT_DOCUMENTS for source in self.sources):
            del depends["txt_documents"]
        if not self.options.is_chat:
            del depends["format"]  # plans of texts name none
        if self.tokenize:
            depends["the tokenizer"] = tokenizer_sha256(self.options.tokenizer_path)
            depends["bos_id"], depends["eos_id"] = self.tokenizer.bos_id, self.tokenizer.eos_id
            depends["end_ids"] = sorted(self.tokenizer.end_ids)
            if self.chat_format:
                depends["the chat template"] = self.chat_format.sha256
        else:
            del depends["max_length"], depends["long_documents"]
        return {
            "input_path": [source.name for source in self.sources],
            SIZES: [source.size for source in self.sources],
            "weights": [source.weight for source in self.sources],
            **{f"{FILES_OF}{source.name}": source.files.sha256 for source in self.sources if source.files},
            **depends,
        }

    def _begin(self, folder: JobFolder, resume: bool) -> None:
        half_published = folder.is_finished  # its files may lack their manifest
        if not resume:
            folder.clear()
        if folder.planned() is None and not half_published:
            validates = self.options.val_share > 0
            check_names_are_free(
                self.output, self.tokenize, self.chat_format is not None, validates, replace=not resume
            )
        part_bytes = min(max(self.options.save_interval * BYTES_OF_A_TOKEN, SMALLEST_PART), LARGEST_PART)
        part_bytes = (folder.planned() or {}).get("part_bytes", part_bytes)
        if folder.begin(self.plan | {"part_bytes": part_bytes}):
            self.say(f"resuming {self.output}, which is half made")

    # ------------------------------------------------------------------------------------------------ making parts

    def _make_parts(self, folder: JobFolder) -> dict[tuple[int, int], dict]:
        """Make the missing parts of this process's share; returns the records of its whole share."""
        part_bytes = folder.planned()["part_bytes"]
        made, kept, tokens, since = {}, 0, 0, time.perf_counter()
        with Crew(self._workers(part_bytes)) as crew, self.progress_bar(self.size // self.processes.world_size) as bar:
            for answer in crew.make_parts(self._part_options(), self._tasks(folder, part_bytes)):
                if answer.changed:
                    raise InputError(
                        f"{self.output} is half made, and since then {answer.location} changed (bytes "
                        f"{answer.index * part_bytes:,} to {(answer.index + 1) * part_bytes:,}); change it back, or "
                        "start over with --resume false"
                    )
                if answer.record is not None:
                    made[answer.source, answer.index] = answer.record
                    kept += answer.kept
                    tokens += 0 if answer.kept else answer.record["items"]
                seconds = time.perf_counter() - since
                bar.advance(answer.disk_bytes, f"{tokens / seconds:,.0f} tok/s" if self.tokenize else "")
        if kept:
            self.say(f"{kept:,} of {len(made):,} parts were made before")
        return made

    def _workers(self, part_bytes: int) -> int:
        """Number of worker processes: as asked, or one a core; none for an input too small to be worth them."""
        if self.options.workers is not None:
            return self.options.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // self.processes.local_world_size)
        share = self.size // self.processes.world_size
        return 0 if all(source.size for source in self.sources) and share <= 4 * part_bytes else workers

    def _part_options(self) -> PartOptions:
        options = self.options
        common = {
            "text_field": options.text_field,
            "cleaning": options.cleaning,
            "chunk_size": options.chunk_size,
            "keys": options.deduplicate or options.val_share > 0 or any(s.weight % 1 for s in self.sources),
            "near_duplicates": options.near_duplicates > 0,
            "chats": options.is_chat,
            "pairs": options.is_pairs,
        }
        if not self.tokenize:
            return PartOptions(encoder=None, **common)
        return PartOptions(
            encoder=choose_encoder(self.tokenizer, self._first_texts(), self.say),
            delimiters=self.tokenizer.delimiters,
            dtype="<u4" if self.chat_format else _token_dtype(self.tokenizer.vocab_size).str,
            max_length=options.max_length,
            long_documents=options.long_documents,
            chat_format=self.chat_format,
            **common,
        )

    def _first_texts(self) -> list[str]:
        """CHECKED_CHARACTERS of text from the input's first bytes, used to choose the encoder."""
        texts, characters = [], 0
        for _, block, _ in stream_parts(self.sources[0], FIRST_BYTES, self.options.text_field):
            for raw in lines_of(block):
                if self.options.is_chat:
                    parse = parse_pair if self.options.is_pairs else parse_chat
                    found = contents_of([parse(raw)[0] or ()])
                else:
                    found = [parse_line(raw, self.options.text_field)[0] or ""]
                texts += filter(None, found)
                characters += sum(map(len, found))
                if characters > CHECKED_CHARACTERS:
                    return texts
            break
        return texts

    def _tasks(self, folder: JobFolder, part_bytes: int) -> Iterator[Task]:
        """This process's share: every world_size-th part."""
        rank, world_size = self.processes.rank, self.processes.world_size
        for number, source in enumerate(self.sources):
            if source.is_plain:
                for index in range((rank - number) % world_size, source.part_count(part_bytes), world_size):
                    disk_bytes = min(part_bytes, source.size - index * part_bytes)
                    yield Task(source, number, index, part_bytes, folder.part(number, index), None, disk_bytes)
                continue
            done, sent = 0, dataclasses.replace(source, files=None)  # of many files, workers need no names
            for index, block, disk in stream_parts(source, part_bytes, self.options.text_field):
                if (index + number) % world_size == rank:
                    path = folder.part(number, index)
                    yield Task(sent, number, index, part_bytes, path, block, (disk - done) // world_size)
                done = disk

    # ------------------------------------------------------------------------------------- merging and publishing

    def _merge(self, folder: JobFolder, records: Records) -> dict:
        """Merge the parts into the finished files and list them; returns the counts."""
        if len(records) > 100:
            self.say(f"merging {len(records):,} parts")
        statistics, vocab_size = Statistics([source.name for source in self.sources]), 0
        if self.tokenize:
            vocab_size = self.tokenizer.vocab_size
            delimiters = 0 if self.chat_format else self.tokenizer.delimiters.count
            unknown = unknown_id(self.tokenizer.json)
            statistics = Statistics([source.name for source in self.sources], vocab_size, delimiters, unknown)
            statistics.lost_bytes = sum(record.get("lost_bytes", 0) for record in records.values())
        for record in records.values():
            statistics.forms.update(record.get("forms", {}))
        part_bytes = folder.planned()["part_bytes"]
        folder.start_merging()
        merged = folder.merged / self.output.name
        main, validation = (
            DocumentFile(
                path,
                ends_path(path) if self.tokenize else None,
                learn_path(path) if self.chat_format else None,
                _token_dtype(vocab_size),
            )
            for path in (merged, validation_path(merged))
        )
        merger = Merger(
            {key: folder.part(*key) for key in records},
            self.sources,
            RawLines(self.sources, part_bytes, self.options.text_field),
            self.options,
            statistics,
            folder.merged,
        )
        try:
            merger.merge(main, validation)
        except Damaged as error:
            error.path.unlink(missing_ok=True)
            raise InputError(f"{error}; the part was removed: run it again, and it resumes") from error
        if not main.documents:
            self._nothing_made(folder, statistics)
        common = {"sources": describe_sources(self.sources, records)}
        if self.tokenize:
            common |= {
                "dtype": _token_dtype(vocab_size).name,
                "vocab_size": vocab_size,
                "bos_id": self.tokenizer.bos_id,
                "eos_id": self.tokenizer.eos_id,
                "tokenizer_sha256": self.plan["the tokenizer"],
                "encoder": " and ".join(sorted({record["encoder"] for record in records.values()} - {""})),
            }
        if self.chat_format:
            ends = list(self.chat_format.end_ids)
            common["chat"] = {"template_sha256": self.chat_format.sha256, "end_ids": ends}
            common["chat"] |= {"pairs": True} if self.options.is_pairs else {}
        processing = {"plan": self.plan, "part_bytes": part_bytes}
        summary = {
            "output": self.output.name,
            **statistics.summary(self.options.max_length, self.options.long_documents),
        }
        finish_files(folder, main, validation, common, processing, summary)
        for name in statistics.sources_of_another_kind:
            kind = self.options.format
            self.say(f"warning: no line of {name} was kept: all inputs are read as one kind, {kind}")
        return summary

    def _nothing_made(self, folder: JobFolder, statistics: Statistics) -> None:
        """Keep the rejects, if there are any, and nothing else.

        Raises:
            InputError: always: there is no document.
        """
        rejects = self.output.with_name(f"{self.output.stem}.rejects.jsonl")
        if statistics.rejected:
            os.replace(folder.merged / "rejects", rejects)
        folder.remove()
        sources = ", ".join([source.location for source in self.sources[:3]] + ["…"] * (len(self.sources) > 3))
        if not statistics.lines:
            raise InputError(f"input_path: {sources}: no line found; {EXPECTED}")
        if statistics.documents:
            count = counted(statistics.documents, "document")
            raise InputError(f"val_share: all of {count} went to validation; give a smaller share")
        rejected = {reason: count for reason, count in statistics.rejected.items() if reason != "not_sampled"}
        if not rejected:
            raise InputError(f"weights: none of {counted(statistics.lines, 'line')} was taken; give larger ones")
        _, _, seen = self._most_rejected(rejected, rejects)
        form = self.options.format, self.options.text_field
        raise InputError(nothing_read(sources, rejected, seen, *form) + f"; see {rejects}")

    def _most_rejected(self, rejected: Mapping[str, int], rejects: Path) -> tuple[str, str, str]:
        """The reason that most lines were rejected for, where the first of them is, and what such lines hold."""
        reason = max(rejected, key=rejected.get)
        examples = read_rejects(rejects, reason, EXAMPLES)
        where = examples[0][0]
        source = next((source for source in self.sources if source.name == where.get("source")), self.sources[0])
        place = f"line {where['line']:,}" + (f" of {source.name}" if len(self.sources) > 1 else "")
        place = where.get("file", place)
        lines = [raw for _, raw in examples]
        form = self.options.format, self.options.text_field
        return reason, place, describe_lines(lines, reason, *form, source.path_of(where["line"] - 1))

    def _keep_finished(self) -> dict:
        manifest = check_finished(self.output, self.sources, self.plan)
        count = counted(manifest["tokens"], "token") if self.tokenize else counted(manifest["documents"], "document")
        self.say(f"nothing to do: {self.output} was made from this input ({count})")
        return manifest["processing"]["statistics"]

    def _report(self, summary: dict, seconds: float) -> None:
        """Report the counts to the user."""
        rejects = self.output.with_name(f"{self.output.stem}.rejects.jsonl")
        self.say(
            f"{counted(summary['lines'], 'line')}: {counted(summary['documents'], 'document')}, "
            f"{summary['rejected']:,} rejected"
        )
        if summary["rejected"]:
            self.say(f"rejected: {counts_text(summary['rejected_by_reason'])}; kept in {rejects}")
        changed = dict(summary["changed_by_cleaning"])
        if documents := changed.pop("documents"):
            changes = self.output.with_name(f"{self.output.stem}.changes.jsonl")
            self.say(f"cleaning changed {counted(documents, 'document')}: {counts_text(changed)}; samples: {changes}")
        chats = summary.get("chats")
        if self.tokenize:
            self.say(_tokens_text(summary))
        if chats:
            unit = "pair" if self.options.is_pairs else "chat"
            self.say(f"{counted(summary['documents'], unit)}, {counted(chats['turns'], 'answer')}")
            if len(chats["forms"]) > 1:
                self.say(f"forms found, with chats that repeat: {counts_text(chats['forms'])}")
        if validation := summary["validation"]:
            tokens = f", {counted(validation['tokens'], 'token')}" if self.tokenize else ""
            count, unit = validation["documents"], "document"
            if self.tokenize and self.options.is_pairs:  # two documents each
                count, unit = count // 2, "pair"
            self.say(f"for validation: {counted(count, unit)}{tokens}")
        self._warn_of_losses(summary)
        self._warn_of_rejects(summary, rejects)
        self.say(f"wrote {self.output} in {seconds:.1f} s ({self.size / 1e6 / max(seconds, 1e-9):.1f} MB/s)")

    def _warn_of_losses(self, summary: dict) -> None:
        """Warn of text that the tokenizer has no token for."""
        unknown, lost = (summary["vocabulary"][name] for name in ("unknown_tokens", "lost_bytes"))
        remedy = "a tokenizer with a token for every byte loses nothing (--train_tokenizer makes one)"
        if unknown:
            share = _share_text(unknown / summary["tokens"])
            self.say(f"warning: {unknown:,} tokens ({share}) are the unknown token, for text without a token; {remedy}")
        if lost:
            share = _share_text(lost / max(1, summary["utf8_bytes"]))
            self.say(f"warning: {lost:,} bytes of the texts ({share}) have no token and are lost; {remedy}")

    def _warn_of_rejects(self, summary: dict, rejects: Path) -> None:
        """Warn if the share of rejected lines suggests a mistake."""
        rejected = {
            name: count for name, count in summary["rejected_by_reason"].items() if name not in EXPECTED_REASONS
        }
        count = sum(rejected.values())
        share = min(count / max(1, summary["lines"]), 1.0 if count == summary["lines"] else 0.99)
        if share >= WARNED_SHARE:
            reason, place, seen = self._most_rejected(rejected, rejects)
            self.say(
                f"warning: {share:.0%} of the lines were rejected, {rejected[reason]:,} of them as {reason} "
                f"({REASONS[reason]}), such as {place}{seen}"
            )


def _tokens_text(summary: dict) -> str:
    """How many tokens there are, what they stand for, and which documents are long."""
    about, what = f"{summary['characters_per_token'] or 0:.3f} characters per token", "documents"
    long, mode = summary["documents_longer_than_max_length"], summary["long_documents"]
    said = {"keep": "kept whole", "split": "split", "truncate": "cut off", "drop": "rejected"}[mode]
    if chats := summary.get("chats"):
        about, what = f"{chats['learned_tokens']:,} of them learned ({chats['learned_share']:.1%})", "chats"
        what = "pairs" if FORMS["pairs"] in chats["forms"] else what
        if mode == "truncate":
            rejected = summary["rejected_by_reason"].get("over_max_length", 0)
            said = f"without their oldest turns, or rejected ({rejected:,})"
    return (
        f"{summary['tokens']:,} tokens, {about}; {what} of more than {summary['max_length']} tokens, {said}: {long:,}"
    )


def _share_text(share: float) -> str:
    return f"{share:.2%}" if share >= 0.0001 else "under 0.01%"


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")

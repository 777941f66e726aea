"""Data processing: JSONL in, the token file that training reads out.

    python optimized_data_processing.py                                    # works on what lies in dataset/
    python optimized_data_processing.py --input_path my.jsonl --output_path dataset/my.bin
    python optimized_data_processing.py --clean_only --input_path my.jsonl --output_path dataset/cleaned_data.jsonl
    python optimized_data_processing.py --train_tokenizer --input_path a.jsonl b.jsonl --tokenizer_output my_tokenizer

Cleaning and tokenising are one pass. Every input line becomes a document or a line of the rejects file. A run that was
killed goes on where it was, and ends with the same bytes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from model.bulk_encoder import BulkEncoder, with_bos_and_eos
from model.data_statistics import Statistics, draw_summary
from model.dataset import Manifest, file_sha256, manifest_path, read_manifest
from model.errors import InputError
from model.files import write_json
from model.jsonl import Line, bytes_read, open_jsonl, read_lines
from model.resumable_job import ResumableJob, describe_changes
from model.tokenization import load_tokenizer, tokenizer_sha256, vocabulary_size
from utils import CommandParser, progress_line, run_command, say, true_or_false

DATASET = Path("dataset")
DEFAULT_CORPUS = "mobvoi_seq_monkey_general_open_corpus.jsonl"  # what MiniMind's users have
SAMPLE_CORPUS = "classics_zh.jsonl"
DEFAULT_OUTPUT = DATASET / "pretrain_data.bin"
DEFAULT_CLEANED = DATASET / "cleaned_data.jsonl"
CHUNK_BYTES = 4 << 20  # a chunk ends here too: about a million tokens of Chinese, a few dozen MB of memory


class OptimizedDataProcessor:
    """Turns JSONL into a token file; see the module's docstring.

    Memory does not grow with the input: a chunk of lines, a histogram, and at most 64 MiB of the table that finds exact
    duplicates, which lies on disk beside the output (`model.seen_texts`). One line may be up to 64 MiB.

    Args:
        tokenizer_path: folder of the tokenizer; None: the embedded one.
        max_length: tokens, bos and eos counted. Longer documents are kept whole and counted in the statistics.
        chunk_size: lines that are handled together at most; a chunk also ends at 4 MiB.
        save_interval: tokens after which progress is made final, at the end of a chunk; after `chunk_size` lines it is
            made final in any case.
        text_field: the key of the text in each JSON object.
    """

    def __init__(
        self,
        tokenizer_path: str | Path | None = None,
        max_length: int = 512,
        chunk_size: int = 50000,
        save_interval: int = 1000000,
        text_field: str = "text",
    ) -> None:
        for name, value in (("max_length", max_length), ("chunk_size", chunk_size), ("save_interval", save_interval)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: {value!r} is not a whole number of at least 1")
        self.tokenizer_path = tokenizer_path
        self.max_length = max_length
        self.chunk_size = chunk_size
        self.save_interval = save_interval
        self.text_field = text_field
        self._tokenizer = None
        self._encoder: BulkEncoder | None = None
        self._summary: dict | None = None  # of the last job

    @property
    def tokenizer(self):
        """The tokenizer, loaded when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_path)
        return self._tokenizer

    @property
    def encoder(self) -> BulkEncoder:
        """What turns texts into ids, made when it is first needed."""
        if self._encoder is None:
            self._encoder = BulkEncoder(self.tokenizer, self.tokenizer_path, say)
        return self._encoder

    def validate_and_clean_jsonl(self, input_path: str | Path, output_path: str | Path, resume: bool = True) -> dict:
        """Write the good lines of a JSONL file as `{"text": ...}`, and the others to `<output>.rejects.jsonl`.

        The text loses the white space around it and nothing else; other keys of the object are left out. An output
        that is there already is replaced when the new one is complete. A run that was killed goes on, unless `resume`
        is false.

        Returns:
            the counts: lines, documents, rejected, rejected_by_reason, … (`Statistics.summary`).

        Raises:
            InputError: the input cannot be read, holds no document, or is not what a half-made output was begun with.
        """
        identity = {"the input's size": _size(input_path), "text_field": self.text_field}
        statistics = Statistics(self.max_length)
        _check_paths(input_path, output_path)
        with _disk_errors(output_path), ResumableJob(output_path, identity, statistics.to_record(), resume) as job:
            self._run(job, input_path, self._as_jsonl)
            job.publish()
        return self._report(job, output_path)

    def process_dataset(self, input_path: str | Path, output_path: str | Path, resume: bool = True) -> dict:
        """Make the token file `X.bin`, its manifest `X.json` and `X.rejects.jsonl` from raw or cleaned JSONL.

        A run that was killed goes on from its last record and ends with the same bytes. A finished one, run again with
        the same input, tokenizer and options, does nothing. With `resume=False` all of it is made anew.

        Returns:
            the counts, as `validate_and_clean_jsonl`.

        Raises:
            InputError: the input cannot be read, holds no document, or the output was begun with, or made from,
                something else.
        """
        input_path, output_path = Path(input_path), Path(output_path)
        size = _size(input_path)
        _check_paths(input_path, output_path)
        tokenizer_hash = tokenizer_sha256(self.tokenizer_path)
        options = {"text_field": self.text_field, "max_length": self.max_length}
        identity = {"the input's size": size, "the tokenizer": tokenizer_hash, **options}
        half_made = output_path.with_name(output_path.name + ".progress.json").exists()
        if resume and output_path.exists() and not half_made:
            return self._keep_finished(input_path, output_path, identity)
        statistics = Statistics(self.max_length, vocabulary_size(self.tokenizer))
        with _disk_errors(output_path), ResumableJob(output_path, identity, statistics.to_record(), resume) as job:
            self._run(job, input_path, self._as_tokens)
            job.publish(self._manifest(job, input_path, tokenizer_hash, options))
        return self._report(job, output_path)

    def save_statistics(self, path: str | Path) -> None:
        """Write the counts of the last job to a JSON file, and a picture of them to a PNG of the same name.

        Raises:
            InputError: nothing was processed yet.
        """
        if self._summary is None:
            raise InputError("save_statistics: nothing was processed yet; call process_dataset first")
        path = Path(path)
        write_json(path, self._summary)
        try:
            draw_summary(path.with_suffix(".png"), self._summary)
        except ImportError:
            say(f"statistics: {path} (no picture: matplotlib is not installed)")
        else:
            say(f"statistics: {path} and {path.with_suffix('.png')}")

    # ------------------------------------------------------------------------------------------------ the one pass

    def _run(self, job: ResumableJob, input_path: str | Path, encode: Callable[[list[str], Statistics], bytes]) -> None:
        """Read the input from where the record is, chunk by chunk, and commit up to its end."""
        progress = job.progress
        if progress.finished:  # killed while it was given its names
            return
        statistics = Statistics.from_record(progress.statistics)
        with open_jsonl(input_path) as file:
            digest = _digest_until(file, progress.input_offset)
            if job.resumed:
                if digest.hexdigest() != progress.input_sha256:
                    raise InputError(
                        f"{job.output} is half made, and since then {input_path} changed before byte "
                        f"{progress.input_offset:,}; change it back, or start over with resume=False (--resume false)"
                    )
                say(f"going on from line {statistics.lines + 1:,} of {input_path} ({statistics.tokens:,} tokens made)")
            job.open_files()
            bar = _byte_bar(_size(input_path), bytes_read(file))
            lines = read_lines(file, self.text_field, progress.input_offset, statistics.lines, digest)
            since = time.perf_counter()
            committed = (statistics.tokens, statistics.lines)
            for chunk in _chunks(lines, self.chunk_size):
                texts = _sort_out(chunk, job, statistics)
                job.write(encode(texts, statistics))
                if texts and self._encoder is not None:
                    progress.encoder = self._encoder.name
                progress.input_offset = chunk[-1].end
                bar.update(bytes_read(file) - bar.n)
                progress_line(bar)
                tokens, seen = statistics.tokens - committed[0], statistics.lines - committed[1]
                if tokens >= self.save_interval or seen >= self.chunk_size:
                    since = _commit(job, statistics, digest, since)
                    committed = (statistics.tokens, statistics.lines)
            _commit(job, statistics, digest, since)
            bar.close()
        if not statistics.documents:
            raise InputError(_no_documents(input_path, self.text_field, statistics, job.abandon()))

    def _as_jsonl(self, texts: list[str], _: Statistics) -> bytes:
        """`{"text": ...}` of each text, one a line."""
        return "".join(json.dumps({self.text_field: text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-8")

    def _as_tokens(self, texts: list[str], statistics: Statistics) -> bytes:
        """`<bos> ids <eos>` of each text, in the token file's dtype."""
        ids, lengths = self.encoder.encode(texts)
        tokens = with_bos_and_eos(ids, lengths, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        dtype = _token_dtype(statistics.vocab_size)
        if len(tokens) and tokens.max() >= statistics.vocab_size:  # a wrapped id would be silent damage
            raise RuntimeError(f"the tokenizer gave id {tokens.max()}, its vocabulary has {statistics.vocab_size}")
        statistics.count_tokens(tokens, lengths + 2)
        return tokens.astype(dtype).tobytes()

    # ---------------------------------------------------------------------------------------- before and after it

    def _manifest(self, job: ResumableJob, input_path: Path, tokenizer_hash: str, options: dict) -> Manifest | None:
        if job.progress.finished:
            return None  # the record holds it
        statistics = Statistics.from_record(job.progress.statistics)
        source = {"name": input_path.name, "size": _size(input_path), "sha256": job.progress.input_sha256}
        return Manifest(
            dtype=_token_dtype(statistics.vocab_size).name,
            vocab_size=statistics.vocab_size,
            bos_id=self.tokenizer.bos_token_id,
            eos_id=self.tokenizer.eos_token_id,
            tokens=statistics.tokens,
            documents=statistics.documents,
            tokenizer_sha256=tokenizer_hash,
            encoder=job.progress.encoder,
            sha256=file_sha256(job.partial),
            sources=[source | {"options": options, "statistics": statistics.summary()}],
        )

    def _keep_finished(self, input_path: Path, output_path: Path, identity: dict) -> dict:
        """Check that a finished output is what this job would make, and take its statistics.

        Raises:
            InputError: it is not, or it is damaged.
        """
        remedy = "give another output_path, or replace it with resume=False (--resume false)"
        manifest = read_manifest(output_path)
        if manifest is None or len(manifest.sources) != 1 or "options" not in manifest.sources[0]:
            raise InputError(f"{output_path} is there and was not made by this program from one file; {remedy}")
        source = manifest.sources[0]
        made = {
            "the input's size": source["size"],
            "the tokenizer": manifest.tokenizer_sha256,
            **source["options"],
        }
        changed = describe_changes(made, identity)
        if not changed:
            with open_jsonl(input_path) as file:
                changed = describe_changes(
                    {"the input's sha256": source["sha256"]}, {"the input's sha256": _digest_until(file).hexdigest()}
                )
        if changed:
            raise InputError(f"{output_path} is there, and this changed since it was made: {changed}; {remedy}")
        expected = manifest.tokens * np.dtype(manifest.dtype).itemsize
        if output_path.stat().st_size != expected or file_sha256(output_path) != manifest.sha256:
            raise InputError(f"{output_path} is damaged: not the bytes that its manifest describes; {remedy}")
        say(f"nothing to do: {output_path} was made from this input ({manifest.tokens:,} tokens)")
        self._summary = {"input": source["name"], "output": str(output_path), **source["statistics"]}
        return self._summary

    def _report(self, job: ResumableJob, output_path: str | Path) -> dict:
        """Say what came out, and keep it for save_statistics."""
        statistics, seconds = Statistics.from_record(job.progress.statistics), job.progress.seconds
        self._summary = {
            "output": str(output_path),
            **statistics.summary(),
            "seconds": round(seconds, 2),
            "megabytes_per_second": round(job.progress.input_offset / 1e6 / seconds, 2) if seconds else None,
            "tokens_per_second": round(statistics.tokens / seconds) if seconds and statistics.tokens else None,
        }
        rejected = sum(statistics.rejected.values())
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(statistics.rejected.items()))
        say(f"{statistics.lines:,} lines: {statistics.documents:,} documents, {rejected:,} rejected")
        if rejected:
            say(f"rejected: {reasons}; kept in {job.rejects}")
        if statistics.tokens:
            say(
                f"{statistics.tokens:,} tokens, {statistics.characters_per_token:.3f} characters a token; documents "
                f"of more than {self.max_length} tokens, kept whole: {statistics.longer_than_max_length:,}"
            )
        say(f"wrote {output_path} in {seconds:.1f} s ({job.progress.input_offset / 1e6 / max(seconds, 1e-9):.1f} MB/s)")
        return self._summary


# --------------------------------------------------------------------------------------------- the parts of the pass


def _chunks(lines: Iterator[Line], chunk_size: int) -> Iterator[list[Line]]:
    """Lists of at most `chunk_size` lines that end once they hold CHUNK_BYTES. The same lines give the same lists."""
    chunk, size = [], 0
    for line in lines:
        chunk.append(line)
        size += len(line.raw)
        if len(chunk) >= chunk_size or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _sort_out(chunk: list[Line], job: ResumableJob, statistics: Statistics) -> list[str]:
    """The chunk's new texts; its other lines go to the rejects."""
    texts, rejects = [], []
    for line in chunk:
        if line.text is not None:
            line.duplicate_of = job.seen.first_line(line.text, line.number)
            if line.duplicate_of is not None:
                line.text, line.reason = None, "duplicate"
        if line.text is not None:
            texts.append(line.text)
        else:
            statistics.rejected[line.reason] += 1
            rejects.append(line.reject())
    statistics.lines += len(chunk)
    statistics.count_texts(texts)
    job.write_rejects(rejects)
    return texts


def _commit(job: ResumableJob, statistics: Statistics, digest, since: float) -> float:
    """Make all up to here final; returns the time."""
    now = time.perf_counter()
    job.progress.seconds += now - since
    job.progress.statistics = statistics.to_record()
    job.progress.input_sha256 = digest.hexdigest()
    job.commit()
    return now


def _digest_until(file, offset: int | None = None):
    """SHA-256 of the input's first `offset` bytes (None: of all), where the file then stands."""
    digest = hashlib.sha256()
    left = float("inf") if offset is None else offset
    while left > 0 and (block := file.read(min(1 << 20, left) if offset is not None else 1 << 20)):
        digest.update(block)
        left -= len(block)
    return digest


def _byte_bar(total: int, initial: int):
    """A bar over the input's bytes: MB/s and the time left. In a log file, `progress_line` prints it now and then."""
    from tqdm import tqdm

    screen = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # noqa: SIM115 (lives as long as the bar)
    layout = {"unit": "B", "unit_scale": True, "desc": "processing", "mininterval": 0.5}
    bar = tqdm(total=total, initial=initial, file=screen, **layout)
    bar.last_line = time.perf_counter()  # a short job leaves no such line
    return bar


@contextlib.contextmanager
def _disk_errors(output_path: str | Path) -> Iterator[None]:
    """A full disk or a forbidden folder is told in one line; what was committed stays."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise InputError(f"{output_path}: {error}; run it again when that is mended: it goes on from there") from error


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _size(path: str | Path) -> int:
    open_jsonl(path).close()  # says what is wrong with it
    return Path(path).stat().st_size


def _check_paths(input_path: str | Path, output_path: str | Path) -> None:
    output = Path(output_path)
    if output.suffix == ".json":
        raise InputError(f"output_path: {output} would be overwritten by its own manifest; name it .bin")
    if Path(input_path).resolve() in (output.resolve(), output.with_name(output.stem + ".rejects.jsonl").resolve()):
        raise InputError(f"output_path: {output} or its rejects file is the input itself; give another name")


def _no_documents(input_path, text_field: str, statistics: Statistics, rejects: Path) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(statistics.rejected.items()))
    return (
        f"{input_path}: none of its {statistics.lines:,} lines is a document ({reasons}); expected one "
        f'{{"{text_field}": "..."}} a line (text_field names the key); the lines are in {rejects}'
    )


# ------------------------------------------------------------------------------------------------- the command line


def default_input_path(folder: str | Path = DATASET) -> Path:
    """The JSONL file to work on where none is named, and say why: MiniMind's corpus, the user's own, or the sample.

    Raises:
        InputError: the folder holds several files that could be meant, or none.
    """
    folder = Path(folder)
    corpus, sample = folder / DEFAULT_CORPUS, folder / SAMPLE_CORPUS
    if corpus.is_file():
        say(f"input: {corpus}, the corpus that the guide names")
        return corpus
    own = sorted(
        path
        for path in folder.glob("*.jsonl")
        if path.name != SAMPLE_CORPUS and not path.name.endswith(".rejects.jsonl")
    )
    sources = [path for path in own if not path.name.startswith("cleaned_")]  # raw_data.jsonl before what it gave
    own = sources or own
    if len(own) > 1:
        names = ", ".join(path.name for path in own)
        raise InputError(f"input_path: {folder} holds {len(own)} JSONL files ({names}); name one with --input_path")
    if own:
        say(f"input: {own[0]}, the only JSONL file of yours in {folder}")
        return own[0]
    if sample.is_file():
        say(f"input: {sample}, the sample corpus, since {folder} holds no other JSONL file")
        return sample
    raise InputError(f"input_path: {folder} holds no JSONL file; name one with --input_path")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description="Turn JSONL into the token file that training reads, or train a tokenizer.")
    add = parser.add_argument
    add("--input_path", nargs="+", help='JSONL, one {"text": ...} a line; default: what lies in dataset/')
    add("--output_path", help=f"the token file; default: {DEFAULT_OUTPUT}; with --clean_only {DEFAULT_CLEANED}")
    add("--tokenizer_path", help="folder of a tokenizer; default: the embedded one")
    add("--max_length", type=int, default=512, help="tokens; longer documents are kept whole and counted (%(default)s)")
    add("--chunk_size", type=int, default=50000, help="lines that are handled together at most (%(default)s)")
    add("--save_interval", type=int, default=1000000, help="tokens after which progress is made final (%(default)s)")
    add(
        "--resume",
        type=true_or_false,
        nargs="?",
        const=True,
        default=True,
        metavar="true|false",
        help="go on with a half-made output and keep a finished one; false: make it anew (true)",
    )
    add("--text_field", default="text", help="key of the text in each JSON object (%(default)s)")
    add("--stats_path", help="where the statistics go; default: data_stats.json beside the output")
    add("--clean_only", action="store_true", help="write cleaned JSONL instead of tokens")
    add("--train_tokenizer", action="store_true", help="train a tokenizer on --input_path (several files, .gz too)")
    add("--tokenizer_output", help="folder that the trained tokenizer goes to")
    add("--vocab_size", type=int, default=6400, help="tokens of the trained tokenizer (%(default)s)")
    add("--overwrite_tokenizer", action="store_true", help="replace a tokenizer that is in --tokenizer_output already")
    return parser


def main() -> int:
    """Run the job that the flags ask for; returns the exit code."""
    arguments = _parser().parse_args()
    if arguments.train_tokenizer:
        return _train_tokenizer(arguments)
    if arguments.input_path and len(arguments.input_path) > 1:
        raise InputError("input_path: several files are for --train_tokenizer; a token file is made from one")
    source = arguments.input_path[0] if arguments.input_path else default_input_path()
    processor = OptimizedDataProcessor(
        arguments.tokenizer_path,
        arguments.max_length,
        arguments.chunk_size,
        arguments.save_interval,
        arguments.text_field,
    )
    output = Path(arguments.output_path or (DEFAULT_CLEANED if arguments.clean_only else DEFAULT_OUTPUT))
    stats_path = Path(arguments.stats_path or output.with_name("data_stats.json"))
    if stats_path.resolve() in (output.resolve(), manifest_path(output).resolve(), Path(source).resolve()):
        raise InputError(f"stats_path: {stats_path} is the input, the output or its manifest; give another name")
    if arguments.clean_only:
        processor.validate_and_clean_jsonl(source, output, arguments.resume)
    else:
        processor.process_dataset(source, output, arguments.resume)
    processor.save_statistics(stats_path)
    return 0


def _train_tokenizer(arguments: argparse.Namespace) -> int:
    from model.train_tokenizer import train_tokenizer

    if not arguments.tokenizer_output:
        raise InputError("tokenizer_output: name the folder that the trained tokenizer goes to")
    sources = arguments.input_path or [default_input_path()]
    say(f"training a tokenizer of {arguments.vocab_size:,} tokens on {len(sources)} file(s); it can take minutes")
    read = train_tokenizer(
        sources, arguments.tokenizer_output, arguments.vocab_size, arguments.text_field, arguments.overwrite_tokenizer
    )
    bad = ", ".join(f"{reason} {count:,}" for reason, count in sorted(read.rejected.items()))
    say(f"read {read.documents:,} documents, {read.characters:,} characters; bad lines left out: {bad or 'none'}")
    say(f"wrote {arguments.tokenizer_output}; use it with --tokenizer_path {arguments.tokenizer_output}")
    return 0


if __name__ == "__main__":
    run_command(main)

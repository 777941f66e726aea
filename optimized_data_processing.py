"""Data processing: JSONL of texts or chats in, the token file that training reads out.

    python optimized_data_processing.py                                    # works on what lies in dataset/
    python optimized_data_processing.py --input_path my.jsonl --output_path dataset/my.bin
    python optimized_data_processing.py --clean_only --input_path my.jsonl --output_path dataset/cleaned_data.jsonl
    python optimized_data_processing.py --input_path chats.jsonl --output_path dataset/chats.bin --show 3
    python optimized_data_processing.py --export megatron --input_path dataset/my.bin
    python optimized_data_processing.py --train_tokenizer --input_path a.jsonl b.jsonl --tokenizer_output my_tokenizer
    torchrun --nproc_per_node=2 optimized_data_processing.py --input_path big.jsonl --output_path dataset/big.bin

The input is cut into parts of some megabytes (`model.corpus.sources`). Workers turn each into tokens, on as many cores
and machines as there are (`model.corpus.worker`, `part_maker`); then the parts are merged in the input's order and what
repeats is left out (`merge`). A run that was killed makes the parts that are missing, and ends with the same bytes.
Every input line becomes a document or a line of the rejects file.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from model.corpus.cleaning import CleaningOptions
from model.corpus.finished import written_paths
from model.corpus.inspection import PACKINGS, counts_text
from model.corpus.job import WARNED_SHARE, Job
from model.corpus.options import ProcessingOptions
from model.corpus.recognition import recognise_format
from model.corpus.sources import ENDINGS, OUR_ENDINGS, find_sources
from model.errors import InputError, command_line, counted
from model.options import options_of
from model.storage.files import is_same_file, read_json, refuse_overwriting, refuse_overwriting_inputs, write_json
from model.token_file.manifest import MAX_MANIFEST_BYTES
from utils import (
    CommandParser,
    Processes,
    add_option,
    path_flag,
    progress_line,
    run_command,
    say,
    screen,
    true_or_false,
)

DATASET = Path("dataset")
DEFAULT_CORPUS = "mobvoi_seq_monkey_general_open_corpus.jsonl"  # what MiniMind's users have
SAMPLE_CORPUS = "classics_zh.jsonl"
DEFAULT_OUTPUT = DATASET / "pretrain_data.bin"
CLEANED = "cleaned_"  # begins the name of what --clean_only makes
DEFAULT_CLEANED = DATASET / f"{CLEANED}data.jsonl"


class OptimizedDataProcessor:
    """Turns JSONL into a token file; see the module's docstring.

    Memory does not grow with the input, but for the names of its files. Each worker holds one part (8 MB unless
    save_interval is larger) and what becomes of it. Finding duplicates takes at most some 200 MB: the texts' hashes are
    sorted in pieces, on disk. One line may have up to 64 MiB.

    Args:
        tokenizer_path, max_length, chunk_size, save_interval: as in the guide.
        processes: the group that torchrun started; None: this process works alone.
        options: the other fields of `model.corpus.options.ProcessingOptions`, and those of its `CleaningOptions`:
            long_documents="split", val_share=0.01, min_characters=20, …

    Raises:
        InputError: an option has an impossible value.
    """

    def __init__(
        self,
        tokenizer_path: str | Path | None = None,
        max_length: int = 512,
        chunk_size: int = 50000,
        save_interval: int = 1000000,
        *,
        processes: Processes | None = None,
        **options,
    ) -> None:
        known = {field.name for cls in (ProcessingOptions, CleaningOptions) for field in dataclasses.fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise InputError(f"{unknown[0]}: no such option; the options are {', '.join(sorted(known))}")
        of_cleaning = {field.name for field in dataclasses.fields(CleaningOptions)}
        cleaning = CleaningOptions(**{name: options.pop(name) for name in of_cleaning & options.keys()})
        self.options = ProcessingOptions(
            tokenizer_path, max_length, chunk_size, save_interval, **{"cleaning": cleaning, **options}
        )
        self.processes = processes or Processes.alone()
        self._summary: dict | None = None  # of the last job
        self._inputs: list[str] = []

    def validate_and_clean_jsonl(
        self,
        input_path: str | Path | Sequence[str | Path],
        output_path: str | Path,
        resume: bool = True,
        weights: Sequence[float] | None = None,
    ) -> dict:
        """Write the good lines as `{"text": ...}`, and the others to `<output>.rejects.jsonl`.

        Other keys of the objects are dropped. A run that was killed resumes; a finished output is kept.

        Returns:
            the counts: lines, documents, rejected, rejected_by_reason, … (`Statistics.summary`).

        Raises:
            InputError: as `process_dataset`.
        """
        return self._run(input_path, output_path, resume, weights, tokenize=False)

    def process_dataset(
        self,
        input_path: str | Path | Sequence[str | Path],
        output_path: str | Path,
        resume: bool = True,
        weights: Sequence[float] | None = None,
    ) -> dict:
        """Make the token file `X.bin`, its manifest `X.json`, the documents' ends `X.ends`, and `X.rejects.jsonl`.

        A run that was killed resumes and ends with the same bytes. A finished one, run again with the same input,
        tokenizer and options, does nothing. With `resume=False` everything is made anew.

        Args:
            input_path: a file, a folder, a glob, `datasets:NAME?…`, `ms:NAME?…`, or a list of them
                (`model.corpus.sources`).
            output_path: of the token file.
            weights: how often the documents of each input are taken: 2 is twice, 0.5 every other one.

        Returns:
            the counts, as `validate_and_clean_jsonl`.

        Raises:
            InputError: the input cannot be read or holds no document; or the output was begun with, or made from,
                something else.
        """
        return self._run(input_path, output_path, resume, weights, tokenize=True)

    def save_statistics(self, path: str | Path) -> None:
        """Write the counts of the last job to a JSON file, and a picture of them to a PNG of the same name.

        Raises:
            InputError: nothing was processed yet, or there is another file of that name.
        """
        if self._summary is None:
            raise InputError("save_statistics: nothing was processed yet; call process_dataset first")
        if not self.processes.is_main:
            return
        path = _checked_stats_path(path)
        for file in (path, path.with_suffix(".png")):
            refuse_overwriting_inputs({"stats_path": file}, self._inputs)
        if (before := _described_output(path)) not in (None, self._summary["output"]):
            say(f"statistics: {path} held those of {before}, and is replaced")
        write_json(path, self._summary)
        try:
            from model.corpus.picture import draw_summary

            draw_summary(path.with_suffix(".png"), self._summary)
        except ImportError:
            say(f"statistics: {path} (no picture: that needs matplotlib: pip install matplotlib)")
        else:
            say(f"statistics: {path} and {path.with_suffix('.png')}")

    def _run(self, input_path, output_path: str | Path, resume: bool, weights, tokenize: bool) -> dict:
        output = _checked_output(output_path)
        ours = {path.resolve() for path in written_paths(output)}
        sources = find_sources(input_path, weights, ours, self.options.text_field, self.options.txt_documents)
        self._inputs = [source.location for source in sources if source.form != "dataset"]
        for path in written_paths(output):
            flag = "output_path" if path == output else f"output_path {output} writes several files"
            refuse_overwriting_inputs({flag: path}, self._inputs)
        sources, options = recognise_format(sources, self.options, say)
        job = Job(sources, output, options, tokenize, self.processes, say, _ByteBar)
        try:
            self._summary = job.run(resume)
        except OSError as error:  # a full disk, a forbidden folder
            raise InputError(f"{output}: {error}; once that is fixed, run it again: it resumes") from error
        return self._summary


class _ByteBar:
    """A bar over the input's bytes: MB/s and the time left. In a log file, `progress_line` prints it now and then."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        layout = {"unit": "B", "unit_scale": True, "desc": "processing", "mininterval": 0.5}
        self._bar = tqdm(total=total or None, file=screen(), **layout)
        self._bar.last_line = time.perf_counter()  # a short job leaves no such line

    def advance(self, count: int, postfix: str) -> None:
        """Move on by `count` bytes."""
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(count)
        progress_line(self._bar)

    def __enter__(self) -> "_ByteBar":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()


def _checked_output(output_path: str | Path) -> Path:
    if not isinstance(output_path, str | Path):
        raise InputError(f"output_path: {output_path!r} found, a file's name expected")
    output = Path(output_path)
    if output.is_dir():
        raise InputError(f"output_path: {output} is a folder, the name of a file expected")
    if not output.suffix:
        raise InputError(f"output_path: {output} has no ending; name it .bin or .jsonl")
    if output.suffix.lower() in (".json", ".ends", ".learn"):
        raise InputError(f"output_path: {output} is the name of a file beside the output; name it .bin or .jsonl")
    if output.suffix.lower()[1:] in (*PACKINGS, "parquet"):
        raise InputError(f"output_path: {output} would not be what its name says; name it .bin or .jsonl")
    return output


def _checked_stats_path(stats_path: str | Path) -> Path:
    """Where statistics may go: they replace nothing but statistics."""
    path = Path(stats_path)
    if not path.name or path.is_dir():
        raise InputError(f"stats_path: {path} is a folder, the name of a JSON file expected")
    if path.suffix.lower() == ".png":
        raise InputError(f"stats_path: {path} is the name of the picture; give that of a JSON file")
    if _described_output(path) is None:
        for file in (path, path.with_suffix(".png")):
            refuse_overwriting("stats_path", file)
    return path


def _described_output(stats_path: Path) -> str | None:
    """Which output the statistics in a file are of; None where there is no such file, or it holds something else."""
    try:
        values = read_json(stats_path, MAX_MANIFEST_BYTES)
        return values["output"] if "rejected_by_reason" in values else None
    except (InputError, KeyError):
        return None


# ------------------------------------------------------------------------------------------------- the command line


def default_input_path(folder: str | Path = DATASET) -> Path:
    """The JSONL file to process where none is named, with a line that says why: MiniMind's corpus, the only one of the
    user, or the sample.

    Raises:
        InputError: the folder holds several such files, or none.
    """
    folder = Path(folder)
    corpus, sample = folder / DEFAULT_CORPUS, folder / SAMPLE_CORPUS
    if corpus.is_file():
        say(f"input: {corpus}, the corpus that the guide names")
        return corpus
    own = sorted(
        path
        for path in folder.glob("*")
        if path.is_file()
        and path.name.lower().endswith(ENDINGS)
        and not path.name.startswith(".")
        and path.name not in (SAMPLE_CORPUS, f"{CLEANED}{SAMPLE_CORPUS}")
        and not path.name.endswith(OUR_ENDINGS)
    )
    sources = [path for path in own if not path.name.startswith(CLEANED)]  # raw_data.jsonl before what it gave
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
    parser = CommandParser(
        "--input_path", description="Turn JSONL, .txt … into the token file that training reads, or train a tokenizer."
    )
    add = parser.add_argument
    add(
        "--input_path",
        nargs="+",
        type=path_flag,
        help='JSONL, one {"text": ...} or one chat a line; a JSON array of such objects; plain .txt; each also as .gz, '
        ".zst, .xz, .bz2; Parquet; folders, globs; datasets:NAME?split=train, ms:NAME?split=train; default: what lies"
        " in dataset/",
    )
    add(
        "--weights",
        nargs="+",
        type=float,
        help="how often the documents of each input are taken; 0.5: one in two",
    )
    add(
        "--output_path",
        type=path_flag,
        help=f"the token file; default: {DEFAULT_OUTPUT}; with --clean_only {DEFAULT_CLEANED}",
    )
    add("--resume", help="resume a half-made output and keep a finished one; false: make it anew (true)", **SWITCH)
    add(
        "--show",
        type=int,
        metavar="N",
        help="print the first N documents of the output, or of a .bin given as --input_path, as training reads them; "
        "what is learned of chats is set apart",
    )
    add("--stats_path", type=path_flag, help="where the statistics go; default: data_stats.json beside the output")
    for title, cls in (("processing", ProcessingOptions), ("cleaning", CleaningOptions)):
        group = parser.add_argument_group(title)
        for field in options_of(cls).values():
            add_option(group, field)
    other = parser.add_argument_group("instead of a token file")
    add = other.add_argument
    add("--clean_only", action="store_true", help="write cleaned JSONL instead of tokens")
    add("--export", choices=("megatron", "nanotron"), help="write that library's index files for the .bin --input_path")
    add("--train_tokenizer", action="store_true", help="train a tokenizer on --input_path")
    add("--tokenizer_output", type=path_flag, help="folder for the trained tokenizer")
    add("--vocab_size", type=int, default=6400, help="tokens of the trained tokenizer (%(default)s)")
    add("--overwrite_tokenizer", action="store_true", help="replace the tokenizer in --tokenizer_output")
    return parser


SWITCH = {"type": true_or_false, "nargs": "?", "const": True, "default": True, "metavar": "true|false"}


def main() -> int:
    """Run the job that the flags ask for; returns the exit code."""
    arguments = _parser().parse_args()
    if arguments.train_tokenizer:
        return _train_tokenizer(arguments)
    if arguments.export:
        return _export(arguments)
    if arguments.show is not None and arguments.show < 1:
        raise InputError(f"show: {arguments.show} found, expected at least 1 document")
    if arguments.show and arguments.clean_only:
        raise InputError("show: it prints tokens, and --clean_only writes none; omit one of them")
    source = arguments.input_path or [default_input_path()]
    if arguments.show and all(str(path).lower().endswith(".bin") for path in source):
        for path in source:
            _show(path, arguments)
        return 0
    names = [field.name for cls in (ProcessingOptions, CleaningOptions) for field in dataclasses.fields(cls)]
    options = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    processor = OptimizedDataProcessor(**options, processes=Processes())
    output = _checked_output(arguments.output_path or (DEFAULT_CLEANED if arguments.clean_only else DEFAULT_OUTPUT))
    stats_path = _checked_stats_path(arguments.stats_path or output.with_name("data_stats.json"))
    for path in (stats_path, stats_path.with_suffix(".png")):
        refuse_overwriting_inputs({"stats_path": path}, source)
        if any(is_same_file(path, other) for other in written_paths(output)):
            raise InputError(f"stats_path: {path} is the output, or what lies beside it; give another name")
    make = processor.validate_and_clean_jsonl if arguments.clean_only else processor.process_dataset
    try:
        make(source, output, arguments.resume, arguments.weights)
        processor.save_statistics(stats_path)
        if arguments.show and processor.processes.is_main:
            _show(output, arguments)
    finally:
        processor.processes.close()
    return 0


def _show(token_path: str | Path, arguments: argparse.Namespace) -> None:
    """Print the first documents of a token file."""
    from model.corpus.show import shown_documents

    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for text in shown_documents(token_path, arguments.show, arguments.tokenizer_path, coloured):
        print(text, flush=True)


def _export(arguments: argparse.Namespace) -> int:
    from model.corpus.export import export_megatron, export_nanotron

    paths = arguments.input_path or [arguments.output_path or DEFAULT_OUTPUT]
    for path in paths:
        if arguments.export == "megatron":
            export_megatron(path, say)
        else:
            export_nanotron(path, say, arguments.tokenizer_path)
    return 0


def _train_tokenizer(arguments: argparse.Namespace) -> int:
    from model.corpus.train_tokenizer import train_tokenizer

    if not arguments.tokenizer_output:
        raise InputError("tokenizer_output: name the folder for the trained tokenizer")
    sources = arguments.input_path or [default_input_path()]
    read = train_tokenizer(
        sources,
        arguments.tokenizer_output,
        arguments.vocab_size,
        text_field=getattr(arguments, "text_field", "text"),
        overwrite=arguments.overwrite_tokenizer,
        format=getattr(arguments, "format", "auto"),
    )
    bad = counts_text(dict(sorted(read.rejected.items())))
    say(f"read {counted(read.documents, 'document')}, {read.characters:,} characters; rejected: {bad or 'none'}")
    rejected = sum(read.rejected.values())
    if (share := rejected / (read.documents + rejected)) >= WARNED_SHARE:
        say(f"warning: {share:.0%} of the lines were rejected{read.what_was_rejected()}")
    flag = command_line("--tokenizer_path", arguments.tokenizer_output)
    say(f"wrote {arguments.tokenizer_output}; use it with {flag}")
    return 0


if __name__ == "__main__":
    run_command(main)

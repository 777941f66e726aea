"""Whatever the input is packed in, and however many inputs there are: the tokens are those of the plain file."""

import csv
import datetime
import gzip
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest

from model.corpus.inspection import nothing_read
from model.corpus.job_folder import JobFolder, describe_changes
from model.corpus.sources import find_sources
from model.errors import InputError
from optimized_data_processing import SAMPLE_CORPUS, OptimizedDataProcessor, default_input_path
from tests.conftest import corpus_lines, read_documents, read_rejects
from tests.corpus.half_made import begin_and_stop, contents

GOOD = corpus_lines(120)
TEXTS = [json.loads(line)["text"].strip() for line in GOOD]
PLAIN = b"".join([*GOOD[:50], b"broken\n", *GOOD[50:], b"\xff\n", GOOD[3]])  # 120 documents, 3 rejects


@pytest.fixture
def processor(tokenizer_folder) -> OptimizedDataProcessor:
    return OptimizedDataProcessor(tokenizer_folder, workers=0, save_interval=500, clean=False)


@pytest.fixture
def expected(processor, tmp_path) -> dict[str, bytes]:
    """What the plain file gives."""
    return process(processor, write(tmp_path / "plain" / "raw.jsonl", PLAIN), tmp_path / "plain")


def process(processor, inputs, folder: Path, **options) -> dict[str, bytes]:
    processor.process_dataset(inputs, folder / "data.bin", **options)
    return {path.name: path.read_bytes() for path in folder.glob("data.*") if path.suffix != ".json"}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pack_zst(content: bytes, **options) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    return compressor.compress(content) + compressor.flush()


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


# ---------------------------------------------------------------------------------------------------- how it is packed


@pytest.mark.long
@pytest.mark.parametrize("members", [1, 5])
def test_gz_and_zst_of_one_frame_or_several_give_the_bytes_of_the_plain_file(processor, expected, tmp_path, members):
    cuts = [len(PLAIN) * number // members for number in range(members + 1)]  # anywhere, also within a line
    pieces = [PLAIN[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    gz = write(tmp_path / "a" / "raw.jsonl.gz", b"".join(map(gzip.compress, pieces)))
    zst = write(tmp_path / "b" / "raw.jsonl.zst", b"".join(map(pack_zst, pieces)))
    assert process(processor, gz, tmp_path / "a") == expected
    assert process(processor, zst, tmp_path / "b") == expected


def test_zst_with_the_largest_window_is_read(processor, expected, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)  # as `zstd --long=28` has it
    zst = write(tmp_path / "raw.jsonl.zst", pack_zst(PLAIN, compression_params=long))
    assert process(processor, zst, tmp_path) == expected


@pytest.mark.long
@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_gives_the_same_tokens(processor, expected, tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    path = write_parquet(tmp_path / "x.parquet", {"id": range(120), "text": column}, row_group_size=50)
    assert process(processor, path, tmp_path)["data.bin"] == expected["data.bin"]


@pytest.mark.long
def test_every_row_of_a_column_is_a_document_or_a_reject(tmp_path, tokenizer_folder):
    pyarrow = pytest.importorskip("pyarrow")
    binary = pyarrow.array(["甲".encode(), None, b"\xff\xfe", b"", "乙".encode()], pyarrow.binary())
    damaged = pyarrow.StringArray.from_buffers(5, *binary.buffers()[1:], binary.buffers()[0])  # no UTF-8, but a string
    columns = {"blob": binary, "damaged": damaged, "number": range(5), "day": [datetime.date(2026, 1, 1)] * 5}
    path = write_parquet(tmp_path / "x.parquet", columns)
    for name in ("blob", "damaged"):
        output = tmp_path / f"{name}.bin"
        counts = OptimizedDataProcessor(tokenizer_folder, workers=0, text_field=name).process_dataset(path, output)
        assert counts["rejected_by_reason"] == {"bad_utf8": 1, "no_text": 1, "empty": 1}
        assert [(r["line"], r["reason"]) for r in read_rejects(output)] == [
            (2, "no_text"),
            (3, "bad_utf8"),
            (4, "empty"),
        ]
        assert read_documents(output, tokenizer_folder) == ["甲", "乙"]
    for name in ("number", "day"):
        with pytest.raises(InputError, match=r"none of 5 lines is a document \(no_text 5\)"):
            OptimizedDataProcessor(tokenizer_folder, workers=0, text_field=name).process_dataset(
                path, tmp_path / "n.bin"
            )
    with pytest.raises(InputError, match="no column text; its columns are blob, damaged, number, day"):
        OptimizedDataProcessor(tokenizer_folder, workers=0).process_dataset(path, tmp_path / "n.bin")
    right = OptimizedDataProcessor(tokenizer_folder, workers=0, text_field="blob")  # the wrong ones left nothing behind
    assert right.process_dataset(path, tmp_path / "n.bin")["documents"] == 2


@pytest.fixture(params=["json", "csv", "parquet", "folder"])
def streamed(request, tmp_path) -> str:
    """The same texts as a dataset that `datasets` streams from this machine."""
    pytest.importorskip("datasets")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    folder, kind = tmp_path / "data set+1", request.param
    folder.mkdir()
    if kind == "csv":
        with open(folder / "x.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(TEXTS)])
    elif kind == "parquet":
        write_parquet(folder / "x.parquet", {"text": TEXTS})
    elif kind == "folder":  # its splits are told by the files' names
        write(folder / "train.jsonl", b'{"text": "x"}\n')
        write(folder / "test.jsonl", b"".join(GOOD))
        return f"datasets:{folder}?split=test"
    else:
        for number in range(2):
            write(folder / f"{number}.json", b"".join(GOOD[60 * number : 60 * number + 60]))
        return f"datasets:json?data_files={folder}/0.json&data_files={folder}/1.json"
    return f"datasets:{kind}?data_files={folder}/x.{kind}&split=train"


@pytest.mark.long
def test_a_streamed_dataset_gives_the_same_tokens(processor, expected, tmp_path, streamed, capsys):
    assert process(processor, streamed, tmp_path)["data.bin"] == expected["data.bin"]
    processor.process_dataset(streamed, tmp_path / "data.bin")
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.long
def test_folders_globs_and_lists_give_the_tokens_of_one_file(processor, expected, tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "1" / "deep" / "a.jsonl", b"".join(GOOD[:30]))
    write(folder / "1" / "z.ndjson.gz", gzip.compress(b"".join(GOOD[30:50])))
    write(folder / "2.jsonl.zst", pack_zst(b"".join(GOOD[50:90])))
    write_parquet(folder / "3.parquet", {"text": TEXTS[90:]})
    for name in ("old.rejects.jsonl", "old.changes.jsonl", "old.json", "data_stats.json", "notes.txt", "old.bin"):
        write(folder / name, b"none of the input\n")
    write(folder / "other.jsonl.parts" / "merged" / "other.jsonl", b"half made\n")
    given = {
        "folder": folder,
        "text": str(folder),
        "glob": [f"{folder}/1/**/*son*", f"{folder}/2*", f"{folder}/*.parquet"],
        "list": [folder / "1", f"{folder}/2.jsonl.*", folder / "3.parquet"],
    }
    for name, inputs in given.items():
        assert process(processor, inputs, tmp_path / name)["data.bin"] == expected["data.bin"]


def test_what_a_job_leaves_in_its_input_folder_is_none_of_its_input(tokenizer_folder, tmp_path, capsys, monkeypatch):
    write(tmp_path / "raw.jsonl", PLAIN)
    make = OptimizedDataProcessor(tokenizer_folder, workers=0, val_share=0.2).validate_and_clean_jsonl
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobFolder, "publish", Mock(side_effect=KeyboardInterrupt))  # the merged files are there already
        make(tmp_path, tmp_path / "cleaned.jsonl")
    for inputs in (tmp_path, tmp_path, f"{tmp_path}/*.jsonl"):
        assert make(inputs, tmp_path / "cleaned.jsonl")["documents"] == 120
    assert capsys.readouterr().err.count("nothing to do") == 3
    assert (tmp_path / "cleaned.val.jsonl").exists()


@pytest.mark.parametrize("name", ["data.json", "data.ends", "data.rejects.jsonl", "data.val.bin", "data.bin"])
def test_an_input_is_never_overwritten(processor, tmp_path, name):
    path = write(tmp_path / name, PLAIN)
    why = "" if name == "data.bin" else "data.bin writes several files: .*"
    with pytest.raises(InputError, match=f"{why}{name} is an input and would be overwritten"):
        processor.process_dataset(path, tmp_path / "data.bin", resume=False)
    assert path.read_bytes() == PLAIN and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name",
    [
        *("data.json", "data.val.bin", "data.ends", "data.val.json", "data.val.ends"),
        *("data.rejects.jsonl", "data.changes.jsonl"),
    ],
)
def test_a_file_that_the_job_did_not_make_is_never_overwritten(tokenizer_folder, tmp_path, name):
    raw, theirs = write(tmp_path / "raw.jsonl", PLAIN), write(tmp_path / name, b"{}")
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, val_share=0.2)
    with pytest.raises(InputError, match=f"output_path: .*{name}.* is there .*give another name"):
        processor.process_dataset(raw, tmp_path / "data.bin")
    assert theirs.read_bytes() == b"{}" and sorted(tmp_path.iterdir()) == sorted([raw, theirs])


def test_what_an_earlier_job_of_this_output_left_is_replaced(tokenizer_folder, tmp_path):
    raw, output = write(tmp_path / "raw.jsonl", b'{"body": "x  y"}\n'), tmp_path / "data.bin"
    with pytest.raises(InputError, match="its only line is not a document"):  # it leaves the rejects alone
        OptimizedDataProcessor(tokenizer_folder, workers=0, val_share=0.2).process_dataset(raw, output)
    write(raw, PLAIN + b'{"text": "x\\u0000y"}\n')
    for val_share in (0.2, 0.3, 0.0):
        processor = OptimizedDataProcessor(tokenizer_folder, workers=0, val_share=val_share)
        processor.process_dataset(raw, output, resume=False)
        assert (tmp_path / "data.rejects.jsonl").exists() and (tmp_path / "data.changes.jsonl").exists()
    assert not (tmp_path / "data.val.bin").exists()


# ------------------------------------------------------------------------------------------------------------- damaged


def damaged(name: str, folder: Path) -> Path | str:
    if name.startswith("datasets"):
        return name
    packed = {"gz": gzip.compress, "zst": pack_zst, "jsonl": lambda content: content}
    kind = name.split()[0]
    if kind == "parquet":
        content = bytearray(write_parquet(folder / "raw.parquet", {"text": TEXTS}).read_bytes())
    else:
        content = bytearray(packed[kind](PLAIN))
    if "cut" in name:
        content = content[: len(content) // (100 if "early" in name else 2)]
    elif "second" in name:  # the first frame is whole
        content += packed[kind](PLAIN)[:-7]
    elif "changed" in name:
        content[1000:1100] = b"\xff" * 100
    elif "none" in name:
        content = b"hello"
    elif "nothing" in name:
        content = packed[kind](b"")
    elif "utf-16" in name:
        content = packed[kind](PLAIN.decode("utf-8", "ignore").encode("utf-16"))
    return write(folder / f"raw.{kind if kind in ('jsonl', 'parquet') else 'jsonl.' + kind}", bytes(content))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gz cut", "raw.jsonl.gz is damaged (Compressed file ended before the end-of-stream marker was reached)"),
        ("gz second", "raw.jsonl.gz is damaged"),
        ("gz changed", "raw.jsonl.gz is damaged"),
        ("gz none", "raw.jsonl.gz is damaged (Not a gzipped file"),
        ("gz nothing", "raw.jsonl.gz: no line found"),
        ("gz utf-16", "raw.jsonl.gz is UTF-16, UTF-8 expected; unpack it to "),
        ("zst cut early", "raw.jsonl.zst is damaged (the file ends in the middle of a frame)"),
        ("zst cut", "raw.jsonl.zst is damaged (the file ends in the middle of a frame)"),
        ("zst second", "raw.jsonl.zst is damaged (the file ends in the middle of a frame)"),
        ("zst none", "raw.jsonl.zst is damaged"),
        ("zst nothing", "raw.jsonl.zst: no line found"),
        ("zst utf-16", "raw.jsonl.zst is UTF-16"),
        ("jsonl utf-16", "raw.jsonl is UTF-16"),
        ("parquet cut", "raw.parquet cannot be read as Parquet"),
        ("parquet changed", "raw.parquet cannot be read as Parquet"),
        ("parquet none", "raw.parquet cannot be read as Parquet"),
        ("datasets:", "datasets: names no dataset; expected datasets:NAME?split=train"),
        ("datasets:json?data_files=nowhere.json", "cannot be streamed (Unable to find"),
        ("datasets:json?data_files=nowhere.json&streaming=false", "multiple values for keyword argument 'streaming'"),
        ("datasets:no/such?split=train", "datasets:no/such?split=train cannot be streamed"),
    ],
)
def test_damaged_input_is_one_line_and_leaves_nothing(tmp_path, process_data_here, name, message):
    output = tmp_path / "out" / "data.bin"
    code, said = process_data_here("--input_path", damaged(name, tmp_path), "--output_path", output, "--workers", 0)
    said = [line for line in said.splitlines() if not line.startswith("encoder ")]
    assert code == 2 and len(said) == 1 and said[0].startswith("error: input_path: ") and message in said[0]
    assert not list(tmp_path.glob("out/*"))


def test_damage_far_into_a_file_leaves_parts_and_nothing_that_looks_finished(processor, tmp_path, monkeypatch):
    import model.corpus.job as job

    monkeypatch.setattr(job, "FIRST_BYTES", 1000)  # what is read before any part is made
    output, whole = (
        tmp_path / "out" / "data.bin",
        gzip.compress(random.Random(1).randbytes(9000).hex().encode() + PLAIN),
    )
    raw = write(tmp_path / "raw.jsonl.gz", whole[:-300])
    with pytest.raises(InputError, match="raw.jsonl.gz is damaged .*fetch it again"):
        processor.process_dataset(raw, output)
    assert [path.name for path in output.parent.iterdir()] == ["data.bin.parts"]
    write(raw, whole)
    with pytest.raises(InputError, match="half made, and this changed since: the input's size .*--resume false"):
        processor.process_dataset(raw, output)
    assert processor.process_dataset(raw, output, resume=False)["documents"] == 119  # one is broken by the noise


@pytest.mark.parametrize(
    ("library", "name"), [("zstandard", "zst"), ("pyarrow", "parquet"), ("datasets", "datasets:json?data_files=x.json")]
)
def test_a_library_that_is_missing_is_named(processor, tmp_path, monkeypatch, library, name):
    path = damaged(name, tmp_path)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(InputError, match=f"needs {library}: pip install {library}"):
        processor.process_dataset(path, tmp_path / "data.bin")
    assert not list(tmp_path.glob("data.bin*"))


@pytest.mark.long
def test_a_job_on_a_compressed_file_resumes(processor, tokenizer_folder, tmp_path, monkeypatch):
    raw = write(tmp_path / "raw.jsonl.gz", gzip.compress(PLAIN * 3))
    begin_and_stop(processor, raw, tmp_path / "data.bin", monkeypatch)
    several = OptimizedDataProcessor(tokenizer_folder, workers=2, save_interval=9, clean=False)
    several.process_dataset(raw, tmp_path / "data.bin")
    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    assert contents(tmp_path / "data.bin") == contents(tmp_path / "whole" / "data.bin")


# ------------------------------------------------------------------------------------------- several sources, weights


def test_rejects_and_statistics_tell_the_sources_apart(processor, tmp_path):
    write(tmp_path / "2025" / "part.jsonl", PLAIN)
    write(tmp_path / "2026" / "part.jsonl", b"[]\n" + GOOD[7] + b'{"text": "new"}\n' + GOOD[9] + b'{"text": "new"}')
    counts = processor.process_dataset([tmp_path / "2025", tmp_path / "2026"], tmp_path / "data.bin")
    second = [reject for reject in read_rejects(tmp_path / "data.bin") if reject.pop("source") == "2026/part.jsonl"]
    shown = [(r["line"], r["reason"], r.get("duplicate_of"), r.get("duplicate_of_source")) for r in second]
    assert shown == [
        (1, "not_an_object", None, None),
        (2, "duplicate", 8, "2025/part.jsonl"),
        (4, "duplicate", 10, "2025/part.jsonl"),
        (5, "duplicate", 3, "2026/part.jsonl"),
    ]
    assert [source["name"] for source in counts["sources"]] == ["2025/part.jsonl", "2026/part.jsonl"]
    assert [source["lines"] for source in counts["sources"]] == [123, 5]
    for name in ("lines", "documents", "rejected", "tokens", "characters"):
        assert sum(source[name] for source in counts["sources"]) == counts[name], name


@pytest.mark.long
def test_weights_say_how_often_a_document_is_taken(processor, tokenizer_folder, tmp_path):
    first, second = write(tmp_path / "a.jsonl", b"".join(GOOD[:60])), write(tmp_path / "b.jsonl", b"".join(GOOD[60:]))
    counts = processor.process_dataset([first, second], tmp_path / "data.bin", weights=[2, 0.5])
    taken = Counter(read_documents(tmp_path / "data.bin", tokenizer_folder))
    sampled = [text for text in TEXTS[60:] if taken[text]]
    assert [taken[text] for text in TEXTS[:60]] == [2] * 60
    assert [taken[text] for text in sampled] == [1] * len(sampled) and 18 <= len(sampled) <= 42
    assert counts["rejected_by_reason"] == {"not_sampled": 60 - len(sampled)}
    assert (counts["documents"], counts["documents_written"]) == (60 + len(sampled), 120 + len(sampled))
    left_out = [TEXTS[59 + reject["line"]] for reject in read_rejects(tmp_path / "data.bin")]
    assert left_out == [text for text in TEXTS[60:] if not taken[text]]

    shuffled = random.Random(1).sample(GOOD, 120)  # the content decides, not the place
    write(tmp_path / "c.jsonl", b"".join(shuffled))
    processor.process_dataset(tmp_path / "c.jsonl", tmp_path / "c.bin", weights=[0.5])
    assert set(sampled) == set(read_documents(tmp_path / "c.bin", tokenizer_folder)) & set(TEXTS[60:])
    processor.process_dataset(tmp_path / "c.jsonl", tmp_path / "d.bin", weights=[1.5])
    more = Counter(read_documents(tmp_path / "d.bin", tokenizer_folder))
    assert more == Counter(TEXTS) + Counter(read_documents(tmp_path / "c.bin", tokenizer_folder))


def test_a_text_that_an_earlier_source_left_out_is_taken_from_a_later_one(processor, tokenizer_folder, tmp_path):
    first, second = write(tmp_path / "a.jsonl", b"".join(GOOD)), write(tmp_path / "b.jsonl", b"".join(GOOD))
    counts = processor.process_dataset([first, second], tmp_path / "data.bin", weights=[0.5, 1])
    assert sorted(read_documents(tmp_path / "data.bin", tokenizer_folder)) == sorted(TEXTS)
    assert counts["documents"] == 120


@pytest.mark.parametrize("weights", [[1, 2, 3], [], [1], [0, 1], [-1, 1], [float("nan"), 1], ["2", 1], [True, 1], 2.0])
def test_weights_that_cannot_be_are_told(processor, tmp_path, weights):
    path = write(tmp_path / "raw.jsonl", PLAIN)
    with pytest.raises(InputError, match="^weights: "):
        processor.process_dataset([path, path], tmp_path / "data.bin", weights=weights)


def test_weights_that_take_nothing_are_told(processor, tmp_path):
    path = write(tmp_path / "raw.jsonl", GOOD[0])
    with pytest.raises(InputError, match="^weights: none of 1 line was taken; give larger ones"):
        processor.process_dataset(path, tmp_path / "data.bin", weights=[0.001])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_file_whose_name_is_not_utf8_is_read_and_its_name_spelled_out(processor, tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    with open(os.path.join(folder, "中文.jsonl".encode("gb18030")), "wb") as file:
        file.write(PLAIN)
    processor.process_dataset(tmp_path / "in", tmp_path / "data.bin")
    manifest = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert [source["name"] for source in manifest["sources"]] == [r"\xd6\xd0\xce\xc4.jsonl"]


def test_a_folder_that_cannot_be_listed_is_told(processor, tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.jsonl", PLAIN)
    write(tmp_path / "in" / "closed" / "b.jsonl", PLAIN)
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"^input_path: the folder .*closed cannot be listed \(Permission denied\)"):
        find_sources(tmp_path / "in")


def test_only_what_is_no_data_by_its_ending_accompanies_a_corpus(tmp_path, capsys):
    for name in ("notice-2024.jsonl", "README.txt", "a.jsonl"):
        write(tmp_path / "in" / name, GOOD[0])
    assert [source.name for source in find_sources(tmp_path / "in")] == ["a.jsonl", "notice-2024.jsonl"]
    assert "README.txt (about the corpus)" in capsys.readouterr().err


def test_more_files_than_a_manifest_has_room_for_are_refused(tmp_path, monkeypatch):
    import model.corpus.sources as sources

    monkeypatch.setattr(sources, "MOST_SOURCES", 2)
    for name in "abc":
        write(tmp_path / "in" / f"{name}.jsonl", GOOD[0])
    with pytest.raises(InputError, match="^input_path: 3 files found, at most 2 expected; join them"):
        find_sources(tmp_path / "in")


@pytest.mark.parametrize("name", ["a.json", "a.ENDS", "a.learn"])
def test_an_output_is_not_named_as_a_file_beside_it(processor, tmp_path, name):
    path = write(tmp_path / "raw.jsonl", PLAIN)
    with pytest.raises(InputError, match="^output_path: .* is the name of a file beside the output"):
        processor.process_dataset(path, tmp_path / name)


def test_the_users_own_file_comes_before_the_sample_whatever_its_name(tmp_path):
    for name in (SAMPLE_CORPUS, f"my_{SAMPLE_CORPUS}", f"cleaned_{SAMPLE_CORPUS}"):
        write(tmp_path / name, GOOD[0])
    assert default_input_path(tmp_path).name == f"my_{SAMPLE_CORPUS}"


def test_the_validation_file_of_another_output_is_no_output_to_continue(tokenizer_folder, tmp_path):
    path = write(tmp_path / "raw.jsonl", b"".join(GOOD))
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, val_share=0.1)
    processor.process_dataset(path, tmp_path / "data.bin")
    with pytest.raises(InputError, match="data.val.bin exists already, not made by this program from this input"):
        processor.process_dataset(path, tmp_path / "data.val.bin")


def test_a_source_of_another_kind_is_named(tmp_path, tokenizer_folder, capsys):
    chat = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
    chats = write(tmp_path / "chats.jsonl", json.dumps(chat).encode() + b"\n")
    texts = write(tmp_path / "texts.jsonl", b"".join(GOOD))
    OptimizedDataProcessor(workers=0).process_dataset([chats, texts], tmp_path / "data.bin")
    said = capsys.readouterr().err
    assert "warning: no line of texts.jsonl was kept: all inputs are read as one kind, chat" in said
    assert "warning: 99% of the lines were rejected" in said


def test_a_source_that_repeats_another_is_of_no_other_kind(processor, tmp_path, capsys):
    first, second = (write(tmp_path / name, b"".join(GOOD)) for name in ("a.jsonl", "b.jsonl"))
    processor.process_dataset([first, second], tmp_path / "data.bin")
    assert "was kept: all inputs are read as one kind" not in capsys.readouterr().err


def test_a_file_in_another_encoding_is_skipped_beside_good_ones(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    gbk = ("春风又绿江南岸，明月何时照我还。" * 20).encode("gb18030")
    (folder / "a.txt").write_bytes(gbk)
    (folder / "b.jsonl").write_text('{"text": "a"}\n')
    assert [source.name for source in find_sources(folder)] == ["b.jsonl"]
    assert "a.txt (GB18030, not UTF-8)" in capsys.readouterr().err
    (folder / "b.jsonl").unlink()
    (folder / "c.txt").write_text("好", encoding="utf-8")
    assert [source.name for source in find_sources(folder)] == ["c.txt"]
    assert "a.txt (GB18030, not UTF-8)" in capsys.readouterr().err
    (folder / "c.txt").unlink()
    for given in (folder, folder / "a.txt"):
        with pytest.raises(InputError, match="a.txt is GB18030, UTF-8 expected; convert it"):
            find_sources(given)


def test_rejected_texts_are_explained_by_their_reason_and_not_by_the_form_of_the_file():
    said = nothing_read("a.txt", {"repetitive": 2, "empty": 1}, "", "text", "text")
    assert said.startswith("a.txt: none of 3 lines is a document (empty 1, repetitive 2); repetitive: says the same")
    assert "expected one" not in said
    assert 'expected one {"text": "..."} a line' in nothing_read("a.jsonl", {"bad_json": 1}, "", "text", "text")


def test_what_changed_is_said_in_words():
    before = {"input_path": ["a.jsonl"], "clean": True, "the tokenizer": "0123456789abcdef" * 4, "min": None}
    now = {"input_path": ["b.jsonl", "c"], "clean": False, "the tokenizer": "f" * 64, "min": 3}
    assert describe_changes(before, now) == (
        "clean (was true, is false), input_path (was a.jsonl, is b.jsonl, c), min (was not set, is 3), "
        "the tokenizer (was 0123456789ab…, is ffffffffffff…)"
    )


def test_a_change_of_versions_is_not_told_as_one_of_the_input():
    common = {"clean": True}
    before = {"input_path": ["1.txt", "2.txt"], "the input's size": [4, 6], "weights": [1.0, 1.0], **common}
    now = {
        "input_path": ["p/*.txt"],
        "the input's size": [10],
        "weights": [1.0],
        "the files of p/*.txt": "ab",
        **common,
    }
    assert describe_changes(before, now).startswith("an earlier version read each small .txt as a source of its own")
    for changed in (now | {"the input's size": [11]}, now | {"clean": False}):
        assert "input_path (was 1.txt, 2.txt, is p/*.txt)" in describe_changes(before, changed)
    many = {f"the files of {n}/*.txt": "a" for n in range(9)}
    assert describe_changes(many, dict.fromkeys(many, "b")).endswith("the files of 4/*.txt (was a, is b), 4 more")


def test_many_texts_of_another_encoding_are_a_warning(tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(
            "床前明月光，疑是地上霜。".encode("utf-8" if number == 3 else "gb18030")
        )
    assert len(find_sources(tmp_path)) == 1
    assert "warning: 3 files of another encoding, not read, beside 1 in UTF-8: " in (said := capsys.readouterr().err)
    assert "0.txt is GB18030, UTF-8 expected; convert it: " in said


def test_json_in_a_txt_is_a_warning_and_a_name_is_not_always_that_of_a_companion(tmp_path, capsys):
    (tmp_path / "a.txt").write_text('{"text": "床前明月光"}\n', encoding="utf-8")
    (tmp_path / "notice of 3.txt").write_text("停电通知", encoding="utf-8")
    (tmp_path / "README_zh.txt").write_text("说明", encoding="utf-8")
    for given in (tmp_path, tmp_path / "a.txt"):
        assert len(find_sources(given)) == (2 if given == tmp_path else 1)
        assert f"warning: {tmp_path / 'a.txt'}: JSON in a .txt is read as plain text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ms:", "ms: names no dataset; expected ms:NAME"),
        ("ms:poems?split=train", "ms:poems.split=train found, expected ms:OWNER/NAME"),
        (["ms:me/poems", "datasets:me/poems"], "datasets: and ms: cannot be read by one command; make a file of each"),
    ],
)
def test_what_names_no_dataset_of_modelscope_is_refused(processor, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        processor.process_dataset(given, tmp_path / "data.bin")
    assert not list(tmp_path.iterdir())


def test_modelscope_that_is_missing_is_named(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it were not installed
    with pytest.raises(InputError, match=r'needs modelscope: pip install "modelscope\[datasets\]"'):
        processor.process_dataset("ms:me/poems", tmp_path / "data.bin")

"""A folder of very many small .txt files: few sources, and the tokens that each file as a source would give."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from model.corpus import plain_text, sources
from model.corpus.job import Job
from model.corpus.opening import open_source
from model.corpus.options import ProcessingOptions
from model.corpus.parts import stream_parts
from model.corpus.plain_text import SmallFiles, txt_documents
from model.corpus.sources import find_sources
from model.errors import InputError
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import ROOT, corpus_lines, read_documents, read_rejects
from tests.corpus.half_made import begin_and_stop, contents
from tests.tiny_runs import finish_ranks, start_two_ranks
from utils import Processes

TEXTS = [json.loads(line)["text"][:120] for line in corpus_lines(60)]
SMALL = 1000  # bytes, in these tests
ODD = {  # what a small file may hold
    "bom": "\ufeff甲乙\n丙".encode(),
    "two boms": "\ufeff\ufeff甲".encode(),
    "boms within": "甲\n\ufeff乙\n".encode(),
    "dos": "第一回\r\n\r\n  甲\r乙\r\n".encode(),
    "blank lines first": "\n \u3000\n\u3000\u3000甲\n\n乙\n\n".encode(),
    "blank": " \u3000\n\u2028\n".encode(),
    "bad line": "好\n坏".encode() + b"\xff\n" + "又好\n".encode(),
    "bad end": "好的".encode()[:-1],
    "nul": b"a\0b\n",
    "other separators": "甲\u2028乙\x0b丙\x85丁\x1c\n".encode(),
    "surrogate": b"\xed\xa0\x80\n",
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folders of many and of few small files, in whose midst are a large and a packed one."""
    folder = tmp_path / "news"
    for number, text in enumerate(TEXTS):
        write(folder / f"{('sport', 'tech')[number % 2]}" / f"{number:02d}.txt", f"{text}  \u3000\n")
    for number, (name, content) in enumerate(ODD.items()):
        write(folder / f"few{number // 3}" / f"{name}.txt", content)
    write(folder / "sport" / "20 large.txt", "大" * SMALL)
    write(folder / "tech" / "30.txt.gz", gzip.compress(TEXTS[7].encode() + "包".encode()))
    write(folder / "sport" / "99.txt", TEXTS[3])  # repeats what tech/03.txt, which comes later, holds
    return folder


@pytest.fixture
def grouping(monkeypatch):
    """A call decides from how many small files on they are joined."""
    for module in (sources, plain_text):
        monkeypatch.setattr(module, "SMALL_BYTES", SMALL)

    def set_threshold(most: int) -> None:
        monkeypatch.setattr(sources, "MANY_FILES", most)

    set_threshold(5)
    return set_threshold


@pytest.fixture
def processor(tokenizer_folder) -> OptimizedDataProcessor:
    return OptimizedDataProcessor(tokenizer_folder, workers=0, save_interval=300)


def read(*given) -> dict[str, list[str]]:
    """The files of each source that is several, by its name."""
    return {source.name: list(source.files.names) for source in find_sources(given) if source.files}


# ------------------------------------------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize(
    "options",
    [
        {"val_share": 0.3},
        {"txt_documents": "paragraph", "clean": False},
        {"txt_documents": "line", "min_characters": 5},
        {"long_documents": "split", "max_length": 50, "deduplicate": False},
    ],
)
def test_the_tokens_and_rejects_are_those_of_each_file_as_a_source(
    grouping, folder, tokenizer_folder, tmp_path, options
):
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, save_interval=300, **options)
    made, rejects, counts = {}, {}, {}
    for name, most in (("apart", 10**6), ("joined", 5)):
        grouping(most)
        output = tmp_path / name / "data.bin"
        counts[name] = processor.process_dataset(folder, output)
        made[name] = {key: value for key, value in contents(output).items() if key.endswith((".bin", ".ends"))}
        rejects[name] = [
            (record["reason"], record.get("raw"), record.get("file") or record["source"], _original(record))
            for record in read_rejects(output)
        ]
    assert made["joined"] == made["apart"] and len(made["joined"]) == (4 if "val_share" in options else 2)
    assert [(why, raw, os.path.basename(name), first) for why, raw, name, first in rejects["joined"]] == [
        (why, raw, os.path.basename(name), first) for why, raw, name, first in rejects["apart"]
    ]
    assert len(counts["apart"].pop("sources")) > 60 and len(counts["joined"].pop("sources")) < 10
    for count in counts.values():
        del count["vocabulary"]["most_frequent"]  # floats, added up in another order
    assert counts["joined"] == counts["apart"]


def _original(record: dict) -> str | None:
    """The name of the file whose document a rejected one repeats."""
    name = record.get("duplicate_of_file") or record.get("duplicate_of_source")
    return name and os.path.basename(name)


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_file_gives_the_same_documents_alone_and_among_others(tmp_path, unit):
    for name, content in ODD.items():
        write(tmp_path / f"{name}.txt", content)
    files = SmallFiles(str(tmp_path), "x", [f"{name}.txt" for name in ODD], [1] * len(ODD))
    expected = [(name, text) for name, content in ODD.items() for text in txt_documents(io.BytesIO(content), unit)]
    found = list(files.documents(unit, plain_text.BytesRead()))
    assert found == [text for _, text in expected]
    assert [files.name_of(line) for line in range(len(found))] == [f"x/{name}.txt" for name, _ in expected]


def test_up_to_a_hundred_small_files_are_sources_as_ever(processor, tmp_path):
    for number in range(sources.MANY_FILES):
        write(tmp_path / "in" / f"{number:03d}.txt", f"第{number}篇")
    assert [source.name for source in find_sources(tmp_path / "in")] == [f"{number:03d}.txt" for number in range(100)]
    write(tmp_path / "in" / "new.txt", "新")
    [source] = find_sources(tmp_path / "in")
    assert (source.name, source.location) == ("in/*.txt", str(tmp_path / "in" / "*.txt"))
    counts = processor.process_dataset(tmp_path / "in", tmp_path / "data.bin")
    assert counts["documents"] == 101 and [about["name"] for about in counts["sources"]] == ["in/*.txt"]
    [described] = json.loads((tmp_path / "data.json").read_bytes())["sources"]
    assert (described["name"], described["files"], described["size"]) == ("in/*.txt", 101, source.size)


@pytest.mark.long
def test_workers_and_ranks_change_no_byte(tokenizer_folder, tmp_path):
    for number in range(150):
        write(tmp_path / "in" / f"{number % 3}" / f"{number}.txt", TEXTS[number % 60])
    outputs = [tmp_path / name / "data.bin" for name in ("one", "two", "ranks")]
    for workers, output in zip((0, 2), outputs, strict=False):
        processor = OptimizedDataProcessor(tokenizer_folder, workers=workers, save_interval=600)
        processor.process_dataset(tmp_path / "in", output)
    flags = ["--input_path", tmp_path / "in", "--tokenizer_path", tokenizer_folder, "--save_interval", 600]
    script = [
        sys.executable,
        ROOT / "optimized_data_processing.py",
        *flags,
        "--workers",
        0,
        "--output_path",
        outputs[2],
    ]
    done = finish_ranks(start_two_ranks([*map(str, script)], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    made = contents(outputs[2])
    for output in outputs[:2]:
        assert {name: made[name] for name in contents(output)} == contents(output)
    assert "data.rejects.jsonl" in made


# ------------------------------------------------------------------------------------------------------ what is joined


def test_a_folder_of_many_is_a_source_and_folders_of_few_are_one(grouping, folder):
    assert read(folder) == {
        "news/*.txt": [f"few{number // 3}/{name}.txt" for number, name in _sorted_odd()],
        "sport/*.txt": [f"{number:02d}.txt" for number in range(0, 20, 2)],
        "sport/*.txt (2)": [*(f"{number:02d}.txt" for number in range(20, 60, 2)), "99.txt"],
        "tech/*.txt": [f"{number:02d}.txt" for number in range(1, 30, 2)],
        "tech/*.txt (2)": [f"{number:02d}.txt" for number in range(31, 60, 2)],
    }
    names = [source.name for source in find_sources(folder)]
    assert names[2] == "20 large.txt" and names[5] == "30.txt.gz"
    assert read(f"{folder}/**/*.txt").keys() == read(folder).keys() - {"tech/*.txt (2)"}


def _sorted_odd() -> list[tuple[int, str]]:
    return sorted(enumerate(ODD), key=lambda item: (item[0] // 3, f"{item[1]}.txt"))


def test_files_that_a_shell_lists_are_joined_and_an_output_among_them_is_refused(
    grouping, folder, processor, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder / "tech")
    names = sorted(name for name in os.listdir() if name.endswith(".txt"))
    [source] = find_sources(names)
    assert (source.name, source.location, source.files.names) == ("tech/*.txt", "*.txt", names)
    source = find_sources(".")[0]
    assert (source.location, source.files.names) == ("*.txt", names[:15])
    weights = [1.0] * 10 + [2.0] * 20
    assert [len(source.files.names) for source in find_sources(names, weights)] == [10, 20]
    with pytest.raises(InputError, match=r"output_path: .*11.txt.* is an input and would be overwritten"):
        processor.process_dataset(names, folder / "tech" / "11.txt", resume=False)


def test_files_of_many_folders_that_a_shell_lists_are_one_source(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{number // 2:02d}" / f"{number}.txt", TEXTS[number % 9]) for number in range(101)]
    [source] = find_sources(files)
    assert source.files.names == [file.relative_to(tmp_path).as_posix() for file in files]

    monkeypatch.chdir(tmp_path)  # two such lists, one of them relative: no folder holds the files of both
    relative = [file.relative_to(tmp_path) for file in files]
    assert [len(source.files.names) for source in find_sources([*files, *relative])] == [101, 101]


def test_a_search_through_very_many_files_is_told(grouping, folder, capsys, monkeypatch):
    monkeypatch.setattr(sources, "TOLD_FILES", 70)
    find_sources(folder)
    assert capsys.readouterr().err.startswith(f"looking at 74 files in {folder}\n")


def test_what_cannot_be_read_is_skipped_with_a_line(grouping, folder, capsys):
    write(folder / "sport" / "gbk.txt", ("春风又绿江南岸，明月何时照我还。" * 20).encode("gb18030"))
    write(folder / "sport" / "empty.txt", "")
    write(folder / "sport" / ".hidden.txt", "x")
    write(folder / "sport" / "README.txt", "about")
    if os.name != "nt":
        (folder / "sport" / "gone.txt").symlink_to(folder / "nowhere.txt")
    names = sum(read(folder).values(), [])
    assert len(names) == 72 and not {"gbk.txt", "empty.txt", ".hidden.txt", "README.txt", "gone.txt"} & {*names}
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    for name, why in {"gbk": "GB18030, not UTF-8", "empty": "empty", ".hidden": "hidden"}.items():
        assert f"{name}.txt ({why})" in said
    assert os.name == "nt" or "gone.txt (a broken link)" in said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_file_whose_name_is_not_utf8_is_read_and_its_name_spelled_out(grouping, folder, processor, tmp_path):
    with open(os.path.join(os.fsencode(folder), b"sport", "中文.txt".encode("gb18030")), "wb") as file:
        file.write(TEXTS[0].encode())
    processor.process_dataset(folder, tmp_path / "data.bin")
    assert r"sport/\xd6\xd0\xce\xc4.txt" in [record.get("file") for record in read_rejects(tmp_path / "data.bin")]


def test_a_file_that_may_not_be_read_is_one_line(grouping, folder, process_data_here, tmp_path, monkeypatch):
    def opened(path, *arguments, original=open, **options):
        if str(path) == str(folder / "sport" / "04.txt"):  # root may read any
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", opened)
    code, said = process_data_here("--input_path", folder, "--output_path", tmp_path / "data.bin")
    assert code == 2 and said.count("\n") == 1 and "Permission denied" in said and "04.txt" in said


def test_a_file_that_is_removed_before_it_is_read_is_one_line(
    grouping, folder, tmp_path, process_data_here, monkeypatch
):
    def found(*arguments, find=find_sources):
        result = find(*arguments)
        (folder / "sport" / "04.txt").unlink()
        return result

    monkeypatch.setattr("optimized_data_processing.find_sources", found)
    code, said = process_data_here("--input_path", folder, "--output_path", tmp_path / "data.bin", "--workers", 0)
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "No such file" in line and str(folder / "sport" / "04.txt") in line


def test_a_file_that_grew_since_it_was_found_is_read_in_pieces(grouping, folder, monkeypatch):
    monkeypatch.setattr(plain_text, "TXT_BYTES", SMALL)
    source = next(source for source in find_sources(folder) if source.name == "sport/*.txt")
    grown = "".join(f"第{number}行\n" for number in range(1000))
    write(folder / "sport" / "00.txt", grown)
    with open_source(source) as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(texts) > 10 and "".join(texts[: -len(source.files.names) + 1]) == grown


# -------------------------------------------------------------------------------------------------- where a document is


def test_rejects_repeats_and_samples_of_changes_name_the_file(grouping, folder, processor, tmp_path, capsys):
    output = tmp_path / "data.bin"
    processor.process_dataset(folder, output)
    by_reason = {record["reason"]: record for record in read_rejects(output)}
    bad, repeat = by_reason["bad_utf8"], by_reason["duplicate"]
    assert bad["source"] == "news/*.txt" and bad["file"].startswith("news/few")
    assert (repeat["file"], repeat["duplicate_of_file"]) == ("tech/03.txt", "sport/99.txt")
    assert repeat["duplicate_of_source"] == "sport/*.txt (2)"
    changes = [json.loads(line) for line in (tmp_path / "data.changes.jsonl").read_bytes().splitlines()]
    assert changes
    for change in changes:  # the file that is named holds the text
        path = folder.parent / change["file"] if change["file"].startswith("news/") else folder / change["file"]
        assert change["before"].split("\n")[0] in path.read_text("utf-8")


def test_of_one_source_too_the_file_is_named_and_the_warning_names_it(grouping, processor, tmp_path, capsys):
    for number in range(20):
        write(tmp_path / "in" / f"{number:02d}.txt", "好" + "\n" * number + ("\n" if number < 8 else "坏") + TEXTS[0])
    for number in range(8, 20):
        write(tmp_path / "in" / f"{number:02d}.txt", b"\xff\xfa" + bytes([64 + number]) + b"\xf9bad")
    processor.process_dataset(tmp_path / "in", tmp_path / "data.bin")
    records = read_rejects(tmp_path / "data.bin")
    bad = [(record["file"], record["line"]) for record in records if record["reason"] == "bad_utf8"]
    assert bad == [(f"in/{number:02d}.txt", number + 1) for number in range(8, 20)]
    assert not any("source" in record for record in records)
    said = capsys.readouterr().err
    assert "such as in/08.txt; " in said and str(tmp_path / "in" / "08.txt") in said


# ---------------------------------------------------------------------------------------------------- resumed, finished


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "longer", "swapped"])
def test_other_files_between_the_start_and_the_end_are_told(grouping, folder, processor, tmp_path, monkeypatch, change):
    output, first = tmp_path / "data.bin", folder / "tech" / "01.txt"
    begin_and_stop(processor, folder, output, monkeypatch)
    if change == "added":
        write(folder / "tech" / "02.txt", "新")
    elif change == "removed":
        first.unlink()
    elif change == "renamed":
        first.rename(first.with_name("00.txt"))
    elif change == "longer":
        write(first, first.read_bytes() + b"x")
    else:  # the sum of the sizes stays
        third = first.with_name("03.txt")
        (a, b), (x, y) = (first, third), (first.read_bytes(), third.read_bytes())
        write(a, y)
        write(b, x)
    told = r"half made, and this changed since: .*the files of tech/\*\.txt \(was [0-9a-f]{12}…, is [0-9a-f]{12}…\)"
    with pytest.raises(InputError, match=told):
        processor.process_dataset(folder, output)


def test_other_content_of_the_same_size_is_found(grouping, folder, processor, tmp_path, monkeypatch):
    output, path = tmp_path / "data.bin", folder / "few0" / "bom.txt"
    begin_and_stop(processor, folder, output, monkeypatch)
    before = path.read_bytes()
    write(path, before.replace("甲".encode(), "丁".encode()))
    with pytest.raises(InputError, match=r"half made, and since then .*news.\*\.txt changed \(bytes 0 to "):
        processor.process_dataset(folder, output)
    write(path, before)
    processor.process_dataset(folder, output)
    processor.process_dataset(folder, tmp_path / "whole" / "data.bin")
    assert contents(output) == contents(tmp_path / "whole" / "data.bin")
    write(path, before.replace("甲".encode(), "丁".encode()))
    with pytest.raises(InputError, match=r"this changed since it was made: the content of .*news.\*\.txt"):
        processor.process_dataset(folder, output)


# ------------------------------------------------------------------------------------------------------ what else reads


def test_the_progress_bar_moves_over_every_byte(grouping, folder):
    for source in find_sources(folder):
        seen = [disk for _, _, disk in stream_parts(source, 500, "text")]
        assert seen == sorted(seen) and seen[-1] == source.size


def test_workers_are_sent_no_names(grouping, folder, tmp_path):
    found = find_sources(folder)
    job = Job(found, tmp_path / "a.jsonl", ProcessingOptions(), False, Processes.alone(), print, None)
    tasks = list(job._tasks(Mock(), 500))
    assert len(tasks) > len(found) and not any(task.source.files for task in tasks)


def test_a_weight_takes_as_many_copies_and_chats_are_refused_as_of_one_file(
    grouping, folder, tokenizer_folder, tmp_path
):
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, deduplicate=False)
    counts = processor.process_dataset(folder, tmp_path / "data.bin", weights=[2])
    assert counts["documents_written"] == 2 * counts["documents"]
    assert len(read_documents(tmp_path / "data.bin", tokenizer_folder)) == 2 * counts["documents"]
    with pytest.raises(InputError, match=r"news/\*.txt.*: none of \d+ lines is a usable chat"):
        OptimizedDataProcessor(tokenizer_folder, workers=0, format="chat").process_dataset(folder, tmp_path / "c.bin")


def test_a_tokenizer_is_trained_on_them(grouping, folder, tmp_path, monkeypatch):
    from model.corpus.train_tokenizer import train_tokenizer

    said, read = [], {}
    for name, most in (("apart", 10**6), ("joined", 5)):
        grouping(most)
        read[name] = train_tokenizer([folder], tmp_path / name, 300, say=said.append)
    assert said[0] == said[1] and "on 74 files" in said[0]
    assert read["apart"].documents == read["joined"].documents and read["apart"].rejected == read["joined"].rejected
    assert contents(tmp_path / "apart" / "tokenizer.json") == contents(tmp_path / "joined" / "tokenizer.json")

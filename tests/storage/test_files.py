"""Outputs are checked against inputs, whatever they are called."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import model
from model.errors import InputError, counted
from model.storage.files import (
    cached_folder,
    new_folder,
    refuse_overwriting,
    refuse_overwriting_inputs,
    replacing,
    write_json,
)


def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, folder = tmp_path / "a.jsonl", tmp_path / "folder"
    source.write_text("text")
    folder.mkdir()
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for output in (source, "a.jsonl", "folder/../a.jsonl", "hard", "soft"):
        with pytest.raises(InputError, match="^output_path: .* is an input and would be overwritten"):
            refuse_overwriting_inputs({"output_path": output}, ["other", source])
    with pytest.raises(InputError, match="^out: folder/ is an input"):
        refuse_overwriting_inputs({"kept": "new", "out": "folder/"}, ["folder/"])
    with pytest.raises(InputError, match="^output_path: dangling, which is later, is an input"):
        refuse_overwriting_inputs({"output_path": "dangling"}, ["later"])
    refuse_overwriting_inputs({"output_path": "b.jsonl", "out": "folder/b"}, [source, folder])


def test_an_output_that_would_replace_something_is_refused(tmp_path):
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_text("text")
    empty.touch()
    with pytest.raises(InputError, match=r"^output: .*full exists already \(4 bytes\); give another path"):
        refuse_overwriting("output", full)
    with pytest.raises(InputError, match="is a folder"):
        refuse_overwriting("output", tmp_path)
    for free in (empty, tmp_path / "new", os.devnull):
        refuse_overwriting("output", free)


def test_the_first_to_fill_a_cached_folder_wins(tmp_path):
    """Another process fills it while this one does: both get the same whole folder, and nothing else is left."""
    folder = tmp_path / "cache" / "a"

    def fill_meanwhile(target):
        (target / "whole").write_text("second")
        cached_folder(folder, "whole", lambda other: (other / "whole").write_text("first"))

    assert cached_folder(folder, "whole", fill_meanwhile) == folder
    assert (folder / "whole").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    cached_folder(folder, "whole", lambda other: pytest.fail("it is there"))


def test_a_cached_folder_is_filled_again_where_a_file_is_gone(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "other").write_text("")
    cached_folder(folder, "whole", lambda target: (target / "whole").write_text("1"))
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_a_cached_folder_that_cannot_be_filled_leaves_nothing(tmp_path):
    def fail(target):
        (target / "half").write_text("")
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        cached_folder(tmp_path / "a", "whole", fail)
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        cached_folder(tmp_path / "file" / "a", "whole", fail)


@pytest.mark.skipif(os.name != "posix", reason="Windows flushes no folder")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EIO])
def test_a_file_system_that_flushes_no_folder_keeps_the_file(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(InputError, match=r"a.json: written, but its folder cannot be flushed to the disk \(.*\)$"):
            write_json(tmp_path / "a.json", {})
    else:
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    target = tmp_path / "a.json"
    with replacing(target) as first:
        first.write(b"first ")
        with replacing(target) as second:
            second.write(b"second")
        assert target.read_bytes() == b"second"
        first.write(b"whole")
    assert target.read_bytes() == b"first whole" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_folder_keep_apart_and_the_later_one_fails(tmp_path):
    with pytest.raises(InputError, match="model: cannot be written"), new_folder(tmp_path / "model") as first:
        (first / "weights").write_text("first")
        with new_folder(tmp_path / "model") as second:
            (second / "weights").write_text("second")
    assert (tmp_path / "model" / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_is_removed_and_a_living_one_keeps_its_file(tmp_path):
    code = "import sys, os; from pathlib import Path; from model.storage.files import temporary_path; "
    code += "print(temporary_path(Path('a.json')), flush=True); sys.stdin.read()"
    root = str(Path(model.__file__).parent.parent)
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    left = tmp_path / other.stdout.readline().strip()
    left.write_text("half")
    write_json(tmp_path / "a.json", {})
    assert left.exists()
    other.communicate()
    write_json(tmp_path / "b.json", {})
    assert left.exists()  # of another file
    write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_counts_are_in_words_that_fit():
    assert [counted(n, "text") for n in (0, 1, 1234)] == ["0 texts", "1 text", "1,234 texts"]
    assert counted(2, "process", "processes") == "2 processes"

"""Outputs are checked against inputs, whatever they are called."""

import os

import pytest

from model.errors import InputError
from model.storage.files import refuse_overwriting, refuse_overwriting_inputs


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

"""docs/kaggle.md, colab.md, windows.md, mac.md: what a page says of its preset, and that a next session continues.

tests/guide/test_docs.py runs the pages' commands.
"""

import re
import shlex
import shutil

import pytest

from model.training.config_file import read_config
from tests.conftest import ROOT, corpus_lines
from tests.guide.test_docs import DRIVE, SMALL, blocks, commands, read, twin
from tests.tiny_runs import exit_code_here

PLACES = ["kaggle", "colab", "windows", "mac"]
TIME = re.compile(r"\d+ h \d+ min")


def command_of(place: str, part: str) -> list[str]:
    """The words of the page's one command with its preset that has this part."""
    texts = [text for language, text in blocks(f"docs/{place}.md") if language == "bash"]
    found = [shlex.split(command) for text in texts for command in commands(text)]
    (words,) = (words for words in found if f"examples/{place}.yaml" in words and part in words)
    return words


@pytest.mark.parametrize("place", PLACES)
def test_a_page_is_short(place):
    assert len(read(f"docs/{place}.md").splitlines()) <= 60


@pytest.mark.parametrize("place", ["kaggle", "colab"])
def test_a_session_of_twelve_hours_has_time_to_save(place):
    assert 0 < read_config(ROOT / f"examples/{place}.yaml")["training"]["max_hours"] < 11.9


def test_colab_trains_on_the_local_disk_and_copies_to_the_drive():
    training = read_config(ROOT / "examples" / "colab.yaml")["training"]
    assert training["copy_to"].startswith(f"{DRIVE}/") and training["out_dir"] == "out/colab"


@pytest.mark.parametrize("place", PLACES)
def test_a_page_says_what_the_dry_run_of_its_preset_says(place, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = command_of(place, "--on")
    assert exit_code_here({"train_data_path": "no_such_file.bin"}, *words[2:]) == 0
    rows = dict(re.findall(r"^ *(\S+(?: \S+)*) {2,}(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert set(rows["fits in 80% of memory"].split()) == {"yes"}
    said = [rows["parameters"].split(", ")[0], re.search(r"[\d.]+[MG](?= tokens)", rows["steps"])[0]]
    for page in (f"docs/{place}.md", twin(f"docs/{place}.md")):
        assert all(number in read(page) for number in said)
        assert TIME.findall(read(page)) and set(TIME.findall(read(page))) <= set(TIME.findall(rows["the run"]))


@pytest.mark.long
def test_the_same_cell_continues_the_run_when_the_notebooks_disk_is_empty(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    (tmp_path / "my.jsonl").write_bytes(b"".join(corpus_lines(100)))
    local, drive = tmp_path / "local", tmp_path / "drive"
    drive.mkdir()
    flags = {
        "raw_data_path": tmp_path / "my.jsonl", "train_data_path": local / "my.bin", "out_dir": local / "colab",
        "copy_to": drive / "run", "save_interval": 2,
    }  # fmt: skip
    words = [*command_of("colab", "--resume")[2:], *SMALL.split()]
    for session in (1, 2):
        local.mkdir()
        assert exit_code_here({}, *words, *(f"--{name}={value}" for name, value in flags.items())) == 0
        said = capfd.readouterr().err
        assert "my.bin is missing: making it from" in said
        assert ("resuming from" in said) == (session == 2), said
        assert {"pretrain_64.pth", "checkpoint_step_4.pth"} <= {path.name for path in (drive / "run").iterdir()}
        shutil.rmtree(local)
        for name in ("pretrain_64.pth", "pretrain_64.json", "checkpoint_step_4.pth"):  # the session ended before
            (drive / "run" / name).unlink()

"""Paths in config files and flags: `~`, Windows' backslashes, spaces."""

import shlex

import pytest

import inference
import optimized_data_processing
import train
from model import convert
from model.errors import InputError, command_line
from model.options import file_path
from model.runs.folder import claim, refuse_closed
from model.runs.resume import check_fits
from model.training.config_file import read_config
from model.training.settings import FIELDS, Settings, build_settings

PATHS = [name for name, field in FIELDS.items() if field.metadata["path"]]


@pytest.fixture
def home(monkeypatch, tmp_path):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def read(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return build_settings(read_config(path), {}, source="config.yaml")


def test_every_setting_that_names_a_file_is_a_path():
    named = [name for name in FIELDS if name.endswith(("_path", "_dir", "_from", "_to"))]
    assert sorted(PATHS) == sorted(named)


def test_a_tilde_is_the_home_folder_in_the_config_file_and_in_flags(home, tmp_path):
    settings = read(tmp_path, "data: {train_data_path: ~/corpus.bin}\ntraining:\n  out_dir: '~/out'\n")
    assert settings.data.train_data_path == f"{home}/corpus.bin" and settings.training.out_dir == f"{home}/out"
    for name in PATHS:
        assert getattr(find(build_settings({}, {name: "~/x"}), name), name) == f"{home}/x"


def find(settings: Settings, name: str):
    return next(section for section in vars(settings).values() if name in vars(section))


@pytest.mark.parametrize("script", ["inference", "optimized_data_processing", "convert", "train"])
def test_a_tilde_is_the_home_folder_in_every_flag_that_names_a_file(script, home, monkeypatch):
    parsers = []

    class Stop(Exception):
        pass

    def caught(parser, *_):
        parsers.append(parser)
        raise Stop

    module = {"inference": inference, "optimized_data_processing": optimized_data_processing, "convert": convert}
    module = module.get(script, train)
    monkeypatch.setattr(module.CommandParser, "parse_args", caught)
    monkeypatch.setattr(module.CommandParser, "parse_known_args", caught)
    with pytest.raises(Stop):
        train.read_settings([]) if script == "train" else module.main()
    checked_later = FIELDS if script == "train" else ()  # with all settings
    for action in parsers[0]._actions:
        names_a_file = {"path", "file", "output", "config", "source", "target"} & set(action.dest.split("_"))
        if names_a_file and action.dest not in checked_later:
            assert action.type("~/a b") == f"{home}/a b", action.dest


def test_a_home_folder_that_is_not_there_is_no_folder_named_tilde(home):
    with pytest.raises(InputError, match="out_dir: '~nobody-at-all/x' found, a path of a known home folder"):
        build_settings({}, {"out_dir": "~nobody-at-all/x"})
    assert file_path("./~nobody-at-all") == "./~nobody-at-all"


@pytest.mark.parametrize("written", [r"C:\temp\new.bin", r"'C:\temp\new.bin'", r'"C:\\temp\\new.bin"'])
def test_a_windows_path_stays_as_it_is(tmp_path, written):
    assert read(tmp_path, f"data:\n  train_data_path: {written}\n").data.train_data_path == r"C:\temp\new.bin"


@pytest.mark.parametrize(
    "eaten",
    [r"C:\data\x.bin", r"C:\users\x", r"C:\xylophone", r"C:\temp\new.bin", r"D:\Nets\x", r"D:\LM", r"C:\x64ata"],
)
def test_what_double_quotes_ate_of_a_windows_path_is_refused_with_how_to_write_it(tmp_path, eaten):
    for name in ("data: {train_data_path", "training: {out_dir"):
        with pytest.raises(InputError, match="single quotes, or write it with /") as raised:
            read(tmp_path, f'{name}: "{eaten}"}}\n')
        assert "\n" not in str(raised.value) and "\t" not in str(raised.value)


def test_a_suggested_command_quotes_paths_with_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = build_settings({}, {"train_data_path": "my data/三 国.bin"})
    with pytest.raises(InputError) as raised:
        train.prepare_data_if_missing(settings)
    command = str(raised.value).partition("make it with: ")[2]
    assert shlex.split(command)[-1] == "my data/三 国.bin"


def test_windows_quotes_as_its_shell_does(monkeypatch):
    monkeypatch.setattr("model.errors.os.name", "nt")
    assert command_line("python", "train.py", "--out_dir", r"C:\my runs") == r'python train.py --out_dir "C:\my runs"'


def test_a_file_in_the_place_of_out_dir_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("")
    for out_dir in (file, file / "below"):
        with pytest.raises(InputError, match="^out_dir: .*config.yaml is a file, a folder expected"):
            claim(out_dir)
    assert file.read_text() == ""


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_made(tmp_path, monkeypatch):
    def refused(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    refuse_closed(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("model.runs.folder.tempfile.TemporaryFile", refused)
    with pytest.raises(InputError, match="^out_dir: cannot write to .*b .Permission denied.$"):
        refuse_closed(tmp_path / "a" / "b")


def test_a_missing_raw_file_names_its_setting(tmp_path):
    settings = build_settings(
        {"data": {"raw_data_path": str(tmp_path / "none.jsonl"), "train_data_path": str(tmp_path / "a.bin")}}, {}, "c"
    )
    with pytest.raises(InputError, match="^raw_data_path: no file .*none.jsonl"):
        train.prepare_data_if_missing(settings)


def test_a_hash_in_a_message_is_cut_to_12_digits(tmp_path):
    checkpoint = {"config": {}, "data": {}, "tokenizer_sha256": "a" * 64, "adapters": {}, "settings": {}}
    mine = {"config": {}, "data": {}, "tokenizer": {"sha256": "b" * 64}, "adapters": {}}
    with pytest.raises(InputError, match=f"another tokenizer: sha256 {'a' * 12}… there, {'b' * 12}… here; give"):
        check_fits(tmp_path, checkpoint, mine, "adamw")

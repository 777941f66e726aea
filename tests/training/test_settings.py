"""Settings: what a config file and flags may say, and what comes of what they may not."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.errors import InputError
from model.LMConfig import LMConfig
from model.training.config_file import load_settings, read_config
from model.training.recipe import RECIPES
from model.training.settings import (
    FIELDS,
    SECTION_OF,
    SECTIONS,
    ModelSettings,
    Settings,
    build_settings,
    recipe_lines,
)
from tests import forks

ROOT = Path(__file__).parent.parent.parent


def test_config_yaml_names_every_setting_with_its_default():
    values = read_config(ROOT / "config.yaml")
    assert {section: set(keys) for section, keys in values.items()} == {
        section: {field.name for field in dataclasses.fields(cls)} for section, cls in SECTIONS.items()
    }
    assert build_settings(values, {}) == Settings()


def test_the_model_section_is_LMConfig():
    shape = {field.name: field.default for field in dataclasses.fields(LMConfig)}
    section = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    assert section == shape | {"vocab_size": None}


def test_flags_beat_the_file_and_the_file_beats_the_defaults():
    settings = build_settings({"training": {"epochs": 3, "batch_size": 4}}, {"epochs": "7"})
    assert (settings.training.epochs, settings.training.batch_size, settings.training.patience) == (7, 4, 5)


def test_a_notebook_gives_settings_by_name_over_those_of_a_file(tmp_path):
    settings = load_settings(ROOT / "config_chat.yaml", init_from=tmp_path / "a.pth", epochs=7, learning_rate=1e-3)
    assert (settings.training.epochs, settings.training.learning_rate, settings.training.min_lr) == (7, 1e-3, 0)
    assert settings.training.init_from == str(tmp_path / "a.pth")
    assert settings.data.train_data_path == "./dataset/chats.bin" and load_settings() == Settings()
    with pytest.raises(InputError) as raised:
        load_settings(epohs=7, max_steps="many", dim=0)
    assert len(raised.value.args) == 3 and "epohs is unknown; did you mean 'epochs'?" in raised.value.args
    assert all(not problem.startswith("--") for problem in raised.value.args)


def test_the_guides_sample_config_is_accepted():
    file_values = {
        "data": {"tokenizer_path": "/path/to/tokenizer", "train_data_path": "./d.bin", "val_data_path": None},
        "training": {
            "epochs": 15, "batch_size": 32, "learning_rate": 3.0e-4, "optimizer_type": "adamw",
            "lr_scheduler": "cosine", "use_ema": True, "early_stopping": True,
        },
    }  # fmt: skip
    settings = build_settings(file_values, {})
    assert settings.training.use_ema and settings.training.early_stopping and settings.data.val_data_path is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("use_ema", "true", True), ("use_ema", "False", False), ("learning_rate", "3e-4", 3e-4),
        ("max_steps", "null", None), ("val_data_path", "a.bin", "a.bin"), ("lr_scheduler", "polynomial", "polynomial"),
    ],
)  # fmt: skip
def test_flags_are_texts_and_become_values(name, text, value):
    settings = build_settings({}, {name: text})
    assert next(vars(part)[name] for part in vars(settings).values() if name in vars(part)) == value


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  learning_rate: 3e-4\n")
    assert build_settings(read_config(path), {}).training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "auto", "auto"), ("learning_rate", " Auto ", "auto"), ("learning_rate", "1e-3", 1e-3),
        ("batch_size", "auto", "auto"), ("batch_size", 8, 8), ("warmup_steps", "auto", "auto"),
        ("warmup_steps", None, None), ("warmup_steps", "0", 0), ("compile", "auto", "auto"), ("compile", True, True),
        ("compile", "off", False),
    ],
)  # fmt: skip
def test_some_settings_accept_the_word_auto(name, value, expected):
    for settings in build_settings({"training": {name: value}}, {}), build_settings({}, {name: str(value)}):
        assert getattr(settings.training, name) == expected
        assert type(getattr(settings.training, name)) is type(expected)


def test_auto_in_a_config_file_is_a_word(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  learning_rate: auto\n  batch_size: auto\n  compile: false\n", encoding="utf-8")
    training = build_settings(read_config(path), {"min_lr": "50", "max_steps": "1"}).training
    assert (training.learning_rate, training.batch_size, training.compile) == ("auto", "auto", False)


@pytest.mark.parametrize("paths", [["a.bin"], ["a.bin", "b*.bin"]])
def test_several_token_files_are_a_list_in_the_file_and_several_words_of_the_flag(tmp_path, paths):
    from train import read_settings

    (tmp_path / "c.yaml").write_text(f"data:\n  train_data_path: {paths}\n  train_data_weights: [3, 1e-1]\n")
    expected = paths if len(paths) > 1 else paths[0]
    flags = ["--train_data_weights", "3", "1e-1"][: len(paths) + 1]
    assert read_settings(["--train_data_path", *paths, *flags]).data.train_data_path == expected
    if len(paths) > 1:
        data = read_settings(["--config", str(tmp_path / "c.yaml")]).data
        assert (data.train_data_path, data.train_data_weights) == (paths, [3.0, 0.1])


@pytest.mark.parametrize(("arguments", "expected"), [([], "auto"), (["--compile"], True), (["--compile", "no"], False)])
def test_a_bare_compile_flag_means_true(arguments, expected):
    from train import read_settings

    assert read_settings(arguments).training.compile is expected


WRONG = {
    "a misspelt key": ({"training": {"epohs": 3}}, "training.epohs", "'epochs'"),
    "a key in the wrong section": ({"training": {"dim": 64}}, "training.dim", "'model'"),
    "an unknown section": ({"optimizer": {"lr": 1}}, "'optimizer'", "training"),
    "a section that is a list": ({"training": [1]}, "'training'", "keys"),
    "text for a number": ({"training": {"epochs": "many"}}, "training.epochs", "whole number"),
    "a fraction for a whole number": ({"training": {"epochs": 1.5}}, "1.5", "whole number"),
    "true for a number": ({"training": {"batch_size": True}}, "batch_size", "whole number"),
    "a number for true": ({"training": {"use_ema": 1}}, "use_ema", "true or false"),
    "zero": ({"training": {"batch_size": 0}}, "batch_size", "at least 1"),
    "a negative rate": ({"training": {"learning_rate": -1}}, "learning_rate", "above 0"),
    "nan": ({"training": {"learning_rate": float("nan")}}, "learning_rate", "a number"),
    "another word than auto": ({"training": {"learning_rate": "automatic"}}, "learning_rate", "a number", "or auto"),
    "auto where it is not offered": ({"training": {"patience": "auto"}}, "patience", "'auto' found, a whole number"),
    "a number for compile": ({"training": {"compile": 1}}, "compile", "true or false or auto"),
    "null for a batch": ({"training": {"batch_size": None}}, "batch_size", "whole number", "or auto"),
    "an unknown choice": ({"training": {"dtype": "fp16"}}, "dtype", "float16"),
    "null where a value is needed": ({"training": {"epochs": None}}, "epochs", "whole number"),
    "a list for text": ({"data": {"val_data_path": ["a"]}}, "val_data_path", "text"),
    "an empty list": ({"data": {"train_data_path": []}}, "train_data_path: [] found, text, or a list of them"),
    "a list in a list": ({"data": {"train_data_path": ["a", ["b", "c"]]}}, "train_data_path", "text, or a list"),
    "a list of one in a list": ({"data": {"train_data_path": ["a", ["b"]]}}, "train_data_path", "text, or a list"),
    "null in a list": ({"data": {"train_data_weights": [1, None]}}, "train_data_weights", "above 0", "or a list"),
    "a weight of nothing": ({"data": {"train_data_weights": [1, 0]}}, "train_data_weights", "above 0"),
    "a weight too few": (
        {"data": {"train_data_path": ["a", "b", "c"], "train_data_weights": [1, 2]}},
        "train_data_weights: 2 found, but train_data_path has 3",
    ),
    "heads that do not divide": ({"model": {"n_heads": 16, "n_kv_heads": 5}}, "n_kv_heads", "divide"),
    "a dim that heads do not divide": ({"model": {"dim": 100}}, "dim", "multiple of"),
    "dropout of 1": ({"model": {"dropout": 1.0}}, "dropout", "below 1"),
    "min_lr above learning_rate": ({"training": {"min_lr": 1.0}}, "min_lr", "learning_rate"),
    "warm-up as long as the run": ({"training": {"warmup_steps": 9, "max_steps": 9}}, "warmup_steps", "max_steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_what_is_accepted(case):
    values, *expected = WRONG[case]
    with pytest.raises(InputError) as raised:
        build_settings(values, {})
    assert "\n" not in str(raised.value)
    for text in expected:
        assert text in str(raised.value)


def test_all_that_is_wrong_is_reported_at_once():
    with pytest.raises(InputError) as raised:
        build_settings({"training": {"epohs": 3, "dtype": "fp8"}}, {"patience": "0"})
    for name in ("epohs", "dtype", "--patience"):
        assert name in str(raised.value)


BAD_FILES = {
    "a key twice": ("training:\n  epochs: 1\n  epochs: 2\n", "given twice"),
    "an alias": ("data: &a {}\nmodel: *a\n", "aliases"),
    "a python tag": ("training: !!python/object/apply:os.system ['true']\n", "line 1"),
    "no yaml": ("training: [\n", "line"),
    "a list": ("- 1\n", "sections"),
    "a full-width colon": ("training：\n  batch_size: 3\n", "; training： has a full-width colon"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_config_file_is_one_line(case, tmp_path):
    text, expected = BAD_FILES[case]
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=expected) as raised:
        read_config(path)
    assert "\n" not in str(raised.value)


def test_the_command_line_reports_what_is_wrong_and_writes_nothing(tmp_path):
    command = [
        sys.executable,
        ROOT / "train.py",
        "--epoch",
        "3",
        "--learning_rate",
        "fast",
        "--out_dir",
        tmp_path / "o",
    ]
    result = forks.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert result.returncode == 2
    assert "--epoch: unknown; did you mean --epochs?" in result.stderr and "--learning_rate" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "o").exists()


def test_help_lists_every_flag():
    result = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0
    assert not [name for name in FIELDS if f"--{name} " not in result.stdout and f"--{name}\n" not in result.stdout]


@pytest.mark.parametrize("script", ["train.py", "inference.py", "optimized_data_processing.py"])
def test_help_loads_no_torch(script):
    """Which takes a second."""
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stderr == "False\n", result.stderr


def test_settings_are_checked_before_torch_is_loaded():
    code = "import sys, train; train.read_settings(['--optimizer_type', 'muon']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.stdout == "False\n", result.stderr


def test_a_recipe_counts_over_defaults_and_the_file_over_it():
    settings = build_settings({"training": {"recipe": "best", "learning_rate": 1e-3}, "model": {"dim": 64}}, {})
    training = settings.training
    assert (training.optimizer_type, training.lr_scheduler, training.batch_size) == ("muon", "linear", "auto")
    assert training.learning_rate == 1e-3 and settings.model.qk_norm is True and settings.model.dim == 64
    lines = recipe_lines(settings)
    assert len(lines) == len(RECIPES["best"])
    assert "recipe best: learning_rate would be auto; 0.001 is set" in lines


def test_a_recipe_as_a_flag_counts_over_the_file_and_other_flags_over_it():
    every = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    settings = build_settings(every, {"lr_scheduler": "wsd", "recipe": "best"})
    assert settings.training.optimizer_type == "muon" and settings.model.qk_norm is True
    assert settings.training.lr_scheduler == "wsd"
    assert not recipe_lines(build_settings(every, {}))


def test_what_a_recipe_sets_is_a_value_of_that_setting():
    for name, parts in RECIPES.items():
        for setting_name, (value, why) in parts.items():
            built = build_settings({}, {setting_name: value})
            assert getattr(getattr(built, SECTION_OF[setting_name]), setting_name) == value, (name, setting_name)
            assert why


def test_recipe_best_trains_in_16_bits_without_a_warning(flags):
    from tests.tiny_runs import command, run

    result = run(command(flags(recipe="best", max_steps=2, epochs=1, batch_size=4, dtype="bfloat16")))
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    assert result.stderr.count("recipe best: ") == len(RECIPES["best"])

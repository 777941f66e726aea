"""Fake hubs in processes of their own, and interpreters whose client libraries take them for the real ones."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, corpus_lines
from tests.forks import free_port
from tests.guide.home import Interpreter

IMPATIENT = """
import model.hubs.answers, huggingface_hub.utils._http as http
from types import SimpleNamespace
model.hubs.answers.ANSWER_SECONDS = 2  # in place of 25
http.time = SimpleNamespace(sleep=lambda seconds: None)  # between two attempts
"""
RUN = (
    "--dim 32 --n_layers 1 --n_heads 2 --n_kv_heads 2 --max_seq_len 32 --batch_size 2 --max_steps 4"
    " --eval_interval 2 --eval_steps 1 --device cpu"
).split()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The fake hub: `folder` has what it stores, `url` is its address, `log_in` gives the user a token."""
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("huggingface")

    def log_in(token: str | None) -> None:
        (home / "token").unlink(missing_ok=True)
        if token is not None:
            (home / "token").write_text(token)

    with serving("fake_hub.py", folder) as url:
        yield SimpleNamespace(folder=folder, home=home, url=url, log_in=log_in)


@contextlib.contextmanager
def serving(script: str, folder: Path) -> Iterator[str]:
    """Run a fake hub that stores in `folder`; yields its address."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


def environment(hub, url: str) -> dict[str, str]:
    """What makes huggingface_hub take an address for the hub, and upload without Xet."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(hub.home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="session")
def interpreter(hub, tmp_path_factory):
    """Runs commands with the fake hub."""
    yield from impatient(environment(hub, hub.url), tmp_path_factory)


@pytest.fixture(scope="session")
def cut_off(hub, tmp_path_factory):
    """Runs commands with a hub that refuses connections."""
    yield from impatient(environment(hub, f"http://127.0.0.1:{free_port()}"), tmp_path_factory)


def impatient(variables: dict[str, str], tmp_path_factory) -> Iterator[Interpreter]:
    """An interpreter that gives a silent hub 2 seconds."""
    script = tmp_path_factory.mktemp("script") / "impatient.py"
    script.write_text(IMPATIENT)
    interpreter = Interpreter(ROOT, variables)
    answer = interpreter.run([str(script)])
    assert answer["code"] == 0, answer["stderr"]
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def run_folder(interpreter, tmp_path_factory):
    """The out_dir of a tiny run on some texts of the sample corpus."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "classics.jsonl").write_bytes(b"".join(corpus_lines(200)))
    data = ["--input_path", folder / "classics.jsonl", "--output_path", folder / "d.bin", "--workers", 0]
    commands = [["optimized_data_processing.py", *data, "--val_share", 0.1, "--stats_path", folder / "stats.json"]]
    paths = ["--train_data_path", folder / "d.bin", "--val_data_path", folder / "d.val.bin"]
    commands += [["train.py", *paths, *RUN, "--out_dir", folder / "out"]]
    for command in commands:
        answer = interpreter.run([*map(str, command)])
        assert answer["code"] == 0, answer["stderr"]
    return folder / "out"


@pytest.fixture(scope="session")
def model_folder(interpreter, run_folder, tmp_path_factory):
    """The same weights as a folder for transformers, with what must not be sent beside them."""
    folder = tmp_path_factory.mktemp("converted") / "my_model"
    answer = interpreter.run(["-m", "model.convert", str(run_folder / "best_model.pth"), str(folder)])
    assert answer["code"] == 0, answer["stderr"]
    shutil.copy(run_folder / "checkpoint_step_4.pth", folder)
    (folder / ".env").write_text(json.dumps({"HF_TOKEN": "hf_secret"}))
    return folder

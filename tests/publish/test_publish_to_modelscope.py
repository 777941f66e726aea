"""`python -m model.publish --to ms:` through modelscope_hub at a fake hub, and each way in which one refuses."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from model.hubs.modelscope import PATIENCE
from tests.conftest import ROOT
from tests.forks import free_port
from tests.publish.conftest import impatient, serving
from tests.publish.test_publish import FILES, header, publish, refused
from tests.tiny_runs import HUNG, ONE_THREAD

pytest.importorskip("modelscope_hub", reason="pip install modelscope_hub")
pytestmark = pytest.mark.long
PRIVATE, PUBLIC = 1, 5  # as the hub encodes them
LOG_IN = """
import os, sys
from modelscope_hub.config import HubConfig, set_default_config
os.environ["MODELSCOPE_ENDPOINT"], *token = sys.argv[1:]
HubConfig().save_token(*token) if token else HubConfig().clear_token()
set_default_config(None)  # as in a new process
"""


def environment(home, url: str) -> dict[str, str]:
    """What makes modelscope_hub take an address for the hub, and not wait between two attempts."""
    attempts = {"MODELSCOPE_API_MAX_RETRIES": "1", "MODELSCOPE_UPLOAD_BLOB_MAX_ATTEMPTS": "1"}
    silence = {"MODELSCOPE_UPLOAD_COMMIT_MAX_ATTEMPTS": "1", "MODELSCOPE_API_TIMEOUT": "3"}
    return PATIENCE | attempts | silence | {"MODELSCOPE_ENDPOINT": url, "MODELSCOPE_HOME": str(home)}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The fake hub, as in conftest.py."""
    folder, home = tmp_path_factory.mktemp("modelscope"), tmp_path_factory.mktemp("modelscope_home")
    (home / "log_in.py").write_text(LOG_IN)
    with serving("fake_modelscope.py", folder) as url:
        yield SimpleNamespace(folder=folder, home=home, url=url)


@pytest.fixture(scope="session")
def interpreter(hub, tmp_path_factory):
    """Runs commands with the fake hub."""
    yield from impatient(environment(hub.home, hub.url), tmp_path_factory)


@pytest.fixture
def log_in(hub, interpreter):
    """Leaves a token where `modelscope login` does, "good" to begin with."""

    def log_in(token: str | None, url: str = hub.url) -> None:
        answer = interpreter.run([str(hub.home / "log_in.py"), url, *([token] if token else [])])
        assert answer["code"] == 0, answer["stderr"]

    log_in("good")
    return log_in


def about(hub, repository: str) -> dict:
    """What a repository was made with."""
    return json.loads((hub.folder / "models" / f"{repository}.json").read_text())


def test_a_run_is_published_privately_and_can_be_published_again(hub, interpreter, log_in, run_folder):
    for state in ("new", "replacing what is there"):
        answer = publish(interpreter, run_folder, "ms:me/first", "--license", "apache-2.0")
        assert answer["code"] == 0 and f"private, license apache-2.0, {state})" in answer["stderr"], answer["stderr"]
        assert answer["stderr"].endswith(f"published: {hub.url}/models/me/first\n") and not answer["stdout"]
        assert "good" not in answer["stderr"] and "modelscope_hub" not in answer["stderr"]
    published = hub.folder / "models" / "me" / "first"
    assert sorted(path.name for path in published.iterdir()) == FILES
    assert about(hub, "me/first") == {"Path": "me", "Name": "first", "Visibility": PRIVATE, "License": "apache-2.0"}
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "modelscope download --model me/first --local_dir first\n" in card
    assert header(card)["tasks"] == ["text-generation"] and header(card)["frameworks"] == ["pytorch"]


def test_a_public_repository_is_made_and_updated_only_on_demand(hub, interpreter, log_in, model_folder):
    assert "a public repository exists" not in publish(interpreter, model_folder, "ms:lab/open", "--public")["stderr"]
    assert about(hub, "lab/open") == {"Path": "lab", "Name": "open", "Visibility": PUBLIC, "License": "Other"}
    sent = (hub.folder / "models" / "lab" / "open" / "model.safetensors").read_bytes()
    assert sent == (model_folder / "model.safetensors").read_bytes()
    line = refused(publish(interpreter, model_folder, "ms:lab/open"))
    assert "a public repository exists, private expected; give --public" in line


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        (None, "ms:me/x", "no token found; log in with `modelscope login --token …`, or set MODELSCOPE_API_TOKEN"),
        ("expired", "ms:me/x", "refuses the token (401); log in"),
        ("good", "ms:stranger/x", "forbids it (403); give an owner that is you or your organization"),
        ("good", "ms:me/taken", "the name is taken, by a repository that your token cannot see; give another name"),
        ("good", "ms:me/silent", "cannot be reached (no answer within 2 seconds); check the network"),
    ],
)
def test_a_hub_that_refuses_is_one_line_and_nothing_is_made(hub, interpreter, log_in, run_folder, token, to, message):
    log_in(token)
    answer = publish(interpreter, run_folder, to)
    line = refused(answer)
    assert line.startswith(f"error: {to}: ") and message in line, line
    assert (token or "no token") not in answer["stderr"].replace("no token found", "")
    assert not (hub.folder / "models" / to.removeprefix("ms:")).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", " broke ("),
        ("full", "answers with an error ([413] no space"),
        ("locked", "forbids it (403)"),
        pytest.param("mute", " broke (Request timed out: ", marks=pytest.mark.slow),
    ],
)
def test_an_upload_that_fails_says_why_in_one_line(hub, interpreter, log_in, run_folder, name, message):
    """The library itself only counts the files that failed."""
    line = refused(publish(interpreter, run_folder, f"ms:me/{name}"))
    assert line.startswith(f"error: ms:me/{name}: sending failed: ") and message in line, line
    assert line.endswith("some of the files may be there: run the command again") and "signature" not in line
    assert not (hub.folder / "models" / "me" / name / "model.safetensors").exists()
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".publish")]


def test_without_a_network_it_is_one_line(interpreter, log_in, run_folder):
    log_in("good", f"http://127.0.0.1:{free_port()}")
    line = refused(publish(interpreter, run_folder, "ms:me/x"))
    assert "Connection refused); check the network, or MODELSCOPE_ENDPOINT" in line


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C as a signal")
def test_ctrl_c_during_an_upload_leaves_nothing_behind(hub, run_folder):
    before = sorted(run_folder.iterdir())
    command = [sys.executable, "-m", "model.publish", str(run_folder), "--to", "ms:me/mute", "--yes"]
    variables = environment(hub.home, hub.url) | {"MODELSCOPE_API_TOKEN": "good", "MODELSCOPE_API_TIMEOUT": str(HUNG)}
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD | variables
    ) as process:
        assert any(line.startswith("sending") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130 and sorted(run_folder.iterdir()) == before

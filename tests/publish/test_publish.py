"""`python -m model.publish`: the card, what is sent to a hub, and each way in which a hub refuses."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from model.errors import InputError
from model.publish.__main__ import _stage
from model.publish.card import Publication, license_of
from model.publish.history import History, public_name, read_history
from model.runs.folder import recorded_source
from model.weights import load_weights
from model.weights.transformers_folder import save_transformers
from tests.conftest import ROOT
from tests.model_shapes import weights_of
from tests.publish.conftest import environment
from tests.tiny_runs import HUNG, ONE_THREAD

pytest.importorskip("huggingface_hub.utils._http", reason="huggingface_hub 1 or newer")
pytestmark = pytest.mark.long
FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
FILES += ["tokenizer_config.json"]


@pytest.fixture(autouse=True)
def logged_in(hub):
    hub.log_in("good")


def publish(interpreter, folder, to, *flags) -> dict:
    """The answer of `python -m model.publish` with --yes."""
    return interpreter.run(["-m", "model.publish", str(folder), "--to", to, *flags, "--yes"])


def refused(answer: dict) -> str:
    """The one line that an answer refuses with."""
    lines = [line for line in answer["stderr"].splitlines() if line.startswith("error:")]
    assert answer["code"] == 2 and len(lines) == 1 and "Traceback" not in answer["stderr"], answer["stderr"]
    assert answer["stderr"].rstrip().splitlines()[-1] == lines[0]
    return lines[0]


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_best_weights_of_a_run_are_published_privately_with_a_card_and_can_be_published_again(
    hub, interpreter, run_folder
):
    for state in ("new", "replacing what is there"):
        answer = publish(interpreter, run_folder, "hf:me/first", "--license", "apache-2.0")
        assert answer["code"] == 0 and f"private, license apache-2.0, {state})" in answer["stderr"], answer["stderr"]
        assert answer["stderr"].endswith(f"published: {hub.url}/me/first\n") and "good" not in answer["stderr"]
        assert all(f"    {name} " in answer["stderr"] for name in FILES)
    published = hub.folder / "models" / "me" / "first"
    assert sorted(path.name for path in published.iterdir()) == FILES
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".publish")]
    card = (published / "README.md").read_text(encoding="utf-8")
    assert header(card)["license"] == "apache-2.0" and header(card)["language"] == ["zh"]
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    best = min((event for event in events if "val_loss" in event), key=lambda event: event["val_loss"])
    manifest = json.loads((run_folder.parent / "d.json").read_text(encoding="utf-8"))
    for fact in (
        f"| Held-out bits per byte | {best['bits_per_byte']:.4f} ",
        f"| Trained on | {best['tokens']:,} tokens, in {best['step']} steps |",
        f"| Tokens in the data | {manifest['tokens']:,} |",
        "| `classics.jsonl` | 200 | ",
        "| Hardware | CPU (",
    ):
        assert fact in card, card
    assert str(run_folder.parent) not in card


def test_what_the_card_says_to_run_runs(hub, interpreter, run_folder, tmp_path):
    """The commands of the card, on the published files, but for the download: both write the same text."""
    assert publish(interpreter, run_folder, "hf:me/usable")["code"] == 0
    published = hub.folder / "models" / "me" / "usable"
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "hf download me/usable --local-dir usable\n" in card
    found = re.search(r"python (inference.py) --model_path usable --prompt \"(.+)\"", card)
    greedy = ["--max_new_tokens", "8", "--temperature", "0", "--repetition_penalty", "1"]
    ours = interpreter.run([found[1], "--model_path", str(published), "--prompt", found[2], *greedy])
    script = tmp_path / "use.py"
    example = card.split("```python\n")[1].split("```")[0].replace("me/usable", str(published))
    greedy = "max_new_tokens=8, do_sample=False, repetition_penalty=1.0"
    script.write_text(example.replace("max_new_tokens=100", greedy), encoding="utf-8")
    theirs = interpreter.run([str(script)])
    assert theirs["code"] == ours["code"] == 0, theirs["stderr"] + ours["stderr"]
    assert ours["stdout"].strip() and ours["stdout"].strip() == theirs["stdout"].strip()


def test_of_a_folder_only_the_model_is_sent_and_a_card_in_it_is_kept(hub, interpreter, model_folder):
    answer = publish(interpreter, model_folder, "hf:lab/converted", "--public")
    assert answer["code"] == 0 and "not sent: .env, checkpoint_step_4.pth" in answer["stderr"], answer["stderr"]
    published = hub.folder / "models" / "lab" / "converted"
    assert sorted(path.name for path in published.iterdir()) == FILES
    card = (published / "README.md").read_text(encoding="utf-8")
    assert header(card)["license"] == "unknown" and "has not named a license" in card and "not recorded" in card
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    answer = publish(interpreter, model_folder, "hf:lab/converted", "--public")
    assert answer["code"] == 0 and "public, license mit, replacing" in answer["stderr"]
    other = publish(interpreter, model_folder, "hf:lab/converted", "--public", "--license", "apache-2.0")
    assert "says license mit, --license apache-2.0 was given" in refused(other)
    assert "# Mine" in (published / "README.md").read_text(encoding="utf-8")
    (model_folder / "README.md").unlink()
    assert "a public repository exists, private expected; give --public" in refused(
        publish(interpreter, model_folder, "hf:lab/converted")
    )


def test_a_dry_run_writes_the_folder_and_asks_no_hub(hub, cut_off, run_folder):
    answer = cut_off.run(["-m", "model.publish", str(run_folder), "--to", "hf:me/dry", "--dry_run"])
    written = run_folder / "publish" / "dry"
    assert answer["code"] == 0 and f"{written}: written, nothing sent" in answer["stderr"]
    assert sorted(path.name for path in written.iterdir()) == FILES
    again = cut_off.run(["-m", "model.publish", str(run_folder), "--to", "hf:me/dry", "--dry_run"])
    assert "exists already" in refused(again)


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        (None, "hf:me/x", "no token found; log in with `hf auth login`, or set HF_TOKEN"),
        ("expired", "hf:me/x", "refuses the token (401)"),
        ("reader", "hf:me/x", "the token may only read"),
        ("good", "hf:stranger/x", "stranger is somebody else, the token belongs to me, lab; give hf:me/NAME"),
        ("good", "hf:me/taken", "the name is taken, by a repository that your token cannot see (409)"),
        ("colleague", "hf:lab/x", "forbids it (403)"),
        ("good", "hf:me/silent", "cannot be reached (no answer within 2 seconds)"),
        ("good", "hf:me/broken", "sending failed: the connection to "),
        ("good", "hf:me/full", "sending failed: "),
        ("good", "hf:me/invisible", "has no such repository (404); the files appear all at once or not at all"),
    ],
)
def test_a_hub_that_refuses_is_one_line_and_nothing_is_visible(hub, interpreter, run_folder, token, to, message):
    hub.log_in(token)
    answer = publish(interpreter, run_folder, to)
    line = refused(answer)
    assert line.startswith(f"error: {to}: ") and message in line, line
    assert (token or "no token") not in answer["stderr"].replace("no token found", "") and "signature" not in line
    folder = hub.folder / "models" / to.removeprefix("hf:")
    assert not folder.exists() or not list(folder.iterdir())


def test_a_license_that_the_hub_does_not_know_is_refused_before_anything_is_sent(hub, interpreter, run_folder):
    line = refused(publish(interpreter, run_folder, "hf:me/unlicensed", "--license", "nonsense"))
    assert '"license" must be one of the known ones' in line
    assert not list((hub.folder / "models" / "me" / "unlicensed").iterdir())


def test_without_a_network_it_is_one_line(cut_off, run_folder):
    assert "cannot be reached" in refused(publish(cut_off, run_folder, "hf:me/x"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "me/x"], "--to: 'me/x' found, hf:OWNER/NAME or ms:OWNER/NAME expected"),
        (["--to", "hf:x"], "--to: 'hf:x' found"),
        (
            ["--to", "hf:me/a--b", "--dry_run"],
            "--to: 'hf:me/a--b' found, at most 96 characters expected, without -- or",
        ),
        (["--to", "ms:me/a.", "--dry_run"], "--to: 'ms:me/a.' found, at most 96 characters expected"),
        (["--to", f"hf:me/{'a' * 94}", "--dry_run"], " found, at most 96 characters expected"),
        (["--to", "hf:me/x"], "hf:me/x: nobody to ask whether to send, since there is no terminal; give --yes"),
        (["--to", "hf:me/x", "--license", "a b"], "--license: 'a b' found, a name such as apache-2.0 expected"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(interpreter, run_folder, words, message):
    assert message in refused(interpreter.run(["-m", "model.publish", str(run_folder), *words]))


def test_folders_without_weights_are_refused(interpreter, tmp_path):
    assert "no weights in it; expected a run's out_dir" in refused(publish(interpreter, tmp_path, "hf:me/x"))
    assert "no such folder" in refused(publish(interpreter, tmp_path / "none", "hf:me/x"))
    (tmp_path / "config.json").write_text("{}")
    assert "config.json: a file; expected a run's" in refused(publish(interpreter, tmp_path / "config.json", "hf:me/x"))
    assert "no model.safetensors in it" in refused(publish(interpreter, tmp_path, "hf:me/x"))


def test_modelscope_that_is_not_installed_is_named(interpreter, run_folder):
    try:
        import modelscope_hub  # noqa: F401
    except ImportError:
        assert "pip install modelscope_hub" in refused(publish(interpreter, run_folder, "ms:me/x"))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_at_a_terminal_it_asks_and_sends_nothing_without_a_yes(hub, model_folder):
    ours, theirs = os.openpty()
    os.write(ours, b"n\n")
    command = [sys.executable, "-m", "model.publish", str(model_folder), "--to", "hf:me/asked"]
    variables = ONE_THREAD | environment(hub, hub.url)
    done = subprocess.run(
        command, cwd=ROOT, stdin=theirs, capture_output=True, text=True, encoding="utf-8", env=variables, timeout=HUNG
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 1 and done.stderr.endswith("nothing was sent\n"), done.stderr
    assert re.search(r"send 6 files, .*, to http\S+/me/asked \(private, license unknown, new\)\? \[y/N\]", done.stdout)
    assert not (hub.folder / "models" / "me" / "asked").exists()


@pytest.mark.parametrize("content", ["[" * 1200, "- " * 1200, "{", "a: 2026-99-99"])
def test_a_config_or_a_card_that_is_no_yaml_says_nothing(tmp_path, content):
    (tmp_path / "config.yaml").write_text(f"# started 20260101T000000\n{content}")
    assert read_history(tmp_path / "best_model.pth") == History() and recorded_source(tmp_path) is None
    assert license_of(f"---\n{content}\n---\n") is None


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_links_of_the_hugging_face_cache_are_followed_and_others_are_not_sent(tmp_path):
    save_transformers(tmp_path / "model", weights_of({"vocab_size": 6400}))
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    for folder in (snapshot, tmp_path / "cache" / "blobs"):
        folder.mkdir(parents=True)
    for file in (tmp_path / "model").iterdir():
        file.rename(tmp_path / "cache" / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    _stage(snapshot, tmp_path / "staged", Publication("hf", "me/x"))
    sent = [*(tmp_path / "staged").iterdir()]
    assert {file.name for file in sent} == {*FILES} and not any(file.is_symlink() for file in sent)
    assert load_weights(tmp_path / "staged").config.vocab_size == 6400
    (tmp_path / "secret").write_text("key")
    (snapshot / "LICENSE.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="LICENSE.txt is a link to .*secret, outside its folder, and is not exported"):
        _stage(snapshot, tmp_path / "again", Publication("hf", "me/x"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("datasets:owner/name?split=train&token=x", "datasets:owner/name"),
        ("datasets:/home/me/private/data", "datasets:data"),
        ("ms:owner/name", "ms:owner/name"),
        ("home/me/corpus.jsonl", "corpus.jsonl"),
        ("home/me/news/*.txt (2)", "news/*.txt (2)"),
    ],
)
def test_the_card_names_inputs_without_folders_and_options(source, name):
    assert public_name(source) == name

"""A library that is missing: one line with the command, whichever script and wherever it is imported."""

import re
import subprocess
import sys

import pytest

from model.requirements import LIBRARIES, OPTIONAL
from tests.conftest import ROOT


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("script", ["train.py", "inference.py", "optimized_data_processing.py", "model.convert"])
def test_a_script_without_its_libraries_is_one_line(script):
    name = ["-m", script] if script.startswith("model.") else [script]
    ended = run("-S", *name, "--help")  # -S: without what pip has installed
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.endswith(
        " is not installed; install all that is needed with: python -m pip install -r requirements.txt\n"
    )
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "library", "package"), [("train", "yaml", "pyyaml"), ("model.model", "torch", "torch")]
)
def test_the_missing_library_is_named_as_pip_knows_it(script, library, package, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules[{library!r}] = None; import {script}"
    ended = run("-c", code, cwd=tmp_path)
    assert ended.returncode == 2
    path = ROOT / "requirements.txt"
    command = f"python -m pip install -r {path}"
    assert ended.stderr == f"error: {package} is not installed; install all that is needed with: {command}\n"


def test_a_library_that_is_missed_late_is_one_line_too():
    code = "import sys; from utils import run_command; sys.modules['transformers'] = None\n"
    code += "def main():\n    import transformers\nrun_command(main)"
    ended = run("-c", code)
    assert ended.returncode == 2 and ended.stderr.startswith("error: transformers is not installed")


def test_an_optional_library_is_one_line_where_it_is_needed(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['gguf'] = None\n"
    code += "sys.argv[1:] = ['x.gguf', 'y']; import model.convert, utils; utils.run_command(model.convert.main)"
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3" + bytes(59))
    ended = run("-c", code, cwd=tmp_path)
    expected = "error: gguf is not installed; install it with: python -m pip install gguf\n"
    assert (ended.returncode, ended.stderr) == (2, expected)


def test_other_errors_keep_their_traceback():
    ended = run("-c", "import model; import no_such_module_of_ours")
    assert ended.returncode == 1 and "Traceback" in ended.stderr


def test_all_requirements_are_known():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    needed, optional, _ = (names_in(part) for part in re.split("^# (?:Optional|Tests).*$", text, flags=re.MULTILINE))
    assert {"yaml" if name == "pyyaml" else name for name in needed} <= LIBRARIES
    assert optional - LIBRARIES <= OPTIONAL


def names_in(part: str) -> set[str]:
    """The packages that lines of requirements.txt name."""
    return {re.match(r"[\w-]+", line)[0] for line in part.splitlines() if line.strip()}

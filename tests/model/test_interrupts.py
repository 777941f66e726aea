"""Ctrl-C while a program imports its libraries: one line and exit code 130, and never a program that runs on."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

# A library whose import is interrupted, and which catches that, as torch and numpy do somewhere.
CATCHES = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass
"""


@pytest.mark.long
@pytest.mark.parametrize("script", ["train.py", "inference.py", "optimized_data_processing.py", "model.convert"])
def test_ctrl_c_within_an_import_ends_a_program_at_once(tmp_path, script):
    (tmp_path / "numpy.py").write_text(CATCHES)
    name = ["-m", script] if script.startswith("model.") else [script]
    arguments = [sys.executable, *name, "--prompt=x"] if script == "inference.py" else [sys.executable, *name]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 130 and ended.stderr.splitlines()[-1] == "interrupted", ended.stderr


def test_who_imports_the_package_keeps_a_handler_and_an_interrupt_within_an_import(tmp_path):
    (tmp_path / "interrupted.py").write_text(CATCHES)
    code = "import model, signal, interrupted; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

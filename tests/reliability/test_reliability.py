"""The fast part of `python -m tests.reliability`: some cases of each promise, with real processes and real signals.

The faults of disks, numbers and single processes are in test_reliability_faults.py, bad files in test_bad_input.py.
"""

import importlib
import sys

import pytest

pytestmark = pytest.mark.long

TESTS = ["world_size"]
SLOW = ("signals", "exact_resume", "save_kills", "job_kills", "wandb_faults")
TESTS += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
FORKS = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed, which Windows cannot")


@FORKS
@pytest.mark.parametrize("name", TESTS)
def test_the_fast_cases_pass(name, tmp_path):
    module = importlib.import_module(f"tests.reliability.{name}")
    counts = module.run("fast", tmp_path)
    assert counts.cases > 0 and counts.passed == counts.cases, counts.failures

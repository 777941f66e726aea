"""The fast part of `benchmarks/reliability.py`: some cases of each promise, with real processes and real signals."""

import importlib
import sys

import pytest
from conftest import ROOT

TESTS = [
    "exact_resume", "save_kills", "job_kills", "signals", "corruption", "disks", "world_size", "numerics", "lost_ranks",
    "bad_input", "malicious", "wandb_faults", "soak", "restarts",
]  # fmt: skip
FORKS = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed, which Windows cannot")


@FORKS
@pytest.mark.parametrize("name", TESTS)
def test_the_fast_cases_pass(name, tmp_path):
    if not (ROOT / "benchmarks" / "reliability_cases" / f"{name}.py").exists():
        pytest.skip("written by no one yet")
    module = importlib.import_module(f"benchmarks.reliability_cases.{name}")
    counts = module.run("fast", tmp_path)
    assert counts.cases > 0 and counts.passed == counts.cases, counts.failures

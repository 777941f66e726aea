"""The fast cases of the reliability tests on damage: of files, disks, numbers and processes, and a long run."""

import sys

import pytest

if sys.platform == "win32":
    pytest.skip("processes are forked and killed, which Windows cannot", allow_module_level=True)

from tests.reliability import corruption, disks, lost_ranks, numerics, part_saves, soak

pytestmark = pytest.mark.long


SLOW = [pytest.param(module, marks=pytest.mark.slow) for module in (lost_ranks, part_saves, soak)]


@pytest.mark.parametrize("module", [corruption, disks, numerics, *SLOW], ids=lambda module: module.TITLE)
def test_the_fast_cases_pass(module, tmp_path):
    counts = module.run("fast", tmp_path)
    assert counts.cases > 0 and counts.passed == counts.cases, counts.failures

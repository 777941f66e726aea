"""The fast cases of the reliability tests on damage: of files, disks, numbers and processes, and a long run."""

import sys

import pytest

if sys.platform == "win32":
    pytest.skip("processes are forked and killed, which Windows cannot", allow_module_level=True)

from benchmarks.reliability_cases import corruption, disks, lost_ranks, numerics, soak


def test_damaged_checkpoints_are_refused_and_passed_over(tmp_path):
    counts = corruption.run("fast", tmp_path)
    assert counts.passed == counts.cases, counts.failures


def test_a_failing_disk_harms_no_older_checkpoint(tmp_path):
    counts = disks.run("fast", tmp_path)
    assert counts.passed == counts.cases, counts.failures


def test_numbers_that_are_not_finite_are_skipped_and_never_saved(tmp_path):
    counts = numerics.run("fast", tmp_path)
    assert counts.passed == counts.cases, counts.failures


def test_a_lost_process_is_named_and_ends_the_others(tmp_path):
    counts = lost_ranks.run("fast", tmp_path)
    assert counts.passed == counts.cases, counts.failures


def test_a_long_run_does_not_grow(tmp_path):
    counts = soak.run("fast", tmp_path)
    assert counts.passed == counts.cases, counts.failures

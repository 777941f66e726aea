"""What processes inherit: the bound on spinning OpenMP threads, for every script and before torch is loaded."""

import os
import subprocess
import sys

import pytest

from model.children import CHOSEN_BY_USER, SPIN, bound_spinning
from tests.conftest import ROOT


def without_choice():
    return {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}


def test_spinning_is_bounded_for_each_library_unless_the_user_chose():
    ours: dict = {}
    bound_spinning(ours)
    assert ours == SPIN and ours.keys() == {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    for name in CHOSEN_BY_USER:
        theirs = {name: "1234"}
        bound_spinning(theirs)
        assert theirs == {name: "1234"}


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's library, as torch's Linux wheels bring it")
@pytest.mark.parametrize(
    ("module", "user"),
    [
        ("train", {"GOMP_SPINCOUNT": "77"}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("train", "inference", "model.convert")),
    ],
)
def test_torch_loads_its_threads_with_the_bound(module, user):
    code = f"import {module}, torch; torch.ones(1)"
    environment = without_choice() | user | {"OMP_DISPLAY_ENV": "VERBOSE"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{user.get('GOMP_SPINCOUNT', '10000')}'" in shown.stderr, shown.stderr

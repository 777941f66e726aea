"""Training, evaluation, saving, resuming and generation on a device that torch has no module of by itself: a fake
`npu` (tests/fake_npu.py), which is no CPU to the program and computes what a CPU does.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from model.runs.saving import copy_to_cpu
from model.storage.archive import load_torch
from model.weights.names import on_cpu
from tests.conftest import ROOT
from tests.tiny_runs import TINY, assert_same_end, command, events, finish_ranks, losses, run, start_two_ranks, train

PLAIN = {"dtype": "float32"}
SHORT = {"max_steps": 6, "eval_interval": 6, "eval_steps": 1, "save_interval": 6}
DROPS = {"dtype": "float32", "dropout": 0.1, "use_ema": "true", "accumulation_steps": 2}


def with_npu(words: list[str]) -> list[str]:
    """A command of the project where torch has the device."""
    return [words[0], "-c", "from tests.fake_npu import run_script; run_script()", *words[1:]]


def on_npu(words: list[str]):
    """Run such a command; returns what it printed, once it has ended well."""
    result = run(with_npu(words))
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def build(tmp_path_factory, token_file, tokenizer_folder):
    """Builds the flags of a tiny run; all of a module's tests share the folder."""
    folder = tmp_path_factory.mktemp("npu")

    def built(name: str, **changes) -> dict:
        paths = {"train_data_path": token_file, "tokenizer_path": tokenizer_folder, "out_dir": folder / name}
        return {key: str(value) for key, value in (TINY | paths | changes).items()}

    return built


@pytest.fixture(scope="module")
def whole(build):
    """A run with dropout, not interrupted, and what it printed."""
    flags = build("whole", **DROPS)
    return flags, on_npu(command(flags)).stderr


def folder_of(flags: dict) -> Path:
    return Path(flags["out_dir"])


def test_the_device_is_found_and_named(whole):
    said = whole[1]
    assert "device npu:0: Ascend910B3" in said
    assert "deterministic true, which does nothing on npu" in said
    assert "compile false (auto): not on npu" in said


def test_training_and_evaluation_give_the_numbers_of_a_cpu_and_so_does_writing(build):
    there, here = build("npu", **PLAIN), build("cpu", device="cpu", **PLAIN)
    on_npu(command(there))
    train(here)
    for (step, found), (same_step, expected) in zip(losses(folder_of(there)), losses(folder_of(here)), strict=True):
        assert step == same_step and found == pytest.approx(expected, rel=1e-5)  # other kernels, which round otherwise
    found, expected = ([e["val_loss"] for e in events(folder_of(f)) if "val_loss" in e] for f in (there, here))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 3

    weights = folder_of(there) / "best_model.pth"
    ask = [
        sys.executable,
        str(ROOT / "inference.py"),
        f"--model_path={weights}",
        "--prompt=中国",
        "--max_new_tokens=12",
    ]
    texts = [on_npu([*ask, "--seed=1", *more]).stdout for more in ([], ["--device=cpu"])]
    assert texts[0] == texts[1] and len(texts[0]) > len("中国")
    assert on_npu([*ask, "--seed=1", "--top_k=0"]).stdout  # drawn where there is float64


def test_a_resumed_run_has_the_same_bits_with_the_devices_own_random_numbers(build, whole):
    begun, flags = folder_of(whole[0]), build("resumed", **DROPS)
    folder_of(flags).mkdir()
    shutil.copy(begun / "checkpoint_step_8.pth", folder_of(flags))
    said = on_npu(command(flags, "--resume=true")).stderr
    assert "at step 8" in said
    assert_same_end(begun, folder_of(flags))

    state = load_torch(begun / "checkpoint_step_8.pth")["random_states"][0]
    assert len(state["npu"]) == 1
    assert not torch.equal(state["npu"][0], load_torch(begun / "checkpoint_step_4.pth")["random_states"][0]["npu"][0])


def test_a_checkpoint_of_one_device_goes_on_on_another(build, whole):
    flags = build("moved", **DROPS)
    folder_of(flags).mkdir()
    shutil.copy(folder_of(whole[0]) / "checkpoint_step_8.pth", folder_of(flags))
    result = run(command(flags, "--resume=true", "--device=cpu"))
    assert result.returncode == 0, result.stderr
    assert "device npu -> cpu" in result.stderr
    assert [step for step, _ in losses(folder_of(flags))] == [9, 10, 11, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        pytest.param({"dtype": "bfloat16", "optimizer_type": "muon", "n_experts": 4}, marks=pytest.mark.long),
    ],
)
def test_other_dtypes_optimizers_and_models_train(build, changes):
    flags = build(changes["dtype"], **SHORT, **changes)
    said = on_npu(command(flags)).stderr
    assert f"dtype {changes['dtype']}: as asked" in said
    found = [loss for _, loss in losses(folder_of(flags))]
    assert len(found) == 6 and found[-1] < found[0]


@pytest.mark.slow
def test_two_ranks_exchange_gradients_by_the_devices_backend(build):
    flags, alone = build("two", **PLAIN, **SHORT), build("alone", device="cpu", accumulation_steps=2, **PLAIN, **SHORT)
    ended = finish_ranks(start_two_ranks(with_npu(command(flags, "--ddp"))))
    assert ended.returncode == 0, ended.stderr
    train(alone)
    for found, expected in zip(losses(folder_of(flags)), losses(folder_of(alone)), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_second_device_that_is_not_there_is_refused(build):
    result = run(with_npu(command(build("second", device="npu:1"))))
    assert result.returncode == 2
    assert "error: device: 'npu:1' found, but torch sees 1 Huawei Ascend device here" in result.stderr


def test_tensors_without_addresses_are_not_taken_for_one_another():
    """As those of some devices and of tensor subclasses: a saved second moment was once the first, with its negative
    numbers, and the resumed loss NaN."""

    class Opaque(torch.Tensor):
        def data_ptr(self) -> int:
            return 0

    first, second = (torch.full((3,), number).as_subclass(Opaque) for number in (-1.0, 2.0))
    for copies in (
        copy_to_cpu({"exp_avg": first, "exp_avg_sq": second}),
        on_cpu({"exp_avg": first, "exp_avg_sq": second}),
    ):
        assert [float(copies[name][0]) for name in ("exp_avg", "exp_avg_sq")] == [-1.0, 2.0]

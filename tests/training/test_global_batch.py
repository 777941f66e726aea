"""`global_batch_size`: a step has as many samples whatever the number of processes: a run may continue with fewer."""

import pytest

from model.training.settings import build_settings
from tests.tiny_runs import events, losses, refused, train, two_ranks


def assert_same_losses(folder, other):
    """Of training, and of the same samples to validate on."""
    for found in (losses, val_losses):
        pairs = [*zip(found(folder), found(other), strict=True)]
        assert pairs and all(there == pytest.approx(here, abs=1e-5) for (_, there), (_, here) in pairs)


def val_losses(folder) -> list[tuple[int, float]]:
    return [(event["step"], event["val_loss"]) for event in events(folder) if "val_loss" in event]


@pytest.mark.parametrize(
    ("batch_size", "processes", "expected"),
    [(4, 1, (4, 2)), (4, 2, (4, 1)), (3, 1, (3, 3)), (16, 1, (8, 1)), (16, 3, (3, 1)), (1, 2, (1, 4))],
)
def test_batches_follow_from_the_samples_of_a_step(batch_size, processes, expected):
    flags = {"batch_size": batch_size, "global_batch_size": 8}
    training = build_settings({}, flags).training.shared_among(processes)
    assert (training.batch_size, training.accumulation_steps) == expected
    assert training.rows_per_step(processes) == 8


@pytest.mark.long
def test_batches_that_do_not_divide_the_step_leave_no_sample_out(flags, tmp_path):
    train(flags(dtype="float32", batch_size=8, out_dir=tmp_path / "whole"))
    train(flags(dtype="float32", batch_size=3, global_batch_size=8, out_dir=tmp_path / "parts"))
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.long
def test_a_run_of_two_processes_continues_with_one(flags, tmp_path):
    options = {"dtype": "float32", "attention": "pytorch", "batch_size": 4}
    train(flags(**options | {"batch_size": 8}, out_dir=tmp_path / "whole"))
    both = flags(**options, global_batch_size=8, out_dir=tmp_path / "fewer")
    result = two_ranks(both)
    assert result.returncode == 0, result.stderr
    for step in (8, 12):
        (tmp_path / "fewer" / f"checkpoint_step_{step}.pth").unlink()
    trainer = train(both | {"resume": "true"})
    assert (trainer.plan.world_size, trainer.plan.training.accumulation_steps) == (1, 2)
    assert_same_losses(tmp_path / "whole", tmp_path / "fewer")


@pytest.mark.long
def test_without_it_fewer_processes_make_smaller_steps_which_a_line_says(flags, capfd):
    two_ranks(flags(batch_size=4, max_steps=4))
    trainer = train(flags(batch_size=4, max_steps=8, resume="true"))
    assert trainer.plan.order.rows_per_step == 4
    line = "a step has 4 samples, 8 with 2 processes; --global_batch_size 8 keeps them whatever the number of processes"
    assert line in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_size": "auto"}, "batch_size: auto chooses the samples of a step too; give a number"),
        ({"accumulation_steps": 2}, "accumulation_steps: it follows from global_batch_size; omit one of them"),
    ],
)
def test_what_contradicts_it_is_refused(flags, capfd, options, line):
    assert line in refused(flags(global_batch_size=8, **options), capfd)

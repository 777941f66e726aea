"""What is known of a run before its first step: its memory, its time, and that its files are what they should be."""

import contextlib
import dataclasses
import time

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.training.clock import Clock
from model.training.data import refuse_text
from model.training.memory import check_memory, free_memory, is_out_of_memory, saved_bytes, step_memory
from model.training.optimizer import optimizer_bytes
from model.training.recipe import rough_duration_text
from model.training.report import describe
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests import tiny_runs
from tests.conftest import corpus_lines, random_model
from tests.tiny_runs import command, run, torchrun, two_ranks
from utils import Processes

CPU = torch.device("cpu")


def settings_of(**values):
    return build_settings({}, {name: str(value) for name, value in values.items()}).training


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_is_known_to_the_byte_before_it_is_allocated(tiny_config, dtype, document_mask):
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    training = settings_of(document_mask=document_mask, optimizer_type="muon", use_ema=True)
    expected = step_memory(tiny_config, training, 3, CPU, autocast)
    model = random_model(tiny_config).train()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert (expected.weights, expected.average, expected.gradients) == (parameters, parameters, parameters)
    assert expected.optimizer == optimizer_bytes(model, "muon")
    assert expected.activations == saved_bytes(model, 3, autocast, document_mask)


@pytest.mark.long
@pytest.mark.parametrize(
    ("values", "named"),
    [({"batch_size": 1_000_000}, "lower batch_size"), ({"dim": 65536, "n_heads": 64}, "make the model smaller")],
)
def test_what_the_memory_cannot_hold_is_one_line_before_anything_is_allocated(flags, tmp_path, values, named):
    sizes = {"max_seq_len": 512, "hidden_dim": 2**18, "n_layers": 12} if "dim" in values else {"max_seq_len": 96}
    result = run(command(flags(**sizes | values)))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    line = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert "out of memory: a step takes at least" in line and named in line
    assert not (tmp_path / "out").exists()


def test_a_step_that_may_not_fit_is_warned_of(tiny_config):
    free = free_memory(CPU)
    one, two = (step_memory(tiny_config, settings_of(), rows, CPU, contextlib.nullcontext()) for rows in (1, 2))
    rows = int(0.9 * free / (two.activations - one.activations))
    warning = check_memory(tiny_config, settings_of(batch_size=rows), CPU, contextlib.nullcontext(), 1)
    assert warning.startswith("memory is short: ") and f"lower batch_size ({rows:,})" in warning
    assert check_memory(tiny_config, settings_of(batch_size="auto"), CPU, contextlib.nullcontext(), 1) is None


def test_processes_that_each_hold_all_are_told_that_they_can_share_it():
    wide = LMConfig(dim=65536, n_layers=12, n_heads=64, vocab_size=300, max_seq_len=32)

    def remedy(processes: int, config=wide, **values) -> str:
        with pytest.raises(InputError) as refused:
            check_memory(config, settings_of(batch_size=1, **values), CPU, contextlib.nullcontext(), processes)
        return str(refused.value)

    assert remedy(2).endswith("make the model smaller (dim, n_layers, vocab_size), or set shard full")
    mixture = dataclasses.replace(wide, dim=512, hidden_dim=1024, n_experts=2**16)
    assert remedy(1, config=mixture).endswith("make the model smaller (dim, n_layers, n_experts, vocab_size)")
    assert remedy(1).endswith("vocab_size)") and remedy(2, shard="full").endswith("vocab_size)")


def test_out_of_memory_is_recognised_by_type_but_for_the_cpus_allocator():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("anything"))
    assert not is_out_of_memory(RuntimeError("the words out of memory prove nothing"))


# -------------------------------------------------------------------------------------------------------------- time


def test_estimates_are_rounded_to_what_is_known():
    times = [3, 44.6, 100, 871, 5000, 6000, 40_000, 11_664_000]
    texts = [
        "under 10 s",
        "about 40 s",
        "about 1.7 min",
        "about 15 min",
        "about 80 min",
        "about 1.7 h",
        "about 11 h",
        "about 140 days",
    ]
    assert [rough_duration_text(seconds) for seconds in times] == texts


def test_the_time_left_leaves_out_the_first_step_and_counts_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(seconds_before=1000)
    now[0] = 60  # the first step compiles
    clock.count_step(100)
    assert clock.seconds_left(1000, 0, 0) is None
    now[0] = 62
    clock.count_step(100)
    assert clock.seconds_left(1000, 2, 300) == pytest.approx(20 + 2 * 300 * 0.02 / 3)  # an evaluation is guessed
    with clock.evaluation():
        now[0] = 72
    assert clock.seconds_left(1000, 2, 300) == pytest.approx(20 + 2 * 10)  # and then timed
    assert clock.take_rate() == pytest.approx(200 / 62) and clock.run_seconds == 1072


def test_what_is_left_is_counted_in_tokens_and_evaluations(flags):
    plan = Trainer(build_settings({}, flags(max_steps=10, eval_interval=4)), Processes()).plan
    assert [plan.evaluations_left(step) for step in (0, 3, 4, 8, 9, 10)] == [3, 3, 2, 1, 1, 0]
    assert plan.tokens_left(4, 16) == 6 * 4 * 32


def test_a_batch_larger_than_the_data_is_said_to_be_padding(flags):
    def lines(batch_size):
        options = flags(batch_size=batch_size, accumulation_steps=2, max_steps=3)
        plan = Trainer(build_settings({}, options), Processes()).plan
        return plan.train_samples, [line for line in describe(plan) if "padding" in line]

    samples, (line,) = lines(2000)
    assert line == (
        f"batch_size: {4000 - samples:,} of the 4,000 rows of each step are padding, since an epoch has only"
        f" {samples:,} samples; lower batch_size to {samples // 2:,}"
    )
    assert lines(samples // 2) == (samples, [])


@pytest.mark.parametrize(
    ("patience", "interval", "remedy"),
    [
        (5, 4, "7 evaluations, and this run has 3; lower eval_interval (4) to 1, or patience"),
        (2, 4, "4 evaluations, and this run has 3; lower eval_interval (4) to 3, or patience"),
        (2, 3, None),  # the fourth and last evaluation is the first that could stop it but for the end
        (1, 4, None),
        (11, 1, "13 evaluations, and this run has 12; lower patience"),
    ],
)
def test_early_stopping_that_cannot_stop_the_run_is_said(flags, patience, interval, remedy):
    given = flags(max_steps=12, eval_interval=interval, patience=patience, early_stopping="true")
    plan = Trainer(build_settings({}, given), Processes()).plan
    lines = [line for line in describe(plan) if line.startswith("early_stopping")]
    expected = f"early_stopping: it cannot stop this run: patience {patience} takes at least {remedy}"
    assert lines == ([] if remedy is None else [expected])


# ----------------------------------------------------------------------------------------------------------- its data


@pytest.mark.parametrize("text", ['{"text": "春风"}\n', "春风又绿江南岸\n" * 200])
def test_text_as_a_token_file_is_refused_with_the_setting_for_it(tmp_path, token_file, text):
    path = tmp_path / "x.bin"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.bin is text.*raw_data_path"):
        refuse_text("train_data_path", str(path))
    with pytest.raises(InputError, match=r"none\.jsonl is text.*optimized_data_processing"):
        refuse_text("val_data_path", str(tmp_path / "none.jsonl"))
    refuse_text("train_data_path", str(token_file))


@pytest.mark.long
def test_ranks_that_wait_for_data_end_when_rank_0_fails(flags, tmp_path):
    broken = tmp_path / "raw.jsonl"
    broken.write_text("nonsense\n", encoding="utf-8")
    result = torchrun(flags(train_data_path=tmp_path / "made.bin", raw_data_path=broken))
    assert result.returncode != 0 and "[rank 1] waiting for rank 0, which makes" in result.stderr
    assert "[rank 1] error: rank 0 failed: " in result.stderr, result.stderr


@pytest.mark.long
def test_ranks_that_wait_for_data_train_on_it(flags, tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"".join(corpus_lines(60)))
    result = two_ranks(flags(train_data_path=tmp_path / "made.bin", raw_data_path=raw, max_steps=1))
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stderr


@pytest.mark.long
def test_a_checkpoint_is_read_once(flags, tmp_path, monkeypatch):
    import train
    from model.runs import resume

    tiny_runs.train(flags(max_steps=4))
    read, load = [], resume.load_checkpoint
    monkeypatch.setattr(resume, "load_checkpoint", lambda path: read.append(path) or load(path))
    settings, beginning = train.read_beginning(["--resume", "--out_dir", str(tmp_path / "out"), "--max_steps=5"])
    trainer = Trainer(settings, Processes(), beginning=beginning)
    assert trainer.progress.step == 4 and trainer.plan.total_steps == 5 and len(read) == 1

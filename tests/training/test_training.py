"""Training: what a user does, and what must come of it: a tiny model on the sample corpus, real processes, signals."""

import contextlib
import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from model.dataset import PretrainDataset
from model.errors import InputError, TrainingDiverged
from model.loss import IGNORE_INDEX
from model.publish.history import read_history
from model.runs.event_file import EVENT_FILES
from model.storage.archive import load_torch
from model.text.tokenization import load_tokenizer
from model.training.data import TrainingData
from model.training.optimizer import momentum_at
from model.training.plan import Hardware
from model.training.settings import build_settings
from model.weights import load_weights, save_weights
from model.weights.weights import saved_step
from optimized_data_processing import OptimizedDataProcessor
from optimized_pretrain import Trainer
from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import (
    HUNG,
    ONE_THREAD,
    assert_equal,
    assert_same_end,
    assert_two_processes_resume,
    command,
    events,
    exit_code_here,
    losses,
    mostly,
    run,
    torchrun,
    train,
    two_ranks,
    wait_for,
)
from utils import Processes

# ------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.long
@pytest.mark.pictures
def test_a_run_leaves_weights_checkpoints_metrics_curves_and_its_settings(flags, tmp_path):
    threads = set(threading.enumerate())
    trainer = train(flags(use_ema="true", copy_to=tmp_path / "copy"))
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name in ("saver", "copier")]
    out = tmp_path / "out"
    assert trainer.outcome == "finished"
    (for_tensorboard,) = out.glob(EVENT_FILES)
    assert {path.name for path in out.iterdir()} - {".lock", for_tensorboard.name} == {
        "best_model.json", "best_model.pth", "pretrain_32.json", "pretrain_32.pth", "checkpoint_step_4.pth",
        "checkpoint_step_8.pth", "checkpoint_step_12.pth", "config.yaml", "curves.png", "metrics.jsonl", "status.json",
    }  # fmt: skip
    logged, evaluated = ([e for e in events(out) if key in e] for key in ("loss", "val_loss"))
    assert [event["step"] for event in logged] == list(range(1, 13))
    assert [event["step"] for event in evaluated] == [4, 8, 12]
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["tokens"] == 12 * 4 * 32
    assert {"lr", "grad_norm", "tokens_per_second", "mfu", "elapsed", "epoch"} <= logged[0].keys()
    assert 0 < evaluated[-1]["bits_per_byte"] < 8
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["model"]["vocab_size"] == 300 and saved["training"]["min_lr"] == pytest.approx(3e-4)
    assert_equal(load_torch(out / "pretrain_32.pth"), dict(trainer.state.ema.module.state_dict()))


@pytest.mark.long
def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text(flags):
    trainer = train(flags(max_steps=1, eval_steps=None))
    val_loss, bits_per_byte = trainer.evaluate().values()
    tokenizer = load_tokenizer(trainer.settings.data.tokenizer_path)
    inputs, targets = trainer.data.val.batch(trainer.data.val_samples, rows=len(trainer.data.val_samples))
    characters = tokenizer.convert_ids_to_tokens(targets[targets > 2].tolist())  # one character a byte
    text = targets.where(targets > 2, -100)  # without bos and eos, as --score_file counts
    with torch.no_grad():
        model = trainer.model.cpu().eval()
        loss, text_loss = (float(model(inputs, wanted)) for wanted in (targets, text))
    assert val_loss == pytest.approx(loss / targets.numel(), rel=1e-4)
    assert bits_per_byte == pytest.approx(text_loss / 0.6931472 / len("".join(characters)), rel=1e-4)


@pytest.fixture
def read_samples(monkeypatch):
    """What is read from the token files, in order: one list of sample numbers a batch."""
    batches, batch = [], PretrainDataset.batch
    monkeypatch.setattr(
        PretrainDataset, "batch", lambda self, samples, rows: batches.append([*samples]) or batch(self, samples, rows)
    )
    return batches


@pytest.mark.long
def test_epochs_read_every_training_sample_once_and_no_held_out_one(flags, read_samples):
    options = {"batch_size": 300, "eval_interval": 99, "save_interval": 99}
    trainer = train(flags(max_steps=None, epochs=2, **options))
    samples, steps = trainer.data.sources[0].samples.numbers().tolist(), trainer.plan.order.steps_per_epoch
    assert len(samples) % 300 and trainer.progress.step == 2 * steps  # the last step of an epoch is a shorter one
    for epoch in (read_samples[:steps], read_samples[steps : 2 * steps]):
        assert sorted(sum(epoch, [])) == samples
    assert 0 < len(trainer.data.val_samples) <= 0.01 * len(trainer.data.train)
    assert not set(trainer.data.val_samples) & set(samples)


@pytest.mark.long
def test_with_samples_from_documents_an_epoch_predicts_all_but_the_first_token_of_each(flags, tmp_path):
    options = {"sample_start": "document", "document_mask": "true", "max_seq_len": 96, "batch_size": 50}
    trainer = train(flags(max_steps=None, epochs=2, eval_interval=99, save_interval=99, **options))
    data, train_samples, held_out = trainer.data.train, trainer.data.sources[0].samples, trainer.data.val_samples
    predicted = np.sort(data.batch(np.arange(len(data)), rows=len(data))[1].flatten().numpy())
    tokens = np.asarray(data.tokens)
    assert predicted[predicted != IGNORE_INDEX].tolist() == np.sort(tokens[tokens != 1]).tolist()
    in_epoch = len(tokens) - data.manifest.documents - data.count_targets(held_out)
    assert [event["tokens"] for event in events(tmp_path / "out")][-1] == 2 * in_epoch
    assert data.count_targets(train_samples.numbers()) == in_epoch

    loss = trainer.evaluate()["val_loss"]  # on the held-out samples, each document alone
    total, rows = 0.0, data.batch(held_out, rows=len(held_out))
    trainer.model.eval()
    for inputs, targets in zip(*rows, strict=True):
        begins = [t for t in range(96) if t == 0 or inputs[t] == 1 or targets[t - 1] == IGNORE_INDEX] + [96]
        for begin, end in itertools.pairwise(begins):
            with torch.no_grad(), trainer.autocast:
                pair = (part[None, begin:end].to(trainer.device) for part in (inputs, targets))
                total += float(trainer.model(*pair))
    assert loss == pytest.approx(total / data.count_targets(held_out), rel=1e-5)


@pytest.mark.long
def test_a_second_run_moves_the_first_one_aside(flags, tmp_path, capfd):
    train(flags(max_steps=4))
    before = (tmp_path / "out" / "pretrain_32.pth").read_bytes()
    train(flags(max_steps=4, seed=7))
    (moved,) = (tmp_path / "out" / "previous").iterdir()
    assert (moved / "pretrain_32.pth").read_bytes() == before and (moved / "metrics.jsonl").exists()
    assert str(moved) in capfd.readouterr().err


@pytest.mark.long
def test_only_the_newest_checkpoints_are_kept(flags, tmp_path):
    train(flags(keep_last=2))
    steps = sorted(path.name for path in (tmp_path / "out").glob("checkpoint_*"))
    assert steps == ["checkpoint_step_12.pth", "checkpoint_step_8.pth"]


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_saving_starts_no_second_team_of_threads():
    """More OpenMP threads than cores slow all of them down: see `BackgroundSaver._work`."""
    script = """
import os, torch
from model.runs.saving import BackgroundSaver
weights = {"w": torch.randn(1_000_000)}
weights["w"].isfinite().all()  # the main thread's team
saver = BackgroundSaver(print)
before = len(os.listdir("/proc/self/task"))
saver.submit("weights", weights, lambda copy: None)
saver.wait()
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["0", "2"], result.stderr


# ------------------------------------------------------------------------------------------- what a step computes


def test_the_steps_set_muons_momentum(flags):
    trainer = train(flags(optimizer_type="muon", max_steps=3))
    momenta = [group["momentum"] for group in trainer.state.optimizer.param_groups]
    assert momenta == [float(np.float32(momentum_at(2)))] * 3


@pytest.mark.long
def test_accumulation_equals_the_large_batch(flags, tmp_path):
    train(flags(dtype="float32", batch_size=8, out_dir=tmp_path / "large"))
    train(flags(dtype="float32", batch_size=2, accumulation_steps=4, out_dir=tmp_path / "small"))
    for (_, large), (_, small) in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert small == pytest.approx(large, abs=1e-5)


@pytest.mark.parametrize("options", [{"optimizer_type": "muon"}, {"optimizer_type": "adamw", "accumulation_steps": 3}])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_waits_for_the_device_once_and_launching_the_next_never(flags, options, ahead, monkeypatch):
    monkeypatch.setenv("MATECONV_RUN_AHEAD", str(int(ahead)))
    trainer = Trainer(build_settings({}, flags(**options)), Processes())
    trainer._take_step()  # which makes the optimizer's state
    waits, tolist = [], torch.Tensor.tolist

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:  # item(), float(), a condition
                waits.append(func)
            return func(*args, **(kwargs or {}))

    read = trainer.objective.read
    monkeypatch.setattr(trainer.objective, "read", lambda *given: unwatched(read, *given))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append("tolist") or tolist(tensor))
    if ahead:
        with Waits():
            following = trainer.stepper._launch(trainer.progress, trainer.stepper.in_flight)
        assert waits == [] and trainer.stepper._finished(following).fault is None  # which reads
    else:
        with Waits():
            trainer._take_step()
    assert waits == ["tolist"]


def unwatched(function, *given):
    """A call whose operations no mode sees: a batch is made of numbers on the CPU."""
    with torch.utils._python_dispatch._disable_current_modes():
        return function(*given)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_learns_about_the_same(flags, tmp_path, dtype, monkeypatch):
    train(flags(dtype="float32", out_dir=tmp_path / "float32"))
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    trainer = train(flags(dtype=dtype, out_dir=tmp_path / dtype))
    assert str(trainer.dtype) == f"torch.{dtype}" and trainer.state.scaler.is_enabled() == (dtype == "float16")
    last = dict(losses(tmp_path / dtype))[12]
    assert last == pytest.approx(dict(losses(tmp_path / "float32"))[12], abs=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_casts_each_weight_once_however_many_micro_batches_it_has(flags, tmp_path, recompute, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    torch.set_num_threads(1)
    options = {"dtype": "bfloat16", "batch_size": 1, "joined_products": "false", "activation_checkpointing": recompute}
    casts, weights = {}, {}
    for micro_batches, kept in ((1, True), (3, True), (3, False)):
        given = flags(**options, accumulation_steps=micro_batches, out_dir=tmp_path / f"{micro_batches}-{kept}")
        trainer = Trainer(build_settings({}, given), Processes())
        if not kept:
            monkeypatch.setattr(Hardware, "casting_once", lambda hardware: contextlib.nullcontext())
        matrices = {p.data_ptr() for p in trainer.model.layers.parameters() if p.dim() == 2}
        with CountedCasts(matrices) as counted:
            trainer._take_step()
        casts[micro_batches, kept] = counted.casts
        weights[micro_batches, kept] = trainer.model.state_dict()
    assert casts[1, True] == casts[3, True] == len(matrices) < casts[3, False]
    assert_equal(weights[3, True], weights[3, False])


class CountedCasts(TorchDispatchMode):
    """Counts how often tensors at these addresses are cast to bfloat16."""

    def __init__(self, addresses: set[int]) -> None:
        super().__init__()
        self.addresses, self.casts = addresses, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.casts += args[0].data_ptr() in self.addresses
        return func(*args, **(kwargs or {}))


@pytest.mark.long
def test_a_float16_overflow_skips_the_step_and_counts_no_step(flags, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    torch.set_num_threads(1)
    trainer = Trainer(build_settings({}, flags(dtype="float16", max_steps=3)), Processes())
    trainer.state.scaler._init_scale = 2.0**40  # the first scaled gradients overflow
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer._take_step()
    assert trainer.progress.step == 0 and trainer.progress.samples == 4
    assert_equal(dict(trainer.model.state_dict()), before)
    for _ in range(40):
        trainer._take_step()
    assert trainer.progress.step > 0 and trainer.state.scaler.get_scale() < 2.0**40


@pytest.mark.long
def test_float16_overflows_and_faults_have_limits_that_do_not_share_a_count(flags, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    options = flags(dtype="float16", max_skipped_steps=0, max_steps=99)
    trainer = Trainer(build_settings({}, options), Processes())
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)  # overflows at every loss scale
    for _ in range(50):
        assert trainer._take_step().overflow
    with pytest.raises(TrainingDiverged, match="the gradient is not finite.* 50 steps before it overflowed") as error:
        trainer._take_step()
    assert "max_skipped_steps" not in str(error.value)

    trainer = Trainer(build_settings({}, options | {"max_skipped_steps": "1"}), Processes())
    hook = trainer.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    for _ in range(11):
        trainer._take_step()
    hook.remove()
    broken = trainer.model.register_forward_hook(lambda model, arguments, loss: loss * torch.nan)
    assert not trainer._take_step().overflow  # the first real fault, which max_skipped_steps allows
    with pytest.raises(TrainingDiverged, match=r"loss is nan.* 1 step before it was skipped \(max_skipped_steps\)"):
        trainer._take_step()
    broken.remove()


@pytest.mark.parametrize("max_skipped_steps", [0, 3])
def test_gradients_that_are_not_finite_are_skipped_and_then_stop_training(flags, max_skipped_steps):
    trainer = Trainer(build_settings({}, flags(max_skipped_steps=max_skipped_steps)), Processes())
    assert trainer._take_step().fault is None
    before = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.state.optimizer.state_dict())
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    for _ in range(max_skipped_steps):
        assert trainer._take_step().fault is not None
    with pytest.raises(TrainingDiverged, match="step 2: the gradient is not finite"):
        trainer._take_step()
    assert_equal(dict(trainer.model.state_dict()), dict(before[0]))
    assert_equal(trainer.state.optimizer.state_dict()["state"], before[1]["state"])
    assert trainer.progress.step == 1 and trainer.progress.samples == 4 * (max_skipped_steps + 2)


@pytest.mark.long
def test_early_stopping_after_patience_evaluations_without_gain(flags, tmp_path):
    trainer = train(flags(early_stopping="true", patience=2, learning_rate=1.0, grad_clip=0, max_steps=400, seed=3))
    evaluated = [event["val_loss"] for event in events(tmp_path / "out") if "val_loss" in event]
    assert trainer.outcome == "early_stopping"
    assert min(evaluated[:-2]) <= min(evaluated[-2:]) and len(evaluated) < 100
    best = load_torch(tmp_path / "out" / "best_model.pth")
    trainer.model.load_state_dict(best)
    assert trainer.evaluate()["val_loss"] == pytest.approx(min(evaluated), abs=1e-6)


@pytest.mark.long
def test_a_new_optimizer_and_schedule_are_settings_like_the_others(flags, tmp_path, new_entries):
    trainer = train(flags(optimizer_type="sgd", lr_scheduler="constant", learning_rate=0.1))
    assert type(trainer.state.optimizer) is torch.optim.SGD
    momenta = [group["momentum"] for group in trainer.state.optimizer.param_groups]
    assert momenta == [float(np.float32(0.8 + 11 / 100))] * 2
    assert [event["lr"] for event in events(tmp_path / "out") if "lr" in event][1:] == [0.1] * 11
    with pytest.raises(InputError, match="sgd has no automatic rate; give a number"):
        train(flags(optimizer_type="sgd", learning_rate="auto", out_dir=tmp_path / "auto"))
    with pytest.raises(InputError, match="one of adamw, adam, muon, sgd expected"):
        build_settings({}, {"optimizer_type": "lion"})


# ---------------------------------------------------------------------------------------------- stopping and resuming

FLOAT32 = {"dtype": "float32"}  # bfloat16 takes a second a step on a CPU without it
RESUMED = {
    "plain": {},
    "everything": {"use_ema": "true", "dropout": 0.1, "accumulation_steps": 2, "optimizer_type": "adam"},
    "float16": {"dtype": "float16", "use_ema": "true"},
    "muon": {"optimizer_type": "muon", "lr_scheduler": "wsd", "dtype": "bfloat16"},
    "documents": {"sample_start": "document", "document_mask": "true", "max_seq_len": 96, "batch_size": 20} | FLOAT32,
    "across epochs": {"batch_size": 200, "lr_scheduler": "linear", "early_stopping": "true", "patience": 3},
    "new entries of the registries": {"optimizer_type": "sgd", "lr_scheduler": "constant", "learning_rate": 0.1},
}


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(RESUMED, ("across epochs",)))
def test_a_killed_run_resumes_and_ends_with_the_same_bits(flags, tmp_path, case, monkeypatch, new_entries):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    whole = train(flags(out_dir=tmp_path / "whole", **RESUMED[case]))
    assert whole.outcome == "finished"
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)  # what is on the disk when a run dies after step 8 …
    for path in killed.glob("*_12.pth"):
        path.unlink()
    for name in ("pretrain_32.pth", "pretrain_32.json"):
        (killed / name).unlink()
    resumed = train(flags(out_dir=killed, resume="true", **RESUMED[case]))
    assert resumed.outcome == "finished"
    assert_same_end(tmp_path / "whole", killed)
    assert losses(tmp_path / "whole") == losses(killed)  # … and the lines after it are not there twice
    assert_equal(*(load_torch(folder / "pretrain_32.pth") for folder in (tmp_path / "whole", killed)))


SIGINT = pytest.param(signal.SIGINT, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, SIGINT])
def test_a_stopped_run_saves_and_resume_alone_ends_with_the_same_bits(flags, tmp_path, number):
    train(flags(max_steps=300, eval_interval=100, save_interval=300, out_dir=tmp_path / "whole"))
    arguments = command(flags(max_steps=300, eval_interval=100, save_interval=300))
    with forks.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD) as process:
        metrics = tmp_path / "out" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process)
        process.send_signal(number)
        messages = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 130 and "Traceback" not in messages
    assert "resume with: python train.py --resume" in messages
    stopped_at = load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"]
    assert 5 <= stopped_at < 300
    result = run([sys.executable, ROOT / "train.py", "--resume", "--out_dir", tmp_path / "out"])
    assert result.returncode == 0 and f"at step {stopped_at}" in result.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "out", step=300)


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_skipped(flags, tmp_path, capfd):
    train(flags())
    newest = tmp_path / "out" / "checkpoint_step_12.pth"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    train(flags(resume="true"))
    messages = capfd.readouterr().err
    assert "passed over" in messages and "checkpoint_step_8.pth at step 8" in messages
    assert load_torch(newest)["progress"]["step"] == 12


@pytest.mark.long
@pytest.mark.parametrize("folder", ["out", "."])
def test_a_restart_before_the_first_checkpoint_begins_with_the_file_that_a_folder_stood_for(flags, tmp_path, folder):
    """In the run's own folder, of which the file moves away or not, or in one around it."""
    out, given = tmp_path / "out", tmp_path / folder
    train(flags(max_steps=2))
    weights = load_weights(out / "pretrain_32.pth")
    taken = out / "chat" / "sft_32.pth" if folder == "out" else out / "pretrain_32.pth"
    if folder == ".":  # whose newest weights are the run's own, which move
        save_weights(tmp_path / "pretrain_1.pth", weights)
        os.utime(tmp_path / "pretrain_1.pth", (0, 0))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.state_dict.items()}
    save_weights(taken, weights.with_state(zeros))
    train(flags(init_from=given, max_steps=2))
    for path in (*out.glob("checkpoint_*.pth"), *out.glob("pretrain_*")):  # as if it had been killed before them
        path.unlink()
    restarted = Trainer(build_settings({}, flags(init_from=given, resume="true", max_steps=2)), Processes())
    assert all(not weight.any() for weight in restarted.model.state_dict().values())


@pytest.mark.long
def test_a_checkpoint_of_another_model_or_data_is_refused(flags, tmp_path):
    train(flags(max_steps=4))
    for change, named in ({"dim": 64}, "dim 32 there, 64 here"), ({"optimizer_type": "adam"}, "optimizer_type"):
        with pytest.raises(InputError, match=named):
            train(flags(resume="true", **change))
    with pytest.raises(InputError, match="sample_start packed there, document here"):
        train(flags(resume="true", sample_start="document"))
    other = tmp_path / "other.bin"
    other.write_bytes(b"\1\0" * 5000)
    with pytest.raises(InputError, match="other data"):
        train(flags(resume="true", train_data_path=other))


@pytest.mark.long
def test_going_on_from_an_older_step_keeps_what_came_after(flags, tmp_path):
    train(flags())
    out = tmp_path / "out"
    best, final = ((out / name).read_bytes() for name in ("best_model.pth", "pretrain_32.pth"))
    train(flags(resume_from=out / "checkpoint_step_4.pth", learning_rate=1e-5))
    (left,) = (out / "previous").iterdir()
    assert (left / "checkpoint_step_12.pth").exists() and (left / "metrics.jsonl").exists()
    assert (left / "best_model.pth").read_bytes() == best and (left / "pretrain_32.pth").read_bytes() == final


@pytest.mark.long
@pytest.mark.parametrize("folder", ["out", "new"])
def test_the_best_weights_are_those_that_the_metrics_and_the_card_tell_of_after_another_line(flags, tmp_path, folder):
    train(flags())
    old, out = tmp_path / "out", tmp_path / folder
    still = {"learning_rate": 1e-12, "min_lr": 0, "weight_decay": 0}  # it never gets better than it was
    train(flags(resume_from=old / "checkpoint_step_4.pth", out_dir=out, **still))
    step = saved_step(out / "best_model.pth")
    assert_equal(*(load_weights(out / name).state_dict for name in ("best_model.pth", f"checkpoint_step_{step}.pth")))
    evaluated = {event["step"]: event["val_loss"] for event in events(out) if "val_loss" in event}
    assert sorted(evaluated) == [4, 8, 12] and evaluated[step] == min(evaluated.values())
    history = read_history(out / "best_model.pth")
    assert (history.step, history.val_loss) == (step, evaluated[step])


@pytest.mark.long
def test_changed_settings_take_effect_and_are_named(flags, tmp_path, capfd):
    train(flags(max_steps=4))
    train(flags(resume="true", weight_decay=0.5, learning_rate=1e-3))
    messages = capfd.readouterr().err
    assert "learning_rate 0.003 -> 0.001" in messages and "weight_decay 0.1 -> 0.5" in messages
    groups = load_torch(tmp_path / "out" / "checkpoint_step_12.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    capfd.readouterr()
    train(flags(resume="true", weight_decay=0.5, learning_rate=1e-3))
    assert "other settings" not in capfd.readouterr().err


@pytest.mark.long
def test_other_validation_data_is_evaluated_at_the_step_that_was_evaluated_already(flags, tmp_path, token_file):
    other = tmp_path / "other.bin"
    other.write_bytes(b"\1\0" * 5000)
    train(flags(max_steps=4, val_data_path=token_file))
    val_loss = events(tmp_path / "out")[-1]["val_loss"]
    resumed = train(flags(max_steps=4, resume="true", val_data_path=other))
    last = events(tmp_path / "out")[-1]
    assert last["step"] == 4 and last["val_loss"] != val_loss
    assert resumed.progress.best_val_loss == last["val_loss"]


@pytest.mark.long
def test_train_again_after_a_stop_trains_to_the_end(flags, tmp_path):
    torch.set_num_threads(1)
    trainer = Trainer(build_settings({}, flags()), Processes())
    take = trainer._take_step

    def stopped(last):
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: trainer.stop_signal.count)  # another thread counts it
        trainer._take_step = take
        return take(last)

    trainer._take_step = stopped
    assert trainer.train() == "interrupted" and trainer.progress.step == 1
    assert trainer.train() == "finished" and trainer.progress.step == 12


@pytest.mark.long
@pytest.mark.parametrize("broken", ["config.yaml", "wandb"])
def test_a_start_that_fails_leaves_the_folder_to_the_next_one(flags, tmp_path, broken, monkeypatch):
    options = flags(max_steps=1, use_wandb="true")
    trainer = Trainer(build_settings({}, options), Processes())
    if broken == "wandb":
        monkeypatch.setattr("model.runs.metrics.MetricsLog.start_tracker", lambda *_: 1 / 0)
    else:
        (tmp_path / "out" / "config.yaml").mkdir(parents=True)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((InputError, ZeroDivisionError)) as failed:  # keeps the frames, and so their objects, alive
        trainer.train()
    assert failed.value and signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    if broken == "config.yaml":
        (tmp_path / "out" / "config.yaml").rmdir()
    assert train(flags(max_steps=1)).outcome == "finished"


@pytest.mark.long
@pytest.mark.parametrize("batch_size", mostly([50, 200], slow=[200]))
def test_with_another_batch_size_the_rate_still_falls_until_the_end(flags, tmp_path, batch_size):
    options = {"max_steps": None, "epochs": 2, "eval_interval": 99}
    first = train(flags(**options, batch_size=100, save_interval=1, keep_last=99))
    steps = first.plan.order.steps_per_epoch
    out = tmp_path / "out"
    resumed = train(flags(**options, batch_size=batch_size, resume_from=out / f"checkpoint_step_{steps}.pth"))
    assert resumed.progress.step == steps + -(-resumed.data.training_samples // batch_size)
    rates = [event["lr"] for event in events(out) if "lr" in event]
    assert rates[-1] == pytest.approx(3e-4) and rates[-2] > rates[-1]


@pytest.mark.long
def test_a_closed_stderr_ends_no_training(flags, tmp_path):
    arguments = command(flags(max_steps=300, eval_interval=100, save_interval=300))
    with forks.Popen(arguments, stderr=subprocess.PIPE, env=ONE_THREAD) as process:
        metrics = tmp_path / "out" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process)
        process.stderr.close()  # as `tee` does, which gets the same Ctrl-C
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=HUNG) == 130
    assert load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"] > 5


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
import train
train.run_command(train.main)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(flags, tmp_path):
    train(flags(max_steps=4))
    size = (tmp_path / "out" / "checkpoint_step_4.pth").stat().st_size
    before = (tmp_path / "out" / "checkpoint_step_4.pth").read_bytes()
    result = run([sys.executable, "-c", LIMITED.format(size=size // 2), *command(flags(resume="true"))[2:]])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"cannot be written \(File too large: \d+ kB needed, \d+ kB could be", result.stderr)
    assert (tmp_path / "out" / "checkpoint_step_4.pth").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_preview_that_fails_ends_no_training(tiny_model, flags):
    from train import make_preview

    tiny_model.config.max_seq_len = 2
    settings = build_settings({}, flags())
    lines = make_preview(settings)(tiny_model, TrainingData(settings, verify=True, say=lambda line: None))
    assert len(lines) == 3 and all("max_seq_len" in line or "context" in line for line in lines)


def test_previews_continue_what_the_texts_are_like(flags, tmp_path):
    from train import preview_prompts

    def prompts(texts: list[str]) -> list[str]:
        raw, tokens = tmp_path / f"{len(texts)}.jsonl", tmp_path / f"{len(texts)}.bin"
        raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        OptimizedDataProcessor().process_dataset(str(raw), str(tokens))
        settings = build_settings({}, flags(train_data_path=tokens, tokenizer_path=None, vocab_size=None))
        return preview_prompts(TrainingData(settings, verify=True, say=lambda line: None))

    modern = [f"今天第{number}次去图书馆看书，人很多。" for number in range(30)]
    found = prompts(modern)
    assert len(found) == 3 and all(any(text.startswith(prompt) for text in modern) for prompt in found), found
    assert prompts([*modern, "春风又绿江南岸，明月何时照我还。"]) == ["春风", "中国", "天下大势"]


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("torch.distributed.run", {}),
        pytest.param("torch.distributed.launch", {}, marks=pytest.mark.slow),
        (None, {"sample_start": "document", "document_mask": "true", "max_seq_len": 96}),
    ],
)
def test_two_processes_compute_what_one_does(flags, tmp_path, launcher, options):
    options = options | {"dtype": "float32"}
    train(flags(batch_size=4, out_dir=tmp_path / "one", **options))
    ranks = flags(batch_size=2, out_dir=tmp_path / "two", **options)
    result = torchrun(ranks, launcher) if launcher else two_ranks(ranks)
    assert result.returncode == 0, result.stderr
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    evaluated = [[e["val_loss"] for e in events(tmp_path / name) if "val_loss" in e] for name in ("one", "two")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)


@pytest.mark.long
def test_two_processes_resume_with_the_same_bits(flags, tmp_path):
    options = {"batch_size": 2, "accumulation_steps": 2, "dropout": 0.1, "use_ema": "true"}
    assert_two_processes_resume(flags, tmp_path, **options)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, SIGINT])
def test_two_processes_stop_after_the_same_step(flags, tmp_path, number):
    options = flags(batch_size=2, max_steps=300, eval_interval=100, save_interval=300)
    names = [f"--{name}={value}" for name, value in options.items()]
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), *names]
    with forks.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD) as process:
        metrics = tmp_path / "out" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process)
        process.send_signal(number)
        messages = process.communicate(timeout=HUNG)[1]
    checkpoint = load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")
    assert len(checkpoint["random_states"]) == 2 and checkpoint["progress"]["step"] < 300
    assert "resume with: torchrun --nproc_per_node=2 train.py --resume" in messages


@pytest.mark.long
def test_ranks_whose_dtypes_differ_are_refused(flags):
    """As on two machines of which one has no instructions for bfloat16."""
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(forks.free_port()),
    }
    processes = [
        forks.Popen(
            command(flags(dtype=dtype, device="cpu", ddp="true", ddp_timeout=20)),
            env=ONE_THREAD | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MATECONV_EMULATE_DTYPE": "1"},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank, dtype in enumerate(("float32", "float16"))
    ]
    messages = [process.communicate(timeout=HUNG)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], messages
    assert "dtype: rank 1 has 'float16', rank 0 'float32'; they must agree: set dtype float32" in messages[0]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_data_path": "none.bin"}, "none.bin"),
        ({"val_data_path": "none.bin"}, "none.bin"),
        ({"tokenizer_path": "none"}, "tokenizer_path"),
        ({"vocab_size": 200}, "vocab_size: 200"),
        ({"resume_from": "none.pth"}, "none.pth"),
        ({"warmup_steps": 50, "max_steps": 20}, "warmup_steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, tmp_path, change, expected, capfd):
    assert exit_code_here(flags(**change)) == 2
    messages = capfd.readouterr().err
    line = next(line for line in messages.splitlines() if line.startswith("error:"))
    assert expected in line and "Traceback" not in messages
    assert not (tmp_path / "out").exists()

"""`auto` and --dry_run as a user meets them: what is chosen, told and kept, with real runs of a tiny model."""

import re
import shutil

import pytest
import yaml

from model.storage.archive import load_torch
from tests.conftest import ROOT, corpus_lines
from tests.tiny_runs import ONE_THREAD, assert_same_end, command, exit_code_here, losses, run, train, two_ranks

pytestmark = pytest.mark.long

NAMES = ("epochs", "batch_size", "learning_rate", "warmup_steps", "compile")
ALL_AUTO = dict.fromkeys(NAMES, "auto")


def test_what_auto_comes_to_is_printed_and_written_down(flags, tmp_path, capfd):
    trainer = train(flags(**ALL_AUTO))
    messages = capfd.readouterr().err
    for name in NAMES:
        (line,) = [line for line in messages.splitlines() if line.startswith(f"{name} ") and "(auto): " in line]
        assert line.split("(auto): ")[1]
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["training"]
    assert resolved["batch_size"] == 64  # of 32 tokens each: 2,048, the least, for so small a corpus
    assert resolved["warmup_steps"] == 3 and resolved["compile"] is False
    assert resolved["learning_rate"] == trainer.training.learning_rate > 0
    assert trainer.settings.training.batch_size == "auto"  # as asked for


def test_auto_ends_with_the_same_bits_as_its_numbers_given(flags, tmp_path):
    train(flags(out_dir=tmp_path / "auto", dropout=0.1, **ALL_AUTO))
    resolved = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["training"]
    train(flags(out_dir=tmp_path / "given", dropout=0.1, **{name: resolved[name] for name in NAMES}))
    assert_same_end(tmp_path / "auto", tmp_path / "given")


@pytest.mark.slow
def test_a_killed_run_of_auto_resumes_with_the_same_numbers_and_bits(flags, tmp_path, capfd):
    changes = {**ALL_AUTO, "max_steps": None}
    whole = train(flags(out_dir=tmp_path / "whole", **changes))
    last, killed = whole.progress.step, tmp_path / "killed"
    assert last > 8
    shutil.copytree(tmp_path / "whole", killed)
    for path in (*killed.glob(f"*_{last}.pth"), *killed.glob("pretrain_32.*")):
        path.unlink()
    capfd.readouterr()
    assert train(flags(out_dir=killed, resume="true", **changes)).outcome == "finished"
    assert "batch_size 32 (auto): as before" in capfd.readouterr().err
    assert_same_end(tmp_path / "whole", killed, step=last)
    assert losses(tmp_path / "whole") == losses(killed)


def test_a_run_made_longer_keeps_its_numbers(flags, tmp_path):
    first = train(flags(**ALL_AUTO))
    before = [getattr(first.training, name) for name in NAMES]
    result = run([*command({"resume": "true", "out_dir": tmp_path / "out", "max_steps": 2000}), "--dry_run"])
    assert result.returncode == 0 and f"batch_size {before[1]} (auto): as before" in result.stderr, result.stderr
    longer = train(flags(**ALL_AUTO | {"max_steps": 16, "resume": "true"}))
    assert [getattr(longer.training, name) for name in NAMES] == before
    chosen = load_torch(tmp_path / "out" / "checkpoint_step_16.pth")["chosen"]
    others = {"attention": "pytorch", "balance_loss": 0.0, "expert_products": "loop"}  # too short for another; dense
    others["joined_products"] = False  # on a CPU
    assert chosen == dict(zip(NAMES, before, strict=True)) | others


def test_two_processes_choose_the_same_and_share_the_step(flags, tmp_path):
    result = two_ranks(flags(**ALL_AUTO, max_steps=4))
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["training"]
    assert resolved["batch_size"] == 32 and "32 x 2 processes x 32 tokens" in result.stderr


def test_a_least_rate_above_the_automatic_one_is_one_line(flags, tmp_path, capfd):
    assert exit_code_here(flags(learning_rate="auto", min_lr=50)) == 2
    assert "error: min_lr: 50.0 is above learning_rate" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compiling_without_a_compiler_is_one_line(flags, tmp_path):
    environment = ONE_THREAD | {"CXX": "no-such-compiler"}
    result = run(command(flags(compile="true", device="cpu")), env=environment)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "compile: true found, but torch.compile needs a C++ compiler" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(command(flags(compile="auto", device="cpu", max_steps=1)), env=environment).returncode == 0


# ----------------------------------------------------------------------------------------------------------- dry runs

TOLD = ("parameters", "memory:", "gradients", "optimizer", "activations", "tokens:", "steps", "FLOPs", "speed", "mfu",
        "time", "disk:")  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_prints_what_the_run_takes_and_leaves_the_folder(flags, tmp_path, processes):
    train(flags(max_steps=4))
    out = tmp_path / "out"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    more = ["--dry_run"] + ([f"--nproc_per_node={processes}"] if processes > 1 else [])
    result = run(command(flags(batch_size="auto", max_steps=500), *more))
    assert result.returncode == 0, result.stderr
    for word in TOLD:
        assert word in result.stdout
    assert result.stdout.count("parameters") == 1 and f"{500 * 2048:,} (" in result.stdout
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


def test_a_dry_run_says_once_how_long_the_run_takes(flags, capfd):
    assert exit_code_here(flags(compile="auto", device="cpu", max_steps=2000), "--dry_run") == 0
    said = "".join(capfd.readouterr())
    assert "compile false (auto): by its FLOPs, training takes under 15 min" in said
    estimates = [line for line in said.splitlines() if re.search(r"about [\d.]+ (s|min|h|days)|under 10 s", line)]
    assert len(estimates) == 1 and estimates[0].startswith("time "), estimates


def test_a_dry_run_makes_no_folder(flags, tmp_path, capfd):
    assert exit_code_here(flags(use_ema="true"), "--dry_run", "--restarts=3") == 0
    assert "time" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_predicts_the_sizes_that_the_run_writes(flags, tmp_path, capfd):
    from model.storage.files import size_text

    assert exit_code_here(flags(), "--dry_run") == 0
    told = capfd.readouterr().out
    train(flags())
    weights = (tmp_path / "out" / "pretrain_32.pth").stat().st_size
    line = next(line for line in told.splitlines() if line.startswith("disk:"))
    number, unit = line.split("weights ")[1].split()
    bytes_told = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert bytes_told == pytest.approx(weights, rel=0.2), (line, size_text(weights))


def test_a_dry_run_prepares_missing_data_and_says_how_to_where_it_cannot(flags, tmp_path, capfd):
    raw, tokens = tmp_path / "raw.jsonl", tmp_path / "made.bin"
    raw.write_bytes(b"".join(corpus_lines(60)))
    result = run(command(flags(train_data_path=tokens, raw_data_path=raw), "--dry_run"), cwd=ROOT)
    assert result.returncode == 0 and "made.bin is missing: making it from" in result.stderr, result.stderr
    assert tokens.exists() and not (tmp_path / "out").exists()
    capfd.readouterr()
    assert exit_code_here(flags(train_data_path=tmp_path / "none.bin"), "--dry_run") == 2
    assert "none.bin; make it with: python optimized_data_processing.py" in capfd.readouterr().err

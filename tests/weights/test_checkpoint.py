"""Weights and checkpoints on disk: what is written comes back, and what is damaged is noticed."""

import contextlib
import copy
import dataclasses
import json
import os

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.runs.checkpoint import CHECKPOINT_VERSION
from model.runs.folder import begin_run, claim, leave_line, move_earlier_run, prune_checkpoints
from model.runs.resume import load_checkpoint
from model.storage.archive import load_torch, save_torch
from model.training.determinism import random_state
from model.training.optimizer import build_optimizer
from model.training.progress import Progress
from model.training.settings import Settings
from model.weights import Weights, load_weights, save_weights
from model.weights.minimind import recognise
from tests.conftest import random_model
from tests.reliability.states import resumed_from

CONFIG = LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300, max_seq_len=16)


def checkpoint_content(step=5, started="20260101T120000", optimizer_type="adamw"):
    """All that a checkpoint holds, of a small model after one step of its optimizer."""
    model = random_model(CONFIG)
    optimizer = build_optimizer(model, optimizer_type, 1e-3, 0.1)
    settings = Settings()
    settings.training.optimizer_type = optimizer_type
    tokens = torch.arange(17).view(1, -1)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return {
        "format_version": CHECKPOINT_VERSION, "started": started, "settings": settings.as_dict(),
        "config": dataclasses.asdict(CONFIG), "context": CONFIG.max_seq_len,
        "tokenizer_path": None, "tokenizer_sha256": "abc", "data": {"order": "feistel"},
        "validation": {}, "pace": {}, "total_steps": 10, "chosen": {}, "chat": {}, "adapters": {},
        "progress": dataclasses.asdict(Progress(step=step)),
        "model": model.state_dict(), "ema": None, "ema_updates": 0, "optimizer": optimizer.state_dict(), "scaler": {},
        "random_states": [random_state()], "environment": {},
    }  # fmt: skip


def checkpoint(path, step):
    save_torch(path, checkpoint_content(step))
    return path


def test_weights_come_back_with_their_config_and_as_a_plain_state_dict(tmp_path, tiny_model, tiny_config):
    path = tmp_path / "pretrain_64.pth"
    save_weights(path, Weights(tiny_model.state_dict(), tiny_config, "some/tokenizer", "abc"))
    weights = load_weights(path)
    assert (weights.config, weights.tokenizer_path, weights.tokenizer_sha256) == (tiny_config, "some/tokenizer", "abc")

    model = Transformer(tiny_config)
    model.load_state_dict(torch.load(path))  # as the guide does
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert json.loads((tmp_path / "pretrain_64.json").read_text())["config"]["dim"] == 64


def test_both_of_the_tied_pair_are_saved_and_stored_once(tmp_path, tiny_model, tiny_config):
    save_weights(tmp_path / "w.pth", Weights(tiny_model.state_dict(), tiny_config))
    content = torch.load(tmp_path / "w.pth")
    assert content["output.weight"].data_ptr() == content["tok_embeddings.weight"].data_ptr()


def test_minimind_v1_weights_are_accepted_as_they_are(tmp_path):
    config = LMConfig(n_layers=2)
    state = {f"_orig_mod.{key}": value for key, value in Transformer(config).state_dict().items()}
    state["_orig_mod.layers.0.attention.mask"] = torch.zeros(1, 1, 512, 512)
    torch.save(state, tmp_path / "pretrain_512.pth")
    weights = load_weights(tmp_path / "pretrain_512.pth")
    assert weights.inferred and weights.config == config
    Transformer(weights.config).load_state_dict(weights.state_dict)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="no tok_embeddings.weight inside; expected Meta's names, as MiniMind v1"):
        recognise({"transformer.wte.weight": torch.zeros(2, 2)}, "ckpt.pth", {})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="found list"):
        load_weights(tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "dict.pth")
    with pytest.raises(InputError, match="state dict .* found 'a'$"):
        load_weights(tmp_path / "dict.pth")
    torch.save({"epoch": 3, "state_dict": {"norm.weight": torch.zeros(2)}}, tmp_path / "lightning.ckpt")
    with pytest.raises(InputError, match="found 'epoch', 'state_dict'; save its 'state_dict' alone with torch.save"):
        load_weights(tmp_path / "lightning.ckpt")


@pytest.fixture
def whole(tmp_path):
    """A checkpoint and its bytes."""
    path = checkpoint(tmp_path / "checkpoint_step_5.pth", 5)
    return path, path.read_bytes()


@pytest.mark.long
def test_every_truncation_and_every_flipped_bit_is_noticed(whole):
    path, content = whole
    for size in [*range(0, len(content), len(content) // 40), *range(len(content) - 90, len(content))]:
        path.write_bytes(content[:size])
        with pytest.raises(InputError):
            load_checkpoint(path)
    near_the_end = range(len(content) - 300, len(content))  # the archive's directory and the SHA-256 itself
    for offset in [*range(0, len(content), len(content) // 100), *near_the_end]:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="checkpoint_step_5.pth") as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(content)
    assert load_checkpoint(path)["progress"]["step"] == 5


def test_files_of_others_are_compared_with_their_records_checksums(tmp_path):
    path = tmp_path / "pretrain_512.pth"
    torch.save({"a": torch.full((1000,), 5.0)}, path)
    content = path.read_bytes()
    start = content.index(torch.full((1000,), 5.0).numpy().tobytes())
    for offset in range(start, start + 4000, 331):  # torch.load alone would take these for weights
        damaged = bytearray(content)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="checksum"):
            load_torch(path)
    path.write_bytes(content + b"more")
    with pytest.raises(InputError, match="follows"):
        load_torch(path)


def test_other_readers_open_our_files(tmp_path, tiny_model, tiny_config):
    save_weights(tmp_path / "w.pth", Weights(tiny_model.state_dict(), tiny_config))
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(tmp_path / "w.pth", **options)["norm.weight"], tiny_model.norm.weight)


BEST = {"best_model.pth", "best_model.json"}
EIGHT_BITS = torch.ones(16).to(torch.float8_e4m3fn)
WRONG = {
    "a missing key": (lambda c: c.pop("optimizer"), "optimizer is missing"),
    "a key of another type": (lambda c: c.update(progress=[1]), "progress is of type list"),
    "a missing count": (lambda c: c["progress"].pop("samples"), "samples"),
    "a count that is text": (lambda c: c["progress"].update(step="5"), "progress.step is '5'"),
    "another step than in the name": (lambda c: c["progress"].update(step=6), "of step 6"),
    "a missing weight": (lambda c: c["model"].pop("norm.weight"), "norm.weight"),
    "a weight of another shape": (
        lambda c: c["model"].update({"norm.weight": torch.ones(8)}),
        r"norm.weight is \(8,\)",
    ),
    "a weight of another dtype": (lambda c: c["model"].update({"norm.weight": torch.ones(16).half()}), "norm.weight"),
    "a weight that is not finite": (lambda c: c["model"]["norm.weight"].fill_(torch.nan), "not finite"),
    "an average of another shape": (lambda c: c.update(ema={"norm.weight": torch.ones(16)}), "ema: holds 0 layers"),
    "an average that is a tensor": (lambda c: c.update(ema=torch.ones(3)), "ema is of type Tensor"),
    "weights of 8 bits": (lambda c: c["model"].update({"norm.weight": EIGHT_BITS}), "norm.weight holds torch.float8"),
    "something of 8 bits": (lambda c: c.update(more=EIGHT_BITS), "not finite"),
    "a missing layer": (
        lambda c: c["config"].update(n_layers=2),
        "1 layers, its description says n_layers 2",
    ),
    "a config of nobody": (lambda c: c["config"].update(dim="16"), "config"),
    "no moment": (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "other parts"),
    "a moment of another shape": (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "other parts"),
    "no state of a parameter": (lambda c: c["optimizer"]["state"].pop(0), "some parameters"),
    "an optimizer of another model": (lambda c: c["optimizer"]["param_groups"].pop(), "not this model's"),
    "an unknown optimizer": (
        lambda c: c["settings"]["training"].update(optimizer_type="sgd"),
        "optimizer_type is 'sgd'",
    ),
    "half a scaler": (lambda c: c.update(scaler={"scale": 2.0}), "scaler"),
    "no random states": (lambda c: c.update(random_states=[]), "random_states is empty"),
    "half a random state": (lambda c: c["random_states"][0].pop("numpy"), "random_states"),
    "a random state that is none": (lambda c: c["random_states"][0].update(torch=torch.ones(3)), "random_states"),
    "nothing of what version 4 added": (lambda c: c.pop("chat"), "chat is missing"),
    "nothing of what version 5 added": (lambda c: c.pop("context"), "context is missing"),
    "nothing of what version 6 added": (lambda c: c["data"].pop("order"), "data.order is None"),
    "an order that this program lacks": (
        lambda c: c["data"].update(order=["mine"]),
        r"data.order is \[.mine.\], one of",
    ),
    "a context below that of the samples": (lambda c: c.update(context=8), "context is 8, max_seq_len 16"),
    "a context of nobody": (lambda c: c.update(context=2**40), "max_seq_len"),
    "a version that is a tensor": (lambda c: c.update(format_version=torch.ones(3)), "of version tensor"),
    "another version": (lambda c: c.update(format_version=1), "version 1"),
}


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_checkpoint_of_an_earlier_version_gets_what_came_later(tmp_path, version):
    content = checkpoint_content() | {"format_version": version, "data": {"tokens": 9}}
    for key in ("chosen", "chat", "adapters", "context"):
        content.pop(key)
    content["progress"].pop("overflows_in_a_row")
    save_torch(tmp_path / "checkpoint_step_5.pth", content)
    loaded = load_checkpoint(tmp_path / "checkpoint_step_5.pth")
    assert loaded["chosen"] == loaded["chat"] == loaded["adapters"] == {} and loaded["context"] == 16
    assert loaded["data"] == {"tokens": 9, "sample_start": "packed", "order": "philox"}
    assert loaded["progress"]["overflows_in_a_row"] == 0


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_lacks_something_is_noticed(tmp_path, case):
    change, expected = WRONG[case]
    content = copy.deepcopy(checkpoint_content())
    change(content)
    path = tmp_path / "checkpoint_step_5.pth"
    save_torch(path, content)
    with pytest.raises(InputError, match=expected):
        load_checkpoint(path)
    with contextlib.suppress(InputError):  # its weights may be whole
        load_weights(path)


def test_the_state_of_muon_is_looked_at_by_parameter(tmp_path):
    path = tmp_path / "checkpoint_step_5.pth"
    content = checkpoint_content(optimizer_type="muon")
    save_torch(path, content)
    load_checkpoint(path)
    matrix = next(state for state in content["optimizer"]["state"].values() if "momentum_buffer" in state)
    matrix["momentum_buffer"] = torch.ones(3)
    save_torch(path, content)
    with pytest.raises(InputError, match="attention.wq.weight has other parts"):
        load_checkpoint(path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="tensors and plain values only.*mkdir"):
        load_torch(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = checkpoint(tmp_path / "c.pth", 5)
    with pytest.raises(Exception, match="pickle|local object"):
        save_torch(path, {"a": lambda: 0})
    assert load_torch(path)["progress"]["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_the_newest_whole_checkpoint_is_found_by_its_step(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint_step_{step}.pth", step)
    checkpoint(tmp_path / "checkpoint_interrupted.pth", 57)
    assert resumed_from(tmp_path)[0].path.name == "checkpoint_step_100.pth"
    whole = (tmp_path / "checkpoint_step_100.pth").read_bytes()
    (tmp_path / "checkpoint_step_100.pth").write_bytes(whole[:-500])
    (path, content), passed_over = resumed_from(tmp_path)
    assert path.name == "checkpoint_interrupted.pth" and content["progress"]["step"] == 57
    assert len(passed_over) == 1 and "checkpoint_step_100.pth" in passed_over[0]
    assert resumed_from(tmp_path / "empty") == (None, [])


def test_old_checkpoints_are_pruned_by_step(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint_step_{step}.pth", step)
    checkpoint(tmp_path / "best_model.pth", 1)
    checkpoint(tmp_path / "checkpoint_interrupted.pth", 57)
    prune_checkpoints(tmp_path, keep_last=2, verified=100)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best_model.pth", "checkpoint_step_10.pth", "checkpoint_step_100.pth",
    ]  # fmt: skip
    prune_checkpoints(tmp_path, keep_last=1, verified=9)  # what is newer than the verified one stays
    assert len(list(tmp_path.glob("checkpoint_step_*"))) == 2


def test_a_checkpoint_of_another_run_is_skipped(tmp_path):
    (tmp_path / "config.yaml").write_text("# started 20260101T120000\n")
    checkpoint(tmp_path / "checkpoint_step_5.pth", 5)
    save_torch(tmp_path / "checkpoint_step_9.pth", checkpoint_content(9, started="20250101T120000"))
    found, passed_over = resumed_from(tmp_path)
    assert found.path.name == "checkpoint_step_5.pth" and "20250101T120000" in passed_over[0]


def test_an_earlier_runs_files_are_moved_and_others_stay(tmp_path):
    (tmp_path / "config.yaml").write_text("# started 20260101T120000\ndata: {}\n")
    for name in ("checkpoint_step_5.pth", "pretrain_64.pth", "pretrain_64.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text(name)
    target = move_earlier_run(tmp_path)
    assert target == tmp_path / "previous" / "20260101T120000"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "previous"]
    assert (target / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert move_earlier_run(tmp_path) is None


def test_going_on_from_an_older_step_sets_aside_what_came_after(tmp_path):
    for step in (5, 10, 15):
        checkpoint(tmp_path / f"checkpoint_step_{step}.pth", step)
    checkpoint(tmp_path / "checkpoint_interrupted.pth", 12)
    (tmp_path / "best_model.pth").write_text("best")
    target = leave_line(tmp_path, 10)
    names = ["best_model.pth", "checkpoint_interrupted.pth", "checkpoint_step_15.pth"]
    assert sorted(p.name for p in target.iterdir()) == names
    assert resumed_from(tmp_path)[0].path.name == "checkpoint_step_10.pth" and leave_line(tmp_path, 10) is None


def test_best_weights_come_along_with_their_description_or_not_at_all(tmp_path):
    elsewhere = checkpoint(tmp_path / "elsewhere" / "checkpoint_step_5.pth", 5)
    for number, (name, expected) in enumerate((("best_model.pth", set()), ("best_model.json", BEST))):
        (elsewhere.parent / name).write_text(name)
        (out := tmp_path / f"out{number}").mkdir()
        begin_run(out, elsewhere, 5, None, print)
        assert {path.name for path in out.iterdir()} == expected


def test_a_folder_belongs_to_one_process_and_to_runs(tmp_path):
    lock = claim(tmp_path / "out")
    with pytest.raises(InputError, match="another process"):
        claim(tmp_path / "out")
    lock.release()
    (tmp_path / "out" / "config.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match="not written by a run"):
        claim(tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == "mine: true\n"

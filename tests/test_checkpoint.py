"""Weights and checkpoints on disk: what is written comes back, and what is damaged is noticed."""

import json
import os

import pytest
import torch

from model.checkpoint import (
    CHECKPOINT_KEYS,
    CHECKPOINT_VERSION,
    Weights,
    infer_config,
    load_torch,
    load_weights,
    save_torch,
    save_weights,
)
from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.resume import newest_checkpoint
from model.run_folder import claim, leave_line, move_earlier_run, prune_checkpoints


def checkpoint(path, step):
    content = dict.fromkeys(CHECKPOINT_KEYS) | {"format_version": CHECKPOINT_VERSION, "progress": {"step": step}}
    save_torch(path, content | {"model": torch.full((1000,), float(step))})
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
    with pytest.raises(InputError, match="MiniMind v1's names"):
        infer_config({"model.embed_tokens.weight": torch.zeros(2, 2)})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="found list"):
        load_weights(tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "dict.pth")
    with pytest.raises(InputError, match="state dict"):
        load_weights(tmp_path / "dict.pth")


def test_truncated_and_flipped_files_are_noticed(tmp_path):
    path = checkpoint(tmp_path / "c.pth", 5)
    whole = path.read_bytes()
    for size in range(0, len(whole), 397):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_torch(path)
    start = whole.index(torch.full((1000,), 5.0).numpy().tobytes())
    for offset in range(start, start + 4000, 331):  # torch.load alone would take these for weights
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="checksum"):
            load_torch(path)
    for offset in range(len(whole) - 3000, len(whole)):  # the archive's own directory
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        try:
            assert_same(load_torch(path), step=5)  # a bit that no reader looks at, or …
        except InputError as error:
            assert "\n" not in str(error)  # … one clear line
    path.write_bytes(whole)
    assert_same(load_torch(path), step=5)


def assert_same(content, step):
    assert content["progress"] == {"step": step} and torch.equal(content["model"], torch.full((1000,), float(step)))


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
    with pytest.raises(Exception, match="pickle"):
        save_torch(path, {"a": lambda: 0})
    assert load_torch(path)["progress"]["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_the_newest_whole_checkpoint_is_found_by_its_step(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint_step_{step}.pth", step)
    checkpoint(tmp_path / "checkpoint_interrupted.pth", 57)
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint_step_100.pth"
    whole = (tmp_path / "checkpoint_step_100.pth").read_bytes()
    (tmp_path / "checkpoint_step_100.pth").write_bytes(whole[:-500])
    path, content, passed_over = newest_checkpoint(tmp_path)
    assert path.name == "checkpoint_interrupted.pth" and content["progress"]["step"] == 57
    assert len(passed_over) == 1 and "checkpoint_step_100.pth" in passed_over[0]
    assert newest_checkpoint(tmp_path / "empty") is None


def test_old_checkpoints_are_pruned_by_step(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint_step_{step}.pth", step)
    checkpoint(tmp_path / "best_model.pth", 1)
    prune_checkpoints(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best_model.pth", "checkpoint_step_10.pth", "checkpoint_step_100.pth",
    ]  # fmt: skip


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
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint_step_10.pth" and leave_line(tmp_path, 10) is None


def test_a_folder_belongs_to_one_process_and_to_runs(tmp_path):
    lock = claim(tmp_path / "out")
    with pytest.raises(InputError, match="another process"):
        claim(tmp_path / "out")
    lock.release()
    (tmp_path / "out" / "config.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match="not written by a run"):
        claim(tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == "mine: true\n"

"""Ranks that share the weights too: the same bits as where each has all, and each way of sharing from another."""

import dataclasses
import subprocess

import pytest
import torch

from model.errors import InputError
from model.storage.archive import load_torch
from model.training.choices import weight_shards
from model.training.clipping import clip_gradients
from model.training.divided_matrices import balanced, rows_of
from model.training.memory import step_memory
from model.training.settings import build_settings
from tests.runs.test_processes import ranks
from tests.tiny_runs import ONE_THREAD, assert_equal, assert_same_end, command, finish_ranks, losses, start_ranks, train
from tests.training.test_sharding import assert_same_runs, assert_sharing_keeps_the_bits
from utils import Processes

# ------------------------------------------------------------------------------------------------- who holds what


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64])
def test_rows_are_divided_as_torch_divides_them(rows, count):
    ends = [rows_of(rows, rank, count) for rank in range(count)]
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(count)]
    assert [end - begin for begin, end in ends] == chunks + [0] * (count - len(chunks))
    assert [begin for begin, _ in ends[1:]] == [end for _, end in ends[:-1]] and ends[-1][1] == rows


def test_tasks_are_divided_by_cost():
    assert balanced([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert balanced([], 2) == []


def test_the_ranks_that_share_one_copy():
    def shards(world_size, machine, **training):
        processes = Processes.alone()
        processes.world_size, processes.local_world_size = world_size, machine
        return weight_shards(build_settings({}, training).training, processes)

    assert [shards(8, 4, shard=shard) for shard in ("auto", "none", "optimizer", "full", "hybrid")] == [1, 1, 1, 8, 4]
    assert shards(8, 4, shard="hybrid", shard_degree=2) == 2
    assert shards(1, 1, shard="full") == shards(1, 1, shard="hybrid") == 1
    with pytest.raises(InputError, match="shard_degree: 3 does not divide the 8 processes"):
        shards(8, 4, shard="hybrid", shard_degree=3)
    with pytest.raises(InputError, match="shard_degree: 2 found, but shard is full; set shard hybrid, or omit it"):
        shards(8, 4, shard="full", shard_degree=2)
    with pytest.raises(InputError, match="each machine has one process; give shard_degree, or use shard full"):
        shards(8, 1, shard="hybrid")


def test_gradients_are_clipped_as_torch_clips_them():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((50, 30), (7,))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    own = [parameter.grad.clone() for parameter in parameters]
    expected = torch.nn.utils.clip_grad_norm_(parameters, 2.0)
    norm = clip_gradients(own, 2.0, lambda squares: None)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(own, [parameter.grad for parameter in parameters])
    whole = [gradient.clone() for gradient in own]
    assert clip_gradients(own, float("inf"), lambda squares: squares.mul_(4)) == pytest.approx(2 * 2.0)
    assert_equal(own, whole)


MATRICES = """
import torch
import torch.distributed as dist
from model.training.divided_matrices import DividedMatrices, rows_of
from model.training.muon import orthogonalized
torch.manual_seed(0)
shapes = [(64, 64), (2, 64), (64, 128), (64, 64), (128, 64), (3, 64)]
whole = [torch.randn(shape) for shape in shapes]
rows = [slice(*rows_of(len(matrix), rank, count)) for matrix in whole]
own = [matrix[row].clone() for matrix, row in zip(whole, rows)]
divided = DividedMatrices(dict(zip(own, shapes)), dist.group.WORLD)
found = {}
for some, directions, longer in divided.turned({part: 2 * part for part in own}, torch.float32):
    found |= {id(part): (direction, longer) for part, direction in zip(some, directions)}
for matrix, row, part in zip(whole, rows, own):
    direction, longer = found[id(part)]
    expected = orthogonalized(2 * matrix[None], torch.float32)[0][row]
    torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-6)
    assert longer == max(matrix.shape)
print(sum(len(owned) for owned in divided._owned))
"""


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_matrices_are_orthogonalized_whole_also_where_a_rank_has_no_row(count):
    ended = ranks(f"count = {count}" + MATRICES, [{}] * count, count)
    assert ended == [(0, "6\n", "")] * count


@pytest.mark.parametrize("experts", [0, 4])
def test_the_memory_of_a_share(tiny_config, experts):
    config = dataclasses.replace(tiny_config, n_experts=experts)

    def memory(ranks, **training):
        t = build_settings({}, {"use_ema": "true"} | training).training
        return step_memory(config, t, 2, torch.device("cpu"), torch.autocast("cpu", torch.bfloat16), ranks)

    whole, share = memory(1, shard="none"), memory(4, shard="full")
    head_dims = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = config.dim * (2 * head_dims[0] + 2 * head_dims[1] + 3 * config.hidden_dim * max(1, experts))
    kept = whole.weights - 4 * config.n_layers * layer  # embedding, norms and routers stay gathered
    assert share.weights == whole.weights // 4 + kept
    assert (share.average, share.optimizer) == (whole.average // 4, whole.optimizer // 4)
    assert share.gradients == whole.gradients // 4
    assert share.activations == whole.activations - 2 * config.n_layers * layer  # without autocast's copies
    assert memory(4, shard="full", accumulation_steps=2).gradients == whole.gradients
    assert memory(1, shard="full") == whole


# ------------------------------------------------------------------------------------------------- the same bits


def train_on(count: int, flags: dict) -> subprocess.CompletedProcess:
    """Train in this many processes; the output of all of them."""
    result = finish_ranks(start_ranks(count, command(flags, "--ddp")))
    assert result.returncode == 0, result.stderr
    return result


CASES = {
    "adamw, clipping": {"grad_clip": 0.1, "dtype": "float32"},
    "adam, accumulation, dropout": {"optimizer_type": "adam", "accumulation_steps": 2, "dropout": 0.1},
    "muon, average": {"optimizer_type": "muon", "use_ema": "true", "dtype": "float32"},
    "muon, bfloat16, accumulation": {"optimizer_type": "muon", "dtype": "bfloat16", "accumulation_steps": 2},
    "query norm, biases": {"optimizer_type": "muon", "qk_norm": "true", "qkv_bias": "true", "head_dim": 64},
    "two matrices of the vocabulary, recomputed": {"tie_embeddings": "false", "activation_checkpointing": "full"},
    "documents, recomputed in part": {"activation_checkpointing": "selective", "document_mask": "true"},
    "experts": {
        "n_experts": 4,
        "n_shared_experts": 1,
        "expert_bias": "true",
        "optimizer_type": "muon",
        "use_ema": "true",
    },
    "experts, one more on a rank": {"n_experts": 3, "optimizer_type": "muon", "accumulation_steps": 2},
    "attention written out": {"flash_attn": "false", "optimizer_type": "muon"},
}


@pytest.mark.long
def test_two_ranks_that_share_weights_have_the_bits_of_two_that_do_not(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(ONE_THREAD, "MATECONV_EMULATE_DTYPE", "1")
    options = {
        "optimizer_type": "muon",
        "dtype": "bfloat16",
        "use_ema": "true",
        "accumulation_steps": 2,
        "grad_clip": 0.1,
    }
    for shard in ("none", "full"):
        said = train_on(2, flags(shard=shard, out_dir=tmp_path / shard, **options)).stderr
        assert said.count("shard full: 2 processes share one copy of weights") == (shard == "full")
        assert "Warning" not in said
    assert_same_runs(tmp_path / "none", tmp_path / "full")


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_whatever_a_step_does_the_bits_are_the_same(flags, tmp_path, case, ahead, monkeypatch):
    assert_sharing_keeps_the_bits("full", flags, tmp_path, CASES[case], ahead, monkeypatch)


MATRIX = {
    "adamw": {},
    "muon": {"optimizer_type": "muon"},
    "muon, average": {"optimizer_type": "muon", "use_ema": "true"},
    "adamw, accumulation": {"accumulation_steps": 2, "batch_size": 2},
    "muon, all": {
        "optimizer_type": "muon",
        "accumulation_steps": 2,
        "batch_size": 2,
        "use_ema": "true",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX)
@pytest.mark.parametrize("shard", ["none", "optimizer", "full", "hybrid"])
def test_four_ranks_compute_what_one_process_does(flags, tmp_path, shard, case):
    options = {"dtype": "float32", "max_steps": 8, "learning_rate": 1e-3} | MATRIX[case]
    alone = train(flags(out_dir=tmp_path / "alone", **options | {"batch_size": 16, "accumulation_steps": 1}))
    assert alone.outcome == "finished"
    shards = {"shard_degree": 2} if shard == "hybrid" else {}
    train_on(4, flags(shard=shard, out_dir=tmp_path / "four", **options, **shards))
    for (_, one), (_, four) in zip(losses(tmp_path / "alone"), losses(tmp_path / "four"), strict=True):
        assert four == pytest.approx(one, rel=1e-6)
    a, b = (load_torch(tmp_path / folder / "best_model.pth") for folder in ("alone", "four"))
    torch.testing.assert_close(dict(a), dict(b), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize(("shard", "writers"), [("full", "one"), ("full", "all"), ("hybrid", "all")])
def test_a_killed_run_on_four_ranks_resumes_with_the_same_bits(flags, tmp_path, shard, writers, optimizer_type):
    options = {"optimizer_type": optimizer_type, "use_ema": "true", "dropout": 0.1, "shard": shard}
    options |= {"checkpoint_writers": writers} | ({"shard_degree": 2} if shard == "hybrid" else {})
    for folder in ("whole", "killed"):
        train_on(4, flags(out_dir=tmp_path / folder, **options))
    for step in (8, 12):
        (tmp_path / "killed" / f"checkpoint_step_{step}.pth").unlink()
    said = train_on(4, flags(out_dir=tmp_path / "killed", resume="true", **options)).stderr
    assert "at step 4" in said and "not with the same bits" not in said
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize(("before", "after"), [("none", "full"), ("full", "optimizer"), ("full", "full")])
def test_two_ranks_resume_from_and_to_other_ways_of_sharing(flags, tmp_path, optimizer_type, before, after):
    options = {"optimizer_type": optimizer_type, "use_ema": "true", "dropout": 0.1}
    for folder, shard in (("whole", "none"), ("killed", before)):
        train_on(2, flags(out_dir=tmp_path / folder, shard=shard, **options))
    (tmp_path / "killed" / "checkpoint_step_12.pth").unlink()
    said = train_on(2, flags(out_dir=tmp_path / "killed", shard=after, resume="true", **options)).stderr
    assert "resuming from" in said and "with other settings" not in said and "not with the same bits" not in said
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("writers", ["one", "all"])
def test_two_ranks_four_and_one_go_on_with_each_others_weights(flags, tmp_path, writers):
    folder = tmp_path / "run"
    options = {"optimizer_type": "muon", "use_ema": "true", "dtype": "float32", "learning_rate": 1e-3}
    train(flags(**options, batch_size=8, out_dir=tmp_path / "alone"))
    for count, resumed_at, left in ((2, None, (4,)), (4, 4, (4, 8)), (1, 8, (4, 8, 12))):
        resume = {} if resumed_at is None else {"resume": "true"}
        of_run = options | {"batch_size": 8 // count, "shard": "full", "checkpoint_writers": writers} | resume
        said = train_on(count, flags(out_dir=folder, **of_run)).stderr
        assert resumed_at is None or f"at step {resumed_at}" in said
        for step in {4, 8, 12} - {*left}:
            (folder / f"checkpoint_step_{step}.pth").unlink()
    for (_, one), (_, others) in zip(losses(tmp_path / "alone"), losses(folder), strict=True):
        assert others == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
def test_adapters_are_trained_and_frozen_weights_are_shared(flags, tmp_path, optimizer_type):
    train(flags(max_steps=4, out_dir=tmp_path / "base"))
    given_by_weights = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    options = {"init_from": tmp_path / "base" / "pretrain_32.pth", "lora_rank": 4, "use_ema": "true"}
    options |= {"optimizer_type": optimizer_type, "dtype": "float32"}
    for shard in ("none", "full"):
        train_on(2, flags(shard=shard, out_dir=tmp_path / shard, **options, **given_by_weights))
    a, b = (load_torch(tmp_path / shard / "checkpoint_step_12.pth") for shard in ("none", "full"))
    torch.testing.assert_close(a["model"], b["model"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"] if "lora" not in name)

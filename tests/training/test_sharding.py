"""Ranks that share the optimizer: who updates what, and the same bits as where each has all of it."""

import contextlib

import pytest
import torch

from model.storage.archive import load_torch
from model.training.memory import step_memory
from model.training.optimizer import OPTIMIZERS, build_optimizer, trained_parameters
from model.training.recipe import automatic_shard
from model.training.settings import build_settings
from model.training.sharding import ALIGNMENT, Piece, in_buckets, share_out, update_cost
from tests.conftest import random_model
from tests.runs.test_processes import ranks
from tests.tiny_runs import ONE_THREAD, assert_equal, assert_same_end, events, losses, train, two_ranks

# ----------------------------------------------------------------------------------------------- who updates what


def shares_of(model, optimizer_type: str, ranks: int) -> list[list[Piece]]:
    return share_out(trained_parameters(model), OPTIMIZERS[optimizer_type].is_elementwise, ranks)


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 50])
def test_each_element_is_one_ranks_and_matrices_of_muon_stay_whole(tiny_model, optimizer_type, ranks):
    shares = shares_of(tiny_model, optimizer_type, ranks)
    owners = {name: torch.zeros(p.numel(), dtype=torch.int64) for name, p in trained_parameters(tiny_model).items()}
    assert len(shares) == ranks
    for piece in (piece for share in shares for piece in share):
        owners[piece.name][piece.start : piece.end] += 1
        assert piece.start % ALIGNMENT == 0
        is_matrix = "layers." in piece.name and "norm" not in piece.name
        assert (piece.shape is not None) == (optimizer_type == "muon" and is_matrix)
        assert piece.shape is None or piece.size == owners[piece.name].numel()
    assert all((count == 1).all() for count in owners.values())
    assert shares == shares_of(random_model(tiny_model.config, seed=1), optimizer_type, ranks)  # as on another rank


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranges_are_equal_but_for_the_alignment(tiny_model, ranks):
    sizes = [sum(piece.size for piece in share) for share in shares_of(tiny_model, "adamw", ranks)]
    assert max(sizes) - min(sizes) <= 2 * ALIGNMENT
    assert sum(sizes) == sum(p.numel() for p in tiny_model.parameters())


@pytest.mark.parametrize("ranks", [2, 3, 8, 50])
def test_no_rank_has_more_matrices_to_turn_than_the_mean_and_one(tiny_model, ranks):
    parameters = trained_parameters(tiny_model)
    costs = [
        sum(update_cost(parameters[piece.name].shape) for piece in share if piece.shape)
        for share in shares_of(tiny_model, "muon", ranks)
    ]
    largest = max(update_cost(p.shape) for name, p in parameters.items() if name.startswith("layers."))
    assert max(costs) <= sum(costs) / ranks + largest
    assert costs.count(0) == max(0, ranks - 14)  # 7 matrices in each of 2 layers


def test_the_cost_of_a_matrix_is_that_of_its_products():
    assert update_cost((2, 3)) == update_cost((3, 2)) == 4 * 4 * 3 + 2 * 8


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize("most", [ALIGNMENT, 10 * ALIGNMENT, 10**9])
def test_buckets_hold_all_pieces_and_are_as_many_on_each_rank(tiny_model, optimizer_type, most):
    shares = shares_of(tiny_model, optimizer_type, 3)
    buckets = in_buckets(shares, most)
    for rank, share in enumerate(shares):
        of_rank = [bucket[rank] for bucket in buckets]
        for pieces in of_rank:
            assert sum(piece.size for piece in pieces) <= most or len(pieces) == 1 and pieces[0].shape is not None
        found = {(piece.name, at) for pieces in of_rank for piece in pieces for at in range(piece.start, piece.end)}
        assert found == {(piece.name, at) for piece in share for at in range(piece.start, piece.end)}


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam"])
def test_ranges_have_the_bits_of_the_whole(tiny_config, optimizer_type):
    """As far as `is_elementwise` and ALIGNMENT promise: with the kernels of this machine."""
    whole, cut = random_model(tiny_config), random_model(tiny_config)
    optimizer, pieces = build_optimizer(whole, optimizer_type, 1e-2, 0.1), shares_of(cut, optimizer_type, 3)
    of_ranges = build_optimizer(cut, optimizer_type, 1e-2, 0.1)
    parameters = dict(cut.named_parameters())
    parts = [(piece, piece.of(parameters[piece.name].detach())) for share in pieces for piece in share]
    for group in of_ranges.param_groups:
        group["params"] = [part for piece, part in parts if piece.name in group["param_names"]]
    for step in range(3):
        torch.manual_seed(step)
        for (_, p), q in zip(whole.named_parameters(), parameters.values(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for piece, part in parts:
            part.grad = piece.of(parameters[piece.name].grad)
        optimizer.step()
        of_ranges.step()
    assert_equal(dict(whole.state_dict()), dict(cut.state_dict()))


# --------------------------------------------------------------------------------------------- whether it pays


@pytest.mark.parametrize(
    ("optimizer_type", "state", "expected"),
    [("muon", 1, "optimizer"), ("adamw", 11, "optimizer"), ("adamw", 9, "none")],
)
def test_auto_shares_muons_work_and_a_large_state(optimizer_type, state, expected):
    shard, why = automatic_shard(optimizer_type, state, 100, 4)
    assert shard == expected and why


def test_the_memory_of_a_step_counts_the_share(tiny_config):
    def memory(shard, ranks):
        training = build_settings({}, {"shard": shard, "use_ema": "true"}).training
        return step_memory(tiny_config, training, 2, torch.device("cpu"), contextlib.nullcontext(), ranks)

    whole, share = memory("none", 4), memory("optimizer", 4)
    weights = whole.gradients
    assert (whole.optimizer, whole.weights, whole.average) == (2 * weights, weights, weights)
    assert (share.optimizer, share.weights, share.average) == (weights / 2, weights, weights / 4)
    assert (share.gradients, share.activations) == (whole.gradients, whole.activations)
    assert memory("auto", 4) == share and memory("optimizer", 1) == memory("none", 1) == whole


@pytest.mark.long
def test_one_process_shares_nothing_and_says_so(flags, tmp_path, capfd):
    for shard in ("none", "optimizer"):
        assert train(flags(shard=shard, max_steps=4, out_dir=tmp_path / shard)).plan.shards == 1
    assert_same_end(tmp_path / "none", tmp_path / "optimizer", step=4)
    messages = capfd.readouterr().err
    assert messages.count("shard optimizer: there is one process, so nothing is shared") == 1


# ----------------------------------------------------------------------------------------------- the same bits

# Losses that hardly change: whatever is above their mean counts as a spike.
SKIPPED = {"max_steps": 44, "learning_rate": 1e-7, "spike_threshold": 0.01, "max_skipped_steps": 40, "use_ema": "true"}
CASES = {
    "adamw, average, clipping": {"use_ema": "true", "grad_clip": 0.1},
    "adam, accumulation, dropout": {"optimizer_type": "adam", "accumulation_steps": 2, "dropout": 0.1},
    "muon, average": {"optimizer_type": "muon", "use_ema": "true"},
    "muon, float16": {"optimizer_type": "muon", "dtype": "float16"},
    "muon, bfloat16": {"optimizer_type": "muon", "dtype": "bfloat16", "use_ema": "true"},
    "muon, experts": {"optimizer_type": "muon", "n_experts": 4, "expert_bias": "true", "use_ema": "true"},
    "adamw, skipped steps": SKIPPED,
    "muon, skipped steps": SKIPPED | {"optimizer_type": "muon"},
}


def assert_same_runs(folder_a, folder_b) -> None:
    assert losses(folder_a) == losses(folder_b)
    names = {path.name for path in folder_a.glob("*.pth")}
    assert names == {path.name for path in folder_b.glob("*.pth")} and len(names) >= 5
    for name in names:
        if name.startswith("checkpoint_step_"):
            assert_same_end(folder_a, folder_b, int(name.removeprefix("checkpoint_step_").removesuffix(".pth")))
        else:
            assert_equal(*(load_torch(folder / name) for folder in (folder_a, folder_b)))


def assert_sharing_keeps_the_bits(shard: str, flags, folder, options: dict, ahead: int, monkeypatch) -> None:
    """Of two ranks, launching ahead or not; their runs lie in `folder` by what they share."""
    monkeypatch.setitem(ONE_THREAD, "MATECONV_RUN_AHEAD", str(ahead))
    monkeypatch.setitem(ONE_THREAD, "MATECONV_EMULATE_DTYPE", "1")
    for shared in ("none", shard):
        result = two_ranks(flags(shard=shared, out_dir=folder / shared, **options))
        assert result.returncode == 0, result.stderr
    assert_same_runs(folder / "none", folder / shard)


@pytest.mark.long
def test_two_ranks_that_share_have_the_bits_of_two_that_do_not(flags, tmp_path):
    for shard in ("none", "auto"):
        result = two_ranks(flags(optimizer_type="muon", use_ema="true", shard=shard, out_dir=tmp_path / shard))
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("shard optimizer (auto): each of 2 ranks does its share of") == (shard == "auto")
    assert "FutureWarning" not in result.stderr
    assert_same_runs(tmp_path / "none", tmp_path / "auto")


MANY_BUCKETS = """
import torch
from model.LMConfig import LMConfig
from model.training.moving_average import MovingAverage
from model.training.optimizer import OPTIMIZERS, build_optimizer, load_optimizer_state
from model.training.sharded_optimizer import SharedAverage, ShardedOptimizer
from model.training.sharding import Shares
from tests.conftest import random_model
from tests.runs.test_processes import ranks
from tests.tiny_runs import assert_equal
config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128)
def built(shared):
    model = random_model(config)
    optimizer, average = build_optimizer(model, optimizer_type, 1e-2, 0.1), MovingAverage(model, 0.9)
    if shared:
        shares = Shares(model, OPTIMIZERS[optimizer_type].is_elementwise, processes, 60_000)
        assert len(shares.buckets) > 5
        optimizer, average = ShardedOptimizer(optimizer, optimizer_type, shares), SharedAverage(model, 0.9, shares)
    return model, optimizer, average
def train(model, optimizer, average, steps):
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * (torch.nan if step in (2, 3) else 1.0)
        optimizer.found_inf = torch.tensor(float(step in (2, 3)))
        optimizer.step()
        average.update_parameters(model, optimizer.found_inf)
for optimizer_type in ("adamw", "adam", "muon"):
    whole, shared, resumed = built(False), built(True), built(True)
    train(*whole, range(5))
    train(*shared, range(5))
    assert_equal(dict(whole[0].state_dict()), dict(shared[0].state_dict()))
    assert_equal(dict(whole[2].averaged_weights()), dict(shared[2].averaged_model().state_dict()))
    state, average = shared[1].state_dict(), shared[2].averaged_weights()
    if rank == 0:
        assert_equal(whole[1].state_dict(), state)
        assert_equal(dict(whole[2].averaged_weights()), average)
    resumed[0].load_state_dict(whole[0].state_dict())
    resumed[2].load_weights(whole[2].averaged_weights())
    resumed[2].n_averaged.fill_(5)
    load_optimizer_state(resumed[1], whole[1].state_dict())
    train(*whole, range(5, 8))
    train(*resumed, range(5, 8))
    assert_equal(dict(whole[0].state_dict()), dict(resumed[0].state_dict()))
    assert_equal(dict(whole[2].averaged_weights()), dict(resumed[2].averaged_model().state_dict()))
    held, all_of_it = resumed[1].state_bytes(), sum(t.nbytes for s in whole[1].state.values() for t in s.values())
    assert all_of_it / count / 2 < held < 1.5 * all_of_it / count
print("the same bits")
"""


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_many_buckets_a_veto_and_a_loaded_state_have_the_bits_of_the_whole(count):
    ended = ranks(f"count = {count}" + MANY_BUCKETS, [{}] * count, count)
    assert ended == [(0, "the same bits\n", "")] * count


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_whatever_a_step_does_the_bits_are_the_same(flags, tmp_path, case, ahead, monkeypatch):
    assert_sharing_keeps_the_bits("optimizer", flags, tmp_path, CASES[case], ahead, monkeypatch)
    skipped = [event["skipped_steps"] for event in events(tmp_path / "optimizer") if "skipped_steps" in event]
    assert (skipped[-1] > 0) == ("skipped" in case)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
def test_adapters_are_shared_and_frozen_weights_are_not(flags, tmp_path, optimizer_type):
    train(flags(max_steps=4, out_dir=tmp_path / "base"))
    given_by_weights = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    options = {"init_from": tmp_path / "base" / "pretrain_32.pth", "lora_rank": 4, "use_ema": "true"}
    for shard in ("none", "optimizer"):
        result = two_ranks(
            flags(optimizer_type=optimizer_type, shard=shard, out_dir=tmp_path / shard, **options, **given_by_weights)
        )
        assert result.returncode == 0, result.stderr
    assert_same_runs(tmp_path / "none", tmp_path / "optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("before", "after"), [("none", "optimizer"), ("optimizer", "none"), ("optimizer", "optimizer")]
)
def test_a_run_resumes_from_and_to_one_that_does_not_share(flags, tmp_path, optimizer_type, before, after):
    options = {"optimizer_type": optimizer_type, "use_ema": "true", "dropout": 0.1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, shard in ((whole, "none"), (killed, before)):
        result = two_ranks(flags(out_dir=folder, shard=shard, **options))
        assert result.returncode == 0, result.stderr
    (killed / "checkpoint_step_12.pth").unlink()
    result = two_ranks(flags(out_dir=killed, shard=after, resume="true", **options))
    assert result.returncode == 0 and "resuming from" in result.stderr, result.stderr
    assert "with other settings" not in result.stderr
    assert_same_end(whole, killed)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_shared_and_two_with_what_one_had(flags, tmp_path):
    """Sums over the ranks have another order then, so losses are compared, not bits."""
    options = {"optimizer_type": "muon", "use_ema": "true", "shard": "optimizer", "dtype": "float32", "eval_steps": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert two_ranks(flags(**options | {"shard": "none"}, out_dir=whole)).returncode == 0
    assert two_ranks(flags(**options, out_dir=killed)).returncode == 0
    for name in ("checkpoint_step_8.pth", "checkpoint_step_12.pth"):
        (killed / name).unlink()
    alone = flags(**options, batch_size=8, out_dir=killed, resume="true")
    assert train(alone).outcome == "finished"
    (killed / "checkpoint_step_12.pth").unlink()
    result = two_ranks(flags(**options, out_dir=killed, resume="true"))
    assert result.returncode == 0 and "at step 8" in result.stderr, result.stderr
    assert dict(losses(killed)) == pytest.approx(dict(losses(whole)), abs=1e-4)

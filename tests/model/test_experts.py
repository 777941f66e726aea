"""Mixtures of experts: what the network computes, against the sum written out, and what its routers count."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.errors import InputError
from model.experts import WAYS, ExpertsFeedForward, Gathered, expert_products
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights.shapes import weight_shapes
from tests.conftest import random_model
from tests.tiny_runs import calls_of

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "max_seq_len": 96}
MIXTURE = {"n_experts": 8, "expert_hidden_dim": 48}
KINDS = {
    "softmax, normalised": {},
    "one of each, its score as the weight": {"n_active_experts": 1, "normalize_expert_weights": False},
    "all of them": {"n_active_experts": 8},
    "shared": {"n_shared_experts": 2, "n_active_experts": 3},
    "shared, of another width": {"n_shared_experts": 1, "shared_hidden_dim": 32},
    "sigmoid and bias": {"expert_score": "sigmoid", "expert_bias": True},
}
TOKENS = torch.randint(300, (3, 97), generator=torch.Generator().manual_seed(1))


def config_of(**more) -> LMConfig:
    return LMConfig(**SHAPE | MIXTURE | more)


def model_of(**more) -> Transformer:
    model = random_model(config_of(**more))
    for layer in model.layers:
        if layer.feed_forward.router.bias is not None:
            torch.nn.init.normal_(layer.feed_forward.router.bias, std=0.3)
    return model


def use(model: Transformer, way: str) -> Transformer:
    for layer in model.layers:
        layer.feed_forward.experts.way = way
    return model


def written_out(block: ExpertsFeedForward, config: LMConfig, x: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert: x [N, dim] -> [N, dim]."""

    def swiglu(row, w1, w2, w3):
        return w2 @ (F.silu(w1 @ row) * (w3 @ row))

    stacks, rows = block.experts, []
    for row in x:
        logits = block.router.weight @ row
        scores = logits.softmax(-1) if config.expert_score == "softmax" else logits.sigmoid()
        preferred = scores if block.router.bias is None else scores + block.router.bias
        best = preferred.argsort(descending=True)[: config.n_active_experts].tolist()
        total = sum(scores[e] for e in best) if config.normalize_expert_weights else 1.0
        out = sum(scores[e] / total * swiglu(row, stacks.w1[e], stacks.w2[e], stacks.w3[e]) for e in best)
        if config.n_shared_experts:
            out = out + swiglu(row, *(getattr(block.shared, name).weight for name in ("w1", "w2", "w3")))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_weighted_sum_of_the_chosen_experts(kind):
    config = config_of(**KINDS[kind])
    block = model_of(**KINDS[kind]).layers[0].feed_forward
    x = torch.randn(2, 11, config.dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for way in WAYS:
            block.experts.way = way
            found, expected = block(x), written_out(block, config, x.flatten(0, 1)).view_as(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_have_the_names_and_shapes_that_files_are_checked_by(kind):
    config, model = config_of(**KINDS[kind]), model_of(**KINDS[kind])
    assert weight_shapes(config) == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    of_a_layer = {name.removeprefix("layers.0.feed_forward.") for name in model.state_dict() if "0.feed" in name}
    stacks = {f"experts.w{number}" for number in (1, 2, 3)}
    shared = {f"shared.w{number}.weight" for number in (1, 2, 3)} if config.n_shared_experts else set()
    assert of_a_layer == stacks | shared | {"router.weight"} | ({"router.bias"} if config.expert_bias else set())


def test_parameters_are_counted_all_and_those_that_compute_a_token():
    """MiniMind2-MoE: 145.0 million, 91.9 million of them active."""
    shape = {"dim": 640, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 6400, "hidden_dim": 1728}
    with torch.device("meta"):
        dense = Transformer(LMConfig(**shape))
        mixture = Transformer(LMConfig(**shape, n_experts=4, n_active_experts=2, n_shared_experts=1))
    assert dense.parameter_count() == dense.active_parameter_count()
    assert (mixture.parameter_count(), mixture.active_parameter_count()) == (145_029_760, 91_945_600)
    assert mixture.layer_shapes() == dense.layer_shapes() | {(4, 640)}
    attention = 6 * 8 * 8 * 80 * 512
    assert mixture.training_flops_per_token() == 6 * 91_945_600 + attention


def gradients(model: Transformer, targets: torch.Tensor, bfloat16: bool = False, called=None) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = (model if called is None else called)(TOKENS[:, :-1], targets)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_and_checkpointing_give_the_same_bits(kind, bfloat16):
    model = model_of(**KINDS[kind]).train()
    model.balance_loss, model.router_z_loss = 0.1, 0.01
    expected = gradients(model, TOKENS[:, 1:], bfloat16)
    routed = model.routing.clone()
    assert routed[:, :-2].sum() == 2 * 3 * 96 * model.config.n_active_experts
    for way, checkpointing in (("grouped", "none"), ("grouped", "selective"), ("loop", "full")):
        use(model, way).checkpointing = checkpointing
        model.routing.zero_()
        found = gradients(model, TOKENS[:, 1:], bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (way, checkpointing)
        assert torch.equal(model.routing, routed)  # counted once, not when computed again


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loop", "grouped"])
def test_it_compiles_into_one_graph(way):
    model = use(model_of(expert_bias=True, n_shared_experts=1), way).train()
    model.balance_loss = 0.1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, routed = gradients(model, TOKENS[:, 1:]), model.routing.clone()
    model.routing.zero_()
    found = gradients(model, TOKENS[:, 1:], called=compiled)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(model.routing, routed)


@pytest.mark.parametrize(
    "numbers", [(0, 1, 63, 64, 65, 200, 0, 7), (5, 3, 0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0, 0, 90)]
)
@pytest.mark.parametrize("way", WAYS)
def test_in_16_bits_products_have_few_shapes_and_each_row_meets_its_own_expert(monkeypatch, numbers, way):
    """A CPU's library compiles a kernel for every new shape."""
    generator = torch.Generator().manual_seed(3)
    total, ends = sum(numbers), torch.tensor(numbers).cumsum(0).int()
    x, grad = torch.randn(total, 24, generator=generator), torch.randn(total, 16, generator=generator)
    stack = torch.randn(len(numbers), 16, 24, generator=generator)
    exact = [t.clone().requires_grad_() for t in (x, stack)]
    expected = torch.cat([rows @ matrix.t() for rows, matrix in zip(exact[0].split(numbers), exact[1], strict=True)])
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, grad)]

    calls = calls_of(monkeypatch, torch, "mm")
    inputs = [t.bfloat16().requires_grad_() for t in (x, stack)]
    found = expert_products(*inputs, ends, way == "grouped")
    found = [found.detach(), *torch.autograd.grad(found, inputs, grad.bfloat16())]
    for own, other in zip(found, wanted, strict=True):
        assert (own.float() - other).norm() < 0.01 * other.norm()
    sizes = {size for a, b in calls for size in (*a.shape, *b.shape)}
    assert sizes <= {16, 24, total, *(size for size in range(0, total + 64, 64))}


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_without_tokens_has_a_gradient_of_zero(way):
    model = use(model_of(expert_bias=True), way).train()
    router = model.layers[1].feed_forward.router
    router.bias.copy_(torch.tensor([9.0] * 2 + [-9.0] * 6))  # only the first two are ever chosen
    gradients(model, TOKENS[:, 1:])
    for name in ("w1", "w2", "w3"):
        grad = getattr(model.layers[1].feed_forward.experts, name).grad
        assert (grad[:2].abs().amax((1, 2)) > 0).all() and not grad[2:].any()
    assert model.routing[1, :-2].tolist() == [3 * 96, 3 * 96, 0, 0, 0, 0, 0, 0]


def test_gradients_of_products_and_of_gathered_rows_are_the_derivatives():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, weight: expert_products(x, weight, ends, False), (x, weight))
    order = torch.tensor([1, 0, 2, 1, 2, 0, 3, 5, 4, 3, 4, 5])  # every row twice
    back = order.argsort(stable=True)
    assert torch.autograd.gradcheck(lambda x: Gathered.apply(x, order, back, 2), (x,))


def test_losses_of_routers_are_the_papers():
    """Of each sequence, n_experts / (n_active tokens) times the sum over experts of their tokens times the sum of their
    probabilities (DeepSeek-AI, 2024); and the squared logarithm of the sum of exponentials (Zoph et al., 2022)."""
    config = config_of()
    block = model_of().layers[0].feed_forward
    x = torch.randn(2, 11, config.dim, generator=torch.Generator().manual_seed(2))
    counted = torch.ones(2, 11, dtype=torch.bool)
    counted[1, 4:] = False
    _, routing = block.with_routing(x, counted)
    balance = z = 0.0
    for row, tokens in ((x[0], 11), (x[1], 4)):
        logits = row[:tokens] @ block.router.weight.T
        probabilities = logits.softmax(-1)
        load = torch.bincount(probabilities.topk(2).indices.flatten(), minlength=8)
        balance += (load * probabilities.sum(0)).sum() * 8 / (2 * tokens)
        z += (logits.exp().sum(-1).log() ** 2).sum()
    torch.testing.assert_close(routing[-2:], torch.stack((balance, z)).detach(), rtol=1e-5, atol=1e-5)
    assert routing[:-2].sum() == 2 * 15


def test_a_uniform_router_has_a_balance_loss_of_one_a_token():
    block = model_of().layers[0].feed_forward
    with torch.no_grad():
        block.router.weight.zero_()
    _, routing = block.with_routing(torch.randn(1, 7, 64), torch.ones(1, 7, dtype=torch.bool))
    assert routing[-2:].tolist() == pytest.approx([7, 7 * math.log(8) ** 2])


def test_padding_changes_nothing_and_counts_nowhere():
    model = model_of().train()
    model.balance_loss, model.router_z_loss = 0.1, 0.01
    whole, targets = TOKENS[:, 1:].clone(), TOKENS[:, 1:].clone()
    targets[2] = -100
    gradients(model, targets)
    with_padding, routed = [p.grad.clone() for p in model.parameters()], model.routing.clone()
    model.zero_grad()
    model.routing.zero_()
    model(TOKENS[:2, :-1], whole[:2]).backward()
    torch.testing.assert_close(model.routing, routed)
    for a, b in zip(with_padding, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_alone_and_its_gradient_is_not():
    model = model_of().train()
    plain = gradients(model, TOKENS[:, 1:])
    model.balance_loss = 10.0
    balanced = gradients(model, TOKENS[:, 1:])
    assert torch.equal(plain[0], balanced[0])
    assert not torch.equal(plain[1], balanced[1])


def test_16_bits_keep_the_routers_bias(tmp_path):
    model = model_of(expert_bias=True)
    bias = model.layers[0].feed_forward.router.bias.clone()
    half = model.to(torch.bfloat16)
    assert half.layers[0].feed_forward.router.weight.dtype == torch.bfloat16
    assert torch.equal(half.layers[0].feed_forward.router.bias, bias)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_experts": 4, "n_active_experts": 5}, "n_active_experts: 5 found, at most n_experts = 4 expected"),
        ({"n_experts": 4, "n_active_experts": 0}, "n_active_experts: 0 found, a whole number of at least 1"),
        ({"n_experts": -1}, "n_experts: -1 found"),
        ({"n_experts": 4, "shared_hidden_dim": 64}, "shared_hidden_dim: 64 of no shared experts"),
        ({"n_shared_experts": 1}, "n_shared_experts: 1 of no experts; set n_experts, or omit n_shared_experts"),
        ({"expert_bias": True}, "expert_bias: true of no experts; set n_experts, or omit expert_bias"),
        ({"n_experts": 4, "expert_score": "relu"}, "expert_score: 'relu' found, one of softmax, sigmoid expected"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        LMConfig(**SHAPE | shape)


def test_scores_that_have_all_become_0_are_no_nan():
    block = model_of(expert_score="sigmoid").layers[0].feed_forward
    with torch.no_grad():
        block.router.weight.fill_(-1e3)
        output, routing = block.with_routing(torch.ones(1, 3, 64), torch.ones(1, 3, dtype=torch.bool))
    assert output.isfinite().all() and routing[:-1].isfinite().all()

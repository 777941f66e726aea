"""Training a mixture of experts: balance, what is logged, and everything that is promised of dense models."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from model import trial
from model.errors import InputError
from model.experts import WAYS
from model.LMConfig import LMConfig
from model.model import Transformer
from model.storage.archive import load_torch
from model.text.tokenization import tokenizer_sha256
from model.training.balance import Routing
from model.training.experts_trial import fastest_products
from model.training.forecast import model_cost
from model.training.memory import saved_bytes, step_memory
from model.training.moving_average import MovingAverage
from model.training.muon import orthogonalization_flops
from model.training.optimizer import build_optimizer, optimizer_bytes, set_rates
from model.training.plan import Hardware
from model.training.recipe import automatic_balance_loss
from model.training.report import describe
from model.training.settings import build_settings
from model.training.sharding import update_cost
from model.weights import Weights, load_weights, save_weights
from optimized_pretrain import Trainer
from tests.chat_files import CHATS, write_chats, write_pairs
from tests.conftest import random_model
from tests.tiny_runs import (
    assert_a_killed_run_resumes,
    assert_equal,
    assert_two_processes_resume,
    events,
    mostly,
    refused,
    train,
    two_ranks,
)
from utils import Processes

CPU = torch.device("cpu")
MIXTURE = {"n_experts": 4, "n_active_experts": 2, "expert_hidden_dim": 32}
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
CONFIG = LMConfig(**SHAPE, **MIXTURE, vocab_size=300, max_seq_len=96, n_shared_experts=1)
BIASED = MIXTURE | {"expert_bias": "true", "expert_bias_rate": 0.01}


def training_of(**values):
    return build_settings({}, {"n_experts": "4"} | {name: str(value) for name, value in values.items()}).training


def trainer_of(flags: dict) -> Trainer:
    return Trainer(build_settings({}, flags), Processes())


# ------------------------------------------------------------------------------------------------------------- balance


def test_a_bias_rises_where_tokens_are_few_and_moves_in_no_step_that_is_not_taken():
    model = Transformer(LMConfig(**SHAPE, **MIXTURE, vocab_size=300, max_seq_len=96, expert_bias=True))
    routing = Routing(model, training_of(expert_bias="true", expert_bias_rate=0.01))
    counted = torch.tensor([[9.0, 1, 3, 3, 0, 0], [4, 4, 4, 4, 0, 0]]).flatten()
    routing.move_biases(counted, veto=torch.tensor(1.0))
    assert not any(layer.feed_forward.router.bias.any() for layer in model.layers)
    routing.move_biases(counted, veto=torch.tensor(0.0))
    routing.move_biases(counted)
    first, second = (layer.feed_forward.router.bias for layer in model.layers)
    torch.testing.assert_close(first, torch.tensor([-0.03, 0.01, 0.01, 0.01]))  # signs -1 1 1 1, less their mean
    assert not second.any()


@pytest.mark.long
def test_the_balance_loss_of_auto(flags, capfd):
    def settled(**changes) -> tuple[float, str]:
        trainer = trainer_of(flags(**MIXTURE, max_steps=1, **changes))
        assert trainer.model.balance_loss == trainer.training.balance_loss
        told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("balance_loss")]
        return trainer.training.balance_loss, "".join(told)

    assert settled() == (0.01, "balance_loss 0.01 (auto): spreads each sequence's tokens over the experts")
    assert settled(expert_bias="true") == (0.0, "balance_loss 0 (auto): the bias balances the experts")
    assert settled(expert_bias="true", balance_loss=0.0001) == (0.0001, "")
    assert automatic_balance_loss(False, True, False)[0] == automatic_balance_loss(False, False, True)[0] == 0
    assert trainer_of(flags(max_steps=1)).training.balance_loss == 0 and "balance" not in capfd.readouterr().err


def test_loads_are_measured():
    routing = Routing(Transformer(CONFIG), training_of())
    assert routing.line() is None
    found = routing.measure([6, 2, 0, 0, 6.0, 8.0, 2, 2, 2, 2, 4.0, 16.0])  # 4 tokens in each of 2 layers
    assert (found["expert_load_max"], found["expert_load_min"], found["dead_experts"]) == (3, 0, 2)
    assert (found["balance_loss"], found["router_z_loss"]) == (1.25, 3)
    of_first = -(0.75 * torch.tensor(0.75).log2() + 0.25 * torch.tensor(0.25).log2()) / 2
    assert found["expert_entropy"] == pytest.approx(float((of_first + 1) / 2), abs=1e-6)
    assert routing.line() == ("experts: 0.00 to 3.00 times the mean load in the last step, 2 of 8 without a token")
    dense = Routing(random_model(LMConfig(**SHAPE, vocab_size=300)), training_of())
    assert dense.measure(dense.counted().tolist()) == {} and dense.line() is None


@pytest.mark.slow
def test_the_balance_loss_and_the_bias_spread_the_tokens(flags, tmp_path):
    """From routers that send every token to the same two experts."""
    found = {}
    for name, options in {
        "neither": {"balance_loss": 0},
        "loss": {"balance_loss": 0.1},
        "bias": {"expert_bias": "true", "expert_bias_rate": 0.05},
    }.items():
        steps = {"max_steps": 60, "eval_interval": 60, "save_interval": 60}
        trainer = trainer_of(flags(**MIXTURE, **options, **steps, out_dir=tmp_path / name, optimizer_type="muon"))
        with torch.no_grad():
            for layer in trainer.model.layers:
                layer.feed_forward.router.weight[:2] += 0.3 * torch.randn(1, 32)
        trainer.train()
        logged = [event for event in events(tmp_path / name) if "expert_entropy" in event]
        found[name] = sum(event["expert_entropy"] for event in logged[-10:]) / 10
        least = 0.99 if name != "bias" else 0.5  # 1 is balanced, but a bias chooses against the scores that it counts
        assert len(logged) == 60 and all(event["balance_loss"] >= least for event in logged)
    assert found["loss"] > found["neither"] and found["bias"] > found["neither"]


@pytest.mark.long
def test_an_evaluation_measures_the_cross_entropy_alone_and_counts_nothing(flags):
    trainer = trainer_of(flags(**BIASED, balance_loss=0.5, router_z_loss=0.1, max_steps=3))
    assert trainer.train() == "finished"
    bias = [layer.feed_forward.router.bias.clone() for layer in trainer.model.layers]
    counted = trainer.model.routing.clone()
    measured = trainer.evaluate()
    trainer.model.balance_loss = trainer.model.router_z_loss = 0.0
    assert trainer.evaluate() == measured
    assert torch.equal(trainer.model.routing, counted) and all(b.any() for b in bias)
    assert all(
        torch.equal(layer.feed_forward.router.bias, b) for layer, b in zip(trainer.model.layers, bias, strict=True)
    )


# ------------------------------------------------------------------------------------------------- counts and optimizer


@register_flop_formula(torch.ops.mateconv.expert_products)
def _products(x, weight, ends, grouped, **_) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.mateconv.expert_outer_products)
def _outer_products(a, b, ends, grouped, **_) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("way", WAYS)
def test_flops_are_those_of_the_products_of_the_active_experts(way):
    """The counter knows no attention in chunks: that of PyTorch counts all of the square, twice what we say."""
    model = random_model(CONFIG).train()
    model.training_attention, tokens = "pytorch", torch.zeros(2, 96, dtype=torch.int64)
    model.compute_experts(way)
    with FlopCounterMode(display=False) as counter:
        model.hidden_states(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "attention" not in str(op))
    attention = 6 * CONFIG.n_layers * CONFIG.n_heads * CONFIG.head_dim * 96
    output = 6 * CONFIG.vocab_size * CONFIG.dim
    norms = 6 * (2 * CONFIG.n_layers + 1) * CONFIG.dim
    assert products / tokens.numel() == model.training_flops_per_token() - attention - output - norms


@pytest.mark.parametrize("shape", [{}, {"n_experts": 8, "expert_hidden_dim": 20}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_is_known_to_the_byte_before_it_is_allocated(dtype, shape):
    config = LMConfig(**vars(CONFIG) | shape)
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    training = training_of(optimizer_type="muon", use_ema=True)
    expected = step_memory(config, training, 3, CPU, autocast)
    model = random_model(config).train()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert (expected.weights, expected.average, expected.gradients) == (parameters, parameters, parameters)
    assert expected.optimizer == optimizer_bytes(model, "muon")
    assert expected.activations == saved_bytes(model, 3, autocast, False)


def test_a_forecast_counts_what_the_model_has():
    training = training_of(optimizer_type="muon", attention="pytorch")
    cost, model = (
        model_cost(CONFIG, training, Hardware(CPU, torch.float32, contextlib.nullcontext())),
        Transformer(CONFIG),
    )
    assert (cost.parameters, cost.active_parameters) == (model.parameter_count(), model.active_parameter_count())
    assert cost.flops_per_token == model.training_flops_per_token()
    stacks = 3 * 4 * orthogonalization_flops(32, 32)
    attention = 2 * orthogonalization_flops(32, 32) + 2 * orthogonalization_flops(16, 32)
    assert cost.update_flops == 2 * (stacks + attention + 3 * orthogonalization_flops(32, 32))
    assert update_cost((4, 2, 3)) == 4 * update_cost((2, 3))


def test_a_stack_is_updated_as_its_matrices_and_a_router_by_adamw():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    optimizer = build_optimizer(model, "muon", 1e-2, 0.1, router_rate=0.5)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stack, router = "layers.0.feed_forward.experts.w1", "layers.0.feed_forward.router.weight"
    alone = torch.nn.ModuleDict({"layers": torch.nn.ParameterList(weights[stack].unbind(0))})
    of_matrices = build_optimizer(alone, "muon", 1e-2, 0.1)
    chooser = torch.nn.Parameter(weights[router].clone())
    adamw = torch.optim.AdamW([chooser], lr=0.5e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        named = dict(model.named_parameters())
        for matrix, grad in zip(alone.parameters(), named[stack].grad.unbind(0), strict=True):
            matrix.grad = grad.clone()
        chooser.grad = named[router].grad.clone()
        set_rates(optimizer, "muon", 1e-2, step)
        set_rates(of_matrices, "muon", 1e-2, step)
        for one in (optimizer, of_matrices, adamw):
            one.step()
    torch.testing.assert_close(named[stack].detach(), torch.stack([*alone.parameters()]).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(named[router], chooser, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam", "muon"])
def test_routers_have_a_rate_of_their_own(optimizer_type):
    optimizer = build_optimizer(Transformer(CONFIG), optimizer_type, 1e-2, 0.1, router_rate=0.5)
    set_rates(optimizer, optimizer_type, 2e-3, 7)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {rate for name, rate in rates.items() if "router" in name} == {np.float32(1e-3)}
    assert {rate for name, rate in rates.items() if "router" not in name} == {np.float32(2e-3)}


def test_the_average_has_the_biases_of_the_model():
    model = random_model(LMConfig(**SHAPE, **MIXTURE, vocab_size=300, expert_bias=True))
    average = MovingAverage(model, 0.9)
    for layer in model.layers:
        layer.feed_forward.router.bias += torch.randn(4)
    for name, tensor in average.averaged_weights().items():
        if "router.bias" in name:
            assert tensor.any() and torch.equal(tensor, model.state_dict()[name])
    average.load_weights(copy.deepcopy(model.state_dict()))
    layer.feed_forward.router.bias += 1
    assert torch.equal(average.averaged_model().layers[-1].feed_forward.router.bias, layer.feed_forward.router.bias)


# --------------------------------------------------------------------------------------------------------- ways to go


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_names_both_ways_and_leaves_the_random_numbers_alone(monkeypatch, dtype):
    monkeypatch.setattr(trial, "BUSY", 0)
    before = torch.get_rng_state()
    way, why = fastest_products(CONFIG, 2, dtype)
    assert way in WAYS and why.startswith("tried with 4 experts and 96 tokens each: loop ")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_a_resumed_run_keeps_its_way_and_shapes_that_the_kernel_does_not_take_are_looped(flags, monkeypatch, capfd):
    chooser, exact = "model.training.choices.fastest_products", MIXTURE | {"dtype": "float32"}
    monkeypatch.setattr(chooser, lambda *_: ("loop", "it was tried"))
    assert train(flags(**exact, max_steps=4)).training.expert_products == "loop"
    monkeypatch.setattr(chooser, lambda *_: ("grouped", "the machine has changed its mind"))
    resumed = train(flags(**exact, max_steps=8, resume="true"))
    assert {layer.feed_forward.experts.way for layer in resumed.model.layers} == {"loop"}
    assert "expert_products loop (auto): as before" in capfd.readouterr().err
    odd = flags(**MIXTURE | {"expert_hidden_dim": 36}, max_steps=1)
    assert trainer_of(odd).training.expert_products == "loop"
    assert "multiples of 8, dim is 32 and expert_hidden_dim 36" in capfd.readouterr().err
    assert "expert_products: grouped found, but" in refused(odd | {"expert_products": "grouped"}, capfd)
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    trainer_of(flags(**MIXTURE | {"dtype": "bfloat16", "expert_products": "grouped"}, max_steps=1))
    assert "expert_products grouped: on a CPU in 16 bits all the same in a loop" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------ promises


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "muon", "router_rate": 0.5, "n_shared_experts": 1},
        {"expert_score": "sigmoid", "activation_checkpointing": "selective", "balance_loss": 0.001},
    ],
)
def test_a_killed_run_resumes_with_bias_and_average(flags, tmp_path, options):
    options = BIASED | {"use_ema": "true", "dropout": 0.1, "router_z_loss": 0.001} | options
    assert_a_killed_run_resumes(flags, tmp_path, "pretrain_32", **options)
    checkpoint = load_torch(tmp_path / "whole" / "checkpoint_step_12.pth")
    biases = [name for name in checkpoint["model"] if name.endswith("router.bias")]
    assert len(biases) == 2 and all(checkpoint["model"][name].any() for name in biases)
    assert_equal(*({name: checkpoint[part][name] for name in biases} for part in ("model", "ema")))
    best = load_weights(tmp_path / "whole" / "pretrain_32.pth")
    assert_equal({name: best.state_dict[name] for name in biases}, {name: checkpoint["ema"][name] for name in biases})


@pytest.mark.long
def test_accumulation_and_ranks_compute_what_one_batch_does(flags, tmp_path):
    """Sums have another order then, so losses are compared, and whole numbers of tokens exactly."""
    options = BIASED | {"balance_loss": 0.1, "router_z_loss": 0.01, "dtype": "float32", "max_steps": 6, "eval_steps": 1}
    train(flags(**options, batch_size=8, out_dir=tmp_path / "one"))
    train(flags(**options, batch_size=2, accumulation_steps=4, out_dir=tmp_path / "accumulated"))
    result = two_ranks(flags(**options, batch_size=4, out_dir=tmp_path / "ranks"))
    assert result.returncode == 0, result.stderr
    one = [event for event in events(tmp_path / "one") if "loss" in event]
    for name in ("accumulated", "ranks"):
        found = [event for event in events(tmp_path / name) if "loss" in event]
        assert len(found) == len(one) == 6
        for a, b in zip(one, found, strict=True):
            for key in ("loss", "grad_norm", "balance_loss", "router_z_loss"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), key
        for key in ("expert_load_max", "expert_load_min", "dead_experts"):
            assert found[0][key] == one[0][key]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.slow), "optimizer"])
def test_two_processes_resume(flags, tmp_path, shard):
    assert_two_processes_resume(flags, tmp_path, **BIASED, use_ema="true", shard=shard, optimizer_type="muon")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    model = random_model(LMConfig(**vars(CONFIG) | {"max_seq_len": 256, "expert_bias": True}))
    path = tmp_path_factory.mktemp("base") / "base.pth"
    sha256 = tokenizer_sha256(tokenizer_folder)
    save_weights(path, Weights(model.state_dict(), model.config, str(tokenizer_folder), sha256))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly(["chats", "chats with LoRA", "pairs"], slow=["chats", "pairs"]))
def test_chats_pairs_and_adapters(flags, tmp_path, tokenizer_folder, base, kind):
    pairs = [(chat, [*chat[:-1], ("assistant", f"{chat[-1][1]}河{n % 5}")]) for n, chat in enumerate(CHATS)]
    write, content = (write_pairs, pairs) if kind == "pairs" else (write_chats, CHATS)
    data = write(tmp_path / "data.bin", content, tokenizer_folder)
    given = {"train_data_path": data, "init_from": base, "max_seq_len": 256, "use_ema": "true"}
    given |= {"lora_rank": 4} if "LoRA" in kind else {}

    def without_shape(**changes):
        return {name: value for name, value in flags(**given | changes).items() if name not in SHAPE}

    assert_a_killed_run_resumes(without_shape, tmp_path, "dpo_32" if kind == "pairs" else "sft_32")
    if kind == "pairs":
        with pytest.raises(InputError, match="balance_loss: 0.1 found, but the loss of pairs is no sum over tokens"):
            trainer_of(without_shape(balance_loss=0.1, out_dir=tmp_path / "refused"))
    before, after = load_weights(base).state_dict, load_weights(next((tmp_path / "whole").glob("*_32.pth"))).state_dict
    changed = {
        name.split(".", 2)[2]
        for name in before
        if name.startswith("layers.") and not torch.equal(before[name], after[name])
    }
    frozen = {
        "feed_forward.router.weight",
        "feed_forward.router.bias",
        *(f"feed_forward.experts.w{n}" for n in (1, 2, 3)),
    }
    assert "feed_forward.shared.w1.weight" in changed and "attention.wq.weight" in changed
    assert changed.isdisjoint(frozen) if "LoRA" in kind else frozen <= changed


def test_start_up_says_what_there_is(flags):
    lines = describe(trainer_of(flags(**BIASED, n_shared_experts=1, balance_loss=0.001)).plan)
    assert " parameters, " in lines[0] and " of them active; " in lines[0]
    assert lines[1] == (
        "experts: a token passes through 2 of 4 in each layer beside 1 shared expert; balanced by a loss that counts"
        " 0.001 and a bias that each step moves by 0.01; routers learn at 0.003"
    )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_experts": 4, "n_active_experts": 5}, "n_active_experts: 5 found, at most n_experts = 4 expected"),
        ({"n_experts": 4, "n_active_experts": 0}, "n_active_experts: '0' found, a whole number of at least 1"),
        (
            {"n_experts": 4, "n_active_experts": 1},
            "so that the router gets no gradient; set normalize_expert_weights false",
        ),
        (
            {"n_experts": 1, "n_active_experts": 1, "normalize_expert_weights": "false"},
            "n_experts: a softmax over 1 expert is always 1",
        ),
        ({"balance_loss": 0.1}, "balance_loss: 0.1 of no experts; set n_experts, or omit it"),
        ({"n_shared_experts": 1}, "n_shared_experts: 1 of no experts; set n_experts, or omit n_shared_experts"),
        ({"n_experts": 4, "expert_bias_rate": 0.1}, "expert_bias_rate: given without a bias; set expert_bias"),
        ({"n_experts": 60_000, "expert_hidden_dim": 2**22}, "parameters or more, at most 1,000,000,000,000 expected"),
    ],
)
def test_what_cannot_be_trained_is_one_line(flags, capfd, changes, says):
    assert says in refused(flags(**changes), capfd)


def test_given_weights_with_a_router_that_learns_nothing_are_refused_unless_it_is_frozen(
    flags, tmp_path, tokenizer_folder
):
    model = random_model(LMConfig(**vars(CONFIG) | {"n_active_experts": 1}))
    sha256 = tokenizer_sha256(tokenizer_folder)
    save_weights(tmp_path / "a.pth", Weights(model.state_dict(), model.config, str(tokenizer_folder), sha256))
    given = {name: value for name, value in flags(init_from=tmp_path / "a.pth").items() if name not in SHAPE}
    with pytest.raises(InputError, match="gets no gradient; set .* or tune it with lora_rank"):
        trainer_of(given)
    assert trainer_of(given | {"lora_rank": "2"}).model.layers[0].feed_forward.router.weight.requires_grad is False


def test_settings_of_experts_are_refused_with_dense_weights(flags, tmp_path, tokenizer_folder):
    model, sha256 = random_model(LMConfig(**SHAPE, vocab_size=300)), tokenizer_sha256(tokenizer_folder)
    save_weights(tmp_path / "a.pth", Weights(model.state_dict(), model.config, str(tokenizer_folder), sha256))
    given = flags(init_from=tmp_path / "a.pth", balance_loss=0.1, router_rate=2)
    with pytest.raises(InputError, match="balance_loss: 0.1 of no experts"):
        trainer_of({name: value for name, value in given.items() if name not in SHAPE})


def test_a_checkpoint_of_other_experts_is_refused_by_name(flags, capfd):
    train(flags(**MIXTURE, max_steps=4))
    for change, said in (
        ({"n_experts": 8}, "n_experts 4 there, 8 here"),
        ({"qk_norm": "true"}, "false there, true here"),
    ):
        assert said in refused(flags(**MIXTURE | change, max_steps=4, resume="true"), capfd)

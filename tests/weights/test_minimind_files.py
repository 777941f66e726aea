"""State dicts without a description: all generations of MiniMind, and its relatives, compute what they did."""

import json

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import Weights, load_weights, save_weights
from model.weights.minimind import recognise
from tests.conftest import random_model
from tests.paper_llama import paper_logits

TOKENS = torch.randint(3, 300, (1, 60), generator=torch.Generator().manual_seed(1))


def our_logits(weights):
    model = Transformer(weights.config).eval()
    model.load_state_dict(weights.state_dict)
    with torch.no_grad():
        return model(TOKENS)


def assert_same_logits(ours, theirs):
    theirs = torch.as_tensor(theirs)
    assert theirs.std() > 1  # logits that say something
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "dim, n_heads, n_kv_heads, rope_theta, max_seq_len, multiple_of, title",
    [
        (512, 16, 8, 1e4, 512, 64, "MiniMind v1"),
        (768, 16, 8, 1e4, 512, 64, "MiniMind v1"),
        (512, 8, 2, 1e6, 8192, 64, "MiniMind2"),
        (768, 8, 2, 1e6, 8192, 64, "MiniMind2"),
        (512, 8, 8, 1e4, 512, 32, "baby-llama2 or llama2.c"),
        (1024, 8, 8, 1e4, 1024, 32, "baby-llama2"),
        (288, 6, 6, 1e4, 256, 32, "llama2.c"),
    ],
)
def test_metas_names(tmp_path, dim, n_heads, n_kv_heads, rope_theta, max_seq_len, multiple_of, title):
    hidden_dim = LMConfig(dim=dim, multiple_of=multiple_of).hidden_dim
    shape = dict(dim=dim, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=300, hidden_dim=hidden_dim)
    config = LMConfig(**shape, rope_theta=rope_theta, max_seq_len=max_seq_len)
    state = small_steps(random_model(LMConfig(**shape)).state_dict())
    torch.save({f"_orig_mod.{name}": weight for name, weight in state.items()}, tmp_path / f"pretrain_{dim}.pth")

    weights = load_weights(tmp_path / f"pretrain_{dim}.pth")

    assert weights.config == config
    assert weights.inferred.startswith(f"no pretrain_{dim}.json") and f"those of {title}, " in weights.inferred
    assert f"assumed n_heads {n_heads}, n_kv_heads {n_kv_heads}, rope_theta {rope_theta:g}" in weights.inferred
    assert "--tokenizer_path" in weights.inferred and "\n" not in weights.inferred
    assert_same_logits(our_logits(weights)[0], paper_logits(state, TOKENS[0], n_heads, n_kv_heads, rope_theta))


def small_steps(state):
    """Weights whose layers add little each, as a trained model's do: rounding does not grow from layer to layer."""
    return {
        name: w * 0.2 if w.dim() == 2 and name.startswith(("layers.", "model.layers.")) else w
        for name, w in state.items()
    }


def transformers_state(kind, dim, n_heads, n_kv_heads, norm_eps, tied=True):
    """transformers' model of a MiniMind shape, and its state dict as MiniMind saves it, in float16."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=2, num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads, head_dim=dim // n_heads, max_position_embeddings=32768, rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=tied, attention_bias=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            of_a_layer = name.startswith("model.layers.") and parameter.dim() == 2
            torch.nn.init.normal_(parameter, 0.0 if parameter.dim() == 2 else 1.0, 0.05 if of_a_layer else 0.25)
            parameter.data = parameter.data.half().float()  # what float16 can hold
    return model, {name: weight.half() for name, weight in model.state_dict().items()}


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, dim, n_kv_heads, norm_eps, title",
    [
        ("Llama", 512, 2, 1e-5, "MiniMind2 (from 2025-04-26)"),
        ("Llama", 768, 2, 1e-5, "MiniMind2 (from 2025-04-26)"),
        ("Qwen3", 768, 4, 1e-6, "minimind-3"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_names(tmp_path, kind, dim, n_kv_heads, norm_eps, title, tied):
    theirs, state = transformers_state(kind, dim, 8, n_kv_heads, norm_eps, tied)
    torch.save(state, tmp_path / f"full_sft_{dim}.pth")

    weights = load_weights(tmp_path / f"full_sft_{dim}.pth")

    assert weights.config == LMConfig(
        dim=dim, n_layers=2, n_heads=8, n_kv_heads=n_kv_heads, vocab_size=300, hidden_dim=2 * dim, norm_eps=norm_eps,
        max_seq_len=32768, rope_theta=1e6, tie_embeddings=tied, qk_norm=kind == "Qwen3",
    )  # fmt: skip
    assert f"those of {title}, " in weights.inferred and f"norm_eps {norm_eps:g}" in weights.inferred
    with torch.no_grad():
        assert_same_logits(our_logits(weights), theirs(TOKENS).logits)


# ------------------------------------------------------------------------------------------------------------ experts


def test_experts_under_metas_names(tmp_path):
    """MiniMind v1's, and MiniMind2's until 2025-04-25."""
    for n_heads, n_kv_heads, rope_theta, title in ((16, 8, 1e4, "MiniMind v1"), (8, 2, 1e6, "MiniMind2")):
        shape = dict(dim=96, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=300, hidden_dim=64)
        state = small_steps(random_model(LMConfig(**shape)).state_dict())
        state = with_experts(state, "layers.{}.feed_forward", ("w1", "w2", "w3"), "shared_experts")
        path = tmp_path / f"pretrain_96_{n_heads}_moe.pth"
        torch.save(state, path)

        weights = load_weights(path)

        expected = LMConfig(**shape, n_experts=4, n_shared_experts=1, rope_theta=rope_theta).__dict__
        assert weights.config.__dict__ == expected | {"max_seq_len": 512 if title == "MiniMind v1" else 8192}
        assert f"those of {title}, read off them dim 96, n_layers 2, vocab_size 300, hidden_dim 64" in weights.inferred
        assert "n_experts 4, n_shared_experts 1; " in weights.inferred and "\n" not in weights.inferred
        assert "n_active_experts 2, normalize_expert_weights True;" in weights.inferred
        arguments = (state, TOKENS[0], n_heads, n_kv_heads, rope_theta)
        assert_same_logits(our_logits(weights)[0], paper_logits(*arguments))
        single = load_weights(path, {"n_active_experts": 1})
        assert "normalize_expert_weights False; given n_active_experts 1" in single.inferred
        assert_same_logits(our_logits(single)[0], paper_logits(*arguments, n_active_experts=1))


def with_experts(state, block, matrices, *shared):
    """A dense state dict whose feed-forwards become 4 random experts and shared ones, named as MiniMind does."""
    generator = torch.Generator().manual_seed(1)
    state = dict(state)
    for layer in range(2):
        name = block.format(layer)
        dense = {matrix: state.pop(f"{name}.{matrix}.weight") for matrix in matrices}
        for place in (*(f"experts.{number}" for number in range(4)), *shared):
            for matrix, like in dense.items():
                drawn = torch.randn(like.shape, generator=generator) * like.float().std()
                state[f"{name}.{place}.{matrix}.weight"] = drawn.to(like.dtype)
        like = dense[matrices[0]]
        state[f"{name}.gate.weight"] = torch.randn(4, like.shape[1], generator=generator).to(like.dtype)
    return state


@pytest.mark.long
def test_experts_of_minimind2_under_transformers_names(tmp_path):
    """From 2025-04-26, the shared experts one by one. transformers' Granite computes the same."""
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

    _, state = transformers_state("Llama", 96, 8, 2, 1e-5)
    projections = ("gate_proj", "down_proj", "up_proj")
    shared = ("shared_experts.0", "shared_experts.1")
    state = with_experts(state, "model.layers.{}.mlp", projections, *shared)
    torch.save(state, tmp_path / "full_sft_96_moe.pth")

    weights = load_weights(tmp_path / "full_sft_96_moe.pth")

    assert "those of MiniMind2 (from 2025-04-26), " in weights.inferred
    config = weights.config
    assert (config.n_experts, config.n_active_experts, config.n_shared_experts) == (4, 2, 2)
    assert (config.expert_hidden_dim, config.shared_hidden_dim, config.normalize_expert_weights) == (192, 384, True)
    theirs = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            vocab_size=300, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attention_multiplier=12**-0.5,
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=384,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict({name: weight.float() for name, weight in as_granite(state, projections, shared)})
    with torch.no_grad():
        assert_same_logits(our_logits(weights), theirs(TOKENS).logits)


def as_granite(state, projections, shared):
    """(name, tensor) of MiniMind2's weights with experts in transformers' Granite."""
    yield from ((name, weight) for name, weight in state.items() if ".mlp." not in name)
    yield "lm_head.weight", state["model.embed_tokens.weight"]
    for layer in range(2):
        mlp, granite = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        gate, down, up = (
            torch.stack([state[f"{mlp}.experts.{number}.{name}.weight"] for number in range(4)]) for name in projections
        )
        yield f"{granite}.experts.gate_up_proj", torch.cat((gate, up), dim=1)
        yield f"{granite}.experts.down_proj", down
        yield f"{granite}.router.weight", state[f"{mlp}.gate.weight"]
        gate, down, up = ([state[f"{mlp}.{place}.{name}.weight"] for place in shared] for name in projections)
        yield f"model.layers.{layer}.shared_mlp.input_linear.weight", torch.cat((*gate, *up))
        yield f"model.layers.{layer}.shared_mlp.output_linear.weight", torch.cat(down, dim=1)


@pytest.mark.long
@pytest.mark.parametrize("given", [{}, {"normalize_expert_weights": "false"}, {"n_active_experts": 2}])
def test_experts_of_minimind_3(tmp_path, given):
    """As transformers' Qwen3 has them. Which weight a single active expert has is settable."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    normalized, n_active = given.get("normalize_expert_weights") != "false", given.get("n_active_experts", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=300, hidden_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
                head_dim=12, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6}, moe_intermediate_size=64,
                num_experts=4, num_experts_per_tok=n_active, norm_topk_prob=normalized,
            )
        ).eval()  # fmt: skip
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25 if parameter.shape[0] == 300 else 0.1)
    theirs.save_pretrained(tmp_path / "folder")
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "folder" / "model.safetensors"), tmp_path / "pretrain_96_moe.pth")

    weights = load_weights(tmp_path / "pretrain_96_moe.pth", given)

    assert "those of minimind-3, " in weights.inferred and "n_experts 4, n_shared_experts 0; " in weights.inferred
    values = {"n_active_experts": f"n_active_experts {n_active}"}
    values["normalize_expert_weights"] = f"normalize_expert_weights {normalized}"
    for name, value in values.items():
        assert value in weights.inferred.split("given " if name in given else "assumed ")[1].split(";")[0]
    with torch.no_grad():
        assert_same_logits(our_logits(weights), theirs(TOKENS).logits)


V2_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "scoring_func": "softmax", "aux_loss_alpha": 0.1}
V3_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 192}


@pytest.mark.parametrize(
    "kind, experts, shared, given",
    [("Llama", V2_EXPERTS, ["shared_experts.0"], {}), ("Qwen3", V3_EXPERTS, [], {})]
    + [("Qwen3", V3_EXPERTS, [], {"normalize_expert_weights": "false"})]
    + [("Llama", V2_EXPERTS, ["shared_experts.0"], {"n_active_experts": 1})],
)
def test_a_folder_of_experts_is_what_its_pth_is(tmp_path, kind, experts, shared, given):
    """MiniMind's own folders, whose config.json says what a .pth leaves open."""
    norm_eps, n_kv_heads = (1e-6, 4) if kind == "Qwen3" else (1e-5, 2)
    _, state = transformers_state(kind, 96, 8, n_kv_heads, norm_eps)
    state = with_experts(state, "model.layers.{}.mlp", ("gate_proj", "down_proj", "up_proj"), *shared)
    torch.save(state, tmp_path / "pretrain_96_moe.pth")
    torch.save(state, tmp_path / "pytorch_model.bin")
    values = experts | {
        "model_type": "minimind", "use_moe": True, "hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 8, "num_key_value_heads": n_kv_heads, "rms_norm_eps": norm_eps, "rope_theta": 1e6,
        "num_experts_per_tok": given.get("n_active_experts", 1 if kind == "Qwen3" else 2), "hidden_act": "silu",
        "norm_topk_prob": given.get("normalize_expert_weights") != "false", "max_position_embeddings": 32768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    found, expected = load_weights(tmp_path), load_weights(tmp_path / "pretrain_96_moe.pth", given)
    assert found.config == expected.config and expected.config.n_experts == 4
    assert all(torch.equal(found.state_dict[name], weight) for name, weight in expected.state_dict.items())
    if kind == "Llama":
        (tmp_path / "config.json").write_text(json.dumps(values | {"scoring_func": "sigmoid"}))
        with pytest.raises(InputError, match="scoring_func is 'sigmoid', softmax expected"):
            load_weights(tmp_path)


def test_what_is_of_experts_alone_is_refused_for_a_dense_model():
    state = random_model(LMConfig(dim=64, n_layers=1, vocab_size=300)).state_dict()
    with pytest.raises(InputError, match="n_active_experts was given, but there are no experts inside; omit it"):
        recognise(state, "pretrain_64.pth", {"n_active_experts": 2})


def test_the_width_of_a_norm_gives_the_heads():
    """Of minimind-3, and of ours with qk_norm."""
    _, state = transformers_state("Qwen3", 192, 6, 3, 1e-6)
    weights = recognise(state, "pretrain_192.pth", {})
    assert (weights.config.n_heads, weights.config.n_kv_heads, weights.config.head_dim) == (6, 3, 32)
    assert "n_heads 6, n_kv_heads 3, vocab_size 300" in weights.inferred

    config = LMConfig(dim=96, n_layers=1, n_heads=3, n_kv_heads=1, vocab_size=300, qk_norm=True)
    assert recognise(random_model(config).state_dict(), "pretrain_96.pth", {}).config == config


def test_what_shapes_do_not_tell_can_be_given(tmp_path):
    config = LMConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=300, rope_theta=5e4, max_seq_len=77, norm_eps=1e-6
    )
    state = small_steps(random_model(config).state_dict())
    torch.save(state, tmp_path / "pretrain_64.pth")
    given = {"n_heads": 4, "rope_theta": 5e4, "max_seq_len": 77, "norm_eps": 1e-6}

    weights = load_weights(tmp_path / "pretrain_64.pth", given)

    assert weights.config == config
    assert "given n_heads 4, rope_theta 50000, max_seq_len 77, norm_eps 1e-06" in weights.inferred
    assert "assumed n_kv_heads 2;" in weights.inferred
    theirs = paper_logits(state, TOKENS[0], 4, 2, 5e4, 1e-6)
    torch.testing.assert_close(
        our_logits(weights)[0, :, :9].double(), torch.from_numpy(theirs[:, :9]), rtol=1e-3, atol=1e-2
    )
    assert recognise(state, "pretrain_64.pth", {"n_kv_heads": 2}).config.n_heads == 4


@pytest.mark.parametrize(
    "given, message",
    [
        ({"n_heads": 5}, r"n_heads 5 does not fit .* give n_heads/n_kv_heads that fit: 2/1, 4/2, 8/4, 16/8"),
        ({"n_heads": 4, "n_kv_heads": 4}, "n_heads 4 with n_kv_heads 4 does not fit"),
        ({"n_heads": 4.5}, "n_heads: 4.5 found, a whole number"),
        ({"rope_theta": -1}, "rope_theta: -1 found"),
        ({"dim": 3}, "dim follows from the weights' shapes"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(given, message):
    state = random_model(LMConfig(dim=64, n_layers=1, vocab_size=300)).state_dict()
    with pytest.raises(InputError, match=message):
        recognise(state, "pretrain_64.pth", given)


def test_shapes_of_no_generation_need_their_heads():
    config = LMConfig(dim=144, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=300)
    state = random_model(config).state_dict()
    with pytest.raises(InputError, match=r"do not show the number of heads .* that fit: 3/1, 6/2, .*9/3"):
        recognise(state, "w.pth", {})
    assert recognise(state, "w.pth", {"n_heads": 9}).config == config
    # In transformers' names MiniMind's 8 heads are assumed, but 144 / 8 = 18 does not divide 48.
    _, state = transformers_state("Llama", 144, 9, 3, 1e-5)
    with pytest.raises(InputError, match=r"n_heads 8, as in MiniMind2 .*, does not fit .* 9/3"):
        recognise(state, "w.pth", {})


def test_described_weights_take_nothing(tmp_path, tiny_model, tiny_config):
    save_weights(tmp_path / "w.pth", Weights(tiny_model.state_dict(), tiny_config))
    with pytest.raises(InputError, match="the model's shape comes with the file; n_heads cannot be given"):
        load_weights(tmp_path / "w.pth", {"n_heads": 2})


def test_inference_says_what_it_took(tmp_path, tokenizer_folder, capsys):
    from optimized_inference import load_generator

    state = random_model(LMConfig(dim=64, n_layers=1, vocab_size=300)).state_dict()
    torch.save(state, tmp_path / "pretrain_64.pth")
    load_generator(tmp_path / "pretrain_64.pth", tokenizer_folder, device="cpu")
    assert (
        "no pretrain_64.json beside the weights: their names and shapes are those of MiniMind v1"
        in capsys.readouterr().err
    )


V1_STATE = random_model(LMConfig(dim=64, n_layers=2, vocab_size=300)).state_dict()
WRONG = {  # what is put in the place of a weight (None: nothing), and what is said
    "a single expert": (
        {"layers.0.feed_forward.experts.0.w1.weight": torch.zeros(2, 2)},
        "n_active_experts: 2 found, at most n_experts = 1 expected",
    ),
    "the second expert": (
        {"layers.0.feed_forward.experts.1.w1.weight": torch.zeros(2, 2)},
        "layers.0.feed_forward.experts.w1 inside of experts 1; each of them once, from 0, expected",
    ),
    "experts of two widths": (
        {f"layers.0.feed_forward.experts.{n}.w1.weight": torch.zeros(n + 1, 64) for n in range(4)},
        "the experts' parts of layers.0.feed_forward.experts.w1 differ",
    ),
    "a router of a dense model": ({"layers.0.feed_forward.gate.weight": torch.zeros(4, 64)}, "an unknown 'layers.0"),
    "no layer": (dict.fromkeys([name for name in V1_STATE if name.startswith("layers.")]), "no layers.0.attention.wq"),
    "half a layer": ({"layers.1.attention.wo.weight": None}, "no 'layers.1.attention.wo.weight'"),
    "a layer too much": ({"layers.7.attention.wo.weight": torch.zeros(64, 64)}, "an unknown 'layers.7"),
    "another weight": ({"layers.0.attention.lora.weight": torch.zeros(2)}, "an unknown 'layers.0.attention.lora"),
    "a vector for a matrix": ({"tok_embeddings.weight": torch.zeros(300)}, "a matrix expected"),
    "nothing in a matrix": ({"layers.0.attention.wq.weight": torch.zeros(0, 64)}, "a matrix expected"),
    "another width": ({"layers.1.attention.wk.weight": torch.zeros(8, 64)}, "by its description"),
    "whole numbers": ({"norm.weight": torch.zeros(64, dtype=torch.int64)}, "norm.weight holds torch.int64, float32"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_what_is_no_such_model_is_one_line(tmp_path, changes, message):
    state = {name: weight for name, weight in {**V1_STATE, **changes}.items() if weight is not None}
    torch.save(state, tmp_path / "pretrain_64.pth")
    with pytest.raises(InputError, match=message) as raised:
        load_weights(tmp_path / "pretrain_64.pth")
    assert "\n" not in str(raised.value) and "pretrain_64.pth" in str(raised.value)

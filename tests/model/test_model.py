"""The model: MiniMind v1's shape and names, the numbers of transformers' Llama, and a cache that changes nothing."""

import functools

import pytest
import torch
import torch.nn.functional as F

from model.attention import chunked_attention, chunked_attention_backward, document_mask
from model.errors import InputError
from model.kv_cache import KVCache
from model.LMConfig import LMConfig
from model.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy
from model.model import Transformer
from model.weights.minimind import recognise
from tests.conftest import random_model
from tests.llama import as_llama

LAYER_KEYS = [
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
]
MINIMIND_KEYS = {f"layers.{layer}.{key}" for layer in range(8) for key in LAYER_KEYS} | {
    "tok_embeddings.weight",
    "norm.weight",
    "output.weight",
}


def some_tokens(config, *shape, seed=1):
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_the_default_shape_is_minimind_v1():
    model = Transformer(LMConfig())

    assert sum(parameter.numel() for parameter in model.parameters()) == 26_878_464
    assert len(MINIMIND_KEYS) == 75
    assert set(model.state_dict()) == MINIMIND_KEYS
    assert recognise(model.state_dict(), "pretrain_512.pth", {}).config == LMConfig()
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.long
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_logits_equal_transformers_llama(n_kv_heads, tie_embeddings):
    config = LMConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, vocab_size=300, tie_embeddings=tie_embeddings
    )
    model = random_model(config)
    tokens = some_tokens(config, 2, 100)

    with torch.no_grad():
        ours, theirs = model(tokens), as_llama(model)(tokens).logits

    assert ours.std() > 1  # logits that say something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_loss_is_the_sum_over_the_targets_that_count(tiny_model, tiny_config):
    tokens, targets = some_tokens(tiny_config, 2, 9), some_tokens(tiny_config, 2, 9, seed=2)
    targets[0, :5] = -100

    with torch.no_grad():
        loss, logits = tiny_model(tokens, targets), tiny_model(tokens)

    log_probabilities = logits.double().log_softmax(-1)
    expected = -sum(
        log_probabilities[row, t, targets[row, t]] for row in range(2) for t in range(9) if targets[row, t] != -100
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_attention_written_out_equals_the_fused_one(tiny_config):
    fused = random_model(tiny_config)
    written_out = random_model(LMConfig(**{**vars(tiny_config), "flash_attn": False}))
    tokens = some_tokens(tiny_config, 2, 50)

    with torch.no_grad():
        torch.testing.assert_close(written_out(tokens), fused(tokens), rtol=1e-4, atol=1e-4)
        cached = written_out(tokens, cache=KVCache(tiny_config, 2, 50))
        torch.testing.assert_close(cached, fused(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"qk_norm": True}, {"tie_embeddings": False}, {"n_kv_heads": 4}])
def test_decoding_with_the_cache_equals_a_full_forward(tiny_config, variant):
    config = LMConfig(**{**vars(tiny_config), **variant})
    model = random_model(config)
    tokens = some_tokens(config, 2, 40)
    cache = KVCache(config, 2, capacity=40)

    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in (tokens[:, :7], tokens[:, 7:20])]
        pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(20, 40)]
        whole = model(tokens)

    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_qk_norm_makes_the_scale_of_queries_irrelevant(tiny_config):
    model = random_model(LMConfig(**{**vars(tiny_config), "qk_norm": True, "norm_eps": 1e-12}))
    tokens = some_tokens(tiny_config, 1, 20)

    with torch.no_grad():
        before = model(tokens)
        model.layers[0].attention.wq.weight *= 3
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)


def test_rows_of_different_lengths_equal_the_rows_alone(tiny_model, tiny_config):
    lengths, more = [3, 11, 7], 6
    texts = [some_tokens(tiny_config, length + more, seed=length) for length in lengths]
    cache = KVCache(tiny_config, 4, max(lengths) + more)

    with torch.no_grad():
        for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
            tiny_model(text[None, :length], cache=cache.part(row, row + 1))
        cache.lengths = [*lengths, 0]
        cache.move(2, 3)  # a row is the same in another place
        cache.move(1, 2)
        cache.move(3, 1)
        texts, batch = [texts[0], texts[2], texts[1]], cache.part(0, 3)
        for step in range(more):
            following = torch.stack([text[len(text) - more + step] for text in texts])[:, None]
            logits = tiny_model(following, cache=batch)[:, -1]
            for row, text in enumerate(texts):
                alone = tiny_model(text[None, : len(text) - more + step + 1])[0, -1]
                torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_the_positions_exact(tiny_config):
    model = random_model(tiny_config)
    cos, sin = model.rope_cos.clone(), model.rope_sin.clone()

    model.to(torch.bfloat16)

    assert model.tok_embeddings.weight.dtype == torch.bfloat16
    assert torch.equal(model.rope_cos, cos) and torch.equal(model.rope_sin, sin)
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.slow
def test_the_training_step_is_one_graph(tiny_config):
    model = random_model(tiny_config).train()
    tokens, targets = some_tokens(tiny_config, 2, 16), some_tokens(tiny_config, 2, 16, seed=2)

    compiled = torch.compile(model, fullgraph=True, backend="eager")  # raises at a graph break

    torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))


def without(state_dict, key):
    return {name: value for name, value in state_dict.items() if name != key}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: without(s, "norm.weight"), "1 missing (first: norm.weight)"),
        (lambda s: {**s, "norm.bias": torch.zeros(64)}, "1 unknown (first: norm.bias)"),
        (lambda s: {**s, "norm.weight": torch.zeros(32)}, "norm.weight is [32], the model's is [64]"),
        (lambda s: {**s, "output.weight": s["output.weight"] + 1}, "embedding and output differ"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(tiny_model, change, expected):
    with pytest.raises(InputError) as caught:
        tiny_model.load_state_dict(change(tiny_model.state_dict()))

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_impossible_shapes_are_all_named_at_once():
    with pytest.raises(InputError, match="n_layers: 0.*dropout: 1.5"):
        LMConfig(n_layers=0, dropout=1.5)
    with pytest.raises(InputError, match="n_kv_heads: 3 does not divide n_heads = 4"):
        LMConfig(dim=64, n_heads=4, n_kv_heads=3)


@pytest.mark.parametrize("tokens, heads, kv_heads", [(64, 4, 4), (150, 4, 2), (100, 40, 20), (1030, 6, 2)])
def test_chunked_attention_equals_pytorchs_with_its_gradients(tokens, heads, kv_heads):
    q, k, v = (
        torch.randn(2, h, tokens, 8, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn(2, heads, tokens, 8, dtype=torch.float64)
    ours = chunked_attention(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_chunked_attention_in_bfloat16_is_as_close_as_pytorchs():
    exact = [torch.randn(1, h, 700, 32, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    grad = torch.randn(1, 4, 700, 32, dtype=torch.float64)
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]

    def values(inputs, attention):
        out = attention(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    pytorchs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    expected = values([t.detach().double().requires_grad_() for t in rounded], pytorchs)

    def errors(attention):
        found = values(rounded, attention)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    for ours, theirs in zip(errors(chunked_attention), errors(pytorchs), strict=True):
        assert ours < 2.5 * theirs and ours < 0.007


DOCUMENTS = [[1, 3, 60, 86], [130, 20], [150]]  # tokens of each document, in three samples of 150


def numbered(samples):
    return torch.stack([torch.arange(len(s)).repeat_interleave(torch.tensor(s)) for s in samples])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (30, 10)])
def test_chunked_attention_within_documents_equals_each_document_alone(heads, kv_heads):
    q, k, v = (torch.randn(3, h, 150, 8, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    grad, documents = torch.randn(3, heads, 150, 8, dtype=torch.float64), numbered(DOCUMENTS)
    ours = chunked_attention(q, k, v, documents)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(documents), enable_gqa=True)
    alone = []
    for row, lengths in enumerate(DOCUMENTS):
        parts = zip(*(t[row, None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        alone.append(torch.cat(outs, dim=2))
    gradients = [torch.autograd.grad(out, (q, k, v), grad) for out in (ours, masked, torch.cat(alone))]
    for other, its_gradients in ((masked, gradients[1]), (torch.cat(alone), gradients[2])):
        torch.testing.assert_close(ours, other)
        for one, its in zip(gradients[0], its_gradients, strict=True):
            torch.testing.assert_close(one, its)


@pytest.mark.parametrize("variant", [{}, {"flash_attn": False}, {"qk_norm": True}])
@pytest.mark.parametrize("frozen", [False, True])
def test_documents_in_one_sample_are_as_if_each_was_run_alone(tiny_config, variant, frozen):
    config = LMConfig(**{**vars(tiny_config), **variant, "max_seq_len": 150})
    model = random_model(config).double().train()
    model.tok_embeddings.weight.requires_grad_(not frozen)
    tokens, targets = some_tokens(config, 3, 150), some_tokens(config, 3, 150, seed=2)
    documents = numbered(DOCUMENTS)
    parts = [
        (own[None], target[None])
        for row, lengths in enumerate(DOCUMENTS)
        for own, target in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    packed = model(tokens, targets, documents=documents)
    alone = sum(model(*part) for part in parts)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)  # the rotation is computed in float32
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (packed, alone)), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    with torch.no_grad():
        logits = torch.cat([model(own)[0] for own, _ in parts])
        torch.testing.assert_close(model(tokens, documents=documents).flatten(0, 1), logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(tokens).flatten(0, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_training_step_with_documents_is_one_graph(tiny_config):
    model = random_model(tiny_config).train()
    tokens, targets = some_tokens(tiny_config, 2, 100), some_tokens(tiny_config, 2, 100, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ([[40, 60], [1, 99]], [[100], [7, 93]]):
        documents = numbered(lengths)
        losses = [call(tokens, targets, documents=documents) for call in (compiled, model)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in losses]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_operators_for_torch_compile_describe_their_outputs_as_they_are(batch):
    """Shapes and strides: `torch.compile` relies on what the fake kernels say. Queries are views, as in the model."""
    q, k, v = (torch.randn(batch, 64, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    for documents in (None, torch.zeros(batch, 64, dtype=torch.int64)):
        torch.library.opcheck(chunked_attention, (q, k, v, documents), test_utils="test_faketensor")
        out = chunked_attention(q, k, v, documents)
        inputs = (torch.randn_like(out), *(t.detach() for t in (q, k, v)), documents)
        torch.library.opcheck(chunked_attention_backward, inputs, test_utils="test_faketensor")
    hidden, weight = torch.randn(batch * 64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    targets = torch.randint(100, (batch * 64,))
    for trains in (True, False):
        torch.library.opcheck(chunked_cross_entropy, (hidden, weight, targets, trains), test_utils="test_faketensor")


def test_chunked_loss_equals_pytorchs_with_its_gradients(monkeypatch):
    monkeypatch.setattr("model.loss.CHUNK_BYTES", 4 * 50 * 5)  # five rows: the last chunk is smaller
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 7))
    targets[0, 2], targets[2] = IGNORE_INDEX, IGNORE_INDEX
    logits = (hidden @ weight.t()).flatten(0, 1)
    theirs = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    ours = cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs)
    gradients, expected = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, theirs))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
    frozen = cross_entropy(hidden, weight.detach(), targets)
    assert torch.equal(torch.autograd.grad(3 * frozen, hidden)[0], gradients[0])

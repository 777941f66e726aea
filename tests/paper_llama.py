"""Llama as the papers have it, in NumPy and float64: RoPE by complex numbers, one head and one text at a time; and
MiniMind's mixture of experts, one token at a time.

It shares no line with `model/`: what our model's logits are compared with, for weights under Meta's names.
"""

import numpy as np


def paper_logits(weights, tokens, n_heads, n_kv_heads, rope_theta=1e4, norm_eps=1e-5, n_active_experts=2):
    """Logits [T, vocab_size] of `tokens` [T].

    Args:
        weights: {name: array} under Meta's names, experts as MiniMind v1 has them.
    """
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    embedding = weights["tok_embeddings.weight"]
    head_dim = weights["layers.0.attention.wq.weight"].shape[0] // n_heads
    angles = np.outer(np.arange(len(tokens)), rope_theta ** -(np.arange(0, head_dim, 2) / head_dim))
    turns = np.exp(1j * angles)  # [T, D / 2]
    hidden_from_future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)

    def norm(x, gain):
        return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + norm_eps)

    def turned(x):  # [T, D], a pair of neighbours being one complex number
        pairs = (x[:, ::2] + 1j * x[:, 1::2]) * turns
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    def attention(x, layer):
        q, k, v = (x @ weights[f"{layer}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        heads = []
        for head in range(n_heads):
            own, shared = (slice(n * head_dim, (n + 1) * head_dim) for n in (head, head * n_kv_heads // n_heads))
            scores = turned(q[:, own]) @ turned(k[:, shared]).T / np.sqrt(head_dim) + hidden_from_future
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(shares / shares.sum(-1, keepdims=True) @ v[:, shared])
        return np.concatenate(heads, -1) @ weights[f"{layer}.attention.wo.weight"].T

    def swiglu(x, name):
        gate, up, down = (weights[f"{name}.{matrix}.weight"] for matrix in ("w1", "w3", "w2"))
        return (x @ gate.T / (1 + np.exp(-x @ gate.T)) * (x @ up.T)) @ down.T

    def feed_forward(x, name):
        if f"{name}.gate.weight" not in weights:
            return swiglu(x, name)
        return np.stack([experts(token, name) for token in x]) + swiglu(x, f"{name}.shared_experts")

    def experts(token, name):  # [dim]
        shares = np.exp(weights[f"{name}.gate.weight"] @ token)
        chosen = np.argsort(-shares)[:n_active_experts]
        outputs = [shares[e] * swiglu(token, f"{name}.experts.{e}") for e in chosen]
        return sum(outputs) / shares[chosen if n_active_experts > 1 else slice(None)].sum()

    x = embedding[np.asarray(tokens)]
    for n in range(sum(name.endswith(".ffn_norm.weight") for name in weights)):
        layer = f"layers.{n}"
        x = x + attention(norm(x, weights[f"{layer}.attention_norm.weight"]), layer)
        x = x + feed_forward(norm(x, weights[f"{layer}.ffn_norm.weight"]), f"{layer}.feed_forward")
    return norm(x, weights["norm.weight"]) @ weights.get("output.weight", embedding).T

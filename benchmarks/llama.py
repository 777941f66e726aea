"""transformers' Llama of a model's shape and, if need be, its weights: what ours is compared with."""

from model.LMConfig import LMConfig
from model.model import Transformer

NAMES = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
NAMES |= {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
NAMES |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def llama_config(config: LMConfig, **more):
    """The shape as a LlamaConfig; `more` goes to it as it is."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        **more,
    )


def as_llama(model: Transformer):
    """transformers' LlamaForCausalLM with the same weights.

    Ours turns neighbouring pairs (2j, 2j + 1) of a head, Llama in transformers the pairs (j, j + D / 2): the rows of
    wq and wk are reordered accordingly.
    """
    from transformers import LlamaForCausalLM

    config = model.config

    def halves(weight, heads):
        return weight.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

    renamed = {}
    for key, value in model.state_dict().items():
        if key.startswith("layers."):
            _, layer, *_, part, _ = key.split(".")
            if part in ("wq", "wk"):
                value = halves(value, config.n_heads if part == "wq" else config.n_kv_heads)
            renamed[f"model.layers.{layer}.{NAMES[part]}.weight"] = value
    renamed["model.embed_tokens.weight"] = model.tok_embeddings.weight
    renamed["model.norm.weight"] = model.norm.weight
    renamed["lm_head.weight"] = model.output.weight
    llama = LlamaForCausalLM(llama_config(config, bos_token_id=1, eos_token_id=2))
    llama.load_state_dict(renamed)
    return llama.eval()

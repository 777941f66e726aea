"""transformers' Llama with a model's shape and weights: what logits and sampling are compared with."""

from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights.names import in_halves, reordered, transformers_name


def llama_config(config: LMConfig):
    """The shape as a LlamaConfig."""
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
        bos_token_id=1,
        eos_token_id=2,
    )


def as_llama(model: Transformer):
    """transformers' LlamaForCausalLM with the same weights."""
    from transformers import LlamaForCausalLM

    state_dict = reordered(model.state_dict(), model.config, in_halves)
    llama = LlamaForCausalLM(llama_config(model.config))
    llama.load_state_dict({transformers_name(name): tensor for name, tensor in state_dict.items()})
    return llama.eval()

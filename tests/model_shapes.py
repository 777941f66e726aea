"""Models of every shape that other programs' files hold, and what is compared when one has been through a file."""

import dataclasses

import torch

from model.generation.engine import Engine
from model.generation.rows import Rows
from model.LMConfig import LMConfig
from model.model import Transformer
from model.text.tokenization import load_tokenizer, tokenizer_sha256
from model.weights import Weights
from optimized_inference import GenerationConfig, decode

TEXT = "中国是一个历史悠久的国家。长江、黄河都在中国。你好，好久不见！The quick brown fox 👩‍👩‍👧 2024"
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "max_seq_len": 256}
SMALL |= {"hidden_dim": 96, "norm_eps": 0.01, "rope_theta": 500.0}  # values that show where they get lost
LLAMA3 = {"rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
SHAPES = {
    "9 heads, 3 for keys": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
    "untied, 6,411 tokens": {"tie_embeddings": False, "vocab_size": 6411},
    "biases, as Qwen2": {"qkv_bias": True},
    "qk_norm and wide heads, as Qwen3": {"qk_norm": True, "head_dim": 32},
    "linear RoPE scaling": {"rope_scaling": "linear", "rope_factor": 4.0, "tie_embeddings": False},
    "llama3 RoPE scaling": {"rope_scaling": "llama3", "rope_original_max_seq_len": 64, **LLAMA3},
}


def weights_of(shape: dict, tokenizer_folder=None, seed: int = 0) -> Weights:
    """A model of this shape, whose logits differ enough for a greedy choice; gains and biases are not 1 and 0.

    Args:
        tokenizer_folder: of the tokenizer that is said to be its own; None: the embedded one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(LMConfig(**SMALL | shape))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:
                    parameter.normal_(0, 0.5 if "embeddings" in name or "output" in name else 0.2)
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    path = tokenizer_folder and str(tokenizer_folder)
    return Weights(state_dict, model.config, path, tokenizer_sha256(tokenizer_folder))


def model_of(weights: Weights) -> Transformer:
    model = Transformer(weights.config).eval()
    model.load_state_dict(weights.state_dict)
    return model


def logits_of(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, T] -> [B, T, V]."""
    with torch.inference_mode():
        return model_of(weights)(ids)


def assert_logits(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Equal but for the rounding of float32 in sums of another order."""
    assert theirs.shape == ours.shape and ours.std() > 0.5
    assert float((theirs - ours).abs().max()) < 2e-5 * float(ours.abs().max())


def greedy(weights: Weights, ids: list[int], count: int) -> list[int]:
    """The ids that follow, the likeliest each time."""
    config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=count)
    rows = Rows(Engine(model_of(weights), compile=False), 1)
    with torch.inference_mode():
        return [event.token for event in decode(rows, [ids], config, [-1])]


def assert_same(found: Weights, weights: Weights) -> None:
    """Every weight bit for bit, and the shape; multiple_of has done its work once hidden_dim is there."""
    assert dataclasses.replace(found.config, multiple_of=64) == weights.config
    assert found.state_dict.keys() == weights.state_dict.keys()
    for name, tensor in weights.state_dict.items():
        assert found.state_dict[name].dtype == tensor.dtype and torch.equal(found.state_dict[name], tensor), name


def prompt_ids(tokenizer_folder) -> torch.Tensor:
    """[1, T] of TEXT, with its bos."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *ids]])

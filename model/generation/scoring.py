"""How well a model predicts a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generation.engine import Engine
from model.kv_cache import KVCache
from model.loss import bits_per_byte
from model.model import Transformer


@dataclass(frozen=True)
class Score:
    """The loss of one text or several; `+` adds two up."""

    nats: float = 0.0  # summed
    tokens: int = 0
    bytes: int = 0  # of the texts, in UTF-8

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # past which exp overflows

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return bits_per_byte(self.nats, self.bytes)


@torch.inference_mode()
def token_losses(model: Engine | Transformer, ids: Sequence[int]) -> Tensor:
    """The loss of each token but the first, in nats, given those before it: float32 [len(ids) - 1].

    A text longer than the context is read in windows that overlap by half: a token past the first window sees at least
    half a context.
    """
    context = model.config.max_seq_len
    text = torch.tensor(ids, device=model.device)
    cache = KVCache(model.config, 1, context, device=model.device, dtype=model.dtype)
    losses, begin, done = [], 0, 1  # losses of the tokens before `done` are known
    while done < len(ids):
        window = text[begin : begin + context + 1]
        new = begin + len(window) - done
        cache.lengths = [0]
        hidden = model.hidden_states(window[None, :-1], cache)[0, -new:]
        losses.append(F.cross_entropy(model.output(hidden).float(), window[-new:], reduction="none"))
        done += new
        begin += context // 2 if context > 1 else 1
    return torch.cat(losses) if losses else torch.zeros(0)

"""LoRA (Hu et al., 2021): each matrix W of the layers becomes W + (alpha / rank) B A, and only A and B are trained.

`add_adapters` puts A and B into a Transformer, which knows nothing of them; `merged` makes a plain Transformer of it
again. In state dicts W keeps its name, and A and B lie beside it as `lora_a` and `lora_b`; `merged_state` makes plain
weights of those.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import InputError

A, B = "lora_a", "lora_b"  # the names of the adapters' parameters
Model = TypeVar("Model", bound=nn.Module)


class LoRALinear(nn.Linear):
    """x -> (W + (alpha / rank) B A) x + bias, computed without that sum: W and the bias, which are another layer's,
    need no gradient.

    A [rank, in] is drawn as PEFT draws it, and B [out, rank] is zero: at first the layer computes what `base` does.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = merged_weight(self.weight, self.lora_a, self.lora_b, self.scale)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Give each matrix of the layers an A and a B, in place, and freeze all else.

    Raises:
        InputError: the rank is larger than a matrix.
    """
    model.requires_grad_(False)
    for parent, name, linear in list(_linears(model)):
        if rank > (side := min(linear.weight.shape)):
            shape = " x ".join(map(str, linear.weight.shape))
            raise InputError(f"lora_rank: {rank} found, at most {side} expected: {name} of each layer is {shape}")
        setattr(parent, name, LoRALinear(linear, rank, alpha))


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The matrices of the layers, each with the module that holds it and its name there."""
    for parent in model.layers.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def merged(model: Model) -> Model:
    """A plain model that computes the same: a new one, which shares all but the adapted matrices with `model`. A model
    without adapters is returned as it is."""
    if not any(isinstance(linear, LoRALinear) for _, _, linear in _linears(model)):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)
    for parent, name, linear in list(_linears(plain)):
        setattr(parent, name, linear.merged())
    return plain


def is_adapter(name: str) -> bool:
    """Whether this is the name of an A or a B in a state dict."""
    return name.endswith((f".{A}", f".{B}"))


def adapters_of(training) -> dict:
    """What a checkpoint holds of the settings; empty without adapters.

    Args:
        training: with `lora_rank` and `lora_alpha`.
    """
    return {"lora_rank": training.lora_rank, "lora_alpha": training.lora_alpha} if training.lora_rank else {}


def checked_adapters(found: object) -> tuple[int, float]:
    """Rank and alpha of what was read as `adapters_of`; rank 0 if there are none.

    Raises:
        TypeError: it is something else.
    """
    if found is None or found == {}:
        return 0, 1.0
    kinds = {"lora_rank": int, "lora_alpha": float}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        raise TypeError(f"adapters {found!r}")
    rank, alpha = found["lora_rank"], found["lora_alpha"]
    if rank < 1 or not 0 < alpha < math.inf:
        raise TypeError(f"adapters {found!r}")
    return rank, alpha


def merged_state(state_dict: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Plain weights of a state dict with adapters; without any, its own weights."""
    plain = {name: weight for name, weight in state_dict.items() if not is_adapter(name)}
    for name in state_dict.keys() - plain.keys():
        prefix, _, last = name.rpartition(".")
        if last == B:
            a, b, weight = (state_dict[f"{prefix}.{part}"] for part in (A, B, "weight"))
            plain[f"{prefix}.weight"] = merged_weight(weight, a, b, alpha / len(a))
    return plain


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A [out, in]; W itself, to the bit, while B is zero: a sum would make 0 of its -0."""
    return torch.addmm(weight, b, a, alpha=scale) if b.any() else weight.detach()

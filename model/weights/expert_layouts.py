"""How files hold the experts of a layer, where it differs from ours.

Ours are stacked: `feed_forward.experts.w1` and `.w3` [E, h, dim] and `.w2` [E, dim, h], and one SwiGLU for all tokens,
`feed_forward.shared`. Files hold them

| experts                                                 | in                                                      |
|---------------------------------------------------------|---------------------------------------------------------|
| one by one: `experts.3.up_proj.weight` [h, dim]         | MiniMind; transformers, except Granite                  |
| gate and up joined: `experts.gate_up_proj` [E, 2h, dim] | Granite; transformers 5 with save_original_format=False |
| stacked as ours                                         | GGUF                                                    |

and n shared experts as one SwiGLU of n times the width, or one by one.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError, first_line
from model.LMConfig import LMConfig
from model.options import is_whole

PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # ours to transformers'
MATRICES = {theirs: ours for ours, theirs in PROJECTIONS.items()} | {name: name for name in PROJECTIONS}
FEED_FORWARD = re.compile(r"((?:model\.)?layers\.\d+)\.(feed_forward|mlp|block_sparse_moe|shared_mlp)\.(.+)")
ONE = re.compile(r"(?P<kind>experts|shared_experts?)\.(?:(?P<number>\d{1,5})\.)?(?P<matrix>\w+)\.weight")
ROUTER = re.compile(r"(?:gate|router|router\.layer)\.weight")
BIAS = re.compile(r"(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias")
GATE_UP = ("experts.gate_up_proj", "input_linear.weight")
DOWN = ("experts.down_proj", "output_linear.weight")


class Piece(NamedTuple):
    """What a tensor in a file contributes to one of ours.

    Attributes:
        number: of the expert; 0 where the tensor is of all of them.
        name: in the file.
        half: 0 or 1 if it is the first or the second half of the rows; None: all of them.
    """

    number: int
    name: str
    half: int | None = None


# --------------------------------------------------------------------------------------------------------- reading


def gathered(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], path: str | Path
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """A file as if its experts were stacked like ours: shapes by name, and a function that reads a tensor.

    The names are those that `transformers_name` gives ours; our own in a file with Meta's names. Nothing is read yet.

    Args:
        shapes: of everything in the file, by its plain names.
        read: returns a tensor, given its name in the file.
        path: for messages.

    Raises:
        InputError: an expert is missing, or they differ in shape.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for name in shapes:
        for stack, piece in _pieces(name):
            pieces[stack].append(piece)

    stacked = dict(shapes)
    for stack, parts in pieces.items():
        parts.sort()
        for part in parts:
            stacked.pop(part.name, None)
        numbers = [part.number for part in parts]
        if numbers != [*range(len(parts))]:
            listed = ", ".join(map(str, numbers[:8]))
            raise InputError(f"{path}: {stack} inside of experts {listed}; each of them once, from 0, expected")
    for stack, parts in pieces.items():
        try:
            shape = _combined(stack, parts, lambda name: torch.empty(shapes[name], device="meta")).shape
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{path}: the experts' parts of {stack} differ ({first_line(error)})") from error
        if 0 not in shape or ".shared." not in stack:  # a shared expert without width is none
            stacked[stack] = tuple(shape)

    def read_stack(name: str) -> Tensor:
        return _combined(name, pieces[name], read) if name in pieces else read(name)

    return stacked, read_stack


def _pieces(name: str) -> Iterator[tuple[str, Piece]]:
    """The tensors of ours that one in a file contributes to; none if it is no part of a mixture of experts."""
    if (found := FEED_FORWARD.fullmatch(name)) is None:
        return
    layer, block, part = found.groups()
    prefix = f"{layer}.{'feed_forward' if block == 'feed_forward' else 'mlp'}"
    matrices = f"{prefix}.shared.{{}}.weight" if block == "shared_mlp" else f"{prefix}.experts.{{}}"
    if ROUTER.fullmatch(part):
        yield f"{prefix}.router.weight", Piece(0, name)
    elif BIAS.fullmatch(part):
        yield f"{prefix}.router.bias", Piece(0, name)
    elif part in GATE_UP:
        yield matrices.format("w1"), Piece(0, name, half=0)
        yield matrices.format("w3"), Piece(0, name, half=1)
    elif part in DOWN:
        yield matrices.format("w2"), Piece(0, name)
    elif (one := ONE.fullmatch(part)) and one["matrix"] in MATRICES:
        matrix, number = MATRICES[one["matrix"]], one["number"]
        if one["kind"] != "experts":
            yield f"{prefix}.shared.{matrix}.weight", Piece(int(number or 0), name)
        elif number is not None:
            yield f"{prefix}.experts.{matrix}", Piece(int(number), name)


def _combined(stack: str, pieces: list[Piece], read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of ours that these pieces make."""
    tensors = [read(piece.name) for piece in pieces]
    if pieces[0].half is not None:
        tensors = [tensors[0].chunk(2, dim=-2)[pieces[0].half]]
    if stack.endswith(".router.bias"):
        return tensors[0].flatten()  # ERNIE's is [1, E]
    if ".shared." in stack:
        return torch.cat(tensors, dim=1 if ".w2." in stack else 0)
    return torch.stack(tensors) if ".experts." in stack and tensors[0].dim() == 2 else tensors[0]


def shared_experts(width: object, expert_width: object) -> dict:
    """The fields of an LMConfig for shared experts of a width; none for 0 or None."""
    if not width:
        return {}
    whole = is_whole(width) and is_whole(expert_width) and expert_width > 0 and width % expert_width == 0
    return {"n_shared_experts": width // expert_width if whole else 1, "shared_hidden_dim": width}


def without_zeros(state_dict: Mapping[str, Tensor], config: LMConfig) -> tuple[dict[str, Tensor], LMConfig]:
    """Weights without shared experts or the routers' biases if these are 0: some architectures always have them."""

    def is_zero(ending: str) -> bool:
        return not any(bool(tensor.any()) for name, tensor in state_dict.items() if name.endswith(ending))

    dropped = []
    if config.n_shared_experts and is_zero(".shared.w2.weight"):
        dropped.append(".shared.")
        config = replace(config, n_shared_experts=0, shared_hidden_dim=None)
    if config.expert_bias and is_zero(".router.bias"):
        dropped.append(".router.bias")
        config = replace(config, expert_bias=False)
    kept = {name: tensor for name, tensor in state_dict.items() if not any(part in name for part in dropped)}
    return kept, config


# --------------------------------------------------------------------------------------------------------- writing


class Layout(NamedTuple):
    """The names of a layer's experts in an architecture's files.

    Attributes:
        block: of router and experts.
        matrices: our names of an expert's matrices to theirs; None: all experts stacked, gate and up joined.
        router: its matrix.
        bias: of the router.
        shared: of the SwiGLU of all tokens.
    """

    block: str = "mlp"
    matrices: Mapping[str, str] | None = PROJECTIONS
    router: str = "gate.weight"
    bias: str = "gate.e_score_correction_bias"
    shared: str = "mlp.shared_experts"

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors, named by `transformers_name`, as the files hold them."""
        result = {}
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".mlp.")
            if part == "router.weight":
                result[f"{layer}.{self.block}.{self.router}"] = tensor
            elif part == "router.bias":
                result[f"{layer}.{self.block}.{self.bias}"] = tensor
            elif not part:
                result[name] = tensor
            elif self.matrices is None:
                result |= {f"{layer}.{theirs}": joined for theirs, joined in self._joined(tensors, name, part)}
            else:
                result |= {f"{layer}.{theirs}": matrix for theirs, matrix in self._apart(tensor, part)}
        return result

    def _apart(self, tensor: Tensor, part: str) -> Iterator[tuple[str, Tensor]]:
        kind, matrix, *_ = part.split(".")
        if kind == "shared":
            yield f"{self.shared}.{self.matrices[matrix]}.weight", tensor
        else:
            for number, expert in enumerate(tensor):
                yield f"{self.block}.experts.{number}.{self.matrices[matrix]}.weight", expert

    def _joined(self, tensors: Mapping[str, Tensor], name: str, part: str) -> Iterator[tuple[str, Tensor]]:
        kind, matrix, *_ = part.split(".")
        block = self.shared if kind == "shared" else self.block
        if matrix == "w1":
            other = tensors[name.replace(f"{kind}.w1", f"{kind}.w3")]
            yield f"{block}.input_linear.weight", torch.cat((tensors[name], other), dim=-2)
        elif matrix == "w2":
            yield f"{block}.output_linear.weight", tensors[name]

"""An optimizer, and a moving average, of which each rank has its share."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from model.storage.slices import flat_range
from model.training.choices import Ranks
from model.training.moving_average import MovingAverage, average_in, weight_of_update
from model.training.optimizer import OPTIMIZERS, build_optimizer, trained_parameters
from model.training.plan import RunPlan
from model.training.sharding import Holdings, Piece, Shares


class ShardedOptimizer(torch.optim.Optimizer):
    """Updates this rank's pieces of the parameters by another optimizer, and gets the other ranks' from them.

    Weights and state have the bits that the other optimizer alone would give them. `found_inf` is heeded as it does.

    Args:
        optimizer: as `build_optimizer` returns it, not used yet.
        optimizer_type: its name in `OPTIMIZERS`.
        holdings: of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optimizer_type: str, holdings: Holdings) -> None:
        groups = optimizer.param_groups
        named = [{**g, "params": [*zip(g["param_names"], g["params"], strict=True)]} for g in groups]
        super().__init__(named, optimizer.defaults)
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._optimizer, self._holdings = optimizer, holdings
        holdings.divide_matrices(optimizer)
        self._state_names = OPTIMIZERS[optimizer_type].state
        self._parameters = {n: p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        self._own = {piece: part for piece, part in holdings.parts.items() if piece.name in self._parameters}
        self._group_of = {name: number for number, g in enumerate(groups) for name in g["param_names"]}
        self._has_state = False  # the same on all ranks, also on one that has no piece

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take a step with the parameters' gradients. Every rank must call it."""
        self._optimizer.found_inf = self.found_inf
        self._holdings.update(self._update)
        self._has_state = True

    def _update(self, pieces: list[Piece]) -> None:
        pieces = [piece for piece in pieces if piece in self._own]
        for piece in pieces:
            self._own[piece].grad = self._holdings.gradient(piece, self._parameters[piece.name])
        self._optimizer.param_groups = [
            {**group, "params": [self._own[piece] for piece in pieces if self._group_of[piece.name] == number]}
            for number, group in enumerate(self.param_groups)
        ]
        self._optimizer.step()
        for piece in pieces:
            self._own[piece].grad = None  # else it would keep all of the parameter's

    def state_dict(self) -> dict:
        """The whole state, as the other optimizer alone would have it: on rank 0, its tensors new and on the CPU;
        elsewhere without tensors. Every rank must call it. Within `left_in_pieces`: `InPieces`, on every rank."""
        content = super().state_dict()
        if self._has_state:
            content["state"] = {number: self._collect_state(name) for number, name in enumerate(self._names())}
        return content

    def _names(self) -> list[str]:
        return [name for group in self.param_groups for name in group["param_names"]]

    def _collect_state(self, name: str) -> dict[str, Tensor | None]:
        state, own = {}, [piece for piece in self._own if piece.name == name]
        for key in self._state_names(name, self._parameters[name]):
            mine = {piece: self._optimizer.state[self._own[piece]][key] for piece in own}
            collect = self._holdings.collect_scalar if key == "step" else self._holdings.collect
            state[key] = collect(mine, name)
        return state

    def left_in_pieces(self) -> AbstractContextManager:
        """See `Holdings.left_in_pieces`: then nothing of this, or of a `SharedAverage` beside it, is gathered."""
        return self._holdings.left_in_pieces()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take this rank's pieces of a whole state."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        number_of, saved = dict(zip(self._names(), numbers, strict=True)), state_dict["state"]
        self._has_state = bool(saved)
        self._optimizer.state.clear()
        for piece, part in self._own.items() if self._has_state else ():
            number = number_of[piece.name]
            self._optimizer.state[part] = {
                key: self._part_of(saved, (number, key), piece, part)
                for key in self._state_names(piece.name, self._parameters[piece.name])
            }

    def _part_of(self, saved: Mapping, keys: tuple, piece: Piece, like: Tensor) -> Tensor:
        """A piece of a saved tensor, as a new one on the device of the weights' piece `like` and in its shape."""
        is_scalar = keys[-1] == "step"
        found = flat_range(saved, keys, *((0, 1) if is_scalar else (piece.start, piece.end)))
        return found.view(() if is_scalar else like.shape).to(like.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of the state that this rank holds."""
        return sum(tensor.nbytes for state in self._optimizer.state.values() for tensor in state.values())


class SharedAverage:
    """A `MovingAverage` of which each rank averages its pieces; whole only where it is evaluated or saved.

    Args:
        model: whose weights are averaged.
        holdings: of its parameters.

    Attributes:
        own: the average of this rank's pieces.
        n_averaged: updates so far, int64 scalar on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float, holdings: Holdings) -> None:
        self.decay, self.n_averaged = decay, torch.zeros((), dtype=torch.int64)
        self._model, self._holdings = model, holdings
        trained = trained_parameters(model).keys()
        self.own = {piece: part.clone() for piece, part in holdings.parts.items() if piece.name in trained}

    def update_parameters(self, model: nn.Module, veto: Tensor | None = None) -> None:
        """As `MovingAverage.update_parameters`."""
        self.average(model, self.next_weight(), veto)
        self.n_averaged += 1

    def next_weight(self) -> float:
        """As `MovingAverage.next_weight`."""
        return weight_of_update(int(self.n_averaged), self.decay)

    def average(self, model: nn.Module, weight: float | Tensor, veto: Tensor | None = None) -> None:
        """As `MovingAverage.average`."""
        if self.own:
            average_in([*self.own.values()], [self._holdings.parts[piece] for piece in self.own], weight, veto)

    @torch.no_grad()
    def averaged_model(self) -> nn.Module:
        """A new model with the average, where each rank has all weights; frozen ones are the model's own. Every rank
        must call it."""
        frozen = {id(p): p for p in self._model.parameters() if not p.requires_grad}
        model = copy.deepcopy(self._model, frozen)
        targets = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
        for piece, part in self.own.items():
            piece.of(targets[piece.name]).copy_(part)
        shares = self._holdings
        for bucket in shares.buckets:
            shares.exchange(bucket, [self.own[piece] for piece in shares.of_bucket(bucket)], targets)()
        return model.requires_grad_(False)

    def averaged_weights(self) -> dict[str, Tensor | None]:
        """The average's state dict, on rank 0 with new tensors on the CPU. Every rank must call it."""
        return self._holdings.state_dict(self.own)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces of a whole state dict."""
        for piece, part in self.own.items():
            part.copy_(flat_range(weights, [piece.name], piece.start, piece.end).view(part.shape))


def optimizer_and_average(
    model: nn.Module, plan: RunPlan, processes: Ranks, divided: Holdings | None
) -> tuple[torch.optim.Optimizer, MovingAverage | SharedAverage | None]:
    """The run's optimizer, and the moving average if it has one; shared by the processes if the plan says so.

    Args:
        divided: who holds what of the model, where processes share that too.
    """
    t = plan.training
    dtype = plan.hardware.dtype
    optimizer = build_optimizer(model, t.optimizer_type, t.learning_rate, t.weight_decay, dtype, t.router_rate)
    if plan.shards == 1:
        return optimizer, MovingAverage(model, t.ema_decay) if t.use_ema else None
    holdings = divided or Shares(model, OPTIMIZERS[t.optimizer_type].is_elementwise, processes)
    average = SharedAverage(model, t.ema_decay, holdings) if t.use_ema else None
    return ShardedOptimizer(optimizer, t.optimizer_type, holdings), average

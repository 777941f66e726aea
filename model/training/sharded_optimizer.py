"""An optimizer, and a moving average, of which each rank has its share."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.training.choices import Ranks
from model.training.moving_average import MovingAverage, average_in
from model.training.optimizer import OPTIMIZERS, build_optimizer, trained_parameters
from model.training.plan import RunPlan
from model.training.sharding import Piece, Shares


class ShardedOptimizer(torch.optim.Optimizer):
    """Updates this rank's pieces of the parameters by another optimizer, and gets the other ranks' from them.

    Weights and state have the bits that the other optimizer alone would give them. `found_inf` is heeded as it does.

    Args:
        optimizer: as `build_optimizer` returns it, not used yet.
        optimizer_type: its name in `OPTIMIZERS`.
        shares: of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optimizer_type: str, shares: Shares) -> None:
        groups = optimizer.param_groups
        named = [{**g, "params": [*zip(g["param_names"], g["params"], strict=True)]} for g in groups]
        super().__init__(named, optimizer.defaults)
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._optimizer, self._shares = optimizer, shares
        self._state_names = OPTIMIZERS[optimizer_type].state
        self._own = {piece: piece.of(shares.weights[piece.name]) for piece in shares.all_own}
        self._parameters = {n: p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        self._group_of = {name: number for number, g in enumerate(groups) for name in g["param_names"]}
        self._has_state = False  # the same on all ranks, also on one that has no piece

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take a step with the parameters' gradients. Every rank must call it."""
        self._optimizer.found_inf = self.found_inf
        finish = None
        for bucket in self._shares.buckets:
            pieces = self._shares.own(bucket)
            self._update(pieces)
            started = self._shares.exchange(bucket, [self._own[piece] for piece in pieces], self._shares.weights)
            if finish is not None:
                finish()
            finish = started
        finish()
        self._has_state = True

    def _update(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            gradient = self._parameters[piece.name].grad
            self._own[piece].grad = None if gradient is None else piece.of(gradient)
        self._optimizer.param_groups = [
            {**group, "params": [self._own[piece] for piece in pieces if self._group_of[piece.name] == number]}
            for number, group in enumerate(self.param_groups)
        ]
        self._optimizer.step()
        for piece in pieces:
            self._own[piece].grad = None  # else it would keep all of the parameter's

    def state_dict(self) -> dict:
        """The whole state, as the other optimizer alone would have it: on rank 0, its tensors new and on the CPU;
        elsewhere without tensors. Every rank must call it."""
        content = super().state_dict()
        if self._has_state:
            content["state"] = {number: self._collect_state(name) for number, name in enumerate(self._names())}
        return content

    def _names(self) -> list[str]:
        return [name for group in self.param_groups for name in group["param_names"]]

    def _collect_state(self, name: str) -> dict[str, Tensor | None]:
        state, own = {}, [piece for piece in self._own if piece.name == name]
        for key in self._state_names(name, self._shares.weights[name]):
            mine = {piece: self._optimizer.state[self._own[piece]][key] for piece in own}
            collect = self._shares.collect_scalar if key == "step" else self._shares.collect
            state[key] = collect(mine, name)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take this rank's pieces of a whole state."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        saved = {name: state_dict["state"].get(number) for name, number in zip(self._names(), numbers, strict=True)}
        self._has_state = bool(state_dict["state"])
        self._optimizer.state.clear()
        for piece, part in self._own.items():
            if (whole := saved[piece.name]) is not None:
                self._optimizer.state[part] = {
                    key: (value if key == "step" else piece.of(value)).to(part.device, copy=True)
                    for key, value in whole.items()
                }

    def state_bytes(self) -> int:
        """Bytes of the state that this rank holds."""
        return sum(tensor.nbytes for state in self._optimizer.state.values() for tensor in state.values())


class SharedAverage:
    """A `MovingAverage` of which each rank averages its pieces; whole only where it is evaluated or saved.

    Args:
        model: whose weights are averaged.
        shares: of its trained parameters.

    Attributes:
        n_averaged: updates so far, int64 scalar on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float, shares: Shares) -> None:
        self.decay, self.n_averaged = decay, torch.zeros((), dtype=torch.int64)
        self._model, self._shares = model, shares
        self._own = {piece: piece.of(shares.weights[piece.name]).clone() for piece in shares.all_own}

    def update_parameters(self, model: nn.Module, veto: Tensor | None = None) -> None:
        """As `MovingAverage.update_parameters`."""
        if self._own:
            theirs = [piece.of(self._shares.weights[piece.name]) for piece in self._own]
            average_in([*self._own.values()], theirs, int(self.n_averaged), self.decay, veto)
        self.n_averaged += 1

    @torch.no_grad()
    def averaged_model(self) -> nn.Module:
        """A new model with the average; frozen weights are the model's own. Every rank must call it."""
        frozen = {id(p): p for p in self._model.parameters() if not p.requires_grad}
        model = copy.deepcopy(self._model, frozen)
        targets = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
        for piece, part in self._own.items():
            piece.of(targets[piece.name]).copy_(part)
        for bucket in self._shares.buckets:
            self._shares.exchange(bucket, [self._own[piece] for piece in self._shares.own(bucket)], targets)()
        return model.requires_grad_(False)

    def averaged_weights(self) -> dict[str, Tensor | None]:
        """The average's state dict, on rank 0 with new tensors on the CPU. Every rank must call it."""
        weights = self._shares.weights
        whole = {weight.data_ptr(): self._shares.collect(self._own, name) for name, weight in weights.items()}
        return {key: whole.get(weight.data_ptr(), weight) for key, weight in self._model.state_dict().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces of a whole state dict."""
        for piece, part in self._own.items():
            part.copy_(piece.of(weights[piece.name]))


def optimizer_and_average(
    model: nn.Module, plan: RunPlan, processes: Ranks
) -> tuple[torch.optim.Optimizer, MovingAverage | SharedAverage | None]:
    """The run's optimizer, and the moving average if it has one; shared by the processes if the plan says so."""
    t = plan.training
    dtype = plan.hardware.dtype
    optimizer = build_optimizer(model, t.optimizer_type, t.learning_rate, t.weight_decay, dtype, t.router_rate)
    if plan.shards == 1:
        return optimizer, MovingAverage(model, t.ema_decay) if t.use_ema else None
    shares = Shares(trained_parameters(model), OPTIMIZERS[t.optimizer_type].is_elementwise, processes)
    average = SharedAverage(model, t.ema_decay, shares) if t.use_ema else None
    return ShardedOptimizer(optimizer, t.optimizer_type, shares), average

"""What training changes: the weights, their average, the optimizer's state, and float16's loss scale."""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from model.model import Transformer
from model.training.choices import Ranks
from model.training.fully_sharded import FullySharded
from model.training.plan import RunPlan
from model.training.replicated import Replicated
from model.training.sharded_optimizer import ShardedOptimizer, optimizer_and_average


class TrainState:
    """The weights and all that is updated with them, on this process.

    Args:
        model: the plain one.
        parallel: the same, as the processes have it together.
        plan: of the run.
        processes: that train together.

    Attributes:
        model, parallel: as given.
        optimizer: of the weights that are trained.
        ema: their moving average; None without `use_ema`.
        scaler: of the loss; it does something in float16 only.
    """

    def __init__(
        self, model: Transformer, parallel: Replicated | FullySharded, plan: RunPlan, processes: Ranks
    ) -> None:
        self.model, self.parallel = model, parallel
        self.optimizer, self.ema = optimizer_and_average(model, plan, processes, parallel.holdings)
        device, dtype = plan.hardware.device, plan.hardware.dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def ema_updates(self) -> int:
        """How many steps the average has; 0 without one."""
        return 0 if self.ema is None else int(self.ema.n_averaged)

    def tensors(self) -> list[Tensor]:
        """All that a step changes on the device; the optimizer's and float16's are there after the first step."""
        kept = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        averaged = [] if self.ema is None else self.ema.module.parameters()
        return [*self.model.parameters(), *self.model.buffers(), *kept, *averaged, *self.loss_scale()]

    def loss_scale(self) -> tuple[Tensor, ...]:
        """float16's loss scale and the steps since it grew; nothing before the first step, or in another dtype."""
        scaler = self.scaler
        begun = scaler.is_enabled() and scaler._scale is not None
        return (scaler._scale, scaler._growth_tracker) if begun else ()

    def drop_gradients(self) -> None:
        """Forget them, and free their memory."""
        self.optimizer.zero_grad(set_to_none=True)

    def to_save(self, in_pieces: bool) -> dict[str, Mapping | None]:
        """`model`, `ema` and `optimizer`, as a checkpoint holds them. Every process must call it.

        Args:
            in_pieces: where processes share the optimizer, each keeps its share; else rank 0 gets all of it.
        """
        shared = in_pieces and isinstance(self.optimizer, ShardedOptimizer)
        with self.optimizer.left_in_pieces() if shared else contextlib.nullcontext():
            return {
                "model": self.parallel.weights(),
                "ema": None if self.ema is None else self.ema.averaged_weights(),
                "optimizer": self.optimizer.state_dict(),
            }

"""A model of which each rank holds a share of everything: weights, gradients, optimizer, moving average (ZeRO-3).

The work is torch's FSDP2 (`fully_shard`; Zhao et al., 2023): the weights of an attention or a feed-forward are gathered
from the ranks where it runs and let go after it, in the backward pass again, and the gradients' sums are scattered.
What is done on whole tensors elsewhere is done here on rows, with the same bits given equal gradients.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.lora import merged
from model.model import Transformer
from model.storage.slices import flat_range
from model.training.choices import Ranks
from model.training.clipping import clip_gradients
from model.training.divided_matrices import DividedMatrices, rows_of
from model.training.memory import passing_parts
from model.training.muon import Muon
from model.training.optimizer import is_hidden_matrix, trained_parameters
from model.training.plan import Hardware
from model.training.sharded_optimizer import SharedAverage
from model.training.sharding import Holdings, InPieces, Piece


class FullySharded(Holdings):
    """Divides a model among ranks, in place. With fewer shards than ranks there are replicas, each of `shards`
    neighbouring ranks, as those of a machine are (HSDP).

    Args:
        model: with the same weights on every rank, on the CPU or its device.
        shards: among which one copy is divided.
        hardware: the device, and the dtype of the matrix products.
        processes: the ranks, two at least.
        compiles: whether what runs between two gatherings is compiled.

    Attributes:
        called, averaged_over, shards, holdings: see `Replicated`.
    """

    def __init__(
        self, model: Transformer, shards: int, hardware: Hardware, processes: Ranks, compiles: bool = False
    ) -> None:
        self.model = self.called = model
        self.averaged_over, self.shards, self.holdings = 1, shards, self  # gradients are summed
        self._whole_model, ranks = _without_memory(model), processes.world_size
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = {key: names.get(id(value)) for key, value in model.state_dict(keep_vars=True).items()}

        for part in passing_parts(model) if compiles else ():  # one compilation serves all layers
            part.compile()
        mesh = _mesh(hardware.device.type, ranks // shards, shards)
        self._shard_group, self._has_replicas = mesh.get_group("shard"), mesh.ndim == 2
        divide(model, mesh, hardware.dtype)
        _report_arrivals([model, *passing_parts(model)], processes)

        rank, replicas = processes.rank % shards, ranks // shards
        local = {name: p.detach().to_local() for name, p in model.named_parameters()}
        parts = {_rows(name, shape, rank, shards): local[name] for name, shape in shapes.items()}
        # Each replica gives its share of the tensors, so that all write to a checkpoint.
        held: list[list[Piece]] = [[] for _ in range(ranks)]
        for number, (name, shape) in enumerate(shapes.items()):
            for shard in range(shards):
                if (piece := _rows(name, shape, shard, shards)).size:
                    held[number % replicas * shards + shard].append(piece)
        super().__init__(shapes, held, parts, processes)

    def gradient(self, piece: Piece, parameter: nn.Parameter) -> Tensor | None:
        """The gradient that this rank holds."""
        return None if parameter.grad is None else parameter.grad.to_local()

    def clip(self, most: float) -> Tensor:
        """As `Replicated.clip`, by the norm of what all ranks hold."""
        own = [p.grad.to_local() for p in trained_parameters(self.model).values() if p.grad is not None]
        return clip_gradients(own, most or math.inf, lambda squares: dist.all_reduce(squares, group=self._shard_group))

    def update(self, update: Callable[[list[Piece]], None]) -> None:
        """Nothing is exchanged: the next forward pass gathers the weights."""
        update([*self.parts])

    def divide_matrices(self, optimizer: torch.optim.Optimizer) -> None:
        """Have Muon orthogonalize whole matrices, each on one rank of those that hold its rows. Of a stack of matrices
        a rank holds whole ones."""
        if isinstance(optimizer, Muon):
            parameters = trained_parameters(self.model)
            shapes = {
                part: tuple(self.shapes[piece.name])
                for piece, part in self.parts.items()
                if part.dim() == 2 and piece.name in parameters and is_hidden_matrix(piece.name, part)
            }
            optimizer.divided = DividedMatrices(shapes, self._shard_group)

    def exchanging(self, is_last: bool) -> contextlib.AbstractContextManager:
        """As `Replicated.exchanging`. Before a step's last micro-batch a rank keeps its own gradients, whole, and
        nothing is sent; with replicas it keeps its share of its replica's, and nothing is sent between these."""
        if self._has_replicas:
            self.model.set_requires_all_reduce(is_last)
        else:
            self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def own_weights(self) -> Iterable[Tensor]:
        """As `Replicated.own_weights`, and those that are frozen."""
        return self.parts.values()

    @contextlib.contextmanager
    def evaluating(self, model: Transformer | None, average: SharedAverage | None) -> Iterator[Transformer]:
        """As `Replicated.evaluating`: this model, whatever `model` is. Meanwhile its weights are the average."""
        self._swap(average)
        try:
            yield self.model
        finally:
            self.model.reshard()  # which a forward pass alone leaves gathered
            self._swap(average)

    def _swap(self, average: SharedAverage | None) -> None:
        for piece, theirs in ({} if average is None else average.own).items():
            mine = self.parts[piece].clone()
            self.parts[piece].copy_(theirs)
            theirs.copy_(mine)

    def state_dict(self, own: Mapping[Piece, Tensor]) -> dict[str, Tensor | InPieces | None]:
        """All of them are put together, or left in pieces."""
        whole = {name: self.collect({**self.parts, **own}, name) for name in self.shapes}
        values = self.model.state_dict()  # of which buffers are wanted
        return {key: values[key] if name is None else whole[name] for key, name in self._names.items()}

    def weights(self) -> dict[str, Tensor | InPieces | None]:
        """The state dict, on rank 0 with new tensors on the CPU. Every rank must call it."""
        return self.state_dict({})

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's rows of a whole state dict."""
        for piece, part in self.parts.items():
            part.copy_(flat_range(weights, [piece.name], piece.start, piece.end).view(part.shape))
        for key, name in self._names.items():
            if name is None:
                self.model.get_buffer(key).copy_(weights[key])

    def evaluated_model(self, average: SharedAverage | None) -> Transformer | None:
        """As `Replicated.evaluated_model`: on rank 0 a new model on the CPU, elsewhere None."""
        weights = self.state_dict({} if average is None else average.own)
        if not self._processes.is_main:
            return None
        model = copy.deepcopy(self._whole_model)
        model.load_state_dict(weights, assign=True)
        return merged(model.requires_grad_(False))


def divide(model: Transformer, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Divide a model's parameters among the ranks of a mesh, by rows.

    In 16 bits the matrices of the layers are gathered so, half as much to send, and in memory only while they are used:
    autocast's copies would stay until the backward pass. All else is gathered in float32, where autocast reads it.

    Args:
        mesh: with a dimension "shard" and, before it, "replicate" if there are replicas.
        dtype: of the matrix products.
    """
    products = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.layers:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            if [*norm.parameters()]:
                fully_shard(norm, mesh=mesh, mp_policy=rest)
    for part in passing_parts(model):
        fully_shard(part, mesh=mesh, mp_policy=products)
    fully_shard(model, mesh=mesh, mp_policy=rest, reshard_after_forward=False)  # the backward pass begins with it
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss was divided by all ranks' terms
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first


def _report_arrivals(modules: list[nn.Module], processes: Ranks) -> None:
    """Tell the watchdog where weights are gathered, for which this rank waits for the others: where they wait for one
    that hangs, that one has come the least far."""

    @torch.compiler.disable
    def arrive(*_) -> None:
        processes.arrive()

    @torch.compiler.disable
    def arrive_in_backward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(arrive)

    for module in modules:  # each time before what gathers
        module.register_forward_pre_hook(arrive, prepend=True)
        module.register_forward_hook(arrive_in_backward, prepend=True)


def _mesh(device_type: str, replicas: int, shards: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _rows(name: str, shape: torch.Size, rank: int, ranks: int) -> Piece:
    """A rank's rows of a parameter."""
    begin, end = rows_of(shape[0], rank, ranks)
    row = shape[1:].numel()
    return Piece(name, begin * row, end * row, (end - begin, *shape[1:]))


def _without_memory(model: Transformer) -> Transformer:
    """The same modules, whose parameters have no contents and take no memory."""
    empty: dict[int, Tensor] = {}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, empty)

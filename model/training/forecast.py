"""What training would take on GPUs that are not here: memory, exchanged bytes and time, for each way to divide it.

Nothing is measured or trained, and no memory is taken for the model. Counts of bytes are exact; times are paper: the
device's data sheet times the shares below.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.devices import Cluster
from model.training.memory import CLOSE, MOST_ROWS, StepMemory, passing_parts, step_memory
from model.training.muon import orthogonalization_flops
from model.training.optimizer import is_hidden_matrix
from model.training.plan import Hardware
from model.training.settings import TrainingSettings

# The share of a data sheet's FLOP/s that training reaches, by parameters of the model; between them it is interpolated.
# The first two were measured on an H200, compiled (benchmarks/RESULTS.md; an H100 reached 10 and 23 %). The last is
# torchtitan's claim for Llama 8B on 8 H100s (benchmarks/llama3_h100_202412), counted as mfu is here.
REACHED = {26.9e6: 0.13, 108.7e6: 0.25, 8e9: 0.35}
# Of a link's data sheet. NVIDIA expects 46 to 48 of 50 GB/s a port of its own tests (NVIDIA/nccl-tests#290); the
# collectives of a training step are smaller and wait for the slowest GPU. A judgement.
LINK_REACHED = 0.75
# Seconds from one GPU to the next in a ring, within a node and between nodes, as NCCL's own tuning assumes for
# large messages (hwLat in its src/graph/tuning.cc, protocol Simple).
LINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6
BUCKET_BYTES = 25 * 2**20  # that DistributedDataParallel exchanges at once
BACKWARD = 2 / 3  # of a micro-batch's computing: behind it an exchange of gradients can hide
WRITER_BANDWIDTH = 2e9  # bytes/s that one process writes to a good disk or network file system. A judgement.


@dataclass(frozen=True)
class Way:
    """A way to divide the memory of training among GPUs.

    Attributes:
        shards: GPUs that share one copy of the weights and gradients.
        state_shards: that share one copy of the optimizer's state and the moving average.
    """

    name: str
    about: str
    shards: Callable[[Cluster], int]
    state_shards: Callable[[Cluster], int]


WAYS = (
    Way("ddp", "all of it on each GPU (shard none)", lambda c: 1, lambda c: 1),
    Way("optimizer", "optimizer state and moving average divided by all GPUs", lambda c: 1, lambda c: c.gpus),
    Way("full", "weights and gradients too", lambda c: c.gpus, lambda c: c.gpus),
    Way("hybrid", "as full within a node; nodes are replicas", lambda c: c.gpus_per_node, lambda c: c.gpus_per_node),
)


def ways_on(cluster: Cluster, shard_degree: int | None = None) -> list[Way]:
    """The ways that differ there: `hybrid` is `full` on one node, and `ddp` where a node has one GPU.

    Args:
        shard_degree: of `hybrid`: neighbouring GPUs that share one copy; None: those of a node.

    Raises:
        InputError: shard_degree does not divide the GPUs.
    """
    degree, ways = shard_degree or cluster.gpus_per_node, list(WAYS)
    if cluster.gpus > 1 and cluster.gpus % degree:
        raise InputError(f"shard_degree: {degree} does not divide the {cluster.gpus:,} GPUs; give one that does")
    if shard_degree is not None:
        about = f"as full among {degree:,} neighbouring GPUs; such groups are replicas"
        ways[-1] = Way("hybrid", about, lambda c: degree, lambda c: degree)
    differs = {"ddp": True, "hybrid": 1 < degree < cluster.gpus}
    return [way for way in ways if differs.get(way.name, cluster.gpus > 1)]


@dataclass(frozen=True)
class ModelCost:
    """What of a model decides memory, exchange and time. Bytes are those of one process that trains alone."""

    parameters: int
    active_parameters: int  # that compute a token
    flops_per_token: int
    update_flops: int  # of the optimizer's matrix products in a step
    layers: int
    passing: int  # parameters of all attentions and feed-forwards: where GPUs share them, gathered only to be used
    largest_part: int  # of the larger of the two
    matrices: int  # parameters that Muon orthogonalizes
    itemsize: int  # bytes of a number in the matrix products
    memory: StepMemory  # activations: of the first row
    activations_per_row: int  # of each further one

    @property
    def copies(self) -> int:
        """Bytes of activations that shared weights do not take: the copies in 16 bits, which autocast keeps."""
        return self.itemsize * self.passing if self.itemsize < 4 else 0

    @property
    def kept(self) -> int:
        """Bytes of shared weights that stay gathered for a whole step, in float32: embedding, output and norms."""
        return self.memory.weights - 4 * self.passing

    @property
    def update_bytes(self) -> int:
        """What an update reads and writes: gradients once, weights, the optimizer's state and the average twice."""
        m = self.memory
        return 3 * m.gradients + 2 * (m.optimizer + m.average)


def model_cost(config: LMConfig, training: TrainingSettings, hardware: Hardware) -> ModelCost:
    """Count a model without building it: all its layers but the first take as much as the second one.

    Args:
        training: without LoRA, whose adapters are not counted.
        hardware: a GPU need not be here, see `AbsentGPU`.
    """
    with torch.device("meta"):  # tensors that have shapes and no memory
        first, second = (Transformer(dataclasses.replace(config, n_layers=layers)) for layers in (1, 2))
    more = config.n_layers - 1
    parts = [sum(p.numel() for p in part.parameters()) for part in passing_parts(first)]
    layer = second.parameter_count() - first.parameter_count()
    active = first.active_parameter_count(), second.active_parameter_count()
    flops = first.training_flops_per_token(), second.training_flops_per_token()
    matrices = [p.shape for name, p in first.named_parameters() if is_hidden_matrix(name, p)]
    of_muon = matrices if training.optimizer_type == "muon" else []
    one, two = (step_memory(config, training, rows, hardware.device, hardware.autocast) for rows in (1, 2))
    return ModelCost(
        parameters=first.parameter_count() + more * layer,
        active_parameters=active[0] + more * (active[1] - active[0]),
        flops_per_token=flops[0] + more * (flops[1] - flops[0]),
        update_flops=config.n_layers * sum(orthogonalization_flops(*shape) for shape in of_muon),
        layers=config.n_layers,
        passing=config.n_layers * sum(parts),
        largest_part=max(parts),
        matrices=config.n_layers * sum(math.prod(shape) for shape in of_muon),
        itemsize=hardware.dtype.itemsize,
        memory=one,
        activations_per_row=two.activations - one.activations,
    )


@dataclass(frozen=True)
class Group:
    """GPUs that exchange data with each other."""

    size: int
    bandwidth: float  # bytes/s that each of them sends
    hop: float  # seconds from one to the next in a ring


def neighbours(cluster: Cluster, size: int) -> Group:
    """Each `size` neighbouring GPUs, which divides all."""
    return _group(cluster, size, math.gcd(size, cluster.gpus_per_node))


def replicas(cluster: Cluster, shards: int) -> Group:
    """The GPUs that hold the same of each `shards` neighbours; the groups of all of them work at the same time."""
    return _group(cluster, cluster.gpus // shards, max(1, cluster.gpus_per_node // shards))


def _group(cluster: Cluster, size: int, on_a_node: int) -> Group:
    """NCCL's rings enter and leave a node through the ports of all GPUs of the group there, so that each of them has
    the bandwidth of all of these.

    Args:
        on_a_node: GPUs of the group on the node that has fewest.
    """
    device = cluster.device
    if cluster.nodes == 1 or size == on_a_node:
        return Group(size, device.link, LINK_HOP)
    hop = ((on_a_node - 1) * LINK_HOP + NETWORK_HOP) / on_a_node
    return Group(size, min(device.link, on_a_node * device.network), hop)


@dataclass(frozen=True)
class Exchange:
    """What each GPU sends in a step."""

    bytes: float
    seconds: float
    window: float  # the share of a step's computing behind which it can hide

    def exposed(self, computing: float) -> float:
        """Seconds for which the GPU waits."""
        return max(0.0, self.seconds - self.window * computing)


def gather(group: Group, size: float, calls: int, window: float) -> Exchange:
    """Every GPU gets the others' shares; or the other way round, sums of what all have are scattered: the same bytes.

    Args:
        size: bytes of the whole.
        calls: in which they are exchanged.
        window: as of Exchange.
    """
    sent = size * (group.size - 1) / group.size
    return Exchange(sent, _seconds(group, sent, calls * (group.size - 1)), window)


def all_reduce(group: Group, size: float, calls: int, window: float) -> Exchange:
    """Sums of what all have, for all: scattered and gathered. Along a tree, so that many GPUs need few hops."""
    sent = 2 * size * (group.size - 1) / group.size
    return Exchange(sent, _seconds(group, sent, calls * 2 * math.ceil(math.log2(group.size))), window)


def _seconds(group: Group, sent: float, hops: int) -> float:
    return sent / (LINK_REACHED * group.bandwidth) + hops * group.hop


def exchanges(way: Way, cluster: Cluster, cost: ModelCost, micro_batches: int) -> list[Exchange]:
    """What is exchanged in a step.

    Shared weights are gathered for the forward and again for the backward pass of each micro-batch. Gradients are
    scattered after the last one, of replicas after each; Muon's matrices go to the GPU that orthogonalizes them, and
    back. Replicas exchange gradients once a step, and gather the weights that each has updated a share of.
    """
    gradients, shards = cost.memory.gradients, way.shards(cluster)
    after_backward = BACKWARD / micro_batches
    if cluster.gpus == 1:
        return []
    if shards == 1:
        group, calls = neighbours(cluster, cluster.gpus), math.ceil(gradients / BUCKET_BYTES)
        made = [all_reduce(group, gradients, calls, after_backward)]
        if way.state_shards(cluster) > 1:
            made.append(gather(group, cost.memory.weights, cost.layers + 1, window=0))
        return made
    is_whole = shards == cluster.gpus
    group = neighbours(cluster, shards)
    size, parts = 2 * cost.passing * cost.itemsize + cost.kept, 2 * cost.layers  # of a micro-batch: weights twice
    scatters = 1 if is_whole else micro_batches
    made = [
        gather(group, micro_batches * size, micro_batches * (2 * parts + 1), window=1),
        gather(group, gradients * scatters, scatters * (parts + 1), after_backward if is_whole else BACKWARD),
    ]
    if not is_whole:
        made.append(all_reduce(replicas(cluster, shards), gradients / shards, parts + 1, after_backward))
    if cost.matrices:
        made.append(gather(group, 2 * 4 * cost.matrices / shards, 2, window=0))
    return made


@dataclass(frozen=True)
class Forecast:
    """What one way of training takes on each GPU."""

    way: Way
    rows: int  # samples of a micro-batch
    micro_batches: int  # of a step
    memory: StepMemory
    buffers: int  # bytes for the exchange: DistributedDataParallel's copy of the gradients, or gathered weights
    most_rows: int  # of a micro-batch that fits
    fits: bool
    sent: float  # bytes that a GPU sends in a step
    exchanging: float  # seconds
    computing: float
    updating: float
    waiting: float  # seconds of the exchange that do not hide behind computing

    @property
    def step_seconds(self) -> float:
        return self.computing + self.updating + self.waiting

    @property
    def worst_seconds(self) -> float:
        """Of a step in which no exchange hides behind computing."""
        return self.computing + self.updating + self.exchanging

    @property
    def together(self) -> int:
        """Bytes."""
        return self.memory.together + self.buffers


def forecast(way: Way, cluster: Cluster, cost: ModelCost, rows: int, micro_batches: int, seq_len: int) -> Forecast:
    """What training takes this way.

    Args:
        rows: samples of a micro-batch on each GPU.
        micro_batches: of a step, on each GPU.
        seq_len: tokens of a sample.
    """
    shards, state_shards = way.shards(cluster), way.state_shards(cluster)
    whole, device = cost.memory, cluster.device
    is_divided = shards > 1
    first_row = whole.activations - (cost.copies if is_divided else 0)
    memory = StepMemory(
        weights=-(-whole.weights // shards) + (cost.kept if is_divided else 0),
        average=-(-whole.average // state_shards),
        gradients=-(-whole.gradients // (1 if shards == cluster.gpus and micro_batches > 1 else shards)),
        optimizer=-(-whole.optimizer // state_shards),
        activations=first_row + (rows - 1) * cost.activations_per_row,
    )
    buffers = 0
    if is_divided:
        buffers = 2 * cost.largest_part * (cost.itemsize + 4)  # two parts: their weights, and gradients in float32
    elif cluster.gpus > 1:
        buffers = whole.gradients  # gradient_as_bucket_view is off
    together = memory.together + buffers
    most_rows = rows + math.floor((CLOSE * device.memory - together) / cost.activations_per_row)
    reached = reached_share(cost.active_parameters) * device.flops
    computing = micro_batches * rows * seq_len * cost.flops_per_token / reached
    made = exchanges(way, cluster, cost, micro_batches)
    return Forecast(
        way=way,
        rows=rows,
        micro_batches=micro_batches,
        memory=memory,
        buffers=buffers,
        most_rows=max(0, min(most_rows, MOST_ROWS)),
        fits=together <= CLOSE * device.memory,
        sent=sum(exchange.bytes for exchange in made),
        exchanging=sum(exchange.seconds for exchange in made),
        computing=computing,
        updating=(cost.update_bytes / device.memory_bandwidth + cost.update_flops / reached) / state_shards,
        waiting=sum(exchange.exposed(computing) for exchange in made),
    )


def made_to_fit(found: Forecast, cluster: Cluster, cost: ModelCost, seq_len: int) -> Forecast | None:
    """The same step in smaller micro-batches, where those given do not fit; None: not even one sample fits."""
    if found.fits:
        return found
    samples = found.rows * found.micro_batches
    rows = max((rows for rows in range(1, min(found.most_rows, samples) + 1) if samples % rows == 0), default=0)
    return forecast(found.way, cluster, cost, rows, samples // rows, seq_len) if rows else None


def reached_share(parameters: int) -> float:
    """The share of a device's FLOP/s that a model of this size is expected to reach, see REACHED.

    Args:
        parameters: that compute a token.
    """
    return float(np.interp(math.log(parameters), [math.log(size) for size in REACHED], list(REACHED.values())))

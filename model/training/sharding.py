"""Who updates what where ranks share the optimizer (ZeRO-1: Rajbhandari et al., 2020), and how pieces travel.

Every rank has all weights and, since gradients are exchanged as without sharing, all gradients. It updates its own
pieces only, keeps the optimizer's state of these alone, and gets the others' new weights.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from model.training.choices import Ranks
from model.training.divided_matrices import balanced
from model.training.muon import polynomial_flops
from model.training.optimizer import trained_parameters

ALIGNMENT = 64  # elements that ranges are cut at: where a tensor ends, fused kernels may round differently
BUCKET_BYTES = 25 * 10**6  # of all ranks together, exchanged while the next bucket is updated


@dataclass(frozen=True)
class Piece:
    """What one rank updates of a parameter: a range of its flattened elements."""

    name: str
    start: int
    end: int
    shape: tuple[int, ...] | None = None  # in which it must be updated as one; None: flat, and it can be cut

    @property
    def size(self) -> int:
        """Elements."""
        return self.end - self.start

    def flat(self, tensor: Tensor) -> Tensor:
        """This part of a contiguous tensor of the parameter's shape, as a view [size]."""
        return tensor.view(-1)[self.start : self.end]

    def of(self, tensor: Tensor) -> Tensor:
        """The same in the shape in which it is updated."""
        return self.flat(tensor) if self.shape is None else self.flat(tensor).view(self.shape)

    def cut(self, most: int) -> "list[Piece]":
        """Ranges of at most `most` elements; what must be updated as one stays so."""
        if self.shape is not None:
            return [self]
        return [Piece(self.name, at, min(at + most, self.end)) for at in range(self.start, self.end, most)]


@dataclass(frozen=True)
class InPieces:
    """A tensor of which each rank holds pieces, as one rank knows it."""

    shape: torch.Size
    dtype: torch.dtype
    given: Mapping[tuple[int, int], Tensor]  # of the flattened elements [start, end): those that this rank gives


def update_cost(shape: Sequence[int]) -> int:
    """What the update of a whole parameter costs, relative to others: FLOP of a Newton-Schulz iteration of a matrix."""
    return polynomial_flops(*shape) if len(shape) >= 2 else torch.Size(shape).numel()


def share_out(
    parameters: Mapping[str, Tensor], is_elementwise: Callable[[str, Tensor], bool], ranks: int
) -> list[list[Piece]]:
    """Each rank's pieces; the same on all ranks.

    Parameters that must stay whole go, the most costly first, to the rank with the least to do so far, so no rank has
    more to do than the mean and one parameter. All others form one range, cut into equal parts.

    Args:
        is_elementwise: (name, parameter) -> whether ranges of it can be updated separately.
    """
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    whole = {name: p for name, p in parameters.items() if not is_elementwise(name, p)}
    owners = balanced([update_cost(p.shape) for p in whole.values()], ranks)
    for name, rank in sorted(zip(whole, owners, strict=True), key=lambda task: -update_cost(whole[task[0]].shape)):
        shares[rank].append(Piece(name, 0, whole[name].numel(), tuple(whole[name].shape)))

    sizes = {name: p.numel() for name, p in parameters.items() if name not in whole}
    total, begin = sum(sizes.values()), 0
    for name, size in sizes.items():
        cuts = [_cut_at(rank * total // ranks - begin, size) for rank in range(ranks + 1)]
        for share, start, end in zip(shares, cuts[:-1], cuts[1:], strict=True):
            if start < end:
                share.append(Piece(name, start, end))
        begin += size
    return shares


def _cut_at(wanted: int, size: int) -> int:
    """The place within a parameter of `size` elements to cut it at: aligned, or one of its ends."""
    return size if wanted >= size else max(0, wanted) // ALIGNMENT * ALIGNMENT


def in_buckets(shares: list[list[Piece]], most: int) -> list[list[list[Piece]]]:
    """The pieces of each rank in each bucket, [bucket][rank]; all ranks have as many, some of them empty.

    Args:
        most: elements of a rank in a bucket; a larger piece that must stay whole has one of its own.
    """
    return [list(bucket) for bucket in zip_longest(*(_filled(share, most) for share in shares), fillvalue=[])]


def _filled(share: list[Piece], most: int) -> list[list[Piece]]:
    buckets: list[list[Piece]] = []
    room = 0
    for piece in (part for large in share for part in large.cut(most)):
        if piece.size > room:
            buckets.append([])
            room = most
        buckets[-1].append(piece)
        room -= piece.size
    return buckets


class Holdings(ABC):
    """Which rank holds which pieces of the parameters, and how whole tensors are put together from them.

    Args:
        shapes: of the parameters, by name; all are float32.
        held: the pieces that each rank gives where they are put together: each element is one rank's.
        parts: this rank's pieces of the weights, each in the shape in which it is updated; also those that another rank
            gives.
        processes: the ranks, two at least.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        held: list[list[Piece]],
        parts: Mapping[Piece, Tensor],
        processes: Ranks,
    ) -> None:
        self.shapes, self.parts, self._processes = dict(shapes), dict(parts), processes
        self._gathers = True
        self._owners: dict[str, list[tuple[Piece, int]]] = {name: [] for name in shapes}
        for rank, pieces in enumerate(held):
            for piece in pieces:
                self._owners[piece.name].append((piece, rank))

    @abstractmethod
    def gradient(self, piece: Piece, parameter: nn.Parameter) -> Tensor | None:
        """This rank's piece of a parameter's gradient, in the shape in which it is updated."""

    @abstractmethod
    def update(self, update: Callable[[list[Piece]], None]) -> None:
        """Have this rank update all its parts, by one call or several; then the weights are right on every rank."""

    @abstractmethod
    def divide_matrices(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell an optimizer that needs whole matrices where their rows are."""

    @abstractmethod
    def state_dict(self, own: Mapping[Piece, Tensor]) -> dict[str, Tensor | None]:
        """The model's state dict with other contents, on rank 0 as new tensors on the CPU. Every rank must call it.

        Args:
            own: this rank's pieces of them; what is not among them is the model's.
        """

    @contextlib.contextmanager
    def left_in_pieces(self) -> Iterator[None]:
        """Within it nothing is gathered, and no rank waits for another: `collect` returns `InPieces` on every rank."""
        self._gathers = False
        try:
            yield
        finally:
            self._gathers = True

    def collect(self, own: Mapping[Piece, Tensor], name: str) -> Tensor | InPieces | None:
        """What the ranks hold pieces of, whole: on rank 0 a new tensor on the CPU, elsewhere None. Every rank must call
        it.

        Args:
            own: this rank's pieces, in any shape.
            name: of the parameter that it is like.
        """
        ranges = {piece: (piece.start, piece.end) for piece, _ in self._owners[name]}
        return self._put_together(own, name, self.shapes[name], ranges)

    def collect_scalar(self, own: Mapping[Piece, Tensor], name: str) -> Tensor | InPieces | None:
        """The same of a float32 scalar that every piece of a parameter has."""
        first, _ = self._owners[name][0]
        return self._put_together(own, name, torch.Size(()), {first: (0, 1)})

    def _put_together(
        self, own: Mapping[Piece, Tensor], name: str, shape: torch.Size, ranges: Mapping[Piece, tuple[int, int]]
    ) -> Tensor | InPieces | None:
        """What `collect` returns.

        Args:
            ranges: where each piece belongs among the flattened elements.
        """
        rank = self._processes.rank
        owners = {piece: owner for piece, owner in self._owners[name] if piece in ranges}
        given = {piece: own[piece].reshape(-1) for piece, owner in owners.items() if owner == rank and piece in own}
        if not self._gathers:
            return InPieces(shape, torch.float32, {ranges[piece]: part for piece, part in given.items()})
        whole = torch.empty(shape) if self._processes.is_main else None
        for piece, owner in owners.items():
            mine = given[piece].cpu() if piece in given else None
            start, end = ranges[piece]
            self._processes.send_to_main(owner, mine, None if whole is None else whole.view(-1)[start:end])
        return whole


class Shares(Holdings):
    """The pieces of all ranks where each has all weights, and how their contents get to the others.

    Args:
        model: whose trained parameters are shared: float32, contiguous, on one device.
        is_elementwise: see `share_out`.
        processes: the ranks, two at least.
        bucket_bytes: of a bucket, all ranks together.

    Attributes:
        weights: the parameters' contents, by name.
        buckets: the pieces by bucket and rank, see `in_buckets`.
    """

    def __init__(
        self,
        model: nn.Module,
        is_elementwise: Callable[[str, Tensor], bool],
        processes: Ranks,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        ranks, parameters = processes.world_size, trained_parameters(model)
        self._model = model
        self.weights = {name: parameter.detach() for name, parameter in parameters.items()}
        most = max(1, bucket_bytes // 4 // ranks // ALIGNMENT) * ALIGNMENT
        self.buckets = in_buckets(share_out(parameters, is_elementwise, ranks), most)
        held = [[piece for bucket in self.buckets for piece in bucket[rank]] for rank in range(ranks)]
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        parts = {piece: piece.of(self.weights[piece.name]) for piece in held[processes.rank]}
        super().__init__(shapes, held, parts, processes)

    def gradient(self, piece: Piece, parameter: nn.Parameter) -> Tensor | None:
        """A view of it."""
        return None if parameter.grad is None else piece.of(parameter.grad)

    def update(self, update: Callable[[list[Piece]], None]) -> None:
        """A bucket's exchange runs while the next one is updated."""
        finish = None
        for bucket in self.buckets:
            pieces = self.of_bucket(bucket)
            update(pieces)
            started = self.exchange(bucket, [self.parts[piece] for piece in pieces], self.weights)
            if finish is not None:
                finish()
            finish = started
        finish()

    def divide_matrices(self, optimizer: torch.optim.Optimizer) -> None:
        """A matrix lies whole on the rank that updates it."""

    def state_dict(self, own: Mapping[Piece, Tensor]) -> dict[str, Tensor | None]:
        """Frozen weights are the model's own tensors."""
        whole = {weight.data_ptr(): self.collect(own, name) for name, weight in self.weights.items()}
        return {key: whole.get(weight.data_ptr(), weight) for key, weight in self._model.state_dict().items()}

    def of_bucket(self, bucket: list[list[Piece]]) -> list[Piece]:
        """This rank's pieces in a bucket."""
        return bucket[self._processes.rank]

    def exchange(
        self, bucket: list[list[Piece]], own: Iterable[Tensor], targets: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        """Start to give all ranks the contents of a bucket; returns what puts the other ranks' pieces into `targets`.

        Every rank must call both. On a GPU neither waits for it.

        Args:
            own: this rank's pieces of the bucket, in any shape.
            targets: contiguous tensors like the parameters, by name.
        """
        longest = max(sum(piece.size for piece in pieces) for pieces in bucket)
        like = next(iter(targets.values()))
        sent, received = like.new_zeros(longest), like.new_empty(longest * len(bucket))
        if pieces := self.of_bucket(bucket):
            torch._foreach_copy_(_cut(sent, pieces), [tensor.reshape(-1) for tensor in own])
        wait = self._processes.gather_on_device(sent, received)

        def finish() -> None:
            wait()
            for rank, (pieces, row) in enumerate(zip(bucket, received.view(len(bucket), -1), strict=True)):
                if pieces and rank != self._processes.rank:
                    torch._foreach_copy_([piece.flat(targets[piece.name]) for piece in pieces], _cut(row, pieces))

        return finish


def _cut(row: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """The beginning of a row, as one view [size] a piece."""
    sizes = [piece.size for piece in pieces]
    return row[: sum(sizes)].split(sizes)

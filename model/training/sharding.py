"""Who updates what where ranks share the optimizer (ZeRO-1: Rajbhandari et al., 2020), and how pieces travel.

Every rank has all weights and, since gradients are exchanged as without sharing, all gradients. It updates its own
pieces only, keeps the optimizer's state of these alone, and gets the others' new weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from model.training.choices import Ranks
from model.training.muon import polynomial_flops

ALIGNMENT = 64  # elements that ranges are cut at: where a tensor ends, fused kernels may round differently
BUCKET_BYTES = 25 * 10**6  # of all ranks together, exchanged while the next bucket is updated


@dataclass(frozen=True)
class Piece:
    """What one rank updates of a parameter: a range of its flattened elements, or all of it in its shape."""

    name: str
    start: int
    end: int
    is_whole: bool

    @property
    def size(self) -> int:
        """Elements."""
        return self.end - self.start

    def flat(self, tensor: Tensor) -> Tensor:
        """This part of a contiguous tensor of the parameter's shape, as a view [size]."""
        return tensor.view(-1)[self.start : self.end]

    def of(self, tensor: Tensor) -> Tensor:
        """The same in the shape in which it is updated."""
        return tensor if self.is_whole else self.flat(tensor)

    def cut(self, most: int) -> "list[Piece]":
        """Ranges of at most `most` elements; a whole parameter stays whole."""
        if self.is_whole:
            return [self]
        return [Piece(self.name, at, min(at + most, self.end), False) for at in range(self.start, self.end, most)]


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
    load = [0] * ranks
    for name in sorted(whole, key=lambda name: -update_cost(whole[name].shape)):
        rank = load.index(min(load))
        load[rank] += update_cost(whole[name].shape)
        shares[rank].append(Piece(name, 0, whole[name].numel(), True))

    sizes = {name: p.numel() for name, p in parameters.items() if name not in whole}
    total, begin = sum(sizes.values()), 0
    for name, size in sizes.items():
        cuts = [_cut_at(rank * total // ranks - begin, size) for rank in range(ranks + 1)]
        for share, start, end in zip(shares, cuts[:-1], cuts[1:], strict=True):
            if start < end:
                share.append(Piece(name, start, end, False))
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


class Shares:
    """The pieces of all ranks, and how their contents get to the others.

    Args:
        parameters: that are trained, by name: float32, contiguous, on one device.
        is_elementwise: see `share_out`.
        processes: the ranks, two at least.
        bucket_bytes: of a bucket, all ranks together.

    Attributes:
        buckets: the pieces by bucket and rank, see `in_buckets`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        is_elementwise: Callable[[str, Tensor], bool],
        processes: Ranks,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._processes, ranks = processes, processes.world_size
        self.weights = {name: parameter.detach() for name, parameter in parameters.items()}
        most = max(1, bucket_bytes // 4 // ranks // ALIGNMENT) * ALIGNMENT
        self.buckets = in_buckets(share_out(parameters, is_elementwise, ranks), most)
        self._owners: dict[str, list[tuple[Piece, int]]] = {name: [] for name in parameters}
        for bucket in self.buckets:
            for rank, pieces in enumerate(bucket):
                for piece in pieces:
                    self._owners[piece.name].append((piece, rank))

    def own(self, bucket: list[list[Piece]]) -> list[Piece]:
        """This rank's pieces in a bucket."""
        return bucket[self._processes.rank]

    @property
    def all_own(self) -> list[Piece]:
        """This rank's pieces, in the buckets' order."""
        return [piece for bucket in self.buckets for piece in self.own(bucket)]

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
        if pieces := self.own(bucket):
            torch._foreach_copy_(_cut(sent, pieces), [tensor.reshape(-1) for tensor in own])
        wait = self._processes.gather_on_device(sent, received)

        def finish() -> None:
            wait()
            for rank, (pieces, row) in enumerate(zip(bucket, received.view(len(bucket), -1), strict=True)):
                if pieces and rank != self._processes.rank:
                    torch._foreach_copy_([piece.flat(targets[piece.name]) for piece in pieces], _cut(row, pieces))

        return finish

    def collect(self, own: Mapping[Piece, Tensor], name: str) -> Tensor | None:
        """What the ranks hold pieces of, whole: on rank 0 a new tensor on the CPU, elsewhere None. Every rank must call
        it.

        Args:
            own: this rank's pieces, in any shape.
            name: of the parameter that it is like.
        """
        main, like = self._processes.is_main, self.weights[name]
        whole = torch.empty_like(like, device="cpu") if main else None
        for piece, owner in self._owners[name]:
            mine = own[piece].reshape(-1).cpu() if piece in own else None
            self._processes.send_to_main(owner, mine, piece.flat(whole) if main else None)
        return whole

    def collect_scalar(self, own: Mapping[Piece, Tensor], name: str) -> Tensor | None:
        """The same of a float32 scalar that every piece of a parameter has."""
        piece, owner = self._owners[name][0]
        whole = torch.empty(()) if self._processes.is_main else None
        self._processes.send_to_main(owner, own[piece].cpu() if piece in own else None, whole)
        return whole


def _cut(row: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """The beginning of a row, as one view [size] a piece."""
    sizes = [piece.size for piece in pieces]
    return row[: sum(sizes)].split(sizes)

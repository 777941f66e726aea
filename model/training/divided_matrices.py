"""Matrices whose rows lie on several ranks, and which rank orthogonalizes which of them for Muon."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.training.muon import by_shape, orthogonalized, polynomial_flops


def rows_of(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The first of a rank's rows and the one after its last, as FSDP2 divides them."""
    share = -(-rows // ranks)
    return min(rank * share, rows), min((rank + 1) * share, rows)


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each task: the most costly first, to the rank with the least to do so far. So none has more to
    do than the mean and one task."""
    owners, load = [0] * len(costs), [0.0] * ranks
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = load.index(min(load))
        load[owners[task]] += costs[task]
    return owners


class DividedMatrices:
    """Sends the rows of each matrix to the rank that orthogonalizes it, and the result's rows back: two exchanges, in
    which a rank sends and gets its share of all matrices.

    Args:
        shapes: of the whole matrices, by this rank's rows of each, in the same order on every rank.
        group: the ranks.
    """

    def __init__(self, shapes: Mapping[Tensor, tuple[int, int]], group: dist.ProcessGroup) -> None:
        self._shapes, self._group = dict(shapes), group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        owners = balanced([polynomial_flops(*shape) for shape in self._shapes.values()], self._ranks)
        parts = [*self._shapes]
        self._owned = [[p for p, owner in zip(parts, owners, strict=True) if owner == r] for r in range(self._ranks)]

    def turned(
        self, updates: Mapping[Tensor, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[list[Tensor], Tensor, int]]:
        """Orthogonalize. Every rank must call it.

        Args:
            updates: this rank's rows of each matrix, by the parameter's rows.
            dtype: of the matrix products.

        Returns:
            for matrices of one shape: the parameters' rows, those of the result [N, rows, columns], and the longer side
            of a whole matrix.
        """
        own = self._owned[self._rank]
        gathered = self._exchange(
            [[updates[part] for part in owned] for owned in self._owned],
            [[self._rows(part, rank) for part in own] for rank in range(self._ranks)],
        )
        matrices = [torch.cat(rows) for rows in zip(*gathered, strict=True)]
        results: dict[Tensor, Tensor] = {}
        for some in by_shape(matrices):
            results |= zip(some, orthogonalized(torch.stack(some), dtype), strict=True)
        whole = [results[matrix] for matrix in matrices]
        returned = self._exchange(
            [
                [matrix[slice(*rows_of(len(matrix), rank, self._ranks))] for matrix in whole]
                for rank in range(self._ranks)
            ],
            [[tuple(part.shape) for part in owned] for owned in self._owned],
        )
        directions: dict[Tensor, Tensor] = {}
        for owned, rows in zip(self._owned, returned, strict=True):
            directions |= zip(owned, rows, strict=True)
        for shape in dict.fromkeys(self._shapes.values()):
            some = [part for part in self._shapes if self._shapes[part] == shape]
            yield some, torch.stack([directions[part] for part in some]), max(shape)

    def _rows(self, part: Tensor, rank: int) -> tuple[int, int]:
        """The shape of a rank's rows of a matrix."""
        rows, columns = self._shapes[part]
        begin, end = rows_of(rows, rank, self._ranks)
        return end - begin, columns

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[list[Tensor]]:
        """Send tensors to each rank, and get tensors of these shapes from each."""
        sizes = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        like = next(iter(self._shapes))
        flat = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for of_rank in sent for tensor in of_rank)])
        received = like.new_empty(sum(map(sum, sizes)))
        counts = [sum(tensor.numel() for tensor in of_rank) for of_rank in sent]
        dist.all_to_all_single(received, flat, [*map(sum, sizes)], counts, group=self._group)
        pieces = iter(received.split([size for of_rank in sizes for size in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]

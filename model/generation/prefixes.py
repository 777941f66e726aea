"""Keys and values of texts that ended, for texts that begin alike: the next turn of a chat reads only what is new."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from torch import Tensor

from model.kv_cache import KVCache

FEWEST = 32  # tokens in common that are worth a copy


class _Kept(NamedTuple):
    ids: np.ndarray  # int64 [T]
    keys: Tensor  # [layers, H_kv, T, D]
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Prefixes:
    """Texts' keys and values, up to `max_bytes` of them; those not used for longest are dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._texts: OrderedDict[int, _Kept] = OrderedDict()  # the most recently used last
        self._number = 0

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self._texts.values())

    def keep(self, ids: np.ndarray, cache: KVCache, row: int) -> None:
        """Keep what a row of a cache holds, unless it is kept already: the keys and values of these ids, int64 [T]."""
        token_bytes = 2 * cache.keys[:, row, :, 0].nbytes
        ids = ids[: self.max_bytes // token_bytes]  # of a text that is larger than all of them, its beginning
        length = len(ids)
        if length < FEWEST:
            return
        for number, text in list(self._texts.items()):
            shared = common(text.ids, ids)
            if shared == length:
                return self._texts.move_to_end(number)
            if shared == len(text.ids):  # an earlier turn of the same chat
                del self._texts[number]
        keys, values = (buffer[:, row, :, :length].clone() for buffer in (cache.keys, cache.values))
        self._number += 1
        self._texts[self._number] = _Kept(ids.copy(), keys, values)
        while self._texts and self.nbytes > self.max_bytes:
            self._texts.popitem(last=False)

    def fill(self, ids: np.ndarray, most: int, cache: KVCache, row: int) -> int:
        """Copy into a row the keys and values of the longest known beginning of these ids.

        Returns:
            its length in tokens, at most `most`; 0: none is long enough.
        """
        best, number = max(((common(text.ids, ids), number) for number, text in self._texts.items()), default=(0, 0))
        length = min(best, most)
        if length < FEWEST:
            return 0
        text = self._texts[number]
        self._texts.move_to_end(number)
        cache.keys[:, row, :, :length] = text.keys[:, :, :length]
        cache.values[:, row, :, :length] = text.values[:, :, :length]
        return length


def common(first: np.ndarray, second: np.ndarray) -> int:
    """How many ids two texts have in common at their beginnings."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length

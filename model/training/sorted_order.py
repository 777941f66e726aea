"""The order of samples of checkpoints up to version 5, with which their runs go on."""

import numpy as np

from model.training.order import SampleOrder, Source


class SortedOrder(SampleOrder):
    """As `SampleOrder`, but each epoch's order is made as a whole, in memory."""

    _epoch, _order = -1, np.arange(0)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """The samples that are read at these positions, int64 [N] as they are."""
        epochs, places = np.divmod(positions, self.per_epoch)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            its = epochs == epoch
            found[its] = self._order_of(epoch)[places[its]]
        return found

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            read = [self._read_of(source, epoch) for source in self.sources]
            places = np.concatenate([(np.arange(len(samples)) + 0.5) / len(samples) for samples in read])
            self._epoch, self._order = epoch, np.concatenate(read)[np.argsort(places, kind="stable")]
        return self._order

    def _read_of(self, source: Source, epoch: int) -> np.ndarray:
        """The samples of a source that an epoch reads, in order."""
        size = len(source.samples)
        passes, places = np.divmod(epoch * source.per_epoch + np.arange(source.per_epoch), size)
        read = [epoch_order(size, self.seed, number)[places[passes == number]] for number in np.unique(passes).tolist()]
        return source.samples[np.concatenate(read)]


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation, int64 [samples], and a pure function of its arguments.

    It sorts a Philox stream (Salmon et al., 2011), which NumPy guarantees across versions.
    """
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(samples)
    return np.argsort(stream, kind="stable")

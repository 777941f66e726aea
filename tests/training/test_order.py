"""Which sample is read when: the same for every way of asking, of one file or a mixture, and as a checkpoint says."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from model.dataset import PretrainDataset, SampleRange, hold_out
from model.storage.archive import load_torch, save_torch
from model.training.order import SampleOrder, Source, spread
from model.training.sorted_order import SortedOrder, epoch_order
from tests.tiny_runs import assert_same_end, train

ORDERS = pytest.mark.parametrize("kind", [SampleOrder, SortedOrder])
HUGE = 2_400_000_000  # samples of 10**13 tokens


def order_of(samples, seed=1, rows=5, kind=SampleOrder) -> SampleOrder:
    """The order of one file, read whole in each epoch."""
    return kind([Source(samples, len(samples))], seed, rows)


def mixed(kind=SampleOrder, rows=10) -> SampleOrder:
    """90 samples of one file, and in each epoch 10 of the 35 of another."""
    return kind([Source(SampleRange(90), 90), Source(SampleRange(35, begin=90), 10)], 3, rows)


def read(order, begin, end) -> np.ndarray:
    """The samples from one position to another, step by step."""
    found = []
    while begin < end:
        found.append(order.next_step(begin))
        begin += len(found[-1])
    assert begin == end
    return np.concatenate(found)


@ORDERS
def test_an_epoch_reads_each_sample_once_and_the_next_begins_afresh(kind):
    samples = SampleRange(23, begin=100, run=4)  # without 104, 109, …
    order = order_of(samples, kind=kind)
    epochs = [read(order, 0, 23).tolist(), read(order, 23, 46).tolist()]
    assert [sorted(epoch) for epoch in epochs] == [samples.numbers().tolist()] * 2 and epochs[0] != epochs[1]
    assert order.steps_per_epoch == 5 and len(order.next_step(20)) == 3  # no step reads of two epochs
    assert order_of(samples, kind=kind).next_step(30).tolist() == epochs[1][7:12]
    assert (read(order_of(samples, seed=2, kind=kind), 0, 23) != epochs[0]).any()


@pytest.mark.parametrize("order", [order_of(SampleRange(1000), rows=7), mixed()], ids=["one file", "two"])
def test_the_same_sample_is_at_a_position_however_it_is_asked_for(order):
    order.rows_per_step = 7
    epochs = read(order, 0, 2 * order.per_epoch)
    backwards = np.arange(2 * order.per_epoch)[::-1]
    assert np.array_equal(order.samples_at(backwards)[::-1], epochs)
    for rows in (1, 2, 64):  # more processes, or more rows each, as they share a step
        order.rows_per_step = rows
        assert np.array_equal(read(order, 0, 2 * order.per_epoch), epochs)


def test_the_order_never_changes():
    """A change would break resuming."""
    assert order_of(SampleRange(1000), seed=42).next_step(0).tolist() == [647, 420, 674, 865, 527]
    huge = order_of(SampleRange(HUGE), seed=42, rows=3)
    assert huge.next_step(5 * HUGE // 2).tolist() == [1_819_522_196, 1_366_245_504, 1_923_523_643]
    assert mixed().next_step(340).tolist() == [51, 53, 14, 38, 26, 117, 59, 48, 33, 19]


def test_the_order_of_earlier_checkpoints_never_changes():
    """As the program of version 5 had it."""
    assert epoch_order(1000, seed=42, epoch=0)[:8].tolist() == [219, 322, 311, 675, 377, 174, 866, 100]
    order = order_of(SampleRange(23, begin=100), kind=SortedOrder)
    assert order.next_step(0).tolist() == [103, 105, 102, 109, 122]
    assert order.next_step(30).tolist() == [113, 121, 106, 118, 111]
    texts_mixed_in = mixed(SortedOrder)
    assert texts_mixed_in.next_step(340).tolist() == [36, 8, 14, 33, 16, 117, 89, 21, 87, 39]
    digest = hashlib.sha256(read(texts_mixed_in, 0, 700).astype("<i8")).hexdigest()
    assert digest == "f50a1ed99efc35210b64730afddcba6e4dd8194c105c613f97b9ab9544fa56cd"


@ORDERS
def test_texts_are_spread_among_the_chats_and_pass_once_before_any_is_read_again(kind):
    order = mixed(kind)
    assert order.per_epoch == 100
    epochs = [read(order, 100 * epoch, 100 * epoch + 100) for epoch in range(7)]
    for samples in epochs:
        assert sorted(samples[samples < 90]) == list(range(90))
        assert all(1 <= (samples[begin : begin + 20] >= 90).sum() <= 3 for begin in range(0, 100, 20))
    texts = np.concatenate([samples[samples >= 90] for samples in epochs])
    assert sorted(texts[:35]) == sorted(texts[35:70]) == list(range(90, 125)) and (texts[:35] != texts[35:70]).any()


@pytest.mark.parametrize("counts", [[1], [1, 1], [7, 3], [1, 1000], [5, 1, 90, 4], [3] * 17, [*range(1, 100)]])
def test_a_mixture_holds_each_sequence_once_and_in_order_and_every_prefix_has_its_share(counts):
    counts = np.array(counts)
    numbers, places = spread(np.arange(counts.sum()), counts)
    for number, count in enumerate(counts):
        assert places[numbers == number].tolist() == list(range(count))
    read_of_each = (numbers[:, None] == np.arange(len(counts))).cumsum(axis=0)
    expected = np.arange(1, len(numbers) + 1)[:, None] * counts / counts.sum()
    assert np.abs(read_of_each - expected).max() < 2


def test_the_mixture_of_huge_files_is_exact():
    counts = np.array([3 * 10**11, 1, 7 * 10**11 - 5])  # products of 80 bits
    numbers, places = spread(np.array([0, int(counts.sum()) - 1]), counts)
    assert places[0] == 0 and places[1] == counts[numbers[1]] - 1
    middle = np.arange(5 * 10**11, 5 * 10**11 + 1000)
    numbers, places = spread(middle, counts)
    assert (numbers == 0).sum() == 300 and abs(places[numbers == 0][0] - 0.3 * 5 * 10**11) < 2
    assert (np.diff(places[numbers == 0]) == 1).all() and (np.diff(places[numbers == 2]) == 1).all()


def test_a_step_far_into_a_huge_file_takes_no_memory():
    order = order_of(hold_out(HUGE)[0], rows=4096)
    order.next_step(0)
    tracemalloc.start()
    found = [order.next_step(position) for position in (3 * HUGE, 10**12, 10**15)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert all(len(np.unique(samples)) == 4096 and samples.max() < HUGE for samples in found)
    last = order.per_epoch % 4096
    assert len(order.next_step(order.per_epoch - last)) == last


# ------------------------------------------------------------------------------------------------------------ in a run


def as_version_5(path) -> None:
    """What the program of version 5 wrote: nothing about the order."""
    content = load_torch(path)
    assert content["data"].pop("order") == "feistel"
    save_torch(path, content | {"format_version": 5})


@pytest.mark.long
def test_a_run_of_an_earlier_version_goes_on_in_its_order(flags, tmp_path, monkeypatch):
    train(flags(max_steps=4))
    out = tmp_path / "out"
    as_version_5(out / "checkpoint_step_4.pth")
    batches, batch = [], PretrainDataset.batch
    monkeypatch.setattr(
        PretrainDataset, "batch", lambda self, samples, rows: batches.append([*samples]) or batch(self, samples, rows)
    )
    trainer = train(flags(resume="true", eval_interval=12))
    samples = trainer.data.sources[0].samples
    expected = samples[epoch_order(len(samples), 42, 0)][16:48]
    assert sum(batches[:8], []) == expected.tolist()  # steps 5 to 12, of 4 samples each
    assert load_torch(out / "checkpoint_step_12.pth")["data"]["order"] == "philox"

    (tmp_path / "again").mkdir()
    (out / "checkpoint_step_8.pth").rename(tmp_path / "again" / "checkpoint_step_8.pth")
    train(flags(out_dir=tmp_path / "again", resume="true", eval_interval=12))
    assert_same_end(out, tmp_path / "again")

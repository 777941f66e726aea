"""What a run is expected to learn: the rule's parts by hand, and what a run says of itself."""

import dataclasses
import json

import numpy as np
import pytest

from model.training import expectation
from model.training.expectation import Outlook, compressed_bits_per_byte, unigram_bits_per_byte, worth
from model.training.hints import behind_line, by_heart_line
from model.training.progress import Progress
from model.training.report import describe, dry_run
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests.tiny_runs import train

DEMO = Outlook(3.36, 2_852_544, 3_000_000, 1_200_000)


def test_frequencies_alone_cost_their_entropy():
    ids = np.array([[3, 4, 3, 4], [3, 4, 3, 4]])
    lengths, is_text = np.array([0, 0, 0, 1, 3]), np.array([False, False, False, True, True])
    assert unigram_bits_per_byte(ids, lengths, is_text) == pytest.approx(1 / 2)  # a bit for each token of two bytes
    with_control = np.array([1, 3, 4, 3])  # 1 is not text: its bits are not counted, but the others get rarer
    expected = (2 * 1 + 2) / (1 + 3 + 1)  # two tokens with a share of 1/2, one with 1/4
    assert unigram_bits_per_byte(with_control, lengths, is_text) == pytest.approx(expected)


def test_a_text_that_repeats_itself_is_packed_tighter():
    lengths, is_text = np.array([0, 3, 3, 3, 3]), np.array([False, True, True, True, True])
    ids = np.random.default_rng(0).integers(1, 5, 6000)
    found = compressed_bits_per_byte(ids, lengths, is_text)
    assert 2 / 3 < found < 1  # two bits a token of three bytes, and what bzip2 adds
    assert compressed_bits_per_byte(np.tile(ids[:60], 100), lengths, is_text) < found / 10


def test_reading_again_teaches_less_each_time():
    assert worth(500, 1000) == 500 and worth(1000, 1000) == 1000
    gains = np.diff([worth(passes * 1000, 1000) for passes in range(1, 60)])
    assert (gains > 0).all() and (np.diff(gains) < 0).all() and gains[0] < 1000
    assert worth(10**9, 1000) == pytest.approx(1000 * (1 + expectation.WORTH_OF_PASSES))


def test_more_tokens_and_more_parameters_are_expected_to_learn_more():
    def middle(**changes) -> float:
        return dataclasses.replace(DEMO, **changes).at_end.middle

    assert middle(total_tokens=3_000_000) < middle() < middle(total_tokens=600_000)
    assert middle(parameters=10_000_000) < middle() < middle(parameters=1_000_000)
    assert middle(optimizer_type="adamw") > middle()
    assert middle(text_bits=2 * DEMO.text_bits) == pytest.approx(2 * middle())
    assert DEMO.after(300_000).middle > DEMO.at_end.middle


def test_the_range_widens_outside_of_what_was_measured():
    def width(outlook: Outlook) -> float:
        return outlook.at_end.high / outlook.at_end.low

    inside, outside = width(DEMO), width(dataclasses.replace(DEMO, parameters=100_000_000))
    assert inside == pytest.approx((1 + expectation.SPREAD) ** 2)
    assert outside == pytest.approx((1 + expectation.SPREAD + expectation.SPREAD_BEYOND) ** 2)


@pytest.fixture
def plan(flags, tmp_path, monkeypatch):
    """Of a run from 1M parameters on, which the rule knows."""
    monkeypatch.setattr(expectation, "FEWEST_TOKENS", 1e4)
    wide = {"dim": 256, "n_layers": 2, "max_steps": 300, "eval_steps": 1, "optimizer_type": "muon"}
    return Trainer(build_settings({}, flags(**wide))).plan


def test_a_run_says_what_it_is_expected_to_reach(plan):
    told = f"{plan.outlook.at_end} bits per byte of held-out text at the end"
    assert any(line.startswith(f"expected: {told}") for line in describe(plan))
    lines = dry_run(plan, lambda seconds, steps: 1000.0)
    assert any(line.startswith("expected") and told in line for line in lines)


def test_a_run_that_falls_behind_is_told_what_usually_causes_it(plan):
    total = plan.outlook.total_tokens
    high = plan.outlook.after(total // 2).high
    progress = Progress(step=200)
    assert behind_line(plan, progress, total // 2, high - 0.01) is None
    assert behind_line(plan, progress, total // 10, 99.0) is None  # too early to be judged
    slow = dataclasses.replace(plan, training=dataclasses.replace(plan.training, learning_rate=1e-6))
    line = behind_line(slow, progress, total // 2, high + 0.01)
    assert line.startswith("step 200: ") and "the learning rate, 1e-06 where auto gives " in line
    assert "learning rate" not in behind_line(plan, progress, total // 2, high + 0.01)  # 3e-3 is near to auto's


def test_of_very_few_tokens_and_of_other_sizes_the_rule_says_nothing():
    assert DEMO.is_known and dataclasses.replace(DEMO, total_tokens=100_000).is_known
    assert not dataclasses.replace(DEMO, total_tokens=20_000).is_known
    assert not dataclasses.replace(DEMO, parameters=10**11).is_known


def test_too_many_passes_for_so_many_parameters_are_told_at_the_start(flags, token_file, tmp_path):
    ids = np.fromfile(token_file, dtype="<u2")
    ids[:4097].tofile(tmp_path / "few.bin")
    options = {"train_data_path": tmp_path / "few.bin", "dim": 64, "max_steps": None, "batch_size": 8}
    for epochs in (2, 3):
        plan = Trainer(build_settings({}, flags(**options, epochs=epochs))).plan
        assert plan.active_parameters > 10 * plan.train_samples * plan.config.max_seq_len
        lines = [line for line in describe(plan) if line.startswith("expected: in 3.0 passes, ")]
        assert plan.by_heart == (epochs == 3) == (len(lines) == 1)
    assert plan.outlook is None and "by heart; at most 2 passes (epochs), more text" in lines[0]


def test_a_text_learned_by_heart_is_told_in_later_passes_alone(plan):
    again = Progress(step=300, samples=int(2.5 * plan.order.per_epoch), best_val_loss=4.0)
    assert by_heart_line(plan, again, 4.07) is None
    line = by_heart_line(plan, again, 4.1)
    assert line.startswith("step 300: after 2.5 passes over the text the validation loss rises (4.0000 to 4.1000)")
    assert by_heart_line(plan, dataclasses.replace(again, samples=plan.order.per_epoch), 9.0) is None


@pytest.mark.long
def test_a_run_that_reads_little_text_often_says_once_what_that_does(flags, token_file, tmp_path, capfd):
    ids = np.fromfile(token_file, dtype="<u2")
    ids[:1025].tofile(tmp_path / "few.bin")
    ids[5000:7000].tofile(tmp_path / "others.bin")
    files = {"train_data_path": tmp_path / "few.bin", "val_data_path": tmp_path / "others.bin"}
    options = {"max_steps": None, "epochs": 40, "batch_size": 4, "eval_interval": 40, "learning_rate": 0.01}
    train(flags(**files, **options))
    assert capfd.readouterr().err.count("it is being learned by heart. Fewer epochs") == 1


def test_each_evaluation_says_what_others_had_and_being_behind_is_said_once(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(expectation, "MEASURED_PARAMETERS", (1e3, 1e7))
    monkeypatch.setattr(expectation, "MEASURED_TOKENS", (1e2, 1e7))
    monkeypatch.setattr(expectation, "FEWEST_TOKENS", 1e2)
    monkeypatch.setattr(expectation, "share_of_text_bits", lambda parameters, tokens: 0.01)  # no run learns as much
    train(flags(learning_rate=1e-6))
    assert capfd.readouterr().err.count("what usually causes it: the learning rate, 1e-06 where auto gives") == 1
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if "bits_per_byte" in event]
    assert len(evaluations) == 3
    assert all(event["expected_bits_low"] < event["expected_bits_high"] for event in evaluations)


def test_weights_that_were_trained_before_are_not_judged_by_the_rule(flags, tmp_path):
    first = train(flags(max_steps=2, eval_interval=2, save_interval=2))
    again = flags(init_from=tmp_path / "out" / first.final_name, out_dir=tmp_path / "again")
    shape = ("dim", "n_layers", "n_heads", "n_kv_heads")
    trainer = Trainer(build_settings({}, {name: value for name, value in again.items() if name not in shape}))
    assert trainer.plan.outlook is None and not any("expected" in line for line in describe(trainer.plan))

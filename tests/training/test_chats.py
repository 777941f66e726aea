"""Tuning on chats: what a user does, and what must come of it."""

import json

import numpy as np
import pytest
import torch

from model.dataset import PretrainDataset
from model.loss import IGNORE_INDEX
from model.storage.archive import load_torch
from model.text.tokenization import load_tokenizer, tokenizer_sha256
from tests.chat_files import CHATS, ids_of, write_chats
from tests.conftest import random_model
from tests.tiny_runs import events, train

LONG = [("user", "长江、黄河都在中国。" * 9), ("assistant", "好")]
CONTEXT = 96


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory, tokenizer_folder):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.bin", [*CHATS, LONG], tokenizer_folder)


@pytest.fixture
def chat_flags(flags, chat_file):
    """The flags of a tiny run on chats."""

    def build(**changes):
        return flags(**{"train_data_path": chat_file, "max_seq_len": CONTEXT} | changes)

    return build


@pytest.fixture
def dataset(chat_file, tokenizer_folder):
    return PretrainDataset(chat_file, CONTEXT, 300, tokenizer_sha256(tokenizer_folder))


def test_samples_hold_whole_chats_and_predict_the_learned_tokens_only(dataset, tokenizer):
    assert len(dataset.chats) == len(CHATS) and dataset.chats.too_long == 1
    samples = np.arange(len(dataset))
    inputs, targets = dataset.batch(samples, rows=len(dataset))
    numbers = dataset.number_runs(samples, rows=len(dataset))
    assert (numbers.diff(dim=1) >= 0).all()
    expected = sorted(tuple(ids_of(tokenizer, chat)[0]) for chat in CHATS)
    learned = {tuple(ids): flags for ids, flags in (ids_of(tokenizer, chat) for chat in CHATS)}
    found = []
    for sample, row in enumerate(targets.tolist()):
        place = 0
        for number, (start, length) in enumerate(dataset._runs(sample)):
            ids = tuple(dataset.tokens[start : start + length].tolist())
            found.append(ids)
            read = min(length, CONTEXT - place)
            assert inputs[sample, place : place + read].tolist() == list(ids[:read])
            assert (numbers[sample, place : place + length] == number).all()
            pairs = zip(ids[1:], learned[ids][1:], strict=True)
            assert row[place : place + length - 1] == [index if flag else IGNORE_INDEX for index, flag in pairs]
            place += length
        assert all(target == IGNORE_INDEX for target in row[place - 1 :])
    assert sorted(found) == expected
    count = sum(sum(ids_of(tokenizer, chat)[1]) for chat in CHATS)
    assert dataset.count_targets(samples) == (targets != IGNORE_INDEX).sum() == count
    assert dataset.packing.tokens.mean() > 0.8 * CONTEXT


def test_held_out_chats_are_whole_and_not_trained_on(dataset):
    before = dataset.count_targets(np.arange(len(dataset)))
    training, held_out = dataset.hold_out()
    assert dataset.held_out_chats == 1 and len(held_out) == 1
    assert sorted([*training, *held_out]) == list(range(len(dataset)))
    assert dataset.count_targets(training) + dataset.count_targets(held_out) == before


def test_packed_chats_give_the_loss_and_gradients_of_each_alone(dataset, tiny_config):
    tiny_config.max_seq_len = CONTEXT
    model = random_model(tiny_config)
    samples = np.arange(len(dataset))
    inputs, targets = dataset.batch(samples, rows=len(dataset))
    loss = model(inputs, targets, documents=dataset.number_runs(samples, rows=len(dataset)))
    loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = 0.0
    for begin, length in zip(dataset.chats.begins, dataset.chats.lengths, strict=True):
        ids = torch.from_numpy(dataset.tokens[begin : begin + length].astype(np.int64))
        learned = torch.from_numpy(dataset.chats.learned[begin + 1 : begin + length] == 1)
        one = model(ids[None, :-1], ids[None, 1:].where(learned, IGNORE_INDEX))
        one.backward()
        alone += float(one.detach())
    assert float(loss.detach()) == pytest.approx(alone, rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (packed[name] - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_a_run_leaves_a_chat_model(chat_flags, tmp_path, tokenizer_folder, capfd):
    assert train(chat_flags(max_steps=4)).outcome == "finished"
    out = tmp_path / "out"
    assert (out / "sft_32.pth").exists() and not list(out.glob("pretrain_*"))
    for name in ("sft_32", "best_model"):
        chat = json.loads((out / f"{name}.json").read_text())["chat"]
        assert chat["end_ids"] == [2] and chat["template"] == load_tokenizer(tokenizer_folder).get_chat_template()
    assert load_torch(out / "checkpoint_step_4.pth")["chat"] == chat
    said = capfd.readouterr().err
    assert "150 chats with 200 answers" in said and "are learned" in said
    assert "left out: 1 longer than max_seq_len + 1 = 97 tokens" in said
    assert "1 of 150 chats are held out" in said
    assert 0 < [event for event in events(out) if "bits_per_byte" in event][-1]["bits_per_byte"] < 30

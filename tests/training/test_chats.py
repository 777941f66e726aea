"""Tuning on chats: what a user does, and what must come of it."""

import json

import numpy as np
import pytest
import torch

from model.dataset import PretrainDataset
from model.loss import IGNORE_INDEX
from model.storage.archive import load_torch
from model.text.tokenization import load_tokenizer, tokenizer_sha256
from model.token_file.manifest import ends_path, learn_path, manifest_path
from model.training.config_file import read_config
from model.training.settings import build_settings
from model.weights import load_weights
from optimized_pretrain import Trainer
from tests.chat_files import CHATS, ids_of, write_chats, write_pairs
from tests.conftest import ROOT, random_model
from tests.tiny_runs import (
    assert_a_killed_run_resumes,
    assert_equal,
    assert_two_processes_resume,
    events,
    exit_code_here,
    losses,
    mostly,
    refused,
    train,
    two_ranks,
)
from utils import Processes

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


@pytest.mark.long
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
    training = training.numbers()
    assert len(dataset.held_out_chats) == 1 and len(held_out) == 1
    assert sorted([*training, *held_out]) == list(range(len(dataset)))
    assert dataset.count_targets(training) + dataset.count_targets(held_out) == before


@pytest.mark.long
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


# ---------------------------------------------------------------------------------------------- stopping and resuming

RESUMED = {
    "bfloat16, averaged": {"dtype": "bfloat16", "use_ema": "true", "dropout": 0.1, "accumulation_steps": 2},
    "Muon across epochs": {"optimizer_type": "muon", "batch_size": 16, "lr_scheduler": "linear"},
    "texts mixed in": {"mix_share": 0.3, "optimizer_type": "muon", "batch_size": 7},
}


def options_of(case, token_file):
    return RESUMED[case] | ({"mix_data_path": token_file} if "texts" in case else {})


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(RESUMED, ("bfloat16, averaged", "Muon across epochs")))
def test_a_killed_run_resumes_and_ends_with_the_same_bits(chat_flags, tmp_path, case, token_file, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    assert_a_killed_run_resumes(chat_flags, tmp_path, "sft_32", **options_of(case, token_file))


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits(chat_flags, tmp_path):
    options = {"batch_size": 2, "accumulation_steps": 2, "dropout": 0.1, "use_ema": "true", "dtype": "bfloat16"}
    assert_two_processes_resume(chat_flags, tmp_path, **options)


@pytest.mark.long
@pytest.mark.parametrize("mixed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_accumulation_and_two_processes_compute_what_one_batch_does(chat_flags, tmp_path, token_file, mixed):
    options = {"dtype": "float32"} | ({"mix_data_path": token_file, "mix_share": 0.3} if mixed else {})
    train(chat_flags(batch_size=8, out_dir=tmp_path / "one", **options))
    train(chat_flags(batch_size=2, accumulation_steps=4, out_dir=tmp_path / "four", **options))
    result = two_ranks(chat_flags(batch_size=4, out_dir=tmp_path / "two", **options))
    assert result.returncode == 0, result.stderr
    for name in ("four", "two"):
        assert dict(losses(tmp_path / name)) == pytest.approx(dict(losses(tmp_path / "one")), abs=1e-5)
    evaluated = [[e["val_loss"] for e in events(tmp_path / name) if "val_loss" in e] for name in ("one", "two")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)


@pytest.mark.long
def test_a_run_that_resumes_is_judged_with_its_checkpoints_settings(chat_flags, tmp_path, token_file, capfd):
    train(chat_flags(mix_data_path=token_file, mix_share=0.3, max_steps=4, save_interval=2))
    resumed = {"out_dir": str(tmp_path / "out"), "max_steps": "5"}
    for alone, merged in (  # both contradict the defaults: mix_data_path null, learning_rate 3e-4
        ({"mix_share": "0.4"}, "was made with other data: mix_share 0.3 there, 0.4 here"),
        ({"min_lr": "0.01"}, "min_lr: 0.01 is above learning_rate 0.003"),
    ):
        assert merged in refused(resumed | alone, capfd, "--resume")
    assert exit_code_here(resumed | {"mix_share": "0.3", "min_lr": "0.001"}, "--resume") == 0
    assert "mix_share: 0.3 of no texts" in refused({"mix_share": "0.3", "out_dir": str(tmp_path / "new")}, capfd)


def test_what_is_forgotten_is_measured_before_tuning_and_at_each_evaluation(chat_flags, tmp_path, token_file):
    trainer = train(chat_flags(mix_data_path=token_file, mix_share=0.3, max_steps=4, dtype="float32"))
    found = [event for event in events(tmp_path / "out") if "text_bits_per_byte" in event]
    assert [event["step"] for event in found] == [0, 4] and "val_loss" not in found[0]
    held_out = trainer.data.held_out_texts
    texts = trainer.data.sources[1].samples.numbers() - len(trainer.data.train.parts[0])
    assert sorted([*held_out, *texts]) == [*range(len(trainer.data.texts))]
    inputs, targets = trainer.data.texts.batch(held_out, rows=len(held_out))
    with torch.no_grad():
        loss = float(trainer.model(inputs, targets)) / targets.numel()
    assert found[-1]["text_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.long
def test_a_restart_before_the_first_checkpoint_begins_with_the_same_weights(flags, chat_flags, tmp_path):
    out = tmp_path / "out"
    train(flags(max_steps=4, max_seq_len=CONTEXT))
    before = load_torch(out / "best_model.pth")
    options = {"init_from": out / "best_model.pth", "max_steps": 4}
    train(chat_flags(**options))
    (out / "checkpoint_step_4.pth").unlink()  # as if it had been killed after an evaluation, before the first save
    restarted = Trainer(build_settings({}, chat_flags(resume="true", **options)), Processes())
    assert_equal(dict(before), {name: weight.clone() for name, weight in restarted.model.state_dict().items()})


@pytest.mark.long
def test_tuned_weights_know_as_long_texts_as_before_whatever_the_samples_are(flags, chat_flags, tmp_path, capfd):
    train(flags(max_steps=4, max_seq_len=CONTEXT, eval_interval=4))
    known = {"init_from": tmp_path / "out" / "best_model.pth", "out_dir": tmp_path / "tuned", "max_steps": 12}
    train(chat_flags(max_seq_len=80, **known))
    assert load_weights(tmp_path / "tuned" / "checkpoint_step_12.pth").config.max_seq_len == CONTEXT
    (tmp_path / "tuned" / "checkpoint_step_12.pth").unlink()
    (tmp_path / "tuned" / "sft_32.pth").unlink()
    train(chat_flags(max_seq_len=80, resume="true", **known))
    assert load_weights(tmp_path / "tuned" / "sft_32.pth").config.max_seq_len == CONTEXT
    assert "validation loss" in capfd.readouterr().err.split("before training: ")[1]
    assert [event["step"] for event in events(tmp_path / "tuned") if "val_loss" in event] == [0, 4, 8, 12]


@pytest.mark.long
def test_a_run_whose_samples_were_cut_to_what_the_weights_know_resumes_with_the_same_settings(
    flags, chat_flags, tmp_path, capfd
):
    train(flags(max_steps=4, max_seq_len=CONTEXT))
    about = {"init_from": tmp_path / "out" / "best_model.pth", "out_dir": tmp_path / "tuned", "max_seq_len": 512}
    train(chat_flags(max_steps=4, **about))
    assert f"max_seq_len {CONTEXT}: what these weights know" in capfd.readouterr().err
    assert train(chat_flags(max_steps=8, resume="true", **about)).progress.step == 8


# ---------------------------------------------------------------------------------------------------------- bad input


def damage(path, place, value):
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda path: learn_path(path).unlink(), "chats.learn: no such file"),
        (lambda path: ends_path(path).unlink(), "chats.ends: no such file"),
        (lambda path: learn_path(path).write_bytes(b"\1"), "1 bytes, "),
        (lambda path: damage(learn_path(path), 3, 7), "7 at token 3, 0 or 1 expected"),
        (lambda path: damage(learn_path(path), 3, 1), "changed since its manifest was made"),
        (lambda path: damage(ends_path(path), 0, 255), "not where the chats of"),
        (lambda path: damage(ends_path(path), 0, 3), "chats.ends: changed since its manifest was made"),
        (lambda path: manifest_path(path).unlink(), "chats.json: is missing, but"),
        (
            lambda path: manifest_path(path).write_text(manifest_path(path).read_text().replace('"chat"', '"old"')),
            "chats.json: describes texts, but",
        ),
    ],
)
def test_a_damaged_chat_file_is_one_line(chat_flags, tmp_path, tokenizer_folder, capfd, harm, expected):
    path = write_chats(tmp_path / "chats.bin", CHATS[:12], tokenizer_folder)
    harm(path)
    assert expected in refused(chat_flags(train_data_path=path), capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_chats_that_teach_no_answer_are_refused(chat_flags, tmp_path, tokenizer_folder, capfd):
    path = write_chats(tmp_path / "chats.bin", CHATS[:12], tokenizer_folder, end_ids=[7])
    assert "no chat has a learned token that ends an answer (ids 7)" in refused(chat_flags(train_data_path=path), capfd)
    path = write_chats(tmp_path / "other.bin", CHATS[:12], tokenizer_folder, template_sha256="0" * 64)
    assert "made with another chat template (sha256 000000000000…" in refused(chat_flags(train_data_path=path), capfd)
    assert "none of its 151 chats fits a sample of max_seq_len + 1 = 9" in refused(chat_flags(max_seq_len=8), capfd)


def test_texts_and_chats_are_not_mistaken_for_each_other(flags, chat_flags, chat_file, token_file, capfd):
    assert "holds texts, train_data_path" in refused(chat_flags(val_data_path=token_file), capfd)
    assert "holds chats, train_data_path" in refused(flags(val_data_path=chat_file), capfd)
    assert "holds chats, a token file of texts expected" in refused(chat_flags(mix_data_path=chat_file), capfd)
    assert "texts are mixed into chats" in refused(flags(mix_data_path=token_file), capfd)


@pytest.mark.parametrize("kind", ["texts", "chats", "pairs"])
@pytest.mark.parametrize("held", ["texts", "chats", "pairs"])
def test_a_token_file_of_another_kind_than_the_config_expects_is_refused(
    flags, tmp_path, chat_file, token_file, tokenizer_folder, capfd, kind, held
):
    pairs = write_pairs(
        tmp_path / "pairs.bin", [(CHATS[2], [*CHATS[2][:-1], ("assistant", "b")])] * 9, tokenizer_folder
    )
    path = {"texts": token_file, "chats": chat_file, "pairs": pairs}[held]
    options = flags(train_data_path=path, train_data_kind=kind, max_seq_len=CONTEXT, dpo_beta=0.2)
    said = refused(options, capfd)  # in any case: the beta of no pairs, or pairs without weights
    if held == kind:
        assert "init_from: null" in said if held == "pairs" else "dpo_beta: 0.2 is of pairs, but" in said
    else:
        assert f"{path} holds {held}, but train_data_kind is {kind}; make it of {kind} (python optimized_data" in said
        assert f"or set train_data_kind to {held} or null" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kind"), [("chat", "chats"), ("demo_chat", "chats"), ("dpo", "pairs")])
def test_the_config_files_for_chats_and_pairs_expect_them(name, kind):
    assert read_config(ROOT / f"config_{name}.yaml")["data"]["train_data_kind"] == kind


def test_a_missing_token_file_is_made_of_the_kind_that_is_expected(flags, tmp_path, tokenizer_folder, capfd):
    made, raw = tmp_path / "made.bin", tmp_path / "raw.jsonl"
    options = flags(train_data_path=made, train_data_kind="chats")
    assert f"--output_path {made} --format chat" in refused(options, capfd)
    raw.write_text('{"text": "x", "prompt": "q", "completion": "a"}\n')  # texts, if nothing else is said
    said = refused(options | {"raw_data_path": str(raw), "dpo_beta": "0.2"}, capfd)
    assert f"train_data_path {made} holds chats" in said


def test_a_file_beside_a_token_file_is_not_taken_for_it(chat_flags, chat_file, capfd):
    for path in (learn_path(chat_file), ends_path(chat_file)):
        said = refused(chat_flags(val_data_path=path), capfd)
        assert f"val_data_path: {path} lies beside a token file; give that, {chat_file}" in said


def test_texts_to_mix_in_that_are_missing_are_refused_with_what_to_do(chat_flags, tmp_path, capfd):
    assert "mix_share: 0.3 of no texts; set mix_data_path" in refused(chat_flags(mix_share=0.3), capfd)
    missing = tmp_path / "none.bin"
    for name in ("mix_data_path", "val_data_path"):
        said = refused(chat_flags(**{name: missing}), capfd)
        assert said.startswith(f"error: {name}: {missing}: no such token file; make it with: python optimized_data")
        assert f"--input_path YOUR.jsonl --output_path {missing}" in said


@pytest.mark.long
def test_a_run_says_that_texts_given_to_tune_on_are_no_chats(flags, chat_flags, tmp_path, capfd):
    train(flags(max_steps=2, max_seq_len=CONTEXT, eval_interval=2, save_interval=2))
    assert "not chats" not in capfd.readouterr().err
    about = {"init_from": tmp_path / "out" / "best_model.pth", "max_steps": 2, "out_dir": tmp_path / "tuned"}
    train(flags(max_seq_len=CONTEXT, **about))
    assert "holds texts, not chats: all tokens are learned, and the model continues texts" in capfd.readouterr().err
    train(chat_flags(document_mask="false", **about | {"out_dir": tmp_path / "chat"}))
    assert "hidden from each other, whatever document_mask is" in capfd.readouterr().err


def test_a_checkpoint_of_texts_is_not_resumed_on_chats(flags, chat_flags, tmp_path, capfd):
    train(flags(max_steps=4, max_seq_len=CONTEXT))
    assert "was made with other data" in refused(chat_flags(resume="true"), capfd)

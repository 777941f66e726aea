"""Preference tuning: the loss against a few lines of plain torch, the reference, resuming, and what a user sees."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import accelerator
from model.dataset import PretrainDataset
from model.LMConfig import LMConfig
from model.runs.beginning import find_beginning
from model.text.tokenization import tokenizer_sha256
from model.token_file.manifest import read_manifest, write_manifest
from model.training.preferences import Preference
from model.training.reference import ReferenceFile, answers_of, weights_sha256
from model.training.settings import build_settings
from model.weights import Weights, load_weights, save_weights
from model.weights.find import find_weights
from optimized_pretrain import Trainer
from tests.chat_files import CHATS, write_chats, write_pairs
from tests.conftest import random_model
from tests.fake_graph import FakeGraph
from tests.tiny_runs import (
    assert_a_killed_run_resumes,
    assert_two_processes_resume,
    events,
    losses,
    mostly,
    refused,
    train,
    two_ranks,
)
from utils import Processes

CONTEXT = 256
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
PAIRS = [(chat, [*chat[:-1], ("assistant", f"{chat[-1][1]}河{n % 5}")]) for n, chat in enumerate(CHATS)]
BETA = 0.3


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory, tokenizer_folder):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.bin", PAIRS, tokenizer_folder)


def save_model(path, seed: int, tokenizer_folder):
    """Weights that write quite different texts, since they are large, as a file."""
    model = random_model(LMConfig(**SHAPE, vocab_size=300, max_seq_len=CONTEXT), seed)
    sha256 = tokenizer_sha256(tokenizer_folder)
    save_weights(path, Weights(model.state_dict(), model.config, str(tokenizer_folder), sha256))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    return save_model(tmp_path_factory.mktemp("base") / "base.pth", 0, tokenizer_folder)


@pytest.fixture
def pair_flags(flags, pair_file, base, tmp_path):
    """The flags of a tiny run on pairs, a copy of them in `tmp_path`, that begins with `base`."""
    for path in pair_file.parent.glob("pairs.*"):
        if "reference" not in path.name:
            shutil.copy(path, tmp_path / path.name)

    def build(**changes):
        given = {"train_data_path": tmp_path / "pairs.bin", "max_seq_len": CONTEXT, "init_from": base}
        given |= {"dpo_beta": BETA, "learning_rate": 1e-3, "dtype": "float32"}
        return {name: value for name, value in flags(**given | changes).items() if name not in SHAPE}

    return build


@pytest.fixture
def dataset(pair_file, tokenizer_folder):
    return PretrainDataset(pair_file, CONTEXT, 300, tokenizer_sha256(tokenizer_folder))


def references(tmp_path):
    return sorted(tmp_path.glob("pairs.reference_*.npz"))


# --------------------------------------------------------------------------------------------------------- the numbers


def documents_of(dataset):
    """Ids of each document of the token file, and which of them are learned."""
    ends = np.fromfile(dataset.path.with_suffix(".ends"), "<u8").astype(np.int64)[:-1]
    ids, learned = (np.split(np.asarray(array), ends) for array in (dataset.tokens, dataset.chats.learned))
    return [(torch.from_numpy(one.astype(np.int64)), flags) for one, flags in zip(ids, learned, strict=True)]


def log_probability(model, ids, flags):
    """Of the learned tokens of one document alone, token by token from the logits."""
    logits = model(ids[None, :-1])[0].log_softmax(-1)
    return sum(logits[place - 1, ids[place]] for place in range(1, len(ids)) if flags[place])


@pytest.mark.long
def test_loss_and_gradients_are_those_of_each_pair_alone(dataset):
    config = LMConfig(**SHAPE, vocab_size=300, max_seq_len=CONTEXT)
    model, reference = random_model(config, 1), random_model(config, 0)
    documents = documents_of(dataset)
    with torch.no_grad():
        expected = [float(log_probability(reference, *document)) for document in documents]
        mine = ReferenceFile(dataset, "0" * 64, torch.float32).compute(reference, 3, torch.no_grad(), lambda: None)
    np.testing.assert_allclose(mine, expected, rtol=1e-5)

    chosen = [log_probability(model, *document) for document in documents[::2]]
    rejected = [log_probability(model, *document) for document in documents[1::2]]
    pairs = zip(chosen, expected[::2], rejected, expected[1::2], strict=True)
    margins = torch.stack([BETA * ((c - rc) - (r - rr)) for c, rc, r, rr in pairs])
    loss = -torch.log(1 / (1 + torch.exp(-margins.double()))).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    samples = np.arange(len(dataset))
    objective = Preference(len(samples), BETA, torch.device("cpu"), {dataset.path: mine})
    assert objective.count(dataset, samples) == len(PAIRS)
    found = objective.loss(model, objective.read(dataset, samples))
    found[0].backward()
    margins, accuracy, loss = margins.detach(), float((margins > 0).sum()), loss.detach()
    chosen = [value.detach() for value in chosen]
    assert 0 < accuracy < len(PAIRS)
    assert found.tolist() == pytest.approx([float(loss), float(margins.sum()), accuracy, float(sum(chosen))], rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()

    sums = objective.measure(model, [objective.read(dataset, samples)], torch.no_grad(), lambda: False)
    means, tokens = objective.means(sums), sum(int(flags[1:].sum()) for _, flags in documents[::2])
    assert means["val_loss"] == pytest.approx(float(loss) / len(PAIRS), rel=1e-5)
    assert means["val_chosen_log_probability_per_token"] == pytest.approx(float(sum(chosen)) / tokens, rel=1e-5)


def test_answers_see_nothing_but_their_own_chat(dataset):
    """Whatever else is in a sample, a pair's numbers stay the same: padding rows and columns count nothing either."""
    model = random_model(LMConfig(**SHAPE, vocab_size=300, max_seq_len=CONTEXT), 1)
    values = np.zeros(2 * len(PAIRS))
    whole, one = (Preference(rows, BETA, torch.device("cpu"), {dataset.path: values}) for rows in (4, 1))
    samples = np.arange(3)
    together = whole.loss(model, whole.read(dataset, samples))
    apart = sum(one.loss(model, one.read(dataset, samples[n : n + 1])) for n in range(3))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert whole.loss(model, whole.read(dataset, samples[:0]))[0] == 0


def test_pairs_are_packed_whole_and_held_out_whole(dataset):
    for sample in range(len(dataset)):
        numbers = answers_of(dataset, np.array([sample]), 1)[0]
        numbers = numbers[numbers >= 0]
        assert len(numbers) % 2 == 0 and (numbers[::2] % 2 == 0).all() and (numbers[1::2] == numbers[::2] + 1).all()
        assert sum(length for _, length in dataset._runs(sample)) <= CONTEXT + 1
    training, held_out = dataset.hold_out()
    found = [
        set(answers_of(dataset, samples, len(samples)).ravel()) - {-1} for samples in (training.numbers(), held_out)
    ]
    assert not found[0] & found[1] and found[0] | found[1] == set(range(2 * len(PAIRS)))
    assert found[1] == {198, 199}  # the hundredth pair
    assert dataset.chats.chosen(dataset.held_out_chats).tolist() == [198]


def test_a_pair_too_long_together_is_left_out_whole(tmp_path, tokenizer_folder, capfd):
    long = [[("user", "你好"), ("assistant", "长江、黄河都在中国。" * n)] for n in (4, 9)]
    path = write_pairs(tmp_path / "pairs.bin", [PAIRS[2], tuple(long), PAIRS[5]], tokenizer_folder)
    lengths = np.diff(np.fromfile(path.with_suffix(".ends"), "<u8"), prepend=0)
    context = int(lengths[3])  # the rejected answer alone would fit
    found = PretrainDataset(path, context, 300)
    assert len(found.chats) == 2 and found.chats.too_long == 1 and found.chats.numbers.tolist() == [0, 1, 4, 5]


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_losses_by_token_are_the_same_compiled_and_sum_up(tiny_config, tied):
    model = random_model(dataclasses.replace(tiny_config, tie_embeddings=tied)).train()
    tokens, targets = torch.randint(0, 300, (2, 2, 100), generator=torch.Generator().manual_seed(1))
    targets[:, ::3] = -100
    each = model(tokens, targets, per_token=True)
    assert each.shape == targets.shape and (each[targets < 0] == 0).all()
    torch.testing.assert_close(each.sum(), model(tokens, targets))
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 100)
    torch.testing.assert_close(each, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, targets, per_token=True)
    torch.testing.assert_close(compiled, each)
    none = model(tokens, torch.full_like(targets, -100), per_token=True)
    none.sum().backward()
    assert none.sum() == 0 and all((p.grad == 0).all() for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.long
def test_a_run_learns_to_prefer_and_leaves_a_chat_model(pair_flags, tmp_path, capfd, monkeypatch):
    assert train(pair_flags(max_steps=24)).outcome == "finished"
    out, said = tmp_path / "out", capfd.readouterr().err
    evaluated = [event for event in events(out) if "val_loss" in event]
    assert evaluated[-1]["val_loss"] < 0.6 < np.log(2) and evaluated[-1]["val_accuracy"] == 1
    assert evaluated[-1]["val_margin"] > evaluated[1]["val_margin"] > 0
    assert evaluated[0]["step"] == 0 and evaluated[0]["val_margin"] == pytest.approx(0, abs=1e-4)  # before training
    per_token = evaluated[-1]["val_chosen_log_probability_per_token"]
    assert evaluated[-1]["val_chosen_log_probability"] < per_token < 0
    logged = [event for event in events(out) if "loss" in event]
    assert logged[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and logged[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert logged[-1]["accuracy"] > 0.9 and logged[-1]["chosen_log_probability"] < 0
    assert "150 pairs with 300 answers" in said and "1 of 150 pairs are held out" in said
    assert "100.0% of the chosen answers above the rejected ones, margin" in said
    assert (out / "dpo_32.pth").exists() and not [*out.glob("sft_*"), *out.glob("pretrain_*")]
    assert json.loads((out / "dpo_32.json").read_text(encoding="utf-8"))["chat"]["end_ids"] == [2]
    assert find_weights(out)[0] == out / "dpo_32.pth"
    train(pair_flags(max_steps=2))  # moves what is there out of the way
    assert len([*out.glob("previous/*/dpo_32.pth")]) == 1


def test_a_step_on_pairs_is_not_captured(pair_flags, monkeypatch, capfd):
    monkeypatch.setenv("MATECONV_RUN_AHEAD", "1")
    monkeypatch.setitem(accelerator.GRAPHS, "cpu", FakeGraph)
    assert Trainer(build_settings({}, pair_flags()), Processes()).stepper.graph is None
    assert "cuda_graph false (auto): the loss of pairs takes the learned tokens alone" in capfd.readouterr().err


RESUMED = {
    "bfloat16, averaged": {"dtype": "bfloat16", "use_ema": "true", "dropout": 0.1, "accumulation_steps": 2},
    "Muon, adapters": {"optimizer_type": "muon", "batch_size": 7, "lora_rank": 4},
}


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(RESUMED, ("bfloat16, averaged",)))
def test_a_killed_run_resumes_and_ends_with_the_same_bits(pair_flags, tmp_path, case, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")

    def lose_the_reference():  # it is computed again, the same to the last bit
        if "adapters" in case:
            references(tmp_path)[0].unlink()

    assert_a_killed_run_resumes(pair_flags, tmp_path, "dpo_32", lose_the_reference, **RESUMED[case])


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits(pair_flags, tmp_path):
    assert_two_processes_resume(pair_flags, tmp_path, batch_size=2, accumulation_steps=2, use_ema="true")


@pytest.mark.long
def test_accumulation_and_two_processes_compute_what_one_batch_does(pair_flags, tmp_path):
    train(pair_flags(batch_size=8, out_dir=tmp_path / "one"))
    train(pair_flags(batch_size=2, accumulation_steps=4, out_dir=tmp_path / "four"))
    for path in references(tmp_path):
        path.unlink()  # rank 0 computes it for both
    result = two_ranks(pair_flags(batch_size=4, out_dir=tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("reference: computing") == 1 and len(references(tmp_path)) == 1
    for name in ("four", "two"):
        assert dict(losses(tmp_path / name)) == pytest.approx(dict(losses(tmp_path / "one")), abs=1e-5)
    kinds = ("val_loss", "val_margin", "val_accuracy", "margin", "accuracy", "chosen_log_probability")
    for kind in kinds:
        found = [[e[kind] for e in events(tmp_path / name) if kind in e] for name in ("one", "four", "two")]
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4) == found[2]


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.long
def test_the_reference_is_read_again_and_made_anew_for_other_weights_or_data(
    pair_flags, tmp_path, tokenizer_folder, capfd
):
    def begin(**changes) -> str:
        Trainer(build_settings({}, pair_flags(**changes)), Processes())
        said = capfd.readouterr().err
        assert ("reference: computing" in said) != (said.count("reference: ") == 1), said
        return "computed" if "computing" in said else "read"

    assert begin() == "computed" and begin() == "read"
    [first] = references(tmp_path)
    content = first.read_bytes()
    other = save_model(tmp_path / "other.pth", 5, tokenizer_folder)
    assert begin(init_from=other) == "computed" and begin(init_from=other) == "read" and begin() == "read"
    assert len(references(tmp_path)) == 2
    assert first.read_bytes() == content
    first.write_bytes(content[: len(content) // 2])  # damaged
    assert begin() == "computed" and begin() == "read"
    write_pairs(tmp_path / "pairs.bin", PAIRS[:-1], tokenizer_folder)
    assert begin() == "computed" and len(references(tmp_path)) == 3
    with np.load(first) as found:
        values = found["log_probabilities"]
    assert values.shape == (2 * len(PAIRS),) and values.dtype == np.float64 and np.isfinite(values).all()


def test_a_reference_of_a_shorter_context_is_completed(pair_flags, tmp_path, capfd):
    lengths = np.diff(np.fromfile(tmp_path / "pairs.ends", "<u8")).astype(int)
    short = int(lengths.max()) + 8
    for context, computed in ((short, True), (CONTEXT, True), (short, False)):
        Trainer(build_settings({}, pair_flags(max_seq_len=context)), Processes())
        assert ("reference: computing" in capfd.readouterr().err) == computed
    assert len(references(tmp_path)) == 1


def test_the_hash_of_weights_is_of_their_numbers(base):
    state = dict(load_weights(base).state_dict)
    assert weights_sha256(state) == weights_sha256(dict(reversed(state.items())))
    name = next(iter(state))
    assert weights_sha256(state | {name: state[name] * 1.001}) != weights_sha256(state)


@pytest.mark.long
def test_resuming_without_the_reference_needs_the_weights_it_began_with(pair_flags, tmp_path, tokenizer_folder, capfd):
    mine = save_model(tmp_path / "mine.pth", 3, tokenizer_folder)
    train(pair_flags(init_from=mine, max_steps=4))
    for path in references(tmp_path):
        path.unlink()
    save_model(tmp_path / "mine.pth", 4, tokenizer_folder)
    said = refused(pair_flags(init_from=mine, resume="true", max_steps=8), capfd)
    assert "holds other weights than the run began with" in said and "the reference file of this run is missing" in said
    save_model(tmp_path / "mine.pth", 3, tokenizer_folder)
    assert train(pair_flags(init_from=mine, resume="true", max_steps=8)).progress.step == 8


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.long
def test_what_cannot_be_trained_on_pairs_is_one_line(pair_flags, tmp_path, token_file, tokenizer_folder, capfd):
    said = refused({name: value for name, value in pair_flags().items() if name != "init_from"}, capfd)
    assert "init_from: null found, but" in said and "holds pairs of answers" in said
    assert "texts are mixed into chats, but train_data_path" in refused(pair_flags(mix_data_path=token_file), capfd)
    chats = write_chats(tmp_path / "chats.bin", CHATS, tokenizer_folder)
    assert "holds chats, train_data_path" in refused(pair_flags(val_data_path=chats), capfd)
    assert "none of its 150 pairs fits a sample" in refused(pair_flags(max_seq_len=16), capfd)
    assert "dpo_beta: " in refused(pair_flags(dpo_beta=0), capfd)
    manifest = read_manifest(tmp_path / "pairs.bin")
    write_manifest(tmp_path / "pairs.bin", dataclasses.replace(manifest, documents=manifest.documents - 1))
    assert "expected an even number, since they are pairs" in refused(pair_flags(), capfd)
    write_manifest(tmp_path / "pairs.bin", dataclasses.replace(manifest, chat=manifest.chat | {"pairs": "yes"}))
    assert "chat.pairs is 'yes', expected true, or none" in refused(pair_flags(), capfd)


def test_pairs_for_weights_that_do_not_answer_are_warned_of(pair_flags, base, tmp_path, capfd):
    weights = load_weights(base)
    weights.chat = {}
    save_weights(tmp_path / "texts.pth", weights)
    for path, warned in ((base, False), (tmp_path / "texts.pth", True)):
        find_beginning(build_settings({}, pair_flags(init_from=path)), print)
        assert ("these weights continue texts and do not answer" in capfd.readouterr().out) == warned


def test_a_reference_that_cannot_be_written_is_one_line(pair_flags, tmp_path, capfd, monkeypatch):
    path = references_path(pair_flags, tmp_path)
    path.mkdir()
    assert path.name in refused(pair_flags(), capfd)


def references_path(pair_flags, tmp_path):
    """The reference's file, which is removed."""
    Trainer(build_settings({}, pair_flags()), Processes())
    [path] = references(tmp_path)
    path.unlink()
    return path

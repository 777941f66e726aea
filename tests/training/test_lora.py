"""Tuning with LoRA: only A and B are trained, and what a run leaves are plain weights with the sums."""

import contextlib
import dataclasses
import gc
import shutil
import weakref

import pytest
import torch
from torch.func import functional_call

from model.LMConfig import LMConfig
from model.lora import A, B, add_adapters, is_adapter, merged, merged_state
from model.storage.archive import load_torch, save_torch
from model.text.tokenization import tokenizer_sha256
from model.training.memory import saved_bytes, step_memory
from model.training.optimizer import build_optimizer, optimizer_bytes
from model.training.settings import build_settings
from model.weights import Weights, load_weights, save_weights
from optimized_pretrain import Trainer
from tests.chat_files import CHATS, write_chats
from tests.conftest import random_model
from tests.tiny_runs import assert_equal, assert_same_end, events, exit_code_here, losses, mostly, train, two_ranks
from utils import Processes

CONTEXT = 96
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory, tokenizer_folder):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.bin", CHATS, tokenizer_folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """Weights to adapt, one of which is -0."""
    model = random_model(LMConfig(**SHAPE, vocab_size=300, max_seq_len=CONTEXT))
    with torch.no_grad():
        model.layers[0].attention.wq.weight[0, 0] = -0.0
    path = tmp_path_factory.mktemp("base") / "base.pth"
    sha256 = tokenizer_sha256(tokenizer_folder)
    save_weights(path, Weights(model.state_dict(), model.config, str(tokenizer_folder), sha256))
    return path


@pytest.fixture
def lora_flags(flags, chat_file, base):
    """The flags of a tiny run that adapts `base` to chats."""

    def build(**changes):
        given = {"train_data_path": chat_file, "max_seq_len": CONTEXT, "init_from": base, "lora_rank": 4}
        return {name: value for name, value in flags(**given | changes).items() if name not in SHAPE}

    return build


def adapted(config: LMConfig, rank: int = 4, alpha: float = 8.0):
    """A model with adapters that change its answers, in float64."""
    model = random_model(config).double()
    add_adapters(model, rank, alpha)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def bits(state: dict) -> dict:
    """Weights as whole numbers, in which -0 is not 0."""
    return {name: weight.view(torch.int32) for name, weight in state.items()}


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("variant", [{}, {"qkv_bias": True, "qk_norm": True, "tie_embeddings": False}])
def test_loss_and_gradients_are_those_of_the_sums_written_out(tiny_config, variant):
    model = adapted(dataclasses.replace(tiny_config, **variant)).train()
    tokens, targets = torch.randint(0, 300, (2, 2, 100), generator=torch.Generator().manual_seed(1))
    plain, weights = random_model(model.config).double().train(), dict(model.named_parameters())
    sums = {
        name: weights[name] + 8.0 / 4 * weights[name.replace("weight", B)] @ weights[name.replace("weight", A)]
        for name, weight in plain.named_parameters()
        if name.startswith("layers.") and weight.dim() == 2
    }
    assert len(sums) == 7 * tiny_config.n_layers
    losses_ = model(tokens, targets), functional_call(plain, sums, (tokens, targets))
    torch.testing.assert_close(*losses_, rtol=1e-6, atol=0)  # the rotation is computed in float32
    trained = [parameter for parameter in weights.values() if parameter.requires_grad]
    assert len(trained) == 2 * len(sums)
    for one, other in zip(*(torch.autograd.grad(loss, trained) for loss in losses_), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_merged_model_computes_the_same_and_shares_what_is_not_adapted(tiny_config):
    model = adapted(tiny_config).float().eval()
    tokens = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(1))
    plain = merged(model)
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-5, atol=1e-4)
    assert plain.tok_embeddings.weight is model.tok_embeddings.weight is plain.output.weight
    assert_equal(dict(plain.state_dict()), merged_state(model.state_dict(), 8.0) | {})
    assert plain.state_dict().keys() == random_model(tiny_config).state_dict().keys()
    assert merged(plain) is plain and not any(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.slow
def test_a_step_with_adapters_compiles_to_one_graph(tiny_config):
    model = adapted(tiny_config).float().train()
    tokens, targets = torch.randint(0, 300, (2, 2, 100))
    losses_, gradients = [], []
    for call in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        losses_.append(call(tokens, targets))
        losses_[-1].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*losses_)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_counts_what_is_trained(tiny_config, dtype):
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    given = {"init_from": "base.pth", "lora_rank": "4", "optimizer_type": "adamw", "use_ema": "true"}
    expected = step_memory(tiny_config, build_settings({}, given).training, 3, torch.device("cpu"), autocast)
    model = adapted(tiny_config).float().train()
    everything = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for name, parameter in model.named_parameters() if is_adapter(name))
    assert (expected.weights, expected.average, expected.gradients) == (everything, trained, trained)
    assert expected.optimizer == 2 * trained == optimizer_bytes(model, "adamw")
    assert expected.activations == saved_bytes(model, 3, autocast, False)
    assert sum(len(group["params"]) for group in build_optimizer(model, "muon", 1e-3, 0.1).param_groups) == 28


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.long
def test_before_the_first_step_the_weights_are_the_base_bit_for_bit(lora_flags, base, tmp_path):
    trainer = Trainer(build_settings({}, lora_flags(use_ema="true")), Processes())
    before = load_torch(base)
    save_weights(tmp_path / "merged.pth", trainer._weights(trainer.build_evaluated_model()))
    assert_equal(bits(load_torch(tmp_path / "merged.pth")), bits(before))
    plain = random_model(trainer.config)
    plain.load_state_dict(before)
    tokens = torch.arange(90)[None]
    assert torch.equal(trainer.model.eval()(tokens), plain(tokens))
    shared = {parameter.data_ptr() for parameter in trainer.model.parameters() if not parameter.requires_grad}
    assert {p.data_ptr() for n, p in trainer.state.ema.module.named_parameters() if not is_adapter(n)} == shared


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_trains_the_adapters_alone_and_leaves_plain_weights(lora_flags, base, tmp_path, capfd, averaged):
    trainer = train(lora_flags(max_steps=4, use_ema=str(averaged).lower(), dtype="float32", lora_alpha=8))
    said, out = capfd.readouterr().err, tmp_path / "out"
    assert "model: 40,480 parameters" in said
    assert "lora: rank 4, alpha 8: 5,632 parameters are trained, 13.91% of the model's, which are frozen" in said
    checkpoint, final, before = (load_torch(p) for p in (out / "checkpoint_step_4.pth", out / "sft_32.pth", base))
    for name in ("model", "ema") if averaged else ("model",):
        assert_equal({key: checkpoint[name][key] for key in before}, dict(before))
        changed = {key: weight for key, weight in checkpoint[name].items() if key not in before}
        assert all(is_adapter(key) and weight.abs().sum() > 0 for key, weight in changed.items())
    assert len(changed) == len(checkpoint["optimizer"]["state"]) == 2 * 7 * 2
    kept = checkpoint["ema"] if averaged else checkpoint["model"]
    assert_equal(dict(final), merged_state(kept, 8.0))
    assert_equal(load_weights(out / "checkpoint_step_4.pth").state_dict, dict(final))
    assert final["layers.0.attention.wq.weight"].ne(before["layers.0.attention.wq.weight"]).any()

    written = random_model(trainer.config)
    written.load_state_dict(final)
    assert_equal(dict(trainer.build_evaluated_model().state_dict()), dict(written.state_dict()))
    samples = trainer.plan.samples_of(0, trainer.plan.val_samples, 0)
    inputs, targets, documents, _ = trainer.objective.read(trainer.data.val, samples)
    with torch.no_grad():
        model = trainer.model if trainer.state.ema is None else trainer.state.ema.module
        trained, of_file = (float(m.eval()(inputs, targets, documents=documents)) for m in (model, written))
    count = int((targets >= 0).sum())
    assert trained / count == pytest.approx(of_file / count, rel=1e-6)
    measured = [event["val_loss"] for event in events(out) if "val_loss" in event][-1]
    assert measured == pytest.approx(of_file / count, rel=1e-6)


@pytest.mark.long
def test_an_evaluation_merges_once_and_what_it_merged_is_released(lora_flags, tmp_path, token_file, monkeypatch):
    built, seen, evaluations = [], [], 3

    def merged_and_noted(model):
        built.append(weakref.ref(plain := merged(model)))
        return plain

    def see(model, *_):
        seen.append(built[-1]() is model and sum(one() is not None for one in built) == 1)

    monkeypatch.setattr("model.training.replicated.merged", merged_and_noted)
    settings = build_settings({}, lora_flags(mix_data_path=token_file, eval_interval=4))
    trainer = Trainer(
        settings,
        Processes(),
        preview=lambda model, data: see(model) or [],
        judge=lambda *given: (see(*given) or {}, ""),
    )
    assert trainer.train() == "finished"
    gc.collect()
    assert len(built) == 1 + evaluations + 1  # before the first step, and for the final weights
    assert seen == [True] * (1 + 2 * evaluations) and not any(one() is not None for one in built)


RESUMED = {
    "AdamW, bfloat16, averaged": {
        "dtype": "bfloat16", "use_ema": "true", "dropout": 0.1, "accumulation_steps": 2, "batch_size": 2,
    },
    "Muon across epochs": {"optimizer_type": "muon", "batch_size": 16, "lr_scheduler": "linear"},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(RESUMED, ("Muon across epochs",)))
def test_a_killed_run_resumes_and_ends_with_the_same_bits(lora_flags, tmp_path, case, monkeypatch):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    killed = tmp_path / "killed"
    assert train(lora_flags(out_dir=tmp_path / "whole", **RESUMED[case])).outcome == "finished"
    shutil.copytree(tmp_path / "whole", killed)
    for path in (killed / "checkpoint_step_12.pth", killed / "sft_32.pth", killed / "sft_32.json"):
        path.unlink()
    assert train(lora_flags(out_dir=killed, resume="true", **RESUMED[case])).outcome == "finished"
    assert_same_end(tmp_path / "whole", killed)
    assert losses(tmp_path / "whole") == losses(killed)
    assert_equal(*(load_torch(folder / "sft_32.pth") for folder in (tmp_path / "whole", killed)))


@pytest.mark.long
def test_accumulation_and_two_processes_compute_what_one_batch_does_and_resume(lora_flags, tmp_path):
    train(lora_flags(batch_size=8, out_dir=tmp_path / "one", dtype="float32"))
    train(lora_flags(batch_size=2, accumulation_steps=4, out_dir=tmp_path / "four", dtype="float32"))
    for name, more in (("two", {}), ("killed", {"resume": "true"})):
        result = two_ranks(lora_flags(batch_size=4, out_dir=tmp_path / name, dtype="float32", **more))
        assert result.returncode == 0, result.stderr
        if name == "two":
            shutil.copytree(tmp_path / "two", tmp_path / "killed")
            (tmp_path / "killed" / "checkpoint_step_12.pth").unlink()
    assert "resuming from" in result.stderr
    assert_same_end(tmp_path / "two", tmp_path / "killed")
    for name in ("four", "two"):
        assert dict(losses(tmp_path / name)) == pytest.approx(dict(losses(tmp_path / "one")), abs=1e-5)
    evaluated = [[e["val_loss"] for e in events(tmp_path / name) if "val_loss" in e] for name in ("one", "two")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(flags, capfd, *more) -> str:
    """The one line with which a run is refused."""
    capfd.readouterr()
    assert exit_code_here(flags, *more) == 2
    messages = capfd.readouterr().err
    lines = [line for line in messages.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in messages, messages
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_from": None}, "lora_rank: 4 adapts given weights, but init_from is null; give init_from, or omit"),
        ({"init_from": None, "resume": "true"}, "lora_rank: 4 adapts given weights, but init_from is null"),
        ({"lora_rank": 17}, "lora_rank: 17 found, at most 16 expected: wk of each layer is 16 x 32"),
        ({"lora_rank": -1}, "--lora_rank: '-1' found, a whole number of at least 0"),
        ({"lora_rank": "all"}, "--lora_rank: 'all' found"),
        ({"lora_alpha": 0}, "--lora_alpha: '0' found, a number above 0"),
        ({"lora_rank": 0, "lora_alpha": 8}, "lora_alpha: 8 of no adapters; set lora_rank, or omit lora_alpha"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(lora_flags, tmp_path, capfd, changes, expected):
    config = tmp_path / "config.yaml"
    config.write_text("training: {}\n")
    assert expected in refused(lora_flags(**changes), capfd, "--config", str(config))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_run_resumes_with_the_same_adapters_only(lora_flags, tmp_path, capfd):
    train(lora_flags(max_steps=4))
    for changes, found in (
        ({"lora_rank": 8}, "lora_rank 4 there, 8 here"),
        ({"lora_alpha": 8}, "lora_alpha 16.0 there, 8.0 here"),
        ({"lora_rank": 0}, "lora_rank 4 there, 0 here; lora_alpha 16.0 there, not set here"),
    ):
        said = refused({"out_dir": str(tmp_path / "out")} | {k: str(v) for k, v in changes.items()}, capfd, "--resume")
        assert f"was made with other LoRA: {found}; change it back, or begin a new run with its weights" in said
    assert exit_code_here({"out_dir": str(tmp_path / "out"), "max_steps": "5"}, "--resume") == 0
    train(lora_flags(max_steps=4, lora_rank=None, out_dir=tmp_path / "full"))
    assert "lora_rank 0 there, 4 here" in refused(
        {"out_dir": str(tmp_path / "full"), "lora_rank": "4"}, capfd, "--resume"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content.update(adapters={"lora_rank": 2, "lora_alpha": 16.0}),
        lambda content: content.update(adapters={"lora_rank": 0, "lora_alpha": 16.0}),
        lambda content: content.update(adapters={"lora_rank": 4, "lora_alpha": float("nan")}),
        lambda content: content.update(adapters={"lora_rank": "4"}),
        lambda content: content.update(adapters={}),
        lambda content: content["model"].pop("layers.1.feed_forward.w2.lora_a"),
        lambda content: content["model"].update({"layers.0.attention.wq.lora_b": 3}),
    ],
)
def test_damaged_adapters_are_one_line(lora_flags, tmp_path, capfd, harm):
    path = tmp_path / "out" / "checkpoint_step_2.pth"
    train(lora_flags(max_steps=2, eval_interval=9))
    content = dict(load_torch(path))
    harm(content)
    save_torch(path, content)
    assert path.name in refused({"out_dir": str(tmp_path / "out")}, capfd, "--resume")
    assert path.name in refused(lora_flags(init_from=path, out_dir=tmp_path / "new"), capfd)

"""What a CUDA GPU computes, beside the same on the CPU. MATECONV_TEST_DEVICE=cpu runs these tests without a GPU.

The other tests take the fastest device there is: on a machine with a GPU, training is tested on it too.
"""

import contextlib
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from model.attention import cached_attention, pytorch_attention
from model.document_attention import document_starts, problem_on
from model.generation.checksum import checksum
from model.generation.engine import Engine
from model.generation.rows import Rows
from model.LMConfig import LMConfig
from model.training.absent_gpu import AbsentGPU
from model.training.determinism import deterministic_kernels
from model.training.memory import saved_bytes, step_memory
from model.training.moving_average import MovingAverage
from model.training.optimizer import build_optimizer, rates_of, rates_on_device, set_rates
from model.training.settings import build_settings
from optimized_inference import GenerationConfig, decode
from optimized_pretrain import Trainer
from tests.conftest import random_model
from tests.reliability.harness import make_data
from tests.reliability.states import losses
from tests.tiny_runs import assert_same_end
from utils import Processes, measure_matmul_flops

DEVICE = torch.device(os.environ.get("MATECONV_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Trainer does, before the first product

CONFIG = LMConfig(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=256)
VARIANTS = [{}, {"n_kv_heads": 4}, {"qk_norm": True}, {"flash_attn": False}, {"tie_embeddings": False}]
VARIANTS += [{"n_experts": 4, "n_active_experts": 4}]  # all of them: rounding chooses no others


def some_tokens(*shape, seed=1):
    return torch.randint(3, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def twins(dtype=torch.float32, scale=1.0, **variant):
    """A model on the CPU in float32, and on the GPU one of the same weights."""
    here, there = (random_model(LMConfig(**{**vars(CONFIG), **variant})) for _ in range(2))
    with torch.no_grad():
        for parameter in (*here.parameters(), *there.parameters()):
            parameter *= scale if parameter.dim() > 1 else 1
    return here.to(dtype).float(), there.to(DEVICE, dtype)


def error(found, expected):
    """Relative to the whole, as a norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_logits_are_those_of_the_cpu(variant, dtype, most):
    here, there = twins(dtype, 0.3, **variant)  # as in training: large ones make much of 16-bit rounding
    tokens = some_tokens(3, 200)

    with torch.no_grad():
        assert error(there(tokens.to(DEVICE)), here(tokens)) < most


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("autocast", "most"), [(None, 1e-4), (torch.bfloat16, 1e-1)])
def test_loss_and_gradients_are_those_of_the_cpu(variant, documents, autocast, most):
    here, there = (model.train() for model in twins(scale=0.3, **variant))
    inputs, targets = some_tokens(3, 256), some_tokens(3, 256, seed=2)
    numbers = (torch.arange(256) // 90).expand(3, -1) if documents else None
    expected = here(inputs, targets, documents=numbers)
    expected.backward()

    inputs, targets, numbers = (t if t is None else t.to(DEVICE) for t in (inputs, targets, numbers))
    with torch.autocast(DEVICE.type, autocast) if autocast else contextlib.nullcontext():
        loss = there(inputs, targets, documents=numbers)
    loss.backward()

    assert error(loss, expected) < most
    for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
        assert error(other.grad, one.grad) < most, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_a_cache_is_that_of_the_cpu(dtype, tokens, masked):
    shapes = [(3, 9, tokens, 64), (3, 3, 50, 64), (3, 3, 50, 64)]
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    mask = (torch.arange(50) < torch.tensor([20, 50, 33])[:, None])[:, None, None].expand(-1, -1, tokens, -1)
    mask = mask if masked else None
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True)

    q, k, v, mask = (t if t is None else t.to(DEVICE) for t in (q, k, v, mask))

    for found in (cached_attention(q, k, v, mask), pytorch_attention(q, k, v, mask)):
        assert error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="it is what the GPU's kernels are compared with")
@pytest.mark.parametrize("heads", [(16, 8, 32), (9, 3, 64), (12, 12, 48), (8, 1, 128)])
def test_documents_are_told_apart_by_their_starts(heads):
    assert problem_on(DEVICE, *heads) is None


def document_numbers(rows, tokens):
    return (torch.arange(tokens) // 90).expand(rows, -1).contiguous()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("documents", [None, "mask", "starts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [0, 8])
def test_a_training_step_has_the_same_bits_each_time(compiled, documents, dtype, experts):
    config = LMConfig(dim=256, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=300, max_seq_len=512, n_experts=experts)
    model = random_model(config).to(DEVICE).train()
    model.compute_experts("grouped")
    model.balance_loss = 0.1
    run = torch.compile(model) if compiled else model
    inputs, targets = (some_tokens(8, 512, seed=seed).to(DEVICE) for seed in (1, 2))
    numbers = document_numbers(8, 512)
    if documents == "starts" and (dtype == torch.float32 or DEVICE.type == "cpu"):
        pytest.skip("its kernels are a GPU's, for 16 bits")
    starts = document_starts(numbers).to(DEVICE) if documents == "starts" else None
    numbers = numbers.to(DEVICE) if documents else None

    gradients = []
    for _ in range(4):
        with deterministic_kernels(DEVICE), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            run(inputs, targets, documents=numbers, starts=starts).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()

    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))
    assert not torch.are_deterministic_algorithms_enabled()


def texts_of(model, prompts, config, rows):
    """The ids that follow each prompt."""
    engine, texts = Engine(model, compile=False), [[] for _ in prompts]
    for event in decode(Rows(engine, rows), prompts, config, [2]):
        if event.token is not None:
            texts[event.number].append(event.token)
    return texts


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
        {"seed": 7},
        {"seed": 7, "top_k": 0, "top_p": 0.8},
        {"seed": 7, "temperature": 1.5, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ],
)
def test_texts_are_those_of_the_cpu_alone_in_a_batch_and_without_a_cache(settings):
    here, there = twins()
    prompts = [[1, *some_tokens(length, seed=length).tolist()] for length in (3, 40, 17, 3, 90)]
    expected = texts_of(here, prompts, GenerationConfig(max_new_tokens=60, **settings), 1)

    assert texts_of(there, prompts, GenerationConfig(max_new_tokens=60, **settings), 1) == expected
    assert texts_of(there, prompts, GenerationConfig(max_new_tokens=60, **settings), 3) == expected
    assert texts_of(there, prompts, GenerationConfig(max_new_tokens=60, use_cache=False, **settings), 1) == expected


def test_weights_have_the_checksum_that_they_have_on_the_cpu():
    here, there = twins(torch.bfloat16)
    assert checksum(here.to(torch.bfloat16)) == checksum(there)
    engine = Engine(there)
    there.layers[1].feed_forward.w2.weight.data[3, 5] += 1
    assert not engine.fits(there, False, None)


def test_dropout_is_off_in_generation_whatever_the_mode_of_the_model():
    _, there = twins(dropout=0.5)
    prompts, config = [[1, 17, 200], [1, 9]], GenerationConfig(do_sample=False, max_new_tokens=20)
    expected = texts_of(there, prompts, config, 2)
    assert texts_of(there.train(), prompts, config, 2) == expected and there.training


def test_the_rate_of_products_is_no_artefact():
    rate = measure_matmul_flops(DEVICE, torch.float32)
    assert 1e9 < rate < 1e15
    assert 0.5 < measure_matmul_flops(DEVICE, torch.float32) / rate < 2


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA says where it waits")
@pytest.mark.parametrize("options", [{"optimizer_type": "muon", "use_ema": "true"}, {"accumulation_steps": 2}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_launching_a_step_waits_for_nothing(data, tmp_path, options, dtype):
    flags = data.flags(tmp_path / "out", device=DEVICE, dtype=dtype, **options)
    trainer = Trainer(build_settings({}, flags), Processes())
    trainer._take_step()  # which makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        following = trainer.stepper._launch(trainer.progress, trainer.stepper.in_flight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.stepper._finished(following).loss > 0


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_says_which_kernels_training_uses(data, tmp_path, wanted, capfd, monkeypatch):
    trainer = Trainer(
        build_settings({}, data.flags(tmp_path / "out", device=DEVICE, deterministic=wanted)), Processes()
    )
    assert ("deterministic false" in capfd.readouterr().err) is (DEVICE.type != "cpu" and not wanted)
    used, loss = [], trainer.objective.loss

    def noted(model, batch):
        used.append(torch.are_deterministic_algorithms_enabled())
        return loss(model, batch)

    monkeypatch.setattr(trainer.objective, "loss", noted)
    trainer._take_step()
    assert set(used) == {DEVICE.type == "cuda" and wanted}


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def train(tmp_path, data):
    """Train as the flags say, and return the losses of each step."""

    def run(name, **changes):
        flags = data.flags(tmp_path / name, **changes)
        assert Trainer(build_settings({}, flags), Processes()).train() == "finished"
        return [loss for _, loss in sorted(losses(tmp_path / name).items())]

    return run


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam", "muon"])
@pytest.mark.parametrize("documents", ["false", "true"])
def test_training_learns_what_the_cpu_learns(train, optimizer_type, documents):
    options = {"optimizer_type": optimizer_type, "use_ema": "true", "document_mask": documents}
    assert train("gpu", device=DEVICE, **options) == pytest.approx(train("cpu", device="cpu", **options), abs=1e-3)


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
def test_a_run_resumes_on_another_device(train, optimizer_type, tmp_path):
    options = {"optimizer_type": optimizer_type, "use_ema": "true"}
    whole = train("cpu", device="cpu", **options)
    for first, second in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        name = f"{first}"
        train(name, device=first, **options)
        (tmp_path / name / "checkpoint_step_12.pth").unlink()
        assert train(name, device=second, resume="true", **options) == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam", "muon"])
def test_rates_on_the_device_give_the_bits_of_floats(optimizer_type):
    def stepped(on_device):
        _, model = twins()
        optimizer, average = build_optimizer(model, optimizer_type, 1e-2, 0.1), MovingAverage(model, 0.99)
        for step in range(4):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.found_inf = torch.tensor(float(step == 2), device=DEVICE)
            set_rates(optimizer, optimizer_type, 1e-2 / (step + 3), step)
            weight, context = average.next_weight(), contextlib.nullcontext()
            if on_device:
                rates = rates_of(optimizer, optimizer_type, 1e-2 / (step + 3), step)
                rates = [{name: torch.tensor(rate, device=DEVICE) for name, rate in group.items()} for group in rates]
                weight, context = torch.tensor(weight, device=DEVICE), rates_on_device(optimizer, rates)
            with context:
                optimizer.step()
            average.average(model, weight, optimizer.found_inf)
            average.n_averaged += 1
        return [*model.parameters(), *average.module.parameters()]

    assert all(map(torch.equal, stepped(False), stepped(True)))


BF16 = {"dtype": "bfloat16"}
GRAPHS = {
    "adamw, average, accumulation": BF16 | {"use_ema": "true", "accumulation_steps": 2},
    "adamw, compiled": BF16 | {"compile": "true"},
    "muon, compiled": BF16 | {"optimizer_type": "muon", "compile": "true", "use_ema": "true"},
    "documents": {"document_mask": "true", "activation_checkpointing": "full"},
    "experts": BF16 | {"n_experts": 4, "expert_bias": "true"},
}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA has graphs")
@pytest.mark.parametrize("case", GRAPHS)
def test_a_run_as_a_graph_has_the_bits_of_launched_steps(data, tmp_path, case, capfd):
    options = {"device": DEVICE, "max_steps": 40, "eval_interval": 10, "save_interval": 20} | GRAPHS[case]
    for on in ("false", "true"):
        flags = data.flags(tmp_path / on, **(options | {"cuda_graph": on}))
        trainer = Trainer(build_settings({}, flags), Processes())
        assert trainer.train() == "finished"
        graph = trainer.stepper.graph
        assert (graph is not None and graph.is_settled) == (on == "true"), capfd.readouterr().err
    assert losses(tmp_path / "false") == losses(tmp_path / "true")
    for step in (20, 40):
        assert_same_end(tmp_path / "false", tmp_path / "true", step)

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "true", resumed)
    (resumed / "checkpoint_step_40.pth").unlink()
    Trainer(build_settings({}, data.flags(resumed, **options, cuda_graph="false", resume="true")), Processes()).train()
    assert_same_end(tmp_path / "true", resumed, 40)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA has graphs")
def test_a_graph_whose_work_waits_for_the_device_fails_in_one_line_and_the_run_goes_on(data, tmp_path, capfd):
    flags = data.flags(tmp_path / "out", device=DEVICE, cuda_graph="true")
    trainer = Trainer(build_settings({}, flags), Processes())
    loss = trainer.objective.loss
    trainer.objective.loss = lambda model, batch: loss(model, batch) * float(torch.ones((), device=DEVICE))
    assert trainer.train() == "finished" and trainer.stepper.graph is None
    torch.cuda.empty_cache()  # which fails where PyTorch takes the capture to go on, as does a random number
    assert torch.rand(3, device=DEVICE).isfinite().all()
    assert capfd.readouterr().err.count("cuda_graph: steps are launched as without it: ") == 1
    expected = Trainer(
        build_settings({}, data.flags(tmp_path / "launched", device=DEVICE, cuda_graph="false")), Processes()
    )
    assert expected.train() == "finished" and losses(tmp_path / "out") == losses(tmp_path / "launched")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="these are a GPU's kernels")
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_step_keeps_is_known_where_no_gpu_is(dtype, document_mask):
    """But for the attention's random states and the like, of a few bytes."""
    training = build_settings({}, {"document_mask": str(document_mask)}).training
    expected = step_memory(CONFIG, training, 3, torch.device("cuda"), AbsentGPU(dtype))
    model, autocast = random_model(CONFIG).to(DEVICE).train(), torch.autocast("cuda", dtype, dtype != torch.float32)
    with deterministic_kernels(DEVICE):
        assert saved_bytes(model, 3, autocast, document_mask) == pytest.approx(expected.activations, rel=0.01)

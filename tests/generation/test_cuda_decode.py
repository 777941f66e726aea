"""Decoding by graphs on a CUDA GPU, beside launching each kernel there."""

import pytest
import torch

from model.generation.decoding import Decoding
from model.generation.engine import Engine
from model.generation.rows import Rows
from optimized_inference import GenerationConfig, decode
from tests.training.test_cuda import DEVICE, error, some_tokens, twins

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or not torch.cuda.is_available(), reason="only CUDA GPUs have graphs"
)
TOGETHER = "decoding: a token's kernels are launched together, as a graph"
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SETTINGS = [
    GREEDY,
    {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
    {"seed": 7},
    {"seed": 7, "top_k": 0, "top_p": 0.8},
    {"seed": 7, "temperature": 1.5, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
]


def texts_of(model, prompts, rows, compile, **settings):
    """The ids that follow each prompt, and what the engine says."""
    said, texts = [], [[] for _ in prompts]
    config, engine = GenerationConfig(max_new_tokens=60, **settings), Engine(model, compile=compile, say=said.append)
    for event in decode(Rows(engine, rows), prompts, config, [2]):
        texts[event.number].append(event.token)
    return texts, said


def some_prompts(*lengths):
    return [[1, *some_tokens(length, seed=length).tolist()] for length in lengths]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", [{}, {"qk_norm": True, "tie_embeddings": False}, {"flash_attn": False}])
def test_texts_of_graphs_are_those_of_launched_kernels(settings, variant):
    """Alone, and in batches of changing numbers; prompts of several lengths, some texts fill the context."""
    _, model = twins(**variant)
    prompts = some_prompts(3, 40, 100, 3, 90, 215, 1)
    expected, _ = texts_of(model, prompts, 1, False, **settings)
    for rows in (1, 3, 7):
        assert texts_of(model, prompts, rows, None, **settings) == (expected, [TOGETHER])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_graph_gives_the_logits_of_launched_kernels(dtype, rows):
    """Of each dtype, while a text outgrows what a graph reads."""
    (_, model), said, logits = twins(dtype, 0.3), [], []
    for compile in (False, None):
        decoding = Decoding(Rows(Engine(model, compile=compile, say=said.append), rows), [])
        for number in range(rows):
            prompt = [1, *some_tokens(90, seed=number).tolist()]
            decoding.admit(number, prompt, GenerationConfig(max_new_tokens=60, **GREEDY))
        found, choose = [], decoding._chosen

        def chosen(own, *others, found=found, choose=choose):
            found.append(own.clone())
            choose(own, *others)
            return [7 + len(found)] * rows  # the same text, whatever rounding does

        decoding._chosen = chosen
        while decoding.rows.live:
            decoding.step()
        logits.append(torch.stack(found))
    assert error(logits[1], logits[0].cpu()) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert said == [TOGETHER]


def test_compiled_graphs_write_what_launched_kernels_write():
    _, model = twins()
    prompts = some_prompts(3, 40, 90)
    texts, said = texts_of(model, prompts, 3, True, **GREEDY)
    assert texts == texts_of(model, prompts, 1, False, **GREEDY)[0] and said[1:] == [TOGETHER]


@pytest.mark.parametrize("fault", ["experts", "waits"])
def test_what_cannot_be_captured_is_launched(fault, monkeypatch):
    """Experts in float32, which wait within PyTorch's kernel; and what nobody knew of."""
    _, model = twins(**({"n_experts": 4, "n_active_experts": 4} if fault == "experts" else {}))
    prompts = some_prompts(3, 40, 90)
    expected, _ = texts_of(model, prompts, 1, False, seed=3)
    if fault == "waits":
        output = model.output.forward
        monkeypatch.setattr(model.output, "forward", lambda x: output(x) * float(torch.ones((), device=DEVICE)))
    texts, said = texts_of(model, prompts, 3, None, seed=3)
    assert texts == expected and len(said) == 1 and "launched one by one" in said[0]
    torch.cuda.empty_cache()  # fails where PyTorch takes the capture to go on, as does a random number
    assert torch.rand(3, device=DEVICE).isfinite().all()


def test_the_memory_of_graphs_is_given_back():
    _, model = twins()
    texts_of(model, some_prompts(3, 40), 2, None, seed=3)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(3):
        texts_of(model, some_prompts(3, 40), 2, None, seed=3)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(DEVICE) <= before + (1 << 20)

"""Decoding by graphs, on the CPU by a graph that records operations, beside launching each kernel."""

import random

import pytest

from model import accelerator
from model.generation.engine import Engine
from model.generation.rows import Rows
from model.LMConfig import LMConfig
from optimized_inference import GenerationConfig, decode
from tests.conftest import random_model
from tests.fake_graph import FakeGraph

GREEDY = {"do_sample": False}
VARIANTS = [{}, {"qk_norm": True}, {"tie_embeddings": False, "qkv_bias": True}, {"n_kv_heads": 4}, {"n_kv_heads": 1}]
VARIANTS += [{"flash_attn": False}, {"head_dim": 24}]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The CPU has graphs, and with them the Transformer itself reads, as on a GPU; those that were made."""
    made = []

    class Counted(FakeGraph):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setitem(accelerator.GRAPHS, "cpu", Counted)
    return made


def texts_of(engine, prompts, rows, **settings):
    """The ids that follow each prompt."""
    texts = [[] for _ in prompts]
    for event in decode(Rows(engine, rows), prompts, GenerationConfig(**settings), [2]):
        if event.token is not None:
            texts[event.number].append(event.token)
    return texts


def some_prompts(*lengths):
    draws = random.Random(0)  # noqa: S311
    return [[1, *(draws.randrange(3, 300) for _ in range(length - 1))] for length in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_greedy_text_is_that_of_launched_kernels(tiny_config, variant, graphs):
    model, said = random_model(LMConfig(**{**vars(tiny_config), **variant})), []
    prompts = some_prompts(3, 1, 60)
    expected = texts_of(Engine(model, compile=False), prompts, 1, max_new_tokens=40, **GREEDY)
    assert not graphs

    assert texts_of(Engine(model, say=said.append), prompts, 1, max_new_tokens=40, **GREEDY) == expected
    assert said == ["decoding: a token's kernels are launched together, as a graph"]
    assert sum(graph.replays for graph in graphs) > 150

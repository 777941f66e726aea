"""Decoding by graphs, on the CPU by a graph that records operations, beside launching each kernel."""

import gc
import random
import threading
import weakref

import pytest
import torch

from model import accelerator
from model.errors import InputError
from model.generation.decode_graph import Step
from model.generation.decoding import Decoding
from model.generation.engine import Engine, can_compile
from model.generation.prefixes import Prefixes
from model.generation.rows import Rows
from model.kv_cache import SPARE, KVCache, StepCache
from model.LMConfig import LMConfig
from optimized_inference import GenerationConfig, TextGenerator, decode
from tests.conftest import random_model
from tests.fake_graph import FakeGraph
from tests.tiny_runs import mostly

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
VARIANTS = [{}, {"qk_norm": True}, {"tie_embeddings": False, "qkv_bias": True}, {"n_kv_heads": 4}, {"n_kv_heads": 1}]
VARIANTS += [{"flash_attn": False}, {"head_dim": 24}, {"n_experts": 4, "hidden_dim": 64}]
TOGETHER = "decoding: a token's kernels are launched together, as a graph"
SETTINGS = [
    GREEDY,
    {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"seed": 7},
    {"seed": 7, "temperature": 1.5, "top_k": 7, "top_p": 0.7, "min_p": 0.05, "presence_penalty": 0.5},
    {"seed": 7, "frequency_penalty": 0.3, "logprobs": True, "top_logprobs": 3},
    {"seed": 7, "top_k": 0, "top_p": 0.8},
    {"do_sample": False, "min_new_tokens": 20, "logit_bias": {5: 2.0, 9: -3.0}},
]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The CPU has graphs, and with them the Transformer itself reads, as on a GPU; those that were made."""
    made = []

    class Counted(FakeGraph):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setitem(accelerator.GRAPHS, "cpu", Counted)
    monkeypatch.setattr("model.generation.decode_graph.LAUNCHED", 1)  # texts are short here
    return made


def model_with(config, **changes):
    model = random_model(LMConfig(**{**vars(config), **changes}))
    model.compute_experts("grouped")
    return model


def texts_of(engine, prompts, rows, **settings):
    """The ids that follow each prompt, why it ends, and their log-probabilities where they are told."""
    texts = [[] for _ in prompts]
    for event in decode(Rows(engine, rows), prompts, GenerationConfig(**settings), [2], own_seeds=True):
        texts[event.number].append((event.token, event.end, event.logprob))
    return texts


def nearly(texts):
    """The same, with what rounding may change."""
    return [[(*told, logprob and pytest.approx(logprob, abs=1e-4)) for *told, logprob in text] for text in texts]


def some_prompts(*lengths):
    draws = random.Random(0)  # noqa: S311
    return [[1, *(draws.randrange(3, 300) for _ in range(length - 1))] for length in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_greedy_text_is_that_of_launched_kernels(tiny_config, variant, graphs):
    model, said = model_with(tiny_config, **variant), []
    prompts = some_prompts(3, 1, 60)
    expected = texts_of(Engine(model, compile=False), prompts, 1, max_new_tokens=12, **GREEDY)
    assert not graphs

    assert texts_of(Engine(model, say=said.append), prompts, 1, max_new_tokens=12, **GREEDY) == expected
    assert said == [TOGETHER]
    steps = sum(len(text) - 1 for text in expected)  # the first token of each is the prompt's
    assert [graph.replays for graph in graphs] == [steps - 1] * 2  # the logits, and the largest of them


@pytest.mark.long
@pytest.mark.parametrize("settings", mostly(SETTINGS, slow=[SETTINGS[i] for i in (0, 2, 4, 5, 6)]))
def test_texts_of_a_batch_are_those_of_launched_kernels(tiny_config, settings, graphs):
    """Rows end and others take their places, prompts are of several lengths, texts outgrow what a graph reads, and some
    fill the context, which is no power of two."""
    model = model_with(tiny_config, n_layers=1, max_seq_len=300)
    prompts = some_prompts(3, 1, 60, 110, 33, 245, 290)
    expected = texts_of(Engine(model, compile=False), prompts, 1, max_new_tokens=25, **settings)
    assert {text[-1][1] for text in expected} >= {"length", "context"}
    engine = Engine(model)
    for rows in (1, 3, 5):
        assert texts_of(engine, prompts, rows, max_new_tokens=25, **settings) == nearly(expected)
    assert sum(graph.replays for graph in graphs) > 100


@pytest.mark.long
@pytest.mark.parametrize("seed", mostly(range(3), slow=(1, 2)))
def test_texts_of_several_requests_are_those_that_they_are_alone(tiny_config, seed):
    """Admitted at any time, with settings of their own or the same ones, some cancelled, beginnings known."""
    model, draws = model_with(tiny_config, n_layers=1, max_seq_len=200), random.Random(seed)  # noqa: S311
    configs = [GenerationConfig(**settings, max_new_tokens=draws.choice([4, 20, 40])) for settings in SETTINGS]
    configs = draws.sample(configs, draws.choice([1, 3]))
    begun, launched, graphed = some_prompts(60)[0], Engine(model, compile=False), Engine(model)
    prompts = [[*begun[: draws.choice([0, 40, 60])], *p] for p in some_prompts(*(draws.choices([1, 9, 50], k=14)))]
    chosen = [draws.choice(configs) for _ in prompts]

    def text(number):
        decoding = Decoding(Rows(launched, 1), [])
        decoding.admit(0, prompts[number], chosen[number])
        return [event.token for _ in range(40) if decoding.rows.live for event in decoding.step()]

    rows = Rows(graphed, draws.choice([3, 6]), prefixes=Prefixes(1 << 20))
    decoding, waiting, found, cancelled = Decoding(rows, [], prompt_tokens=40), list(range(len(prompts))), {}, set()
    while waiting or rows.live:
        while waiting and rows.free and draws.random() < 0.7:
            decoding.admit(number := waiting.pop(0), prompts[number], chosen[number])
            found[number] = []
        for event in decoding.step() if rows.live else ():
            found[event.number].append(event.token)
        if rows.live and draws.random() < 0.05:
            decoding.cancel(number := draws.choice(rows.live).number)
            cancelled.add(number)
    for number, ids in found.items():
        whole = text(number)
        assert ids == (whole[: len(ids)] if number in cancelled else whole), number


def test_a_chat_continues_what_its_rows_hold(tiny_model):
    engine, launched = Engine(tiny_model), Engine(tiny_model, compile=False)
    rows, other, history = Rows(engine, 1, remembers=True), Rows(engine, 2), [1, 17, 200]
    config = GenerationConfig(max_new_tokens=8, **GREEDY)
    for _ in range(4):
        answer = [event.token for event in decode(rows, [history], config, [])]
        assert answer == [event.token for event in decode(Rows(launched, 1), [history], config, [])]
        list(decode(other, [[1, 9, 8], [1, 9]], config, []))
        history = [*history, *answer, 44, 45]


def test_the_server_writes_what_launched_kernels_write(tiny_model, tokenizer):
    from model.serving.model_loop import ModelLoop, Writing

    prompts = some_prompts(5, 30, 1, 12, 70, 3, 8, 20, 5, 40)
    settings = [{"seed": 3, "max_new_tokens": 25}] * 4 + [{**GREEDY, "max_new_tokens": 40}] * 6
    configs = [GenerationConfig(**one) for one in settings]
    found, over = {}, threading.Event()

    def deliver(writing, told):
        for one in told:
            assert one.error is None
            found.setdefault(id(writing), []).append(one.event.token)
        if sum(one.event.end is not None for one in told):
            ended.append(writing)
        if len(ended) == len(writings):
            over.set()

    ended, writings = [], [Writing([p], config, deliver) for p, config in zip(prompts, configs, strict=True)]
    loop = ModelLoop(TextGenerator(tiny_model, tokenizer), 4, 20)

    def client():
        for number, writing in enumerate(writings):
            loop.submit(writing)
            if number % 3 == 2:
                over.wait(0.05)
        over.wait(60)
        loop.close()

    thread = threading.Thread(target=client)
    thread.start()
    loop.run()
    thread.join()
    assert loop.fault is None
    launched = TextGenerator(tiny_model, tokenizer, compile=False)
    for writing, prompt, config in zip(writings, prompts, configs, strict=True):
        assert found[id(writing)] == [
            event.token for event in decode(Rows(launched.engine(), 1), [prompt], config, launched.eos_ids)
        ]


def test_a_graph_of_each_size_is_captured_once_and_kept_for_the_next_text(tiny_model, tokenizer, graphs, monkeypatch):
    monkeypatch.setattr("model.generation.decode_graph.LAUNCHED", 4)
    generator, said = TextGenerator(tiny_model, tokenizer), []
    generator.say = said.append
    config = GenerationConfig(max_new_tokens=5, seed=1)
    texts = [generator.generate("中国", config)]
    assert not said and [graph.replays for graph in graphs] == [0, 0]  # a short text is not worth a capture
    texts += [generator.generate("中国", config) for _ in range(2)]
    assert texts == [TextGenerator(tiny_model, tokenizer, compile=False).generate("中国", config)] * 3
    assert "".join(generator.stream("中国", config)) == texts[0]
    assert said == [TOGETHER] and [graph.replays for graph in graphs] == [4 * 4 - 4] * 2


def test_a_model_whose_weights_moved_gets_other_graphs(tiny_model, tokenizer, graphs):
    generator, config = TextGenerator(tiny_model, tokenizer), GenerationConfig(max_new_tokens=9, **GREEDY)
    text, engine = generator.generate("中国", config), generator.engine()
    rows = Rows(engine, 1)
    ids = [event.token for event in decode(rows, [[1, 7]], config, [])]
    assert generator.engine() is engine
    tiny_model.to(torch.float32)  # changes no number, but the tables of RoPE are new
    gc.collect()
    assert [event.token for event in decode(rows, [[1, 7]], config, [])] == ids
    assert generator.generate("中国", config) == text and generator.engine() is not engine
    engine = generator.engine()
    weight = tiny_model.layers[0].attention.wq.weight
    weight.data = weight.data.clone()
    assert generator.generate("中国", config) == text and generator.engine() is not engine


def test_many_different_settings_keep_no_more_graphs_than_a_few(tiny_model, graphs):
    rows, launched = Rows(Engine(tiny_model), 1), Engine(tiny_model, compile=False)
    for k in [*range(3, 24), 4]:
        config = GenerationConfig(seed=1, top_k=k, max_new_tokens=5)
        found = [event.token for event in decode(rows, [[1, 7, 9]], config, [])]
        assert found == [event.token for event in decode(Rows(launched, 1), [[1, 7, 9]], config, [])]
    assert len(rows._graphs._steps) < 10


@pytest.mark.parametrize("rows", [1, 4])
def test_scores_that_tie_are_drawn_as_without_a_graph(tiny_config, rows):
    """As many do in bfloat16."""
    model = model_with(tiny_config)
    with torch.no_grad():
        model.output.weight.copy_(model.output.weight[torch.arange(300) // 3].clone())  # three of each
    prompts, settings = some_prompts(9, 9, 9, 9), {"seed": 2, "top_k": 4, "max_new_tokens": 30}
    expected = texts_of(Engine(model, compile=False), prompts, rows, **settings)
    assert texts_of(Engine(model), prompts, rows, **settings) == expected


def test_what_cannot_be_captured_is_launched_and_one_line_says_why(tiny_config, graphs):
    prompts, said = some_prompts(4, 9), []
    model = model_with(tiny_config, n_experts=4, hidden_dim=64)
    model.compute_experts("loop")
    expected = texts_of(Engine(model, compile=False), prompts, 2, max_new_tokens=9, **GREEDY)
    assert texts_of(Engine(model, say=said.append), prompts, 2, max_new_tokens=9, **GREEDY) == expected
    assert len(said) == 1 and "one by one" in said[0] and "the experts' products wait" in said[0] and not graphs
    with pytest.raises(InputError, match="^compile: a step cannot .*experts.*; omit --compile$"):
        Rows(Engine(model, compile=True), 1)


@pytest.mark.parametrize("fault", ["capture", "replay", "choice"])
def test_a_capture_that_fails_or_computes_something_else_harms_no_text(tiny_model, monkeypatch, fault):
    captured = []

    class Faulty(FakeGraph):
        def capture(self, work):
            captured.append(self)
            if fault == "capture" or (fault == "choice" and len(captured) == 2):
                work()
                raise RuntimeError("out of luck\nand more")
            super().capture(work)

        def replay(self):
            super().replay()
            if fault == "replay":
                self.operations[-1].args[0].tensor()[0, 3].add_(1)  # which the last operation has copied

    monkeypatch.setitem(accelerator.GRAPHS, "cpu", Faulty)
    prompts, said = some_prompts(4, 9, 30), []
    expected = texts_of(Engine(tiny_model, compile=False), prompts, 2, max_new_tokens=30, seed=4)
    engine = Engine(tiny_model, say=said.append)
    assert texts_of(engine, prompts, 2, max_new_tokens=30, seed=4) == expected
    assert texts_of(engine, prompts, 2, max_new_tokens=30, seed=4) == expected  # with other Rows
    reason = "its numbers are not those of the launched kernels" if fault == "replay" else "out of luck"
    lines = [f"decoding: kernels are launched one by one, since there is no graph of them ({reason})"]
    assert said == ([TOGETHER] if fault == "choice" else []) + lines


def test_damaged_weights_are_reported_as_without_a_graph(tiny_model):
    rows = Rows(Engine(tiny_model), 1)
    decoding = Decoding(rows, [])
    decoding.admit(0, [1, 5], GenerationConfig(max_new_tokens=60, **GREEDY))
    for _ in range(6):
        decoding.step()
    with torch.no_grad():
        tiny_model.output.weight[7] = torch.nan
    with pytest.raises(InputError, match="the weights give logits that are not finite"):
        decoding.step()


@pytest.mark.parametrize("compile", [False, None])
@pytest.mark.parametrize("prompts", [[[1, 7]], [[1, 7], [1, *[5] * 40]]])
def test_a_text_whose_numbers_overflow_harms_none_that_takes_its_place(tiny_model, prompts, compile):
    settings = {"max_new_tokens": 20, **GREEDY}
    expected = texts_of(Engine(tiny_model, compile=compile), prompts, 1, **settings)
    with torch.no_grad():
        tiny_model.output.weight = torch.nn.Parameter(tiny_model.output.weight.clone())
        tiny_model.tok_embeddings.weight[9] = torch.inf
    rows = Rows(Engine(tiny_model, compile=compile), len(prompts))
    with pytest.raises(InputError, match="not finite"):
        list(decode(rows, [[1, *[9] * 60]], GenerationConfig(**settings), []))
    texts = [[] for _ in prompts]
    for event in decode(rows, prompts, GenerationConfig(**settings), [2]):
        texts[event.number].append((event.token, event.end, None))
    assert texts == expected


def test_what_was_wiped_is_not_remembered(tiny_model):
    """The settings left no token, so that the text ended with an error; the next ones begin as it did."""
    prompt, failed = [1, *[5] * 60], []
    bans = GenerationConfig(do_sample=False, logit_bias=dict.fromkeys(range(300), -torch.inf))
    config = GenerationConfig(max_new_tokens=9, **GREEDY)
    expected = [event.token for event in decode(Rows(Engine(tiny_model, compile=False), 1), [prompt], config, [])]
    for given in ({"remembers": True}, {"prefixes": Prefixes(1 << 20)}):
        decoding = Decoding(Rows(Engine(tiny_model), 1, **given), [], on_error=lambda *error: failed.append(error))
        decoding.admit(0, prompt, bans)
        decoding.step()
        decoding.admit(1, prompt, config)
        assert [event.token for _ in range(9) for event in decoding.step()] == expected
    assert len(failed) == 2


def test_dropout_is_off_whatever_the_mode_of_the_model(tiny_config):
    model = model_with(tiny_config, dropout=0.9)
    expected = texts_of(Engine(model, compile=False), some_prompts(4), 1, max_new_tokens=30, **GREEDY)
    assert texts_of(Engine(model.train()), some_prompts(4), 1, max_new_tokens=30, **GREEDY) == expected
    assert all(module.training for module in model.modules())


def test_the_memory_of_graphs_is_free_when_their_rows_are(tiny_model, graphs):
    engine = Engine(tiny_model)
    rows = Rows(engine, 2)
    list(decode(rows, some_prompts(4, 6), GenerationConfig(max_new_tokens=9, seed=1), []))
    left = weakref.ref(graphs.pop()), weakref.ref(graphs.pop()), weakref.ref(rows)
    gc.disable()
    try:
        del rows
        assert [one() for one in left] == [None] * 3
    finally:
        gc.enable()


def test_a_step_writes_the_slots_of_its_positions_alone_and_attends_to_those_before(tiny_config):
    model, context = model_with(tiny_config), tiny_config.max_seq_len
    cache, twin = (KVCache(tiny_config, 3, context + SPARE) for _ in range(2))
    for buffer in (cache.keys, cache.values):
        buffer.normal_(generator=torch.Generator().manual_seed(0))
    twin.keys.copy_(cache.keys), twin.values.copy_(cache.values)
    tokens, positions = torch.tensor([[7], [200], [9]]), torch.tensor([5, 40, context + SPARE - 1])
    with torch.inference_mode():
        found = model.hidden_states(tokens, StepCache(cache, positions, 64, context))
        for row in range(2):
            part = twin.part(row, row + 1)
            part.lengths = [int(positions[row])]
            torch.testing.assert_close(found[row : row + 1], model.hidden_states(tokens[row : row + 1], part))
    torch.testing.assert_close(cache.keys[:, :2], twin.keys[:, :2])
    changed = (cache.keys != twin.keys)[:, 2].any(-1).any(0).any(0)  # [slots]
    assert changed.nonzero()[:, 0].tolist() == [context + SPARE - 1]


def test_where_compiled_code_can_decode():
    found = {name: can_compile(torch.device(name)) for name in ("cpu", "cuda", "xpu", "mps")}
    assert found == {"cpu": True, "cuda": True, "xpu": False, "mps": False}


class Launching(FakeGraph):
    """A graph of compiled code, which shows no operations: it calls the work again."""

    def capture(self, work) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


@pytest.mark.slow  # a minute or two of compiling
def test_compiled_steps_write_what_launched_kernels_write(tiny_config, monkeypatch):
    monkeypatch.setitem(accelerator.GRAPHS, "cpu", Launching)
    model, said = model_with(tiny_config, n_layers=1, max_seq_len=140, qk_norm=True), []
    prompts = some_prompts(3, 1, 60, 7, 120)
    expected = texts_of(Engine(model, compile=False), prompts, 1, max_new_tokens=90, **GREEDY)
    engine, sizes, made = Engine(model, compile=True, say=said.append), [], Step.__init__
    monkeypatch.setattr(Step, "__init__", lambda step, *given: (made(step, *given), sizes.append(len(step.result)))[0])
    assert texts_of(engine, prompts, 3, max_new_tokens=90, **GREEDY) == expected
    assert set(sizes) == {1, 2, 3}  # one text, or three, two being rare; and the largest logits
    assert said[0].startswith("compiling the step") and said[1:] == [TOGETHER]

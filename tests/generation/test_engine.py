"""The forward pass on a CPU, packed and compiled, compared with the Transformer itself."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.errors import InputError
from model.generation import decode_step, inference_model
from model.generation.checksum import BLOCK, FACTOR, GROUP, WIDTH, checksum
from model.generation.compiled_step import ATTENTION_FIELDS, CompiledGroup, kept_path, sources_of
from model.generation.decode_step import BatchAttention, DecodeStep, GroupStep, in_words, quantized
from model.generation.engine import WORTH_COMPILING, Engine
from model.generation.inference_model import InferenceModel, packs
from model.generation.rows import Rows
from model.generation.trial import fastest_way
from model.kv_cache import SPARE, KVCache
from model.LMConfig import LMConfig
from model.model import TransformerBlock, apply_rope
from optimized_inference import GenerationConfig, TextGenerator, decode
from tests import forks
from tests.conftest import ROOT, random_model
from tests.generation.endless_compiler import endless_compiler, is_over
from tests.tiny_runs import HUNG, wait_for

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=40)
EXPERTS = {"n_experts": 6, "hidden_dim": 48}
SHARED_EXPERTS = EXPERTS | {
    "n_active_experts": 3, "n_shared_experts": 1, "expert_score": "sigmoid", "normalize_expert_weights": False,
    "expert_bias": True,
}  # fmt: skip
VARIANTS = [{}, {"qk_norm": True}, {"tie_embeddings": False}, {"n_kv_heads": 4}, {"n_kv_heads": 1}]
VARIANTS += [EXPERTS, SHARED_EXPERTS]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))), reason="there is no C++ compiler here"
)


def model_of(config):
    """A random model, whose routers' biases change choices."""
    model = random_model(config)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def logits_of(reader, config, texts, dtype=torch.float32):
    """Read texts of different lengths as Rows does: a prompt each, then four single tokens together."""
    cache = KVCache(config, len(texts), config.max_seq_len, dtype=dtype)
    for row, text in enumerate(texts):
        part = cache.part(row, row + 1)
        reader.hidden_states(text[None, :-4], part)
        cache.lengths[row] = part.lengths[0]
    steps = []
    for place in range(-4, 0):
        tokens = torch.stack([text[place] for text in texts])[:, None]
        steps.append(reader.output(reader.hidden_states(tokens, cache)))
    return torch.cat(steps, dim=1).float()


def some_texts(config):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, config.vocab_size, (length,), generator=generator) for length in (9, 30, 17)]


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_give_the_transformers_logits(tiny_config, variant):
    config = LMConfig(**{**vars(tiny_config), **variant})
    model, texts = model_of(config), some_texts(config)
    with torch.inference_mode():
        found = logits_of(InferenceModel(model), config, texts)
        for row, text in enumerate(texts):
            torch.testing.assert_close(found[row], model(text[None])[0, -4:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_text_reads_only_its_own_experts(tiny_config, dtype, int8):
    """What the others hold changes nothing; several texts at once get what each gets alone."""
    config = LMConfig(**{**vars(tiny_config), **EXPERTS, "n_layers": 1})
    reader, tokens = InferenceModel(random_model(config).to(dtype), int8), torch.tensor([[7], [200], [9], [31]])

    def logits(rows):
        cache = KVCache(config, len(rows), 8, dtype=reader.dtype)
        return reader.output(reader.hidden_states(rows, cache)).float()

    with torch.inference_mode():
        alone, together = [logits(row[None]) for row in tokens], logits(tokens)
        atol = 1e-4 if reader.dtype == torch.float32 else 0.1  # int8 computes in bfloat16 where that is fast
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=atol)
        experts = reader.layers[0].feed_forward.experts
        for row, expected in zip(tokens, alone, strict=True):
            unread = []
            for number, expert in enumerate(experts):
                experts[number] = None  # whoever calls it fails
                try:
                    assert torch.equal(logits(row[None]), expected)
                    unread.append(number)
                except TypeError:
                    pass
                experts[number] = expert
            assert len(unread) == config.n_experts - config.n_active_experts


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_compiled_step_chooses_experts_as_the_router_does(tiny_config, score, normalize, bias):
    more = {"expert_score": score, "normalize_expert_weights": normalize, "expert_bias": bias}
    config = LMConfig(**{**vars(tiny_config), "n_experts": 12, "n_active_experts": 5, "n_layers": 1, **more})
    module = model_of(config).layers[0].feed_forward
    experts, router = decode_step._Experts(module, int8=False), module.router
    with torch.inference_mode():
        for logits in 3 * torch.randn(30, 12, generator=torch.Generator().manual_seed(1)):
            expected = [found[0] for found in router.choose(router.scores(logits[None]))]
            chosen, weights = experts._choose(logits)
            assert torch.equal(chosen, expected[0])
            torch.testing.assert_close(weights, expected[1])
        chosen, weights = experts._choose(torch.zeros(12))  # equal ones: all different, and none twice
        assert len(set(chosen.tolist())) == 5 and torch.equal(weights, weights[:1].expand(5))
        chosen, weights = experts._choose(torch.full((12,), torch.nan))
        assert chosen.min() >= 0 and chosen.max() < 12 and weights.isnan().any()


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this CPU has no bfloat16")
def test_packed_weights_in_bfloat16_are_as_near_as_the_transformer_in_bfloat16(tiny_config):
    model, texts = random_model(tiny_config), some_texts(tiny_config)
    with torch.inference_mode():
        exact = logits_of(model, tiny_config, texts)
        model.to(torch.bfloat16)
        usual = logits_of(model, tiny_config, texts, torch.bfloat16)
        found = logits_of(InferenceModel(model), tiny_config, texts, torch.bfloat16)
    assert (found - exact).std() < 1.5 * (usual - exact).std() < 0.2 * exact.std()


def test_int8_is_within_half_a_step_of_the_weights_and_near_their_logits(tiny_config):
    model, texts = random_model(tiny_config), some_texts(tiny_config)
    weight = model.layers[0].attention.wq.weight.detach()
    int8, scale = quantized(weight)
    assert int8.dtype == torch.int8 and int8.abs().amax(1).eq(127).all()
    assert ((int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all()
    assert quantized(torch.zeros(2, 3))[0].eq(0).all()

    reader = InferenceModel(model, int8=True)
    with torch.inference_mode():
        exact = logits_of(model, tiny_config, texts)
        found = logits_of(reader, tiny_config, texts, reader.dtype)
        single = logits_of(reader, tiny_config, texts[:1], reader.dtype)  # one row: another kernel
    assert (found - exact).std() < 0.05 * exact.std()
    assert (single - exact[:1]).std() < 0.05 * exact.std()


@pytest.mark.skipif(not packs(torch.float32), reason="oneDNN packs nothing here")
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_either_layout_reads_one_row(tiny_config, layout, monkeypatch):
    model, (text, *_) = random_model(tiny_config), some_texts(tiny_config)
    monkeypatch.setattr("model.generation.inference_model.WORTH_TRYING", 0)
    monkeypatch.setenv("MATECONV_LAYOUT", layout)
    engine = Engine(model, compile=False)
    for matrix in engine._module.matrices:
        assert matrix.plain_for_one == (layout == "plain") == (matrix.plain is not None)
    with torch.inference_mode():
        found, expected = (logits_of(reader, tiny_config, [text]) for reader in (engine, model))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_way_is_tried_once_and_the_first_stays_unless_another_is_clearly_faster(tmp_path, monkeypatch):
    now, share = [0.0], [1.0]  # of the time, what this thread runs
    clock = SimpleNamespace(perf_counter=lambda: now[0], thread_time=lambda: share[0] * now[0])
    monkeypatch.setattr("model.trial.time", clock)

    def ways(packed, plain):
        def taking(seconds):
            now[0] += seconds

        return {"packed": functools.partial(taking, packed), "plain": functools.partial(taking, plain)}

    told = []

    def say(way, times):
        told.append((way, times))

    for packed, plain, expected in [(4, 1, "plain"), (1, 4, "packed"), (1.1, 1, "packed"), (1.3, 1, "plain")]:
        kept = tmp_path / "new" / f"{packed}.json"
        assert fastest_way(kept, ways(packed, plain), say) == expected
        assert told.pop()[0] == expected and not told
        assert fastest_way(kept, ways(plain, packed), say) == expected and not told  # tries nothing
    kept.write_text("{", "utf-8")
    assert fastest_way(kept, ways(2, 1), say) == "plain"
    unwritable = tmp_path / "file" / "kept.json"
    unwritable.parent.write_text("")
    assert fastest_way(unwritable, ways(2, 1), say) == "plain"
    share[0] = 0.5
    assert fastest_way(tmp_path / "busy.json", ways(2, 1), say) == "packed"
    assert not (tmp_path / "busy.json").exists()


def test_a_layout_that_there_is_not_is_one_line(tiny_model, monkeypatch):
    monkeypatch.setenv("MATECONV_LAYOUT", "loose")
    with pytest.raises(InputError, match="'loose' found, plain or packed expected"):
        Engine(tiny_model, compile=False)


def test_an_engine_belongs_to_the_weights_that_it_was_made_of(tiny_model):
    engine = Engine(tiny_model)
    assert engine.fits(tiny_model, False, None) and not engine.fits(tiny_model, True, None)
    with torch.no_grad():
        tiny_model.output.weight.mul_(2)
    assert not engine.fits(tiny_model, False, None)


def test_a_change_of_a_routers_bias_is_seen(tiny_config):
    """It is a buffer, not a parameter."""
    model = model_of(LMConfig(**{**vars(tiny_config), **SHARED_EXPERTS}))
    engine = Engine(model, compile=False)
    assert engine.fits(model, False, False)
    model.layers[1].feed_forward.router.bias[2] += 1e-3
    assert not engine.fits(model, False, False)


def swap_rows(weight):
    weight.data[[3, 7]] = weight.data[[7, 3]]


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.copy_(weight.data + 1),  # which PyTorch's version counter does not see
        lambda weight: weight.data.view(-1)[-1:].mul_(1 + 2**-23),  # one bit of one number
        lambda weight: weight.data.neg_(),
        swap_rows,
        lambda weight: weight.data.copy_(weight.data.roll(1, 0)),
        lambda weight: weight.data.copy_(weight.data.flip(1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_change_of_a_weight_is_seen(tiny_model, change, dtype):
    model = tiny_model.to(dtype)
    engine, weight = Engine(model), model.layers[1].attention.wq.weight
    before = weight.detach().clone()
    change(weight)
    if torch.equal(before, weight):
        pytest.skip("no change in this dtype")
    assert not engine.fits(model, False, None)
    weight.data.copy_(before)
    assert engine.fits(model, False, None)


ROW = 2 * WIDTH  # float32


@pytest.mark.parametrize("sizes", [(5,), (ROW - 1, 3), (7 * ROW, ROW + 1), ((GROUP * BLOCK + GROUP + 3) * ROW + 9, 40)])
def test_the_checksum_is_of_sums_of_blocks_each_times_a_power_of_the_factor(sizes):
    torch.manual_seed(0)
    model = torch.nn.ParameterList(torch.randn(size + 1)[1:] for size in sizes)  # not at a multiple of 8 bytes
    blocks, rest = [], b""
    for parameter in model:
        data = parameter.detach().numpy().tobytes()
        words = np.frombuffer(data[: len(data) // (8 * WIDTH) * (8 * WIDTH)], np.uint64).reshape(-1, WIDTH)
        rest += data[words.nbytes :]
        groups = len(words) // GROUP * GROUP
        blocks += [words[at : min(at + GROUP * BLOCK, groups)] for at in range(0, groups, GROUP * BLOCK)]
        blocks += [words[groups:]]
    words = np.frombuffer(rest + bytes(-len(rest) % (8 * WIDTH)), np.uint64).reshape(-1, WIDTH)
    groups = len(words) // GROUP * GROUP
    blocks += [words[:groups], words[groups:]]
    total, factor = [0] * WIDTH, 1
    for block in (block for block in blocks if len(block)):
        total = [(one + factor * int(two)) % 2**64 for one, two in zip(total, block.sum(0), strict=True)]
        factor = factor * FACTOR % 2**64
    assert checksum(model) == np.array(total, np.uint64).tobytes()
    with torch.no_grad():
        model[0][-1] = torch.nextafter(model[0][-1], torch.tensor(9.0))
    assert checksum(model) != np.array(total, np.uint64).tobytes()


@pytest.mark.long
def test_texts_come_from_the_weights_as_they_are(tiny_model, tokenizer):
    generator = TextGenerator(tiny_model, tokenizer, compile=False)
    generator.generate("中国", GREEDY)
    other = random_model(tiny_model.config, seed=1)
    for own, new in zip(tiny_model.parameters(), other.parameters(), strict=True):
        own.data.copy_(new)
    assert generator.generate("中国", GREEDY) == TextGenerator(other, tokenizer, compile=False).generate("中国", GREEDY)


def test_an_abandoned_stream_leaves_each_module_in_its_mode(tiny_model, tokenizer):
    """Also where the Transformer itself reads, as on a GPU: no dropout, and no mode changed between two pieces."""
    tiny_model.config.dropout = tiny_model.layers[0].attention.dropout = 0.9
    engine, texts = Engine(tiny_model, compile=False), []
    for module in (engine._module, tiny_model):
        engine._module = module
        for training in (True, False):
            tiny_model.train(training)
            tiny_model.layers[1].train(not training)
            modes = [module.training for module in tiny_model.modules()]
            events = decode(Rows(engine, 1), [[1, 17, 200]], GREEDY, [])
            texts.append([next(events).token for _ in range(9)])
            tiny_model.train(not training)  # what the user does meanwhile stays
            next(events)
            assert {module.training for module in tiny_model.modules()} == {not training}
            tiny_model.train(training)
            tiny_model.layers[1].train(not training)
            events.close()
            assert [module.training for module in tiny_model.modules()] == modes
    assert all(text == texts[0] for text in texts)


# ------------------------------------------------------------------------------------------------ the compiled step


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of compiled steps for the tests of this file."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture
def steps(kept, monkeypatch):
    monkeypatch.setenv("MATECONV_CACHE", str(kept))
    return kept


def leave_out_groups(engine):
    """Let products of all texts and compiled attention continue several texts."""
    engine._groups.make = engine._groups.get = lambda *given: None


def ids_of(model, prompts, config=GREEDY, rows=None):
    """The ids that a Transformer, an engine, or the engine of `rows` adds to each prompt."""
    engine = model if isinstance(model, Engine) else Engine(model, compile=False)
    texts = [[] for _ in prompts]
    for event in decode(rows or Rows(engine, 1), prompts, config, []):
        texts[event.number].append(event.token)
    return texts


@pytest.mark.long
@needs_compiler
def test_the_step_comes_in_the_background_and_not_for_a_seed(tiny_model, tokenizer, steps, monkeypatch, capsys):
    folder = steps / "background" if any(steps.iterdir()) else steps  # the other tests read what is compiled here
    monkeypatch.setenv("MATECONV_CACHE", str(folder))
    generator = TextGenerator(tiny_model, tokenizer)
    expected = generator.generate("中国", GREEDY)
    assert "decoding" not in capsys.readouterr().err  # a short text alone is not worth a compiler

    long = GenerationConfig(do_sample=False, max_new_tokens=100)
    for _ in range(WORTH_COMPILING // 100 + 3):
        generator.generate("中国", long)
    assert "being compiled in the background" in capsys.readouterr().err
    deadline = time.monotonic() + HUNG
    while "the decode step, compiled, kept in" not in (said := capsys.readouterr().err) and time.monotonic() < deadline:
        time.sleep(1)  # the compiler has the lowest priority
        assert generator.generate("中国", GREEDY) == expected
    assert str(folder) in said

    engine = generator.engine()
    assert engine.choose_decoder(repeatable=False) is not None and engine.choose_decoder(repeatable=True) is None
    seeded = GenerationConfig(seed=4, max_new_tokens=30)
    plain = TextGenerator(tiny_model, tokenizer, compile=False)
    assert generator.generate("中国", seeded) == plain.generate("中国", seeded)
    assert not list(folder.glob("tmp*"))


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    ("variant", "int8"),
    [
        ({}, False),
        pytest.param({"qk_norm": True, "tie_embeddings": False}, True, marks=pytest.mark.slow),
        pytest.param(SHARED_EXPERTS, False, marks=pytest.mark.slow),
        pytest.param(EXPERTS | {"tie_embeddings": False, "n_layers": 1}, True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_compiled_step_writes_what_the_eager_one_writes(tiny_config, steps, variant, int8, monkeypatch):
    if int8:  # prompts read in bfloat16, where the CPU has it, choose other experts than the float32 compared with
        monkeypatch.setattr(inference_model, "compute_dtype", lambda dtype, int8: dtype)
    config = LMConfig(**{**vars(tiny_config), **variant})
    model, said = model_of(config), []
    engine = Engine(model, int8, True, said.append)
    if int8:  # the other is there already, as a rule
        assert len(said) == 1 and "compiling" in said[0]
    prompts = [[1, 17, 200], [1, *range(30, 80)], [1, 5]]
    compiled = ids_of(engine, prompts)
    assert "the decode step, compiled" in said[-1]

    if not int8:  # int8's other numbers are bfloat16 in the eager step, float32 in this one
        assert compiled == ids_of(model, prompts)
    with torch.no_grad():  # int8: as the Transformer with the numbers that int8 stands for
        rounded = {n: p for n, p in model.named_parameters() if p.dim() > 1 and "emb" not in n and "router" not in n}
        for parameter in {id(p): p for p in rounded.values()}.values():
            if int8:
                values, scale = quantized(parameter.flatten(0, -2))  # those of experts are stacked
                parameter.copy_((values * scale[:, None]).view_as(parameter))
    assert compiled == ids_of(model, prompts)

    if not int8:
        leave_out_groups(engine)
        assert ids_of(engine, prompts, rows=Rows(engine, 3)) == compiled

    full = ids_of(engine, [[1, 2]], GenerationConfig(do_sample=False, max_new_tokens=500))
    assert full == ids_of(model, [[1, 2]], GenerationConfig(do_sample=False, max_new_tokens=500))
    assert len(full[0]) == config.max_seq_len - 2


@pytest.mark.parametrize("avx2", [True, False])
@pytest.mark.parametrize(
    ("variant", "int8"),
    [
        ({}, False), ({}, True), ({"qk_norm": True, "qkv_bias": True}, True), (EXPERTS, True), (SHARED_EXPERTS, False),
        (SHARED_EXPERTS, True),
    ],
)  # fmt: skip
def test_a_group_step_gives_what_a_step_for_one_text_gives(tiny_config, variant, int8, avx2, monkeypatch):
    """As modules, not compiled; rows without a text harm nobody, and only the caches' new slots change."""
    monkeypatch.setattr("model.generation.decode_step._loads_bytes_slowly", lambda: avx2)
    config = LMConfig(**{**vars(tiny_config), **variant})
    model = model_of(config)
    group, kept = GroupStep(model, int8), KVCache(config, 4, config.max_seq_len + SPARE)
    tokens, lengths = torch.tensor([7, 200, 9, 0]), [5, 40, 1]
    for buffer in (kept.keys, kept.values):
        buffer.normal_(generator=torch.Generator().manual_seed(0))
    before = kept.keys.clone(), kept.values.clone()
    positions = torch.tensor([*lengths, kept.capacity - 1])
    caches = [layer for pair in zip(kept.keys, kept.values, strict=True) for layer in pair]
    with torch.no_grad():
        found = group(tokens, positions, torch.arange(max(lengths) + 1), caches)
        for row, length in enumerate(lengths):
            step = DecodeStep(model, int8)
            for cache, keys, values in zip(step.caches, *(buffer[:, row] for buffer in before), strict=True):
                cache.keys[:], cache.values[:] = keys.transpose(-1, -2), values
            expected = step(tokens[row : row + 1], torch.tensor([length]), torch.zeros(length + 1))
            assert torch.allclose(found[row], expected, atol=1e-5)
            assert torch.allclose(kept.keys[0, row, :, length], step.caches[0].keys[..., length], atol=1e-5)
    for old, new in zip(before, (kept.keys, kept.values), strict=True):
        changed = (old != new).any(-1).any(0).any(1)  # [rows, slots]
        assert [slots.nonzero()[:, 0].tolist() for slots in changed] == [[length] for length in positions.tolist()]


def test_words_hold_the_bytes_of_a_matrix():
    weight = torch.randint(-128, 128, (3, 20), dtype=torch.int8)
    words = in_words(weight).view(torch.int32)
    assert words.shape == (3, 5)
    parts = [(words << (24 - 8 * byte)) >> 24 for byte in range(4)]
    assert torch.equal(torch.cat(parts, 1), weight.int())


@pytest.mark.slow
@needs_compiler
def test_texts_in_compiled_groups_are_those_that_they_are_alone(tiny_model, steps, monkeypatch):
    monkeypatch.setattr("model.generation.engine.GROUPS", {"group4": 4})
    monkeypatch.setattr("model.generation.engine.fastest_way", lambda *given: "in groups")
    said, groups = [], []
    engine = Engine(tiny_model, False, True, said.append)
    prompts = [[1, *range(30, 30 + 7 * n), 5] for n in range(11)]
    expected = ids_of(tiny_model, prompts, GenerationConfig(do_sample=False, max_new_tokens=20))
    call = CompiledGroup.__call__
    monkeypatch.setattr(CompiledGroup, "__call__", lambda *given: (groups.append(len(given[1])), call(*given))[1])
    for rows in (6, 11):  # with few rows, texts take the places of others and are read while others are written
        assert (
            ids_of(engine, prompts, GenerationConfig(do_sample=False, max_new_tokens=20), Rows(engine, rows))
            == expected
        )
    assert {1, 2, 3, 4} <= set(groups) and "the step of several texts, compiled" in said[-1]


@pytest.mark.long
@needs_compiler
def test_a_chat_continues_where_the_compiled_step_stopped(tiny_model, steps):
    engine, config = Engine(tiny_model, False, True), GenerationConfig(do_sample=False, max_new_tokens=8)
    leave_out_groups(engine)
    rows, other = Rows(engine, 1, remembers=True), Rows(engine, 2)
    history = [1, 17, 200]
    for _ in range(4):
        (answer,) = ids_of(engine, [history], config, rows)
        assert [answer] == ids_of(tiny_model, [history], config)
        assert ids_of(engine, [[1, 9, 8], [1, 9]], config, other) == ids_of(tiny_model, [[1, 9, 8], [1, 9]], config)
        history = [*history, *answer, 44, 45]


@pytest.mark.long
@needs_compiler
def test_a_damaged_compiled_step_is_reported_and_not_used(tiny_model, tokenizer, steps, capsys):
    TextGenerator(tiny_model, tokenizer, compile=True).engine()  # there by now, or compiled here
    path = dict(Engine(tiny_model, False, None)._single.files.paths)["step"]
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        text = TextGenerator(tiny_model, tokenizer).generate("中国", GREEDY)
        assert "cannot be used" in capsys.readouterr().err and not path.exists()
    finally:
        path.write_bytes(whole)
    assert text == TextGenerator(tiny_model, tokenizer, compile=False).generate("中国", GREEDY)


@pytest.mark.skipif(os.name == "nt", reason="sessions are POSIX's")
def test_a_killed_compiler_is_started_once_more_and_ctrl_c_does_not_reach_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MATECONV_CACHE", str(tmp_path))
    said = []
    engine = Engine(tiny_model, say=said.append)
    for expected in ("signal 9), trying once more", "signal 9)"):
        assert engine.choose_decoder(repeatable=False, more_to_come=True) is None
        process = engine._single.compiler._process
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert engine.choose_decoder(repeatable=False) is None and said[-1].endswith(expected)
    assert engine.choose_decoder(repeatable=False, more_to_come=True) is None and engine._single.compiler is None


STARTS_A_COMPILER = """
from model.generation.engine import Engine
from model.LMConfig import LMConfig
from model.model import Transformer
import time
engine = Engine(Transformer(LMConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128)))
engine.choose_decoder(repeatable=False, more_to_come=True)
time.sleep(600)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows compiles with cl, which no script can stand in for")
def test_the_compiler_and_what_it_started_end_with_a_killed_chat(tmp_path):
    beats, environment = endless_compiler(tmp_path)
    with forks.Popen([sys.executable, "-c", STARTS_A_COMPILER], cwd=ROOT, env=environment) as chat:
        wait_for(beats.exists, chat)
        chat.kill()
    wait_for(lambda: is_over(beats))


def test_a_compiler_that_fails_twice_is_left_alone(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MATECONV_CACHE", str(tmp_path))
    monkeypatch.setattr("model.generation.compiled_step.sys.executable", shutil.which("false") or "false")
    said = []
    engine = Engine(tiny_model, say=said.append)
    for _ in range(5):
        assert engine.choose_decoder(repeatable=False, more_to_come=True) is None
        if engine._single.compiler is not None:
            engine._single.compiler._process.wait()
    assert [line.count("failed (exit code 1)") for line in said] == [0, 1, 1] and "once more" not in said[-1]


def test_a_cache_that_cannot_be_written_is_one_line(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MATECONV_CACHE", str(tmp_path / "file"))
    said = []
    engine = Engine(tiny_model, say=said.append)
    for _ in range(2):
        assert engine.choose_decoder(repeatable=False, more_to_come=True) is None
    assert len(said) == 1 and "compiling the decode step failed" in said[0]
    with pytest.raises(InputError, match="compile: the decode step cannot be compiled .*; omit --compile"):
        Engine(tiny_model, compile=True)


def test_compiled_code_is_kept_for_all_the_sources_that_it_is_made_from():
    sources = sources_of("model.generation.decode_step")
    assert {"model.model", "model.attention", "model.kv_cache", "model.LMConfig"} <= sources.keys()
    assert "model.weights.load" not in sources and all(name.startswith("model") for name in sources)
    for module in (DecodeStep, BatchAttention, TransformerBlock, LMConfig, apply_rope, quantized, KVCache):
        assert module.__module__ in sources


def test_shapes_with_the_same_heads_share_their_compiled_attention(tiny_config, monkeypatch):
    def attention(**changes):
        config = LMConfig(**{**vars(tiny_config), **changes})
        return kept_path("attention", config, torch.float32, False)

    assert attention() == attention(n_layers=9, vocab_size=400, tie_embeddings=False, **EXPERTS)
    changes = [{"n_heads": 8, "head_dim": 16}, {"n_kv_heads": 1}, {"head_dim": 32}, {"max_seq_len": 64}]
    assert len({attention(), *(attention(**change) for change in changes)}) == 5
    fields = set()  # that its code reads of a config

    class Noting(LMConfig):
        def __getattribute__(self, name):
            if name in LMConfig.__dataclass_fields__:
                fields.add(name)
            return super().__getattribute__(name)

    config = Noting()
    fields.clear()
    monkeypatch.setattr(decode_step, "_compile", lambda *given: None)
    monkeypatch.setattr(decode_step, "refuse_unknown", lambda *given: None)  # which reads all
    decode_step.compile_attention(config, torch.float32, None)
    assert fields == set(ATTENTION_FIELDS)


@pytest.mark.long
def test_a_change_of_any_of_them_is_another_file(tmp_path):
    shutil.copytree(ROOT / "model", tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        import torch
        from model.generation.compiled_step import CompiledFiles, sources_of
        from model.LMConfig import LMConfig
        from model.model import Transformer
        names, model = set(), Transformer(LMConfig(dim=32, n_layers=1))
        for changed in (None, "attention", "LMConfig", "kv_cache", "generation/decode_step"):
            if changed is not None:
                with open(f"model/{changed}.py", "a") as file:
                    file.write("# changed")
            sources_of.cache_clear()
            names.add(CompiledFiles.of(model, False, torch.float32))
        print(len(names))
    """
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path).strip() == b"5"


@pytest.mark.long
def test_without_a_compiler_generation_works(tmp_path, tiny_model, tokenizer_folder):
    from model.weights import Weights, save_weights

    save_weights(tmp_path / "out" / "pretrain_64.pth", Weights(tiny_model.state_dict(), tiny_model.config))
    environment = os.environ | {"CXX": str(tmp_path / "no_compiler"), "MATECONV_CACHE": str(tmp_path / "steps")}

    def chat(*flags):
        files = ["--model_path", "out/pretrain_64.pth", "--tokenizer_path", str(tokenizer_folder)]
        command = [sys.executable, str(ROOT / "inference.py"), *files, *flags]
        return forks.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=environment)

    asked = chat("--prompt", "a", "--compile")
    assert asked.returncode == 2 and "there is no C++ compiler" in asked.stderr and "Traceback" not in asked.stderr
    assert chat("--prompt", "a", "--max_new_tokens", "5").returncode == 0

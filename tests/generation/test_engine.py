"""What reads tokens on a CPU, packed and compiled, against the Transformer itself."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from model.generation.engine import WORTH_COMPILING, Engine
from model.generation.inference_model import InferenceModel, packs
from model.generation.int8 import quantized
from model.generation.rows import Rows
from model.kv_cache import KVCache
from model.LMConfig import LMConfig
from optimized_inference import GenerationConfig, TextGenerator, decode
from tests.conftest import ROOT, random_model

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=40)
VARIANTS = [{}, {"qk_norm": True}, {"tie_embeddings": False}, {"n_kv_heads": 4}, {"n_kv_heads": 1}]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))), reason="there is no C++ compiler here"
)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_give_the_transformers_logits(tiny_config, variant):
    config = LMConfig(**{**vars(tiny_config), **variant})
    model, texts = random_model(config), some_texts(config)
    with torch.inference_mode():
        found = logits_of(InferenceModel(model), config, texts)
        for row, text in enumerate(texts):
            torch.testing.assert_close(found[row], model(text[None])[0, -4:], rtol=1e-4, atol=1e-3)


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


def test_an_engine_belongs_to_the_weights_that_it_was_made_of(tiny_model):
    engine = Engine(tiny_model)
    assert engine.fits(tiny_model, False, None) and not engine.fits(tiny_model, True, None)
    with torch.no_grad():
        tiny_model.output.weight.mul_(2)
    assert not engine.fits(tiny_model, False, None)


# ------------------------------------------------------------------------------------------------ the compiled step


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of compiled steps for the tests of this file."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture
def steps(kept, monkeypatch):
    monkeypatch.setenv("MATECONV_CACHE", str(kept))
    return kept


def ids_of(reader, prompts, config=GREEDY, rows=None):
    reader = reader if isinstance(reader, Engine) else Engine(reader, compile=False)
    texts = [[] for _ in prompts]
    for event in decode(reader, prompts, config, [], rows):
        texts[event.number].append(event.token)
    return texts


@needs_compiler
@pytest.mark.parametrize(("variant", "int8"), [({}, False), ({"qk_norm": True, "tie_embeddings": False}, True)])
def test_the_compiled_step_writes_what_the_eager_one_writes(tiny_config, steps, variant, int8):
    config = LMConfig(**{**vars(tiny_config), **variant})
    model, said = random_model(config), []
    engine = Engine(model, int8, True, said.append)
    assert len(said) == 1 and "compiling" in said[0]
    prompts = [[1, 17, 200], [1, *range(30, 80)], [1, 5]]
    compiled = ids_of(engine, prompts)
    assert "a compiled step" in said[-1]

    if not int8:  # int8's other numbers are bfloat16 in the eager step, float32 in this one
        assert compiled == ids_of(model, prompts)
    with torch.no_grad():  # int8: as the Transformer with the numbers that int8 stands for
        for parameter in {id(p): p for n, p in model.named_parameters() if p.dim() > 1 and "emb" not in n}.values():
            if int8:
                values, scale = quantized(parameter)
                parameter.copy_(values * scale[:, None])
    assert compiled == ids_of(model, prompts)

    if not int8:
        assert ids_of(engine, prompts, rows=Rows(engine, 3)) == compiled

    full = ids_of(engine, [[1, 2]], GenerationConfig(do_sample=False, max_new_tokens=500))
    assert full == ids_of(model, [[1, 2]], GenerationConfig(do_sample=False, max_new_tokens=500))
    assert len(full[0]) == config.max_seq_len - 2


@needs_compiler
def test_a_chat_goes_on_where_the_compiled_step_left_it(tiny_model, steps):
    engine, config = Engine(tiny_model, False, True), GenerationConfig(do_sample=False, max_new_tokens=8)
    rows, other = Rows(engine, 1, remembers=True), Rows(engine, 2)
    history = [1, 17, 200]
    for _ in range(4):
        (answer,) = ids_of(engine, [history], config, rows)
        assert [answer] == ids_of(tiny_model, [history], config)
        assert ids_of(engine, [[1, 9, 8], [1, 9]], config, other) == ids_of(tiny_model, [[1, 9, 8], [1, 9]], config)
        history = [*history, *answer, 44, 45]


@needs_compiler
def test_the_step_comes_in_the_background_and_not_for_a_seed(tiny_model, tokenizer, steps, monkeypatch, capsys):
    monkeypatch.setenv("MATECONV_CACHE", str(steps / "background"))
    generator = TextGenerator(tiny_model, tokenizer)
    expected = generator.generate("中国", GREEDY)
    assert "decoding" not in capsys.readouterr().err  # a short text alone is not worth a compiler

    long = GenerationConfig(do_sample=False, max_new_tokens=100)
    for _ in range(WORTH_COMPILING // 100 + 3):
        generator.generate("中国", long)
    assert "is made in the background" in capsys.readouterr().err
    deadline = time.monotonic() + 120
    while "a compiled step, kept in" not in (said := capsys.readouterr().err) and time.monotonic() < deadline:
        time.sleep(0.2)
        assert generator.generate("中国", GREEDY) == expected
    assert str(steps / "background") in said

    step = generator.engine().step(repeatable=False)
    assert step is not None and generator.engine().step(repeatable=True) is None
    seeded = GenerationConfig(seed=4, max_new_tokens=30)
    plain = TextGenerator(tiny_model, tokenizer, compile=False)
    assert generator.generate("中国", seeded) == plain.generate("中国", seeded)
    assert not list((steps / "background").glob("tmp*"))


@needs_compiler
def test_a_damaged_file_of_a_step_is_told_and_not_used(tiny_model, tokenizer, steps, capsys):
    TextGenerator(tiny_model, tokenizer, compile=True).engine()  # there by now, or compiled here
    path, _ = Engine(tiny_model, False, None)._paths
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        text = TextGenerator(tiny_model, tokenizer).generate("中国", GREEDY)
        assert "cannot be used" in capsys.readouterr().err and not path.exists()
    finally:
        path.write_bytes(whole)
    assert text == TextGenerator(tiny_model, tokenizer, compile=False).generate("中国", GREEDY)


def test_without_a_compiler_texts_are_written_all_the_same(tmp_path, tiny_model, tokenizer_folder):
    from model.weights import Weights, save_weights

    save_weights(tmp_path / "out" / "pretrain_64.pth", Weights(tiny_model.state_dict(), tiny_model.config))
    environment = os.environ | {"CXX": str(tmp_path / "no_compiler"), "MATECONV_CACHE": str(tmp_path / "steps")}

    def chat(*flags):
        files = ["--model_path", "out/pretrain_64.pth", "--tokenizer_path", str(tokenizer_folder)]
        command = [sys.executable, str(ROOT / "inference.py"), *files, *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=environment)

    asked = chat("--prompt", "a", "--compile")
    assert asked.returncode == 2 and "there is no C++ compiler" in asked.stderr and "Traceback" not in asked.stderr
    assert chat("--prompt", "a", "--max_new_tokens", "5").returncode == 0

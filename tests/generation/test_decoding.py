"""Texts of different requests, written together: pieces of prompts, cancelled texts, kept prefixes, own settings."""

import dataclasses
import random

import numpy as np
import pytest

from model.errors import InputError
from model.generation.decoding import Decoding
from model.generation.engine import Engine
from model.generation.generation_config import GenerationConfig
from model.generation.prefixes import FEWEST, Prefixes
from model.generation.rows import Rows
from model.kv_cache import KVCache

GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=12)
CONFIGS = [
    GREEDY,
    GenerationConfig(do_sample=False, max_new_tokens=7),
    GenerationConfig(max_new_tokens=9, seed=3, presence_penalty=1.0),
    GenerationConfig(max_new_tokens=5, seed=4, top_k=0, no_repeat_ngram_size=2, logprobs=True, top_logprobs=2),
]


@pytest.fixture
def engine(tiny_model):
    return Engine(tiny_model, compile=False)


def alone(engine, prompt, config) -> list[int]:
    decoding = Decoding(Rows(engine, 1), [])
    decoding.admit(0, prompt, config)
    ids = []
    while decoding.rows.live:
        ids += [event.token for event in decoding.step()]
    return ids


def some_prompts(draws: random.Random, count: int) -> list[list[int]]:
    """Of all lengths; every second one goes on where another stops."""
    prompts: list[list[int]] = []
    for n in range(count):
        begin = draws.choice(prompts)[: draws.randrange(1, 90)] if n % 2 else []
        length = draws.randrange(1, 25) if n % 2 else draws.choice([1, 10, 60, 80])
        prompts.append([*begin, *(draws.randrange(3, 300) for _ in range(length))])
    return prompts


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_each_text_is_the_one_that_it_is_alone(engine, seed):
    draws = random.Random(seed)
    prompts = some_prompts(draws, 40)
    configs = [draws.choice(CONFIGS) for _ in prompts]
    expected = [alone(engine, prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    prefixes = Prefixes(draws.choice([1 << 20, 40_000]))
    decoding = Decoding(
        Rows(engine, draws.choice([2, 5]), prefixes=prefixes), [], prompt_tokens=draws.choice([1, 7, 30])
    )
    found: dict[int, list[int]] = {}
    waiting, cancelled, known = list(range(len(prompts))), set(), 0
    while waiting or decoding.rows.live:
        while waiting and decoding.rows.free and draws.random() < 0.7:
            number = waiting.pop(0)
            known += decoding.admit(number, prompts[number], configs[number])
            found[number] = []
        for event in decoding.step() if decoding.rows.live else ():
            found[event.number].append(event.token)
            assert (event.logprob is not None) == configs[event.number].logprobs
            assert (event.likely is not None) == (configs[event.number].top_logprobs > 0)
        if decoding.rows.live and draws.random() < 0.1:
            number = draws.choice(decoding.rows.live).number
            decoding.cancel(number)
            cancelled.add(number)
        assert prefixes.nbytes <= prefixes.max_bytes
    assert known > 0 and cancelled and len(cancelled) < len(prompts)
    for number, ids in found.items():
        whole = expected[number]
        assert ids == (whole[: len(ids)] if number in cancelled else whole), number


def test_a_step_reads_no_more_of_prompts_than_it_may(engine):
    decoding = Decoding(Rows(engine, 3), [], prompt_tokens=10)
    for number, length in enumerate([4, 25, 3]):
        decoding.admit(number, [5] * length, GREEDY)
    steps = [[event.number for event in decoding.step()] for _ in range(4)]
    assert steps == [[0], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("known", [0, 90])
def test_prompts_that_are_partly_known_are_read_beside_long_ones(engine, known):
    """Padded to the longest, a part's rows would reach past the context of 128."""
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    prompts = [[1, *[5] * 74], [1, *[6] * 79], [1, *[7] * 79], [1, *[5] * 110]]
    expected = [alone(engine, prompt, config) for prompt in prompts]
    rows = Rows(engine, 4, prefixes=Prefixes(1 << 24) if known else None)
    decoding = Decoding(rows, [], prompt_tokens=128)
    if known:  # of the last one
        decoding.admit(9, prompts[3][:known], dataclasses.replace(config, max_new_tokens=1))
        decoding.step()
    found = {number: decoding.admit(number, prompt, config) for number, prompt in enumerate(prompts)}
    assert found[3] == (known and known)
    texts = [[] for _ in prompts]
    while rows.live:
        for event in decoding.step():
            texts[event.number].append(event.token)
    assert texts == expected


def test_settings_that_leave_no_token_end_their_text_alone(engine):
    failed = []
    rows = Rows(engine, 2)
    decoding = Decoding(rows, [], on_error=lambda number, error: failed.append((number, str(error))))
    bans = GenerationConfig(do_sample=False, logit_bias=dict.fromkeys(range(300), -np.inf))
    decoding.admit(0, [5, 6], bans)
    decoding.admit(1, [5, 6], GREEDY)
    ids = []
    while rows.live:
        ids += [event.token for event in decoding.step()]
    assert ids == alone(engine, [5, 6], GREEDY)
    assert [number for number, _ in failed] == [0] and failed[0][1].startswith("no token is left to choose")
    raising = Decoding(rows, [])
    raising.admit(0, [5, 6], bans)
    with pytest.raises(InputError, match="no token is left"):
        raising.step()


def test_prefixes_are_found_by_their_longest_beginning_and_the_oldest_go_first(tiny_config):
    cache = KVCache(tiny_config, 2, 128)
    for buffer in (cache.keys, cache.values):
        buffer.normal_()
    per_token = (cache.keys.nbytes + cache.values.nbytes) // (2 * 128)
    prefixes = Prefixes(200 * per_token)
    ids = np.arange(100)
    prefixes.keep(ids[: FEWEST - 1], cache, 0)
    assert prefixes.nbytes == 0  # too short to be worth it
    prefixes.keep(ids[:50], cache, 0)
    prefixes.keep(ids, cache, 0)
    assert prefixes.nbytes == 100 * per_token  # the text that goes on replaces its beginning
    other = np.concatenate([ids[:40], np.full(40, 7)])
    assert prefixes.fill(other, 79, cache, 1) == 40
    assert (cache.keys[:, 1, :, :40] == cache.keys[:, 0, :, :40]).all()
    assert (cache.values[:, 1, :, :40] == cache.values[:, 0, :, :40]).all()
    assert prefixes.fill(ids, 99, cache, 1) == 99
    assert prefixes.fill(ids[1:], 98, cache, 1) == 0
    prefixes.keep(other, cache, 1)
    prefixes.keep(ids[::-1][:60], cache, 1)  # no room: the first one goes
    assert prefixes.nbytes == 140 * per_token and prefixes.fill(ids, 99, cache, 1) == 40
    prefixes.keep(other[:60], cache, 1)  # known, as the beginning of another
    assert prefixes.nbytes == 140 * per_token
    small = Prefixes(60 * per_token)
    small.keep(ids, cache, 0)  # larger than all that may be kept: its beginning is
    assert small.nbytes == 60 * per_token and small.fill(ids, 99, cache, 1) == 60

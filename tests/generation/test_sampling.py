"""Choosing the next token: each processor against transformers' own, and greedy decoding against `generate`."""

import random

import pytest
import torch
from transformers.generation import logits_process as theirs

from model.errors import InputError
from model.generation.engine import Engine
from model.generation.rows import Rows
from model.generation.sampling import (
    PADDING,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    OutputPenalties,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    processors_of,
    sample,
    warpers_of,
)
from model.LMConfig import LMConfig
from optimized_inference import GenerationConfig, decode
from tests.conftest import random_model
from tests.llama import as_llama

VOCAB = 50
PROMPT, OUTPUT = 20, 10  # tokens

PAIRS = [(RepetitionPenalty(p), theirs.RepetitionPenaltyLogitsProcessor(p)) for p in (0.7, 1.1, 2.0)]
PAIRS += [(NoRepeatNgram(n), theirs.NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 40)]
PAIRS += [(Temperature(t), theirs.TemperatureLogitsWarper(t)) for t in (0.01, 0.8, 3.0)]
PAIRS += [(TopK(k), theirs.TopKLogitsWarper(k)) for k in (1, 7, 50, 999)]
PAIRS += [(TopP(p), theirs.TopPLogitsWarper(p)) for p in (0.0, 0.3, 0.9, 0.999)]
PAIRS += [(MinP(p), theirs.MinPLogitsWarper(p)) for p in (0.0, 0.05, 0.5, 1.0)]
PAIRS += [
    (MinNewTokens(n, ends), theirs.MinNewTokensLengthLogitsProcessor(PROMPT, n, ends))
    for n in (1, OUTPUT, OUTPUT + 1)
    for ends in ([3], [3, 7])
]
PAIRS += [
    (LogitBias(bias), theirs.SequenceBiasLogitsProcessor({(index,): value for index, value in bias.items()}))
    for bias in ({5: 2.5}, {0: -1.0, 49: 0.5, 7: float("-inf")})
]


def random_case(seed, rows=4, length=PROMPT + OUTPUT):
    """Tokens with many repeats, and logits rounded so coarsely that many tie."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 12, (rows, length), generator=generator)
    logits = torch.randn(rows, VOCAB, generator=generator) * 3
    return tokens, logits if seed % 2 else logits.round()


@pytest.mark.parametrize(("ours", "their"), PAIRS, ids=[repr(ours) for ours, _ in PAIRS])
def test_each_processor_equals_transformers(ours, their):
    for seed in range(40):
        tokens, logits = random_case(seed)
        assert torch.equal(ours(logits, tokens, tokens[:, PROMPT:]), their(tokens, logits.clone()))


def test_composed_processors_equal_transformers():
    config = GenerationConfig(
        temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.3, no_repeat_ngram_size=2,
        min_new_tokens=OUTPUT + 1, logit_bias={4: 1.5},
    )  # fmt: skip
    chain = theirs.LogitsProcessorList(
        [
            theirs.SequenceBiasLogitsProcessor({(4,): 1.5}),
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
            theirs.NoRepeatNGramLogitsProcessor(2),
            theirs.MinNewTokensLengthLogitsProcessor(PROMPT, OUTPUT + 1, [2]),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.1),
        ]
    )
    for seed in range(40):
        tokens, logits = random_case(seed)
        expected = chain(tokens, logits.clone())
        for process in [*processors_of(config, [2]), *warpers_of(config)]:
            logits = process(logits, tokens, tokens[:, PROMPT:])
        assert torch.equal(logits, expected)


@pytest.mark.long
def test_output_penalties_follow_openais_formula():
    for seed in range(20):
        tokens, logits = random_case(seed)
        output = tokens[:, PROMPT:]
        expected = logits.clone()
        for row, ids in enumerate(output.tolist()):
            for index in set(ids):
                expected[row, index] -= 0.7 + 0.25 * ids.count(index)
        torch.testing.assert_close(OutputPenalties(0.7, 0.25)(logits, tokens, output), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "process",
    [
        RepetitionPenalty(1.5), NoRepeatNgram(1), NoRepeatNgram(2), NoRepeatNgram(5), OutputPenalties(1.0, 0.5),
        MinNewTokens(5, [3]),
    ],
)  # fmt: skip
def test_padding_is_not_penalised(process):
    for length in (1, 3, 10):
        tokens, logits = random_case(1, length=length)
        padded = torch.nn.functional.pad(tokens, (6, 0), value=PADDING)
        assert torch.equal(process(logits, padded, padded), process(logits, tokens, tokens))


def test_ties_with_the_kth_survive():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    tokens = torch.zeros(1, 1, dtype=torch.long)
    kept = TopK(2)(logits, tokens, tokens).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


def test_the_token_that_reaches_p_exactly_is_the_last_one():
    logits = torch.zeros(1, 4)  # a quarter each, so that the sums are exact
    tokens = torch.zeros(1, 1, dtype=torch.long)
    assert TopP(0.5)(logits, tokens, tokens).isfinite().sum() == 2
    assert torch.equal(TopP(0.5)(logits, tokens, tokens), theirs.TopPLogitsWarper(0.5)(tokens, logits))


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    generator = random.Random(0)
    logits = probabilities.log()[None]
    draws = torch.tensor([sample(logits, [generator])[0] for _ in range(4000)])
    frequencies = draws.bincount(minlength=4) / 4000
    assert frequencies[3] == 0
    torch.testing.assert_close(frequencies, probabilities, atol=0.03, rtol=0)  # four standard deviations


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_draws_from_the_top_k_follow_the_warpers(top_p, min_p):
    warpers = warpers_of(GenerationConfig(temperature=0.7, top_k=8, top_p=top_p, min_p=min_p))
    for seed in range(1, 10, 2):  # without ties: which of several equal logits TopP leaves is not determined
        _, logits = random_case(seed, rows=1)
        expected = logits
        for warper in warpers:
            expected = warper(expected)
        generator = random.Random(seed)
        draws = torch.tensor([sample(logits, [generator], warpers)[0] for _ in range(2000)])
        frequencies = draws.bincount(minlength=logits.shape[1]) / 2000
        assert not frequencies[expected[0].isinf()].any()
        torch.testing.assert_close(frequencies, expected.softmax(-1)[0], atol=0.045, rtol=0)  # four deviations


def test_a_tie_with_the_kth_is_drawn_too():
    logits, generator = torch.tensor([[3.0, 3.0, 3.0, 0.0]]), random.Random(0)
    assert {sample(logits, [generator], [TopK(2)])[0] for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_warper_is_dropped_beside_top_k(place):
    """One that is not known to the fast way, or in another order or twice, is applied all the same."""

    def only_the_third(logits, *_):
        return logits.masked_fill(torch.arange(logits.shape[-1]) != 3, -torch.inf)

    logits, generator = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0]]), random.Random(0)
    warpers = [Temperature(0.5), TopK(4)]
    warpers.insert(place, only_the_third)
    assert {sample(logits, [generator], warpers)[0] for _ in range(30)} == {3}
    for warpers in ([TopK(4), Temperature(1e-3)], [TopK(4), TopK(1)], [TopP(0.01), TopK(4)]):
        assert {sample(logits, [generator], warpers)[0] for _ in range(30)} == {0}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"logit_bias": {300: 1.0}}, "logit_bias: id 300 found, the vocabulary has the ids 0 to 299"),
        ({"logit_bias": {0: 1.0, 10**9: 1.0}}, "logit_bias: id 1000000000 found"),
        ({"logit_bias": dict.fromkeys(range(300), float("-inf"))}, "no token is left to choose"),
        ({"logit_bias": {5: float("-inf")} | dict.fromkeys(range(10, 300), float("-inf")),
          "no_repeat_ngram_size": 1}, "no token is left to choose"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("choice", [{"do_sample": False}, {"seed": 1}, {"seed": 1, "top_k": 0}])
def test_settings_that_leave_no_token_are_one_line(tiny_model, settings, problem, choice):
    config = GenerationConfig(**settings, **choice, max_new_tokens=50)
    with pytest.raises(InputError, match=problem) as caught:
        ids_of(tiny_model, [1, 50], config, eos_id=299)
    assert "\n" not in str(caught.value)


def ids_of(model, prompt, config, eos_id=2):
    events = decode(Rows(Engine(model), 1), [prompt], config, [eos_id])
    return [event.token for event in events if event.token is not None]


@pytest.mark.long
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (1.3, 0), (1.2, 3)])
def test_greedy_equals_transformers_generate(penalty, ngram):
    model = random_model(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128))
    llama = as_llama(model)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=40, repetition_penalty=penalty, no_repeat_ngram_size=ngram
    )
    for prompt in ([1, 17, 200, 45], [1, 9], [1, *range(30, 90)]):
        expected = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
            repetition_penalty=penalty,
            no_repeat_ngram_size=ngram,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        if 2 in expected:  # eos is part of transformers' output, not of ours
            expected = expected[: expected.index(2)]
        assert ids_of(model, prompt, config) == expected


def test_a_seed_repeats_a_call_and_another_one_differs(tiny_model):
    configs = [GenerationConfig(seed=seed, temperature=2.0, max_new_tokens=30) for seed in (7, 7, 8)]
    first, again, other = (ids_of(tiny_model, [1, 50], config) for config in configs)
    assert first == again != other


def test_without_a_seed_calls_differ_and_the_global_generator_stays(tiny_model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    config = GenerationConfig(temperature=2.0, max_new_tokens=30)
    assert ids_of(tiny_model, [1, 50], config) != ids_of(tiny_model, [1, 50], config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9])
def test_temperature_zero_is_greedy(tiny_model, temperature):
    greedy = ids_of(tiny_model, [1, 50], GenerationConfig(do_sample=False))
    assert ids_of(tiny_model, [1, 50], GenerationConfig(temperature=temperature)) == greedy


def test_wrong_settings_are_all_named_at_once():
    with pytest.raises(InputError) as caught:
        GenerationConfig(
            temperature=-1, top_k=2.5, top_p=1.5, max_new_tokens=0, repetition_penalty=0, seed="x", min_p=2,
            min_new_tokens=-1, presence_penalty="a", frequency_penalty=float("nan"), logit_bias={"a": 1},
        )  # fmt: skip
    message = str(caught.value)
    for problem in (
        "temperature: -1", "top_k: 2.5", "top_p: 1.5", "max_new_tokens: 0", "penalty: 0", "seed: 'x'", "min_p: 2",
        "min_new_tokens: -1", "presence_penalty: 'a'", "frequency_penalty: nan", "logit_bias: {'a': 1}",
    ):  # fmt: skip
        assert problem in message
    assert "use_cache" not in message and "\n" not in message

"""What the server answers: OpenAI's shapes, parameters and errors."""

import asyncio
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.generation.generation_config import GenerationConfig
from model.serving.requests import Defaults, completion_request
from optimized_inference import load_generator
from tests.serving.conftest import events_of, running_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "你好"}]
GREEDY = {"temperature": 0, "repetition_penalty": 1}
ID = re.compile(r"(chatcmpl|cmpl)-[0-9a-f]{24}")


@pytest.fixture(scope="module")
def generator(weights_file):
    return load_generator(weights_file, compile=False)


def greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=tokens)


def settled(answer: dict) -> dict:
    """An answer without what differs each time, which is checked."""
    assert ID.fullmatch(answer.pop("id")) and answer.pop("created") > 1.7e9
    assert re.fullmatch("fp_[0-9a-f]{10}", answer.pop("system_fingerprint"))
    timings = answer.pop("timings", None)
    assert timings is None or all(value >= 0 for value in timings.values())
    return answer


def test_models_and_health(server):
    assert server.call("GET", "/health")[2] == {"status": "ok"}
    status, _, found = server.call("GET", "/v1/models")
    created = found["data"][0].pop("created")
    entry = {"id": "tiny", "object": "model", "owned_by": "mateconv", "max_model_len": 128, "chat": True}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    entry["sampling"] = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, **penalties, "stop": [], "seed": None}
    assert status == 200 and found == {"object": "list", "data": [entry]}
    assert server.call("GET", "/v1/models/tiny")[2] == {**entry, "created": created}
    status, _, found = server.call("GET", "/v1/models/other")
    assert status == 404 and found["error"]["code"] == "model_not_found"


def test_a_chat(server, generator):
    expected = generator.chat(HELLO, greedy(12))
    status, headers, found = server.call("POST", CHAT, {"messages": HELLO, "max_tokens": 12, **GREEDY})
    assert status == 200 and headers["content-type"] == "application/json"
    prompt = len(generator.encode_chat(HELLO))
    new = found["usage"]["completion_tokens"]
    assert settled(found) == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "logprobs": None,
                "message": {"role": "assistant", "content": expected, "refusal": None},
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert new == 12


def test_a_chat_in_a_stream(server):
    body = {"messages": HELLO, "max_tokens": 12, **GREEDY}
    whole = server.call("POST", CHAT, body)[2]
    status, headers, text = server.call(
        "POST", CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = events_of(text)
    assert done == "[DONE]" and len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert "timings" in usage and settled(usage)


def test_a_stream_without_usage_has_none(server):
    *chunks, done = events_of(server.call("POST", CHAT, {"messages": HELLO, "max_tokens": 3, "stream": True})[2])
    assert done == "[DONE]" and all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_a_completion(server, generator):
    expected = generator.generate("春风", greedy(16))  # the default
    status, _, found = server.call("POST", TEXT, {"prompt": "春风", **GREEDY})
    assert status == 200 and found["usage"]["completion_tokens"] == 16
    assert settled(found)["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": expected}]
    assert found["object"] == "text_completion"
    ids = generator.encode_prompt("春风")
    for prompt in (ids, [ids], ["春风"]):
        assert server.call("POST", TEXT, {"prompt": prompt, **GREEDY})[2]["choices"][0]["text"] == expected
    *chunks, done = events_of(server.call("POST", TEXT, {"prompt": "春风", "stream": True, **GREEDY})[2])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected and done == "[DONE]"


def test_several_prompts_and_texts(server, generator):
    prompts = ["春风", "子曰", "中国"]
    expected = [generator.generate(prompt, greedy(9)) for prompt in prompts for _ in range(2)]
    body = {"prompt": prompts, "n": 2, "max_tokens": 9, **GREEDY}
    found = server.call("POST", TEXT, body)[2]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert found["usage"]["prompt_tokens"] == sum(len(generator.encode_prompt(prompt)) for prompt in prompts)
    texts = [""] * 6
    for chunk in events_of(server.call("POST", TEXT, {**body, "stream": True})[2])[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == expected
    drawn = server.call("POST", TEXT, {"prompt": "春风", "n": 3, "max_tokens": 9, "seed": 7, "top_k": 0})[2]["choices"]
    assert len({choice["text"] for choice in drawn}) == 3  # each from its own seed


def test_a_seed_repeats_a_text(server):
    body = {"prompt": "春风", "max_tokens": 20, "temperature": 2, "top_p": 1, "top_k": 0}
    seeded = {server.call("POST", TEXT, {**body, "seed": 5})[2]["choices"][0]["text"] for _ in range(3)}
    free = {server.call("POST", TEXT, body)[2]["choices"][0]["text"] for _ in range(3)}
    assert len(seeded) == 1 and len(free) == 3
    assert server.call("POST", TEXT, {**body, "seed": -5})[0] == 200


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(server):
    body = {"prompt": "春风", "max_tokens": 40, **GREEDY}
    whole = server.call("POST", TEXT, body)[2]["choices"][0]["text"]
    stop = whole[5:8]
    place = whole.find(stop)
    for given in (stop, [stop], ["no such text", stop]):
        found = server.call("POST", TEXT, {**body, "stop": given})[2]["choices"][0]
        assert (found["text"], found["finish_reason"]) == (whole[:place], "stop")
    chunks = events_of(server.call("POST", TEXT, {**body, "stop": stop, "stream": True})[2])[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[:place]


def test_log_probabilities(server, generator):
    body = {"messages": HELLO, "max_tokens": 10, "logprobs": True, "top_logprobs": 3, **GREEDY}
    found = server.call("POST", CHAT, body)[2]["choices"][0]
    tokens = found["logprobs"]["content"]
    assert len(tokens) == 10 and all(len(token["top_logprobs"]) == 3 for token in tokens)
    for token in tokens:
        best = token["top_logprobs"][0]
        assert (best["id"], best["bytes"]) == (token["id"], token["bytes"])  # greedy
        assert math.isclose(best["logprob"], token["logprob"], abs_tol=1e-5)
    content = b"".join(bytes(token["bytes"]) for token in tokens)
    assert content.decode("utf-8", "replace") == found["message"]["content"]
    sample = generator.continued(
        [generator.encode_chat(HELLO)],
        GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=10, logprobs=True),
    )[0]
    assert [token["id"] for token in tokens] == sample.ids
    assert all(
        math.isclose(token["logprob"], own, abs_tol=1e-4) for token, own in zip(tokens, sample.logprobs, strict=True)
    )
    chunks = events_of(server.call("POST", CHAT, {**body, "stream": True})[2])[1:-2]
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["content"]]
    assert [token["bytes"] for token in streamed] == [token["bytes"] for token in tokens]


def test_echo_scores_a_prompt(server, generator):
    """As evaluation harnesses ask: the sum is what `score` says."""
    text = "春风又绿江南岸"
    body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 2}
    found = server.call("POST", TEXT, body)[2]
    choice, logprobs = found["choices"][0], found["choices"][0]["logprobs"]
    assert choice["text"] == text and found["usage"]["completion_tokens"] == 0
    ids = generator.encode_prompt(text)
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == len(ids)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert math.isclose(-sum(logprobs["token_logprobs"][1:]), generator.score(text).nats, rel_tol=1e-4)
    assert [token["id"] for token in logprobs["content"]] == ids
    whole = server.call("POST", TEXT, {**body, "max_tokens": 4, **GREEDY})[2]["choices"][0]
    assert whole["text"] == text + generator.generate(text, greedy(4))
    assert len(whole["logprobs"]["tokens"]) == len(ids) + 4
    chunks = events_of(server.call("POST", TEXT, {**body, "max_tokens": 4, "stream": True, **GREEDY})[2])[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    # lm_eval leaves out the last token, which it asks for and does not score: the eos counts too.
    for bias in (-100, 100):
        asked = {**body, "max_tokens": 1, "logit_bias": {"2": bias}, **GREEDY}
        told = server.call("POST", TEXT, asked)[2]["choices"][0]["logprobs"]
        assert told["token_logprobs"][:-1] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
        assert len(told["tokens"]) == len(ids) + 1


def test_ids_are_told_on_request(server, generator):
    body = {"prompt": "春风", "max_tokens": 5, "return_token_ids": True, "stream": True, "logprobs": 5, **GREEDY}
    chunks = [chunk["choices"][0] for chunk in events_of(server.call("POST", TEXT, body)[2])[:-1]]
    assert chunks[0]["prompt_token_ids"] == generator.encode_prompt("春风")
    ids = [index for choice in chunks[:-1] for index in choice["token_ids"]]
    assert ids == generator.continued([generator.encode_prompt("春风")], greedy(5))[0].ids
    branched = server.call(
        "POST", TEXT, {"prompt": [*chunks[0]["prompt_token_ids"], *ids[:2]], "max_tokens": 3, **GREEDY}
    )
    assert branched[2]["usage"]["completion_tokens"] == 3


def test_bias_and_penalties(server):
    body = {"prompt": "春风", "max_tokens": 6, "return_token_ids": True, **GREEDY}

    def ids(**more):
        return server.call("POST", TEXT, {**body, **more})[2]["choices"][0]["token_ids"]

    assert ids(logit_bias={"42": 100}) == [42] * 6
    assert ids(logit_bias={str(ids()[0]): -100})[0] != ids()[0]
    pressed = ids(logit_bias={"42": 30}, frequency_penalty=2, presence_penalty=2, max_tokens=40)
    assert pressed[0] == 42 and set(pressed) != {42}


def test_a_begun_answer_is_continued(server, generator):
    whole = server.call("POST", CHAT, {"messages": HELLO, "max_tokens": 30, **GREEDY})[2]["choices"][0]["message"]
    begun = [*HELLO, {"role": "assistant", "content": whole["content"][:4]}]
    body = {"messages": begun, "max_tokens": 5, "continue_final_message": True, "return_token_ids": True, **GREEDY}
    choice = server.call("POST", CHAT, body)[2]["choices"][0]
    opening = generator.encode_chat(HELLO)
    assert choice["prompt_token_ids"][: len(opening)] == opening
    assert generator.tokenizer.decode(choice["prompt_token_ids"][len(opening) :]) == whole["content"][:4]
    long = [
        turn
        for n in range(30)
        for turn in ({"role": "user", "content": f"第{n}问"}, {"role": "assistant", "content": "答"})
    ]
    long.append(HELLO[0])
    assert server.call("POST", CHAT, {"messages": long})[0] == 400
    told = server.call("POST", CHAT, {"messages": long, "truncation": "auto", "max_tokens": 4})
    left_out = told[2]["left_out_messages"]
    assert told[0] == 200 and 0 < left_out < len(long)
    # A begun answer takes room too.
    long.append({"role": "assistant", "content": "好" * 20})
    body = {"messages": long, "truncation": "auto", "max_tokens": 4, "continue_final_message": True}
    told = server.call("POST", CHAT, body)
    assert told[0] == 200 and told[2]["left_out_messages"] > left_out


def test_the_flags_are_what_a_request_gets_that_asks_for_nothing_else(weights_file):
    flags = ["--max_new_tokens", "7", "--greedy", "--stop_strings", "\x01", "--cors_origin", "https://chat.example"]
    with running_server(weights_file, *flags) as server:
        sampling = server.call("GET", "/v1/models")[2]["data"][0]["sampling"]
        assert (sampling["temperature"], sampling["max_tokens"], sampling["stop"]) == (0, 7, ["\x01"])
        bias = {"logit_bias": {"2": -100}}
        texts = [server.call("POST", TEXT, {"prompt": "春", **bias})[2] for _ in range(2)]
        assert texts[0]["choices"] == texts[1]["choices"] and texts[0]["usage"]["completion_tokens"] == 7
        assert server.call("POST", CHAT, {"messages": HELLO, **bias})[2]["usage"]["completion_tokens"] == 7
        asks = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-stainless-os",
        }
        status, headers, _ = server.call("OPTIONS", CHAT, None, {"Origin": "https://chat.example", **asks})
        assert status == 204 and headers["access-control-allow-headers"] == "content-type, x-stainless-os"


@pytest.mark.parametrize(
    "path, body, param",
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": ["你好"]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0]"),
        (CHAT, {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        (CHAT, {"messages": HELLO * 501}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "好" * 500}]}, "messages"),
        (CHAT, {"messages": HELLO, "temperature": 2.1}, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": True}, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": 10**400}, "temperature"),
        (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
        (CHAT, {"messages": HELLO, "n": 0}, "n"),
        (CHAT, {"messages": HELLO, "n": 17}, "n"),
        (CHAT, {"messages": HELLO, "stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (CHAT, {"messages": HELLO, "stop": [""]}, "stop"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": -1}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "presence_penalty": 3}, "presence_penalty"),
        (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"300": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"1": 101}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "stream": "yes"}, "stream"),
        (CHAT, {"messages": HELLO, "stream_options": []}, "stream_options"),
        (CHAT, {"messages": HELLO, "seed": 1.5}, "seed"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        (TEXT, {"prompt": 5}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [300]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": [["春"]]}, "prompt"),
        (TEXT, {"prompt": ["春"] * 65}, "prompt"),
        (TEXT, {"prompt": "春", "suffix": "x"}, "suffix"),
        (TEXT, {"prompt": "春", "best_of": 2}, "best_of"),
        (TEXT, {"prompt": "\ud800"}, "prompt"),
        (TEXT, {"prompt": "春", "logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_parameter_is_named(server, path, body, param):
    status, _, found = server.call("POST", path, body)
    error = found["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["param"] == param, found
    assert error["message"] and "Traceback" not in error["message"] and found.keys() == {"error"}


def test_what_is_unknown_or_null_is_ignored(server):
    body = {"messages": HELLO, "max_tokens": 2, "user": "me", "store": True, "unknown": [1], "stop": None, "tools": []}
    body |= {"model": "tiny", "temperature": None, "logprobs": None, "response_format": {"type": "text"}}
    assert server.call("POST", CHAT, body)[0] == 200
    parts = [{"role": "developer", "content": "短"}, {"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    assert server.call("POST", CHAT, {"messages": parts, "max_tokens": 2})[0] == 200
    status, _, found = server.call("POST", CHAT, {"messages": HELLO, "model": "gpt-4o"})
    assert status == 404 and "tiny" in found["error"]["message"]


def test_context_too_long_has_its_code(server):
    found = server.call("POST", TEXT, {"prompt": "春" * 500})
    assert found[0] == 400 and found[2]["error"]["code"] == "context_length_exceeded"
    full = server.call("POST", TEXT, {"prompt": "春", "max_tokens": 10**6, **GREEDY})[2]
    assert full["choices"][0]["finish_reason"] == "length" and full["usage"]["total_tokens"] == 128


def test_a_request_whose_settings_leave_no_token_fails_alone(server):
    bans = {str(index): -100 for index in range(300)}
    with ThreadPoolExecutor(4) as pool:
        good = [
            pool.submit(server.call, "POST", TEXT, {"prompt": "春风", "max_tokens": 60, **GREEDY}) for _ in range(3)
        ]
        assert server.call("POST", TEXT, {"prompt": "春风", "logit_bias": bans, "max_tokens": 3})[0] == 200  # finite
        texts = {one.result()[2]["choices"][0]["text"] for one in good}
    assert len(texts) == 1


def test_requests_at_once_get_the_texts_that_they_get_alone(server, generator):
    """Prompts of all lengths, with settings of their own."""
    prompts = ["春" * n for n in range(1, 30)] + ["子曰学而时习之" * n for n in range(1, 4)]
    expected = [generator.generate(prompt, greedy(20)) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 20, **GREEDY} for prompt in prompts]
        drawn = {"prompt": "中国", "max_tokens": 20, "temperature": 2, "presence_penalty": 1, "logprobs": 2}
        others = [pool.submit(server.call, "POST", TEXT, drawn) for _ in range(8)]
        found = list(pool.map(lambda body: server.call("POST", TEXT, body)[2]["choices"][0]["text"], bodies))
        assert all(one.result()[0] == 200 for one in others)
    assert found == expected


def test_a_chats_next_turn_reads_only_what_is_new(server, metric):
    history, cached = [], []
    for n in range(3):
        history.append({"role": "user", "content": ("第一个问题是", "乙", "丙")[n]})
        found = server.call("POST", CHAT, {"messages": history, "max_tokens": 4, **GREEDY})[2]
        history.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        cached.append((found["usage"]["prompt_tokens_details"]["cached_tokens"], found["usage"]["prompt_tokens"]))
    assert cached[1][0] >= cached[0][1] - 1 and cached[2][0] >= cached[1][1] - 1


def test_a_chat_of_very_many_turns_goes_on_without_its_oldest(server):
    turns = [{"role": role, "content": "好"} for _ in range(300) for role in ("user", "assistant")]
    body = {"messages": [{"role": "system", "content": "短"}, *turns, turns[0]], "max_tokens": 2}
    assert server.call("POST", CHAT, body)[0] == 400
    status, _, found = server.call("POST", CHAT, {**body, "truncation": "auto"})
    assert status == 200 and 102 <= found["left_out_messages"] < 602


def test_a_prompt_in_a_list_gets_the_text_that_it_gets_alone(server):
    body = {"max_tokens": 12, "seed": 5, "temperature": 2}
    alone = server.call("POST", TEXT, {**body, "prompt": "春"})[2]["choices"][0]["text"]
    listed = server.call("POST", TEXT, {**body, "prompt": ["秋", "春", "春"], "n": 2})[2]["choices"]
    assert [choice["text"] for choice in listed[2::2]] == [alone, alone]


def test_what_the_flags_say_is_no_error_of_a_request(generator):
    """Five stop strings are more than a request may ask for."""
    defaults = Defaults(GenerationConfig(stop_strings=tuple("abcde")), max_tokens=100)
    request = completion_request({"prompt": [5]}, generator.prompts, defaults)
    assert request.config.stop_strings == tuple("abcde") and request.config.max_new_tokens == 100


def test_a_server_that_reproduces_keeps_nothing(weights_file):
    with running_server(weights_file, "--reproducible", "--any_model") as server:
        body = {"messages": HELLO * 5, "max_tokens": 20, "seed": 3, "temperature": 2, "model": "gpt-4o"}
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: server.call("POST", CHAT, body)[2], range(6)))
        assert len({one["choices"][0]["message"]["content"] for one in found}) == 1
        assert all(one["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 for one in found)


def test_the_openai_library_as_client(server):
    openai = pytest.importorskip("openai", reason="the openai library is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked, extra_body={"repetition_penalty": 1})
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    pieces = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True},
                                            extra_body={"repetition_penalty": 1})  # fmt: skip
    chunks = list(pieces)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 12
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(told) == 12 and len(told[0].top_logprobs) == 2 and told[0].bytes is not None
    done = client.completions.create(model="tiny", prompt="春风", max_tokens=4, logprobs=1, echo=True)
    assert done.choices[0].text.startswith("春风") and done.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.chat.completions.create(**{**asked, "temperature": 9})
    assert refused.value.param == "temperature"

    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as calls:
            stream = await calls.chat.completions.create(**asked, stream=True, extra_body={"repetition_penalty": 1})
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(streamed()) == text


def test_nothing_is_lost_between_json_and_back(server):
    body = json.dumps({"prompt": "\u2028\u0000 \U0001f600", "max_tokens": 2, "echo": True, **GREEDY}).encode()
    assert server.call("POST", TEXT, body)[2]["choices"][0]["text"].startswith("\u2028\u0000 \U0001f600")

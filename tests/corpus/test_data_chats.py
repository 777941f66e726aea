"""Chats in every form through data processing: what is learned, what is rejected, and that nothing is lost."""

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import model.corpus.chats
from model.corpus.chats import CHAT_REASONS, KEYS, UNLEARNED, parse_chat
from model.corpus.chats import FORMS as FORM_TITLES
from model.corpus.pairs import PAIR_REASONS
from model.corpus.reasons import REASONS
from model.corpus.show import shown_documents
from model.corpus.train_tokenizer import train_tokenizer
from model.errors import InputError
from model.text.chat_ids import load_chat_format
from model.text.chat_template import MESSAGES_TEMPLATE, encode_chat, template_sha256
from model.text.tokenization import load_bulk_tokenizer, load_tokenizer
from model.token_file.manifest import ends_path, file_sha256, learn_path, read_manifest
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import ROOT, process_data, read_rejects
from tests.corpus.half_made import begin_and_stop, contents
from tests.text.chat_tokenizers import write_style
from tests.tiny_runs import finish_ranks, start_two_ranks

HELLO = (("user", "你好"), ("assistant", "你好！有什么可以帮助你的吗？"))
TWO_TURNS = (("system", "答得短些。"), ("user", "1+1=?"), ("assistant", "2"), ("user", "再加一？"), ("assistant", "3"))
CHATS = [HELLO, TWO_TURNS, (("user", "a </s> <s>b"), ("assistant", "x </s>\n<s>assistant\ny"))]


def messages(chat, role: str = "role", content: str = "content", names: dict[str, str] | None = None) -> list[dict]:
    return [{role: (names or {}).get(who, who), content: text} for who, text in chat]


def pairs(chat) -> tuple[str | None, list[list[str]], str, str]:
    """(system, history, question, answer)."""
    system = chat[0][1] if chat[0][0] == "system" else None
    texts = [text for role, text in chat if role != "system"]
    turns = [texts[at : at + 2] for at in range(0, len(texts), 2)]
    return system, turns[:-1], *turns[-1]


def alpaca(chat) -> dict:
    system, history, question, answer = pairs(chat)
    return {"instruction": question, "input": "", "output": answer, "system": system, "history": history}


def minimind_v1(chat) -> dict:
    system, history, question, answer = pairs(chat)
    return {"history": repr(history), "q": question, "a": answer, **({"system": system} if system else {})}


def sharegpt(chat) -> dict:
    system = {"system": chat[0][1]} if chat[0][0] == "system" else {}
    rest = [message for message in chat if message[0] != "system"]
    return {"conversations": messages(rest, "from", "value", {"user": "human", "assistant": "gpt"}), "id": 1, **system}


def parts(chat) -> dict:
    given = messages(chat, names={"system": "developer"})
    return {"messages": [message | {"content": [{"type": "text", "text": message["content"]}]} for message in given]}


FORMS = {
    "OpenAI's messages": lambda chat: {"messages": messages(chat), "id": 7},
    "parts of text": parts,
    "ShareGPT's conversations": sharegpt,
    "MiniMind's conversations": lambda chat: {"conversations": messages(chat), "source": "x"},
    "MiniMind's in ShareGPT's spelling": lambda chat: {"conversations": messages(chat, "from", "value")},
    "capitals": lambda chat: {"chat": messages(chat, names={"user": "User", "assistant": " ASSISTANT"})},
    "Alpaca's instruction, input, output": alpaca,
    "MiniMind v1's history, q, a": minimind_v1,
    "Alpaca's with a literal": lambda chat: alpaca(chat) | {"history": repr(pairs(chat)[1])},
    "prompt and completion": lambda chat: {"prompt": messages(chat[:-1]), "completion": messages(chat[-1:])},
}


def jsonl(values) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def process(source, output: Path, **options) -> dict:
    return OptimizedDataProcessor(options.pop("tokenizer_path", None), workers=0, **options).process_dataset(
        source, output
    )


def read_chats(output: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, learned) of each chat in a token file, whose companions belong to it."""
    manifest = read_manifest(output)
    ids, learned = np.fromfile(output, manifest.dtype), np.fromfile(learn_path(output), np.uint8)
    ends = np.fromfile(ends_path(output), "<u8").astype(np.int64)
    assert len(ids) == len(learned) == ends[-1] == manifest.tokens and len(ends) == manifest.documents
    assert set(learned.tolist()) <= {0, 1} and int(learned.sum()) == manifest.chat["learned"]
    assert manifest.chat["learn_sha256"] == file_sha256(learn_path(output)) and manifest.sha256 == file_sha256(output)
    assert manifest.chat["ends_sha256"] == file_sha256(ends_path(output))
    return [
        (a.tolist(), b.tolist()) for a, b in zip(np.split(ids, ends[:-1]), np.split(learned, ends[:-1]), strict=True)
    ]


def expected(chat, tokenizer) -> tuple[list[int], list[int]]:
    """A chat's ids and mask with the embedded tokenizer, from what inference sends for histories of it alone."""
    header = [1, *tokenizer.backend_tokenizer.encode("assistant\n", add_special_tokens=False).ids]
    ids, learned = [], []
    for n in [n for n, (role, _) in enumerate(chat) if role == "assistant"]:
        before, after = (encode_chat(tokenizer, messages(chat[:end])) for end in (n, n + 1))
        assert before[-len(header) :] == after[-len(header) :] == header and after[: len(before)] == before
        ids = after[: -len(header)]  # … answer </s> ⏎
        learned += [0] * (len(before) - len(learned)) + [1] * (len(ids) - len(before) - 1) + [0]
    return ids, learned


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer()


@pytest.mark.long
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_tokens(tmp_path, embedded, capsys, name):
    source = write(tmp_path / "a.jsonl", jsonl(map(FORMS[name], CHATS)))
    counts = process(source, tmp_path / "a.bin", clean=False)
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in CHATS]
    said = capsys.readouterr().err
    assert f"chats: {next(iter(counts['chats']['forms']))}\n" in said and "3 chats, 4 answers" in said
    manifest = read_manifest(tmp_path / "a.bin")
    assert manifest.chat | {"learn_sha256": "", "ends_sha256": ""} == {
        "learn_sha256": "",
        "ends_sha256": "",
        "learned": manifest.chat["learned"],
        "turns": 4,
        "template_sha256": template_sha256(MESSAGES_TEMPLATE),
        "end_ids": [2],
    }


@pytest.mark.long
def test_a_question_and_its_input_are_one_message(tmp_path, embedded):
    values = [{"instruction": "翻译：", "input": " hello ", "output": "你好"}, {"prompt": "问", "completion": " 答 "}]
    process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin")
    chats = [(("user", "翻译：\nhello"), ("assistant", "你好")), (("user", "问"), ("assistant", "答"))]
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in chats]


# ------------------------------------------------------------------------------------------------------- containers


def table(chats) -> bytes:
    """MiniMind v1's CSV, as pandas writes it."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["history", "q", "a"])
    for chat in chats:
        _, history, question, answer = pairs(chat)
        writer.writerow([repr(history), question, answer])
    return file.getvalue().encode()


def parquet(chats, key: str = "messages") -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(chats)), key: [messages(chat) for chat in chats]}), file)
    return file.getvalue()


WITHOUT_SYSTEM = [HELLO, TWO_TURNS[1:], CHATS[2]]
LINES = jsonl(map(FORMS["OpenAI's messages"], WITHOUT_SYSTEM))
CONTAINERS = {
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.zst": lambda: pytest.importorskip("zstandard").compress(LINES),
    "a.json": lambda: json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1).encode(),
    "a.parquet": lambda: parquet(WITHOUT_SYSTEM),
    "a.csv": lambda: table(WITHOUT_SYSTEM),
    "a.csv.gz": lambda: gzip.compress(table(WITHOUT_SYSTEM)),
    "folder/a.jsonl": lambda: LINES,
    "folder/a.csv": lambda: b"\xef\xbb\xbf" + table(WITHOUT_SYSTEM),
    "folder/a.json": lambda: json.dumps([alpaca(chat) for chat in WITHOUT_SYSTEM], indent=1).encode(),
    "folder/a.parquet": lambda: parquet(WITHOUT_SYSTEM, "conversations"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_tokens(tmp_path, embedded, name):
    path = write(tmp_path / "in" / name, CONTAINERS[name]())
    process(path.parent if "folder" in name else path, tmp_path / "a.bin", clean=False)
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in WITHOUT_SYSTEM]


@pytest.mark.long
def test_a_streamed_dataset_gives_the_same_tokens(tmp_path, embedded):
    pytest.importorskip("datasets")
    path = write(tmp_path / "a.parquet", parquet(WITHOUT_SYSTEM))
    process(f"datasets:parquet?data_files={path}&split=train", tmp_path / "a.bin", clean=False)
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in WITHOUT_SYSTEM]


def test_a_damaged_table_loses_nothing(tmp_path, embedded):
    rows = [
        b"history,q,a",
        "[],问,答".encode(),
        b'[],"a" b,c',  # a quote within
        b"[],too few",
        b"[],one,too,many",
        b"",
        "\"[['前','后']]\",又问,\"又\n答\"".encode(),
        b"\"__import__('os').system('touch /tmp/evil')\",q,a",
        b'"[[1, 2]]",q,a',
        b"nan,\xff,a",
        b"nan,q2,a",
        b'[],q,"never closed',
        b"[],q,a",
    ]
    counts = process(write(tmp_path / "a.csv", b"\r\n".join(rows)), tmp_path / "a.bin", clean=False)
    reasons = [
        (reject["reason"], json.loads(reject["raw"])) for reject in read_rejects(tmp_path / "a.bin") if "raw" in reject
    ]
    assert [reason for reason, _ in reasons] == ["bad_row"] * 3 + ["bad_history"] * 2 + ["bad_row"]
    assert reasons[0][1] == {"csv": '[],"a" b,c\r\n'} and reasons[-1][1] == {"csv": '[],q,"never closed\r\n'}
    assert counts["documents"] == 4 and counts["lines"] == 11
    chats = [(("user", "问"), ("assistant", "答"))]
    chats += [(("user", "前"), ("assistant", "后"), ("user", "又问"), ("assistant", "又\n答"))]
    chats += [(("user", question), ("assistant", "a")) for question in ("q2", "q")]
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in chats]


# ---------------------------------------------------------------------------------------------------------- rejects


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
UNUSABLE = {
    "no_chat": [{"messages": "text"}, {"messages": {"role": "user", "content": ["q"]}},
                {"messages": None}, {"conversations": {}}, {"question": "q", "answer": "a"}, {},
                {"text": "好"}, {"instruction": "q"}, {"history": [], "q": "q"}],
    "bad_message": [{"messages": ["q", "a"]}, {"messages": [USER, {"role": "assistant"}]}, {"messages": [USER, None]},
                    {"messages": [{"content": "q"}, ANSWER]},
                    {"messages": [{"role": ["user"], "content": "q"}, ANSWER]},
                    {"conversations": [{"from": None, "value": "q"}, ANSWER]},
                    {"conversations": {"from": ["human", "gpt"], "value": ["q"]}},
                    {"messages": {"role": ["user"], "content": ["q", "a"]}}],
    "unknown_role": [{"messages": [{"role": "narrator", "content": "q"}, ANSWER]},
                     {"messages": [{"role": "", "content": "q"}, ANSWER]}],
    "tool_calls": [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, ANSWER]},
                   {"messages": [USER, {"role": "tool", "content": "7"}, ANSWER]},
                   {"messages": [USER, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
                   {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"},
                                      {"from": "observation", "value": "{}"}, {"from": "gpt", "value": "a"}]},
                   {"conversations": [USER, {"role": "assistant", "content": "", "tool_calls": '[{"name": "f"}]'}]}],
    "not_text": [{"messages": [{"role": "user", "content": 7}, ANSWER]},
                 {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
                 {"messages": [{"role": "user", "content": {"text": "q"}}, ANSWER]},
                 {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, ANSWER]},
                 {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "q"}]}, ANSWER]},
                 {"messages": [USER, {"role": "assistant", "content": True}]},
                 {"instruction": ["q", 1], "output": "a"}, {"q": "q", "a": 7}, {"prompt": {}, "completion": "a"}],
    "bad_history": [{"history": "[1", "q": "q", "a": "a"}, {"history": "f()", "q": "q", "a": "a"},
                    {"history": "[" * 5000, "q": "q", "a": "a"}, {"history": "-" * 50_000 + "1", "q": "q", "a": "a"},
                    {"history": 7, "q": "q", "a": "a"}, {"history": "'q'", "q": "q", "a": "a"},
                    {"history": [["q"]], "instruction": "q", "output": "a"},
                    {"history": {"q": "a"}, "q": "q", "a": "a"},
                    {"history": "[['q', None]]", "q": "q", "a": "a"}, {"history": [[1, 2]], "q": "q", "a": "a"},
                    {"history": "[]" + " " * (2 << 20) + "[]", "q": "q", "a": "a"}],
    "no_answer": [{"messages": []}, {"messages": [USER]}, {"messages": [USER, USER]},
                  {"conversations": [{"from": "human", "value": "q"}]}],
    "roles_out_of_order": [{"messages": [ANSWER]}, {"messages": [ANSWER, USER, ANSWER]},
                           {"messages": [USER, USER, ANSWER]},
                           {"messages": [USER, ANSWER, ANSWER]},
                           {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]},
                           {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "another"}],
    "unanswered": [{"messages": [USER, ANSWER, USER]}],
    "empty_question": [{"messages": [{"role": "user", "content": " "}, ANSWER]}, {"instruction": "", "output": "a"},
                       {"messages": [{"role": "user", "content": None}, ANSWER]}, {"prompt": [], "completion": "a"},
                       {"history": "", "q": None, "a": "a"}],
    "empty_answer": [{"messages": [USER, {"role": "assistant", "content": ""}]}, {"instruction": "q", "output": None},
                     {"messages": [USER, {"role": "assistant", "content": None}]}, {"q": "q", "a": "\u3000\n"},
                     {"messages": [USER, {"role": "assistant", "content": []}]},
                     {"messages": [USER, {"role": "assistant", "content": " "}, USER, ANSWER]}],
    "bad_weight": [{"messages": [USER, ANSWER | {"weight": weight}]} for weight in (2, 0.5, "0", [], {})],
    "nothing_learned": [{"messages": [USER, ANSWER | {"weight": 0}]}, {"messages": [USER, ANSWER | {"weight": False}]}],
    "not_an_object": [[USER, ANSWER], "text", 7, None],
}  # fmt: skip
BROKEN = {
    "bad_json": [b"{", b'{"messages": [', b"plain text", b'{"messages": ' + b"[" * 9000],
    "empty": [b"", b"  "],
    "bad_utf8": [
        b'{"messages": [{"role": "user", "content": "\xff"}, {"role": "assistant", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
    ],
}


@pytest.mark.parametrize("clean, library", [(True, "orjson"), (False, "orjson"), (False, "json")])
def test_every_unusable_chat_is_rejected_under_its_reason(tmp_path, monkeypatch, clean, library):
    if library == "json":
        monkeypatch.setattr(model.corpus.chats, "orjson", None)
    good = FORMS["OpenAI's messages"](HELLO)
    lines = [json.dumps(good).encode()]
    wanted = []
    for reason, values in UNUSABLE.items():
        lines += [json.dumps(value).encode() for value in values]
        wanted += [reason] * len(values)
    for reason, raw in BROKEN.items():
        lines += raw
        wanted += [reason] * len(raw)
    lines.append(json.dumps(FORMS["ShareGPT's conversations"](HELLO)).encode())
    wanted.append("duplicate")
    source = write(tmp_path / "a.jsonl", b"\n".join(lines) + b"\n")
    counts = process(source, tmp_path / "a.bin", clean=clean)
    rejects = read_rejects(tmp_path / "a.bin")
    assert [reject["reason"] for reject in rejects] == wanted
    assert [reject["line"] for reject in rejects] == list(range(2, len(lines) + 1))
    assert counts["documents"] == 1 and counts["documents"] + counts["rejected"] == counts["lines"] == len(lines)


def test_reasons_of_half_made_jobs_keep_their_numbers():
    texts = [
        "bad_utf8",
        "bad_json",
        "not_an_object",
        "no_text",
        "empty",
        "oversized",
        "too_short",
        "too_long",
        "few_han",
    ]
    texts += ["repetitive", "over_max_length", "duplicate", "near_duplicate", "not_sampled"]
    assert list(REASONS) == [*texts, *CHAT_REASONS, *PAIR_REASONS, "bad_row"]


NAMES = [*KEYS, "weight", "role", "content", "from", "value", "type", "text", "tool_calls"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(
        ["user", "assistant", "system", "human", "gpt", "tool", "", " ", "你好", "text", "[['a','b']]", "[]", "\ud800"]
    ) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.long
@given(value=VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1))
@example(value={"messages": [{"role": {"a": 1}, "content": "x"}]})
@settings(max_examples=300, deadline=None)
def test_no_object_makes_parsing_fail(value):
    chat, said = parse_chat(json.dumps(value).encode())
    if chat is None:
        assert said in REASONS
    else:
        roles = ["assistant" if role == UNLEARNED else role for role, _ in chat if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and all(text.strip() == text for _, text in chat)
        "".join(text for _, text in chat).encode()


@pytest.mark.long
@given(values=st.lists(VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1), max_size=12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_lines_hold_each_is_a_chat_or_a_reject(tmp_path, tokenizer_folder, values):
    lines = [json.dumps(value) for value in [FORMS["OpenAI's messages"](HELLO), *values]]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode() + b"\n")
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, format="chat")
    counts = processor.process_dataset(path, tmp_path / "a.bin", resume=False)
    assert counts["documents"] + counts["rejected"] == counts["lines"] == len(lines)
    assert len(read_chats(tmp_path / "a.bin")) == counts["documents"]
    assert len(read_rejects(tmp_path / "a.bin")) == counts["rejected"]


@pytest.mark.long
def test_a_file_without_a_usable_chat_is_refused_in_one_line(tmp_path, process_data_here):
    for name, lines, message in (
        (
            "unanswered",
            jsonl([{"messages": [USER]}] * 3),
            r"none of 3 lines is a usable chat \(no_answer 3\); no_answer: a chat without",
        ),
        ("forced", jsonl([{"text": "好"}] * 2), r"usable chat \(no_chat 2\).*the keys found: text"),
        ("empty", b"\n", "its only line is not a document"),
    ):
        path = write(tmp_path / f"{name}.jsonl", lines)
        flags = ["--format", "chat"] * (name == "forced")
        code, said = process_data_here(
            "--input_path", path, "--output_path", tmp_path / "x.bin", "--workers", 0, *flags
        )
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and "Traceback" not in said
        with pytest.raises(InputError, match=message):
            raise InputError(errors[0])
        assert not (tmp_path / "x.bin").exists()


def csv_rows(header: str, *rows: str) -> bytes:
    return "\n".join([header, *rows, ""]).encode()


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
MEANT = {  # inputs that are not what they are taken for, or not quite: what a line says of them
    "chats as pairs": (
        jsonl([{"messages": [USER, ANSWER]}]),
        "pairs",
        "a usable pair of answers .*are chats .*: --format chat",
    ),
    "pairs as chats": (jsonl([PAIR]), "chat", "a usable chat .*are pairs of answers .*: --format pairs reads them"),
    "texts as pairs": (jsonl([{"text": "x"}]), "pairs", 'one pair a line, such as {"prompt".*the keys found: text'),
    "half pairs": (
        jsonl([{"prompt": "q", "chosen": "a"}]),
        "auto",
        "a usable pair of answers .half_a_pair 1.; half_a_pair: an",
    ),
    "messages as text": (jsonl([{"messages": "hi"}]), "auto", "value of messages is 'hi', a list of messages expected"),
    "messages as JSON": (
        jsonl([{"conversations": json.dumps([USER, ANSWER])}]),
        "auto",
        r"a list of messages expected; it is JSON within a string, which this unpacks: jq -c '.conversations \|= fromj",
    ),
    "a message a line": (jsonl([[USER, ANSWER]] * 2), "auto", "each object is a single message; write the messages of"),
    "other names": (
        jsonl([{"question": "q", "response": "a"}]),
        "auto",
        "if they are questions and answers, make chats of them: jq -c '{prompt: .question, completion: .response}'",
    ),
    "only NUL bytes": (b"\0\0\0\0\n", "auto", "they are NUL bytes, which a crash or a full disk leaves"),
    "a number without end": (b'{"prompt": %s}\n' % (b"1" * 5000), "auto", "a number of thousands of digits"),
    "rows too short": (csv_rows("history,q,a", "q", "q"), "auto", "bad_row 2.; bad_row: a row of CSV without a value"),
    "a column twice": (csv_rows("history,q,q,a", "[],q,q,a"), "auto", "has 2 columns q; rename all but one"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", MEANT)
def test_what_is_taken_for_something_else_is_one_line_that_says_what_it_is(tmp_path, process_data_here, case):
    content, form, expected = MEANT[case]
    path = write(tmp_path / ("a.csv" if b"history" in content else "a.jsonl"), content)
    paths = "--input_path", path, "--output_path", tmp_path / "x.bin", "--workers", 0
    code, said = process_data_here(*paths, "--format", form)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and re.search(expected, errors[0]), said
    assert not (tmp_path / "x.bin").exists()


def test_a_chat_beside_a_text_is_named(tmp_path, capsys):
    line = alpaca(HELLO) | {"text": "你好 你好！"}
    assert process(write(tmp_path / "a.jsonl", jsonl([line])), tmp_path / "a.bin").get("chats") is None
    assert (
        "texts: the key text; beside it are Alpaca's instruction, input, output: --format chat"
        in capsys.readouterr().err
    )


def test_an_unclosed_quote_in_a_table_takes_no_rows_along(tmp_path):
    rows = ['[],"never closed,a', *(f"[],q{n},a" for n in range(5)), "\"[['b','c']]\",\"two\nlines\",a"]
    counts = process(write(tmp_path / "a.csv", csv_rows("history,q,a", *rows)), tmp_path / "a.bin")
    assert counts["documents"] == 6 and counts["rejected_by_reason"] == {"bad_row": 1}
    poem = '"line, one\nline two\nsaid "hi" there",a'  # no row begins in the middle of it
    counts = process(write(tmp_path / "b.csv", csv_rows("prompt,completion", poem, "q,a")), tmp_path / "b.bin")
    assert counts["documents"] == 1 and counts["lines"] == 2


def test_rows_of_several_forms_in_one_table_are_told_apart_by_what_is_not_null(tmp_path):
    rows = [{"messages": [USER, ANSWER]}, {"instruction": "p", "output": "a"}, {"prompt": "r", "completion": "a"}, {}]
    names = ["messages", "instruction", "output", "prompt", "completion", "chosen", "rejected"]
    lines = [{name: row.get(name) for name in names} for row in rows]
    counts = process(write(tmp_path / "a.jsonl", jsonl(lines)), tmp_path / "a.bin")
    assert counts["chats"]["forms"] == {
        name: 1 for name in (FORM_TITLES[form] for form in ("openai", "alpaca", "prompt"))
    }
    assert counts["rejected_by_reason"] == {"empty_question": 1}


@pytest.mark.long
def test_texts_with_chats_among_them_stay_texts_and_a_hint_names_the_flag(tmp_path, process_data_here):
    lines = jsonl([{"text": "好"}, *[{"messages": messages(HELLO)}] * 4])
    path = write(tmp_path / "a.jsonl", lines)
    code, said = process_data_here("--input_path", path, "--output_path", tmp_path / "x.bin", "--workers", 0)
    assert code == 0 and "these are chats (keys messages): --format chat reads them" in said
    assert not learn_path(tmp_path / "x.bin").exists() and read_manifest(tmp_path / "x.bin").chat == {}
    code, said = process_data_here(
        "--input_path", path, "--output_path", tmp_path / "y.bin", "--workers", 0, "--format", "chat"
    )
    assert code == 0 and "5 lines: 1 document, 4 rejected" in said and "duplicate 3, no_chat 1" in said


def test_several_forms_in_one_file_are_read_and_counted(tmp_path, capsys):
    values = [FORMS["OpenAI's messages"](HELLO), sharegpt(TWO_TURNS), alpaca(CHATS[2])]
    assert process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin")["documents"] == 3
    assert (
        "OpenAI's messages 1, ShareGPT's conversations 1, Alpaca's instruction, input, output 1"
        in capsys.readouterr().err
    )


def test_chats_are_never_split(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(InputError, match="long_documents: chats cannot be split; truncate drops their oldest turns"):
        process(path, tmp_path / "a.bin", long_documents="split")


def test_long_chats_are_kept_or_dropped(tmp_path, embedded):
    path = write(tmp_path / "a.jsonl", jsonl([FORMS["OpenAI's messages"](chat) for chat in (HELLO, TWO_TURNS)]))
    assert process(path, tmp_path / "a.bin", max_length=24)["documents_longer_than_max_length"] == 1
    counts = process(path, tmp_path / "b.bin", max_length=24, long_documents="drop")
    assert counts["rejected_by_reason"] == {"over_max_length": 1}
    assert read_chats(tmp_path / "b.bin") == [expected(HELLO, embedded)]


def turns(*numbers: int, system: bool = False) -> tuple:
    chat = [("system", "答得短些。")] if system else []
    for number in numbers:
        chat += [("user", f"第{number}问"), ("assistant", f"第{number}答" * (number % 4 + 1))]
    return tuple(chat)


@pytest.mark.long
@pytest.mark.parametrize(
    "style", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("Llama 3", "Qwen 3"))]
)
def test_long_chats_lose_their_oldest_turns_and_keep_the_system_message(tmp_path, capsys, style):
    folder = write_style(tmp_path / "t", style) if style else None
    tokenizer = load_tokenizer(folder)
    long = [turns(*range(n), system=n % 2 == 0) for n in range(2, 30)]
    last = (("user", "问" * 300), ("assistant", "答"))  # too long alone
    values = [{"messages": messages(chat)} for chat in [HELLO, *long, (*HELLO, *last), last]]
    path, output = write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin"
    counts = process(path, output, max_length=128, long_documents="truncate", tokenizer_path=folder, clean=False)

    def length(chat) -> int:
        encoded = load_chat_format(folder, load_bulk_tokenizer(folder)).encode([chat])
        return len(encoded.ids)

    found = [tokenizer.decode(ids) for ids, _ in read_chats(output)]
    assert len(found) == 1 + len(long) and counts["rejected_by_reason"] == {"over_max_length": 2}
    for chat, text, (ids, learned) in list(zip(long, found[1:], read_chats(output)[1:], strict=True))[::9]:
        head = chat[:1] if chat[0][0] == "system" else ()
        kept = text.count("问")
        assert len(ids) == length((*head, *chat[-2 * kept :])) <= 128
        assert 2 * kept + len(head) == len(chat) or length((*head, *chat[-2 * kept - 2 :])) > 128
        assert ("答得短些" in text) == bool(head) and np.count_nonzero(np.diff(learned, prepend=0) == 1) == kept
    said = capsys.readouterr().err
    assert "chats of more than 128 tokens, without their oldest turns, or rejected (2): " in said


def test_chats_that_are_all_too_long_are_rejected(tmp_path):
    last = (("user", "问" * 300), ("assistant", "答"))
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": messages(chat)} for chat in (HELLO, last)]))
    counts = process(path, tmp_path / "a.bin", max_length=128, long_documents="truncate", clean=False)
    assert counts["documents"] == 1 and counts["rejected_by_reason"] == {"over_max_length": 1}


@pytest.mark.slow
def test_a_job_that_truncates_chats_resumes_with_the_same_bytes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": messages(turns(*range(n % 30 + 1)))} for n in range(300)]))
    for folder in ("whole", "stopped"):
        processor = OptimizedDataProcessor(workers=0, max_length=100, long_documents="truncate", **SMALL)
        output = tmp_path / folder / "data.bin"
        if folder == "stopped":
            begin_and_stop(processor, path, output, monkeypatch)
        processor.process_dataset(path, output)
    assert contents(tmp_path / "whole" / "data.bin") == contents(output)
    assert max(len(ids) for ids, _ in read_chats(output)) <= 100


@pytest.mark.long
@pytest.mark.parametrize("style", [None, "Llama 3"])
def test_an_answer_of_the_weight_0_is_read_and_not_learned(tmp_path, style):
    folder = write_style(tmp_path / "t", style) if style else None
    chat = (*TWO_TURNS, ("user", "再来"), ("assistant", "4"))
    given = messages(chat)
    for place, weight in ((2, 0), (4, None), (6, 1)):
        given[place]["weight"] = weight
    given[1]["weight"] = 0  # of a question: never learned
    values = [{"messages": given}, {"messages": messages(chat)}]  # not a duplicate: other tokens are learned
    options = {"tokenizer_path": folder, "clean": False}
    process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin", **options)
    (ids, learned), (all_ids, all_learned) = read_chats(tmp_path / "a.bin")
    first = np.flatnonzero(np.diff(all_learned, prepend=0, append=0)).reshape(-1, 2)[0]
    expected_mask = np.array(all_learned)
    expected_mask[first[0] : first[1]] = 0
    assert ids == all_ids and learned == expected_mask.tolist()
    OptimizedDataProcessor(workers=0).validate_and_clean_jsonl(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    process(tmp_path / "c.jsonl", tmp_path / "d.bin", **options)
    assert read_chats(tmp_path / "d.bin") == read_chats(tmp_path / "a.bin")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_list_of_messages_may_be_a_table(tmp_path, embedded, key):
    values = []
    for chat in CHATS:
        names = ("role", "content") if key == "messages" else ("from", "value")
        rows = messages(chat, *names, names={} if key == "messages" else {"user": "human", "assistant": "gpt"})
        values.append({key: {name: [row[name] for row in rows] for name in names}})
    process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin", clean=False)
    assert read_chats(tmp_path / "a.bin") == [expected(chat, embedded) for chat in CHATS]


# ---------------------------------------------------------------------------- cleaning, duplicates, statistics, output


def test_contents_are_cleaned_one_by_one(tmp_path, embedded):
    dirty = (("system", "\u200b"), ("user", "Ａ&amp;Ｂ\u3000"), ("assistant", "c\u200bd  \n\n\n\ne"))
    values = [{"messages": messages(dirty)}, {"messages": messages((("user", "q"), ("assistant", "\u200b")))}]
    values += [{"messages": messages((("user", "哈" * 2000), ("assistant", "哈" * 2000)))}]
    counts = process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin")
    assert read_chats(tmp_path / "a.bin") == [expected((("user", "A&B"), ("assistant", "cd\n\ne")), embedded)]
    assert counts["rejected_by_reason"] == {"repetitive": 1, "empty_answer": 1}
    assert counts["changed_by_cleaning"]["documents"] == 1
    changes = (tmp_path / "a.changes.jsonl").read_text(encoding="utf-8")
    assert '"after": "cd' in changes


def test_a_chat_is_a_duplicate_only_of_the_same_messages(tmp_path):
    same = [FORMS["OpenAI's messages"](HELLO), FORMS["ShareGPT's conversations"](HELLO)]
    other = [{"messages": messages((("system", "s"), *HELLO))}, {"messages": messages((*HELLO, *HELLO))}]
    moved = [{"messages": messages((("user", "a"), ("assistant", "b\nc")))}]
    moved += [{"messages": messages((("user", "a\nb"), ("assistant", "c")))}]
    path = write(tmp_path / "a.jsonl", jsonl([*same, *other, *moved]))
    counts = process(path, tmp_path / "a.bin")
    assert counts["rejected_by_reason"] == {"duplicate": 1} and counts["documents"] == 5
    assert read_rejects(tmp_path / "a.bin")[0]["duplicate_of"] == 1


@pytest.mark.long
def test_near_duplicates_weights_and_validation_work_on_chats(tmp_path):
    pytest.importorskip("rensa")
    chats = [(("user", f"问题{n}" * 9), ("assistant", f"回答{n}" * 9 + "。" * n)) for n in range(40)]
    near = [(("user", chats[0][0][1]), ("assistant", chats[0][1][1] + "！"))]
    path = write(tmp_path / "a.jsonl", jsonl([FORMS["OpenAI's messages"](chat) for chat in chats + near]))
    counts = process(path, tmp_path / "a.bin", near_duplicates=0.8, val_share=0.3)
    assert counts["rejected_by_reason"]["near_duplicate"] >= 1
    assert counts["validation"]["documents"] == len(read_chats(tmp_path / "a.val.bin"))
    train, held = (read_manifest(tmp_path / name) for name in ("a.bin", "a.val.bin"))
    assert train.chat["turns"] == train.documents and held.chat["turns"] == held.documents
    processor = OptimizedDataProcessor(workers=0)
    processor.process_dataset(path, tmp_path / "twice.bin", weights=[2])
    chats_twice = read_chats(tmp_path / "twice.bin")
    assert len(chats_twice) == 82 and read_manifest(tmp_path / "twice.bin").chat["turns"] == 82
    half = process_half(path, tmp_path / "half.bin")
    assert 0 < half["rejected_by_reason"]["not_sampled"] < 41


def process_half(path: Path, output: Path) -> dict:
    return OptimizedDataProcessor(workers=0).process_dataset(path, output, weights=[0.5])


@pytest.mark.pictures
def test_the_statistics_count_turns_lengths_and_the_learned_share(tmp_path):
    processor = OptimizedDataProcessor(workers=0)
    counts = processor.process_dataset(write(tmp_path / "a.jsonl", jsonl(map(sharegpt, CHATS))), tmp_path / "a.bin")
    chats = counts["chats"]
    assert chats["turns"] == 4 and chats["turns_of_documents"] == [
        {"from": 1, "below": 2, "documents": 2},
        {"from": 2, "below": 3, "documents": 1},
    ]
    learned = read_manifest(tmp_path / "a.bin").chat["learned"]
    assert chats["learned_tokens"] == learned and chats["learned_share"] == round(learned / counts["tokens"], 4)
    assert sum(row["turns"] for row in chats["question_in_characters"]) == 4
    assert [row["from"] for row in chats["answer_in_characters"]][0] == 1  # "2" and "3"
    processor.save_statistics(tmp_path / "stats.json")
    assert (tmp_path / "stats.png").stat().st_size > 10_000


def test_cleaned_jsonl_holds_the_chats_in_openais_form(tmp_path, embedded):
    path = write(tmp_path / "a.jsonl", jsonl(map(sharegpt, CHATS)))
    counts = OptimizedDataProcessor(workers=0).validate_and_clean_jsonl(path, tmp_path / "c.jsonl")
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").read_bytes().splitlines()] == [
        {"messages": messages(chat)} for chat in CHATS
    ]
    assert counts["chats"]["turns"] == 4 and not learn_path(tmp_path / "c.jsonl").exists()
    process(tmp_path / "c.jsonl", tmp_path / "d.bin")
    assert read_chats(tmp_path / "d.bin") == [expected(chat, embedded) for chat in CHATS]


@pytest.mark.parametrize("library", ["megatron", "nanotron"])
def test_an_export_warns_that_the_mask_is_left_behind(tmp_path, process_data_here, library):
    process(write(tmp_path / "a.jsonl", LINES), tmp_path / "a.bin")
    code, said = process_data_here("--export", library, "--input_path", tmp_path / "a.bin")
    assert code == 0 and "warning: the format cannot say which tokens are learned" in said


def test_a_tokenizer_is_trained_on_the_contents_of_chats(tmp_path):
    chats = [(("user", f"春眠{n}"), ("assistant", f"不觉晓{n}" * 3)) for n in range(50)]
    path = write(tmp_path / "a.jsonl", jsonl(map(sharegpt, chats)))
    read = train_tokenizer(path, tmp_path / "t", 262)
    assert read.documents == 50 and read.rejected == {}
    assert "春" in load_tokenizer(tmp_path / "t").decode(load_tokenizer(tmp_path / "t").encode("春眠不觉晓"))
    with pytest.raises(InputError, match="none of 3 lines is a usable chat"):
        train_tokenizer(write(tmp_path / "b.jsonl", jsonl([{"messages": [USER]}] * 3)), tmp_path / "u", 262)


def test_text_of_a_table_that_is_not_utf8_is_one_reject(tmp_path, embedded):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [[[USER, ANSWER], [USER, {"role": "assistant", "content": "?"}]][n] for n in (0, 1)]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())]))
    given = [[{**message, "content": message["content"].encode()} for message in row] for row in rows]
    given[1][1]["content"] = b"\xff"
    column = pa.array(given, kind).cast(pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())])))
    names = pa.array(["human", "gpt"]).dictionary_encode()
    pq.write_table(pa.table({"messages": column, "system": names, "when": [1, 2]}), tmp_path / "a.parquet")
    counts = process(tmp_path / "a.parquet", tmp_path / "a.bin")
    assert counts["rejected_by_reason"] == {"bad_utf8": 1}
    assert read_chats(tmp_path / "a.bin") == [
        expected((("system", "human"), ("user", "q"), ("assistant", "a")), embedded)
    ]


def test_a_foreign_tokenizer_writes_its_own_template(tmp_path):
    folder = write_style(tmp_path / "llama", "Llama 3")
    path = write(tmp_path / "a.jsonl", jsonl(map(FORMS["OpenAI's messages"], CHATS)))
    process(path, tmp_path / "a.bin", tokenizer_path=folder, clean=False)
    tokenizer, manifest = load_tokenizer(folder), read_manifest(tmp_path / "a.bin")
    assert manifest.chat["end_ids"] == [tokenizer.convert_tokens_to_ids("<|eot_id|>")] != [manifest.eos_id]
    for chat, (ids, learned) in zip(CHATS, read_chats(tmp_path / "a.bin"), strict=True):
        start = learned.index(1)
        first = next(n for n, (role, _) in enumerate(chat) if role == "assistant")
        assert ids[:start] == encode_chat(tokenizer, messages(chat[:first]))
        assert ids[-1] in manifest.chat["end_ids"] and learned[-1] == 1


def test_what_a_template_refuses_is_rejected(tmp_path):
    folder = write_style(tmp_path / "gemma", "Gemma")  # takes no system message
    path = write(tmp_path / "a.jsonl", jsonl(map(FORMS["OpenAI's messages"], CHATS)))
    counts = process(path, tmp_path / "a.bin", tokenizer_path=folder)
    assert counts["rejected_by_reason"] == {"template_refuses": 1} and len(read_chats(tmp_path / "a.bin")) == 2


# ---------------------------------------------------------------------------------------------- resumed, shared, again


def many(count: int) -> bytes:
    values = []
    for n in range(count):
        turns = [("user", f"第{n}问"), ("assistant", f"第{n}答" * (n % 9 + 1))] * (n % 3 + 1)
        values.append(sharegpt(tuple(turns)) if n % 2 else {"messages": messages(turns)})
        if n % 7 == 0:
            values.append({"messages": [USER]})
        if n % 11 == 0:
            values.append(values[0])
    return jsonl(values)


SMALL = {"chunk_size": 20, "save_interval": 800}


@pytest.mark.long
def test_a_job_that_was_stopped_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", many(400))
    for folder in ("whole", "stopped"):
        processor = OptimizedDataProcessor(workers=0, val_share=0.1, **SMALL)
        output = tmp_path / folder / "data.bin"
        if folder == "stopped":
            begin_and_stop(processor, path, output, monkeypatch)
        processor.process_dataset(path, output)
    assert contents(tmp_path / "whole" / "data.bin") == contents(output)
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"data.learn", "data.val.learn"}


@pytest.mark.slow  # as texts do, in test_data_resume.py
def test_several_workers_and_processes_give_the_same_bytes(tmp_path):
    path = write(tmp_path / "a.jsonl", many(3000))
    process(path, tmp_path / "one" / "data.bin", **SMALL)
    flags = ["--input_path", path, "--save_interval", 800, "--chunk_size", 20]
    done = process_data(*flags, "--output_path", tmp_path / "two" / "data.bin", "--workers", 2)
    assert done.returncode == 0, done.stderr
    script = [sys.executable, ROOT / "optimized_data_processing.py", *flags, "--workers", 0]
    done = finish_ranks(start_two_ranks([*script, "--output_path", tmp_path / "three" / "data.bin"]))
    assert done.returncode == 0, done.stderr
    for name in ("data.bin", "data.learn", "data.ends", "data.rejects.jsonl"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes() == whole


@pytest.mark.long
def test_a_finished_output_is_kept_and_a_damaged_mask_is_named(tmp_path, capsys):
    path, output = write(tmp_path / "a.jsonl", LINES), tmp_path / "a.bin"
    process(path, output)
    process(path, output)
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"this changed since it was made: format \(was chat, is not set\)"):
        process(write(path, LINES.replace(b"messages", b"text    ").replace(b"[", b'"').replace(b"]", b'"')), output)
    write(path, LINES)
    learn_path(output).write_bytes(b"\0" * learn_path(output).stat().st_size)
    with pytest.raises(InputError, match="a.learn is damaged"):
        process(path, output)


def test_another_template_is_another_output(tmp_path):
    folder = write_style(tmp_path / "t", "MiniMind 2")
    path, output = write(tmp_path / "a.jsonl", LINES), tmp_path / "a.bin"
    process(path, output, tokenizer_path=folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("'] + '\n'", "'] + '\n\n'")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="this changed since it was made: the chat template"):
        process(path, output, tokenizer_path=folder)


@pytest.mark.long
def test_a_mask_of_another_origin_is_never_overwritten_or_removed(tmp_path):
    path = write(tmp_path / "in.jsonl", LINES)
    foreign = write(tmp_path / "a.learn", b"mine")
    with pytest.raises(InputError, match="a.learn is there already, and no earlier job wrote it"):
        process(path, tmp_path / "a.bin")
    process(write(tmp_path / "texts.jsonl", jsonl([{"text": "好"}])), tmp_path / "a.bin")
    assert foreign.read_bytes() == b"mine"
    foreign.unlink()
    OptimizedDataProcessor(workers=0).process_dataset(path, tmp_path / "a.bin", resume=False)
    assert foreign.exists()
    OptimizedDataProcessor(workers=0).process_dataset(tmp_path / "texts.jsonl", tmp_path / "a.bin", resume=False)
    assert not foreign.exists()  # an earlier job's mask does not belong to the texts


# ------------------------------------------------------------------------------------------------------------- shown


@pytest.mark.long
def test_show_marks_what_is_learned(tmp_path, process_data_here, capsys):
    path = write(tmp_path / "a.jsonl", jsonl(map(sharegpt, CHATS)))
    code, _ = process_data_here("--input_path", path, "--output_path", tmp_path / "a.bin", "--workers", 0, "--show", 2)
    assert code == 0
    first, second = shown_documents(tmp_path / "a.bin", 2)
    assert first.endswith("<s>user\n你好</s>\n<s>assistant\n[learned]你好！有什么可以帮助你的吗？</s>[/learned]\n")
    assert first.startswith("document 1 of 3: ") and second.count("[learned]") == 2
    third = list(shown_documents(tmp_path / "a.bin", 9, coloured=True))[2]
    assert "\x1b[32mx </s>\n<s>assistant\ny</s>\x1b[0m" in third
    with pytest.raises(InputError, match="did not make"):
        list(shown_documents(tmp_path / "a.bin", 1, write_style(tmp_path / "t", "Qwen 3")))
    for damaged, value in ((tmp_path / "a.bin", "65,535"), (learn_path(tmp_path / "a.bin"), "255")):
        whole = damaged.read_bytes()
        damaged.write_bytes(b"\xff\xff" + whole[2:])
        with pytest.raises(InputError, match=f"{damaged.name}: {value} found in document 1, at most"):
            list(shown_documents(tmp_path / "a.bin", 1))
        damaged.write_bytes(whole)
    learn_path(tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match="a.learn: .* bytes expected"):
        list(shown_documents(tmp_path / "a.bin", 1))


def test_show_prints_nothing_that_a_terminal_obeys(tmp_path):
    chat = {"messages": messages((("user", "\x1b[2J\u202e"), ("assistant", "\x1b]0;title\x07 ok")))}
    process(write(tmp_path / "a.jsonl", jsonl([chat])), tmp_path / "a.bin", clean=False)
    [text] = shown_documents(tmp_path / "a.bin", 1)
    assert "\x1b" not in text and "\x07" not in text and "\\x1b]0;title\\x07 ok" in text
    [text] = shown_documents(tmp_path / "a.bin", 1, coloured=True)
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x1b[32m" in text


@pytest.mark.parametrize("flags", [["--show", 0], ["--show", 1, "--clean_only"]])
def test_show_says_what_it_cannot_show(tmp_path, process_data_here, flags):
    code, said = process_data_here("--input_path", write(tmp_path / "a.jsonl", LINES), *flags)
    assert code == 2 and said.startswith("error: show: ")

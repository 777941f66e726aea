"""Judging answers: the shares over answers whose faults are known, and what `--judge` reads."""

import json

import pytest

from model.corpus.inputs import read_questions, read_texts
from model.errors import InputError
from model.generation.judging import judge_answers, repeats

POEM = "床前明月光，疑是地上霜。"
ANSWERED = [  # answer, why it ended, expected
    (" 2。\n", "eos", "2。"),
    ("4。", "eos", "3。"),
    ("你好！\nuser\n你是谁", "max_new_tokens", "你好！"),
    (POEM + POEM, "max_new_tokens", POEM),
]


def test_each_fault_is_counted_once():
    judged = judge_answers(*zip(*ANSWERED, strict=True))
    shares = {name: judged[name] for name in ("exact", "stopped", "repeated", "leaked")}
    assert judged["answers"] == 4 and shares == {"exact": 0.25, "stopped": 0.5, "repeated": 0.25, "leaked": 0.25}


def test_a_run_of_eight_characters_that_occurs_twice_is_a_repetition():
    assert repeats(POEM + POEM) and not repeats(POEM)


def test_questions_are_chats_in_any_form(tmp_path):
    path = tmp_path / "q.jsonl"
    turns = [("human", "甲"), ("gpt", "乙"), ("human", "丙"), ("gpt", "丁")]
    lines = [
        {"conversations": [{"from": role, "value": text} for role, text in turns], "source": "two"},
        {"instruction": "问", "output": "答"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    (history, expected, group), (short, answer, none) = read_questions(path)
    assert [message["content"] for message in history] == ["甲", "乙", "丙"] and (expected, group) == ("丁", "two")
    assert [message["content"] for message in short] == ["问"] and (answer, none) == ("答", "")


def test_a_value_nested_deeper_than_json_takes_is_no_reason_to_fail(tmp_path):
    pytest.importorskip("orjson")  # which nests up to 1,024 deep
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "q", "completion": "a", "text": "t", "x": ' + "[" * 1000 + "]" * 1000 + "}\n")
    assert len(read_questions(path)) == 1 and read_texts(path) == ["t"]


@pytest.mark.parametrize(("content", "said"), [('{"text": "a"}', "line 1 of"), ("\n", "holds no chat")])
def test_a_file_that_is_no_chats_is_one_line(tmp_path, content, said):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_questions(path)

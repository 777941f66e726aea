"""Judging answers: the counts on answers whose faults are known, and `--judge` end to end."""

import json

import pytest

from inference import read_questions
from model.errors import InputError
from model.generation.judging import Answer, by_group, judge, repeats

GOOD = Answer("1+1=?", " 2。\n", "2。", "eos", "sum")
ANSWERS = [
    GOOD,
    Answer("1+2=?", "4。", "3。", "eos", "sum"),
    Answer("你好", "你好！\nuser\n你是谁", "你好！", "max_new_tokens", "greeting"),
    Answer("背诗", "床前明月光，疑是地上霜。床前明月光，疑是地上霜。", "床前明月光，疑是地上霜。", "max_new_tokens"),
]


def test_each_fault_is_counted_once():
    judgement = judge(ANSWERS)
    assert (judgement.answers, judgement.exact, judgement.stopped) == (4, 1, 2)
    assert (judgement.repetitive, judgement.leaking) == (1, 1)
    assert judgement.as_metrics()["answers_exact"] == 0.25
    assert by_group(ANSWERS)["sum"].exact == 1 and by_group([ANSWERS[3]]) == {}


def test_a_repetition_that_is_expected_is_none():
    refrain = "关关雎鸠在河之洲，关关雎鸠在河之洲。"
    assert repeats(refrain) and not repeats("关关雎鸠，在河之洲。") and not repeats("哈哈哈哈哈哈哈哈哈")
    assert not Answer("", refrain, refrain, "eos").is_repetitive


@pytest.mark.parametrize("word", ["user", "assistant：", "<s>system"])
def test_a_role_word_is_a_leak_only_where_a_message_would_begin(word):
    assert Answer("", f"好。\n{word}\n", "", "eos").leaks
    assert not Answer("", f"the {word} said", "", "eos").leaks or word.startswith("<s>")


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


@pytest.mark.parametrize(("content", "said"), [('{"text": "a"}', "line 1 of"), ("\n", "holds no chat")])
def test_a_file_that_is_no_chats_is_one_line(tmp_path, content, said):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_questions(path)

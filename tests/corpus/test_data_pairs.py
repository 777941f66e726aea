"""Pairs of answers through data processing: two documents a pair, alike up to the answers, and nothing lost."""

import json

import pytest

from model.corpus.pairs import PAIR_REASONS, halves, parse_pair
from model.corpus.reasons import REASONS
from model.corpus.show import shown_documents
from model.corpus.train_tokenizer import train_tokenizer
from model.errors import InputError
from model.text.chat_template import encode_chat
from model.text.tokenization import load_tokenizer
from model.token_file.manifest import learn_path, read_manifest
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import ROOT, read_rejects
from tests.corpus.test_data_chats import jsonl, messages, process, read_chats, write

QUESTION, CHOSEN, REJECTED = ("user", "1+1=?"), ("assistant", "2"), ("assistant", "也许是 3")
TWO_TURNS = [("system", "答得短些。"), ("user", "你好"), ("assistant", "你好！"), QUESTION]


def openai(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def sharegpt(role: str, content: str) -> dict:
    return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}


def whole(history, write_message=openai) -> dict:
    return {
        name: [write_message(*message) for message in [*history, answer]]
        for name, answer in (("chosen", CHOSEN), ("rejected", REJECTED))
    }


TEXTS = {"chosen": CHOSEN[1], "rejected": REJECTED[1]}
MESSAGES = {"chosen": openai(*CHOSEN), "rejected": openai(*REJECTED)}
SINGLE = {  # the question alone, in every form
    "whole chats": whole([QUESTION]),
    "ShareGPT's whole chats": whole([QUESTION], sharegpt),
    "whole chats beside their prompt": whole([QUESTION]) | {"prompt": QUESTION[1]},
    "texts": TEXTS | {"prompt": QUESTION[1]},
    "texts beside messages": TEXTS | {"prompt": [openai(*QUESTION)]},
    "texts beside a question": TEXTS | {"question": QUESTION[1], "system": ""},
    "Alpaca": TEXTS | {"instruction": QUESTION[1], "input": ""},
    "messages of one": MESSAGES | {"prompt": QUESTION[1]},
    "lists of one": {name: [message] for name, message in MESSAGES.items()} | {"prompt": QUESTION[1]},
    "ShareGPT's": {
        "conversations": [sharegpt(*QUESTION)],
        "chosen": sharegpt(*CHOSEN),
        "rejected": sharegpt(*REJECTED),
    },
    "parts": {name: [{"type": "text", "text": text}] for name, text in TEXTS.items()} | {"prompt": QUESTION[1]},
}


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer()


@pytest.mark.parametrize("form", SINGLE)
def test_every_form_gives_the_same_pair(form):
    pair, kind = parse_pair(json.dumps(SINGLE[form]).encode())
    assert kind == "pairs" and halves(pair) == ((QUESTION, CHOSEN), (QUESTION, REJECTED))


@pytest.mark.long
def test_a_pair_is_two_documents_whose_last_answers_are_learned(tmp_path, embedded, capfd):
    counts = process(write(tmp_path / "a.jsonl", jsonl([SINGLE["texts"], whole(TWO_TURNS)])), tmp_path / "a.bin")
    assert counts["documents"] == 2 and counts["documents_written"] == 4 and counts["lines"] == 2
    manifest = read_manifest(tmp_path / "a.bin")
    assert manifest.documents == 4 and manifest.chat["pairs"] is True and manifest.chat["turns"] == 4
    found = read_chats(tmp_path / "a.bin")
    for place, history in ((0, [QUESTION]), (2, TWO_TURNS)):
        for (ids, learned), answer in zip(found[place : place + 2], (CHOSEN, REJECTED), strict=True):
            before = encode_chat(embedded, messages(history))
            assert ids[: len(before)] == before and learned.index(1) == len(before)
            answered = [index for index, flag in zip(ids, learned, strict=True) if flag]
            assert embedded.decode(answered) == f"{answer[1]}</s>" and sum(learned[: len(before)]) == 0
    said = capfd.readouterr().err
    assert "pairs of answers, chosen and rejected" in said and "2 pairs, 4 answers" in said
    assert "; pairs of more than 512 tokens, kept whole: 0" in said
    shown = [*shown_documents(tmp_path / "a.bin", 2)]
    assert ", chosen\n" in shown[0] and ", rejected\n" in shown[1] and "[learned]2</s>[/learned]" in shown[0]


BAD = {
    "no_pair": [{"prompt": "q"}, {"messages": [openai(*QUESTION), openai(*CHOSEN)]}],
    "half_a_pair": [
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": "a", "rejected": None},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": [], "rejected": "b"},
    ],
    "no_question": [TEXTS, TEXTS | {"prompt": ""}],
    "different_questions": [
        {"chosen": [openai("user", "a"), openai(*CHOSEN)], "rejected": [openai("user", "b"), openai(*REJECTED)]},
        whole([QUESTION]) | {"prompt": "another"},
        {"chosen": whole(TWO_TURNS)["chosen"], "rejected": whole([QUESTION])["rejected"]},
    ],
    "same_answers": [
        {"prompt": "q", "chosen": "a", "rejected": " a\n"},
        {"prompt": "q", "chosen": "a", "rejected": openai("assistant", "a")},
    ],
    "empty_answer": [{"prompt": "q", "chosen": " ", "rejected": "b"}],
    "empty_question": [TEXTS | {"prompt": " "}],
    "not_text": [{"prompt": "q", "chosen": 3, "rejected": "b"}, TEXTS | {"prompt": 3}],
    "roles_out_of_order": [{"chosen": [openai(*CHOSEN)] * 2, "rejected": [openai(*REJECTED)] * 2}],
    "unanswered": [{name: [openai(*QUESTION), openai(*CHOSEN), openai(*QUESTION)] for name in ("chosen", "rejected")}],
    "unknown_role": [{name: [openai("x", "y"), openai(*CHOSEN)] for name in ("chosen", "rejected")}],
    "bad_message": [{"prompt": "q", "chosen": {}, "rejected": "b"}],
    "bad_utf8": [{"prompt": "q", "chosen": "\ud800", "rejected": "b"}],
    "nothing_learned": [{"prompt": "q", "chosen": openai(*CHOSEN) | {"weight": 0}, "rejected": "b"}],
}


def test_every_line_that_is_no_pair_has_a_reason_of_its_own(tmp_path):
    expected = [reason for reason, values in BAD.items() for _ in values]
    values = [SINGLE["texts"], *(value for values in BAD.values() for value in values)]
    lines = b"".join(json.dumps(value).encode() + b"\n" for value in values)  # with its surrogate escaped
    counts = process(write(tmp_path / "a.jsonl", lines), tmp_path / "a.bin")
    assert [reject["reason"] for reject in read_rejects(tmp_path / "a.bin")] == expected
    assert counts["documents"] == 1 and counts["documents"] + counts["rejected"] == counts["lines"]
    assert set(PAIR_REASONS) <= set(BAD) and set(PAIR_REASONS) <= set(REASONS)


@pytest.mark.long
def test_a_pair_of_which_one_answer_is_too_long_is_dropped_whole(tmp_path):
    values = [
        SINGLE["texts"],
        {"prompt": "q", "chosen": "好", "rejected": "".join(map(chr, range(0x4E00, 0x4EA0)))},
        whole(TWO_TURNS),
    ]
    path = write(tmp_path / "a.jsonl", jsonl(values))
    counts = process(path, tmp_path / "a.bin", long_documents="drop", max_length=64)
    assert counts["rejected_by_reason"] == {"over_max_length": 1} and len(read_chats(tmp_path / "a.bin")) == 4
    alone = process(write(tmp_path / "b.jsonl", jsonl([values[0], values[2]])), tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert learn_path(tmp_path / "a.bin").read_bytes() == learn_path(tmp_path / "b.bin").read_bytes()
    assert alone["documents"] == 2
    with pytest.raises(InputError, match="pairs of answers cannot be truncated; keep or drop them"):
        process(path, tmp_path / "c.bin", long_documents="truncate")


@pytest.mark.long
def test_duplicates_weights_and_validation_keep_pairs_together(tmp_path):
    values = [{"prompt": f"第{n // 2}问", "chosen": f"好{n // 2}", "rejected": f"不好{n % 4 // 2}"} for n in range(200)]
    path = write(tmp_path / "a.jsonl", jsonl(values))
    processor = OptimizedDataProcessor(workers=0, val_share=0.2, chunk_size=7, save_interval=500)
    counts = processor.process_dataset([path], tmp_path / "a.bin", weights=[2])
    assert counts["rejected_by_reason"] == {"duplicate": 100} and counts["documents"] == 100
    tokenizer, written = load_tokenizer(), 0
    for name in ("a.bin", "a.val.bin"):
        chats = [tokenizer.decode(ids) for ids, _ in read_chats(tmp_path / name)]
        assert len(chats) % 2 == 0
        for chosen, rejected in zip(chats[::2], chats[1::2], strict=True):
            assert chosen.split("assistant")[0] == rejected.split("assistant")[0]
            assert "\n好" in chosen and "\n不好" in rejected
        written += len(chats) // 2 // (2 if name == "a.bin" else 1)
    assert written == 100


@pytest.mark.long
def test_cleaned_jsonl_holds_pairs_and_gives_the_same_token_file(tmp_path):
    values = [*SINGLE.values(), whole(TWO_TURNS)]
    path = write(tmp_path / "a.jsonl", jsonl(values))
    counts = OptimizedDataProcessor(workers=0).validate_and_clean_jsonl(path, tmp_path / "c.jsonl")
    assert counts["rejected_by_reason"] == {"duplicate": len(SINGLE) - 1}
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_bytes().splitlines()]
    assert lines == [whole([QUESTION]), whole(TWO_TURNS)]
    process(path, tmp_path / "a.bin")
    process(tmp_path / "c.jsonl", tmp_path / "d.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "d.bin").read_bytes()


@pytest.mark.long
def test_cleaning_that_makes_answers_the_same_rejects_the_pair(tmp_path):
    values = [{"prompt": "<b>q</b>", "chosen": "a<br>", "rejected": "a"}, SINGLE["texts"]]
    counts = process(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "a.bin", html="tags")
    assert counts["rejected_by_reason"] == {"same_answers": 1}


@pytest.mark.long
def test_a_format_can_be_forced(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": [openai(*QUESTION), openai(*CHOSEN)]}, SINGLE["texts"]]))
    assert process(path, tmp_path / "a.bin", format="pairs")["rejected_by_reason"] == {"no_pair": 1}
    assert process(path, tmp_path / "b.bin")["rejected_by_reason"] == {"no_chat": 1}  # the first line decides
    with pytest.raises(InputError, match=r"its only line is not a usable pair of answers \(no_pair 1\)"):
        process(write(tmp_path / "c.jsonl", jsonl([{"text": "x"}])), tmp_path / "c.bin", format="pairs")


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "form", "reason"),
    [("text", "texts", "no_text"), ("chat", "texts", "no_chat"), ("chat", "ShareGPT's", "no_answer")],
)
def test_pairs_read_as_something_else_name_the_format_that_reads_them(tmp_path, format, form, reason):
    path = write(tmp_path / "a.jsonl", jsonl([SINGLE[form]] * 2))
    keys = ", ".join(SINGLE[form])
    said = rf"{reason} 2\).*; these are pairs of answers \(keys {keys}\): --format pairs reads them"
    with pytest.raises(InputError, match=said):
        process(path, tmp_path / "a.bin", format=format)
    with pytest.raises(InputError, match=said):
        train_tokenizer([path], tmp_path / "tokenizer", format=format)


@pytest.mark.long
def test_chats_read_as_pairs_name_the_format_that_reads_them(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": [openai(*QUESTION), openai(*CHOSEN)]}] * 2))
    said = r"pair of answers \(no_pair 2\).*; these are chats \(keys messages\): --format chat reads them"
    with pytest.raises(InputError, match=said):
        process(path, tmp_path / "a.bin", format="pairs")


@pytest.mark.long
def test_parquet_pairs_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [whole([QUESTION]) | {"prompt": QUESTION[1], "score": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert process(tmp_path / "a.parquet", tmp_path / "a.bin")["documents"] == 1


def test_a_tokenizer_is_trained_on_pairs(tmp_path):
    values = [{"prompt": f"春眠{n}", "chosen": f"不觉晓{n}" * 3, "rejected": "春"} for n in range(50)]
    read = train_tokenizer(write(tmp_path / "a.jsonl", jsonl(values)), tmp_path / "t", 262)
    assert read.documents == 50 and read.rejected == {}


def test_the_sample_pairs_are_all_usable(tmp_path):
    counts = process(ROOT / "examples" / "pairs_zh.jsonl", tmp_path / "a.bin")
    assert counts["rejected"] == 0 and counts["documents"] >= 24
    lengths = [len(ids) for ids, _ in read_chats(tmp_path / "a.bin")]
    assert min(map(sum, zip(lengths[::2], lengths[1::2], strict=True))) <= 33  # for the pages' commands

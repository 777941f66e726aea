"""Damaged files of every kind: each line of the input is a document or a reject, and none is lost or changed."""

import base64
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.corpus.inspection import PARQUET, has_only_carriage_returns, is_array, packing_of
from model.corpus.opening import HEAD_BYTES
from model.errors import InputError
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import ROOT, corpus_lines, read_documents, read_rejects

BOM = b"\xef\xbb\xbf"
HAN = [chr(code) for code in range(0x4E00, 0x9FA5)]


def odd_lines() -> list[bytes]:
    """Lines that trip a reader, good ones among them."""
    return [
        *(b"", b" \t ", b"\r", "\u3000".encode(), b"\x00", b"\x00" * 5000),
        *(b'{"text": "\xff\xfe\xe4\xb8"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\xc0\x80"}', b"\xa0"),
        *(b'{"text": "\\ud800"}', b'{"text": "x\\udfff\\ud800y"}', b'{"text": "\\ud83d\\ude00"}', b'{"\\ud800": 1}'),
        *(b'{"text": "a\x00b"}', b'{"text": "a\\u0000b"}', b'{"text": "a\tb"}', b'{"text": "\\u0000"}'),
        *(BOM, BOM + b'{"text": "after a mark"}', b'{"text": "a\xef\xbb\xbfb"}', b'{"text": "\xef\xbb\xbf"}'),
        *(b'{"text": "windows"}\r', b'{"text": "old mac"}\r{"text": "another"}', b'{"text":\r "a"}', b"\r\r{}\r"),
        *(b"[" * 100_000, b'{"text": ' * 50_000, b'{"text": ' + b"[" * 50_000, b"[" * 50_000 + b"]" * 50_000),
        *(b"1" * 5000, b'{"n": ' + b"9" * 5000 + b', "text": "x"}', b"-1e999", b'{"text": NaN}', b'{"n": Infinity}'),
        *(b'{"text": "one", "text": "two"}', b'{"text": "one", "text": 2}', b'{"Text": "x"}', b'{"text ": "x"}'),
        *(b'{"text": 5}', b'{"text": null}', b'{"text": ["x"]}', b'{"text": {"text": "x"}}', b'{"text": true}', b"{}"),
        *(b'{"text": "</s>"}', b'{"text": "a<s>b</s>c<unk>"}', b"</s>", b"null", b'"text"', b'["text"]', b"not json"),
        *('{"text": "a\u2028b\u2029c\x85d\x0b"}'.encode(), '{"text": "\u2028"}'.encode(), "\u2028".encode()),
        *(b'{"text": "x"', b'{"text": "x"} y', b'{"text": "x"}{"text": "y"}', b"{'text': 'x'}", b'{"text": "x",}'),
        *(b' \t{"text": "spaces around"} \t\r', '\xa0{"text": "no-break space before"}'.encode()),
        *(b'{"text": ""}', b'{"text": " \\n\\u3000"}', b'{"text": " \\t cut \\u2003"}', b'{"text": "\\/\\b\\f"}'),
        *(json.dumps({"text": "长" * 3000}, ensure_ascii=False).encode(), b'{"text": "' + b"y" * 9000 + b'"}'),
    ]


@dataclass
class Line:
    """What must become of one line: a text, or a reason to reject it."""

    raw: bytes
    offset: int
    text: str | None
    reason: str | None


def expected_lines(content: bytes) -> list[Line]:
    """The oracle: split at b"\\n", read with json.loads, exact repeats found in a dict."""
    offset, lines, seen = 0, [], set()
    pieces = content.split(b"\n")
    for raw in pieces[:-1] if pieces[-1] in (b"", BOM) else pieces:
        text, reason = None, None
        if raw.startswith(BOM):
            raw, offset = raw[len(BOM) :], offset + len(BOM)
        try:
            value = json.loads(raw.decode("utf-8"))
            text = value["text"].strip()
            text.encode("utf-8")
        except UnicodeError:
            text, reason = None, "bad_utf8"
        except (ValueError, RecursionError):
            reason = "bad_json" if raw.decode().strip() else "empty"
        except (TypeError, KeyError, AttributeError):
            reason = "no_text" if isinstance(value, dict) else "not_an_object"
        if text == "":
            text, reason = None, "empty"
        elif text in seen:
            text, reason = None, "duplicate"
        elif text:
            seen.add(text)
        lines.append(Line(raw, offset, text, reason))
        offset += len(raw) + 1
    return lines


def rejected_bytes(reject: dict) -> bytes:
    return base64.b64decode(reject["raw_base64"]) if "raw_base64" in reject else reject["raw"].encode()


def check_rejects(output: Path, lines: list[Line], content: bytes) -> None:
    """The rejects are the bad lines, in order, and each holds the input's own bytes."""
    rejects = read_rejects(output)
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.reason]
    assert [(r["line"], r["reason"]) for r in rejects] == [(number, line.reason) for number, line in expected]
    for reject, (_, line) in zip(rejects, expected, strict=True):
        assert reject["offset"] == line.offset
        assert rejected_bytes(reject) == line.raw == content[line.offset : line.offset + len(line.raw)]
    texts = {line.text: number for number, line in reversed(list(enumerate(lines, 1))) if line.text}
    for reject in rejects:
        if reject["reason"] == "duplicate":
            text = json.loads(rejected_bytes(reject))["text"].strip()
            assert reject["duplicate_of"] == texts[text] < reject["line"]


def process(content: bytes, folder: Path, tokenizer_folder, **pace) -> dict | None:
    """The counts, or None where the file holds no document, which is the only error there may be."""
    folder.mkdir()
    (folder / "raw.jsonl").write_bytes(content)
    try:
        return OptimizedDataProcessor(tokenizer_folder, clean=False, **pace).process_dataset(
            folder / "raw.jsonl", folder / "data.bin"
        )
    except InputError as error:
        lines = len(expected_lines(separated(content)))
        nothing = "lines is a document" if lines != 1 else "its only line is not a document"
        told = "is empty" if not content else "no line found" if content == BOM else nothing
        assert told in str(error), (error, lines)
        assert sorted({path.name for path in folder.iterdir()} - {"data.rejects.jsonl"}) == ["raw.jsonl"]
        return None


def separated(content: bytes) -> bytes:
    """A carriage return between two objects separates lines too."""
    return content.replace(b"}\r{", b"}\n{")


def check_file(content: bytes, tokenizer_folder, *paces: dict) -> None:
    head = content[:HEAD_BYTES]
    if is_array(head) or has_only_carriage_returns(head) or head.startswith(PARQUET) or packing_of("", head):
        return  # not JSONL
    lines = expected_lines(separated(content))
    texts = [line.text for line in lines if line.text]
    with tempfile.TemporaryDirectory() as name:
        outputs = []
        for number, pace in enumerate(paces):
            folder = Path(name, str(number))
            counts = process(content, folder, tokenizer_folder, **pace)
            check_rejects(folder / "data.bin", lines, content)
            assert (counts is None) == (not texts)
            if counts is not None:
                assert counts["lines"] == counts["documents"] + counts["rejected"] == len(lines)
                assert read_documents(folder / "data.bin", tokenizer_folder) == texts
            made = [path for path in folder.iterdir() if path.name != "data.json"]  # which names the parts' size
            outputs.append({path.name: path.read_bytes() for path in made})
        assert all(output == outputs[0] for output in outputs), "the pace changed a byte"


# ------------------------------------------------------------------------------------------------------- any file


def as_line(text: str, escaped: bool) -> bytes:
    return json.dumps({"id": 1, "text": text}, ensure_ascii=escaped).encode()


LINE = st.one_of(
    st.builds(as_line, st.text(max_size=40), st.booleans()),
    st.builds(as_line, st.sampled_from(["同", "句", "same"]), st.booleans()),  # so that some repeat
    st.sampled_from(odd_lines()),
    st.binary(max_size=30),  # it may hold newlines of its own
)
NEWLINE = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"", b"\n" + BOM])
PACE = st.fixed_dictionaries({"chunk_size": st.sampled_from([1, 2, 7, 1000]), "save_interval": st.integers(1, 3000)})
FILE = st.builds(
    lambda bom, pairs, last: bom + b"".join(line + end for line, end in pairs) + last,
    st.sampled_from([b"", b"", BOM]),
    st.lists(st.tuples(LINE, NEWLINE), max_size=25),
    st.one_of(st.just(b""), LINE),  # the last line without its end
)


@pytest.mark.long
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=FILE, pace=PACE, other=PACE)
@example(content=b"", pace={}, other={})
@example(content=BOM, pace={}, other={})
@example(content=b"\n", pace={}, other={})
@example(content=b"\n" + BOM, pace={}, other={})
@example(content=b'{"text": ""}\r{"text": ""}\n', pace={}, other={})
@example(content=b'{"text": "x"}', pace={}, other={"save_interval": 1})
def test_every_line_of_any_file_is_a_document_or_a_reject(content, pace, other, tokenizer_folder):
    check_file(content, tokenizer_folder, {"workers": 0, **pace}, {"workers": 0, **other})


@pytest.mark.long
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_all_kinds_of_lines_together_in_any_order_and_with_several_workers(tokenizer_folder, newline):
    lines = [line.rstrip(b"\n") for line in corpus_lines(150)] + odd_lines() * 2
    random.Random(len(newline)).shuffle(lines)
    several = {"workers": 2, "save_interval": 2000, "chunk_size": 30}
    check_file(BOM + newline.join(lines), tokenizer_folder, several, {"workers": 0, "chunk_size": 1})


# ------------------------------------------------------------------------------------------------------- large lines


# A process' own figure begins with what its parent held when it was started: a small process stands between them.
PEAK_MEMORY = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.long
def test_a_line_of_100_mb_is_rejected_in_bounded_memory(tokenizer_folder, tmp_path):
    good = corpus_lines(40)
    with open(tmp_path / "raw.jsonl", "wb") as file:
        file.writelines(good[:20])
        start = file.tell()
        file.write(b'{"text": "')
        file.seek(100 << 20, os.SEEK_CUR)  # a hole: no disk is needed for it
        file.writelines([b'"}\n', *good[20:]])
    flags = ["--input_path", "raw.jsonl", "--output_path", "data.bin", "--workers", "0"]
    flags += ["--tokenizer_path", str(tokenizer_folder)]
    command = [sys.executable, str(ROOT / "optimized_data_processing.py"), *flags]
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert int(done.stdout) < 1 << 20  # kB
    (reject,) = read_rejects(tmp_path / "data.bin")
    assert (reject["line"], reject["offset"], reject["reason"]) == (21, start, "oversized")
    assert rejected_bytes(reject) == b'{"text": "' + b"\0" * 4086  # where the rest lies, the offset says
    stats = json.loads((tmp_path / "data_stats.json").read_text())
    assert (stats["lines"], stats["documents"]) == (41, 40)
    texts = read_documents(tmp_path / "data.bin", tokenizer_folder)
    assert texts[20] == json.loads(good[20])["text"].strip()

    again = {"save_interval": 100_000, "workers": 0, "clean": False}  # the long line lies over many parts
    processor = OptimizedDataProcessor(tokenizer_folder, **again)
    processor.process_dataset(tmp_path / "raw.jsonl", tmp_path / "b" / "data.bin")
    assert (tmp_path / "b" / "data.rejects.jsonl").read_bytes() == (tmp_path / "data.rejects.jsonl").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("long_documents", ["keep", "split", "truncate", "drop"])
def test_a_million_characters_without_punctuation(tmp_path, long_documents):
    long = "".join(random.Random(1).choices(HAN, k=1_000_000))
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("前", long, "后")]
    (tmp_path / "raw.jsonl").write_text("".join(lines), encoding="utf-8")
    processor = OptimizedDataProcessor(workers=0, long_documents=long_documents, max_length=2048)
    counts = processor.process_dataset(tmp_path / "raw.jsonl", tmp_path / "data.bin")
    texts = read_documents(tmp_path / "data.bin", None)
    assert (texts[0], texts[-1]) == ("前", "后")
    assert counts["documents_longer_than_max_length"] == 1
    lengths = np.diff(np.fromfile(tmp_path / "data.ends", "<u8"), prepend=0)
    if long_documents == "keep":
        assert texts[1] == long
    elif long_documents == "split":
        assert "".join(texts[1:-1]) == long
        assert lengths[1:-2].min() > 2040 and lengths.max() <= 2048
    elif long_documents == "truncate":
        assert len(texts) == 3 and long.startswith(texts[1]) and 2040 < lengths[1] <= 2048
    else:
        assert len(texts) == 2
        assert [(r["line"], r["reason"]) for r in read_rejects(tmp_path / "data.bin")] == [(2, "over_max_length")]


@pytest.mark.long
@pytest.mark.parametrize("tokenizer_name", ["embedded", "small"])
@pytest.mark.parametrize("long_documents", ["keep", "split", "truncate", "drop"])
def test_control_tokens_that_a_text_spells_out_stay_text(tmp_path, tokenizer_folder, tokenizer_name, long_documents):
    folder = tokenizer_folder if tokenizer_name == "small" else None
    long = "甲</s>乙<s>丙<unk>。 </s>\n<s> </s></s>" * 20
    lines = [as_line(text, escaped=False) + b"\n" for text in ("</s>", long, "<s>a</s>")]
    (tmp_path / "raw.jsonl").write_bytes(b"".join(lines))
    processor = OptimizedDataProcessor(folder, 32, workers=0, long_documents=long_documents, clean=False)
    processor.process_dataset(tmp_path / "raw.jsonl", tmp_path / "data.bin")
    texts = read_documents(tmp_path / "data.bin", folder)  # checks where the control tokens are
    assert (texts[0], texts[-1]) == ("</s>", "<s>a</s>")
    if long_documents == "split":
        assert len(texts) > 10
        assert "".join("".join(texts[1:-1]).split()) == "".join(long.split())
    else:
        assert len(texts) == (2 if long_documents == "drop" else 3)
        assert long.startswith(texts[1]) or long_documents == "drop"

"""What users give as input: every form that can be read safely is, and of the others one line says what they are."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from model.corpus import train_tokenizer
from model.corpus.opening import Source
from model.errors import InputError
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import corpus_lines, read_documents, read_rejects
from tests.corpus.half_made import begin_and_stop, contents

TEXTS = ["春风又绿江南岸，明月何时照我还。", '他说："好\\坏"]}，[{', "床前明月光，疑是地上霜。\n举头望明月。"]
ROWS = [{"id": [number, {"k": "]"}], "text": text} for number, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def documents(tokenizer_folder, tmp_path):
    """The documents that come of an input, and the counts."""

    def process(given, **options) -> list[str]:
        output = tmp_path / "out" / "data.bin"
        processor = OptimizedDataProcessor(tokenizer_folder, workers=0, clean=False, **options)
        process.counts = processor.process_dataset(given, output, resume=False)
        return read_documents(output, tokenizer_folder)

    return process


# ------------------------------------------------------------------------------------------------------- what is read

ARRAYS = {
    "one line": json.dumps(ROWS, ensure_ascii=False),
    "escaped": json.dumps(ROWS),
    "pretty": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "a line each": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "commas first": "[" + "\n, ".join(json.dumps(row) for row in ROWS) + "\n]",
    "windows": json.dumps(ROWS, indent="\t").replace("\n", "\r\n"),
    "joined": json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:], indent=1) + "\n\n",
    "then lines": json.dumps(ROWS[:1], indent=1) + "\n" + "\n".join(json.dumps(row) for row in ROWS[1:]),
}


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_read_object_by_object(documents, tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr("model.corpus.opening.READ_AT_ONCE", size)  # so that it is cut everywhere
    assert documents(write(tmp_path / "a.json", ARRAYS[kind])) == TEXTS
    assert documents.counts["rejected"] == 0
    assert documents(write(tmp_path / "marked.jsonl", BOM + ARRAYS[kind].encode())) == TEXTS


def test_what_is_damaged_in_an_array_is_one_reject(documents, tmp_path):
    rows = ['{"text": "甲"}', '{"text": 5}', "7", '{"text": bad}', '{"text": "乙"}', '["丙"]', '{"text": "丁"}']
    path = write(tmp_path / "a.json", "[" + ",\n".join(rows) + "]")
    assert documents(path) == ["甲", "乙", "丁"]
    reasons = [(reject["line"], reject["reason"], reject["raw"]) for reject in read_rejects(tmp_path / "out/data.bin")]
    kinds = [(2, "no_text"), (3, "not_an_object"), (4, "bad_json"), (6, "not_an_object")]
    assert reasons == [(line, reason, rows[line - 1]) for line, reason in kinds]


def test_an_array_that_is_cut_off_is_an_error(documents, tmp_path):
    for end in (-1, -30):
        with pytest.raises(InputError, match=r"a.json is damaged \(its JSON array is not closed\); fetch it again"):
            documents(write(tmp_path / "a.json", ARRAYS["one line"][:end]))


def test_an_array_that_was_half_made_resumes_to_the_same_bytes(tokenizer_folder, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in corpus_lines(400)]
    path = write(tmp_path / "raw.json.xz", lzma.compress(json.dumps(rows, indent=1, ensure_ascii=False).encode()))
    processor = OptimizedDataProcessor(tokenizer_folder, workers=0, save_interval=3000)
    begin_and_stop(processor, path, tmp_path / "data.bin", monkeypatch)
    processor.process_dataset(path, tmp_path / "data.bin")
    processor.process_dataset(path, tmp_path / "whole" / "data.bin")
    assert contents(tmp_path / "data.bin") == contents(tmp_path / "whole" / "data.bin")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.jsonl.bz2", bz2.compress(JSONL)),
        ("A.JSONL.GZ", gzip.compress(JSONL)),
        ("two.jsonl.bz2", bz2.compress(JSONL[:50]) + bz2.compress(JSONL[50:])),
        ("two.jsonl.xz", lzma.compress(JSONL[:50]) + lzma.compress(JSONL[50:])),
        ("no_ending", gzip.compress(JSONL)),
        ("gz_by_content.jsonl", gzip.compress(JSONL)),
        ("array.json.gz", gzip.compress(ARRAYS["pretty"].encode())),
        ("mac.jsonl", JSONL.replace(b"\n", b"\r")),
        ("mac.jsonl.gz", gzip.compress(BOM + JSONL.strip().replace(b"\n", b"\r"))),
        ("joined.jsonl", b"".join(BOM + line for line in JSONL.splitlines(keepends=True)) + BOM),
        ("joined.jsonl.gz", b"".join(gzip.compress(BOM + line) for line in JSONL.splitlines(keepends=True))),
    ],
)
def test_however_it_is_packed_the_documents_are_the_same(documents, tmp_path, name, content):
    assert documents(write(tmp_path / name, content)) == TEXTS
    assert documents.counts["rejected"] == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_line_ends_may_differ_within_a_file(documents, tmp_path, name):
    lines = [json.dumps({"text": f"第{number}行"}, ensure_ascii=False) for number in range(20)]
    for ends in (["\r"] * 5 + ["\n"] * 15, ["\n"] * 9 + ["\r"] * 5 + ["\r\n"] * 6):
        content = "".join(map(str.__add__, [*lines[:12], "{bad}", *lines[12:]], [*ends, "\n"])).encode()
        path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        assert documents(path) == [f"第{number}行" for number in range(20)]
        [reject] = read_rejects(tmp_path / "out" / "data.bin")
        assert (reject["line"], reject["reason"], reject["raw"].strip()) == (13, "bad_json", "{bad}")


def test_parquet_in_capitals(documents, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "UPPER.PARQUET")
    assert documents(tmp_path / "UPPER.PARQUET") == TEXTS


def test_plain_text(documents, tmp_path, capsys):
    text = "\ufeff第一回\r\n  甲乙丙\r\n\r\n\r\n丁戊\r己\n\u2028庚\n"
    path = write(tmp_path / "a.txt", text)
    whole = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
    assert documents(path) == [whole]
    assert "plain text: 1 .txt, a document each (--txt_documents)" in capsys.readouterr().err
    assert documents(path, txt_documents="line") == ["第一回", "甲乙丙", "丁戊", "己", "庚"]
    assert documents(path, txt_documents="paragraph") == ["第一回\n  甲乙丙", "丁戊\n己\n\u2028庚"]
    assert documents.counts["rejected"] == 0
    both = [write(tmp_path / "b.TXT.gz", gzip.compress(b"b")), path]
    assert documents(both) == ["b", whole]


def test_plain_text_of_any_size_takes_bounded_memory_and_loses_nothing(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("model.corpus.plain_text.TXT_BYTES", 100)
    lines = [f"第{number}行，" * (number % 40) for number in range(100)]
    found = documents(write(tmp_path / "a.txt", "\n".join(lines)), deduplicate=False)
    assert len(found) > 20 and max(map(len, found)) < 300
    assert "".join("".join(found).split()) == "".join(lines)


def test_a_bad_byte_in_plain_text_costs_its_line(documents, tmp_path):
    good = "".join(f"第{number}行\n" for number in range(5000)).encode()
    assert documents(write(tmp_path / "a.txt", good + b"x\xffy\n" + good[:8])) == [
        good.decode().strip(),
        good[:8].decode().strip(),
    ]
    [reject] = read_rejects(tmp_path / "out" / "data.bin")
    assert reject["reason"] == "bad_utf8"


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_read_for_what_it_holds(documents, tmp_path, capsys):
    folder = tmp_path / "shards"
    write(folder / "a.jsonl", json.dumps(ROWS[0]))
    write(folder / "sub" / "B.JSONL", json.dumps(ROWS[1]))
    write(folder / "c.json", json.dumps(ROWS[2:]))
    for name, content in {
        "._c.parquet": b"Mac OS X",
        ".ipynb_checkpoints/a-checkpoint.jsonl": JSONL,
        "b.jsonl": b"",
        "e.jsonl.gz": gzip.compress(b""),
        "README.md": b"# A corpus",
        "LICENSE.txt": b"free",
        "notes.txt": b"hello",
        "dataset_info.json": b'{"features": {"text": {"dtype": "string"}}}',
        "old.json": b'{\n "text": "pretty"\n}',
        "x.zip": b"PK\x03\x04",
    }.items():
        write(folder / name, content)
    assert documents(folder) == [TEXTS[0], TEXTS[2], TEXTS[1]]
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert said == (
        f"skipped in {folder}: ._c.parquet (hidden), LICENSE.txt (about the corpus), b.jsonl (empty), "
        "dataset_info.json (no text in its first object), notes.txt (beside other texts) and 5 more: "
        "1 hidden, 1 about the corpus, 1 empty, 1 no text in its first object, 1 another ending"
    )
    assert documents(f"{folder}/*.jsonl") == TEXTS[:1]
    assert "skipped in" in capsys.readouterr().err  # the empty one


@pytest.mark.skipif(sys.platform == "win32", reason="Windows needs a privilege to make links")
def test_links_folders_and_files_named_like_ours_are_not_skipped_silently(documents, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.jsonl", "b.changes.jsonl", "c.rejects.jsonl", "sub/d.jsonl", "../elsewhere/e.jsonl"):
        write(folder / name, JSONL)
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    ours = "named as data processing names its own"
    both = f"b.changes.jsonl ({ours}), {{0}}c.rejects.jsonl ({ours}), {{0}}gone.jsonl (a broken link), {{0}}linked "
    for given, root, more in ((folder, "", ""), (f"{folder}/*", f"{folder}/", f", {folder}/sub (a folder)")):
        documents(given)
        [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
        names = said.removeprefix(f"skipped in {given}: ").replace(os.path.relpath(folder), str(folder))
        assert names == root + both.format(root) + "(a link to a folder)" + more
        assert documents.counts["lines"] == (3 if more else 6)
    documents(f"{folder}/**/*.jsonl")
    assert "(a folder)" not in capsys.readouterr().err


def test_a_folder_of_plain_text(documents, tmp_path):
    for name, text in {"1.txt": "甲", "2.txt": "乙", "README.txt": "about", "3.txt": ""}.items():
        write(tmp_path / "books" / name, text)
    assert documents(tmp_path / "books") == ["甲", "乙"]


def test_a_folder_without_texts_says_what_was_skipped(documents, tmp_path):
    write(tmp_path / "in" / "empty.jsonl", "")
    write(tmp_path / "in" / "x.tar", "")
    with pytest.raises(InputError, match=r"holds no file that ends in .*; skipped: empty.jsonl \(empty\), x.tar \(ano"):
        documents(tmp_path / "in")


# --------------------------------------------------------------------------------------------------- what is not read


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.jsonl", JSONL)
    else:
        with tarfile.open(fileobj=file, mode=f"w:{kind}") as packed:
            entry = tarfile.TarInfo("a.jsonl")
            entry.size = len(JSONL)
            packed.addfile(entry, io.BytesIO(JSONL))
    return file.getvalue()


CHAT = json.dumps({"conversations": [{"role": "user", "content": "好"}]}) + "\n"
REFUSED = {
    "zip": ("a.jsonl", archive("zip"), "a.jsonl is a zip archive .*python -m zipfile -e"),
    "tar": (
        "a b.jsonl",
        archive(""),
        "a b.jsonl is a tar archive.* python -m tarfile -e '?\"?/.*a b.jsonl'?\"? FOLDER",
    ),
    "tar.gz": ("packed.tar.gz", archive("gz"), "is a tar archive"),
    "tgz": ("packed.tgz", archive("gz"), "is a tar archive"),
    "gz in gz": ("a.jsonl.gz", gzip.compress(gzip.compress(JSONL)), "a compressed file within a compressed one"),
    "bz2 cut": ("a.jsonl.bz2", bz2.compress(JSONL)[:-5], "is damaged .*fetch it again"),
    "bz2 changed": ("a.jsonl.bz2", b"BZh9" + b"x" * 99, "is damaged .*fetch it again"),
    "xz cut": ("a.jsonl.xz", lzma.compress(JSONL)[:-5], "is damaged .*fetch it again"),
    "xz changed": ("a.jsonl.xz", b"\xfd7zXZ\x00" + b"x" * 99, "is damaged .*fetch it again"),
    "pdf": ("a.txt", b"%PDF-1.7", "is a PDF"),
    "csv": ("a.csv", "text\n好\n", "is a table; read it with --input_path datasets:csv.data_files="),
    "keys": (
        "a.jsonl",
        '{"completion": "好", "n": 1}\n' * 3,
        "none of 3 .*the keys found: completion, n; perh",
    ),
    "keys of an array": (
        "a.json",
        '[{"content": "好"}]',
        "the keys found: content; perhaps optimized_data_processing.py --text_field content",
    ),
    "a list": ("a.jsonl", '{"text": ["好"]}', r"the value of text is \['好'\], a string expected"),
    "chats": ("a.jsonl", CHAT * 2, r"none of 2 lines is a usable chat \(no_answer 2\)"),
    "a message a line": ("a.jsonl", '{"role": "user", "content": "好"}\n', "write the messages of a chat on one line"),
    "pairs": ("a.jsonl", '{"prompt": "好", "chosen": "是", "rejected": "是"}\n' * 2, r"answers \(same_answers 2\)"),
    "strings": (
        "a.jsonl",
        '"好"\n"好的"\n',
        r"the lines are JSON strings, not objects; make each .*: jq -c .*\{.*text.*: \.\}.* FILE",
    ),
    "array of strings": (
        "a.json",
        '["春眠", "不觉晓"]',
        r"the lines are JSON arrays, not objects; .*: jq -c .*\.\[\] \| ",
    ),
    "pretty array of strings": (
        "a.json",
        '[\n "春眠",\n "不觉晓"\n]\n',
        r"the lines are JSON arrays, not objects; .*jq -c",
    ),
    "array of numbers": ("a.json", "[1, 2]", r"JSON arrays, not objects; see "),
    "commas": (
        "a.jsonl",
        '{"text": "好"},\n{"text": "文"},\n',
        r"each line ends in a comma, .*; remove the commas, or add",
    ),
    "documents in a list": (
        "a.json",
        '{"data": [{"text": "好"}, {"text": "文"}]}',
        r"the documents are in the list data; take them out: jq -c '?\.data\[\]'? FILE",
    ),
    "damaged": (
        "a.jsonl",
        "{bad\n" * 30,
        "the JSON of such a line is damaged at byte 2: Expecting property name enclosed in double quotes",
    ),
    "cut": ("a.jsonl", '{"text": "好"\n' * 3, "the JSON of such a line is damaged at byte 15: Expecting ',' delimiter"),
    "plain text": (
        "a.jsonl",
        "春眠不觉晓，\n处处闻啼鸟。\n",
        "it looks like plain text; a file named .txt is read as text",
    ),
    "pretty": ("a.jsonl", '{\n "text": "好"\n}\n', "each object must stand on one line"),
    "python": ("a.jsonl", "{'text': '好'}\n", "Python's notation"),
    "html": ("a.jsonl", "<html>\n<p>好</p>\n", "it looks like HTML or XML"),
    "utf-16": ("a.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16, UTF-8 expected; convert it: python -c"),
    "utf-16 without mark": ("a.jsonl", '{"text": "abcabc"}\n'.encode("utf-16-le"), "the text is UTF-16-LE, UTF-8"),
    "gb18030": ("a.jsonl", JSONL.decode().encode("gb18030"), "the text is GB18030, UTF-8 expected; convert it: python"),
    "big5": ("a.jsonl", '{"text": "他說這個國家的歷史很長"}'.encode("big5"), "the text is BIG5, UTF-8 expected"),
    "gb18030 text": (
        "a.txt",
        ("落霞与孤鹜齐飞，秋水共长天一色。\n" * 2000).encode("gb18030"),
        "a.txt is GB18030, UTF-8 exp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(tmp_path, process_data_here, name):
    file, content, message = REFUSED[name]
    path = write(tmp_path / file, content)
    code, said = process_data_here("--input_path", path, "--output_path", tmp_path / "out" / "x.bin", "--workers", 0)
    [line] = [line for line in said.splitlines() if not line.startswith(("encoder ", "chats: ", "pairs: "))]
    assert code == 2 and line.startswith("error: ")
    with pytest.raises(InputError, match=message):
        raise InputError(line)
    assert not [path for path in tmp_path.glob("out/*") if path.suffix == ".bin"]


@pytest.mark.parametrize("name", ["keys", "chats", "plain text", "gb18030", "zip", "utf-16"])
def test_tokenizer_training_says_the_same(tmp_path, process_data_here, name):
    file, content, message = REFUSED[name]
    flags = ["--train_tokenizer", "--vocab_size", 280, "--tokenizer_output", tmp_path / "t"]
    code, said = process_data_here(*flags, "--input_path", write(tmp_path / file, content))
    assert code == 2 and not (tmp_path / "t").exists()
    with pytest.raises(InputError, match=message):
        raise InputError(said.splitlines()[-1])


def test_the_command_that_converts_a_file_does(tmp_path, process_data_here):
    import shlex

    path = write(tmp_path / "my corpus.jsonl", JSONL.decode().encode("gb18030"))
    _, said = process_data_here("--input_path", path, "--output_path", tmp_path / "x.bin", "--workers", 0)
    command = shlex.split(said.partition("convert it: ")[2].rpartition("; see ")[0])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert (tmp_path / "utf8_my corpus.jsonl").read_bytes() == JSONL


@pytest.mark.long
def test_much_that_is_rejected_is_said_loudly(tmp_path, process_data_here):
    lines = ['{"text": "好"}', *['{"body": "文"}'] * 24]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    code, said = process_data_here("--input_path", path, "--output_path", tmp_path / "x.bin", "--workers", 0)
    [warning] = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert code == 0 and warning.startswith("warning: 96% of the lines were rejected, 24 of them as no_text (")
    assert warning.endswith(
        "such as line 2; the keys found: body; perhaps optimized_data_processing.py --text_field body"
    )
    few_bad = ['{"text": "好"}', '{"text": "好"}', *[""] * 9, *[f'{{"text": "{number}"}}' for number in range(9)]]
    write(path, "\n".join(few_bad))
    code, said = process_data_here("--input_path", path, "--output_path", tmp_path / "y.bin", "--workers", 0)
    assert code == 0 and "warning" not in said


def test_a_stream_of_unknown_length_trains_a_tokenizer_on_its_beginning_only(tmp_path, monkeypatch):
    lines = corpus_lines(300)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setattr(train_tokenizer, "MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(train_tokenizer, "BLOCK_BYTES", 5_000)
    text = train_tokenizer.TrainingText([Source(str(tmp_path / "a.jsonl"), "a.jsonl", size=0)])
    read = len(list(text))
    assert len(b"".join(lines[: read - 20])) < 20_000 <= len(b"".join(lines[:read])) and read < 300

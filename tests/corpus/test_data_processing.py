"""What a user does with JSONL, and what must come of it."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from model.text.tokenization import encode_texts, load_tokenizer
from model.token_file.manifest import file_sha256, read_manifest
from optimized_data_processing import OptimizedDataProcessor, default_input_path
from tests.conftest import ROOT, corpus_lines, process_data


def read_rejects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def raw(tmp_path) -> Path:
    path = tmp_path / "raw_data.jsonl"
    path.write_bytes(b"".join(corpus_lines(200)))
    return path


@pytest.fixture
def processor(tokenizer_folder) -> OptimizedDataProcessor:
    return OptimizedDataProcessor(tokenizer_path=tokenizer_folder)


@pytest.mark.long
def test_the_token_file_holds_every_text_between_bos_and_eos(raw, tmp_path):
    OptimizedDataProcessor(clean=False).process_dataset(raw, tmp_path / "data.bin")
    texts = [json.loads(line)["text"] for line in corpus_lines(200)]
    tokenizer = load_tokenizer()
    expected = [token for ids in encode_texts(tokenizer, texts) for token in (1, *ids, 2)]
    ids = np.fromfile(tmp_path / "data.bin", dtype="<u2")
    assert ids.tolist() == expected
    documents = tokenizer.decode(ids.tolist()).split("</s>")
    assert [document.removeprefix("<s>") for document in documents] == [*texts, ""]
    manifest = read_manifest(tmp_path / "data.bin")
    assert (manifest.tokens, manifest.documents, manifest.dtype) == (len(ids), 200, "uint16")
    assert manifest.sha256 == file_sha256(tmp_path / "data.bin")
    assert manifest.sources[0]["size"] == raw.stat().st_size
    ends = np.fromfile(tmp_path / "data.ends", dtype="<u8")
    assert ends.tolist() == (np.flatnonzero(ids == 2) + 1).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.ends", "data.json", "raw_data.jsonl"]


def test_a_control_token_spelled_out_in_a_text_stays_text(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": "甲</s>乙<s>丙<unk>"}\n', encoding="utf-8")
    OptimizedDataProcessor().process_dataset(tmp_path / "raw.jsonl", tmp_path / "data.bin")
    ids = np.fromfile(tmp_path / "data.bin", dtype="<u2").tolist()
    assert [ids.count(control) for control in (0, 1, 2)] == [0, 1, 1]
    assert load_tokenizer().decode(ids[1:-1]) == "甲</s>乙<s>丙<unk>"


BAD_LINES = {
    "bad_utf8": [b'{"text": "\xff\xfe\xe4\xb8"}', b'{"text": "\\ud800"}'],
    "bad_json": [b'{"text": "cut o', b"not json", b"[" * 100_000, b"1" * 5000],
    "not_an_object": [b'["a list"]', b'"a string"', b"null"],
    "no_text": [b'{"content": "x"}', b'{"text": null}', b'{"text": ["x"]}', b"{}"],
    "empty": [b"", b"   \r", b'{"text": ""}', '{"text": " \\n\u3000"}'.encode()],
}


def test_bad_lines_are_counted_by_reason_and_kept_with_their_numbers(processor, tmp_path):
    good = corpus_lines(60)
    bad = [(reason, line + b"\n") for reason, lines in BAD_LINES.items() for line in lines]
    bad += [("duplicate", good[0]), ("duplicate", good[1].replace(b'"text"', b'"x": 1, "text"'))]
    lines = [(None, line) for line in good[:5]]
    rest = [(None, line) for line in good[5:]] + bad
    random.Random(1).shuffle(rest)
    lines += rest
    content = b"".join(line for _, line in lines)
    (tmp_path / "raw.jsonl").write_bytes(content)

    counts = processor.process_dataset(tmp_path / "raw.jsonl", tmp_path / "data.bin")

    expected = {reason: len(raw) for reason, raw in BAD_LINES.items()} | {"duplicate": 2}
    assert counts["rejected_by_reason"] == dict(sorted(expected.items()))
    assert counts["documents"] == 60
    assert counts["documents"] + counts["rejected"] == counts["lines"] == len(lines)
    rejects = read_rejects(tmp_path / "data.rejects.jsonl")
    assert [(r["line"], r["reason"]) for r in rejects] == [
        (number, reason) for number, (reason, _) in enumerate(lines, 1) if reason
    ]
    for reject in rejects:
        raw = lines[reject["line"] - 1][1]
        assert content[reject["offset"] :].startswith(raw)
        if "raw" in reject:
            assert reject["raw"].encode() + b"\n" == raw
    assert [r["duplicate_of"] for r in rejects if r["reason"] == "duplicate"] in ([1, 2], [2, 1])


def test_byte_order_mark_windows_line_ends_and_a_missing_last_newline_change_nothing(processor, tmp_path):
    lines = corpus_lines(20)
    (tmp_path / "plain.jsonl").write_bytes(b"".join(lines))
    windows = b"\xef\xbb\xbf" + b"".join(lines).replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    (tmp_path / "windows.jsonl").write_bytes(windows)
    for name in ("plain", "windows"):
        counts = processor.process_dataset(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.bin")
        assert counts["lines"] == counts["documents"] == 20
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "windows.bin").read_bytes()


def test_cleaning_first_gives_the_same_tokens_as_one_pass(raw, processor, tmp_path):
    raw.write_bytes(raw.read_bytes() + b'broken\n{"text": "  \xe4\xbd\xa0\xe5\xa5\xbd \\n", "id": 7}\n')
    counts = processor.validate_and_clean_jsonl(raw, tmp_path / "cleaned_data.jsonl")
    assert (counts["documents"], counts["rejected_by_reason"]) == (201, {"bad_json": 1})
    cleaned = (tmp_path / "cleaned_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(cleaned[-1]) == {"text": "你好"}
    assert [r["line"] for r in read_rejects(tmp_path / "cleaned_data.rejects.jsonl")] == [201]
    processor.process_dataset(raw, tmp_path / "one.bin")
    processor.process_dataset(tmp_path / "cleaned_data.jsonl", tmp_path / "two.bin")
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_compressed_input_gives_the_same_tokens(raw, processor, tmp_path):
    import gzip

    packed = tmp_path / "raw_data.jsonl.gz"
    packed.write_bytes(gzip.compress(raw.read_bytes()))
    processor.process_dataset(raw, tmp_path / "plain.bin")
    processor.process_dataset(packed, tmp_path / "packed.bin")
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "packed.bin").read_bytes()
    packed.write_bytes(packed.read_bytes()[:-500])
    with pytest.raises(InputError, match="damaged"):
        processor.process_dataset(packed, tmp_path / "cut.bin")
    assert not (tmp_path / "cut.bin").exists()


@pytest.mark.long
def test_a_large_vocabulary_is_stored_in_32_bits(raw, tmp_path):
    from tokenizers import Tokenizer

    big = json.loads((ROOT / "model" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    big["model"]["vocab"] |= {f"unused{index}": index for index in range(6400, 70_000)}
    folder = tmp_path / "big"
    folder.mkdir()
    Tokenizer.from_str(json.dumps(big)).save(str(folder / "tokenizer.json"))
    config = (ROOT / "model" / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    OptimizedDataProcessor().process_dataset(raw, tmp_path / "small.bin")
    OptimizedDataProcessor(folder).process_dataset(raw, tmp_path / "big.bin")
    assert read_manifest(tmp_path / "big.bin").dtype == "uint32"
    small, large = np.fromfile(tmp_path / "small.bin", "<u2"), np.fromfile(tmp_path / "big.bin", "<u4")
    assert np.array_equal(small, large)


# ------------------------------------------------------------------------------------------------------- the statistics


@pytest.mark.long
def test_statistics_count_what_is_in_the_file(raw, tmp_path):
    processor = OptimizedDataProcessor(max_length=100, clean=False)
    processor.process_dataset(raw, tmp_path / "data.bin")
    processor.save_statistics(tmp_path / "data_stats.json")
    stats = json.loads((tmp_path / "data_stats.json").read_text(encoding="utf-8"))
    ids = np.fromfile(tmp_path / "data.bin", dtype="<u2")
    texts = [json.loads(line)["text"] for line in corpus_lines(200)]
    lengths = np.diff(np.flatnonzero(ids == 2), prepend=-1)
    assert stats["tokens"] == len(ids)
    assert stats["characters"] == sum(map(len, texts))
    assert stats["utf8_bytes"] == sum(len(text.encode()) for text in texts)
    assert stats["characters_per_token"] == pytest.approx(stats["characters"] / (len(ids) - 400), abs=1e-4)
    assert stats["documents_longer_than_max_length"] == int((lengths > 100).sum()) > 0
    used, counts = np.unique(ids, return_counts=True)
    assert stats["vocabulary"]["ids_used"] == len(used)
    assert stats["vocabulary"]["share_used"] == pytest.approx(len(used) / 6400, abs=1e-4)
    assert stats["vocabulary"]["most_frequent"][1] == {
        "ids": 2,
        "share_of_tokens": pytest.approx(np.sort(counts)[-2:].sum() / len(ids), abs=1e-4),
    }
    for row in stats["length_in_tokens"]:
        assert row["documents"] == int(((lengths >= row["from"]) & (lengths < row["below"])).sum())
    assert sum(row["documents"] for row in stats["length_in_characters"]) == 200


@pytest.mark.long
@pytest.mark.pictures
def test_the_picture_is_optional_and_its_absence_is_named(raw, processor, tmp_path, monkeypatch, capsys):
    processor.process_dataset(raw, tmp_path / "data.bin")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    processor.save_statistics(tmp_path / "without.json")
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "without.json").exists() and not (tmp_path / "without.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    processor.save_statistics(tmp_path / "with.json")
    assert (tmp_path / "with.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.long
def test_without_arguments_it_takes_what_is_there(tmp_path):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    with pytest.raises(InputError, match="holds no JSONL file"):
        default_input_path(dataset)
    (dataset / "classics_zh.jsonl").write_bytes(b"".join(corpus_lines(30)))
    done = process_data(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the sample corpus" in done.stderr and "30 documents" in done.stderr
    assert (dataset / "pretrain_data.bin").exists() and (dataset / "data_stats.json").exists()

    (dataset / "mine.rejects.jsonl").touch()
    (dataset / "mine.jsonl").touch()
    (dataset / "cleaned_mine.jsonl").touch()
    assert default_input_path(dataset) == dataset / "mine.jsonl"
    (dataset / "other.jsonl").touch()
    with pytest.raises(InputError, match="mine.jsonl, other.jsonl.*--input_path"):
        default_input_path(dataset)
    corpus = dataset / "mobvoi_seq_monkey_general_open_corpus.jsonl"
    corpus.touch()
    assert default_input_path(dataset) == corpus


@pytest.mark.long
def test_clean_only_from_the_command_line(raw, tmp_path):
    flags = ["--clean_only", "--input_path", raw, "--output_path"]
    done = process_data(*flags, tmp_path / "same.jsonl", "--clean", "false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "same.jsonl").read_bytes() == raw.read_bytes()
    done = process_data(*flags, tmp_path / "clean.jsonl", cwd=tmp_path)
    assert "cleaning changed 4 documents: whitespace 4" in done.stderr
    assert (tmp_path / "clean.jsonl").read_bytes() == raw.read_bytes().replace(b" \\n", b"\\n")


@pytest.mark.long
@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "no file"),
        (b"", [], "is empty"),
        (b"\xff\xfe{\x00", [], "UTF-16"),
        (b'{"content": "x"}\n', [], "its only line is not a document (no_text 1)"),
        (b'{"text": "x"}\n', ["--tokenizer_path", "nowhere"], "no folder nowhere"),
        (b'{"text": "x"}\n', ["--chunk_size", "0"], "chunk_size: 0 found, a whole number"),
        (b'{"text": "x"}\n', ["--resume", "maybe"], "true or false expected"),
        (b'{"text": "x"}\n', ["--text", "x"], "--text: unknown; did you mean --text_field"),
        (b'{"text": "x"}\n', ["--output_path", "raw.json"], "is the name of a file beside the output"),
        (b'{"text": "x"}\n', ["--output_path", "raw.jsonl"], "is an input and would be overwritten"),
        (b'{"text": "x"}\n', ["--output_path", "raw.jsonl/data.bin"], "raw.jsonl"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, content, flags, message):
    import optimized_data_processing
    from utils import run_command

    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("raw.jsonl").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["x", "--input_path", "raw.jsonl", "--output_path", "data.bin", *flags])
    with pytest.raises(SystemExit) as exit_:
        run_command(optimized_data_processing.main)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    if content is not None:
        assert Path("raw.jsonl").read_bytes() == content
    assert not os.path.exists("data.bin")


@pytest.mark.long
def test_statistics_replace_nothing_but_statistics(tmp_path, raw, process_data_here):
    def process(output: str, stats: str) -> tuple[int, list[str]]:
        flags = ["--input_path", raw, "--workers", 0, "--output_path", tmp_path / output]
        code, said = process_data_here(*flags, "--stats_path", tmp_path / stats)
        return code, said.splitlines()

    (tmp_path / "config.json").write_text('{"dim": 512}')
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for stats, message in {
        "config.json": "config.json exists already (12 bytes); give another path",
        "photo.json": "photo.png exists already (4 bytes)",
        "x.png": "x.png is the name of the picture",
    }.items():
        code, lines = process("a.bin", stats)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: stats_path: ") and message in lines[0]
    assert (tmp_path / "config.json").read_text() == '{"dim": 512}' and not (tmp_path / "a.bin").exists()
    assert process("a.bin", "s.json")[0] == 0
    code, lines = process("b.bin", "s.json")
    assert code == 0 and f"statistics: {tmp_path / 's.json'} held those of a.bin, and is replaced" in lines
    assert "replaced" not in "".join(process("b.bin", "s.json")[1])


def test_other_json_beside_a_token_file_is_no_manifest(tmp_path):
    (tmp_path / "data.json").write_text('[{"text": "x"}]', encoding="utf-8")
    with pytest.raises(InputError, match="data.json: the manifest of a token file expected, found other JSON"):
        read_manifest(tmp_path / "data.bin")


def test_an_output_that_is_an_input_by_another_name_is_refused(tmp_path, raw, process_data_here):
    link = tmp_path / "link.jsonl"
    link.symlink_to(raw)
    before = raw.read_bytes()
    flags = ["--input_path", raw, "--clean_only", "--resume", "false", "--output_path"]
    code, said = process_data_here(*flags, link)
    assert code == 2 and "is an input and would be overwritten" in said and raw.read_bytes() == before
    (tmp_path / "folder.bin").mkdir()
    code, said = process_data_here(*flags, tmp_path / "folder.bin")
    assert code == 2 and "folder.bin is a folder" in said

"""What becomes of documents: held out for validation, shortened, dropped as repeats, cleaned, exported."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from model.corpus.job_folder import JobFolder
from model.dataset import PretrainDataset
from model.errors import InputError
from model.text.tokenization import encode_texts, load_tokenizer, tokenizer_sha256
from model.token_file.manifest import file_sha256, read_manifest
from optimized_data_processing import OptimizedDataProcessor
from tests.conftest import corpus_lines, read_documents, read_pieces, read_rejects

LINES = corpus_lines(400)
TEXTS = [json.loads(line)["text"].strip() for line in LINES]
HAN = [chr(code) for code in range(0x4E00, 0x9000)]


def prose(seed: int, sentences: int, stop: str = "。") -> str:
    """A text that nothing else resembles."""
    choose = random.Random(seed)
    return "".join("".join(choose.choices(HAN, k=choose.randint(5, 25))) + stop for _ in range(sentences))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def processor(tokenizer_folder, **options) -> OptimizedDataProcessor:
    return OptimizedDataProcessor(tokenizer_folder, **{"workers": 0, "clean": False, **options})


# ---------------------------------------------------------------------------------------------------------- val_share


@pytest.mark.long
def test_val_share_chooses_by_content_alone(tokenizer_folder, tmp_path):
    share = processor(tokenizer_folder, val_share=0.2, deduplicate=False, save_interval=500)
    sides = {}
    for name, texts in {
        "first": TEXTS,
        "shuffled": random.Random(1).sample(TEXTS, 400),
        "fewer": TEXTS[::3],
        "repeated": TEXTS + TEXTS[:100],
    }.items():
        counts = share.process_dataset(write(tmp_path / f"{name}.jsonl", texts), tmp_path / f"{name}.bin")
        main, held = (read_documents(tmp_path / f"{name}{end}.bin", tokenizer_folder) for end in ("", ".val"))
        sides[name] = set(main), set(held)
        assert sorted(main + held) == sorted(texts)  # each is on one side, and its repeats too
        assert not set(main) & set(held)
        assert counts["documents"] == len(texts)
        assert counts["documents_written"] == len(main) and counts["validation"]["documents"] == len(held)
        position = {text: number for number, text in reversed(list(enumerate(texts)))}
        for side in (main, held):
            numbers = [position[text] for text in side]
            assert numbers == sorted(numbers) or name == "repeated"  # the order of the input
    assert 50 <= len(sides["first"][1]) <= 110  # 80 are expected
    assert sides["shuffled"] == sides["repeated"] == sides["first"]
    assert sides["fewer"][1] == sides["first"][1] & set(TEXTS[::3])


def test_both_files_of_val_share_are_whole_and_read_by_training(tokenizer_folder, tmp_path):
    raw = write(tmp_path / "raw.jsonl", TEXTS)
    counts = processor(tokenizer_folder, val_share=0.1).process_dataset(raw, tmp_path / "data.bin")
    digest = tokenizer_sha256(tokenizer_folder)
    for name, documents, tokens in (
        ("data.bin", counts["documents_written"], counts["tokens"]),
        ("data.val.bin", counts["validation"]["documents"], counts["validation"]["tokens"]),
    ):
        manifest = read_manifest(tmp_path / name)
        assert manifest.sha256 == file_sha256(tmp_path / name)
        assert (
            (manifest.documents, manifest.tokens)
            == (documents, tokens)
            == (
                len(read_pieces(tmp_path / name)),
                (tmp_path / name).stat().st_size // 2,
            )
        )
        dataset = PretrainDataset(tmp_path / name, 64, 300, digest)
        inputs, targets = dataset.batch(np.arange(2), 2)
        assert inputs[0, 0] == 1 and (inputs[:, 1:] == targets[:, :-1]).all()


def test_val_share_that_takes_every_document_is_refused(tokenizer_folder, tmp_path):
    with pytest.raises(InputError, match="val_share: all of 1 document went to validation; give a smaller share"):
        raw = write(tmp_path / "raw.jsonl", TEXTS[:1])
        processor(tokenizer_folder, val_share=0.999).process_dataset(raw, tmp_path / "data.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


@pytest.mark.long
def test_an_old_validation_file_does_not_outlive_the_output_it_belongs_to(tokenizer_folder, tmp_path):
    raw, output = write(tmp_path / "raw.jsonl", TEXTS), tmp_path / "data.bin"
    share = processor(tokenizer_folder, val_share=0.1)
    share.process_dataset(raw, output)
    (tmp_path / "data.val.bin").write_bytes(b"\0\0")
    with pytest.raises(InputError, match="data.val.bin is damaged"):
        share.process_dataset(raw, output)
    processor(tokenizer_folder).process_dataset(raw, output, resume=False)
    assert not list(tmp_path.glob("data.val.*"))
    share.process_dataset(raw, tmp_path / "data.val.bin")  # one that was made for itself
    processor(tokenizer_folder).process_dataset(raw, output, resume=False)
    assert sorted(path.name for path in tmp_path.glob("data.val.*"))[0] == "data.val.bin"


# ----------------------------------------------------------------------------------------------------- long_documents


@pytest.fixture(params=["embedded", "small"])
def folder(request, tokenizer_folder):
    """A tokenizer of one token a character and less, and one of several tokens for each character."""
    return tokenizer_folder if request.param == "small" else None


LONG = {
    "prose": prose(1, 30),
    "paragraphs": "\n\n".join(prose(seed, 3, "！”") for seed in range(8)),
    "english": "The quick brown fox said: hello, world. " * 40,
    "spaces": "  word" * 200 + " \n" * 50 + "　　末" * 100,
    "one sentence": prose(2, 1) + prose(3, 30, stop="，"),
    "emoji": "👩‍👩‍👧‍👦" * 60,
    "short": "短。",
    "many stops": "。" * 300,
}


def expected_lengths(folder, texts: list[str]) -> list[int]:
    return [len(ids) + 2 for ids in encode_texts(load_tokenizer(folder), texts)]


@pytest.mark.long
@pytest.mark.parametrize("max_length", [8, 40])
def test_split_cuts_at_sentence_ends_and_loses_nothing_but_white_space(folder, tmp_path, max_length):
    texts = list(LONG.values())
    raw, output = write(tmp_path / "raw.jsonl", texts), tmp_path / "data.bin"
    counts = processor(folder, max_length=max_length, long_documents="split").process_dataset(raw, output)
    pieces = read_documents(output, folder)
    assert max(len(ids) + 2 for ids in read_pieces(output)) <= max_length
    assert expected_lengths(folder, pieces) == [len(ids) + 2 for ids in read_pieces(output)]
    assert all(piece == piece.strip() and piece for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join("".join(texts).split())
    lengths = expected_lengths(folder, [text.strip() for text in texts])
    assert counts["documents_longer_than_max_length"] == sum(length > max_length for length in lengths)
    assert (counts["documents"], counts["documents_written"]) == (len(texts), len(pieces))
    assert counts["characters"] == sum(len(text.strip()) for text in texts)


@pytest.mark.long
def test_split_pieces_are_as_long_as_whole_sentences_allow(folder, tmp_path):
    sentences = [sentence + "。" for sentence in prose(1, 40).split("。")[:-1]]
    raw, output = write(tmp_path / "raw.jsonl", ["".join(sentences)]), tmp_path / "data.bin"
    processor(folder, max_length=200, long_documents="split").process_dataset(raw, output)
    pieces = read_documents(output, folder)
    assert len(pieces) > 2 and all(piece.endswith("。") for piece in pieces)
    position = 0
    for piece in pieces[:-1]:
        position += piece.count("。")
        (length,) = expected_lengths(folder, [piece + sentences[position]])
        assert length > 200 - 8  # the next sentence had no room; a few tokens may join across its start


@pytest.mark.long
@pytest.mark.parametrize("max_length", [8, 40])
def test_truncate_keeps_the_longest_beginning_and_drop_rejects(folder, tmp_path, max_length):
    texts = [text.strip() for text in LONG.values()]
    raw, lengths = write(tmp_path / "raw.jsonl", texts), expected_lengths(folder, texts)
    cut = processor(folder, max_length=max_length, long_documents="truncate")
    counts = cut.process_dataset(raw, tmp_path / "cut.bin")
    assert counts["documents"] == counts["documents_written"] == len(texts)
    for text, length, piece in zip(texts, lengths, read_documents(tmp_path / "cut.bin", folder), strict=True):
        assert text.startswith(piece) and (piece == text or length > max_length)
        assert expected_lengths(folder, [piece])[0] <= max_length
        more = text[: len(piece) + 1 + len(text[len(piece) :]) - len(text[len(piece) :].lstrip())]
        assert piece == text or expected_lengths(folder, [more])[0] > max_length
    drop = processor(folder, max_length=max_length, long_documents="drop")
    counts = drop.process_dataset(raw, tmp_path / "drop.bin")
    long = [number for number, length in enumerate(lengths, 1) if length > max_length]
    rejects = read_rejects(tmp_path / "drop.bin")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(n, "over_max_length") for n in long]
    assert [json.loads(reject["raw"])["text"] for reject in rejects] == [texts[number - 1] for number in long]
    assert counts["rejected_by_reason"] == {"over_max_length": len(long)}


# --------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("sorted_at_once", [7, 100, 4_000_000])
def test_exact_duplicates_over_many_parts_are_those_of_a_dict(tokenizer_folder, tmp_path, monkeypatch, sorted_at_once):
    import model.corpus.duplicates as duplicates

    monkeypatch.setattr(duplicates, "SORTED_AT_ONCE", sorted_at_once)  # slices of the keys' range
    monkeypatch.setattr(duplicates, "READ_AT_ONCE", 64)
    choose = random.Random(1)
    texts = [choose.choice(TEXTS[:150]) if choose.random() < 0.5 else f"{n}{TEXTS[n % 400]}" for n in range(500)]
    output = tmp_path / "data.bin"
    small = processor(tokenizer_folder, save_interval=500)  # parts of 4 kB
    small.process_dataset(write(tmp_path / "raw.jsonl", texts), output)
    seen: dict[str, int] = {}
    repeats = [(n, seen[text]) for n, text in enumerate(texts, 1) if seen.setdefault(text, n) != n]
    assert [(reject["line"], reject["duplicate_of"]) for reject in read_rejects(output)] == repeats
    assert read_documents(output, tokenizer_folder) == list(seen)


def changed(text: str, count: int, seed: int) -> str:
    """The text with some characters replaced."""
    choose, characters = random.Random(seed), list(text)
    for place in choose.sample(range(len(text)), count):
        characters[place] = choose.choice(HAN)
    return "".join(characters)


@pytest.mark.long
def test_near_duplicates_are_dropped_and_what_differs_stays(tokenizer_folder, tmp_path):
    pytest.importorskip("rensa")
    originals = [prose(seed, 40) for seed in range(30)]
    copies = [changed(text, 4, seed) for seed, text in enumerate(originals)]  # 5 shingles in 600 each
    spaced = [" ".join(text) for text in originals[:5]]  # white space is left out of the comparison
    related = [text[: len(text) // 2] + prose(100 + seed, 20) for seed, text in enumerate(originals)]
    texts = [*originals, "短", *copies, "短。", *spaced, *related, originals[3]]
    raw, made = write(tmp_path / "raw.jsonl", texts), []
    for save_interval in (500, 4000, 1_000_000):
        output = tmp_path / str(save_interval) / "data.bin"
        near = processor(tokenizer_folder, near_duplicates=0.8, save_interval=save_interval)
        counts = near.process_dataset(raw, output)
        made.append({path.name: path.read_bytes() for path in output.parent.iterdir() if path.suffix != ".json"})
    assert made[0] == made[1] == made[2]
    assert read_documents(output, tokenizer_folder) == [*originals, "短", "短。", *related]
    expected = [(32 + n, "near_duplicate", 1 + n) for n in range(30)]
    expected += [(63 + n, "near_duplicate", 1 + n) for n in range(5)] + [(len(texts), "duplicate", 4)]
    rejects = read_rejects(output)
    assert [(reject["line"], reject["reason"], reject["duplicate_of"]) for reject in rejects] == expected
    assert counts["rejected_by_reason"] == {"duplicate": 1, "near_duplicate": 35}


def test_near_duplicates_without_a_document_or_without_rensa(tokenizer_folder, tmp_path, monkeypatch):
    pytest.importorskip("rensa")
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"broken\n")
    with pytest.raises(InputError, match="its only line is not a document"):
        processor(tokenizer_folder, near_duplicates=0.8).process_dataset(raw, tmp_path / "data.bin")
    monkeypatch.setitem(sys.modules, "rensa", None)  # as if it were not installed
    with pytest.raises(InputError, match="near_duplicates: this needs rensa: pip install rensa"):
        processor(tokenizer_folder, near_duplicates=0.8)


# ------------------------------------------------------------------------------------- cleaning, exports, wrong options


@pytest.mark.long
def test_cleaning_flags_have_their_effect_and_are_counted(tokenizer_folder, tmp_path, process_data_here):
    texts = [
        "Ｈｅｌｌｏ，１２３ 世界" + prose(1, 2),
        "零\u200b宽" + prose(2, 2),
        "<b>粗</b>&nbsp;体&amp;" + prose(3, 2),
        "e\u0301 行尾   \n\n\n\n下一段" + prose(4, 2),
        "only English, no Han at all, not even one",
        "哈" * 500,
        "短",
        prose(5, 60),
        prose(6, 2),
    ]
    raw = write(tmp_path / "raw.jsonl", texts)
    flags = ["--input_path", raw, "--tokenizer_path", tokenizer_folder, "--output_path"]
    chosen = ["--html", "tags", "--full_width", "all", "--min_characters", "3", "--max_characters", "600"]
    code, said = process_data_here(*flags, tmp_path / "a.bin", *chosen, "--min_han_share", 0.3)
    assert code == 0, said
    assert "cleaning changed 4 documents: html 1, control 1, full_width 1, unicode 1, whitespace 2" in said
    stats = json.loads((tmp_path / "data_stats.json").read_text(encoding="utf-8"))
    assert stats["rejected_by_reason"] == {"too_short": 1, "too_long": 1, "few_han": 1, "repetitive": 1}
    changes = {"documents": 4, "html": 1, "control": 1, "full_width": 1, "unicode": 1, "whitespace": 2}
    assert stats["changed_by_cleaning"] == changes
    cleaned = read_documents(tmp_path / "a.bin", tokenizer_folder)
    starts = ["Hello,123 世界", "零宽", "粗 体&", "é 行尾\n\n下一段"]
    assert [text[: len(start)] for text, start in zip(cleaned[:4], starts, strict=True)] == starts
    assert cleaned[4:] == [prose(6, 2)]
    samples = [json.loads(line) for line in (tmp_path / "a.changes.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {(sample["change"], sample["line"]): sample for sample in samples}
    assert sorted(shown) == sorted(
        [("html", 3), ("control", 2), ("full_width", 1), ("unicode", 4), ("whitespace", 3), ("whitespace", 4)]
    )
    assert (shown["control", 2]["before"][:3], shown["control", 2]["after"][:2]) == ("零\u200b宽", "零宽")
    for sample in samples:
        assert sample["source"] == "raw.jsonl" and sample["before"] in texts[sample["line"] - 1]

    code, said = process_data_here(*flags, tmp_path / "b.bin", "--clean", "false")
    assert code == 0 and "cleaning changed" not in said
    assert read_documents(tmp_path / "b.bin", tokenizer_folder) == texts
    assert not (tmp_path / "b.changes.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("library", ["megatron", "nanotron"])
def test_a_token_file_is_exported_from_the_command_line(tokenizer_folder, tmp_path, process_data_here, library):
    raw, output = write(tmp_path / "raw.jsonl", TEXTS[:50]), tmp_path / "my.bin"
    tokenizer = ["--tokenizer_path", tokenizer_folder]
    code, said = process_data_here("--input_path", raw, "--output_path", output, *tokenizer)
    assert code == 0, said
    code, said = process_data_here("--export", library, "--input_path", output, *tokenizer)
    assert code == 0 and said.lower().startswith(f"{library}: wrote "), said
    ends, content = np.fromfile(tmp_path / "my.ends", "<u8"), (tmp_path / "my.bin").read_bytes()
    if library == "megatron":
        index = (tmp_path / "my.idx").read_bytes()
        assert index[:9] == b"MMIDIDX\0\0"
        assert np.frombuffer(index, "<i4", 50, 34).tolist() == np.diff(ends, prepend=0).tolist()
    else:
        assert (tmp_path / "my.ds").read_bytes() == content
        assert (tmp_path / "my.ds.index").read_bytes() == ends.tobytes()
        assert (tmp_path / "my.ds.metadata").read_text().startswith(f"{Path(tokenizer_folder).resolve()}|2\n")
    code, said = process_data_here("--export", library, "--input_path", "missing.bin")
    assert code == 2 and said.startswith("error: missing.bin: no such file")


@pytest.mark.parametrize(
    "option",
    [
        {"deduplicate": "no"},
        {"text_field": 5},
        {"tokenizer_path": 5},
        {"val_share": "0.1"},
        {"near_duplicates": True},
        {"workers": "2"},
        {"max_length": 10.0},
        {"chunk_size": True},
        {"save_interval": -1},
        {"long_documents": ["split"]},
        {"cleaning": {"clean": True}},
        {"max_characters": 10**400, "min_characters": 10**401},
        {"no_such_option": 1},
    ],
)
def test_options_that_cannot_be_are_named(option):
    with pytest.raises(InputError, match=next(reversed(option))):
        OptimizedDataProcessor(**option)


@pytest.mark.parametrize("inputs", [[], None, 5, "", [""], [None], b"raw.jsonl", {"raw.jsonl": 1}])
def test_inputs_that_are_none_are_named(tokenizer_folder, tmp_path, inputs):
    with pytest.raises(InputError, match="^input_path: "):
        processor(tokenizer_folder).process_dataset(inputs, tmp_path / "data.bin")


def test_a_job_that_made_nothing_yet_binds_nobody(tokenizer_folder, tmp_path):
    output = tmp_path / "data.bin"
    with JobFolder(output) as folder:  # as a kill -9 in the first second leaves it
        folder.begin({"input_path": ["another.jsonl"]})
    assert processor(tokenizer_folder).process_dataset(write(tmp_path / "raw.jsonl", TEXTS), output)["documents"] == 400

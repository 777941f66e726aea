"""The page that data processing draws of its counts."""

import re
import struct
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from model.corpus import picture  # noqa: E402
from model.corpus.picture import _Names, _percent, _short, draw_summary  # noqa: E402

NUMBERS = np.random.default_rng(0)


def bins(values, edges):
    """[{"from": 8, "below": 12, "documents": 3}, …], empty bins left out, as data processing counts them."""
    counts, edges = np.histogram(values, edges)
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return [{"from": start, "below": end, "documents": count} for start, end, count in rows if count]


def make_summary(documents=23_350, rejected=None, sources=None, tokens=True, **changes):
    """The counts of a corpus whose lengths are spread as Chinese books' paragraphs are."""
    rejected = {"bad_json": 3, "duplicate": 44} if rejected is None else rejected
    drawn = min(documents, 20_000)
    characters = np.maximum(1, NUMBERS.lognormal(4.5, 1.1, drawn)).astype(int)
    ratios = NUMBERS.normal(1.03, 0.12, drawn).clip(0.4)
    lengths = (characters / ratios + 2).astype(int)
    octaves = [0, 1, 2, *(size for power in range(1, 30) for size in (3 << (power - 1), 4 << (power - 1)))]
    lines = documents + sum(rejected.values())
    summary = {
        "output": "dataset/pretrain_data.bin", "lines": lines, "documents": documents,
        "rejected": sum(rejected.values()), "rejected_by_reason": rejected, "documents_written": documents,
        "characters": documents * 130, "utf8_bytes": documents * 382, "tokens": documents * 128,
        "characters_per_token": 1.025, "han_share": 0.83, "max_length": 512, "long_documents": "keep",
        "documents_longer_than_max_length": documents // 69,
        "changed_by_cleaning": {
            "documents": documents // 1900, "unicode": 0, "control": documents // 7800, "html": 0,
            "full_width": documents // 20_000, "whitespace": documents // 2600,
        },
        "validation": {"documents": documents // 100, "tokens": documents * 128 // 100},
        "vocabulary": {
            "size": 6400, "ids_used": 6100, "share_used": 0.9531,
            "most_frequent": [
                {"ids": 1, "share_of_tokens": 0.04}, {"ids": 10, "share_of_tokens": 0.2},
                {"ids": 100, "share_of_tokens": 0.43}, {"ids": 1000, "share_of_tokens": 0.82},
            ],
        },
        "length_in_characters": bins(characters, octaves),
        "length_in_tokens": bins(lengths, octaves),
        "characters_per_token_of_documents": bins(ratios, np.arange(0, 20, 0.1).round(1)),
        "han_share_of_documents": bins(NUMBERS.beta(18, 4, drawn), np.linspace(0, 1, 21).round(2)),
        "sources": sources or [make_source("classics_zh.jsonl", documents)],
    }  # fmt: skip
    for name in (
        "length_in_characters",
        "length_in_tokens",
        "characters_per_token_of_documents",
        "han_share_of_documents",
    ):
        for row in summary[name]:
            row["documents"] = max(1, row["documents"] * documents // drawn)
    if not tokens:
        summary |= {
            "tokens": 0, "characters_per_token": None, "documents_longer_than_max_length": 0, "validation": None,
            "vocabulary": {"size": 0, "ids_used": 0, "share_used": None, "most_frequent": []},
            "length_in_tokens": [], "characters_per_token_of_documents": [],
            "sources": [source | {"tokens": 0} for source in summary["sources"]],
        }  # fmt: skip
    return summary | changes


def make_source(name, documents):
    return {
        "name": name, "lines": documents, "documents": documents, "rejected": 0, "tokens": documents * 128,
        "characters": documents * 130,
    }  # fmt: skip


def many_sources():
    names = ["mobvoi_seq_monkey_general_open_corpus_part", "古文观止与四库全书总目提要", "$x_1^2$ <b>&amp;", "W" * 60]
    return [
        make_source(f"{names[number % 4]}_{number:04d}.jsonl", 1 + 90_000 // (1 + number)) for number in range(3000)
    ]


MANY_REASONS = {f"reason_{number}": 7**number for number in range(1, 9)} | {f"other_{number}": 1 for number in range(9)}
SUMMARIES = {
    "normal": make_summary(),
    "one_reason": make_summary(rejected={"duplicate": 812}, validation=None),
    "no_rejects": make_summary(rejected={}),
    "many_reasons": make_summary(rejected=MANY_REASONS, long_documents="split", documents_written=25_013),
    "3000_sources": make_summary(sources=many_sources(), output="数据集/预训练数据.bin"),
    "clean_only": make_summary(tokens=False, output="dataset/cleaned_data.jsonl"),
    "one_document": make_summary(documents=1, rejected={}, validation=None),
    "extremes": make_summary(
        long_documents="truncate",
        max_length=8,
        length_in_tokens=[{"from": 2 << power, "below": 4 << power, "documents": 9 << power} for power in range(28)]
        + [{"from": 1 << 30, "below": None, "documents": 1}],
        characters_per_token_of_documents=[
            {"from": 1.0, "below": 1.1, "documents": 5000},
            {"from": 4.0, "below": 4.1, "documents": 700},
            {"from": 310.0, "below": 310.1, "documents": 1},
        ],
        vocabulary={
            "size": 151_936,
            "ids_used": 11,
            "share_used": 0.0001,
            "most_frequent": [{"ids": 1, "share_of_tokens": 0.9}, {"ids": 10, "share_of_tokens": 0.9999}],
        },
    ),
    "13_million": make_summary(documents=13_207_311, rejected={"duplicate": 412_000, "bad_json": 2, "too_long": 31}),
}


def draw(path, summary):
    """The PNG's width and height; a warning, as of a missing glyph or of panels that do not fit, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_summary(path, summary)
    head = path.read_bytes()
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) > 30_000
    return struct.unpack(">II", head[16:24])


@pytest.mark.long
@pytest.mark.parametrize("name", SUMMARIES)
def test_the_page_is_drawn(tmp_path, name):
    assert draw(tmp_path / "stats.png", SUMMARIES[name]) == (1760, 1100)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.png"]


@pytest.mark.long
def test_chinese_names_are_escaped_where_no_font_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "HAN_FONTS", re.compile("(?!)"))  # as on a server without fonts
    assert draw(tmp_path / "stats.png", SUMMARIES["3000_sources"]) == (1760, 1100)
    names = _Names(["古文.bin"])
    assert names.families == ["DejaVu Sans"]
    assert "".join(map(names._piece, "古文 é\t\udcff.bin")) == r"\u53e4\u6587 é\t\udcff.bin" and names.escaped


@pytest.mark.long
def test_a_long_name_keeps_its_two_ends(monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(picture, "HAN_FONTS", re.compile("(?!)"))
    figure = Figure(dpi=110)
    for name in (
        "a.jsonl",
        "mobvoi_seq_monkey_" * 30 + "7.jsonl",
        "古文观止与四库全书总目提要_0001.jsonl",
        "$x_1$ 100 % \\",
    ):
        _Names([name]).write(figure, (0, 0), name, 220)
    short, long, escaped, plain = figure.texts
    assert (short.get_text(), plain.get_text()) == ("a.jsonl", "$x_1$ 100 % \\")
    assert re.fullmatch(r"mobvoi_seq_\w+….+7\.jsonl", long.get_text())
    assert re.fullmatch(r"\\u53e4(\\u\w{4})*….*_0001\.jsonl", escaped.get_text())  # no escape is cut in two
    assert all(text.get_window_extent().width <= 220 for text in figure.texts)


def test_numbers_are_short():
    numbers = [0, 7, 950, 1000, 12_500, 99_960, 999_999, 1_310_000, 2_000_000_000, 1.5e12]
    assert [_short(number) for number in numbers] == "0 7 950 1k 12.5k 100k 1M 1.31M 2B 1.5T".split()
    shares = [0, 0.00001, 0.002, 0.05, 0.2, 0.5, 0.94, 0.995, 0.99999, 1]
    texts = "0 %, <0.01 %, 0.20 %, 5.0 %, 20 %, 50 %, 94 %, 99.5 %, >99.9 %, 100 %".split(", ")
    assert [_percent(share) for share in shares] == texts


def test_the_settings_of_matplotlib_stay_as_they_were(tmp_path):
    import matplotlib

    before = {name: matplotlib.rcParams[name] for name in ("font.family", *picture.STYLE)}
    draw(tmp_path / "stats.png", SUMMARIES["normal"])
    assert {name: matplotlib.rcParams[name] for name in before} == before


def test_without_matplotlib_the_reason_is_returned(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ImportError):
        draw_summary(tmp_path / "stats.png", SUMMARIES["normal"])
    assert not list(tmp_path.iterdir())

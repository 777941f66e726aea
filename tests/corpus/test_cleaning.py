"""Cleaning: what is put right in a text, what is left alone, and which texts are rejected."""

import dataclasses
import itertools
import unicodedata
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.corpus import cleaning
from model.corpus.cleaning import CHANGES, FILTER_REASONS, Cleaner, CleaningOptions, compression_ratio, count_han
from model.errors import InputError

NOTHING = CleaningOptions(
    normalization="none", remove_control_characters=False, full_width="none", tidy_whitespace=False, html="none",
    max_compression_ratio=0,
)  # fmt: skip
PROSE = (
    "从前有一座山，山里有一座庙，庙里有一个老和尚在给小和尚讲故事。讲的是什么呢？原来那一年大旱，河水断流，"
    "村民挑着担子走了三十里路，才在石缝间找到一眼清泉。泉边住着白发老翁，他说：这水能解渴，却不能止贪。"
)


def names_of(mask: int) -> set[str]:
    return {name for bit, name in enumerate(CHANGES) if mask >> bit & 1}


def clean_with(text: str, **options) -> tuple[str, set[str]]:
    cleaned, mask = Cleaner(dataclasses.replace(NOTHING, **options)).clean(text)
    return cleaned, names_of(mask)


def test_clean_text_stays_as_it_is():
    text = (
        "标题：测试\n\n第一段，有“引号”、（括号）和——破折号……\n    缩进的代码  if x == 1:  # 两个空格\n\t制表符\n"
        "中间有　全角空格。表情👨\u200d👩\u200d👧和❤\ufe0f，旗🏴\U000e0067\U000e0062\U000e007f，坏字\ufffd，𠮷野家。"
        "AT&T, a && b, a < b, vector<int>, R&D; &notaname; #include <stdio.h>"
    )
    assert Cleaner(CleaningOptions()).clean(text) == (text, 0)


BEFORE_AND_AFTER = {
    "unicode": [
        ({"normalization": "nfc"}, "cafe\u0301", "café"),
        ({"normalization": "nfc"}, "\u6d77\ufa45 \u212b", "海海 Å"),  # a compatibility ideograph, the sign ångström
        ({"normalization": "nfkc"}, "①ﬁ㎏，ａ", "1fikg,a"),
    ],
    "control": [
        ({"remove_control_characters": True}, "接\x10口\x08和\x7f线\x9f", "接口和线"),
        ({"remove_control_characters": True}, "且\ue853扎\U000f0001起\U0010fffd来", "且扎起来"),
        ({"remove_control_characters": True}, "a\u200bb\u2060c\ufeffd\xade\u202ef\u200fg\u061ch", "abcdefgh"),
        ({"remove_control_characters": True}, "非\ufdd0字\uffff符\U0001fffe\U0003ffff", "非字符"),
        ({"remove_control_characters": True}, "半\ud800个", "半个"),
        ({"remove_control_characters": True}, "a\x0cb", "ab"),
    ],
    "html": [
        ({"html": "entities"}, "a&nbsp;b &lt;c&gt; &#39;d&#x27; &quot;e&quot; &hellip;", "a\xa0b <c> 'd' \"e\" …"),
        ({"html": "entities"}, "&amp;amp;lt;", "<"),
        ({"html": "entities"}, "A&" + "amp;#038;AMP;#x0026;" * 5 + "B &" + "amp;" * 12 + "nbsp;C", "A&B \xa0C"),
        ({"html": "entities"}, "&&#97;mp;lt;", "<"),
        ({"html": "entities"}, "&#146;&#0150;", "’–"),  # Windows-1252, as browsers read it
        ({"html": "entities"}, "一<br>二<BR />三</p>四<p class='x'>五", "一\n二\n三\n四\n五"),
        ({"html": "tags"}, "<b>粗</b><!-- 注 -->体<img src='a.png'>", "粗体"),
        ({"html": "tags"}, "<div><p>一</p><script>var x = '<p>';</script>二<style>p{}</style></div>三", "一\n二\n三"),
        ({"html": "tags"}, "<!DOCTYPE html>\n<html lang='zh'><td>甲</td>&nbsp;</html>乙", "甲\n\xa0\n乙"),
        ({"html": "tags"}, "&lt;em&gt;强调&lt;/em&gt;", "强调"),
    ],
    "full_width": [
        ({"full_width": "alphanumeric"}, "Ｗindows１０，（ｏｋ）！", "Windows10，（ok）！"),
        ({"full_width": "all"}, "Ｗ１０，（ｏｋ）！。", "W10,(ok)!。"),
    ],
    "whitespace": [
        ({"tidy_whitespace": True}, "a\r\nb\rc\u2028d\u2029e\x85f\x0bg\x0ch", "a\nb\nc\nd\ne\nf\ng\nh"),
        ({"tidy_whitespace": True}, "a\xa0b\u2003c\u202fd\u3000e  f", "a b c d\u3000e  f"),
        ({"tidy_whitespace": True}, "题\n\u3000\u3000一 \t\n \u3000 二\u3000\n    代码", "题\n一\n二\n    代码"),
        ({"tidy_whitespace": True}, "一\n \n\t\n\u3000\n二\n\n三", "一\n\n二\n\n三"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "options", "before", "after"),
    [(change, *case) for change, cases in BEFORE_AND_AFTER.items() for case in cases],
)
def test_each_change_and_its_bit(change, options, before, after):
    assert clean_with(before, **options) == (after, {change})


@pytest.mark.parametrize(
    "before", [before for cases in BEFORE_AND_AFTER.values() for _, before, _ in cases if "\ud800" not in before]
)
def test_what_is_switched_off_is_not_done(before):
    assert clean_with(f"  {before}\n") == (before.strip(), set())
    text, mask = Cleaner(CleaningOptions(clean=False)).clean(f"\u3000{before}\n")
    assert (text, mask) == (before.strip(), 0)


def test_white_space_around_the_text_goes_without_being_counted():
    assert clean_with(" \n\u3000\u3000段落\xa0\r\n", tidy_whitespace=True) == ("段落", set())
    assert clean_with("\ufeff\u3000段落", remove_control_characters=True, tidy_whitespace=True) == ("段落", {"control"})


NOT_HTML = [
    "&#0;", "&#xD800;", "&#xDFFF;", "&#x110000;", "&#9999999;", "&#31;", "&#x81;", "&#xFFFE;", "&#xFDD0;", "&nbsp",
    "&;", "&unknown;", "&#;", "&#x;", "pointer = &sum;", "<!-- never closed", "<stdio.h> vector<int>", "a<b and c>d",
]  # fmt: skip
TAGS_OF_A_KIND = ["<br images/a.png>", "List<P>"]  # entities is careful, tags is not


@pytest.mark.parametrize(
    ("html", "text"),
    [*itertools.product(("entities", "tags"), NOT_HTML), *(("entities", text) for text in TAGS_OF_A_KIND)],
)
def test_what_only_looks_like_html_stays(html, text):
    assert clean_with(text, html=html) == (text, set())


def test_several_changes_in_one_text():
    text, mask = Cleaner(CleaningOptions()).clean("１&nbsp;\u200b&amp;nbsp;e&#x301;\r\n好")
    assert text == "1  é\n好"
    assert names_of(mask) == set(CHANGES)


def test_removing_a_mark_can_join_a_letter_and_its_accent():
    assert Cleaner(CleaningOptions()).clean("cafe\u200b\u0301")[0] == "café"


@pytest.mark.long
def test_every_control_character_is_removed_and_nothing_that_shows():
    every = {chr(code) for code in range(0x110000)}
    kept, _ = clean_with("中" + "中".join(every) + "中", remove_control_characters=True)
    removed = every - set(kept)
    categories = defaultdict(set)
    for character in every:
        categories[unicodedata.category(character)].add(character)
    noncharacters = {chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)}
    noncharacters |= {chr(code) for code in range(0xFDD0, 0xFDF0)}
    for wanted in (categories["Cc"] - set("\t\n\r"), categories["Cs"], categories["Co"], noncharacters):
        assert wanted <= removed
    rest = removed - noncharacters - set().union(*(categories[name] for name in ("Cc", "Cs", "Co")))
    assert rest - {"\u2065"} <= categories["Cf"]  # U+2065 is not assigned yet, amid invisible operators
    assert not rest & set("\u200c\u200d\u0600\u06dd\U000e0067")  # joiners, signs that show, the letters of flags


# Idempotence. The alphabet is made of what can become something else when its neighbours change.
PIECES = st.sampled_from(
    ["&", "amp;", "lt;", "gt;", "nbsp;", "#", "38;", "#38;", "#x26;", "x", "3", "C;", ";", "#60;", "shy;", "#8203;"]
    + ["<", ">", "/", "p", "br", "b", " and ", "script", "</script>", "<!--", "-->", "<p>", "=", "'", "!", "#769;"]
    + [
        "＜",
        "＞",
        "＆",
        "；",
        "﹤",
        "\u037e",
        "Ａ",
        "１",
        "，",
        "か",
        "ｶ",
        "\uff9e",
        "ﬁ",
        "①",
        "\ufdfa",
        "¨",
        "中",
        "海",
        "\ufa45",
    ]
    + ["e", "a", "o", "\u0301", "\u0323", "\u0338", "\u0308", "\u0345", "\u3099", "가", "\u1100", "\u1161", "\u11a8"]
    + ["\u200b", "\xad", "\ufeff", "\x00", "\x1c", "\ue000", "\uffff", "\U0001ffff", "\ud83d", "\udc00"]
    + [
        "👨",
        "\u200d",
        "\ufe0f",
        " ",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
    ]
    + ["\u3000", "\u2000"]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text(max_size=60))
OPTIONS = st.builds(
    CleaningOptions,
    normalization=st.sampled_from(["none", "nfc", "nfkc"]),
    remove_control_characters=st.booleans(),
    full_width=st.sampled_from(["none", "alphanumeric", "all"]),
    tidy_whitespace=st.booleans(),
    html=st.sampled_from(["none", "entities", "tags"]),
)


def assert_is_fixed_point(options: CleaningOptions, text: str) -> None:
    cleaner = Cleaner(options)
    cleaned, mask = cleaner.clean(text)
    assert cleaner.clean(cleaned) == (cleaned, 0)
    assert mask or cleaned == text.strip()
    if options.remove_control_characters:
        assert not {"Cc", "Cs", "Co"} & {unicodedata.category(c) for c in cleaned if c not in "\t\n\r\v\f\x85"}


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(OPTIONS, TEXTS)
@example(CleaningOptions(), "&amp;amp;nbsp;")
@example(CleaningOptions(html="tags"), "<<b>b>&lt<p>;b>")
@example(CleaningOptions(html="tags"), "<b\xa0>")
@example(CleaningOptions(normalization="nfkc"), "＆ａｍｐ；ｌｔ；")
def test_cleaning_twice_is_cleaning_once(options, text):
    assert_is_fixed_point(options, text)


@pytest.mark.long
@settings(max_examples=500, deadline=None)
@given(OPTIONS, TEXTS)
def test_cleaning_twice_is_cleaning_once_when_the_passes_run_out(options, text):
    passes, cleaning.MAX_PASSES = cleaning.MAX_PASSES, 1
    try:
        assert_is_fixed_point(options, text)
    finally:
        cleaning.MAX_PASSES = passes


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_entities_alone_make_no_control_characters_and_no_lone_surrogates(text):
    for code in (0, 31, 0x81, 0xD800, 0xDFFF, 0xFFFE):
        text += f"&#{code};&#x{code:X};"
    made = set(Cleaner(dataclasses.replace(NOTHING, html="entities")).clean(text)[0]) - set(text)
    assert not {"Cc", "Cs"} & {unicodedata.category(c) for c in made - {"\n", "\t", "\r"}}


BIG = 300_000
HOSTILE = {
    "nested ampersands": "&" + "amp;" * BIG + "lt;",
    "an entity in an entity": "&" + "&#97;mp;" * BIG,
    "tags in tags": "<b" * BIG + ">" * BIG,
    "comments that are never closed": "<!--" * BIG,
    "scripts that are never closed": "<script>" * BIG,
    "openings of tags": "<p a=" * BIG,
    "attributes without end": "<p" + " a=1" * BIG,
    "spaces in a tag": "<p a" + " " * BIG + "=",
    "unordered combining marks": "a" + "\u0315\u0300" * BIG,
    "ordered combining marks": "a" + "\u0300" * BIG,
    "spaces": "a" + " " * BIG + "b",
    "spaces and newlines": "a" + " \n" * BIG + "b",
    "wide spaces": "a\n" + " \u3000" * BIG + "b",
    "carriage returns": "a" + "\r" * BIG + "b",
    "zero-width spaces between": "a\u200b\u0301" * BIG,
    "a numeric entity without end": "&#" + "0" * BIG + ";",
}


@pytest.mark.long
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_take_linear_time(text):
    """A quadratic step would take hours here; nothing is timed."""
    for options in (CleaningOptions(), CleaningOptions(html="tags", normalization="nfkc", full_width="all")):
        cleaner = Cleaner(options)
        cleaned, _ = cleaner.clean(text)
        assert cleaner.clean(cleaned) == (cleaned, 0)
        cleaner.reason_to_reject(cleaned)


@pytest.mark.parametrize("escaped", ["amp;", "AMP;", "#38;", "#0000038;", "#x26;", "#X000026;"])
def test_text_that_was_escaped_many_times_is_decoded_and_the_rest_stays(escaped):
    text = "AT&T，a<b，vector<int>：{}lt;后"
    assert Cleaner(CleaningOptions()).clean(text.format("&" + escaped * 100)) == (text.format("<")[:-4] + "后", 1)


@pytest.mark.parametrize(
    ("html", "nested", "left"),
    [
        ("entities", "<br " * 30 + "a=1>" * 30, "< br " * 20 + "\n" + "a=1>" * 20),
        ("entities", "&#5&#5&#5&#4&#5" * 6 + "6" + ";" * 30, "&#5&#5&#5&#4&#5" * 3 + "&#5&#5&#5&#4& #56" + ";" * 20),
        ("tags", "<b" * 30 + ">" * 30, "< b" * 20 + ">" * 20),
    ],
    ids=["line breaks", "digits of entities", "tags"],
)
def test_of_html_that_nests_without_end_nothing_is_lost(html, nested, left):
    """A space breaks what is left after the last pass."""
    cleaned, mask = clean_with(f"AT&T，a < b：{nested}后", html=html)
    assert cleaned == f"AT&T，a < b：{left}后" and mask == {"html"}


# Filters


def reason_with(text: str, **options) -> str | None:
    return Cleaner(dataclasses.replace(CleaningOptions(), **options)).reason_to_reject(text)


@pytest.mark.parametrize(
    ("reason", "options", "bad", "good"),
    [
        ("too_short", {"min_characters": 5}, "四个汉字", "五个字。。"),
        ("too_short", {}, "", "一"),
        ("too_long", {"max_characters": 4}, "五个字。。", "四个汉字"),
        ("few_han", {"min_han_share": 0.5}, "中文abc", "中 文 ab\n\n  "),
        ("repetitive", {}, "哈" * 50, PROSE),
        ("repetitive", {}, "今天天气很好，我们去公园玩吧。" * 50, "哈" * 20),
        ("repetitive", {}, PROSE[:80] + "哈" * 1000, PROSE * 3),
        ("repetitive", {}, (PROSE * 40)[:3000] * 20, "哈哈哈！" + PROSE),
        ("repetitive", {"max_compression_ratio": 3}, PROSE * 4, PROSE),
    ],
)
def test_filters(reason, options, bad, good):
    assert reason in FILTER_REASONS
    assert reason_with(bad, **options) == reason
    assert reason_with(good, **options) is None


def test_filters_are_asked_in_their_order():
    options = {"min_characters": 3, "max_characters": 40, "min_han_share": 0.5}
    texts = {"too_short": "a", "too_long": "a" * 50, "few_han": "a" * 40, "repetitive": "哈" * 40}
    assert list(texts) == list(FILTER_REASONS)
    for reason, text in texts.items():
        assert reason_with(text, **options) == reason


def test_filters_are_off_with_cleaning_and_repetition_with_zero():
    assert reason_with("哈" * 500, clean=False, min_characters=1000) is None
    assert reason_with("哈" * 500, max_compression_ratio=0) is None


def test_repetition_is_judged_on_slices_of_a_long_text():
    varied = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    assert compression_ratio(varied) < 2
    assert compression_ratio(varied + PROSE * 5000) > 8
    assert reason_with("哈" * 1_000_000) == "repetitive"
    assert reason_with(varied * 3) is None  # the same again only after 20,000 characters


# Options


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("normalization", "nfd", "none, nfc, nfkc"), ("full_width", True, "none, alphanumeric, all"),
        ("html", None, "none, entities, tags"), ("clean", 1, "true or false"), ("tidy_whitespace", "yes", "true"),
        ("min_characters", 0, "at least 1"), ("min_characters", 1.5, "whole number"), ("min_characters", True, "whole"),
        ("min_characters", None, "whole number"), ("max_characters", 0, "null"), ("min_han_share", 1.1, "at most 1"),
        ("min_han_share", -0.1, "at least 0"), ("max_compression_ratio", float("nan"), "a number"),
        ("max_compression_ratio", -1, "at least 0"), ("max_compression_ratio", "8", "a number"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(name, value, expected):
    with pytest.raises(InputError) as error:
        Cleaner(CleaningOptions(**{name: value}))
    assert name in str(error.value) and repr(value) in str(error.value) and expected in str(error.value)


def test_all_impossible_options_are_named_at_once():
    with pytest.raises(InputError) as error:
        Cleaner(CleaningOptions(html="xml", min_characters=-1, min_han_share=2))
    assert all(name in str(error.value) for name in ("html", "min_characters", "min_han_share"))
    with pytest.raises(InputError, match="max_characters: 5 is below min_characters 9"):
        Cleaner(CleaningOptions(min_characters=9, max_characters=5))


def test_every_option_says_what_it_does():
    for option in dataclasses.fields(CleaningOptions):
        assert option.metadata["help"]
        assert not option.metadata["choices"] or option.default in option.metadata["choices"]


# Han characters


def is_han(character: str) -> bool:
    return 0x3400 <= ord(character) < 0xA000 or 0x20000 <= ord(character) < 0x40000


def han_of(texts: list[str]) -> list[int]:
    return count_han([text.encode("utf-8") for text in texts]).tolist()


def test_han_characters_are_counted_as_their_names_say():
    named = [chr(code) for code in range(0x110000) if unicodedata.name(chr(code), "")]
    counts = han_of(named)
    assert counts == [int(is_han(character)) for character in named]
    for character, count in zip(named, counts, strict=True):
        name = unicodedata.name(character)
        if bool(count) != name.startswith("CJK UNIFIED IDEOGRAPH"):
            assert name.startswith(("HEXAGRAM FOR", "CJK COMPATIBILITY IDEOGRAPH")), name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("中〇㐀𠮷a，\n䷀豈👨々가\x87é"), max_size=8), max_size=8))
def test_han_characters_of_many_texts(texts):
    assert han_of(texts) == [sum(map(is_han, text)) for text in texts]
    assert count_han([text.encode() for text in texts]).dtype == np.int64


def test_han_characters_past_one_block():
    texts = ["中a" * size for size in (cleaning._BLOCK // 4 - 1, 0, 1, 1, 1, cleaning._BLOCK, 3)]
    assert han_of(texts) == [len(text) // 2 for text in texts]

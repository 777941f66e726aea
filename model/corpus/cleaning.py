"""Cleans texts, and rejects those not worth training on.

Cleaning is idempotent, `clean(clean(text)) == clean(text)` for every string: cleaning a cleaned file again on its way
to tokens changes nothing. Most texts need no change, so each is searched once for the characters that call for one.
"""

import html.entities
import itertools
import re
import unicodedata
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.errors import InputError
from model.options import check_options, setting

CHANGES = ("html", "control", "full_width", "unicode", "whitespace")  # in the order in which they are made
HTML, CONTROL, FULL_WIDTH, UNICODE, WHITESPACE = (1 << bit for bit in range(len(CHANGES)))
FILTER_REASONS = {
    "too_short": "fewer characters than min_characters, after cleaning",
    "too_long": "more characters than max_characters, after cleaning",
    "few_han": "a smaller share of Han characters than min_han_share",
    "repetitive": "says the same again and again: compresses by more than max_compression_ratio",
}  # in the order in which the checks are made


@dataclass(frozen=True)
class CleaningOptions:
    """What a `Cleaner` changes and rejects; each field is a flag of the same name."""

    clean: bool = setting(True, "clean and filter the texts; false: only strip white space around them")
    normalization: str = setting(
        "nfc",
        "Unicode form; nfkc also turns full-width punctuation, ligatures, circled digits … into plain ones",
        choices=("none", "nfc", "nfkc"),
    )
    remove_control_characters: bool = setting(
        True, "remove control and private-use characters, noncharacters, zero-width and direction marks, soft hyphens"
    )
    full_width: str = setting(
        "alphanumeric",
        "full-width characters that become ASCII: Latin letters and digits, or all with the punctuation, or none",
        choices=("none", "alphanumeric", "all"),
    )
    tidy_whitespace: bool = setting(
        True, "one kind of newline and space, none at line ends, no U+3000 before paragraphs, at most one empty line"
    )
    html: str = setting(
        "entities",
        "entities: decode &nbsp; &#39; … and turn <br> and <p> into newlines; tags: also remove all tags of HTML, "
        "comments, scripts and styles, even in texts that write about HTML",
        choices=("none", "entities", "tags"),
    )
    min_characters: int = setting(1, "reject texts with fewer characters", at_least=1)
    max_characters: int | None = setting(None, "reject texts with more characters; null: no limit", at_least=1)
    min_han_share: float = setting(
        0.0, "reject texts with a smaller share of Han characters among all but white space", at_least=0, at_most=1
    )
    max_compression_ratio: float = setting(
        8.0, "reject texts that repeat themselves: zlib makes them smaller by more than this; 0: none", at_least=0
    )


# Text that was escaped again and again (`&amp;amp;lt;`) takes one pass, whatever its depth. What takes more than this
# many, as tags within tags do (`<<b>b>`), was not written by anyone.
MAX_PASSES = 10

# The characters of CONTROL except \v \f \x85, which are newlines if white space is tidied. The zero-width joiners
# U+200C/D and the variation selectors stay: emoji and several scripts need them. So does U+FFFD: something was there.
# Past U+FFFF one range stands for all, and `_without_control` looks closer: every further range there would slow the
# search for all characters.
_CONTROL = (
    r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
    r"\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # zero-width, direction, notes
    r"\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff"  # lone surrogates, private use, noncharacters
    r"\U0001fffe-\U0010ffff"
)
_RARE_HAN = r"\U00020000-\U0002fffd\U00030000-\U0003fffd"  # in that range, but no suspects
_NEWLINES = r"\r\x0b\x0c\x85\u2028\u2029"
_SPACES = r"\xa0\u1680\u2000-\u200a\u202f\u205f"
_FULL_WIDTH = {"alphanumeric": r"\uff10-\uff19\uff21-\uff3a\uff41-\uff5a", "all": r"\uff01-\uff5e"}


class Cleaner:
    """Cleans texts and judges them.

    Raises:
        InputError: with one line for each option that has an impossible value.
    """

    def __init__(self, options: CleaningOptions) -> None:
        if problems := _problems(options):
            raise InputError(*problems)
        self.options = options
        tidy = options.tidy_whitespace
        self._decode_html = {"none": None, "entities": _decode_entities, "tags": _remove_tags}[options.html]
        self._steps: list[tuple[int, Callable[[str, str], str]]] = []  # (bit, step(text, the suspects in it))
        suspects = ""
        if options.remove_control_characters:
            characters = _CONTROL + ("" if tidy else r"\x0b\x0c\x85")
            suspects += characters
            self._steps.append((CONTROL, _replacing(characters, _without_control)))
        if characters := _FULL_WIDTH.get(options.full_width):
            suspects += characters
            self._steps.append((FULL_WIDTH, _replacing(characters, lambda match: chr(ord(match[0]) - 0xFEE0))))
        if options.normalization != "none":
            self._steps.append((UNICODE, lambda text, _: _normalize(options.normalization.upper(), text)))
        if tidy:
            suspects += _NEWLINES + _SPACES + r"\u3000"
            self._steps.append((WHITESPACE, _tidy_whitespace))
        pattern = re.compile(f"[{suspects}](?<![{_RARE_HAN}])" if suspects else "(?!)")
        self._find_suspects = pattern.findall
        # find(text, start) -> the next place that calls for a change, or -1
        self._finders: list[Callable[[str, int], int]] = [_finding(pattern)]
        if self._decode_html is not None:
            self._finders += [_finding_string("&"), _finding_string("<")]
        if tidy:
            self._finders += [_finding_string(string) for string in (" \n", "\t\n", "\n\n\n")]

    def clean(self, text: str) -> tuple[str, int]:
        """The cleaned text, white space around it cut off, and the CHANGES that altered it, bit k for CHANGES[k].

        Takes time in proportion to the text's length, whatever the text.
        """
        (text,), (mask,) = self.clean_all([text])
        return text, mask

    def clean_all(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """`clean` of each text: the texts and their masks. Clean ones cost little, however short they are."""
        cleaned = [text.strip() for text in texts]
        masks = [0] * len(cleaned)
        for index in self._suspicious(cleaned) if self.options.clean else ():
            cleaned[index], masks[index] = self._change(cleaned[index])
        return cleaned, masks

    def _change(self, text: str) -> tuple[str, int]:
        mask = 0
        # One change can call for another: &nbsp; holds a space that becomes a plain one, and removing a zero-width
        # space can bring a letter and its accent together. Only HTML nests without end, so after MAX_PASSES a space
        # breaks what is left of it, and nothing needs more than one pass, or two.
        for number in itertools.count(1):
            text, changes = self._pass(text)
            mask |= changes
            if not changes & ~WHITESPACE:  # tidying never makes other changes necessary
                return text, mask
            if number == MAX_PASSES:
                text, mask = _MARKUP.sub(r"\g<0> ", text), mask | HTML

    def _suspicious(self, texts: Sequence[str]) -> set[int]:
        """Indices of the texts, stripped ones, that hold something that a change looks for; `_change` would return the
        others as they are. All are searched together, since most hold nothing."""
        joined, found = "\n".join(texts), set()
        ends = [*itertools.accumulate(len(text) + 1 for text in texts)]
        for find in self._finders:
            place = find(joined, 0)
            while place >= 0:
                index = bisect_right(ends, place)
                found.add(index)
                place = find(joined, ends[index])
        form = self.options.normalization.upper()
        if form != "NONE" and not unicodedata.is_normalized(form, joined):
            found.update(index for index, text in enumerate(texts) if not unicodedata.is_normalized(form, text))
        return found

    def _pass(self, text: str) -> tuple[str, int]:
        mask = 0
        if self._decode_html is not None:
            decoded = self._decode_html(text).strip()
            if decoded != text:
                text, mask = decoded, HTML
        suspects = "".join(set(self._find_suspects(text)))
        for bit, step in self._steps:
            changed = step(text, suspects).strip()
            if changed != text:
                text, mask = changed, mask | bit
        return text, mask

    def reason_to_reject(self, text: str) -> str | None:
        """Why to reject a cleaned text, a key of FILTER_REASONS, or None."""
        options = self.options
        if not options.clean:
            return None
        if len(text) < options.min_characters:
            return "too_short"
        if options.max_characters is not None and len(text) > options.max_characters:
            return "too_long"
        if options.min_han_share > 0:
            visible = sum(map(len, text.split()))
            if count_han([text.encode("utf-8", "surrogatepass")])[0] < options.min_han_share * visible:
                return "few_han"
        if options.max_compression_ratio > 0 and len(text) > SHORTEST_REPETITION and _repeats(text):
            if compression_ratio(text) > options.max_compression_ratio:
                return "repetitive"
        return None


def _problems(options: CleaningOptions) -> list[str]:
    problems = check_options(options)
    if not problems and options.max_characters is not None and options.max_characters < options.min_characters:
        problems.append(f"max_characters: {options.max_characters} is below min_characters {options.min_characters}")
    return problems


def _replacing(characters: str, replacement) -> Callable[[str, str], str]:
    pattern = re.compile(f"[{characters}]")
    return lambda text, suspects: pattern.sub(replacement, text) if pattern.search(suspects) else text


def _finding(pattern: re.Pattern) -> Callable[[str, int], int]:
    return lambda text, start: match.start() if (match := pattern.search(text, start)) else -1


def _finding_string(string: str) -> Callable[[str, int], int]:
    return lambda text, start: text.find(string, start)


def _without_control(match: re.Match) -> str:
    code = ord(match[0])
    return match[0] if 0xFFFF < code < 0xF0000 and code != 0xE0001 and not _is_noncharacter(code) else ""


def _is_noncharacter(code: int) -> bool:
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code < 0xFDF0


# HTML

# The names of HTML 4, except common C identifiers (`pointer = &sum;`). HTML 5 has 2,000
# more, which are rare in text, while &num; or &map; are common in C.
_IDENTIFIERS = frozenset("cap cup empty exist image lang part prod rang real sub sum sup".split())
_NAMES = {name: chr(code) for name, code in html.entities.name2codepoint.items() if name not in _IDENTIFIERS}
_NAMES |= {"apos": "'", "AMP": "&", "LT": "<", "GT": ">", "QUOT": '"'}
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0{0,5}38|#[xX]0{0,4}26);)+")  # &amp;amp; … is escaped several times
_ENTITY = re.compile(r"&(?:([A-Za-z][A-Za-z0-9]{1,7})|#([0-9]{1,7})|#[xX]([0-9A-Fa-f]{1,6}));")
_ATTRIBUTE = r"""\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_LINE_BREAK = re.compile(rf"<(?:[bB][rR]|/?p)(?:{_ATTRIBUTE})*\s*/?>")  # <P> is more often a type than a paragraph
_ENCLOSED = [
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (
        ("<!--", "-->"),
        (r"<script\b[^<>]*>", r"</script\s*>"),
        (r"<style\b[^<>]*>", r"</style\s*>"),
    )
]
_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9]*)([\s/][^<>]*)?>|<(?:!doctype\b|\?xml\b)[^<>]*>", re.IGNORECASE)
_MARKUP = re.compile("&(?=#?[a-z0-9]{1,8};)|<(?=[a-z/!?])", re.IGNORECASE)  # where any of these patterns can match
_BLOCK_TAGS = frozenset(
    "address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main menu nav ol option p pre section select "
    "summary table tbody td template textarea tfoot th thead title tr ul".split()
)
_INLINE_TAGS = frozenset(
    "a abbr acronym applet area audio b base basefont bdi bdo big button canvas cite code col colgroup data datalist "
    "del dfn em embed font frame frameset i iframe img input ins kbd label link map mark meta meter nobr noframes "
    "noscript object optgroup output param picture progress q rp rt ruby s samp script slot small source span strike "
    "strong style sub sup svg time track tt u var video wbr".split()
)


def _decode_entities(text: str) -> str:
    if "&" in text:
        text = _ENTITY.sub(_decode_entity, _AMPERSANDS.sub("&", text))
    return _LINE_BREAK.sub("\n", text) if "<" in text else text


def _decode_entity(match: re.Match) -> str:
    """The character that an entity stands for; the entity itself if text cannot hold that character."""
    name, decimal, hexadecimal = match.groups()
    if name:
        return _NAMES.get(name, match[0])
    code = int(decimal) if decimal else int(hexadecimal, 16)
    if 0x80 <= code < 0xA0:  # browsers, and the HTML standard, read these as Windows-1252
        return bytes([code]).decode("cp1252", "ignore") or match[0]
    if code > 0x10FFFF or _is_noncharacter(code):
        return match[0]
    character = chr(code)
    is_text = character in "\t\n\r" or unicodedata.category(character) not in ("Cc", "Cs")
    return character if is_text else match[0]


def _remove_tags(text: str) -> str:
    if "<" in text:
        for opening, closing in _ENCLOSED:
            text = _remove_enclosed(text, opening, closing)
        text = _TAG.sub(_without_tag, text)
    return _decode_entities(text)


def _remove_enclosed(text: str, opening: re.Pattern, closing: re.Pattern) -> str:
    """Remove everything from each opening to the next closing; an opening that is never closed stays."""
    kept, position = [], 0
    while (start := opening.search(text, position)) and (end := closing.search(text, start.end())):
        kept.append(text[position : start.start()])
        position = end.end()
    return "".join(kept) + text[position:]


def _without_tag(match: re.Match) -> str:
    name, attributes = (match[1] or "").lower(), match[2] or ""
    if name in _BLOCK_TAGS:
        removed = "\n"
    elif name in _INLINE_TAGS or not name:
        removed = ""
    else:
        return match[0]  # <stdio.h>, vector<int>: not of HTML
    if len(name) == 1 and attributes.replace("/", "").strip() and "=" not in attributes:
        return match[0]  # a<b and c>d
    return removed


# Unicode

MAX_COMBINING_MARKS = 30  # on one letter, as in the stream-safe text format of UAX #15, section 13
_MAYBE_MARKS = re.compile(rf"[^\x00-\u02ff\u3400-\u9fff\uac00-\ud7a3]{{{MAX_COMBINING_MARKS + 1},}}")


def _normalize(form: str, text: str) -> str:
    if unicodedata.is_normalized(form, text):
        return text
    return unicodedata.normalize(form, _MAYBE_MARKS.sub(_cut_marks, text))


def _cut_marks(match: re.Match) -> str:
    """Leave at most MAX_COMBINING_MARKS in a row; sorting n of them takes unicodedata n² steps."""
    kept, marks = [], 0
    for character in match[0]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= MAX_COMBINING_MARKS:
            kept.append(character)
    return "".join(kept)


# White space

_NEWLINE = re.compile(rf"\r\n|[{_NEWLINES}]")
_SPACE = re.compile(f"[{_SPACES}]")
_THREE_NEWLINES = re.compile("\n{3,}")
_BLANKS = " \t\u3000"
_INDENTATION = re.compile("[ \t]*\u3000[ \t\u3000]*")


def _tidy_whitespace(text: str, suspects: str) -> str:
    if _NEWLINE.search(suspects):
        text = _NEWLINE.sub("\n", text)
    if _SPACE.search(suspects):
        text = _SPACE.sub(" ", text)
    if "\u3000" in suspects:
        lines = (line.rstrip(_BLANKS) for line in text.split("\n"))
        text = "\n".join([line[indented.end() :] if (indented := _INDENTATION.match(line)) else line for line in lines])
    elif " \n" in text or ("\t" in text and "\t\n" in text):  # searching for one character is cheap
        text = "\n".join([line.rstrip(_BLANKS) for line in text.split("\n")])
    return _THREE_NEWLINES.sub("\n\n", text) if "\n\n\n" in text else text


# Repetition

PROBES, PROBE_CHARACTERS = 8, 8
SHORTEST_REPETITION = 27  # characters: up to here four bytes each are not eight times zlib's 14
SLICES, SLICE_CHARACTERS = 8, 2048


def _repeats(text: str) -> bool:
    """Whether half of 8 strings of 8 characters, taken at even distances, occur again further on in the text.

    In a text that compresses eightfold most do, in ordinary prose none; this is ten times faster than compressing.
    """
    found, size, find = 0, len(text), text.find
    for number in reversed(range(PROBES)):  # the last ones first: the less text follows, the faster
        start = number * size // PROBES
        if find(text[start : start + PROBE_CHARACTERS], start + 1) >= 0:
            found += 1
        elif found + number < PROBES // 2:  # even if all that are left were found
            return False
    return True


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over their size after zlib (level 1), the measure by which Whisper finds loops (Radford et al. 2022).

    Of a text with more than 16,384 characters, 8 slices of 2,048 at even distances are taken, the first and the last
    of them at its ends. Repetition is found up to a distance of 32 KiB. zlib's output is 14 bytes or more, so a very
    short text never has a high ratio: 哈 has 8 only when it comes 36 times.
    """
    if len(text) > SLICES * SLICE_CHARACTERS:
        step = (len(text) - SLICE_CHARACTERS) / (SLICES - 1)
        starts = (int(number * step) for number in range(SLICES))
        text = "".join(text[start : start + SLICE_CHARACTERS] for start in starts)
    content = text.encode("utf-8", "surrogatepass")
    return len(content) / len(zlib.compress(content, 1))


# Han characters

_BLOCK = 1 << 16  # bytes at a time, so that the intermediate arrays stay in the cache


def count_han(contents: Sequence[bytes]) -> np.ndarray:
    """How many Han characters each text, given as UTF-8, has: int64 [len(contents)].

    Counted are U+3400 to U+9FFF, all ideographs except 64 hexagrams, and the planes from 2 on, by their first
    bytes: E3 (with a second one from 90 on), E4 to E9, F0 (from A0 on). Ten times as fast as going by characters.
    """
    content = b"".join(contents) + b"\0"  # the zero: where empty texts at the end begin
    joined, is_han = np.frombuffer(content, dtype=np.uint8), np.zeros(len(content), dtype=bool)
    for start in range(0, len(joined) - 1, _BLOCK):
        block = is_han[start : min(start + _BLOCK, len(joined) - 1)]
        lead, second = joined[start : start + len(block)], joined[start + 1 : start + 1 + len(block)]
        np.less(lead - np.uint8(0xE4), 6, out=block)  # E4 to E9: a smaller byte wraps around and is too large
        block |= (lead == 0xE3) & (second >= 0x90)
        if b"\xf0" in content:
            block |= (lead == 0xF0) & (second >= 0xA0)
    lengths = np.fromiter(map(len, contents), dtype=np.int64, count=len(contents))
    sums = np.add.reduceat(is_han.view(np.uint8), np.cumsum(lengths) - lengths, dtype=np.uint32)
    return np.where(lengths > 0, sums, 0).astype(np.int64)

"""The counts of data processing on one page to look at. matplotlib is optional, so it is imported where it is used."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from model.storage.files import replacing

PAGE, DPI = (16, 10), 110  # inches, dots per inch
LEFT, RIGHT = 0.05, 0.975  # of the page
INK, MUTED, LINE, GRID = "#1f2a37", "#6b7787", "#c9d0d8", "#e8ebef"
BLUE, BLUE_TINT, RUST, RUST_TINT, GREY_TINT = "#3a6ea5", "#d3e1ef", "#b4552d", "#f2d9cd", "#e8ebef"
MOST_BARS = 60  # of a histogram of lengths
ROWS = 11  # of a ranking: the ten largest and the rest
TEXT_FONT = "DejaVu Sans"  # comes with matplotlib
HAN_FONTS = re.compile(  # families whose names say that they hold Chinese characters
    r"CJK|Noto (Sans|Serif) [ST]C|Source Han|YaHei|PingFang|Hiragino|Hei\b|SimHei|SimSun|Songti|Song\b|Kai(ti|\b)"
    r"|WenQuanYi|WenKai|Droid Sans Fallback|Arial Unicode|FangSong|MiSans|HarmonyOS Sans|BabelStone Han",
    re.IGNORECASE,
)
STYLE = {
    "font.size": 9, "text.color": INK, "axes.edgecolor": LINE, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.labelcolor": MUTED, "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.7, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "xtick.color": LINE, "ytick.major.size": 0, "xtick.minor.size": 0,
}  # fmt: skip


def draw_summary(path: Path, summary: dict) -> None:
    """Draw a job's counts, as its JSON file holds them, on one page: a PNG of 1760 × 1100 pixels.

    Names may hold any characters: those that no installed font has are escaped, as `\\u53e4`, and the page says so.
    If nothing was tokenised, the panels of tokens are omitted.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    names = _Names([summary["output"], *(source["name"] for source in summary["sources"])])
    with matplotlib.rc_context({**STYLE, "font.family": TEXT_FONT}):
        figure = Figure(figsize=PAGE, dpi=DPI, facecolor="white")
        _draw_headline(figure, summary, names)
        rows = [[_draw_characters, _draw_han_share], [_draw_rejects, _draw_cleaning, _draw_sources]]
        if summary["tokens"]:
            rows[0][1:1] = [_draw_tokens, _draw_ratio]
            rows[1][2:2] = [_draw_vocabulary]
        if "chats" in summary:
            first, last = ([_draw_tokens], [_draw_learned]) if summary["tokens"] else ([_draw_characters], [])
            rows[0] = [*first, _draw_questions, _draw_answers, _draw_turns, *last]
        for row, (top, bottom) in zip(rows, ((0.765, 0.485), (0.355, 0.075)), strict=True):
            grid = figure.add_gridspec(1, len(row), left=LEFT, right=RIGHT, top=top, bottom=bottom, wspace=0.25)
            for cell, draw in zip(grid, row, strict=True):
                draw(figure.add_subplot(cell), summary, names)
        if names.escaped:
            hint = r"\u… in names: no installed font has these characters; Noto Sans CJK has the Chinese ones"
            figure.text(RIGHT, 0.012, hint, color=MUTED, size=8, ha="right")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=DPI)


class _Names:
    """Shows the user's names: whatever characters `texts` hold, they are legible and fit their place."""

    def __init__(self, texts: Iterable[str]) -> None:
        from matplotlib import font_manager

        def characters(family: str) -> set[int]:
            return set(font_manager.get_font(font_manager.findfont(family)).get_charmap())

        self.escaped = False  # whether a character had to be
        self.families = [TEXT_FONT]
        self._known = characters(TEXT_FONT)
        if wanted := {ord(character) for character in set().union(*texts)} - self._known:
            families = sorted({font.name for font in font_manager.fontManager.ttflist if HAN_FONTS.search(font.name)})
            best = max(families, key=lambda family: len(wanted & characters(family)), default=None)
            if best and wanted & characters(best):
                self.families.append(best)
                self._known |= characters(best)

    def write(self, place, position: tuple[float, float], name: str, width: float, **style) -> None:
        """Write a name on `place`, a figure or axes, at most `width` pixels wide: of a long one, the two ends."""
        pieces = [self._piece(character) for character in name]
        ends = list(accumulate(map(len, pieces), initial=0))
        text = place.text(*position, "".join(pieces), family=self.families, parse_math=False, **style)
        length = min(ends[-1], 300)  # characters as they are shown: no escape is cut in two
        while text.get_window_extent().width > width and length > 4:
            length -= 1
            head = [piece for piece, end in zip(pieces, ends[1:], strict=True) if end <= 0.55 * length]
            tail = [piece for piece, start in zip(pieces, ends, strict=False) if ends[-1] - start <= 0.45 * length]
            text.set_text("".join([*head, "…", *tail]))

    def _piece(self, character: str) -> str:
        known = character.isprintable() and ord(character) in self._known
        self.escaped |= not known
        return character if known else character.encode("unicode_escape").decode("ascii")


def _short(value: float, _=None, digits: int = 3) -> str:
    """950, 12.5k, 1.31M; the second argument is matplotlib's, for formatters."""
    value = float(f"{value:.{digits}g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _count(value: int) -> str:
    return f"{value:,}" if value < 1_000_000 else _short(value)


def _percent(share: float) -> str:
    """As many digits as tell it from 0 % and 100 %."""
    if 0 < share < 0.0001 or 0.999 < share < 1:
        return "<0.01 %" if share < 0.5 else ">99.9 %"
    digits = 0 if share in (0, 1) or 0.1 <= share <= 0.99 else 1 if share >= 0.01 else 2
    return f"{100 * share:.{digits}f} %"


def _of(part: int, whole: int, what: str) -> str:
    return f"{_count(part)} of {_count(whole)} {what} ({_percent(part / max(1, whole))})"


def _quantile(bins: list[dict], share: float) -> float:
    """The value that about this share of the documents is below, if those of one bin are spread evenly in it."""
    left = share * sum(row["documents"] for row in bins)
    for row in bins:
        if left <= row["documents"]:
            break
        left -= row["documents"]
    below = row["below"] or 2 * row["from"]
    return row["from"] + (below - row["from"]) * left / row["documents"]


def _draw_headline(figure, summary: dict, names: _Names) -> None:
    """The output's name and a row of key numbers."""
    documents, written, rejected = summary["documents"], summary["documents_written"], summary["rejected"]
    tokens, ratio, held = summary["tokens"], summary["characters_per_token"], summary["validation"]
    counted = "template counted" if "chats" in summary else "bos and eos counted"
    tiles = [
        ("Lines", _count(summary["lines"]), "read"),
        ("Documents", _count(documents), "all written" if written == documents else f"{_count(written)} written"),
        ("Rejected", _percent(rejected / max(1, summary["lines"])), f"{_count(rejected)} lines"),
        ("Characters", _count(summary["characters"]), f"{_short(summary['utf8_bytes'])} bytes of UTF-8"),
        ("Han share", _percent(summary["han_share"] or 0), "of the characters"),
        ("Tokens", _count(tokens) if tokens else "–", counted if tokens else "not tokenised"),
    ]
    if chats := summary.get("chats"):
        tiles[4] = ("Answers", _count(chats["turns"]), "each with a question")
    if tokens and chats:
        tiles.append(("Learned", _percent(chats["learned_share"]), f"{_count(chats['learned_tokens'])} tokens"))
    elif tokens:
        tiles.append(("Characters per token", f"{ratio:.3f}" if ratio else "–", "bos and eos not counted"))
    if tokens:
        what = f"documents, {_short(held['tokens'])} tokens" if held else "no documents set aside"
        tiles.append(("Validation", _count(held["documents"]) if held else "none", what))
    names.write(figure, (LEFT, 0.945), summary["output"], (RIGHT - LEFT) * PAGE[0] * DPI, size=17)
    for number, (title, value, note) in enumerate(tiles):
        x = LEFT + (RIGHT - LEFT) * number / len(tiles)
        figure.text(x, 0.9, title, color=MUTED, size=9.5)
        figure.text(x, 0.864, value, color=RUST if title == "Rejected" and rejected else INK, size=19, weight="bold")
        figure.text(x, 0.842, note, color=MUTED, size=8.5)


def _title(axis, title: str, note: str) -> None:
    axis.text(0, 1.115, title, transform=axis.transAxes, size=11, weight="bold")
    axis.text(0, 1.035, note, transform=axis.transAxes, size=9, color=MUTED)


def _draw_bars(axis, bins: list[dict], mark: float | None, color: str) -> None:
    """A histogram, with a dashed line at `mark`."""
    from matplotlib.ticker import MaxNLocator

    for row in bins:
        width = (row["below"] or 2 * row["from"]) - row["from"]
        axis.bar(row["from"], row["documents"], width, align="edge", color=BLUE, edgecolor="white", linewidth=0.8)
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(_short)
    axis.set_ylabel("documents")
    if mark is not None:
        axis.axvline(mark, color=color, linewidth=1.2, linestyle=(0, (4, 3)))


def _log_axis(axis, low: float, high: float, label: str) -> None:
    """A log x axis with ticks at 1, 2, 5, 10, …; at 1, 10, 100, … where those are many."""
    from matplotlib.ticker import NullLocator

    axis.set(xscale="log", xlim=(low, high), xlabel=label)
    ticks = [digit * 10**power for power in range(13) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
    axis.set_xticks(ticks if len(ticks) <= 8 else [tick for tick in ticks if str(tick)[0] == "1"])
    axis.xaxis.set_major_formatter(_short)
    axis.xaxis.set_minor_locator(NullLocator())


def _draw_lengths(
    axis, unit: str, bins: list[dict], limit: int | None = None, title: str = "Length", counted: str = "documents"
) -> None:
    """Bars of one width on the log axis: eight to each doubling, or fewer where few documents would look ragged."""
    documents = sum(row["documents"] for row in bins)
    low, high = max(1, bins[0]["from"]), max(_end(bins[-1]), limit or 1)
    most = min(MOST_BARS, 2 * math.sqrt(documents)) / math.log2(max(2, _end(bins[-1]) / low))  # to each doubling
    parts = max((parts for parts in (1, 2, 4, 8) if parts <= most), default=1)
    bars = Counter()
    for row in bins:
        bars[_bar_start(max(1, row["from"]), parts)] += row["documents"]
    starts = sorted(bars)
    rows = [{"from": start, "below": _bar_end(start, parts), "documents": bars[start]} for start in starts]
    _draw_bars(axis, rows, limit, RUST)
    axis.set_ylabel(counted)
    margin = max(1.15, math.sqrt(100 * low / high))  # two decades at least: a single bar is not as wide as the panel
    to_each = "a bar" if parts == 1 else f"{parts} bars"
    _log_axis(axis, low / margin, high * margin, f"{unit}, {to_each} to each doubling")
    half, most = (_short(_quantile(bins, share), digits=2) for share in (0.5, 0.95))
    note = f"half below about {half}, 95 % below about {most}" if documents >= 20 else ""
    _title(axis, f"{title} in {unit}", note)


def _end(row: dict) -> int:
    return row["below"] or 2 * row["from"]


def _bar_start(length: int, parts: int) -> int:
    """Where the bar that a length belongs to begins, if each doubling has `parts` (a power of two) of the same width.

    Below `parts`, where a doubling has fewer whole numbers, each number has a bar.
    """
    width = max(1, (1 << (length.bit_length() - 1)) // parts)
    return length // width * width


def _bar_end(start: int, parts: int) -> int:
    return start + max(1, (1 << (start.bit_length() - 1)) // parts)


def _draw_characters(axis, summary: dict, _: _Names) -> None:
    _draw_lengths(axis, "characters", summary["length_in_characters"])


def _draw_tokens(axis, summary: dict, _: _Names) -> None:
    longer, limit = summary["documents_longer_than_max_length"], summary["max_length"]
    _draw_lengths(axis, "tokens", summary["length_in_tokens"], limit)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.2)  # room for the label above the bars
    share = _percent(longer / max(1, summary["documents"]))
    label = f"max_length {limit:,}\n{_count(longer)} longer ({share}): {summary['long_documents']}"
    x, side = (5, "left") if limit**2 < math.prod(axis.get_xlim()) else (-5, "right")  # where there is more room
    place = {"xycoords": ("data", "axes fraction"), "xytext": (x, 0), "textcoords": "offset points", "ha": side}
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.annotate(label, (limit, 1), va="top", color=RUST, size=8.5, bbox=behind, **place)


def _draw_questions(axis, summary: dict, _: _Names) -> None:
    _draw_turn_lengths(axis, "Questions", summary["chats"]["question_in_characters"])


def _draw_answers(axis, summary: dict, _: _Names) -> None:
    _draw_turn_lengths(axis, "Answers", summary["chats"]["answer_in_characters"])


def _draw_turn_lengths(axis, title: str, bins: list[dict]) -> None:
    bins = [row | {"documents": row["turns"]} for row in bins]
    _draw_lengths(axis, "characters", bins, title=title, counted=title.lower())


def _draw_turns(axis, summary: dict, _: _Names) -> None:
    bins, turns = summary["chats"]["turns_of_documents"], summary["chats"]["turns"]
    centred = [row | {"from": row["from"] - 0.5, "below": _end(row) - 0.5} for row in bins]
    _draw_bars(axis, centred, None, INK)
    _title(axis, "Answers of a chat", f"{turns / max(1, summary['documents']):.2f} on average")
    high = max(map(_end, bins))
    axis.set(xlim=(0.5, max(8.5, high + 0.5)), xlabel="answers", ylabel="chats")
    axis.xaxis.set_major_formatter(_short)


def _draw_learned(axis, summary: dict, _: _Names) -> None:
    overall = summary["chats"]["learned_share"]
    _draw_bars(axis, summary["chats"]["learned_share_of_documents"], overall, INK)
    _title(axis, "Learned share", f"all chats together: {_percent(overall)} (dashed)")
    axis.set(xlim=(-0.02, 1.02), xlabel="learned share of the tokens, of each chat", ylabel="chats")
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def _draw_ratio(axis, summary: dict, _: _Names) -> None:
    bins, overall = summary["characters_per_token_of_documents"], summary["characters_per_token"]
    end = 1.5 * _quantile(bins, 0.999)  # a few documents of "=====" must not squeeze all others into one bar
    shown = [row for row in bins if row["from"] < end]
    beyond = sum(row["documents"] for row in bins) - sum(row["documents"] for row in shown)
    _draw_bars(axis, shown, overall, INK)
    low, high = axis.get_xlim()
    margin = max(0, 1 - (high - low)) / 2
    axis.set(xlim=(low - margin, high + margin), xlabel="characters per token, of each document")
    note = f"all documents together: {overall:.3f} (dashed)" if overall else ""
    _title(axis, "Characters per token", note + (f"; {_count(beyond)} further right" if beyond else ""))


def _draw_han_share(axis, summary: dict, _: _Names) -> None:
    overall = summary["han_share"]
    _draw_bars(axis, summary["han_share_of_documents"], overall, INK)
    _title(axis, "Han share", f"all documents together: {_percent(overall)} (dashed)" if overall is not None else "")
    axis.set(xlim=(-0.02, 1.02), xlabel="Han share of the characters, of each document")
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def _draw_vocabulary(axis, summary: dict, _: _Names) -> None:
    """The share of all tokens that the most frequent ids make up."""
    size, used = summary["vocabulary"]["size"], summary["vocabulary"]["ids_used"]
    rows = summary["vocabulary"]["most_frequent"]
    points = [(row["ids"], row["share_of_tokens"]) for row in rows if row["ids"] < used] + [(used, 1.0)]
    axis.fill_between(*zip(*points, strict=True), color=BLUE_TINT, linewidth=0)
    axis.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4, linewidth=1.5)
    for (ids, share), (following, _) in zip(points, [*points[1:], (math.inf, 1)], strict=True):
        if following > 2.5 * ids:  # else the two labels would meet
            axis.annotate(_percent(share), (ids, share), (-3, 6), textcoords="offset points", ha="right", size=8)
    _log_axis(axis, 0.3, 1.6 * size, "most frequent ids")
    axis.set(ylim=(0, 1.14), ylabel="share of the tokens")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    _title(axis, "Vocabulary", f"never used: {_of(size - used, size, 'ids')}")


def _draw_ranking(axis, title: str, note: str, counts: dict[str, int], whole: int, names: _Names, tint: str) -> None:
    """Bars from the largest to the smallest, each with its name on it and its share of the whole; the rest in one."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    rest = ranked[ROWS - 1 :] if len(ranked) > ROWS else []
    rows = [(name, count, INK, tint) for name, count in ranked[: len(ranked) - len(rest)]]
    if rest:
        rows.append((f"{len(rest):,} others", sum(count for _, count in rest), MUTED, GREY_TINT))
    lengths = [count for _, count, _, _ in rows if count]
    logarithmic = bool(lengths) and max(lengths) > 50 * min(lengths)
    _title(axis, title, note + ("; log scale" if logarithmic else ""))
    axis.set(xlim=(0, 1), ylim=(ROWS - 0.4, -0.6))
    axis.axis("off")
    if not lengths:
        axis.text(0.015, 0, "none", va="center", color=MUTED)
        return
    scale, width = math.log1p if logarithmic else float, axis.get_window_extent().width
    for place, (name, count, color, fill) in enumerate(rows):
        axis.barh(place, scale(count) / scale(max(lengths)), height=0.8, color=fill)
        axis.text(0.985, place, _percent(count / whole), ha="right", va="center", size=8.5, color=color)
        axis.text(0.79, place, _count(count), ha="right", va="center", size=8.5, color=color)
        names.write(axis, (0.015, place), name, 0.59 * width, va="center", color=color)


def _draw_rejects(axis, summary: dict, names: _Names) -> None:
    note = _of(summary["rejected"], summary["lines"], "lines")
    reasons, rejected = summary["rejected_by_reason"], summary["rejected"]
    _draw_ranking(axis, "Rejected, by reason", note, reasons, rejected, names, RUST_TINT)


def _draw_cleaning(axis, summary: dict, names: _Names) -> None:
    kinds, documents = dict(summary["changed_by_cleaning"]), summary["documents"]
    note = _of(kinds.pop("documents"), documents, "documents")
    _draw_ranking(axis, "Changed by cleaning", note, kinds, documents, names, BLUE_TINT)


def _draw_sources(axis, summary: dict, names: _Names) -> None:
    unit, sources = "tokens" if summary["tokens"] else "documents", summary["sources"]
    counts = Counter()
    for source in sources:
        counts[source["name"]] += source[unit]
    note = f"{len(sources):,} sources" if len(sources) != 1 else "one source"
    _draw_ranking(axis, f"{unit.capitalize()}, by source", note, counts, sum(counts.values()), names, BLUE_TINT)

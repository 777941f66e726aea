"""Makes the sample chats: some thousand facts, each asked in many ways, and questions that have no answer here.

    python examples/chats_zh.py --sources FOLDER --output chats_zh.jsonl --questions questions_zh.jsonl

FOLDER holds poems_qa.jsonl.gz, facts_cldr.jsonl.gz and xiehouyu.jsonl.gz: chats with `conversations` and `source`. A
model of three million parameters learns a thousand facts that it meets some twenty times each in other words, and
hardly any of ten thousand that it meets once. So few are taught; the rest of the sources teaches it to say that it does
not know. The questions ask for the same facts, and for unknown ones, in phrasings that no training chat has: our own,
and those of phrasings_zh.yaml, which are others' (sources `others-…`).
"""

import argparse
import gzip
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

UNKNOWN = "这个我不知道。"
FIRST = "unknown-first"  # chats that can only begin a conversation
PHRASINGS = {  # of each fact: a poem's line is easily told from others, a sum is not
    "next": 9, "line": 8, "author": 10, "line-author": 8, "title": 11, "saying": 16, "currency": 26, "sum": 90,
}  # fmt: skip
PHRASED_AS = {"line": "next", "line-author": "author", "title": "author"}  # kinds that are asked in another's words
SHAPES = {  # of a question, and how often each is drawn
    "ask": 0.51, "order": 0.18, "context": 0.13, "reversed": 0.06, "story": 0.12,
}  # fmt: skip
# Where the pieces of a sentence meet: no two commas, and no comma before 的.
JOINTS = [(re.compile(p), j) for p, j in (("[，。]+，", "，"), ("[，。…]+的", "的"), ("([：…—])[，。]", r"\1"))]
IN_WORDS = 0.5  # of the sums
TITLE_QUOTES = ["《{a}》", "《{a}》", "《{a}》这首诗", "{a}这首诗", "古诗《{a}》", "{a}"]
JOINED = 0.2  # of the chats: behind others, as in a conversation
COARSE = re.compile("[茅粪屎尿屁]|汉子|驼子|[A-Za-z（]")  # sayings that are left out, and those that are cut
NUMERALS = "零一二三四五六七八九"
KEPT = 25  # unknown things of each kind that only the questions ask about


def chat(*turns: str, source: str) -> dict:
    """A chat of alternating questions and answers."""
    roles = ["user", "assistant"] * (len(turns) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return {"conversations": messages, "source": source}


def read_chats(path: Path, source: str) -> Iterator[list[str]]:
    """The texts of each chat of this source."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            value = json.loads(line)
            if value["source"] == source:
                yield [message["content"] for message in value["conversations"]]


def quoted(question: str) -> str:
    """What a question asks about: the text in quotation marks, or after the colon."""
    found = re.search(r"“(.+?)”", question) or re.search(r"：(.+?)[。—]*$", question)
    return found[1] if found else question


class Maker:
    """Collects chats to train on, and questions in other phrasings.

    Args:
        words: what chats_zh.yaml holds.
        draw: decides everything that is drawn.
    """

    def __init__(self, words: dict, draw: random.Random) -> None:
        self.words, self.draw = words, draw
        self.chats: list[dict] = []
        self.questions: list[dict] = []
        self.facts: dict[str, list[tuple[dict, str]]] = {kind: [] for kind in PHRASINGS}  # what is asked for, answer

    def phrase(self, kind: str, trained: bool, **values) -> str:
        """One phrasing, drawn: of the training chats a sentence of one of five shapes, with a lead and an end."""
        ways = self.words["kinds"][PHRASED_AS.get(kind, kind)]
        if kind == "title":
            ways = ways | {"quotes": TITLE_QUOTES, "questions": ["《{a}》的作者是哪一位？", "是谁写出了《{a}》？"]}
        if not trained:
            return self.draw.choice(ways["questions"]).format(**values)
        shape = self.draw.choices(list(SHAPES), SHAPES.values())[0]
        text = self.draw_shape("ask" if shape == "story" and "stories" not in ways else shape, ways)
        if "A" in values and "{a} + " not in text and self.draw.random() < IN_WORDS:
            text = text.replace("{a}", "{A}").replace("{b}", "{B}")
        return self.dressed(text, "order_" if shape == "order" else "").format(**values)

    def dressed(self, text: str, kind: str = "") -> str:
        """The sentence with a lead and an end."""
        text = self.draw.choice(self.words[f"{kind}leads"]) + text
        if text.endswith("？") or (kind and not text.endswith(("_", "）"))):
            text = text.removesuffix("？") + self.draw.choice(self.words[f"{kind}tails"])
        for pattern, joined in JOINTS:
            text = pattern.sub(joined, text)
        return text

    def draw_shape(self, shape: str, ways: dict) -> str:
        """A sentence of this shape about {a} (and {b})."""
        one = self.draw.choice
        quote = one(ways["quotes"])
        if shape == "ask":
            ask = one(ways["asks"])
            return ask.replace("{q}", quote) if "{q}" in ask else quote + ask
        if shape == "order":
            return one(ways["orders"]).replace("{q}", quote)
        if shape == "context":
            return one(ways["contexts"]).replace("{q}", quote) + one(ways["bares"])
        if shape == "reversed":
            return one(ways["bares"])[:-1] + one("：？，") + quote
        return one(ways["stories"])

    def teach(self, kind: str, answer: str, **values) -> None:
        """One fact: asked in several trained phrasings, and once in another."""
        for _ in range(PHRASINGS[kind]):
            self.chats.append(chat(self.phrase(kind, True, **values), answer, source=kind))
        self.questions.append(chat(self.phrase(kind, False, **values), answer, source=kind))
        self.facts[kind].append((values, answer))

    def refuse(self, kind: str, things: Iterable[dict], times: int = 1) -> None:
        """Things that are not known: the first KEPT only in questions, the others in training chats."""
        for number, values in enumerate(things):
            if number < KEPT:
                self.ask_unknown(f"unknown-{kind}", self.phrase(kind, False, **values))
            else:
                self.chats += [
                    chat(self.phrase(kind, True, **values), UNKNOWN, source=f"unknown-{kind}") for _ in range(times)
                ]

    def ask_unknown(self, kind: str, question: str) -> None:
        """A question that has no answer here."""
        self.questions.append(chat(question, UNKNOWN, source=kind))


def poems(maker: Maker, folder: Path, count: int, unknown: int) -> None:
    """Famous couplets: what follows them, and each of their lines, and who wrote it."""
    known, titles, strangers = known_poems(maker, folder, count)
    after_ways = maker.words["author_after"]
    for first, second, author in known:
        lines = [*first.split("，"), *second.split("，")]
        maker.teach("next", f"{second}。", a=first)
        maker.teach("author", author, a=first)
        for line, after in itertools.pairwise(lines):
            maker.teach("line", f"{after}。", a=line)
        for line in lines:
            maker.teach("line-author", author, a=line)
        steps = [(first, second)] * 3 + list(itertools.pairwise(lines))
        for (line, after), again in zip(steps, maker.draw.sample(after_ways["asks"], 6), strict=True):
            turns = maker.phrase("next", True, a=line), f"{after}。", again, author
            maker.chats.append(chat(*turns, source="two-turns"))
        again = maker.draw.choice(after_ways["questions"])
        turns = maker.phrase("next", False, a=first), f"{second}。", again, author
        maker.questions.append(chat(*turns, source="two-turns"))
    for title, author in titles.items():
        maker.teach("title", f"《{title}》的作者是{author}。", a=title)
    maker.draw.shuffle(strangers)
    for kind in ("next", "author"):
        maker.refuse(kind, ({"a": line} for line in strangers[:unknown]))
    maker.refuse("title", ({"a": title} for title in unknown_titles(maker, folder, set(titles), unknown // 2)))


def known_poems(maker: Maker, folder: Path, count: int) -> tuple[list, dict[str, str], list[str]]:
    """The poems that are taught (first couplet, second couplet, author and title as an answer), the authors of titles
    that tell one, and lines of other poems."""
    words, disputed = maker.words, tuple(maker.words["disputed"].split())
    couplet, famous = r"[\u4e00-\u9fff]{5,7}，[\u4e00-\u9fff]{5,7}", set(words["authors"].split())
    known, strangers = [], []
    for poem in words["poems"]:
        author, title, first, second = re.fullmatch("(.+?)《(.+?)》(.+?)。(.+?)。", poem).groups()
        known.append((first, second, f"{author}，出自《{title}》。"))
    seen = {line for first, second, _ in known for line in (first, *first.split("，"), *second.split("，"))}
    for question, answer, _, author in read_chats(folder / "poems_qa.jsonl.gz", "poem-two-turns"):
        first, second = quoted(question).rstrip("。！？"), answer.rstrip("。！？")
        lines = [first, *first.split("，"), *second.split("，")]
        if not (re.fullmatch(couplet, first) and re.fullmatch(couplet, second)) or seen & set(lines):
            continue
        seen.update(lines)
        if first.startswith(disputed):
            continue
        if author.split("，")[0] in famous and len(known) < count:
            known.append((first, second, author))
        else:
            strangers.append(first)
    for source in ("poem-next", "poem-author"):
        for question, _ in read_chats(folder / "poems_qa.jsonl.gz", source):
            line = quoted(question).rstrip("。")
            if re.fullmatch(r"[\u4e00-\u9fff，]{5,16}", line) and not any(one in line or line in one for one in seen):
                strangers.append(line.split("，")[0] if len(line) > 8 and maker.draw.random() < 0.4 else line)
    named = [re.fullmatch("(.+?)，出自《(.+?)》。", author).groups() for *_, author in known]
    titles = {title: author for author, title in named if len({a for a, t in named if t == title}) == 1}
    return known, titles, strangers


def unknown_titles(maker: Maker, folder: Path, known: set[str], count: int) -> list[str]:
    """Titles of other poems."""
    answers = (answer for _, answer in read_chats(folder / "poems_qa.jsonl.gz", "poem-author"))
    titles = {found[1] for answer in answers if (found := re.search("《([\u4e00-\u9fff]{2,8})》", answer))}
    others = sorted(titles - known)
    maker.draw.shuffle(others)
    return others[:count]


def sayings(maker: Maker, folder: Path, count: int, unknown: int) -> None:
    """Allegorical sayings, front to back: first the best known."""
    backs: dict[str, str] = {}
    for question, answer in read_chats(folder / "xiehouyu.jsonl.gz", "xiehouyu"):
        if not COARSE.search(quoted(question) + answer):
            backs.setdefault(quoted(question), answer.split("；")[0].rstrip("。") + "。")
    famous = [front for front in maker.words["sayings"].split() if front in backs]
    fronts = [front for front in backs if 4 <= len(front) <= 8 and len(backs[front]) <= 8 and front not in famous]
    maker.draw.shuffle(fronts)
    fronts = famous + fronts
    for front in fronts[:count]:
        maker.teach("saying", backs[front], a=front)
    maker.refuse("saying", ({"a": front} for front in fronts[count : count + unknown]))


def sums(maker: Maker, unknown: int) -> None:
    """Sums within 20; larger numbers are not known."""
    for a, b in itertools.product(range(21), repeat=2):
        if a + b <= 20:
            maker.teach("sum", f"{a + b}。", **numbers(a, b))
    large = [numbers(maker.draw.randint(25, 99), maker.draw.randint(11, 99)) for _ in range(unknown // 2)]
    large += [numbers(maker.draw.randint(11, 999), maker.draw.randint(21, 999)) for _ in range(unknown // 2)]
    maker.draw.shuffle(large)
    maker.refuse("sum", large)


def numbers(a: int, b: int) -> dict:
    """Two numbers by the names that phrasings have for them: in digits, and in words below 100."""
    return {"a": a, "b": b, "A": in_words(a), "B": in_words(b)}


def in_words(number: int) -> str:
    """A number below 100 in Chinese, a larger one in digits: 二十三."""
    tens, ones = divmod(number, 10)
    if tens > 9:
        return str(number)
    return ("" if tens < 2 else NUMERALS[tens]) + "十" * (tens > 0) + (NUMERALS[ones] if ones or not tens else "")


def currencies(maker: Maker, folder: Path) -> list[str]:
    """Well-known countries and their money; returns the names of all places."""
    moneys: dict[str, str] = {}
    for question, answer in read_chats(folder / "facts_cldr.jsonl.gz", "currency"):
        found = re.match(r"(.+?)(?:用什么|的货币|使用)", question)
        if found and len(found[1]) <= 8:
            moneys.setdefault(found[1], answer)
    known = [name for name in maker.words["countries"].split() if name in moneys]
    others = [name for name in moneys if name not in known]
    maker.draw.shuffle(others)
    for name in known:
        maker.teach("currency", moneys[name], a=name)
    maker.refuse("currency", ({"a": name} for name in others), times=32)
    return known + others


def said(maker: Maker) -> None:
    """Greetings, thanks, and who it is."""
    for answer, ways in maker.words["said"].items():
        for text in ways["asks"]:
            maker.chats += [chat(text, answer, source="said")] * 20
        maker.questions += [chat(text, answer, source="said") for text in ways["questions"]]


def strange_questions(maker: Maker, countries: list[str], times: int) -> None:
    """Kinds of questions that nothing here answers."""
    words = maker.words
    fill = {"country": countries, "person": words["authors"].split()}
    fill |= {"word": words["words"].split(), "dish": words["dishes"].split()}
    fill |= {"a": range(10, 21), "b": range(2, 11), "A": [in_words(a) for a in range(2, 21)]}

    def filled(phrase: str) -> str:
        return phrase.format(**{name: maker.draw.choice(values) for name, values in fill.items()})

    for phrase in words["unknown"]["asks"]:
        for _ in range(times * (3 if "{country}" in phrase else 2) if "{" in phrase else 12):
            text = filled(phrase)
            is_dressed = text.endswith("？") and maker.draw.random() < 0.6
            maker.chats.append(chat(maker.dressed(text) if is_dressed else text, UNKNOWN, source="unknown-kind"))
    for phrase in words["first"]:
        maker.chats += [chat(phrase, UNKNOWN, source=FIRST)] * 20
    for phrase in words["unknown"]["questions"]:
        for _ in range(4 if "{" in phrase else 1):
            maker.ask_unknown("unknown-kind", filled(phrase))


def others_questions(maker: Maker, phrasings: dict[str, list[str]]) -> None:
    """Questions in others' phrasings, each of four facts; and such as nothing here answers."""
    facts_of = {kind: maker.facts[kind] for kind in phrasings if kind in maker.facts}
    facts_of["next"] = maker.facts["next"] + maker.facts["line"]
    facts_of["author"] = maker.facts["author"] + maker.facts["line-author"]  # a title would need other quotes
    for kind, facts in facts_of.items():
        for phrasing in phrasings[kind]:
            for values, answer in maker.draw.sample(facts, 4):
                maker.questions.append(chat(phrasing.format(**values), answer, source=f"others-{kind}"))
    for question in phrasings["unknown"]:
        maker.ask_unknown("others-unknown", question)


def conversations(chats: list[dict], draw: random.Random) -> list[dict]:
    """The chats, some of them behind one to three others, as in a conversation, or behind a greeting."""
    greetings = [item for item in chats if item["source"] == "said"]
    others = [item for item in chats if item["source"] != FIRST]
    joined = []
    for item in chats:
        before = []
        if item["source"] != FIRST and draw.random() < JOINED:
            before = [draw.choice(greetings) if draw.random() < 0.5 else draw.choice(others)]
            before += [draw.choice(others) for _ in range(draw.choice((0, 0, 1, 2)))]
        messages = [message for one in [*before, item] for message in one["conversations"]]
        joined.append({"conversations": messages, "source": item["source"]})
    return joined


def write(path: Path, chats: list[dict]) -> None:
    """One chat a line."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in chats)


def main() -> None:
    """Make both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, required=True, metavar="FOLDER", help="of the chats to choose from")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the chats to train on")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="the same facts, asked otherwise")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="[1]")
    options = parser.parse_args()
    words, others = (
        yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        for name in ("chats_zh.yaml", "phrasings_zh.yaml")
    )
    maker = Maker(words, random.Random(options.seed))
    poems(maker, options.sources, count=150, unknown=1400)
    sayings(maker, options.sources, count=170, unknown=1400)
    sums(maker, unknown=400)
    strange_questions(maker, currencies(maker, options.sources), times=16)
    said(maker)
    others_questions(maker, others)
    asked = {item["conversations"][-2]["content"] for item in maker.questions if len(item["conversations"]) == 2}
    chats = [item for item in maker.chats if item["conversations"][0]["content"] not in asked]
    maker.draw.shuffle(chats)
    chats = conversations(chats, maker.draw)
    write(options.output, chats)
    write(options.questions, maker.questions)
    print(f"{len(chats):,} chats, {len(maker.questions):,} questions")


if __name__ == "__main__":
    main()

"""Whether llama.cpp gives the ids of a tokenizer that was written into a GGUF file, and a folder read from one does.

    python tests/text/gguf_tokenizers.py --llama_python ../llama/bin/python
    python tests/text/gguf_tokenizers.py --llama_python ../llama/bin/python --tokenizer ../qwen3 ../deepseek
    python tests/text/gguf_tokenizers.py --llama_python ../llama/bin/python --gguf ../smollm2.gguf
    python tests/text/gguf_tokenizers.py --llama_python ../llama/bin/python --every_name

A tokenizer's folder is written into a GGUF file without weights, and that is read back into a folder. Of how many texts
do all ids agree? written: the folder's with llama.cpp's, where no text holds a token that a remark names. control: the
same where control tokens in texts count as such. back: the folder that was read back with llama.cpp, both ways.
A GGUF file is only read. --every_name is for all pre-tokenizers that are known: it gives each of them to a tokenizer
whose ids show every split. llama-cpp-python must be installed for the interpreter that --llama_python names.
"""

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils
from model.errors import InputError
from model.storage.gguf_header import GGUFFile
from model.text.gguf_tokenizer import GAP_NAMES, read_tokenizer, write_tokenizer
from model.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, as_json
from model.text.tokenization import EMBEDDED_TOKENIZER
from model.text.tokenizer_folder import read_folder

ROOT = Path(__file__).resolve().parents[2]
PARTS = [  # of texts: what tokenizers treat in different ways
    "", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n \n", " \t\n", "\u00a0", "\u3000", "\u2028",
    "0", "7", "42", "314", "2024", "1234567890", "３１４", "四十二", "Ⅻ", "½",
    "hello", " World", "don't", "I'LL", "we've", "'S", "HTTPServer", "camelCase", "naïve", "e\u0301", "'ſ",
    "ａｂｃ", "ﬁ", "Ω", "Привет", "ПРИВЕТМир", "مرحبا", "שלום", "हिन्दी", "ไทย", "한국어", "ひらがな", "カタカナ", "𝔘𝔫𝔦",
    "中文", "學而時習之", "𠮷", "㐀", "，", "。", "「」", "《史記》", "……", "——", "＜",
    "!", "?!", "...", "======", "```", "<>", "()", "[]{}", "/*", "//", "@#$%^&*", "~`|", "_",
    "😀", "👩‍👩‍👧", "🇨🇳", "❤️", "\ufffd", "\ufeff", "\u200b", "\u0000", "\u001f", "▁", "Ġ",
]  # fmt: skip
WAYS = ("written", "control", "back")
ROW = "{:30} {:20} {:>14} {:>14} {:>14}   {}"


def sample_texts(count: int, control_tokens: Sequence[str] = ()) -> list[str]:
    """Texts of every kind: the corpus, all pairs of `PARTS`, longer mixtures of them and of any characters."""
    generator = random.Random(5)
    with open(ROOT / "dataset" / "classics_zh.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:2000] for line in itertools.islice(file, 100)]
    texts += ["".join(pair) for pair in itertools.product(PARTS, PARTS)]
    texts += [part * number for part in PARTS for number in (3, 7, 30)]
    characters = [
        chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]  # without those that stand for nothing, on which versions of Unicode differ
    parts = PARTS + list(control_tokens)
    for _ in range(count):
        number = generator.randrange(1, 30)
        kinds = [parts, characters] if generator.random() < 0.3 else [parts]
        texts.append("".join(generator.choice(generator.choice(kinds)) for _ in range(number)))
    return texts + list(control_tokens)


# --------------------------------------------------------------------------------------------------------- llama.cpp


def serve(file: str) -> None:
    """llama.cpp's process: the ids of the texts on stdin, as mere texts and as texts that may hold control tokens."""
    import llama_cpp

    model = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    texts = json.load(sys.stdin)
    print(json.dumps([[model.tokenize(t.encode(), add_bos=False, special=s) for t in texts] for s in (False, True)]))


def llama_ids(file: Path, texts: Sequence[str], llama_python: str) -> tuple[list[list[int]], list[list[int]]]:
    """llama.cpp's ids of texts as mere texts, and as texts that may hold control tokens."""
    command = [llama_python, __file__, "--worker", str(file)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, encoding="utf-8")
    if done.returncode:
        raise InputError(f"llama.cpp: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    mere, control = json.loads(done.stdout)
    return mere, control


def folder_ids(folder: Path, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """A folder's ids of the same."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = []
    for tokenizer.encode_special_tokens in (True, False):
        ids.append([found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)])
    return ids[0], ids[1]


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Comparison:
    """Of how many texts the ids are equal, and what the shortest is of which they are not.

    Attributes:
        kind: the model and the pre-tokenizer, as the GGUF file names them.
        equal: of each way to compare, the number of texts that are equal, and of all.
        other: None where all texts are equal.
    """

    kind: str
    equal: dict[str, tuple[int, int]]
    other: str | None
    remarks: Sequence[str] = ()


def write_vocabulary(file: Path, folder: Path) -> list[str]:
    """Write a GGUF file that holds a folder's tokenizer and nothing else; returns remarks."""
    import gguf
    from tokenizers import Tokenizer

    rows = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 8
    writer = gguf.GGUFWriter(file, "llama")
    remarks = write_tokenizer(writer, folder, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return remarks


def compare_gguf(file: Path, llama_python: str, count: int = 2000, original: Path | None = None) -> Comparison:
    """Compare llama.cpp with the folder that is read from a GGUF file, and with the one that the file was made of."""
    fields = GGUFFile(file).fields
    with tempfile.TemporaryDirectory() as here:
        read_tokenizer(fields, here, file)
        texts = sample_texts(count, [token["content"] for token in read_folder(here).tokenizer["added_tokens"]])
        if original and read_folder(original).tokenizer["normalizer"] == {"type": "NFC"}:
            texts = [unicodedata.normalize("NFC", text) for text in texts]  # llama.cpp does not
        llama, back = llama_ids(file, texts, llama_python), folder_ids(Path(here), texts)
    pairs = {"back": list(zip(texts, zip(*llama, strict=True), zip(*back, strict=True), strict=True))}
    if original:
        mere, control = folder_ids(original, texts)
        pairs["control"] = list(zip(texts, llama[1], control, strict=True))
        known = [
            pair for pair in zip(texts, llama[0], mere, strict=True) if not any(name in pair[0] for name in GAP_NAMES)
        ]
        pairs["written"] = known
    wrong = [text for found in pairs.values() for text, theirs, ours in found if theirs != ours]
    return Comparison(
        " ".join(fields[key].contents() for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre") if key in fields),
        {way: (sum(theirs == ours for _, theirs, ours in found), len(found)) for way, found in pairs.items()},
        min(wrong, key=len) if wrong else None,
    )


def compare_folder(folder: Path, llama_python: str, count: int = 2000) -> Comparison:
    """Write a folder's tokenizer into a GGUF file, and compare."""
    with tempfile.TemporaryDirectory() as here:
        file = Path(here) / "vocabulary.gguf"
        remarks = write_vocabulary(file, folder)
        return replace(compare_gguf(file, llama_python, count, folder), remarks=remarks)


def write_pairs(folder: Path, kind: PreTokenizer, letters: Iterable[str] | None = None) -> None:
    """A tokenizer with every pair of bytes for a token, whose ids show where a pre-tokenizer has split a text.

    Args:
        letters: those bytes of which there are pairs, in GPT-2's alphabet; all by default.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = json.loads((EMBEDDED_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    model, alphabet = tokenizer["model"], sorted(ByteLevel.alphabet())
    model["merges"] = [list(pair) for pair in itertools.product(sorted(letters or alphabet), repeat=2)]
    tokens = [token["content"] for token in tokenizer["added_tokens"]] + alphabet + list(map("".join, model["merges"]))
    model["vocab"] = {token: index for index, token in enumerate(tokens)}
    model["ignore_merges"], tokenizer["pre_tokenizer"] = kind.ignore_merges, as_json(kind.splits)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(EMBEDDED_TOKENIZER / "tokenizer_config.json", folder)


def show(name: str, comparison: Comparison) -> None:
    """A row of the table, and what there is to say of it."""
    equal = [("{:,} / {:,}".format(*comparison.equal[way]) if way in comparison.equal else "-") for way in WAYS]
    other = "" if comparison.other is None else f"not equal: {comparison.other!r}"
    print(ROW.format(name[-30:], comparison.kind, *equal, other))
    for remark in comparison.remarks:
        print(f"    {remark}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama_python", default=sys.executable, metavar="FILE", help="a Python with llama-cpp-python")
    parser.add_argument("--tokenizer", nargs="+", type=Path, metavar="FOLDER", help="[the embedded one]")
    parser.add_argument("--gguf", nargs="+", type=Path, default=[], metavar="FILE", help="GGUF files to read")
    parser.add_argument("--every_name", action="store_true", help="each pre-tokenizer that is known")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="mixed texts, besides those fixed [2000]")
    return parser.parse_args()


def main() -> None:
    """Compare and print."""
    options = read_options()
    print(ROW.format("tokenizer", "as", *WAYS, ""))
    for folder in options.tokenizer or ([] if options.gguf or options.every_name else [EMBEDDED_TOKENIZER]):
        show(str(folder), compare_folder(folder, options.llama_python, options.texts))
    for file in options.gguf:
        show(str(file), compare_gguf(file, options.llama_python, options.texts))
    for kind in PRE_TOKENIZERS if options.every_name else ():
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder), kind)
            show("pairs of bytes", compare_folder(Path(folder), options.llama_python, options.texts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2])
    else:
        utils.run_command(main)

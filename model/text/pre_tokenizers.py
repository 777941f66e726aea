"""llama.cpp's pre-tokenizers for byte-level BPE, in the `tokenizers` library's form.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`); llama.cpp maps each name to regular expressions that split a
text one after another, each within the pieces of the previous one (`llama-vocab.cpp`). Where an original tokenizer and
llama.cpp differ, this file follows llama.cpp: `tekken` and `gpt-4o` distinguish case in ASCII only, and DeepSeek's
first two do not treat U+3000 as a letter. The two programs may disagree on characters newer than Unicode 14.
"""

from dataclasses import dataclass

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_3_5 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^a-z]]*[\p{{L}}&&[^A-Z]]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^a-z]]+[\p{{L}}&&[^A-Z]]*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_LETTERS = (  # scripts with upper and lower case
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇ"
    "Ꞌ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_SCRIPTS = r"[一-龥\u0800-一가-\ud7ff&&\S]+"  # llama.cpp excludes spaces; DeepSeek includes U+3000

SPELLINGS = {  # tokenizers' spelling -> llama.cpp's; they differ only in 'ſ, an obsolete letter
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": CONTRACTIONS,
    "'(?i:[sdmt]|ll|ve|re)": "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    "\r": r"\r",
    "\n": r"\n",
}


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer, under all of llama.cpp's names for it.

    Attributes:
        names: we write the first.
        splits: regular expressions; the next one splits both the matches and what lies between them.
        ignore_merges: a piece that is a token becomes that token without merging.
        add_bos: texts begin with the bos token unless the file says otherwise.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS = (
    PreTokenizer(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion")
        + ("granite-docling",),
        (GPT_2,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", GPT_2),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (LLAMA_3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("glm4", "glm5"), (LLAMA_3,), ignore_merges=True),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (LLAMA_3,)),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        (QWEN_2,),
    ),
    PreTokenizer(("qwen35",), (QWEN_3_5,)),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK_V3),
    ),
    PreTokenizer(
        ("deepseek-llm",),
        (
            r"[\r\n]",
            rf"\s?[{DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
            r"\s+$",
            DEEPSEEK_SCRIPTS,
            r"\p{N}+",
        ),
    ),
    PreTokenizer(
        ("deepseek-coder",),
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_SCRIPTS, r"\p{N}"),
    ),
    PreTokenizer(("seed-coder",), (SEED_CODER,)),
    PreTokenizer(("bailingmoe", "bailingmoe2", "llada-moe"), (BAILING,)),
    PreTokenizer(("tekken",), (TEKKEN,), ignore_merges=True, add_bos=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), (GPT_4O,)),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, "[0-9][0-9][0-9]")),
    PreTokenizer(("default", ""), (r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
BY_NAME = {name: kind for kind in PRE_TOKENIZERS for name in kind.names}


def as_json(splits: tuple[str, ...]) -> dict:
    """The `pre_tokenizer` of a tokenizer.json for these splits, followed by GPT-2's byte alphabet."""
    last = splits[-1] == GPT_2  # ByteLevel has it built in
    steps = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in (splits[:-1] if last else splits)
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last})
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


def find_name(pre_tokenizer: dict | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json; None if it has no equivalent."""
    splits = _splits_of(pre_tokenizer)
    return next(
        (
            kind.names[0]
            for kind in PRE_TOKENIZERS
            if splits == [_plain(split) for split in kind.splits] and ignore_merges == kind.ignore_merges
        ),
        None,
    )


def _splits_of(pre_tokenizer: dict | None) -> list[str] | None:
    """Its regular expressions; None if it does anything but split by them and apply the byte alphabet."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    splits = []
    for step in steps[:-1]:
        if step["type"] == "Digits":
            splits.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(_plain(step["pattern"].get("Regex", "")))
        else:
            return None
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    return splits + [GPT_2] * steps[-1]["use_regex"]


def _plain(split: str) -> str:
    """A regular expression in our spelling."""
    for spelling, ours in SPELLINGS.items():
        split = split.replace(spelling, ours)
    return split

"""Converts a tokenizer folder into a GGUF file's `tokenizer.*` keys, and back.

GGUF holds a tokenizer as llama.cpp (`llama-vocab.cpp`) runs it. Two kinds are supported:

    gpt2    byte-level BPE: merges, and the name of one of llama.cpp's pre-tokenizers (`pre_tokenizers.py`)
    llama   SentencePiece's BPE: a score per token (the best merges first) and a token per byte

Nothing in the file is executed. The resulting folder gives llama.cpp's ids, except that plain text never yields a
control token.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError, shown
from model.LMConfig import MOST_TOKENS
from model.storage.files import cache_folder, cached_folder, files_of_set, replacing, write_json
from model.storage.gguf_header import GGUFFile, Refused, Value, list_of_values, single_value
from model.text.encoder import library_errors
from model.text.merge_scores import merges_of, scores_of
from model.text.pre_tokenizers import BY_NAME, PRE_TOKENIZERS, as_json, find_name
from model.text.tokenizer_folder import TokenizerFolder, read_folder

if TYPE_CHECKING:
    import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type; 0: undefined
READ_BY = 1  # version of what makes a tokenizer's folder: unpacked ones of other versions are left alone
MOST_MERGES = 2 * MOST_TOKENS
MOST_CHARACTERS = 1024  # per token; runs of spaces have a few hundred
MOST_TEMPLATE_CHARACTERS = 1 << 20  # the longest templates, with tools, have thirty thousand
SPACE = "▁"  # how SentencePiece writes a space
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
NEVER_IN_UTF_8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
# Names that llama.cpp always treats as the end of a text or a turn, whatever the file says.
END_NAMES = {
    "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<|return|>", "<|call|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
}  # fmt: skip
# Names that llama.cpp always treats as control tokens: fill-in-the-middle for code.
GAP_NAMES = {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
    "<|prefix|>", "<|suffix|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- writing


def write_tokenizer(
    writer: "gguf.GGUFWriter", folder: str | Path, rows: int, add_bos: bool = True, chat: Mapping | None = None
) -> list[str]:
    """Add the `tokenizer.*` keys of a tokenizer folder to a GGUF file.

    Args:
        folder: tokenizer.json and tokenizer_config.json; chat_template.jinja and generation_config.json if present.
        rows: of the embedding; those past the tokenizer's last id become unused tokens.
        add_bos: llama.cpp begins every text with the bos token, if there is one, as documents do in training.
        chat: of a chat model: its `template` instead of the folder's, and `end_ids` besides the folder's.

    Returns:
        One line for each point where llama.cpp will deviate from the folder; usually none.

    Raises:
        InputError: the folder cannot be read, or llama.cpp would produce other ids.
    """
    folder = Path(folder)
    found = read_folder(folder)
    if chat:
        ends = list(dict.fromkeys([*found.end_ids, *chat["end_ids"]]))
        found = replace(found, end_ids=ends, chat_template=chat["template"])
    try:
        tokens, types = _list_tokens(found, rows)
        if found.tokenizer["model"]["byte_fallback"]:
            _write_llama(writer, found.tokenizer, tokens, types)
            remarks = []
        else:
            remarks = _write_gpt2(writer, found.tokenizer)
    except Refused as error:
        raise InputError(f"{folder}: llama.cpp cannot have the same tokenizer: {error}") from error
    forced = [
        token
        for token, kind in zip(tokens, types, strict=True)
        if token in END_NAMES | GAP_NAMES and kind not in (CONTROL, UNKNOWN)
    ]
    if forced:
        remarks.append(f"llama.cpp takes {', '.join(forced)} for control tokens, which are text in the folder")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = found.special_ids
    for name, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        if name in ids:
            add(ids[name])
    # llama.cpp recognises most end-of-turn tokens by name; the file can declare one more.
    turns = sorted(found.end_ids[1:], key=lambda index: tokens[index] in END_NAMES)
    if turns:
        writer.add_eot_token_id(turns[0])
        unknown = [tokens[index] for index in turns[1:] if tokens[index] not in END_NAMES]
        remarks += [f"llama.cpp will not end a text at {shown(token)}: GGUF names one such token" for token in unknown]
    writer.add_add_bos_token(add_bos and "bos" in ids)
    writer.add_add_eos_token(False)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)
    return remarks


def _list_tokens(found: TokenizerFolder, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each id below `rows`."""
    model, added = found.tokenizer["model"], found.tokenizer["added_tokens"]
    if model["type"] != "BPE":
        raise Refused(f"its model is {model['type']}, BPE expected")
    texts = {index: text for text, index in model["vocab"].items()}
    kinds = {}
    if model["byte_fallback"]:
        kinds = {model["vocab"][text]: BYTE for text in BYTE_TOKENS if text in model["vocab"]}
    for token in added:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise Refused(f"its token {shown(token['content'])} takes in the spaces beside it, or is a whole word")
    if model["byte_fallback"] and "unk" in found.special_ids:
        kinds[found.special_ids["unk"]] = UNKNOWN
    if max(texts) >= rows:
        raise Refused(f"it has the id {max(texts):,}, the embedding {rows:,} rows")
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(rows)]
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1 or "" in texts.values():
        raise Refused(f"its token {shown(token)} is there twice" if times > 1 else "it has an empty token")
    return tokens, [kinds.get(index, NORMAL if index in texts else UNUSED) for index in range(rows)]


def _write_gpt2(writer: "gguf.GGUFWriter", tokenizer: dict) -> list[str]:
    """Add the keys of byte-level BPE; returns remarks."""
    model, normalizer, pre_tokenizer = (tokenizer[part] for part in ("model", "normalizer", "pre_tokenizer"))
    name = find_name(pre_tokenizer, model["ignore_merges"])
    if name is None:
        raise Refused(
            f"its pre-tokenizer {json.dumps(pre_tokenizer, ensure_ascii=False)[:300]} (ignore_merges"
            f" {str(model['ignore_merges']).lower()}) is none of those that are known:"
            f" {', '.join(kind.names[0] for kind in PRE_TOKENIZERS)}"
        )
    _check_bpe(model)
    remarks = []
    if missing := [f"0x{byte:02X}" for byte, letter in _byte_letters().items() if letter not in model["vocab"]]:
        if model["unk_token"] is not None:
            raise Refused(f"it has no token for the bytes {', '.join(missing)} and an unknown token in their place")
        remarks.append(f"llama.cpp, too, leaves out {', '.join(missing)}, but does not join what stands beside them")
    if normalizer == {"type": "NFC"}:
        remarks.append("llama.cpp does not normalize texts (NFC): a letter and its accent apart get other ids there")
    elif normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        raise Refused(f"it changes texts with the normalizer {shown(normalizer)}, none or NFC expected")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_space_prefix(False)
    return remarks


def _write_llama(writer: "gguf.GGUFWriter", tokenizer: dict, tokens: list[str], types: list[int]) -> None:
    """Add the keys of BPE with scores."""
    _check_bpe(tokenizer["model"])
    if tokenizer["pre_tokenizer"] is not None:
        raise Refused(f"its pre-tokenizer {shown(tokenizer['pre_tokenizer'])}: with byte_fallback none is expected")
    steps = tokenizer["normalizer"] or {}
    steps = steps["normalizers"] if steps.get("type") == "Sequence" else [steps]
    add_space = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
    if steps[add_space:] != [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]:
        raise Refused(f"its normalizer {shown(tokenizer['normalizer'])} does not just write spaces as {SPACE}")
    if normalized := [token["content"] for token in tokenizer["added_tokens"] if token["normalized"]]:
        raise Refused(f"its token {shown(normalized[0])} is looked for after normalizing")
    if types.count(BYTE) < 256:
        raise Refused(f"it has {types.count(BYTE)} of the tokens <0x00> to <0xFF>")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    words = (token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL)
    writer.add_token_scores(scores_of(tokenizer["model"]["merges"], tokens, words))
    writer.add_add_space_prefix(add_space)


def _check_bpe(model: dict) -> None:
    """Check that BPE has no option that llama.cpp lacks."""
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"] or model["dropout"]:
        raise Refused("its BPE has a dropout, or marks the parts of words")
    if not model["merges"] or len({tuple(pair) for pair in model["merges"]}) < len(model["merges"]):
        raise Refused("its BPE has no merges, or one twice")


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte that occurs in UTF-8."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters, hidden = set(ByteLevel.alphabet()), iter(range(256, 512))  # these stand for unprintable bytes
    by_byte = [chr(byte) if chr(byte) in letters else chr(next(hidden)) for byte in range(256)]
    return {byte: letter for byte, letter in enumerate(by_byte) if byte not in NEVER_IN_UTF_8}


# --------------------------------------------------------------------------------------------------------- reading


def unpacked_tokenizer(path: Path) -> Path:
    """The cached folder of a GGUF file's tokenizer, named by its content; of a split file, the first part holds it.

    Raises:
        InputError: the tokenizer is damaged, or names an unknown pre-tokenizer.
    """
    path = files_of_set(path)[0]
    found = path.stat()
    return _unpacked_tokenizer(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # reading tens of thousands of tokens takes seconds, and several callers ask
def _unpacked_tokenizer(path: Path, size: int, modified: int) -> Path:
    fields = GGUFFile(path).fields
    content = hashlib.sha256(READ_BY.to_bytes(4, "little"))
    for key in sorted(key for key in fields if key.startswith("tokenizer.")):
        content.update(f"{key} {[*map(int, fields[key].types)]} {fields[key].count}\n".encode())
        content.update(fields[key].content)
    folder = cache_folder() / "tokenizers" / content.hexdigest()[:24]
    return cached_folder(folder, "tokenizer.json", lambda target: read_tokenizer(fields, target, path))


def read_tokenizer(fields: Mapping[str, Value], target: str | Path, source: str | Path) -> None:
    """Write the tokenizer of a GGUF file as a folder.

    Args:
        fields: of a `GGUFFile`.
        target: receives tokenizer.json, tokenizer_config.json and generation_config.json (all ids that end a text).
        source: the file, for messages.

    Raises:
        InputError: the tokenizer is damaged, or cannot be reproduced exactly; nothing is written.
    """
    from tokenizers import Tokenizer

    target = Path(target)
    try:
        vocabulary = _Vocabulary(fields)
        if vocabulary.model == "gpt2":
            parts = _gpt2_parts(fields, vocabulary)
        elif vocabulary.model == "llama":
            parts = _llama_parts(fields, vocabulary)
        else:
            raise Refused(f"tokenizer.ggml.model is {shown(vocabulary.model)}, gpt2 or llama expected")
        template = single_value(fields, "tokenizer.chat_template", str)
        if template is not None and len(template) > MOST_TEMPLATE_CHARACTERS:
            raise Refused(f"the chat template has {len(template):,} characters, at most {MOST_TEMPLATE_CHARACTERS:,}")
        with library_errors("the tokenizers library refuses it"):
            tokenizer = Tokenizer.from_str(json.dumps(vocabulary.as_json(parts)))
    except (Refused, InputError) as error:
        raise InputError(f"{source}: its tokenizer cannot be used: {error}") from error
    with replacing(target / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))
    write_json(target / "tokenizer_config.json", vocabulary.config() | {"chat_template": template})
    write_json(target / "generation_config.json", vocabulary.generation_config())


class _Vocabulary:
    """The tokens of a GGUF file and their roles, checked.

    Attributes:
        model: "gpt2", "llama" or another.
        tokens: without unused ones at the end, [PAD…], which only fill the embedding.
        ids: token -> id.
        types: one per token; all 0 if the file has none.
        special_ids: ids of those of "bos", "eos", "unk" and "pad" that exist.
        end_ids: ids that end a text, ascending.

    Raises:
        Refused: with what was found.
    """

    def __init__(self, fields: Mapping[str, Value]):
        self.model = single_value(fields, "tokenizer.ggml.model", str)
        if self.model is None:
            raise Refused("there is no tokenizer.ggml.model: the file has no tokenizer")
        self.pre = single_value(fields, "tokenizer.ggml.pre", str) or ""
        self.tokens = list_of_values(fields, "tokenizer.ggml.tokens", str, MOST_TOKENS)
        types = list_of_values(fields, "tokenizer.ggml.token_type", int, MOST_TOKENS)
        self.types = types or [0] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise Refused(f"there are {len(self.tokens):,} tokens and {len(self.types):,} token types")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self._check_tokens()
        self._find_special_ids(fields)
        last = max([*self.special_ids.values(), *self.end_ids])
        while len(self.tokens) > last + 1 and self.types[-1] == UNUSED and self.tokens[-1].startswith("[PAD"):
            self.types.pop()
            del self.ids[self.tokens.pop()]
        llama = self.model == "llama"
        defaults = {"bos": llama or (self.pre in BY_NAME and BY_NAME[self.pre].add_bos), "eos": False}
        self.adds = {}  # whether a text begins with the bos, ends with the eos
        for name, default in defaults.items():
            added = single_value(fields, f"tokenizer.ggml.add_{name}_token", bool)
            self.adds[name] = (default if added is None else added) and name in self.special_ids

    def _check_tokens(self) -> None:
        if not self.tokens:
            raise Refused("there are no tokens")
        if len(self.ids) < len(self.tokens):
            index = next(index for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise Refused(f"the token {shown(self.tokens[index])} is there twice, with the ids {index} and more")
        if "" in self.ids:
            raise Refused(f"the token with the id {self.ids['']} is empty")
        if (longest := max(map(len, self.tokens))) > MOST_CHARACTERS:
            raise Refused(f"a token has {longest:,} characters, at most {MOST_CHARACTERS:,} expected")

    def _find_special_ids(self, fields: Mapping[str, Value]) -> None:
        defaults = {"bos": 1, "eos": 2, "unk": 0} if self.model == "llama" else {}
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
        ids = {}
        for name, key in keys.items():
            index = single_value(fields, f"tokenizer.ggml.{key}_token_id", int)
            index = defaults.get(name) if index is None else index
            if index is not None and not 0 <= index < len(self.tokens):
                raise Refused(f"tokenizer.ggml.{key}_token_id is {index}, an id below {len(self.tokens):,} expected")
            if index is not None:
                ids[name] = index
        if "eos" not in ids:
            raise Refused("there is no tokenizer.ggml.eos_token_id, which ends each text")
        self.special_ids = {name: ids[name] for name in ("bos", "eos", "unk", "pad") if name in ids}
        self.end_ids = sorted(
            {ids[name] for name in ("eos", "eot", "eom") if name in ids} | self.known_by_name(END_NAMES)
        )

    def known_by_name(self, names: set[str]) -> set[int]:
        """Ids of tokens with these names, except ordinary words: in Qwen 3, `</s>` is one, from HTML."""
        return {self.ids[name] for name in names if name in self.ids and self.types[self.ids[name]] != NORMAL}

    def added_tokens(self) -> list[dict]:
        """The `added_tokens` of a tokenizer.json, which match in a text before all others."""
        special = {*self.special_ids.values(), *self.end_ids}
        special |= self.known_by_name(GAP_NAMES)
        special |= {index for index, kind in enumerate(self.types) if kind in (CONTROL, UNKNOWN)}
        return [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": index in special,
            }
            for index, token in enumerate(self.tokens)
            if index in special or self.types[index] == USER_DEFINED
        ]

    def as_json(self, parts: dict) -> dict:
        """tokenizer.json: these parts, with the vocabulary added to `model`."""
        added = self.added_tokens()
        # Added tokens past all others stay out of the model's vocabulary: with ignore_merges, a word that spells one
        # would become it. Those between others must be in it to keep their ids.
        last = len(self.tokens)
        for token in reversed(added):
            last -= token["id"] == last - 1
        vocab = {token: index for index, token in enumerate(self.tokens[:last])}
        options = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": self._post_processor(),
            **parts,
            "model": options | parts["model"] | {"vocab": vocab},
        }

    def _post_processor(self) -> dict | None:
        """The post-processor that adds bos and eos when a caller asks for special tokens."""
        if not any(self.adds.values()):
            return None
        texts = {name: self.tokens[self.special_ids[name]] for name, added in self.adds.items() if added}

        def around(sequence: str, kind: int) -> list[dict]:
            pieces = {name: {"SpecialToken": {"id": text, "type_id": kind}} for name, text in texts.items()}
            middle = {"Sequence": {"id": sequence, "type_id": kind}}
            return [piece for piece in (pieces.get("bos"), middle, pieces.get("eos")) if piece]

        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": around("A", 0) + around("B", 1),
            "special_tokens": {
                text: {"id": text, "ids": [self.ids[text]], "tokens": [text]} for text in texts.values()
            },
        }

    def config(self) -> dict:
        """tokenizer_config.json without the chat template."""
        names = {name: self.tokens[index] for name, index in self.special_ids.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": names.get(name) for name in ("bos", "eos", "unk", "pad")},
            **{f"add_{name}_token": added for name, added in self.adds.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }

    def generation_config(self) -> dict:
        """generation_config.json."""
        ids = {name: self.special_ids[name] for name in ("bos", "pad") if name in self.special_ids}
        ends = self.end_ids if len(self.end_ids) > 1 else self.end_ids[0]
        return {"eos_token_id": ends} | {f"{name}_token_id": index for name, index in ids.items()}


def _gpt2_parts(fields: Mapping[str, Value], vocabulary: _Vocabulary) -> dict:
    """The parts of a tokenizer.json for byte-level BPE, without the vocabulary."""
    if vocabulary.pre not in BY_NAME:
        names = ", ".join(filter(None, BY_NAME))
        raise Refused(f"tokenizer.ggml.pre is {shown(vocabulary.pre)}, which is not known; expected one of {names}")
    kind, merges = BY_NAME[vocabulary.pre], {}
    listed = list_of_values(fields, "tokenizer.ggml.merges", str, MOST_MERGES)
    if not listed:
        raise Refused("there are no tokenizer.ggml.merges")
    for number, merge in enumerate(listed):
        left, _, right = merge.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise Refused(f"tokenizer.ggml.merges: {shown(merge)} (number {number}) is not two tokens that make one")
        if vocabulary.types[vocabulary.ids[left + right]] not in (CONTROL, UNKNOWN):
            merges[left, right] = None  # llama.cpp uses the first of two equal merges
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": kind.ignore_merges}
    return {
        "normalizer": None,
        "pre_tokenizer": as_json(kind.splits),
        "decoder": byte_level,
        "model": model | {"merges": [list(pair) for pair in merges]},
    }


def _llama_parts(fields: Mapping[str, Value], vocabulary: _Vocabulary) -> dict:
    """The parts of a tokenizer.json for SentencePiece's BPE, without the vocabulary."""
    missing = [token for token in BYTE_TOKENS if token not in vocabulary.ids]
    if missing:
        raise Refused(f"{len(missing)} of the tokens <0x00> to <0xFF> are missing, {missing[0]} first")
    add_space = single_value(fields, "tokenizer.ggml.add_space_prefix", bool) is not False
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    if "unk" in vocabulary.special_ids:
        model["unk_token"] = vocabulary.tokens[vocabulary.special_ids["unk"]]
    normalizers = [{"type": "Prepend", "prepend": SPACE}, spaces]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if add_space else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"merges": _merges(fields, vocabulary)},
    }


def _merges(fields: Mapping[str, Value], vocabulary: _Vocabulary) -> list[list[str]]:
    """The list of merges that is equivalent to the file's scores."""
    scores = list_of_values(fields, "tokenizer.ggml.scores", float, MOST_TOKENS)
    if len(scores) < len(vocabulary.tokens):
        raise Refused(f"there are {len(scores):,} scores for {len(vocabulary.tokens):,} tokens")
    # Added tokens match before merging; byte tokens never come from merging.
    others = {token["content"] for token in vocabulary.added_tokens()} | set(BYTE_TOKENS)
    words = {word: score for word, score in zip(vocabulary.tokens, scores, strict=False) if word not in others}
    return merges_of(words, vocabulary.ids)

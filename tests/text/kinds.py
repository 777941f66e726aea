"""Small tokenizers of every kind, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.conftest import CHAT_TEMPLATE

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=True) for token in tokens]


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "</", "s>"])}
    merges = [("<", "/"), ("s", ">")]
    if not ignore_merges:  # what is merged can be a control token too
        merges.append(("</", "s>"))
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return backend


def byte_fallback() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *BYTES, "▁", *"甲乙春风"]
    backend = Tokenizer(
        models.BPE(
            {token: n for n, token in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return backend


def with_prefix_space() -> Tokenizer:
    """GPT-2's bytes with the space before a text that RoBERTa's have."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def first_only() -> Tokenizer:
    """Llama 2's newer form: a space before a text, none after a token within it."""
    backend = unigram(fallback=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return backend


def without_prefix() -> Tokenizer:
    """Gemma's: a space is a token like others."""
    backend = byte_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram(fallback: bool = False) -> Tokenizer:
    words = ["▁", *"甲乙丙丁</>s"] if not fallback else ["▁", *"甲乙", *BYTES]
    vocabulary = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(word, -5.0) for word in words]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=fallback))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if fallback:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return backend


def words(kind: type) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", "甲乙", "丙", "a", "b", "<", "##/", "##s", "##>", "</s", "##甲"]
    backend = Tokenizer(kind({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend  # its control tokens stand in the vocabulary only


def not_special() -> Tokenizer:
    """An eos that is an added token like others, and one that is not a control token."""
    backend = unigram()
    content = json.loads(backend.to_str())
    content["added_tokens"][2]["special"] = False
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": 12, "content": "<end>", **common}, {"id": 13, "content": "<思考>", **common}]
    return Tokenizer.from_str(json.dumps(content))


KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE that takes whole words": lambda: byte_level(ignore_merges=True),
    "BPE with bytes": byte_fallback,
    "byte-level BPE with a space before a text": with_prefix_space,
    "BPE with bytes and no space before a text": without_prefix,
    "Unigram": unigram,
    "Unigram with a space before the first word": first_only,
    "Unigram with bytes": lambda: unigram(fallback=True),
    "WordPiece": lambda: words(models.WordPiece),
    "WordLevel": lambda: words(models.WordLevel),
    "an eos that is not special": not_special,
}


def write_tokenizer(folder: Path, backend: Tokenizer, **config) -> Path:
    """Write a tokenizer as a folder, with `<s>` and `</s>` as bos and eos unless the config says otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if backend.token_to_id("<end>") is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, backend.token_to_id("<end>")]}))
    return folder

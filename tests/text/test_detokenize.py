"""Streaming text: whole characters only, nothing lost, nothing stalled."""

import random

import pytest

from model.text.detokenize import BYTE_ALPHABET, new_detokenizer
from model.text.tokenization import encode_texts, load_tokenizer
from tests.text.kinds import KINDS, write_tokenizer

TEXTS = [
    "中国是一个历史悠久的国家。长江、黄河！",
    "emoji 👩‍👩‍👧 🇨🇳 é e\u0301, tabs\tand\nnewlines",
    "\ufffd at the start, \ufffd\ufffd in the middle, 中\ufffd国 and at the end \ufffd",
    "</s> spelled out <s>",
]


def bytes_as_ids(tokenizer, data: bytes) -> list[int]:
    """One token a byte: the longest way to write a text, and the only one for broken bytes."""
    character = {byte: character for character, byte in BYTE_ALPHABET.items()}
    return [tokenizer.convert_tokens_to_ids(character[byte]) for byte in data]


def stream(tokenizer, ids) -> list[str]:
    detokenizer = new_detokenizer(tokenizer)
    return [*(detokenizer.push(index) for index in ids), detokenizer.flush()]


@pytest.mark.long
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("by_bytes", [False, True])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text, by_bytes):
    ids = bytes_as_ids(tokenizer, text.encode()) if by_bytes else encode_texts(tokenizer, [text])[0]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""  # nothing was held back once the text was complete
    for n in range(len(ids) + 1):  # stopped anywhere: a prefix of the text, then at most one broken character
        cut = stream(tokenizer, ids[:n])
        assert text.startswith("".join(cut[:-1]))
        assert cut[-1] in ("", "\ufffd")


def test_a_character_is_shown_as_soon_as_it_is_complete(tokenizer):
    assert stream(tokenizer, bytes_as_ids(tokenizer, "a中\ufffd😀".encode())) == (
        ["a", "", "", "中", "", "", "\ufffd", "", "", "", "😀", ""]
    )


def test_any_bytes_decode_as_python_decodes_them_whole(tokenizer):
    dice = random.Random(0)
    parts = ["中".encode(), "😀".encode(), b"\xff", b"\xe4\xb8", b"\xf0\x9f", b"\x80", b"a", "\ufffd".encode()]
    for _ in range(500):
        data = b"".join(dice.choices(parts, k=12))
        assert "".join(stream(tokenizer, bytes_as_ids(tokenizer, data))) == data.decode("utf-8", "replace")


def test_control_tokens_and_unknown_ids_give_no_text(tokenizer):
    ids = [1, *bytes_as_ids(tokenizer, "中".encode()), 2, 0, 999_999]
    assert "".join(stream(tokenizer, ids)) == "中"


def byte_fallback_tokenizer():
    """As SentencePiece makes them: a mark for the space, and a token for each byte of the characters it lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "▁hello", "▁world", "中", "!", "▁"]
    vocabulary = {token: n for n, token in enumerate(words + [f"<0x{byte:02X}>" for byte in range(256)])}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_other_tokenizers_stream_whole_characters_too():
    tokenizer = byte_fallback_tokenizer()
    emoji = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
    ids = tokenizer.convert_tokens_to_ids(["▁hello", "▁world", "中"]) + emoji + [2, 6]

    assert stream(tokenizer, ids) == ["hello", " world", "中", "", "", "", "😀", "", "!", ""]

    after_prompt = new_detokenizer(tokenizer, [1, 3])
    assert after_prompt.push(4) == " world"  # the space between the prompt and its continuation

    broken = new_detokenizer(tokenizer)  # bytes that never become a character do not stall the stream
    pieces = [broken.push(emoji[1]) for _ in range(5)] + [broken.push(3)]
    assert "\ufffd" in "".join(pieces) and "".join(pieces).endswith("hello")


PIECES = ["魑", "魅", "春", "风", "甲", "a", " ", "  ", "b c", "😀", "👩\u200d👧", "é", "\ufffd", "\n", "</s>"]


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE with bytes", "Unigram with bytes"])
def test_the_text_is_right_wherever_the_prompt_ends(tmp_path, kind):
    """Also within a character: what a prompt's ids show, and what follows them, join to the whole."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, KINDS[kind]()))
    dice = random.Random(1)
    for _ in range(200):
        text = "".join(dice.choices(PIECES, k=dice.randrange(1, 12)))
        if kind == "Unigram with bytes":
            text = text.lstrip(" ")  # this one takes a space at the start for its own
        ids = encode_texts(tokenizer, [text])[0]
        for cut in range(len(ids) + 1):
            first, second = new_detokenizer(tokenizer, [1]), new_detokenizer(tokenizer, [1, *ids[:cut]])
            before = "".join(map(first.push, ids[:cut]))
            after = "".join(map(second.push, ids[cut:]))
            assert before + after == text and second.flush() == ""


def test_a_long_run_of_byte_tokens_before_the_answer(tmp_path):
    """The window of tokens that an earlier version decoded began within a character here."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, KINDS["BPE with bytes"]()))
    for prompt, answer in (
        ("魑", "魅魍魉"),
        ("魑魅", "魍魉"),
        ("魑魅魍", "魉。"),
        ("春风魑魅魍", "魉。"),
        ("魑魅魍春风", "魉"),
    ):
        whole, ids = encode_texts(tokenizer, [prompt + answer, prompt])
        detokenizer = new_detokenizer(tokenizer, [1, *ids])
        assert [*map(detokenizer.push, whole[len(ids) :]), detokenizer.flush()][-1] == ""
        detokenizer = new_detokenizer(tokenizer, [1, *ids])
        assert "".join(map(detokenizer.push, whole[len(ids) :])) == answer


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram"])
def test_spaces_stand_where_a_whole_text_has_them(tmp_path, kind):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, KINDS[kind]()))
    for text in ("甲乙 a b 丙", "a", "甲乙甲 丙 < b"):
        ids = encode_texts(tokenizer, [text])[0]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for cut in range(len(ids) + 1):
            first, second = new_detokenizer(tokenizer, [1]), new_detokenizer(tokenizer, [1, *ids[:cut]])
            assert "".join(map(first.push, ids[:cut])) + "".join(map(second.push, ids[cut:])) == whole

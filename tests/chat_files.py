"""Token files of chats, made by hand in the form of tests/conftest.py's CHAT_TEMPLATE, as an oracle of their form."""

import hashlib
from pathlib import Path

import numpy as np

from model.text.tokenization import encode_texts, load_tokenizer, tokenizer_sha256, vocabulary_size
from model.token_file.manifest import Manifest, ends_path, file_sha256, learn_path, write_manifest

Chat = list[tuple[str, str]]  # (role, content) of each message

CHATS: list[Chat] = [
    [("user", f"第{n}问：{first}"), ("assistant", answer), ("user", "还有呢？"), ("assistant", answer[::-1])]
    if n % 3 == 0
    else [("system", "答得短些。"), ("user", f"第{n}问：{first}"), ("assistant", answer)]
    if n % 3 == 1
    else [("user", first), ("assistant", answer * (1 + n % 4))]
    for n, (first, answer) in enumerate(
        [
            ("中国？", "国家。"),
            ("长江？", "在中国。"),
            ("你好", "你好！"),
            ("The fox?", "quick brown fox."),
            ("黄河？", "河"),
        ]
        * 30
    )
]


def ids_of(tokenizer, chat: Chat, last_only: bool = False) -> tuple[list[int], list[int]]:
    """Ids of a chat, and 1 for each that is learned: of all answers, or of the last only."""
    ids, learned = [], []
    newline = encode_texts(tokenizer, ["\n"])[0]
    for place, (role, content) in enumerate(chat):
        header, text = encode_texts(tokenizer, [f"{role}\n", content])
        assert encode_texts(tokenizer, [f"{role}\n{content}"])[0] == header + text
        ids += [tokenizer.bos_token_id, *header, *text, tokenizer.eos_token_id, *newline]
        is_answer = int(role == "assistant" and (not last_only or place == len(chat) - 1))
        learned += [0] * (1 + len(header)) + [is_answer] * (len(text) + 1) + [0] * len(newline)
    return ids, learned


def write_chats(path: Path, chats: list[Chat], tokenizer_folder: Path | None, pairs: bool = False, **changes) -> Path:
    """A token file of chats, or of pairs of them; `changes` go into the manifest's `chat`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = [ids_of(tokenizer, chat, pairs) for chat in chats]
    changes |= {"pairs": True} if pairs else {}
    ids = np.array([index for document, _ in documents for index in document], dtype="<u2")
    learned = np.array([flag for _, flags in documents for flag in flags], dtype=np.uint8)
    ids.tofile(path)
    learned.tofile(learn_path(path))
    np.cumsum([len(document) for document, _ in documents]).astype("<u8").tofile(ends_path(path))
    chat = {
        "learn_sha256": file_sha256(learn_path(path)),
        "ends_sha256": file_sha256(ends_path(path)),
        "learned": int(learned.sum()),
        "turns": sum(role == "assistant" for chat in chats for role, _ in chat),
        "template_sha256": hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest(),
        "end_ids": [tokenizer.eos_token_id],
    }
    write_manifest(
        path,
        Manifest(
            "uint16", vocabulary_size(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, len(ids), len(chats),
            tokenizer_sha256(tokenizer_folder), "test", file_sha256(path), chat=chat | changes,
        ),
    )  # fmt: skip
    return path


def write_pairs(path: Path, pairs: list[tuple[Chat, Chat]], tokenizer_folder: Path | None, **changes) -> Path:
    """A token file of pairs, each the chosen chat and the rejected one, of which the last answers are learned."""
    return write_chats(path, [chat for pair in pairs for chat in pair], tokenizer_folder, True, **changes)

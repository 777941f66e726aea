"""Pairs of answers to one question, of which the first is preferred: {"chosen": …, "rejected": …}.

Each of the two is a whole chat, as a list of messages in the forms of `model.corpus.chats`, or only the answer, as a
string, a message or a list of it. Then the question stands beside them: as `prompt` or `question` (a string or
messages), as the messages of `conversations` or `messages`, or as Alpaca's `instruction` and `input`.

The two chats of a usable pair differ in their last message alone, and only that is learned.
"""

from model.corpus.chats import (
    ANSWERS,
    KEYS,
    MESSAGE_KEYS,
    ROLES,
    UNLEARNED,
    Chat,
    UnusableChat,
    parse_chat,
    read_chat,
)

CHOSEN, REJECTED = "chosen", "rejected"
PAIR_KEYS = (*KEYS, "question", CHOSEN, REJECTED)
PAIR_REASONS = {  # parts name them by their place: new ones go to the end
    "no_pair": "an object without chosen and rejected",
    "half_a_pair": "an object with only one of chosen and rejected",
    "no_question": "two answers without the question that they answer",
    "different_questions": "a chosen and a rejected chat that differ before their last answer, or from the prompt",
    "same_answers": "a pair whose two answers are the same",
}


def is_pair(value: dict) -> bool:
    """Whether an object has the keys of a pair. In a table of several forms they are null where a row is none."""
    return CHOSEN in value and REJECTED in value and not value[CHOSEN] is value[REJECTED] is None


def parse_pair(raw: bytes, escapes: bool = True) -> tuple[Chat | None, str]:
    """(the messages of the chosen chat and those of the rejected one, "pairs") of a line of JSONL; (None, a key of
    REASONS) for one that is no usable pair. Both have as many messages: `halves` parts them."""
    return parse_chat(raw, escapes, read_pair)


def halves(messages: Chat) -> tuple[Chat, Chat]:
    """The chosen and the rejected chat, of the messages of both."""
    middle = len(messages) // 2
    return messages[:middle], messages[middle:]


def read_pair(value: dict) -> tuple[str, Chat]:
    """("pairs", the messages of both chats) of an object. Only the last answer of each is learned.

    Raises:
        UnusableChat: it is no pair that can be used.
    """
    found = [value.get(key) for key in (CHOSEN, REJECTED)]
    missing = [answer is None or answer in ("", []) for answer in found]
    if any(missing):
        raise UnusableChat("no_pair" if not value.keys() & {CHOSEN, REJECTED} else "half_a_pair")
    chosen, rejected = (_with_one_learned(_chat_of(value, answer)) for answer in found)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableChat("different_questions")
    if chosen == rejected:
        raise UnusableChat("same_answers")
    return "pairs", chosen + rejected


def _chat_of(value: dict, answer) -> Chat:
    """The chat that ends in this answer, which may itself be a whole chat."""
    system, prompt = {"system": value.get("system")}, value.get("prompt") or value.get("question")
    if isinstance(answer, dict) and not any(isinstance(column, list) for column in answer.values()):
        answer = [answer]
    is_table = isinstance(answer, dict)
    is_messages = isinstance(answer, list) and any(isinstance(item, dict) and "type" not in item for item in answer)
    if is_table or (is_messages and not _is_answer(answer)):
        chat = read_chat(system | {"messages": answer})[1]
        if prompt:  # it says the same
            asked = read_chat(system | {"prompt": prompt, "completion": "x"})[1][:-1]
            if [message for message in chat[:-1] if message[0] != "system"] != [m for m in asked if m[0] != "system"]:
                raise UnusableChat("different_questions")
        return chat
    if prompt:
        return read_chat(system | {"prompt": prompt, "completion": answer})[1]
    for key in MESSAGE_KEYS:
        if isinstance(value.get(key), list) and value[key]:
            ending = answer if is_messages else [{"role": "assistant", "content": answer}]
            return read_chat(system | {"messages": [*value[key], *ending]})[1]
    if value.get("instruction") or value.get("input"):
        asked = {key: value.get(key) for key in ("instruction", "input", "history")}
        output = answer[-1].get("content", answer[-1].get("value")) if is_messages else answer
        return read_chat(system | asked | {"output": output})[1]
    raise UnusableChat("no_question")


def _is_answer(messages: list) -> bool:
    """Whether messages are an answer alone."""
    first = messages[0] if isinstance(messages[0], dict) else {}
    name = first.get("role", first.get("from"))
    return len(messages) == 1 and isinstance(name, str) and ROLES.get(name.strip().lower()) == "assistant"


def _with_one_learned(chat: Chat) -> Chat:
    if chat[-1][0] == UNLEARNED:
        raise UnusableChat("nothing_learned")
    return (*((UNLEARNED if role in ANSWERS else role, content) for role, content in chat[:-1]), chat[-1])

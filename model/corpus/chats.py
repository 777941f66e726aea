"""Chats in the forms that are common: recognised by their keys, read into one list of messages.

    OpenAI        {"messages": [{"role": "user", "content": …}, …]}; a content may be a list of text parts
    ShareGPT      {"conversations": [{"from": "human", "value": …}, …], "system": …}
    MiniMind      {"conversations": [{"role": "user", "content": …}, …]}
    Alpaca        {"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}
    MiniMind v1   CSV: history,q,a, where history is a Python literal, [[question, answer], …]
    prompt        {"prompt": …, "completion": …}, each a string or a list of messages

A usable chat is an optional system message, then questions of the user and answers of the assistant in turn; the last
message is an answer. Everything else is rejected under a reason that names the fault; nothing is repaired silently.

A list of messages may also be a table, as some Parquet files hold it: {"from": ["human", "gpt"], "value": [..., ...]}.
An answer whose message has the weight 0, as in OpenAI's files, is read but not learned.
"""

import ast
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain

try:
    import orjson  # optional: the same chats, in half of the time
except ImportError:
    orjson = None

from model.corpus.jsonl import parse_object

# (role, content) of each message; the roles are system, user, assistant, and UNLEARNED.
Chat = tuple[tuple[str, str], ...]
UNLEARNED = "assistant, not learned"  # the role of an answer of the weight 0
ANSWERS = {"assistant", UNLEARNED}

MESSAGE_KEYS = ("messages", "conversations", "conversation", "dialogue", "chat")
NAMES_OF_MESSAGES = (("role", "content"), ("from", "value"))  # keys of a message
KEYS = (*MESSAGE_KEYS, "system", "instruction", "input", "output", "history", "q", "a", "prompt", "completion")
ROLES = {  # the spellings in use, in lower case
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "function_call", "observation", "tool_response", "ipython"), "tool"),
}
_SPEAKERS = {name: role for name, role in ROLES.items() if role != "tool"}
BAD_ROW = "csv"  # the only key of what stands for a row of CSV that cannot be read: its text
TEXT_PARTS = ("text", "input_text", "output_text")  # types of the parts of a content
MAX_HISTORY_CHARACTERS = 1 << 20  # of a Python literal, which takes a hundred times its size to parse
CHAT_REASONS = {  # parts name them by their place: new ones go to the end
    "no_chat": "an object that is a chat in none of the forms that data processing reads",
    "bad_message": "a message that is not an object with a role and a content",
    "unknown_role": "a message whose role is none of system, user, assistant, or their other common names",
    "tool_calls": "a chat that calls tools",
    "not_text": "a content that is not text, such as an image, a number or an object",
    "bad_history": "a history that is not a list of pairs of question and answer",
    "no_answer": "a chat without a message of the assistant",
    "roles_out_of_order": "questions and answers that do not take turns, or a system message that is not the first",
    "unanswered": "a chat whose last message is not an answer",
    "empty_question": "a message of the user without text",
    "empty_answer": "an answer without text",
    "template_refuses": "a chat that the tokenizer's chat template refuses, or whose contents it changes",
    "cannot_mask": "a chat in which the tokens of an answer cannot be told from those around it",
    "bad_weight": "an answer of a weight other than 0 and 1",
    "nothing_learned": "a chat whose answers all have the weight 0",
}


class UnusableChat(Exception):
    """A chat that cannot be used; its argument is a key of CHAT_REASONS."""


def parse_chat(
    raw: bytes, escapes: bool = True, read: "Callable[[dict], tuple[str, Chat]] | None" = None
) -> tuple[Chat | None, str]:
    """(chat, its form) of a line of JSONL, (None, a key of REASONS) for one that is no usable chat.

    White space around contents is cut off.

    Args:
        escapes: whether the line may hold \\u escapes (`jsonl.holds_escapes`).
        read: reads the line's object; None: `read_chat`.
    """
    value, escapes_left = None, escapes
    if orjson is not None:
        try:
            value, escapes_left = orjson.loads(raw), False  # it takes no lone surrogates
        except ValueError:  # say why below; json also takes what orjson doesn't
            pass
    if value is None:
        value, reason = parse_object(raw)
        if value is None:
            return None, reason
    if not isinstance(value, dict):
        return None, "not_an_object"
    if value.keys() == {BAD_ROW}:
        return None, "bad_row"
    try:
        form, chat = (read or read_chat)(value)
    except UnusableChat as error:
        return None, error.args[0]
    if escapes_left:  # only an escape can make a lone surrogate, which is JSON, but no text
        try:
            "".join(content for _, content in chat).encode("utf-8")
        except UnicodeEncodeError:
            return None, "bad_utf8"
    return chat, form


def read_chat(value: dict) -> tuple[str, Chat]:
    """(form, chat) of an object.

    Raises:
        UnusableChat: it is no chat that can be used.
    """
    form = form_of(value)
    if form is None:
        raise UnusableChat("no_chat")
    messages = _READERS[form](value)
    system = value.get("system")
    if system not in (None, "") and ("system", _text(system)) not in messages[:1]:
        messages.insert(0, ("system", _text(system)))
    if messages and messages[0] == ("system", ""):
        del messages[0]
    return form, check_turns(messages)


def form_of(value: dict) -> str | None:
    """The form of the chat that an object holds, a key of FORMS, judged by its keys; None where it holds none."""
    key, messages = _find_messages(value)
    if key:
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if "from" in first and "role" not in first:
            return "sharegpt"
        return "openai" if key == "messages" else "minimind"
    forms = [form for form, keys in KEYS_OF_FORM.items() if keys <= value.keys()]
    if len(forms) > 1:  # a table of several forms has null where a row has nothing
        forms = [form for form in forms if any(value[name] is not None for name in KEYS_OF_FORM[form])] or forms
    return forms[0] if forms else None


def _find_messages(value: dict) -> tuple[str | None, list]:
    """The key of the messages and their list; (None, []) where there are none."""
    for key in MESSAGE_KEYS:
        messages = value.get(key)
        if isinstance(messages, list):
            return key, messages
        if isinstance(messages, dict) and (rows := _rows(messages)) is not None:
            return key, rows
    return None, []


def _rows(table: dict) -> list | None:
    """The messages of a table, {"from": [...], "value": [...]}; None where it is no such table."""
    if not any(all(isinstance(table.get(name), list) for name in names) for names in NAMES_OF_MESSAGES):
        return None
    columns = {name: column for name, column in table.items() if isinstance(column, list)}
    if len(set(map(len, columns.values()))) > 1:
        return [None]  # no message: which belong together is unknown
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_turns(messages: Sequence[tuple[str, str]]) -> Chat:
    """The messages of a chat as a tuple.

    Raises:
        UnusableChat: they are not questions and answers in turn, behind a system message at most; or one is empty.
    """
    if reason := _fault_of_roles(tuple([role for role, _ in messages])):
        raise UnusableChat(reason)
    if reason := empty_reason(messages):
        raise UnusableChat(reason)
    return tuple(messages)


@lru_cache(maxsize=1024)
def _fault_of_roles(roles: tuple[str, ...]) -> str | None:
    """Why messages of these roles make no chat; None if they do."""
    if not ANSWERS & {*roles}:
        return "no_answer"
    turns = roles[1:] if roles[0] == "system" else roles
    if set(turns[::2]) != {"user"} or not set(turns[1::2]) <= ANSWERS:
        return "roles_out_of_order"
    if roles[-1] not in ANSWERS:
        return "unanswered"
    return None if "assistant" in roles else "nothing_learned"


def empty_reason(messages: Iterable[tuple[str, str]]) -> str | None:
    """Why messages without text make a chat unusable; None where there are none."""
    for role, content in messages:
        if not content and role != "system":
            return "empty_answer" if role in ANSWERS else "empty_question"
    return None


def _read_messages(value: dict) -> list[tuple[str, str]]:
    _, listed = _find_messages(value)
    for role, content in NAMES_OF_MESSAGES:  # the usual case, ten times as fast
        try:
            if sum(map(len, listed)) == 2 * len(listed):
                return [(_SPEAKERS[message[role]], message[content].strip()) for message in listed]
        except (KeyError, TypeError, AttributeError):
            pass
    return list(map(_message, listed))


def _message(message) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise UnusableChat("bad_message")
    name = message["role"] if "role" in message else message.get("from")
    if not isinstance(name, str):
        raise UnusableChat("bad_message")
    role = ROLES.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        raise UnusableChat("unknown_role")
    calls = message.get("tool_calls") or message.get("function_call")
    if role == "tool" or (calls and calls not in ("[]", "null", "{}")):  # MiniMind writes them as strings of JSON
        raise UnusableChat("tool_calls")
    if role == "assistant" and (weight := message.get("weight")) is not None:
        if weight not in (0, 1):
            raise UnusableChat("bad_weight")
        role = role if weight else UNLEARNED
    if "content" in message:
        return role, _text(message["content"])
    if "value" not in message:
        raise UnusableChat("bad_message")
    return role, _text(message["value"])


def _text(content) -> str:
    """A content as one text, stripped: a string, nothing, or a list of parts that are all text."""
    if isinstance(content, str):
        return content.strip()
    if content is None:
        return ""
    if not isinstance(content, list):
        raise UnusableChat("not_text")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
        if not isinstance(text, str):
            raise UnusableChat("not_text")
        parts.append(text)
    return "".join(parts).strip()


def _read_alpaca(value: dict) -> list[tuple[str, str]]:
    asked = [text for key in ("instruction", "input") if (text := _text(value.get(key)))]
    return [*_history(value.get("history")), ("user", "\n".join(asked)), ("assistant", _text(value["output"]))]


def _read_v1(value: dict) -> list[tuple[str, str]]:
    return [*_history(value.get("history")), ("user", _text(value["q"])), ("assistant", _text(value["a"]))]


def _literal(text: str):
    """The value of a Python literal, or of JSON; never evaluated.

    Raises:
        UnusableChat: it is neither.
    """
    if text.strip().lower() in ("", "nan", "null", "none", "[]"):
        return None
    if len(text) > MAX_HISTORY_CHARACTERS:
        raise UnusableChat("bad_history")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes such as \d
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableChat("bad_history") from None


def _history(history) -> list[tuple[str, str]]:
    """The messages of earlier turns: a list of pairs, or its Python literal."""
    if isinstance(history, str):
        history = _literal(history)
    if history is None:
        return []
    if not isinstance(history, list | tuple):
        raise UnusableChat("bad_history")
    messages = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UnusableChat("bad_history")
        messages += [("user", pair[0].strip()), ("assistant", pair[1].strip())]
    return messages


def _read_prompt(value: dict) -> list[tuple[str, str]]:
    messages = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        given = value[key]
        is_messages = isinstance(given, list) and any(isinstance(item, dict) and "type" not in item for item in given)
        messages += map(_message, given) if is_messages else [(role, _text(given))]
    return messages


KEYS_OF_FORM = {  # of the forms that are not lists of messages; the order decides where several are there
    "alpaca": {"instruction", "output"},
    "minimind_v1": {"q", "a"},
    "prompt": {"prompt", "completion"},
}
_READERS: dict[str, Callable[[dict], list[tuple[str, str]]]] = {
    "openai": _read_messages,
    "sharegpt": _read_messages,
    "minimind": _read_messages,
    "alpaca": _read_alpaca,
    "minimind_v1": _read_v1,
    "prompt": _read_prompt,
}
FORMS = {  # name in messages
    "openai": "OpenAI's messages",
    "sharegpt": "ShareGPT's conversations",
    "minimind": "MiniMind's conversations",
    "alpaca": "Alpaca's instruction, input, output",
    "minimind_v1": "MiniMind v1's history, q, a",
    "prompt": "prompt and completion",
    "pairs": "pairs of answers, chosen and rejected",
}
FORM_NAMES = list(FORMS)
FORM_NUMBERS = {name: number for number, name in enumerate(FORM_NAMES)}


def contents_of(chats: Iterable[Chat]) -> list[str]:
    """The contents of all messages of all chats."""
    return [content for _, content in chain.from_iterable(chats)]


def canonical(chat: Chat) -> bytes:
    """The same bytes for the same chat, in whatever form it came, and for no other."""
    return "".join([f"{role}{len(content)}:{content}" for role, content in chat]).encode("utf-8")


def as_messages(chat: Chat) -> dict:
    """A chat in OpenAI's form."""
    return {
        "messages": [
            {"role": "assistant", "content": content, "weight": 0}
            if role == UNLEARNED
            else {"role": role, "content": content}
            for role, content in chat
        ]
    }

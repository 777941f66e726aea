"""What a chat template writes around the contents of messages, found by rendering it once with placeholders.

A template that only copies contents writes the same around any of them. Whether it does is watched here: each operation
of the sandbox that a content reaches must copy it whole, give the same for every content, or look for a constant in
it; that constant is noted, since what holds only for contents without it. Anything else ends the rendering.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from jinja2.environment import Environment
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Macro, Undefined
from jinja2.utils import Namespace

from model.text import template_sandbox
from model.text.template_sandbox import SEQUENCES, SHALLOW, Sandbox, listed, owner_of, template_dict

COPYING = ("d", "default", "string", "trim")  # filters that give a stripped text that is not empty as it is
BY_TYPE = (  # tests that give the same for every text
    "boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence",
    "string", "true", "undefined",
)  # fmt: skip
EQUALITY = ("eq", "==", "equalto", "ne", "!=")
STRIPPING = ("strip", "lstrip", "rstrip")
SEARCHING = ("startswith", "endswith", "split", "rsplit", "replace", "count", "find")  # for their first argument


class Inspects(TemplateError):
    """A template does more with a content than copy it or look for a constant in it."""


class _Watch:
    """The placeholders of one rendering, and the constants that the template looked for in them."""

    def __init__(self, placeholders: frozenset[str], secret: str) -> None:
        self.placeholders, self.secret, self.constants = placeholders, secret, set()


_WATCH: ContextVar[_Watch] = ContextVar("watch")


def render_outline(
    source: str, values: Mapping[str, Any], placeholders: frozenset[str], secret: str
) -> tuple[str, frozenset[str]]:
    """(text, constants): a template rendered with placeholders, and what it looked for in them.

    The text holds for all contents in their place that are stripped, are not empty, and hold none of the constants.

    Args:
        placeholders: the contents in `values`; none of them is part of another.
        secret: part of each of them, and of nothing else; private-use characters only.

    Raises:
        Inspects: it does more with a content than that.
        TooMuch, jinja2.TemplateError: as `template_sandbox.render`.
    """
    watch = _Watch(placeholders, secret)
    token = _WATCH.set(watch)
    try:
        return template_sandbox.render(source, values, _Watching), frozenset(watch.constants)
    finally:
        _WATCH.reset(token)


def _holds(*values: Any) -> bool:
    """Whether a content stands anywhere in these values."""
    secret, waiting, seen = _WATCH.get().secret, list(values), set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if secret in value:
                return True
        elif isinstance(value, Namespace):
            return True  # nobody looks into it but by name
        elif isinstance(value, dict | SEQUENCES) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
    return False


def _is_text(value: Any) -> bool:
    """Whether a value is text with a content in it."""
    return isinstance(value, str) and _holds(value)


def _is_content(value: Any) -> bool:
    """Whether a value is a content as it was given."""
    return isinstance(value, str) and value in _WATCH.get().placeholders


def _stop(what: str) -> None:
    raise Inspects(f"{what} looks into a message")


def _note(constant: Any, what: str) -> None:
    """Note that the template looks for a constant in a content; a placeholder must hold none of its characters."""
    if not isinstance(constant, str) or any(char.isdigit() or "\ue000" <= char <= "\uf8ff" for char in constant):
        _stop(what)
    if constant:
        _WATCH.get().constants.add(constant)


def _compare(name: str, left: Any, right: Any) -> None:
    """Allow a comparison, unless its result depends on a content in another way than by a constant in it."""
    if isinstance(right, Iterator):
        _stop(name)  # what it will give is unknown
    if not _holds(left, right):
        return
    if name in EQUALITY:
        content, other = (left, right) if _is_content(left) else (right, left)
        if _is_content(content) and not _holds(other):
            if isinstance(other, str):
                _note(other, name)
                return
            if other is None or isinstance(other, int | float | Undefined):
                return
    elif name in ("in", "notin") and not _holds(left):
        if _is_content(right):
            _note(left, name)
            return
        if isinstance(right, dict) and not _holds(*right):
            return
    _stop(name)


def _check_method(text: str, name: str, args: tuple) -> None:
    """Allow a method of a text that holds a content."""
    if _is_content(text) and not _holds(*args):
        if name in STRIPPING and (not args or args[0] is None or (isinstance(args[0], str) and args[0].isspace())):
            return
        if name in SEARCHING and args and isinstance(args[0], str):
            _note(args[0], name)
            if args[0]:
                return
    _stop(name)


def _watch_filter(name: str, function: Callable) -> Callable:
    @wraps(function)
    def watched(*args, **kwargs):
        args = args if name in SHALLOW or name == "_counted" else tuple(map(listed, args))
        given = [value for value in args if not isinstance(value, Environment | Context | EvalContext)]
        value, rest = given[0] if given else None, (*given[1:], *kwargs.values())
        if _holds(*rest):
            _stop(name)
        if _is_text(value):
            blanks = all(isinstance(text, str) and text.isspace() for text in rest)
            if not (name in COPYING and _is_content(value)) or (name == "trim" and not blanks):
                _stop(name)
        elif name == "random" or (name not in SHALLOW and name != "_counted" and _holds(value)):
            _stop(name)
        return function(*args, **kwargs)

    return watched


def _watch_test(name: str, function: Callable) -> Callable:
    @wraps(function)
    def watched(*args):
        if len(args) == 2:
            _compare(name, *args)
        elif name not in BY_TYPE and _holds(*args):
            _stop(name)
        return function(*args)

    return watched


class _Watching(Sandbox):
    """The sandbox, stopping where a template does more with a content than `render_outline` allows."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = {name: _watch_filter(name, function) for name, function in self.filters.items()}
        self.tests = {name: _watch_test(name, function) for name, function in self.tests.items()}

    @staticmethod
    def _finalized(value: Any) -> Any:
        if not isinstance(value, str) and _holds(value):
            _stop("output")  # as Python writes a list
        return Sandbox._finalized(value)

    @staticmethod
    def concatenate(parts: tuple) -> str:
        if any(not isinstance(part, str) and _holds(part) for part in parts):
            _stop("~")
        return Sandbox.concatenate(parts)

    @staticmethod
    def compare(left: Any, *rest: tuple[str, Callable]) -> Any:
        def watched(name: str, operand: Callable) -> Callable:
            def look() -> Any:
                nonlocal left
                before, left = left, operand()
                _compare(name, before, left)
                return left

            return look

        return Sandbox.compare(left, *[(name, watched(name, operand)) for name, operand in rest])

    @staticmethod
    def cut(value: Any, *bounds: Any) -> Any:
        if _is_text(value):
            _stop("a slice")
        return Sandbox.cut(value, *bounds)

    @staticmethod
    def key(value: Any) -> Any:
        if _holds(value):
            _stop("a key")
        return Sandbox.key(value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if _is_text(obj):
            _stop("an index")
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and _holds(left, right):
            _stop(operator)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in jinja)
        owner = owner_of(__obj)
        named = [
            value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")
        ]  # Jinja adds them
        if _is_text(owner):
            _check_method(owner, getattr(__obj, "__name__", ""), (*args, *named))
        elif not isinstance(__obj, Macro):  # what a macro does is watched
            args = tuple(map(listed, args))
            stores = __obj is template_dict or __obj is __self.globals["namespace"]
            if _holds(*args) or (not stores and _holds(*named)):
                _stop("a call")
        return super().call(__context, __obj, *args, **kwargs)

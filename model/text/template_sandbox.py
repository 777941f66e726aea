"""Jinja's sandbox for chat templates: transformers' dialect, with limits on time, work and memory.

A sandboxed template reaches neither files nor Python's functions, but it can ask for 100 GB of text in one operation or
loop for days. Here each operation estimates the size of its result before it runs, and each iteration, call and filter
checks the clock. A list that holds another list twice doubles when written out, so whatever walks nested values (text,
comparison, hash) is charged for all that it meets, however often.
"""

import datetime
import functools
import inspect
import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.environment import Environment, Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 5  # per rendering; usually under a millisecond
MAX_CHARACTERS = 16 << 20  # of a rendered chat, and of each value on the way
MOST_WORK = 512 << 20  # characters and items per rendering
MAX_NUMBER = 1_000_000  # as an argument, such as a width
MAX_BITS = 4096  # of an integer
SHALLOW = {  # filters that do not look into the items of a list
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice",
}  # fmt: skip
# Filters that no chat template uses, and that are hard to bound.
WITHOUT = (
    "center",
    "pprint",
    "striptags",
    "urlize",
    "wordwrap",
    "xmlattr",
)

BY_ATTRIBUTE = ("groupby", "join", "max", "min", "sort", "sum", "unique")  # filters that look into all items
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}
SEQUENCES = list | tuple | set | frozenset | type({}.keys()) | type({}.values()) | type({}.items())


class TooMuch(Exception):
    """A template exceeds a limit. The message is a predicate whose subject is the template."""


class _Budget:
    """Time and work left for one rendering."""

    def __init__(self) -> None:
        self.end, self.left = time.monotonic() + SECONDS, MOST_WORK

    def spend(self, size: int) -> None:
        if size > MAX_CHARACTERS:
            raise TooMuch(f"asks for {size:,} characters at once, at most {MAX_CHARACTERS:,}")
        self.left -= size
        if self.left < 0:
            raise TooMuch(f"makes more than {MOST_WORK:,} characters on the way")
        if time.monotonic() > self.end:
            raise TooMuch(f"was still running after {SECONDS} s")


_BUDGET: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def spend(size: int) -> None:
    """Charge a result of `size` characters or items to the current rendering.

    Raises:
        TooMuch: that exceeds a limit, or time is up.
    """
    if (budget := _BUDGET.get()) is not None:
        budget.spend(size)


def render(source: str, values: Mapping[str, Any], sandbox: type["Sandbox"] | None = None) -> str:
    """Render a template with values.

    Args:
        sandbox: a subclass of `Sandbox` to render in; None: `Sandbox` itself.

    Raises:
        TooMuch: the template exceeds a limit.
        jinja2.TemplateError: the template is damaged, or refuses the values.
    """
    token = _BUDGET.set(_Budget())
    try:
        pieces, length = [], 0
        for piece in _compiled(source, sandbox or Sandbox).generate(values):
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise TooMuch(f"makes more than {MAX_CHARACTERS:,} characters")
            spend(1)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _BUDGET.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(source: str, sandbox: type["Sandbox"]) -> Template:
    environment = sandbox()
    tree = environment.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        body = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))  # constant text per iteration
        loop.iter = nodes.Filter(loop.iter, "_counted", [nodes.Const(body)], [], None, None)
        loop.iter.set_lineno(loop.lineno)
    return environment.from_string(tree.set_environment(environment))


# --------------------------------------------------------------------------------------------------------- the sandbox


class _Generator(CodeGenerator):
    """Compiles what Jinja leaves to Python's operators to calls of the sandbox's methods."""

    def visit_Concat(self, node: nodes.Concat, frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame) -> None:
        self.write("environment.compare(")
        self.visit(node.expr, frame)
        for part in node.ops:
            self.write(f", ({part.op!r}, lambda: ")
            self.visit(part.expr, frame)
            self.write(")")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.cut(")
        for part in (node.node, node.arg.start, node.arg.stop, node.arg.step):
            self.visit(part or nodes.Const(None), frame)
            self.write(", ")
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame) -> None:
        self.write("{")
        for pair in node.items:
            self.write("environment.key(")
            self.visit(pair.key, frame)
            self.write("): ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a limit on what each operation makes."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalized
        )
        for name in WITHOUT:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(self, name, function) for name, function in self.filters.items()}
        self.tests = {name: _bounded_test(name, function) for name, function in self.tests.items()}
        self.filters["_counted"] = _counted
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _now,
            "dict": template_dict,
            "namespace": TemplateNamespace,
        }

    @staticmethod
    def _finalized(value: Any) -> Any:
        spend(weigh(value))
        return value

    @staticmethod
    def concatenate(parts: tuple) -> str:
        spend(weigh(parts))
        return str_join(parts)

    @staticmethod
    def compare(left: Any, *rest: tuple[str, Callable]) -> Any:
        """Python's `left < b < c`; each of the rest is an operator's name and a function that gives the operand."""
        result = True
        for name, operand in rest:
            right = operand()
            result = COMPARISONS[name](left, _compared(name, left, right))
            if not result:
                break
            left = right
        return result

    @staticmethod
    def cut(value: Any, *bounds: Any) -> Any:
        """The slice `value[start:stop:step]`."""
        result = value[slice(*bounds)]
        spend(_size(result))
        return result

    @staticmethod
    def key(value: Any) -> Any:
        spend(weigh(value))  # a hash looks into tuples
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.key(argument))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(_size_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in jinja)
        if isinstance(__obj, LoopContext):
            args = (_counted(args[0], 0), *args[1:])
        elif (
            __obj is template_dict
            or __obj is TemplateNamespace
            or isinstance(owner_of(__obj), str | bytes | dict | SEQUENCES)
        ):
            args = tuple(listed(value) for value in args)
        spend(_size_of_call(__obj, args, kwargs))
        return _charged(super().call(__context, __obj, *args, **kwargs))


def weigh(value: Any) -> int:
    """Upper estimate of a value's characters as text; nested items add their depth, for indentation.

    Raises:
        TooMuch: the estimate exceeds MAX_CHARACTERS.
    """
    total, waiting = 0, [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        total += _size(value) + depth
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, SEQUENCES):
            waiting += [(part, depth + 1) for part in value]
        if total > MAX_CHARACTERS:
            spend(total)
    return total


def _size(value: Any) -> int:
    """Characters or items of a value, without nested ones."""
    if isinstance(value, int):
        return value.bit_length() // 3 + 1  # decimal digits, about
    return len(value) if isinstance(value, str | bytes | dict | range | SEQUENCES) else 1


def _compared(name: str, left: Any, right: Any) -> Any:
    """The right operand of a comparison, charged; the items of an iterator are charged as they come."""
    if name not in ("in", "notin"):
        both = all(isinstance(value, dict | SEQUENCES) and value for value in (left, right))
        spend(weigh((left, right)) if both else min(_size(left), _size(right)))
    elif isinstance(right, Iterator):
        return _counted(right, weigh(left))
    else:
        spend(weigh((left, right)) if isinstance(right, SEQUENCES) else weigh(left))
    return right


def _charged(result: Any) -> Any:
    if isinstance(result, int):
        _check_bits(result.bit_length())
    spend(_size(result))
    return result


def listed(value: Any) -> Any:
    """A list in place of an iterator, whose size is unknown."""
    return list(_counted(value, 0)) if isinstance(value, Iterator) else value


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int) or isinstance(right, int):
            return _size(right) * max(left, 0) if isinstance(left, int) else _size(left) * max(right, 0)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str | bytes):
        return _size_of_format(left, right if isinstance(right, tuple) else (right,))
    elif operator == "+":
        return _size(left) + _size(right)
    elif operator == "-" and not isinstance(left, int | float):  # of sets
        return weigh((left, listed(right)))
    return 1


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooMuch(f"computes a number of {bits:,} bits, at most {MAX_BITS:,}")


def _size_of_format(pattern: str | bytes, arguments: tuple) -> int:
    """Upper estimate for `"%5d" % x` or `"{:5}".format(x)`: the widths, and all values at each placeholder."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    widths = sum(int(width[:10]) for width in re.findall(r"\d+", text))
    numbers = sum(abs(value) for value in arguments if isinstance(value, int))  # may be widths
    places = 1 + text.count("%") + text.count("{")
    return len(text) + widths + places * (weigh(arguments) + numbers)


def _size_of_call(function: Any, arguments: tuple, named: dict) -> int:
    """Upper estimate of a call's result, for those methods whose result can outgrow their arguments."""
    given = (*arguments, *named.values())
    _check_numbers(given)
    text, name = owner_of(function), getattr(function, "__name__", "")
    if function is template_dict or function is TemplateNamespace:
        return weigh(arguments)
    if isinstance(text, LoopContext) and name == "changed":
        return weigh(given)
    if isinstance(text, dict):
        return weigh(given[:1])  # hashes a key
    if isinstance(text, SEQUENCES):
        return weigh((text, *given)) if given else 1
    if isinstance(text, str) and name == "striptags":
        return len(text) * (1 + text.count("<"))
    if not isinstance(text, str | bytes) or not given:
        return 1
    if name in ("format", "format_map"):
        if isinstance(text, str) and (field := re.search(r"\{[^{}:!]*[.\[]", text.replace("{{", ""))):
            raise SecurityError(f"format takes no part of a value, as in {field.group()[:40]!r}")
        return _size_of_format(text, given)
    if name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"):
        return _size_of_search(text, given[0])
    if name in ("startswith", "endswith"):
        return weigh(given[0])
    if name == "join":
        return weigh(given) + len(text) * _size(given[0])
    if name == "replace":
        return _size_of_replacing(text, *given[:2])
    if name == "translate":
        return len(text) * (1 + weigh(given))
    return len(text) * (1 + max(abs(value) for value in given if isinstance(value, int))) if name == "expandtabs" else 1


def owner_of(function: Any) -> Any:
    """The value whose method this is, or None."""
    function = inspect.unwrap(function) if callable(function) else function  # jinja wraps str.format
    return getattr(function, "__self__", None)


def _size_of_search(text: str | bytes, wanted: Any) -> int:
    """Python's `strip` and `rfind` may look through all that is wanted at each character."""
    return len(text) * (1 + _size(wanted) // 64)


def _size_of_replacing(text: Any, old: Any = "", new: Any = "", *_) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) * max(0, len(new) - len(old)))


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuch(f"gives a function a number above {MAX_NUMBER:,}")


def _bounded(environment: Environment, name: str, function: Callable) -> Callable:
    """The filter, charging its result before it runs."""
    signature = inspect.signature(function) if name in BY_ATTRIBUTE else None

    @functools.wraps(function)
    def bounded(*args, **kwargs):
        if name in BY_ATTRIBUTE or name == "list":
            args = tuple(listed(value) for value in args)
        given = [value for value in args if not isinstance(value, Environment | Context | EvalContext)]
        value, given = given[0] if given else None, (*given[1:], *kwargs.values())
        _check_numbers(given)
        size = _size(value) if name in SHALLOW else weigh(value) + weigh(given)
        if name == "format":
            size = _size_of_format(str(value), given)
        elif name == "replace":
            size = _size_of_replacing(value, *given[:2])
        elif name == "trim" and given:
            size = _size_of_search(str(value), given[0])
        elif name in ("join", "indent", "tojson", "sum"):  # something is added per item
            size *= 1 + sum(value if isinstance(value, int) else _size(value) for value in given if value is not None)
        if (
            name in BY_ATTRIBUTE
            and (attribute := signature.bind(*args, **kwargs).arguments.get("attribute")) is not None
        ):
            for part in str(attribute).split(","):
                size += weigh([*map(make_attrgetter(environment, part), value)])
        spend(size)
        return _charged(function(*args, **kwargs))

    return bounded


def _bounded_test(name: str, function: Callable) -> Callable:
    """The test (`x is eq y`), charged as a comparison."""
    name = "in" if name == "in" else "eq"

    @functools.wraps(function)
    def bounded(*args):
        return function(args[0], _compared(name, *args)) if len(args) == 2 else function(*args)

    return bounded


def _counted(items: Iterable, body: int) -> Iterator:
    """The items of a loop; charges each iteration."""
    for item in items:
        spend(1 + body)
        yield item


# --------------------------------------------------------------------------------------- transformers' own additions


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 (as in jinja)

    def parse(self, parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    """Jinja's namespace, refusing names that begin with an underscore."""

    def __init__(*args, **kwargs) -> None:  # so that `namespace(self=...)` works
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        values = object.__getattribute__(self, "_Namespace__attrs")
        spend(weigh(values))
        return f"<Namespace {values!r}>"


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def template_dict(*args, **kwargs) -> dict:
    """Jinja's `dict`, as templates call it."""
    return dict(*args, **kwargs)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""Jinja for templates from strangers: they reach no Python, and what they can spend is bounded.

Jinja's own sandbox keeps a template away from Python's insides, but lets it ask for a gigabyte of blanks or
loop 10^10 times. Here each rendering has a budget; whatever makes text or takes time draws on it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20  # characters
BASE_BUDGET = 1 << 20  # characters made and loop rounds, plus so many for each character of the messages
BUDGET_PER_CHARACTER = 64  # Phi's own templates need 3
CALL_COST = 16  # a macro call takes as long as so many loop rounds
MAX_INDENT = 16  # of tojson
BUDGET = "the budget"  # its name in the template's context, which the blank keeps out of a template's reach


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "abs capitalize count d default dictsort first float int items last length list lower map max min "
    "reject rejectattr reverse round select selectattr sort string title trim unique upper"
)
METHODS: dict[tuple[type, ...], frozenset[str]] = {
    (str,): _words(
        "capitalize count endswith find isalnum isalpha isdigit islower isspace isupper join lower lstrip "
        "partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines "
        "startswith strip title upper"
    ),
    (dict,): _words("get items keys values"),
    (list, tuple): _words("count index"),
    (int, float): frozenset(),
}


class Template:
    """A compiled template.

    Raises:
        jinja2.exceptions.TemplateError: `source` is not a template, or is longer than 1 MiB.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it has {len(source)} characters; at most {MAX_SOURCE} are read")
        environment = _Environment()
        self._template = environment.from_string(_Meter().visit(environment.parse(source)))

    def render(self, messages: list[dict[str, str]], **variables: object) -> str:
        """Renders the template. A hostile one can raise any exception there is."""
        budget = _Budget(BASE_BUDGET + BUDGET_PER_CHARACTER * sum(map(_deep_size, messages)))
        return self._template.render({**variables, "messages": messages, BUDGET: budget})


class _Budget:
    def __init__(self, amount: int) -> None:
        self.left = amount

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it does far more work than a chat template needs")

    def spend_deep_size(self, *values: object) -> None:
        for value in values:
            self.spend(_deep_size(value, self.left))


def _deep_size(value: object, limit: float = float("inf")) -> int:
    """Characters and items of a value as it would print; one past `limit` is as far as it counts."""
    size = 0
    todo = [value]
    while todo and size <= limit:
        item = todo.pop()
        match item:
            case str():
                size += len(item)
            case int():
                size += 1 + item.bit_length()
            case list() | tuple():
                size += len(item)
                todo += item
            case dict():
                size += len(item)
                todo += [*item.keys(), *item.values()]
            case Namespace():
                raise SecurityError("it uses a namespace as a value")
            case _:
                size += 1
    return size


def _budget(context: Context) -> _Budget:
    budget = context[BUDGET]
    assert isinstance(budget, _Budget)
    return budget


class _Meter(NodeTransformer):
    """Makes the parts of a template that Jinja offers no hook for draw on the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise SecurityError("it has a recursive loop")
        static_text = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filter(node.iter, "each round", nodes.Const(1 + static_text))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        joined: nodes.Expr = _filter(node.nodes[0], "string")
        for part in node.nodes[1:]:
            joined = nodes.Add(joined, _filter(part, "string"), lineno=node.lineno)
        return joined

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, "deep size")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, "deep size") if node.ctx == "load" else node


def _filter(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


class _GenerationBlocks(Extension):
    """Reads over `{% generation %}`, with which templates mark for training what the model says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
            finalize=_print,
        )
        self.filters = {name: _metered(name) for name in FILTERS} | {
            "join": _join,
            "replace": _replace,
            "tojson": _to_json,
            "each round": _each_round,
            "deep size": _print,
        }
        self.globals = {
            "range": self.globals["range"],
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        for types, allowed in METHODS.items():
            if isinstance(obj, types):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: object) -> None:
        """Leaves `str.format` to `is_safe_attribute`, which refuses it: a field's width has no limit."""

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        budget = _budget(context)
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator} as no chat template needs to")
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            text, times = (right, left) if isinstance(left, int) else (left, right)
            budget.spend(_deep_size(text, budget.left) * (max(times, 0) if isinstance(times, int) else 1))
        else:
            budget.spend_deep_size(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:
        budget = _budget(context)
        budget.spend(CALL_COST)
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            budget.spend(len(text))
            match getattr(obj, "__name__", None):
                case "replace":
                    obj = partial(_replace, context, text)
                case "join":
                    obj = partial(_join_with, context, text)
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str):
            budget.spend(len(result))
        return result


@pass_context
def _print(context: Context, value: object) -> object:
    _budget(context).spend_deep_size(value)
    return value


@pass_context
def _each_round(context: Context, items: Iterable[object], cost: int) -> Iterator[object]:
    budget = _budget(context)
    for item in items:
        budget.spend(cost)
        yield item


def _metered(name: str) -> Callable[..., object]:
    """One of Jinja's filters, paid for by the length of what it is given (`string`: of all that is in it)."""
    jinja = ImmutableSandboxedEnvironment()

    @pass_context
    def metered(context: Context, value: object, *args: object, **kwargs: object) -> object:
        budget = _budget(context)
        if name == "string":
            budget.spend_deep_size(value)
        else:
            budget.spend(len(value) if isinstance(value, str | list | tuple | dict | range) else 1)
        return jinja.call_filter(name, value, args, kwargs, context=context)

    return metered


@pass_context
def _join(context: Context, items: Iterable[object], separator: str = "") -> str:
    budget = _budget(context)
    items = list(items)
    budget.spend_deep_size(items, separator)
    budget.spend(len(items) * len(separator))
    return separator.join(map(str, items))


def _join_with(context: Context, separator: str, items: Iterable[object]) -> str:
    return _join(context, items, separator)


@pass_context
def _replace(context: Context, text: str, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    budget = _budget(context)
    budget.spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


@pass_context
def _to_json(
    context: Context,
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _budget(context).spend_deep_size(value)
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise SecurityError(f"it indents JSON by {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)

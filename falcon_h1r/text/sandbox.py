"""The jinja environment of chat templates: transformers' names in it, every operation metered."""

from __future__ import annotations

import functools
import json
import types
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from . import meter
from .meter import ITEM, METER, TooMuch, check_size, check_steps, weigh

MOST_NODES = 20_000  # of a parsed template
# Names that no template can spell.
_LOOK, _SETTLE, _MADE, _SPEND = "meter: look", "meter: settle", "meter: made", "meter: spend"
# Called with values that they pass on unread.
_PASSING = (Macro, LoopContext, BlockReference)
# Filters and tests that do not read through what they are given.
_SHALLOW_FILTERS = set(
    "length count first last list reverse default d items attr map select reject selectattr "
    "rejectattr batch slice random".split()
)
# Filters and tests that go through the items of an iterator.
_ITERATING = set("join sort unique min max sum groupby urlencode in".split())
_SHALLOW_TESTS = set(
    "defined undefined none string number integer float boolean true false mapping iterable "
    "sequence callable sameas".split()
)
# Filters whose time or output grows faster than what they are given: small texts only.
_SLOW = dict.fromkeys("wordwrap urlize striptags xmlattr pprint".split(), 20_000)
MOST_DIGITS = 1000  # of `round`, and characters of a form of `strftime_now`


class _GenerationBlock(Extension):
    """Accepts `{% generation %} ... {% endgeneration %}`, trainers' marks of assistant text."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Puts the meter where the environment is not asked: loops, text, comparisons, slices, keys."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.generic_visit(node)
        node.body.insert(0, _spend(0, node))
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        node = self.generic_visit(node)
        constant = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        return [_spend(constant, node), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        node.nodes = [_filter(_LOOK, part) for part in node.nodes]
        return _filter(_MADE, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self.generic_visit(node)
        node.expr = _filter(_LOOK, node.expr)
        for operand in node.ops:
            name = _SETTLE if operand.op in ("in", "notin") else _LOOK
            operand.expr = _filter(name, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self.generic_visit(node)
        sliced = isinstance(node.arg, nodes.Slice)
        return _filter(_MADE, node) if sliced and node.ctx == "load" else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node = self.generic_visit(node)
        node.key = _filter(_LOOK, node.key)
        return node


def _filter(name: str, node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _spend(count: int, node: nodes.Node) -> nodes.Node:
    spent = nodes.Filter(nodes.Const(count), _SPEND, [], [], None, None)
    return nodes.ExprStmt(spent).set_lineno(node.lineno)


class _Space(Namespace):
    """`namespace`, printed without what it holds: that may hold the namespace."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    def convert_field(self, value: Any, conversion: Any) -> Any:
        weigh(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        meter.format_field(value, format_spec)
        return METER.get().made(super().format_field(value, format_spec))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers gives a chat template, with a meter on every operation.

    Trimmed blocks, loop controls, `{% generation %}`, `tojson` without HTML escapes,
    `raise_exception` and `strftime_now`; `lipsum`, random text, is left out. Nothing is computed
    while a template is compiled. Rendering needs a `Meter` in `METER`.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        self.filters |= {"tojson": _tojson, "sum": _sum}
        self.filters = {
            name: _metered(name, call, name in _SHALLOW_FILTERS)
            for name, call in self.filters.items()
        }
        self.filters |= {_LOOK: _look, _SETTLE: _settle, _MADE: _made, _SPEND: _spent}
        self.tests = {
            name: _metered(name, call, name in _SHALLOW_TESTS) for name, call in self.tests.items()
        }
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Space,
        }
        del self.globals["lipsum"]

    def compile_metered(self, source: str) -> jinja2.Template:
        """The template of a source, every operation of it metered."""
        tree = self.parse(source)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MOST_NODES:
            raise TooMuch(f"it has more than {MOST_NODES} parts")
        return self.from_string(_Metering().visit(tree))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        meter.binary(operator, left, right)
        return METER.get().made(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args: Any, **kwargs: Any) -> Any:
        running = METER.get()
        running.tick()
        text = False
        if not isinstance(__obj, _PASSING):
            built_in = isinstance(__obj, types.BuiltinMethodType)
            look = running.settle if built_in or __obj is dict else running.look
            args = tuple(look(value) for value in args)
            kwargs = {name: look(value) for name, value in kwargs.items()}
            if built_in:
                text = isinstance(__obj.__self__, (str, bytes))
                meter.method(__obj.__self__, __obj.__name__, args, kwargs)
        made = super().call(__context, __obj, *args, **kwargs)
        return running.made(made, items=text and isinstance(made, list))

    def getitem(self, obj: Any, argument: Any) -> Any:
        METER.get().look(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any):
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None

        def metered(*args: Any, **kwargs: Any) -> str:
            METER.get().tick()
            fields = (args[0] if args else {}) if value.__name__ == "format_map" else kwargs
            _Formatter(self).vformat(str(value.__self__), args, fields)
            return sandboxed(*args, **kwargs)

        return functools.update_wrapper(metered, value)


def _metered(name: str, call, shallow: bool):
    """A filter or test that weighs what it is given and counts what it returns."""
    lead = 1 if hasattr(call, "jinja_pass_arg") else 0
    check = _CHECKS.get(name)

    @functools.wraps(call)
    def metered(*args: Any, **kwargs: Any) -> Any:
        running = METER.get()
        running.tick()
        values = args[lead:]
        if not shallow:
            look = running.settle if name in _ITERATING else running.look
            values = tuple(look(value) for value in values)
            kwargs = {key: look(value) for key, value in kwargs.items()}
        if (most := _SLOW.get(name)) is not None and weigh((*values, kwargs))[0] > most:
            raise TooMuch(f"the filter {name} on more than {most} characters")
        if check is not None:
            check(*values, **kwargs)
        listed = name == "list" and bool(values) and isinstance(values[0], (str, bytes))
        return running.made(call(*args[:lead], *values, **kwargs), items=listed)

    return metered


def _check_indent(s: Any = "", width: Any = 4, *flags: Any, **more: Any) -> None:
    size = len(width) if isinstance(width, str) else width
    if isinstance(size, int):
        check_size(weigh(s)[0] + (str(s).count("\n") + 1) * abs(size))


def _check_tojson(
    value: Any = None, ensure_ascii=False, indent=None, separators=None, *more, **key
):
    size, depth = weigh(value)
    step = len(indent) if isinstance(indent, str) else abs(indent or 0)
    check_size(size + size // ITEM * (step * depth + weigh(separators)[0]))


def _check_join(value: Any = (), d: Any = "", attribute: Any = None) -> None:
    items = len(value) if hasattr(value, "__len__") else 0
    check_size(weigh(value)[0] + items * weigh(d)[0])


def _check_round(value: Any = 0, precision: Any = 0, *more: Any, **named: Any) -> None:
    if isinstance(precision, int) and abs(precision) > MOST_DIGITS:
        raise TooMuch(f"the filter round to {precision:.3e} digits, at most {MOST_DIGITS}")


def _check_count(value: Any = None, count: Any = 0, *more: Any, **named: Any) -> None:
    for number in (count, *named.values()):
        if isinstance(number, int):
            check_size(abs(number) * ITEM)


def _check_format(form: Any = "", *args: Any, **kwargs: Any) -> None:
    meter.printf(str(form), kwargs or args)


def _check_trim(value: Any = "", chars: Any = None) -> None:
    check_steps(len(str(value)) * len(chars or ""))


_CHECKS = {
    "indent": _check_indent,
    "tojson": _check_tojson,
    "join": _check_join,
    "round": _check_round,
    "center": _check_count,
    "batch": _check_count,
    "slice": _check_count,
    "format": _check_format,
    "trim": _check_trim,
    "replace": lambda s="", old="", new="", *count, **more: meter.replace(str(s), old, new),
}


@jinja2.pass_context
def _finalize(context, value: Any) -> Any:
    # With a context, jinja calls it for constants too late to compute them while it compiles.
    running = METER.get()
    weigh(value)
    text = value if isinstance(value, str) else str(value)
    running.made(text)
    return text


def _look(value: Any) -> Any:
    return METER.get().look(value)


def _settle(value: Any) -> Any:
    return METER.get().settle(value)


def _made(value: Any) -> Any:
    return METER.get().made(value)


def _spent(count: int) -> None:
    METER.get().tick(count)


@jinja2.pass_environment
def _sum(environment: Sandbox, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    items = list(iterable)
    if not isinstance(start, (int, float)):  # lists: each is copied with all before it
        check_steps(len(items) * (weigh(items)[0] + weigh(start)[0]))
    return jinja2.filters.do_sum(environment, items, attribute, start)


def _raise_exception(message: Any):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MOST_DIGITS:
        raise TooMuch(f"strftime_now with a form of more than {MOST_DIGITS} characters")
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own filter escapes <, >, & and ', which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

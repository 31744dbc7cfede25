"""What rendering may cost. A chat template is a program of its checkpoint, and may never end.

Time is read between operations, so each operation must end soon by itself: what goes into it is
weighed first, and what comes out is counted. Nothing here depends on threads, signals or the
platform.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.runtime import LoopContext

MOST_SECONDS = 5.0
MOST_CHARACTERS = 10_000_000  # of the output, and of what one operation reads or writes
MOST_BYTES = 2**28  # of all values that one rendering makes
MOST_DEPTH = 200  # lists and dicts inside one another
MOST_BITS = 2**16  # of an integer
MOST_STEPS = 10**9  # of an operation that compares all of one text with all of another
ITEM = 10  # characters that an item of a list counts for
_ITEM_BYTES = 50  # of an item that an operation makes
_CODECS = ("utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32")
_WIDTHS = re.compile(r"\d+|\*")
_TEXT = (str, bytes)
_VIEWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(Exception):
    """A template asks for more than rendering may cost."""


class Meter:
    """The cost of one compilation or rendering; `METER` holds the one that runs."""

    def __init__(self):
        self._end = time.monotonic() + MOST_SECONDS
        self._bytes = 0

    def tick(self, count: int = 0) -> None:
        """Refuse to go on where the time, or with `count` more bytes the memory, is used up."""
        self._bytes += count
        if self._bytes > MOST_BYTES:
            raise TooMuch(f"it makes values of more than {MOST_BYTES} bytes")
        if time.monotonic() > self._end:
            raise TooMuch(f"it takes longer than {MOST_SECONDS:g} seconds")

    def made(self, value: Any, items: bool = False) -> Any:
        """Count a value that an operation made, and return it; items: and those in it."""
        kind = type(value)
        if kind is int:
            check_integer_size(value)
        elif isinstance(value, _TEXT):
            check_size(len(value))
        elif isinstance(value, (list, tuple)):
            check_size(len(value) * ITEM)
        self.tick(sys.getsizeof(value) + (_ITEM_BYTES * len(value) if items else 0))
        return value

    def look(self, value: Any) -> Any:
        """Weigh a value that an operation reads through, and return it."""
        weigh(value)
        self.tick()
        return value

    def settle(self, value: Any) -> Any:
        """As `look`, of a value that is iterated: an iterator gives way to a list of its items."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            items = []
            for item in value:
                items.append(item)
                check_size(len(items) * ITEM)
                self.tick(8)
            value = items
        return self.look(value)


METER: ContextVar[Meter] = ContextVar("meter")


def weigh(value: Any) -> tuple[int, int]:
    """(characters, depth) of a value as text, counted as often as it would be written.

    A list may hold one list twice, that one another list twice, and so on: 60 of these are small in
    memory and without end as text. Raises `TooMuch` beyond MOST_CHARACTERS or MOST_DEPTH.
    """
    size, depth, level = 0, 0, [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, _TEXT):
                size += len(item)
            elif isinstance(item, Mapping):
                size += 2 * ITEM * len(item)
                check_size(size)
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, _VIEWS):
                size += ITEM * len(item)
                check_size(size)
                below.extend(item)
            elif isinstance(item, int):
                check_integer_size(item)
                size += item.bit_length() // 3
        check_size(size)
        level = below
        depth += 1
        if depth > MOST_DEPTH:
            raise TooMuch(f"more than {MOST_DEPTH} lists and dicts inside one another")
    return size, depth


def check_size(characters: float) -> None:
    if characters > MOST_CHARACTERS:
        raise TooMuch(f"an operation on more than {MOST_CHARACTERS} characters")


def check_integer_size(value: int) -> None:
    if value.bit_length() > MOST_BITS:
        raise TooMuch(f"an integer of more than {MOST_BITS} bits")


def check_steps(steps: int) -> None:
    if steps > MOST_STEPS:
        raise TooMuch(f"an operation of more than {MOST_STEPS} steps")


def binary(operator: str, left: Any, right: Any) -> None:
    """Weigh the operands of `left operator right`."""
    for value in (left, right):
        if isinstance(value, int):
            check_integer_size(value)
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "*":
        if numbers:
            if left.bit_length() + right.bit_length() > MOST_BITS:
                raise TooMuch(f"an integer of more than {MOST_BITS} bits")
        else:
            text, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(text, (*_TEXT, list, tuple)):
                check_size(len(text) * times * (1 if isinstance(text, _TEXT) else ITEM))
    elif operator == "**":
        if numbers and abs(left) > 1 and left.bit_length() * right > MOST_BITS:
            raise TooMuch(f"an integer of more than {MOST_BITS} bits")
    elif operator == "%" and isinstance(left, _TEXT):
        printf(left, right)


def printf(form: str | bytes, values: Any) -> None:
    """Weigh `form % values`: widths, and how often a named value is written."""
    size, _ = weigh(values)
    form = form.decode("latin-1") if isinstance(form, bytes) else form
    check_size(len(form))
    for width in _WIDTHS.findall(form.partition("%")[2]):
        size += _widest(values) if width == "*" else _number(width)
    check_size(len(form) + size * (form.count("%") if isinstance(values, Mapping) else 1))


def _widest(values: Any) -> int:
    values = values if isinstance(values, tuple) else (values,)
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return int(digits or 0) if len(digits) < 12 else MOST_CHARACTERS + 1


def format_field(value: Any, spec: str) -> None:
    """Weigh one field of `str.format`."""
    weigh(value)
    check_size(sum(_number(digits) for digits in re.findall(r"\d+", spec)))


def method(owner: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Weigh a call of a method of a built-in type."""
    values = [*args, *kwargs.values()]
    numbers = [min(abs(v), sys.maxsize) for v in values if isinstance(v, int)]
    texts = [v for v in values if isinstance(v, _TEXT)]
    largest = max(numbers, default=0)
    if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
        check_size(largest)
    if not isinstance(owner, _TEXT):
        if name in ("index", "count"):
            weigh(owner)
        return
    size = len(owner)
    if name == "replace" and len(texts) > 1:
        replace(owner, *texts[:2])
    elif name == "join" and values and isinstance(values[0], (list, tuple, *_TEXT)):
        check_size(weigh(values[0])[0] + size * len(values[0]))
    elif name == "expandtabs":
        check_size(size + owner.count("\t" if isinstance(owner, str) else b"\t") * max(largest, 8))
    elif name == "translate" and values and isinstance(values[0], dict):
        replacements = [len(v) for v in values[0].values() if isinstance(v, str)]
        check_size(size * max(replacements, default=1))
    elif name in ("encode", "decode"):
        if codec := next((t for t in texts[:1] if str(t).lower() not in _CODECS), None):
            raise TooMuch(f"the codec {codec!r:.40}")
    elif name.startswith(("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpart")):
        check_steps(size * len(texts[0]) if texts else 0)


def replace(text: Any, old: Any, new: Any) -> None:
    if type(text) is type(old) is type(new):
        check_size(len(text) + text.count(old) * len(new))

"""JSON that others wrote, read with bounds: no content takes long, fills memory or surprises later.

The standard library's reader takes more than JSON (NaN, lone surrogates, the last of several equal
keys) and leaves to later what a program cannot use (thousands of levels, integers of any size).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .checks import shown
from .files import foreign_kind, read_file

MAX_JSON_BYTES = 2**24
MAX_DEPTH = 100  # lists and objects inside one another


def read_json(
    path: str | Path,
    error: type[ValueError] = ValueError,
    *,
    most: int = MAX_JSON_BYTES,
    extended: bool = False,
) -> Any:
    """The JSON value in a regular file of at most `most` bytes; errors as in `parse_json`.

    Raises OSError where the file cannot be read.
    """
    return parse_json(read_file(path, most, error), str(path), error, extended=extended)


def parse_json(
    raw: bytes | str,
    place: str,
    error: type[ValueError] = ValueError,
    *,
    extended: bool = False,
) -> Any:
    """The JSON value of a text.

    place: names the text in messages.
    extended: accept what Python writes too: NaN, Infinity, -Infinity, integers of 300 digits.

    Raises `error`, in one line, for bytes that are no UTF-8, for what is no JSON, a key that occurs
    twice, an integer beyond 64 bits, a number beyond a float, a lone surrogate in a string, and for
    more than `MAX_DEPTH` lists and objects inside one another.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_long_integer if extended else _integer,
            parse_float=None if extended else _float,
            parse_constant=None if extended else _constant,
        )
        _check_tree(value)
    except RecursionError:
        reason = f"more than {MAX_DEPTH} lists and objects inside one another"
    except ValueError as found:
        reason = str(found)
    else:
        return value
    start = raw[:64] if isinstance(raw, bytes) else raw[:64].encode("utf-8", "replace")
    kind = foreign_kind(start)
    raise error(f"{place} is {kind}" if kind else f"{place} is not valid JSON: {reason}")


def parse_json_object(
    raw: bytes | str, place: str, error: type[ValueError] = ValueError, *, extended: bool = False
) -> dict[str, Any]:
    """As `parse_json`; `error` is raised also where the value is no object."""
    value = parse_json(raw, place, error, extended=extended)
    if not isinstance(value, dict):
        raise error(f"{place} is a JSON {type(value).__name__}, expected an object")
    return value


def read_json_object(
    path: str | Path, error: type[ValueError] = ValueError, *, extended: bool = False
) -> dict[str, Any]:
    """As `read_json`; `error` is raised also where the value is no object."""
    raw = read_file(path, MAX_JSON_BYTES, error)
    return parse_json_object(raw, str(path), error, extended=extended)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return out


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"the integer {_cut(text)} is beyond 64 bits")
    return value


def _long_integer(text: str) -> int:
    if len(text) > 300:  # a float holds 308
        raise ValueError(f"the integer {_cut(text)} has more than 300 digits")
    return int(text)


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {_cut(text)} is beyond a float")
    return value


def _constant(text: str):
    raise ValueError(f"{text} is no number of JSON")


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_tree(value: Any) -> None:
    """Level by level: a recursion would end where the depth is to be found out."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise RecursionError
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                inner += node
                inner += node.values()
            elif isinstance(node, list):
                inner += node
            elif isinstance(node, str) and not node.isascii():
                _check_text(node)
        level, depth = inner, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"a string holds the lone surrogate {code}") from error

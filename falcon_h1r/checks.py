"""Arguments refused early and in one line: the name, the value, and what is accepted."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")


def is_integer(value, least: int | None = None, most: int | None = None) -> bool:
    """Whether value is an int from `least` to `most`; True and False are none."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    return integer and (least is None or least <= value) and (most is None or value <= most)


def check_integer(
    name: str,
    value,
    least: int | None = None,
    most: int | None = None,
    *,
    none: bool = False,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` unless `is_integer`; none: whether None is accepted too."""
    if (value is None and none) or is_integer(value, least, most):
        return
    bounds = "" if least is None else f" >= {least}"
    if most is not None:
        bounds = f" <= {most}" if least is None else f" in {least} .. {most}"
    refuse(name, value, f"{'None or ' if none else ''}an integer{bounds}", error)


def check_number(
    name: str,
    value,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    none: bool = False,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` unless value is a finite int or float (no bool) with above < value,
    least <= value and value <= most.

    none: whether None is accepted too.
    """
    if value is None and none:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and abs(value) <= sys.float_info.max  # an integer may be beyond any float
    if finite and above < value and least <= value <= most:
        return
    low = f"{above:g} < " if above != -math.inf else f"{least:g} <= "
    if most != math.inf:
        accepted = f"{low}{name} <= {most:g}"
    elif above != -math.inf:
        accepted = f"a finite number > {above:g}"
    else:
        accepted = "a finite number" + (f" >= {least:g}" if least != -math.inf else "")
    refuse(name, value, f"{'None or ' if none else ''}{accepted}", error)


def as_dtype(value, name: str = "dtype", error: type[ValueError] = ValueError) -> torch.dtype:
    """The torch dtype that `value` is, or names: one of DTYPES. Raises `error` for another."""
    import torch

    text = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if text not in DTYPES:
        refuse(name, value, f"one of {', '.join(DTYPES)}", error)
    return getattr(torch, text)


def refuse(name: str, value, accepted: str, error: type[ValueError] = ValueError) -> None:
    """Raise `error` with the one line that every check here gives."""
    raise error(f"{name} is {shown(value)}, expected {accepted}")


def shown(value) -> str:
    """`repr` of anything in one line, cut to a length that leaves an error message readable."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, a list within itself, ...
        return f"{type(value).__name__}: too much to be shown"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."

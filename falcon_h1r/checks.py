"""Arguments refused early and in one line: the name, the value, and what is accepted.

`check_...` return nothing; `as_...` return the argument in the one form that is used inside.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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


def check_text(name: str, value, error: type[ValueError] = ValueError) -> None:
    """Raise `error` unless value is a string that UTF-8 can write: no half of a surrogate pair.

    Python stands such halves in for bytes that are no UTF-8 (U+DC80 to U+DCFF, in arguments and
    in what is read with "surrogateescape"), and JSON can spell them.
    """
    if not isinstance(value, str):
        refuse(name, value, "a string", error)
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        start, code = fault.start, ord(value[fault.start])
        found = f"the lone surrogate U+{code:04X} at character {start}"
        if 0xDC80 <= code <= 0xDCFF:
            offset = len(value[:start].encode())
            found = f"byte 0x{code - 0xDC00:02x} at offset {offset} (U+{code:04X})"
        raise error(f"{name} is no UTF-8 text: {found}") from fault


def as_dtype(value, name: str = "dtype", error: type[ValueError] = ValueError) -> torch.dtype:
    """The torch dtype that `value` is, or names: one of DTYPES. Raises `error` for another."""
    import torch

    text = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if text not in DTYPES:
        refuse(name, value, f"one of {', '.join(DTYPES)}", error)
    return getattr(torch, text)


def _check_plain(name: str, tensor) -> None:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        what = "without values" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise ValueError(f"{name}: expected a plain tensor, found one {what}")


def as_integers(name: str, tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor of whole numbers as int64. Raises ValueError for anything else, booleans included,
    and for another shape than `shape`."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor of integers, found {type(tensor).__name__}")
    _check_plain(name, tensor)
    kind, found = tensor.dtype, tuple(tensor.shape)
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"{name}: expected integers, found {kind} of shape {found}")
    if shape is not None and found != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, as the new tokens, found {found}")
    return tensor.long()


def as_ids(name: str, ids, vocab_size: int) -> torch.Tensor:
    """Token ids as int64. Raises ValueError for anything but a tensor of integers, not empty, each
    in 0 .. vocab_size - 1."""
    ids = as_integers(name, ids)  # of uint64, what is beyond int64 becomes negative
    if ids.numel() == 0:
        raise ValueError(f"{name}: expected tokens, found none in shape {tuple(ids.shape)}")
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        bad = int(low if low < 0 else high)
        raise ValueError(f"{name}: id {bad} is outside the vocabulary of {vocab_size}")
    return ids


def as_mask(name: str, mask, shape: Sequence[int]) -> torch.Tensor:
    """A mask as booleans, True at real tokens. Raises ValueError for anything but a tensor of that
    shape which holds 1 (or True) and 0."""
    import torch

    found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if found != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, as the new tokens, found {found}")
    _check_plain(name, mask)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name}: expected 1 at real tokens and 0 at padding, found other values")
    return mask != 0


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

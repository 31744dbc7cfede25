"""One call of an operator: is the result right, and which of its arguments makes it wrong?

The call is made by three: REFERENCE in float64, which is the truth, REFERENCE in the call's own
dtype, whose error sets the tolerance, and the operator that is judged. Each gets copies of the
arguments with their strides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import REFERENCE
from .budget import FACTOR, FLOOR, relative

_RESULTS = {"causal_conv1d": ("y", "window"), "ssd_scan": ("y", "state")}


class Deviation(NamedTuple):
    """How a call is wrong."""

    what: str  # of its results, as in "y" or "window_bvc in place"; "" where it raised
    error: float | None  # relative root mean square to float64; None where there is no number
    tolerance: float | None
    text: str  # the whole in words


class OperatorCall:
    """The arguments of one call of an operator."""

    def __init__(self, operator: str, bound: inspect.BoundArguments):
        self.operator, self.bound = operator, bound

    @classmethod
    def of(cls, operator: str, args, kwargs) -> OperatorCall:
        """Arguments as the model gave them, bound to the names of REFERENCE's function."""
        return cls(operator, inspect.signature(getattr(REFERENCE, operator)).bind(*args, **kwargs))

    @property
    def arguments(self) -> dict:
        return self.bound.arguments

    def replaced(self, **changes) -> OperatorCall:
        bound = inspect.BoundArguments(self.bound.signature, dict(self.arguments))
        bound.arguments.update(changes)
        return OperatorCall(self.operator, bound)

    def run(self, function: Callable, dtype: torch.dtype | None = None):
        """(results by name, tensor arguments after the call); dtype: to widen what is float."""
        given = {name: _copy(value, dtype) for name, value in self.arguments.items()}
        call = self.replaced(**given).bound
        out = function(*call.args, **call.kwargs)
        names = _RESULTS.get(self.operator, ("result",))
        results = dict(zip(names, out if isinstance(out, tuple) else (out,)))
        return results, {n: t for n, t in given.items() if isinstance(t, Tensor)}

    def deviation(self, function: Callable) -> tuple[Deviation | None, float]:
        """What is wrong with a function's call, and the largest share of a tolerance it takes."""
        truth, wide_after = self.run(getattr(REFERENCE, self.operator), torch.float64)
        narrow, narrow_after = self.run(getattr(REFERENCE, self.operator))
        try:
            found, after = self.run(function)
        except Exception as error:  # whatever a user's function raises is a finding
            text = f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Deviation("", None, None, text), 0.0
        for name, tensor in after.items():
            if torch.equal(narrow_after[name], self.arguments[name]):
                if not torch.equal(tensor, self.arguments[name]):
                    return Deviation(name, None, None, f"writes into its argument {name}"), 0.0
            else:  # REFERENCE updates it in place
                what = f"{name} in place"
                truth[what], narrow[what] = wide_after[name], narrow_after[name]
                found[what] = tensor
        worst, share = None, 0.0
        for name, expected in narrow.items():
            tensor = found.get(name)
            if problem := _unlike(tensor, expected):
                return Deviation(name, None, None, f"{name} is {problem}"), 0.0
            parts = (self._counted(name, t) for t in (tensor, expected, truth[name]))
            tensor, expected, exact = parts
            tolerance = FACTOR * max(relative(expected, exact)[0], FLOOR)
            error = relative(tensor, exact)[0]
            if error / tolerance > share:
                text = f"{name} is off by {error:.1e} (tolerance {tolerance:.1e})"
                share, worst = error / tolerance, Deviation(name, error, tolerance, text)
        return (worst if share > 1 else None), share

    def _counted(self, name: str, tensor: Tensor) -> Tensor:
        """Without what stands at padding that the call names; nobody promises values there."""
        lengths = self.arguments.get("lengths_b")
        if self.operator != "causal_conv1d" or name != "y" or lengths is None:
            return tensor
        column = torch.arange(tensor.shape[1], device=tensor.device)
        return tensor[column < lengths[:, None]]

    def triggers(self, function: Callable) -> list[str]:
        """Arguments without which the call is right, each by itself; [] if there is none."""
        for simpler in _SIMPLER:
            found = [text for text, call in simpler(self) if _is_right(call, function)]
            if found:
                return found
        return []

    def size_of(self, axis: str) -> int:
        """By the letters behind an argument's name; 1 where no argument has the axis."""
        return max((t.shape[i] for _, t, i in self._with_axis(axis)), default=1)

    def narrowed(self, axis: str, size: int) -> OperatorCall:
        """The first `size` positions of an axis, of attention's keys as well where they are new."""
        changes = {n: t.narrow(i, 0, min(size, t.shape[i])) for n, t, i in self._with_axis(axis)}
        if axis == "l" and self.arguments.get("query_offset_b") is None:
            changes |= {n: t.narrow(i, 0, size) for n, t, i in self._with_axis("s")}
        lengths = self.arguments.get("lengths_b")
        if axis == "l" and lengths is not None:
            changes["lengths_b"] = lengths.clamp(max=size)
        return self.replaced(**changes)

    def _with_axis(self, axis: str) -> Iterator[tuple[str, Tensor, int]]:
        for name, value in self.arguments.items():
            letters = name.rpartition("_")[2]
            if isinstance(value, Tensor) and axis in letters and len(letters) == value.dim():
                yield name, value, letters.index(axis)


def _is_right(call: OperatorCall, function: Callable) -> bool:
    try:
        return call.deviation(function)[0] is None
    except Exception:  # REFERENCE refuses the call: it cannot serve as a comparison
        return False


def _copy(value, dtype: torch.dtype | None):
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    if 0 in value.stride():
        return value.to(dtype, copy=True)
    out = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    return out.copy_(value)


def _unlike(tensor, expected: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__}, expected a tensor {tuple(expected.shape)}"
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        found, wanted = (
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (tensor, expected)
        )
        return f"{found}, expected {wanted}"
    return ""


# --- simpler calls: (what is left out, the call without it) ---------------------------------------


def _without_options(call: OperatorCall) -> Iterator[tuple[str, OperatorCall]]:
    for name, parameter in call.bound.signature.parameters.items():
        value = call.arguments.get(name, parameter.default)
        required = parameter.default is inspect.Parameter.empty
        if required or value is parameter.default or name == "chunk_size":
            continue
        if isinstance(value, Tensor):
            yield f"{name} given", call.replaced(**{name: parameter.default})
        elif value != parameter.default:
            yield f"{name}={value!r}", call.replaced(**{name: parameter.default})


def _without_sharing(call: OperatorCall) -> Iterator[tuple[str, OperatorCall]]:
    a = call.arguments
    if call.operator in ("ssd_scan", "ssd_step"):
        names = [name for name in a if name[0] in "BC"]
        groups = a[names[0]].shape[-2]
        if groups > 1:
            one = {name: a[name][..., :1, :] for name in names}
            yield f"{groups} groups in {' and '.join(names)}", call.replaced(**one)
        dt = next(name for name in a if name.startswith("dt"))
        if bool((a[dt] == 0).any()):
            positive = torch.where(a[dt] == 0, 0.05, a[dt])
            yield f"{dt} of 0, as at padding", call.replaced(**{dt: positive})
    if call.operator in ("attention", "decode_attention"):
        copies = a["k_bjse"].shape[1]
        heads = a[next(iter(a))].shape[1]
        if copies < heads:
            every = {n: a[n].repeat_interleave(heads // copies, 1) for n in ("k_bjse", "v_bjse")}
            yield f"{heads} query heads on {copies} key/value heads", call.replaced(**every)
    for name in ("query_offset_b", "lengths_b"):
        value = a.get(name)
        if value is not None and bool((value != value[0]).any()):
            level = {name: value.min().expand_as(value).clone()}
            yield f"{name} different from row to row", call.replaced(**level)


def _with_plain_strides(call: OperatorCall) -> Iterator[tuple[str, OperatorCall]]:
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and not value.is_contiguous():
            yield f"{name} not contiguous", call.replaced(**{name: value.contiguous()})


def _shorter(call: OperatorCall) -> Iterator[tuple[str, OperatorCall]]:
    chunk = call.arguments.get("chunk_size")
    if chunk is not None and call.size_of("l") > chunk:
        yield f"more tokens than chunk_size {chunk}", call.narrowed("l", chunk)
    if call.size_of("l") > 1:
        yield "more than one token", call.narrowed("l", 1)
    if call.size_of("b") > 1:
        yield "more than one row", call.narrowed("b", 1)


_SIMPLER = (_without_sharing, _without_options, _with_plain_strides, _shorter)

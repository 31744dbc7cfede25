"""The walk of one batch of tokens: every tensor in the order in which it is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Streamed
from ..tables import aligned
from ..tap_table import config_value
from ..taps import record, tap_of

EXAMPLE = "What is 47+25-8?"


class WalkStep(NamedTuple):
    """One tensor of the walk."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    min: float
    max: float
    rms: float
    nbytes: int
    where: str  # file:line of the code that makes it
    meaning: str
    multipliers: dict[str, Any]  # config keys that act on the way here, with their values


@torch.no_grad()
def walk(
    source, ids: list[int], names: Iterable[str] | None = None, layers: Iterable[int] | None = None
) -> list[WalkStep]:
    """One prompt through a model, or through what `checkpoint.stream_modules` returns.

    names, layers: as in `taps.full_names`. Raises ValueError for ids that the model refuses.
    """
    model = source.model if isinstance(source, Streamed) else source
    with record(model, names, layers) as recording:
        source(torch.tensor([ids], dtype=torch.long, device=source.device))
    return [_step(n, t, recording.where[n], model.config) for n, t in recording.items()]


def _step(name: str, tensor: Tensor, where: str, config) -> WalkStep:
    tap, values = tap_of(name), tensor.double()
    return WalkStep(
        name,
        tuple(tap.axes.split()),
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        float(values.min()),
        float(values.max()),
        float(values.square().mean().sqrt()),
        tensor.nbytes,
        where,
        tap.meaning,
        {key: config_value(config, key) for key in tap.keys},
    )


def render(steps: list[WalkStep]) -> str:
    """A table for a terminal."""
    heads = ("tensor", "shape", "dtype", "min", "max", "rms", "bytes", "made at")
    rows = [
        (
            step.name,
            " ".join(f"{axis}={size}" for axis, size in zip(step.axes, step.shape)),
            step.dtype,
            *(f"{value:.4g}" for value in (step.min, step.max, step.rms)),
            f"{step.nbytes:,}",
            step.where,
        )
        for step in steps
    ]
    return "\n".join(aligned((heads, *rows), "lllrrrrl"))

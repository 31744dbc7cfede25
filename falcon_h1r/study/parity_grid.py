"""A parity report as heat maps: tensors by layers, one panel per side, dtype, path and table.

The picture (`heat.py`) and the page (`parity_page.py`) show the same panels in their own way.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import NamedTuple

from ..tap_table import inner_name
from .parity import Report, Row

DECADES = 2.5  # of errors that the colours tell apart
MODEL = -1  # the "layer" of the model's own tensors, whose column is the last


class Panel(NamedTuple):
    """One side of the rows of one dtype, path and table."""

    dtype: str
    path: str
    table: str
    side: str  # "ours" or "theirs"
    who: str  # "ours, torch" or the peer's name
    rows: dict[tuple[str, int], Row]  # by the tap's name and the layer

    def value(self, row: Row) -> float | None:
        """The relative rms error; None: this side does not show the tensor."""
        return row.rms if self.side == "ours" else row.peer_rms

    def within(self, row: Row) -> bool:
        return row.within if self.side == "ours" else row.peer_within


class Grid(NamedTuple):
    """All panels over the same tensors and layers."""

    names: list[str]  # rows
    layers: list[int]  # columns
    panels: list[Panel]
    scales: dict[str, float]  # dtype -> log10 of the largest finite error of ours

    def place(self, panel: Panel, value: float) -> float:
        """Where an error is on its dtype's colour scale, 0 to 1. The scale is logarithmic."""
        if not 0 < value < math.inf:
            return 1.0 if value else 0.0
        share = 1 + (math.log10(value) - self.scales[panel.dtype]) / DECADES
        return min(1.0, max(0.0, share))


def grid_of(report: Report) -> Grid:
    """The panels of a report, ours before theirs."""
    names = list(dict.fromkeys(inner_name(row.tensor) for row in report.rows))
    layers = sorted({layer_of(row.tensor) for row in report.rows}, key=lambda n: (n < 0, n))
    panels, scales = [], {}
    for key, rows in groupby(report.rows, key=lambda row: (row.dtype, row.path, row.table)):
        cells = {(inner_name(row.tensor), layer_of(row.tensor)): row for row in rows}
        sides = [("ours", f"ours, {key[2]}")] + [("theirs", report.peer)] * bool(report.peer)
        panels += [Panel(*key, side, who, cells) for side, who in sides]
    for dtype in dict.fromkeys(row.dtype for row in report.rows):
        found = (row.rms for row in report.rows if row.dtype == dtype and 0 < row.rms < math.inf)
        scales[dtype] = math.log10(max(found, default=1.0))
    return Grid(names, layers, panels, scales)


def layer_of(name: str) -> int:
    """Of a full name; MODEL for the model's own tensors."""
    return int(name.split(".")[1]) if name.startswith("layers.") else MODEL


def layer_name(layer: int) -> str:
    return "model" if layer == MODEL else str(layer)

"""A parity report as a picture: tensors by layers, one panel per side, dtype and path."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.plot import has_matplotlib
from ..tap_table import inner_name

if TYPE_CHECKING:
    from .parity import Report

DECADES = 2.5  # of errors that the colours tell apart


def draw(report: Report, facts: dict, path: Path) -> None:
    """Write the picture; the format follows the suffix.

    Columns: layers, and the model's own tensors last. Colour: the logarithm of the relative root
    mean square error, one scale per dtype, which ends at the largest of ours. Framed: beyond the
    tolerance. Grey: not shown by that side. Raises ValueError without matplotlib.
    """
    if not has_matplotlib():
        raise ValueError("a picture needs matplotlib: pip install 'falcon-h1r[bench]'")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in report.rows))
    sides = ["ours", "theirs"] if report.peer else ["ours"]
    where = list(dict.fromkeys((row.path, row.table) for row in report.rows))
    columns = [(path, table, side) for path, table in where for side in sides]
    names = list(dict.fromkeys(inner_name(row.tensor) for row in report.rows))
    layers = sorted({_layer(row.tensor) for row in report.rows} - {-1})
    width = max(2.6 + len(columns) * (0.6 + 0.22 * (len(layers) + 1)), 7)
    figure = Figure(figsize=(width, 1 + len(dtypes) * 0.16 * len(names)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(dtypes), len(columns), squeeze=False, sharex=True, sharey=True)
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    for line, dtype in zip(grid, dtypes):
        values = [row.rms for row in report.rows if row.dtype == dtype]
        high = math.log10(max((v for v in values if 0 < v < math.inf), default=1.0))
        for axes, (path_of, table, side) in zip(line, columns):
            here = (dtype, path_of, table)
            rows = [r for r in report.rows if (r.dtype, r.path, r.table) == here]
            cells, frames = _cells(rows, side, names, layers)
            image = axes.imshow(cells, cmap=colours, vmin=high - DECADES, vmax=high, aspect="auto")
            if frames:
                axes.scatter(*zip(*frames), marker="s", s=30, facecolors="none", edgecolors="red")
            axes.set_xticks(range(len(layers) + 1), [*map(str, layers), "model"], fontsize=6)
            axes.set_yticks(range(len(names)), names, fontsize=6)
            who = f"ours, {table}" if side == "ours" else report.peer
            axes.set_title(f"{who}\n{dtype}, {path_of}", fontsize=7)
        bar = figure.colorbar(image, ax=line.tolist(), shrink=0.6, extend="both")
        bar.set_label("log10 relative rms error to float64", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    text = ", ".join(f"{key}: {value}" for key, value in facts.items())
    figure.suptitle("\n".join(textwrap.wrap(text, int(16 * width))), fontsize=7)
    figure.savefig(path, dpi=150)


def _cells(rows, side: str, names: list[str], layers: list[int]):
    """Logarithms by tensor and layer (NaN: absent), and the (x, y) of cells beyond tolerance."""
    cells = [[math.nan] * (len(layers) + 1) for _ in names]
    frames = []
    for row in rows:
        value = row.rms if side == "ours" else row.peer_rms
        if value is None:
            continue
        layer = _layer(row.tensor)
        x = len(layers) if layer < 0 else layers.index(layer)
        y = names.index(inner_name(row.tensor))
        # An exact tensor has no logarithm: it takes the lowest colour.
        cells[y][x] = math.log10(value) if 0 < value < math.inf else (9 if value else -99)
        if not (row.within if side == "ours" else row.peer_within):
            frames.append((x, y))
    return cells, frames


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else -1

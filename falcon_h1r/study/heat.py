"""A parity report as a picture of its heat maps, with matplotlib."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.plot import has_matplotlib
from .parity_grid import DECADES, Grid, Panel, grid_of, layer_name

if TYPE_CHECKING:
    from .parity import Report


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
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grid = grid_of(report)
    count = len(grid.panels) // len(grid.scales)
    width = max(2.6 + count * (0.6 + 0.22 * len(grid.layers)), 7)
    figure = Figure(figsize=(width, 1.3 + len(grid.scales) * 0.16 * len(grid.names)))
    figure.set_layout_engine("constrained")
    axes_of = figure.subplots(len(grid.scales), count, squeeze=False, sharex=True, sharey=True)
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    frame = {"marker": "s", "markersize": 5.5, "markerfacecolor": "none", "markeredgecolor": "red"}
    for line, (dtype, high) in zip(axes_of, grid.scales.items()):
        for axes, panel in zip(line, (p for p in grid.panels if p.dtype == dtype)):
            cells, frames = _cells(grid, panel)
            image = axes.imshow(cells, cmap=colours, vmin=high - DECADES, vmax=high, aspect="auto")
            if frames:
                axes.plot(*zip(*frames), linestyle="", **frame)
            axes.set_xticks(range(len(grid.layers)), map(layer_name, grid.layers), fontsize=6)
            axes.set_yticks(range(len(grid.names)), grid.names, fontsize=6)
            axes.set_title(f"{panel.who}\n{dtype}, {panel.path}", fontsize=7)
        bar = figure.colorbar(image, ax=line.tolist(), shrink=0.6, extend="both")
        bar.set_label("log10 relative rms error to float64", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    for axes in axes_of[-1]:
        axes.set_xlabel("layer", fontsize=7)
    meanings = [
        Line2D([], [], linestyle="", label="framed: beyond the budget", **frame),
        Patch(facecolor="0.85", label="grey: not shown, or no such tensor"),
    ]
    figure.legend(handles=meanings, loc="outside lower center", ncols=2, fontsize=7)
    text = ", ".join(f"{key}: {value}" for key, value in facts.items())
    figure.suptitle("\n".join(textwrap.wrap(text, int(16 * width))), fontsize=7)
    figure.savefig(path, dpi=150)


def _cells(grid: Grid, panel: Panel):
    """Logarithms by tensor and layer (NaN: absent), and the (x, y) of cells beyond tolerance."""
    cells = [[math.nan] * len(grid.layers) for _ in grid.names]
    frames = []
    for (name, layer), row in panel.rows.items():
        value = panel.value(row)
        if value is None:
            continue
        x, y = grid.layers.index(layer), grid.names.index(name)
        # An exact tensor has no logarithm: it takes the lowest colour.
        cells[y][x] = math.log10(value) if 0 < value < math.inf else (9 if value else -99)
        if not panel.within(row):
            frames.append((x, y))
    return cells, frames

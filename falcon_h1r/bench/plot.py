"""A roofline picture of result records: measured ceilings as lines, cases as points."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .machine import Ceilings

_MARKERS = "o^sDvPX*<>"
_FILLS = {"prefill": "full", "resume": "left", "decode": "none"}
_PHASES = {"prefill": "prefill", "resume": "prefill behind a past", "decode": "decode"}


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def require_matplotlib() -> None:
    """Raise ValueError, with the command that helps, unless matplotlib can be imported."""
    if not has_matplotlib():
        raise ValueError(
            "--plot needs matplotlib: pip install 'falcon-h1r[bench]', or pip install matplotlib"
        )


def roofline(
    records: list[dict[str, Any]], ceilings: Ceilings, card: dict[str, Any], path: Path
) -> None:
    """Write the picture; the format follows `path`'s suffix.

    x: FLOPs per byte that must be moved; y: FLOP/s reached. Colour: operator or model; marker:
    implementation; filled: prefill, half filled: prefill behind a past, hollow: decode. Sloped
    lines: bandwidth by array size; level lines: matrix products by dtype.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    timed = [r for r in records if r.get("status") == "timed" and r.get("flops") and r.get("bytes")]
    if not timed:
        raise ValueError("--plot: nothing was timed, so there is nothing to draw")
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensities = [r["flops"] / r["bytes"] for r in timed]
    low = min(*intensities, 0.25) / 2
    top = max(ceilings.matmul.values())
    high = max(*intensities, top / ceilings.bandwidths[-1].best) * 2
    slopes = []
    for b in ceilings.bandwidths:
        ends = [low, max(min(high, top / b.best), low)]
        label = f"{b.best / 1e9:,.0f} GB/s ({b.size / 2**20:.0f} MiB)"
        axes.plot(ends, [b.best * x for x in ends], color="0.5", linewidth=1)
        start = (ends[0], b.best * ends[0])
        words = axes.text(*start, f" {label}", fontsize=7, rotation_mode="anchor", va="bottom")
        slopes.append((words, start, (2 * ends[0], 2 * b.best * ends[0])))
    for dtype, rate in ceilings.matmul.items():
        axes.plot([low, high], [rate, rate], color="0.3", linewidth=1, linestyle="--")
        label = f"{str(dtype).removeprefix('torch.')} {rate / 1e9:,.0f} GFLOP/s"
        axes.annotate(label, (high, rate), fontsize=7, ha="right", va="bottom")
    whole = all(r["bench"] == "generate" for r in timed)
    subject = "model" if whole else "operator"
    subjects = list(dict.fromkeys(r["model" if whole else "op"] for r in timed))
    names = list(dict.fromkeys(r["implementation"] for r in timed))
    phases = [phase for phase in _FILLS if any(r["phase"] == phase for r in timed)]

    def dot(x, y, what=None, name=None, phase="prefill", label=None):
        color = "0.25" if what is None else colormaps["tab20"](subjects.index(what) % 20)
        marker = "s" if name is None else _MARKERS[names.index(name) % len(_MARKERS)]
        return axes.plot(
            x,
            y,
            color=color,
            marker=marker,
            fillstyle=_FILLS[phase],
            markersize=6.5,
            linestyle="none",
            label=label,
        )[0]

    for r, x in zip(timed, intensities):
        what = r["model" if whole else "op"]
        dot(x, r["flops_per_second"], what, r["implementation"], r["phase"])
    handles = []
    for heading, entries in (
        (subject, [dot([], [], what=one, label=one) for one in subjects]),
        ("implementation", [dot([], [], name=name, label=name) for name in names]),
        ("phase", [dot([], [], phase=phase, label=_PHASES[phase]) for phase in phases]),
    ):
        handles += [axes.plot([], [], linestyle="none", label=heading)[0], *entries]
    legend = figure.legend(handles=handles, fontsize=7, loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        if text.get_text() in (subject, "implementation", "phase"):
            text.set_fontweight("bold")
    axes.set_xlabel("FLOP per byte that must be moved")
    axes.set_ylabel("FLOP/s")
    machine = (
        card["gpu"]["name"] if "gpu" in card else f"{card['cpu']}, {card['threads']} thread(s)"
    )
    axes.set_title(f"{machine}, {card['date']}, measured ceilings", fontsize=9)
    axes.grid(alpha=0.2)
    figure.draw_without_rendering()  # lays the axes out: only now a line has its angle
    for words, start, end in slopes:
        (x0, y0), (x1, y1) = axes.transData.transform([start, end])
        words.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
    figure.savefig(path, dpi=150)

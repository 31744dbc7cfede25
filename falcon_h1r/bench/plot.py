"""A roofline picture of result records: measured ceilings as lines, cases as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .machine import Ceilings

_MARKERS = "o^sDvPX*<>"


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

    x: FLOPs per byte that must be moved; y: FLOP/s reached. Colour: operator, marker:
    implementation. Sloped lines: bandwidth by array size; level lines: matrix products by dtype.
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
    for b in ceilings.bandwidths:
        ends = [low, max(min(high, top / b.best), low)]
        label = f"{b.best / 1e9:,.0f} GB/s ({b.size / 2**20:.0f} MiB)"
        axes.plot(ends, [b.best * x for x in ends], color="0.5", linewidth=1)
        axes.annotate(label, (ends[0], b.best * ends[0]), fontsize=7, rotation=35, va="bottom")
    for dtype, rate in ceilings.matmul.items():
        axes.plot([low, high], [rate, rate], color="0.3", linewidth=1, linestyle="--")
        label = f"{str(dtype).removeprefix('torch.')} {rate / 1e9:,.0f} GFLOP/s"
        axes.annotate(label, (high, rate), fontsize=7, ha="right", va="bottom")
    operators = list(dict.fromkeys(r["op"] for r in timed))

    def color(index: int):
        return colormaps["tab20"](index % 20)

    names = list(dict.fromkeys(r["implementation"] for r in timed))
    for r, x in zip(timed, intensities):
        axes.scatter(
            x,
            r["flops_per_second"],
            color=color(operators.index(r["op"])),
            marker=_MARKERS[names.index(r["implementation"]) % len(_MARKERS)],
            s=28,
        )
    for index, op in enumerate(operators):
        axes.scatter([], [], color=color(index), marker="s", label=op)
    for index, name in enumerate(names):
        axes.scatter([], [], color="0.2", marker=_MARKERS[index % len(_MARKERS)], label=name)
    axes.set_xlabel("FLOP per byte that must be moved")
    axes.set_ylabel("FLOP/s")
    machine = (
        card["gpu"]["name"] if "gpu" in card else f"{card['cpu']}, {card['threads']} thread(s)"
    )
    axes.set_title(f"{machine}, {card['date']}, measured ceilings", fontsize=9)
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)

"""Pictures of trace records, with matplotlib: confidences along traces; accuracy against tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..files import whole_file
from .answers import Equality
from .confidence import group_confidences
from .online import LOW, NATURAL, OnlineResult
from .traces import Record, RecordedTrace

# Okabe and Ito's colours, which the colour-blind can tell apart.
RIGHT, WRONG, OTHER = "#0072B2", "#D55E00", "0.6"
FIRST = "first trace alone"  # name of the point that no vote was taken for
_SUFFIXES = (".png", ".pdf", ".svg")
_PLOTTED = 2000  # points of a trace's line: more than the picture has pixels


class Point(NamedTuple):
    """A policy over many questions: how many of `asked` it got right, tokens of all together."""

    name: str
    right: int
    asked: int
    tokens: int


def check_picture(path: str | Path) -> None:
    """Raises ValueError where a picture cannot be written there: before anything is computed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib: pip install 'falcon-h1r[reasoning]', "
            "or pip install matplotlib"
        ) from error
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--plot: {path} must end with one of {', '.join(_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: {path.absolute().parent} is no folder")


def wilson_interval(right: int, asked: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Of a share, by E. B. Wilson's formula (1927, J. Am. Stat. Assoc. 22); z: 95 % by default."""
    if not 0 <= right <= asked or asked < 1:
        raise ValueError(f"{right} of {asked} is no share")
    share, square = right / asked, z * z
    middle = (share + square / (2 * asked)) / (1 + square / asked)
    half = z * math.sqrt(share * (1 - share) / asked + square / (4 * asked * asked))
    half /= 1 + square / asked
    low, high = middle - half, middle + half
    # Exact ends, where rounding would leave 1e-17.
    return (0.0 if right == 0 else low), (1.0 if right == asked else high)


def plot_confidence(
    record: Record,
    path: str | Path,
    *,
    window: int,
    result: OnlineResult | None = None,
    answer: str | None = None,
    equality: Equality | None = None,
) -> None:
    """Mean confidence of the last `window` tokens along every trace; the format follows the suffix.

    A trace that is shorter than the window is a dot: its mean. result: of the policy, live or
    replayed, whose traces are drawn as far as it let them run: its threshold is a line, what was
    stopped there ends in a cross, and the warm-up, which nothing stops, is dotted. None: all traces
    as they were recorded. Colours: whether a trace that came to its end gave the record's
    reference, or the policy's answer (`answer` without a result) where there is none.

    Raises ValueError for a record without tokens, and where `check_picture` does.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    equality = Equality(record.manifest.rule) if equality is None else equality
    reference = record.manifest.reference
    if result is not None:
        answer = result.answer
    target = answer if reference is None else reference
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    lines = [line for t in record.traces if (line := _line(t, result, target, equality))]
    if not lines:
        raise ValueError(f"{record.folder}: holds no tokens to draw")
    # Right ones last, so that they lie on top.
    for line in sorted(lines, key=lambda line: (OTHER, WRONG, RIGHT).index(line.color)):
        groups = group_confidences(line.confidence, window)
        first = len(line.confidence) - len(groups) + 1
        stride = -(-len(groups) // _PLOTTED)
        places = sorted({*range(0, len(groups), stride), len(groups) - 1})
        x, y = [first + i for i in places], [float(groups[i]) for i in places]
        style = {"color": line.color, "alpha": max(0.15, min(0.8, 12 / len(lines)))}
        axes.plot(x, y, linestyle=":" if line.warmup else "-", linewidth=1, **style)
        axes.plot(x[-1:], y[-1:], marker="x" if line.stopped else "o", markersize=4, **style)
    names = ("right", "wrong") if reference is not None else ("the answer", "another answer")
    for color, name in zip((RIGHT, WRONG, OTHER), (*names, "no answer")):
        if count := sum(line.color == color for line in lines):
            axes.plot([], [], color=color, label=f"{name}: {count}")
    if count := sum(line.warmup for line in lines):
        axes.plot([], [], color="0.2", linestyle=":", label=f"warm-up, not stopped: {count}")
    if count := sum(line.stopped for line in lines):
        axes.plot([], [], color="0.2", marker="x", linestyle="", label=f"stopped: {count}")
    if result is not None and result.threshold is not None:
        label = f"threshold: {result.threshold:.3f}"
        axes.axhline(result.threshold, color="0", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"mean confidence of the last {window} tokens, nats")
    axes.set_title(_title(record), fontsize=10)
    axes.grid(alpha=0.2)
    figure.legend(fontsize=8, loc="outside right upper")
    with whole_file(path) as new:
        figure.savefig(new, dpi=150)


class _Line(NamedTuple):
    confidence: Tensor
    color: str
    stopped: bool
    warmup: bool


def _line(
    trace: RecordedTrace, result: OnlineResult | None, target, equality: Equality
) -> _Line | None:
    length, reason, answer, warmup = len(trace), trace.reason, trace.answer, False
    if result is not None:
        outcome = next((o for o in result.traces if o.trace == trace.number), None)
        if outcome is None:
            return None
        length, reason, answer = outcome.tokens, outcome.reason, outcome.answer
        warmup = result.threshold is not None and trace.number < result.params.warmup
    if length == 0:
        return None
    color = OTHER
    if reason in NATURAL and answer is not None and target is not None:
        color = RIGHT if equality.same(target, answer) else WRONG
    return _Line(trace.confidence[:length], color, reason == LOW, warmup)


def _title(record: Record) -> str:
    text = " ".join((record.manifest.question or str(record.folder)).split())
    text = text if len(text) <= 90 else text[:87] + "..."
    reference = record.manifest.reference
    text = text if reference is None else f"{text}  (answer: {reference})"
    return text.replace("$", r"\$")  # else matplotlib reads what is between two as mathematics


def plot_accuracy(points: Iterable[Point], path: str | Path, title: str = "") -> None:
    """Accuracy with its 95 % interval against tokens per question, a marker per policy.

    Policies that spend the same tokens stand side by side, a little apart. Raises ValueError
    without points, and where `check_picture` does.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    points = list(points)
    if not points:
        raise ValueError("--plot: no policy could be judged, so there is nothing to draw")
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    places = _apart([point.tokens / point.asked for point in points])
    for number, (point, place) in enumerate(zip(points, places)):
        share = point.right / point.asked
        low, high = wilson_interval(point.right, point.asked)
        axes.errorbar(
            place,
            100 * share,
            yerr=[[100 * (share - low)], [100 * (high - share)]],
            fmt="osD^v<>Pph*X"[number % 12],
            color=_color(point.name),
            markeredgecolor="0.2",
            markeredgewidth=0.5,
            markersize=7,
            linewidth=1.2,
            capsize=2.5,
            label=f"{point.name}: {100 * share:.1f} %, {point.tokens / point.asked:,.0f}",
        )
    axes.set_xlabel("tokens per question (equal ones drawn a little apart)")
    axes.set_ylabel("right, % of questions, with 95 % Wilson intervals")
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.2)
    figure.legend(fontsize=8, loc="outside right upper", title="policy: right, tokens")
    with whole_file(path) as new:
        figure.savefig(new, dpi=150)


def _color(policy: str) -> str:
    """By family: DeepConf, votes of a part of the traces, votes of all, one trace."""
    if policy.startswith(("deepconf", "recorded")):
        return WRONG
    if ", eta" in policy:
        return "#56B4E9"
    return "0.2" if policy == FIRST else RIGHT


def _apart(values: Sequence[float]) -> list[float]:
    """Places on the axis: equal values side by side around theirs, 1.2 % of the axis apart."""
    step = 0.012 * (max(values) or 1)
    places = []
    for index, value in enumerate(values):
        equal = [other for other, v in enumerate(values) if v == value]
        places.append(value + step * (equal.index(index) - (len(equal) - 1) / 2))
    return places

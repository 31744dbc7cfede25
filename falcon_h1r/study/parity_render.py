"""A parity report as text, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby

from .budget import ErrorParts
from .parity import Report, Row
from .parity_known import text_of


def groups(report: Report) -> Iterator[tuple[tuple[str, str, str], list[Row]]]:
    """Rows by (dtype, path, table)."""
    for key, rows in groupby(report.rows, key=lambda row: (row.dtype, row.path, row.table)):
        yield key, list(rows)


def verdict(report: Report) -> str:
    """One line: within the budget, or which tensor is the first beyond it."""
    judged = sum(row.tolerance is not None for row in report.rows)
    if not report.beyond:
        return f"ours is within the budget at all {judged} tensors"
    row = report.beyond[0]
    where = report.divergences.get((f"ours {row.table}", row.dtype, row.path))
    return (
        f"ours is beyond the budget at {len(report.beyond)} of {judged} tensors, first at "
        f"{row.tensor} ({row.dtype}, {row.path}, {row.table}: {row.rms:.1e}, tolerance "
        f"{_number(row.tolerance)})" + (f"; first divergence {where}" if where else "")
    )


def as_text(report: Report, facts: dict) -> str:
    """A summary: one line per dtype, path and table, divergences, what is known, the verdict."""
    lines = [f"{key}: {value}" for key, value in facts.items()]
    lines.append("relative root mean square errors to float64, ours and theirs, at the logits; the")
    lines.append("largest part of its tolerance that any tensor of ours takes, and which")
    lines.append("")
    lines.append(
        f"{'dtype':9} {'path':8} {'table':10} {'ours':>8} {'theirs':>8} {'ratio':>6}  worst"
    )
    for (dtype, path, table), rows in groups(report):
        logits = rows[-1]
        worst = max(rows, key=_share)
        lines.append(
            f"{dtype:9} {path:8} {table:10} {_number(logits.rms):>8} "
            f"{_number(logits.peer_rms):>8} {_ratio(logits):>6}  "
            f"{_share(worst):.2f} {worst.tensor}"
        )
    lines += _budget_lines(report)
    for heading, entries in lists(report):
        lines += ["", f"{heading}:", *(f"  {key}: {text}" for key, text in entries)]
    return "\n".join([*lines, "", verdict(report)])


def _budget_lines(report: Report) -> list[str]:
    """The parts of the logits' error."""
    rows = [rows[-1] for _, rows in groups(report) if rows[-1].parts is not None]
    if not rows:
        return []
    lines = ["", "parts of the logits' error: weights, activations, algorithm, kernel; the whole"]
    for row in rows:
        parts = " ".join(f"{_number(value):>8}" for value in row.parts)
        lines.append(f"  {row.dtype:9} {row.path:8} {row.table:10} {parts}")
    return lines


def lists(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """What stands below the numbers: (heading, (key, text) of each entry); empty ones left out."""
    known = [(key, text_of(key)) for key in known_keys(report)]
    found = [(" ".join(key), text) for key, text in report.divergences.items()]
    named = [
        ("First divergence, every place fed the truth", found),
        (f"Known differences of {report.peer} that these tensors show", known),
    ]
    return [(heading, entries) for heading, entries in named if entries]


def numbers(row: Row) -> dict[str, str]:
    """What is known of a row, by name, as text; "" where it was not measured."""
    parts = (row.parts or (None,) * 5)[:4]
    return {
        "ours rms": _number(row.rms),
        "ours max": _number(row.max),
        "theirs rms": _number(row.peer_rms),
        "theirs max": _number(row.peer_max),
        "ours / theirs": _ratio(row),
        "tolerance": _number(row.tolerance),
        **dict(zip(ErrorParts._fields, map(_number, parts))),
    }


def known_keys(report: Report) -> list[str]:
    """Keys of the known differences that any row names, in order."""
    keys = (note.removeprefix("behind: ") for row in report.rows for note in row.notes)
    return list(dict.fromkeys(keys))


def as_json(report: Report, facts: dict) -> str:
    document = {
        **facts,
        "verdict": verdict(report),
        "within_budget": not report.beyond,
        "first_divergence": [
            {"side": side, "dtype": dtype, "path": path, "operator": text}
            for (side, dtype, path), text in report.divergences.items()
        ],
        "known": {key: text_of(key) for key in known_keys(report)},
        "rows": [
            {k: _finite(v) for k, v in row._asdict().items()}
            | {"parts": row.parts and row.parts._asdict(), "ratio": row.ratio}
            | {"within": row.within}
            for row in report.rows
        ],
    }
    return json.dumps(document)


def as_markdown(report: Report, facts: dict) -> str:
    """A table per dtype, path and table; a number of ours beyond the budget is bold."""
    lines = ["# Parity", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [f"**{verdict(report)}**"]
    keys = known_keys(report)
    for (dtype, path, table), rows in groups(report):
        heads = ["tensor", *numbers(rows[0]), "known"]
        lines += ["", f"## {dtype}, {path}, {table}", "", f"| {' | '.join(heads)} |"]
        lines.append("|---|" + "---:|" * (len(heads) - 2) + "---|")
        for row in rows:
            rms, *others = numbers(row).values()
            marks = " ".join(_mark(note, keys) for note in row.notes)
            cells = [f"`{row.tensor}`", rms if row.within else f"**{rms}**", *others, marks]
            lines.append(f"| {' | '.join(cells)} |")
    for heading, entries in lists(report):
        lines += ["", f"## {heading}", ""]
        lines += [f"{i}. **{key}**: {text}." for i, (key, text) in enumerate(entries, 1)]
    if keys:
        lines += ["", "A number in brackets stands behind the difference, not at it."]
    return "\n".join(lines) + "\n"


def _mark(note: str, keys: list[str]) -> str:
    number = keys.index(note.removeprefix("behind: ")) + 1
    return f"({number})" if note.startswith("behind: ") else str(number)


def _share(row: Row) -> float:
    """How much of its tolerance a tensor takes."""
    if row.tolerance is None or row.rms == 0:
        return 0.0
    return row.rms / row.tolerance if row.tolerance else math.inf


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


def _finite(value):
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

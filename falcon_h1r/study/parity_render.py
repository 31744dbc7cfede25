"""A parity report as text, Markdown, JSON, a self-contained HTML page or a picture."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ..files import whole_file
from ..tap_table import inner_name
from .heat import draw
from .parity import Report, Row
from .parity_known import text_of

FORMATS = (".md", ".json", ".html", ".png", ".svg", ".pdf")


def write_report(report: Report, facts: dict, path: str | Path) -> None:
    """Write the report; the suffix decides the form. Nothing half-written is left.

    facts: what is stated above it: model, versions, inputs. Raises ValueError for another suffix,
    and for a picture without matplotlib.
    """
    path = Path(path)
    check_suffix(path)
    with whole_file(path) as new:
        if path.suffix in (".png", ".svg", ".pdf"):
            draw(report, facts, new)
        else:
            make = {".md": as_markdown, ".json": as_json, ".html": as_html}[path.suffix]
            new.write_text(make(report, facts), encoding="utf-8")


def check_suffix(path: str | Path) -> None:
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"--out {path}: the name must end in one of {', '.join(FORMATS)}")


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
    if report.divergences:
        lines += ["", "first divergence, every place fed the truth:"]
        lines += [f"  {' '.join(key)}: {text}" for key, text in report.divergences.items()]
    keys = known_keys(report)
    if keys:
        lines += ["", f"known differences of {report.peer} that these tensors show:"]
        lines += [f"  {key}: {text_of(key)}" for key in keys]
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
    lines = ["# Parity", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [f"**{verdict(report)}**", ""]
    lines += [f"- {' '.join(key)}: {text}" for key, text in report.divergences.items()]
    keys = known_keys(report)
    for (dtype, path, table), rows in groups(report):
        lines += ["", f"## {dtype}, {path}, {table}", ""]
        lines.append(
            "| tensor | rms | max | theirs: rms | max | ours / theirs | tolerance | known |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
        for row in rows:
            marks = " ".join(_mark(note, keys) for note in row.notes)
            rms = _number(row.rms) if row.within else f"**{_number(row.rms)}**"
            cells = [f"`{row.tensor}`", rms, _number(row.max), _number(row.peer_rms)]
            cells += [_number(row.peer_max), _ratio(row), _number(row.tolerance)]
            cells += [_number(part) for part in (row.parts or (None,) * 5)[:4]] + [marks]
            lines.append("| " + " | ".join(cells) + " |")
    if keys:
        lines += ["", "## Known differences", ""]
        lines += [f"{i}. **{key}**: {text_of(key)}." for i, key in enumerate(keys, 1)]
        lines += ["", "A number in brackets stands behind the difference, not at it."]
    return "\n".join(lines) + "\n"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--paper:#fff;--line:#ccc;--soft:#666}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--line:#444;--soft:#aaa}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1200px;margin:0 auto;padding:1.5rem 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:12px;margin:.5rem 0}
th,td{padding:.15rem .4rem;border:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left;font-weight:400;font-family:ui-monospace,monospace}
td.beyond{outline:2px solid #d33;outline-offset:-2px}
dt{font-weight:600;margin-top:.5rem}dd{margin:0;color:var(--soft)}.bad{color:#d33}
"""


def as_html(report: Report, facts: dict) -> str:
    """A page without scripts or links: one table per dtype, path and table, layers as columns.

    Each cell: ours, a small bar of how much of its tolerance it takes, and on hovering all numbers.
    """
    title = html.escape(f"Parity of {facts.get('model', '')}")
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"]
    parts.append("<meta name='viewport' content='width=device-width,initial-scale=1'>")
    parts.append(f"<style>{_STYLE}</style><h1>{title}</h1><dl>")
    parts += [f"<dt>{_esc(key)}</dt><dd>{_esc(value)}</dd>" for key, value in facts.items()]
    state = "bad" if report.beyond else ""
    parts.append(f"</dl><p class='{state}'><strong>{_esc(verdict(report))}</strong></p>")
    if report.divergences:
        parts.append("<h2>First divergence, every place fed the truth</h2><ul>")
        parts += [
            f"<li>{_esc(' '.join(key))}: {_esc(text)}</li>"
            for key, text in report.divergences.items()
        ]
        parts.append("</ul>")
    parts.append(
        "<p>A cell: relative root mean square error of ours to float64, and behind the slash ours "
        "over theirs where the other side shows the tensor. The colour says how much of its "
        "tolerance ours takes, from none to all; a red frame is beyond it. A number in brackets is "
        "a known difference, explained below.</p>"
    )
    keys = known_keys(report)
    for (dtype, path, table), rows in groups(report):
        parts.append(
            f"<h2>{_esc(dtype)}, {_esc(path)}, {_esc(table)}</h2><div class='wide'><table>"
        )
        parts += _html_rows(rows, keys)
        parts.append("</table></div>")
    if keys:
        parts.append(f"<h2>Known differences of {_esc(report.peer)}</h2><dl>")
        for i, key in enumerate(keys, 1):
            parts.append(f"<dt>[{i}] {_esc(key)}</dt><dd>{_esc(text_of(key))}</dd>")
        parts.append("</dl>")
    return "".join(parts) + "</html>\n"


def _html_rows(rows: list[Row], keys: list[str]) -> Iterator[str]:
    cells = {(inner_name(row.tensor), _layer(row)): row for row in rows}
    layers = sorted({layer for _, layer in cells})
    heads = "".join(f"<th>{'model' if layer < 0 else f'layer {layer}'}</th>" for layer in layers)
    yield f"<tr><th>tensor</th>{heads}</tr>"
    for name in dict.fromkeys(name for name, _ in cells):
        row_cells = (_html_cell(cells.get((name, layer)), keys) for layer in layers)
        yield f"<tr><th>{_esc(name)}</th>{''.join(row_cells)}</tr>"


def _html_cell(row: Row | None, keys: list[str]) -> str:
    if row is None:
        return "<td></td>"
    share = min(_share(row), 1.0)
    text = _number(row.rms) + (f" / {_ratio(row)}" if row.ratio is not None else "")
    marks = "".join(f" [{keys.index(n) + 1}]" for n in row.notes if n in keys)
    known = "; ".join(row.notes)
    hover = (
        f"{row.tensor}: ours rms {row.rms:.3g}, max {row.max:.3g}; theirs "
        f"rms {_number(row.peer_rms)}, max {_number(row.peer_max)}; tolerance "
        f"{_number(row.tolerance)}"
        + (f"; {_parts(row)}" if row.parts else "")
        + (f"; known: {known}" if known else "")
    )
    kind = "" if row.within else " class='beyond'"
    colour = f"color-mix(in srgb,#e69f00 {share * 60:.0f}%,transparent)"
    return f"<td{kind} style='background:{colour}' title='{_esc(hover)}'>{text}{marks}</td>"


def _parts(row: Row) -> str:
    return ", ".join(f"{k} {_number(v)}" for k, v in row.parts._asdict().items())


def _layer(row: Row) -> int:
    return int(row.tensor.split(".")[1]) if row.tensor.startswith("layers.") else -1


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


def _esc(value) -> str:
    return html.escape(str(value), quote=True)

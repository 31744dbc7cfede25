"""A parity report as one HTML file: a heat map of ours beside one of the other side.

Style and script are in it (page.css of the dissect page, parity.css, parity.js), nothing is
fetched. Every cell can be reached with the keyboard and says its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from .parity import Report, Row
from .parity_grid import DECADES, Grid, Panel, grid_of, layer_name
from .parity_render import known_keys, lists, numbers, verdict

LEVELS = 16  # colours of a scale
NUMBERED = 8  # columns up to which a cell has room for its number
STOPS = {  # those of the dissect page's maps: lightness runs one way from the background
    "light": ("#f4f2ec", "#bcd9dc", "#6fb0bd", "#2b7c98", "#134a70", "#0a2144"),
    "dark": ("#22262c", "#17455c", "#16708a", "#35a0b2", "#86cdd2", "#e6f6f2"),
}
_THEME = (
    'document.documentElement.dataset.theme=matchMedia("(prefers-color-scheme: dark)").matches'
    '?"dark":"light";'
)


def as_html(report: Report, facts: dict) -> str:
    """The page. facts: what is stated above the maps: model, versions, inputs."""
    here = files("falcon_h1r") / "study"
    names = ("page.css", "parity.css", "parity.js")
    style, own, script = ((here / name).read_text(encoding="utf-8") for name in names)
    title = f"Parity of {facts.get('model', '')}" + f" and {report.peer}" * bool(report.peer)
    kind = "verdict bad" if report.beyond else "verdict"
    grid = grid_of(report)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<link rel="icon" href="data:,"><script>{_THEME}</script>',
        f"<style>{style}{own}{''.join(_levels())}</style>",
        f'<header class="page"><h1>{escape(title)}</h1>',
        f'<p class="{kind}"><strong>{escape(verdict(report))}</strong></p><dl>',
        *(f"<dt>{_esc(key)}</dt><dd>{_esc(value)}</dd>" for key, value in facts.items()),
        "</dl></header><main>",
        *_maps(report, grid),
    ]
    for heading, entries in lists(report):
        parts.append(f"<section><h2>{escape(heading)}</h2><ol>")
        parts += [f"<li><b>{_esc(key)}</b>: {_esc(text)}</li>" for key, text in entries]
        parts.append("</ol></section>")
    parts.append('</main><p id="cell">Pick a cell: click on it, or go to a map with the Tab key ')
    parts.append("and move with the arrow keys. Its numbers stand here.</p>")
    return "".join(parts) + f"<script>{script}</script></html>\n"


def _levels() -> Iterator[str]:
    """One class per colour and theme, with the text colour that can be read on it."""
    for theme, stops in STOPS.items():
        for level in range(LEVELS):
            at = level / (LEVELS - 1) * (len(stops) - 1)
            k = min(int(at), len(stops) - 2)
            low, high = ([int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops[k : k + 2])
            rgb = [round(a + (at - k) * (b - a)) for a, b in zip(low, high)]
            r, g, b = ((c / 255) ** 2.2 for c in rgb)
            ink = "#f6f4ee" if 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18 else "#14161a"
            yield f":root[data-theme={theme}] .h{level}"
            yield f"{{background:rgb({','.join(map(str, rgb))});color:{ink}}}"


def _maps(report: Report, grid: Grid) -> Iterator[str]:
    """A section per dtype, path and table, with the legend of its colours."""
    notes = known_keys(report)
    for dtype, path, table in dict.fromkeys(panel[:3] for panel in grid.panels):
        yield f"<section><h2>{_esc(dtype)}, {_esc(path)}, {_esc(table)}</h2>"
        high = 10 ** grid.scales[dtype]
        ramp = "".join(f'<i class="h{n}"></i>' for n in range(LEVELS))
        yield '<div class="legend"><span>relative root mean square error to float64</span>'
        yield f'<div class="ramp">{ramp}</div><div class="ticks"><span>≤ '
        yield f"{high / 10**DECADES:.1e}</span><span>{high:.1e}</span></div></div>"
        yield '<p class="keys"><span><i class="key beyond"></i>framed: beyond the budget</span>'
        if report.peer:
            yield f'<span><i class="key none"></i>not shown by {_esc(report.peer)}</span>'
        yield '</p><div class="panels">'
        for panel in grid.panels:
            if panel[:3] == (dtype, path, table):
                yield from _map(grid, panel, report.peer, notes)
        yield "</div></section>"


def _map(grid: Grid, panel: Panel, peer: str, notes: list[str]) -> Iterator[str]:
    label = f"{panel.who}: {panel.dtype}, {panel.path}. Rows are tensors, columns layers."
    many = " many" * (len(grid.layers) > NUMBERED)
    yield f'<figure><figcaption>{_esc(panel.who)}</figcaption><div class="scroll{many}">'
    heads = "".join(f'<th scope="col">{layer_name(layer)}</th>' for layer in grid.layers)
    yield f'<table role="grid" aria-label="{_esc(label)}"><thead><tr><th scope="col">layer</th>'
    yield f"{heads}</tr></thead><tbody>"
    for name in grid.names:
        yield f'<tr><th scope="row">{_esc(name)}</th>'
        for layer in grid.layers:
            row = panel.rows.get((name, layer))
            yield "<td></td>" if row is None else _cell(grid, panel, row, peer, notes)
        yield "</tr>"
    yield "</tbody></table></div></figure>"


def _cell(grid: Grid, panel: Panel, row: Row, peer: str, notes: list[str]) -> str:
    value = panel.value(row)
    if value is None:
        kind, text, state = "none", "", f"not shown by {peer}; "
    else:
        kind = f"h{round(grid.place(panel, value) * (LEVELS - 1))}"
        short = f"{value:.0e}".replace("e-0", "e-") if value else "0"
        text, state = f"<span>{short}</span>", ""
        if not panel.within(row):
            kind, state = f"{kind} beyond", "beyond the budget; "
    found = {key: f"{key} {number}" for key, number in numbers(row).items() if number}
    own = row.parts._fields if row.parts else ()
    parts = [found.pop(key) for key in own if key in found]
    first = (f"{panel.side} rms", "tolerance", f"{panel.side} max")
    says = ", ".join(found[key] for key in dict.fromkeys((*first, *found)) if key in found)
    says += f"; parts of ours: {', '.join(parts)}" if parts else ""
    known = sorted({notes.index(note.removeprefix("behind: ")) + 1 for note in row.notes})
    says += f"; known differences {', '.join(map(str, known))}" if known else ""
    label = _esc(f"{row.tensor}: {state}{says}")
    return f'<td role="gridcell" tabindex="-1" class="{kind}" aria-label="{label}">{text}</td>'


def _esc(value) -> str:
    return escape(str(value), quote=True)

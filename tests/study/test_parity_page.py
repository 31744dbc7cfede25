"""The page of a parity report in a browser: its maps, what cells say, the keyboard."""

import math
import re
from pathlib import Path

import browser
import pytest
from models import make_config

from falcon_h1r.study import parity_page
from falcon_h1r.study.parity import Report, Row, compared_names
from falcon_h1r.study.parity_grid import DECADES, grid_of
from falcon_h1r.study.parity_known import KNOWN
from falcon_h1r.study.parity_page import as_html

NOTE = next(entry.key for entry in KNOWN)
WIDE = "document.documentElement.scrollWidth"
CELLS = "[...document.querySelectorAll('table')].map((t) => t.querySelectorAll('td[aria-label]'))"
SAID = "document.getElementById('cell').textContent"
FOCUSED = "document.activeElement.getAttribute('aria-label')"
# Names and numbers that leave their cell, and the page's own texts that leave the screen.
CLIPPED = """
[...document.querySelectorAll('th, td, h1, h2, p, dd, li, figcaption, .ticks span')].filter((n) => {
  const cell = n.getBoundingClientRect(), range = document.createRange();
  range.selectNodeContents(n);
  const text = range.getBoundingClientRect();
  const out = text.left < cell.left - 1 || text.right > cell.right + 1 || text.right > innerWidth;
  return text.width && !n.closest('.many') && out;
}).map((n) => n.textContent)
"""
SMALL = """
[...document.querySelectorAll('td[aria-label]')].filter((n) => {
  const box = n.getBoundingClientRect();
  return box.width < 24 || box.height < 24;
}).length
"""
# The contrast between a cell's number and its colour.
FAINT = """
(() => {
  const light = (css) => {
    const [r, g, b] = css.match(/\\d+/g).map((v) => (v / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return [...document.querySelectorAll('td span')].filter((n) => {
    const style = getComputedStyle(n), back = getComputedStyle(n.parentNode);
    const pair = [light(style.color), light(back.backgroundColor)].sort((a, b) => a - b);
    return pair[1] / pair[0] < 4;
  }).map((n) => n.parentNode.className);
})()
"""


def made_report(layers=3, peer="transformers 9.9.9") -> Report:
    """Errors that grow along the forward; of the other side one is beyond, some are missing."""
    names = compared_names(make_config(num_hidden_layers=layers))
    rows = []
    for dtype, size in (("float32", 1e-7), ("bfloat16", 1e-2)):
        for place, name in enumerate(names):
            ours = size * 10 ** (place / len(names)) * (not name.endswith("scan.D"))
            seen = peer and not name.endswith("conv.window")
            theirs = ours * (40 if name == "layers.1.mamba.scan.dt" else 1.1) if seen else None
            notes = (NOTE,) if name == "layers.1.mamba.scan.dt" else ()
            bound = 0.5 * ours if name == "logits" else 2 * ours
            rows.append(
                Row(name, dtype, "prefill", "torch", ours, ours, theirs, theirs, bound, notes)
            )
    return Report(rows, peer, {})


def test_panels_hold_both_sides():
    report = made_report()
    grid = grid_of(report)
    assert [(p.dtype, p.side, p.who) for p in grid.panels] == [
        (dtype, side, who)
        for dtype in ("float32", "bfloat16")
        for side, who in (("ours", "ours, torch"), ("theirs", "transformers 9.9.9"))
    ]
    assert grid.layers == [0, 1, 2, -1] and grid.names[0] == "embed_tokens"
    panel, high = grid.panels[0], 10 ** grid.scales["float32"]
    assert grid.place(panel, high) == 1.0 == grid.place(panel, math.inf)
    assert grid.place(panel, 0.0) == 0.0 == grid.place(panel, high / 10 ** (DECADES + 1))
    assert grid.place(panel, high / 10 ** (DECADES / 2)) == pytest.approx(0.5)
    assert {panel.side for panel in grid_of(made_report(peer="")).panels} == {"ours"}


def test_every_cell_says_its_numbers_and_none_is_out_of_reach():
    report = made_report()
    html = as_html(report, {"model": "<tiny>"})
    assert "<tiny>" not in html and "&lt;tiny&gt; and transformers 9.9.9" in html
    shown = sum(row.peer_rms is not None for row in report.rows)
    assert html.count('role="gridcell"') == 2 * len(report.rows)
    assert html.count("not shown by transformers 9.9.9; ") == len(report.rows) - shown
    dt = next(row for row in report.rows if row.tensor == "layers.1.mamba.scan.dt")
    says = f"{dt.tensor}: beyond the budget; theirs rms {dt.peer_rms:.1e}, tolerance "
    assert f"{says}{dt.tolerance:.1e}, theirs max" in html and "; known differences 1" in html
    assert 'class="verdict bad"' in html


def test_the_colours_are_those_of_the_dissect_page():
    drawing = (Path(parity_page.__file__).parent / "figures.js").read_text(encoding="utf-8")
    ramps = re.findall(r"sequential: \[(.*?)\]", drawing)
    assert [tuple(re.findall(r"#\w+", ramp)) for ramp in ramps] == [*parity_page.STOPS.values()]


@pytest.fixture(scope="module")
def tab():
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "page.html"
    path.write_text(as_html(made_report(), {"model": "tiny", "torch": "9"}), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_or_is_too_small(tab, written, width, dark):
    tab.open(written, width, dark=dark)
    assert tab.run(WIDE) <= width and tab.run(CLIPPED) == []
    assert tab.run(SMALL) == 0 and tab.run(FAINT) == [] and tab.problems == []
    assert len(tab.run(f"{CELLS}.map((cells) => cells.length)")) == 4
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    heads = tab.run("[...document.querySelector('thead').querySelectorAll('th')]"
                    ".map((n) => n.textContent)")  # fmt: skip
    assert heads == ["layer", "0", "1", "2", "model"]
    keys = tab.run("[...document.querySelectorAll('section')][0].querySelector('.keys').innerText")
    assert "framed: beyond the budget" in keys and "not shown by transformers 9.9.9" in keys


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_keyboard_reaches_every_cell(tab, written, width):
    tab.open(written, width)
    stops = []
    for _ in range(4):  # one tab stop per map
        tab.press("Tab")
        stops.append(tab.run(FOCUSED))
    assert all(stop.startswith("embed_tokens: ") for stop in stops)
    for _ in range(3):
        tab.press("ArrowDown")
    first = tab.run(FOCUSED)
    tab.run("document.querySelector('table td[aria-label]').focus()")
    assert tab.run(SAID) == tab.run(FOCUSED) and first != tab.run(FOCUSED)
    tab.press("ArrowDown")
    tab.press("ArrowDown")  # from the model's column to the layers'
    assert tab.run(FOCUSED).startswith("layers.2.input_layernorm: ours rms ")
    tab.press("ArrowLeft")
    assert tab.run(FOCUSED).startswith("layers.1.input_layernorm: ")
    tab.press("End")
    assert tab.run(FOCUSED).startswith("layers.2.input_layernorm: ")
    tab.press("Home")
    tab.press("ArrowLeft")  # stays at the border
    assert tab.run(FOCUSED).startswith("layers.0.input_layernorm: ")
    assert tab.run(SAID) == tab.run(FOCUSED) and "tolerance" in tab.run(SAID)
    ring = tab.run("getComputedStyle(document.activeElement).outline")
    assert "3px" in ring and "solid" in ring
    reached = {tab.run(FOCUSED)}
    for _ in range(200):
        tab.press("ArrowDown")
        reached.add(tab.run(FOCUSED))
        box = tab.run("(({top, bottom}) => [top, bottom])"
                      "(document.activeElement.getBoundingClientRect())")  # fmt: skip
        bar = tab.run("document.getElementById('cell').getBoundingClientRect().top")
        assert box[0] >= 0 and box[1] <= bar + 1  # never behind the numbers
        if tab.run(FOCUSED).startswith("logits"):
            break
    assert tab.run(FOCUSED).startswith("logits: beyond the budget")
    assert len(reached) == tab.run("document.querySelector('tbody').rows.length") - 2
    assert tab.problems == []


@pytest.mark.slow
def test_the_mouse_shows_a_cell(tab, written):
    tab.open(written, 1280)
    box = tab.run(
        "(({left, top}) => [left, top])(document.querySelector('td.h12').getBoundingClientRect())"
    )
    tab.mouse(box[0] + 8, box[1] + 8, click=True)
    label = tab.run("document.querySelector('td.h12').getAttribute('aria-label')")
    assert tab.run(SAID) == label == tab.run(FOCUSED)


@pytest.mark.slow
def test_many_layers_scroll_inside_their_map(tab, tmp_path):
    (tmp_path / "deep.html").write_text(as_html(made_report(44), {"model": "deep"}))
    for width in (390, 1280):
        tab.open(tmp_path / "deep.html", width)
        assert tab.run(WIDE) <= width and tab.run(SMALL) == 0
        tab.run("[...document.querySelectorAll('tbody tr')][9].querySelector('td').focus()")
        tab.press("End")
        assert tab.run(FOCUSED).startswith("layers.43.")
        place = tab.run("document.activeElement.getBoundingClientRect().right")
        assert place <= width + 1 and tab.problems == []

"""A parity report as a file: text (`parity_render`), a page (`parity_page`), a picture (`heat`)."""

from __future__ import annotations

from pathlib import Path

from ..files import whole_file
from .heat import draw
from .parity import Report
from .parity_page import as_html
from .parity_render import as_json, as_markdown

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

"""What is written to a terminal, and what in its place elsewhere: styles, progress, text.

Escape codes go to a terminal that takes them (TERM is not `dumb`), colours and other styles only
where NO_COLOR is not set (https://no-color.org).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TextIO

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


def can_rewrite(out: TextIO) -> bool:
    """Whether a line that was written can be written over."""
    return out.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def can_style(out: TextIO) -> bool:
    """Whether text may be dimmed or coloured."""
    return can_rewrite(out) and not os.environ.get("NO_COLOR")


def print_json(document: dict) -> None:
    """One line on stdout, in ASCII where stdout has no code for other characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    ascii_only = not encoding.lower().startswith("utf")
    print(json.dumps(document, ensure_ascii=ascii_only, allow_nan=False))


def progress(text: str, out: TextIO | None = None) -> None:
    """Show a line in place of the last one on stderr, "" to clear it; not shown elsewhere."""
    out = sys.stderr if out is None else out
    if can_rewrite(out):
        width = shutil.get_terminal_size().columns - 1
        out.write(f"\r{text[:width].ljust(width)}\r")
        out.flush()


class Display:
    """Writes text as it comes: raw, or with thinking dimmed and without its tags."""

    def __init__(self, out: TextIO, opened: bool):
        from ..text import ThinkSplitter

        self._out, self._tail, self._written = out, "", 0
        self._splitter = ThinkSplitter(opened) if can_style(out) else None
        self._last: str | None = None

    def write(self, text: str) -> None:
        self._written += len(text)
        if self._splitter is None:
            self._put(text)
        else:
            self._show(self._splitter.push(text))
        self._out.flush()

    def close(self, text: str) -> None:
        """Write what is missing of the whole text, and end its last line.

        An interrupted sequence has text held back: half a character, or what might have become a
        stop string.
        """
        self.write(text[self._written :])
        if self._splitter is not None:
            self._show(self._splitter.flush())
        if not self._tail.endswith("\n"):
            self._put("\n")
        self._out.flush()

    def _show(self, pieces) -> None:
        for kind, text in pieces:
            if self._last not in (None, kind):
                text = "\n\n" + text.removeprefix("\n\n")
            self._last = kind
            self._put(f"{_DIM}{text}{_NORMAL}" if kind == "thinking" else text)

    def _put(self, text: str) -> None:
        self._tail = text[-1:] or self._tail
        self._out.write(text)

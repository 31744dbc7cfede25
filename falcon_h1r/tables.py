"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str = "l") -> list[str]:
    """A line for each row, its cells under those of the other rows, two spaces between columns.

    rows: all of one length, the head among them. sides: "l" or "r" for each column, to which side
    its cells go; the last letter is that of all further columns. No line ends in a space.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides)
        ).rstrip()
        for row in rows
    ]

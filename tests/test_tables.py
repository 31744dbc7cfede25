"""Tables of text."""

import pytest

from falcon_h1r.tables import aligned

ROWS = [["name", "n", "seconds"], ["a", "100", "1.5"], ["a long one", "2", ""]]


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        (
            "l",
            [
                "name        n    seconds",
                "a           100  1.5",
                "a long one  2",
            ],
        ),
        (
            "r",
            [
                "      name    n  seconds",
                "         a  100      1.5",
                "a long one    2",
            ],
        ),
        (
            "lr",
            [
                "name          n  seconds",
                "a           100      1.5",
                "a long one    2",
            ],
        ),
        (
            "lrl",
            [
                "name          n  seconds",
                "a           100  1.5",
                "a long one    2",
            ],
        ),
    ],
)
def test_columns_line_up(sides, expected):
    assert aligned(ROWS, sides) == expected


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError):
        aligned([["a", "b"], ["c"]])

"""Strides in units of their common power of two.

Triton tells the compiler that an integer argument is a multiple of 16, and nothing about one that
is not. in_proj of Falcon-H1R-7B is 6680 = 8 * 835 channels wide: its rows lie on 16-byte borders,
but a kernel that is handed 6680 must assume that they do not, and moves 16 bits at a time. So
kernels take `stride // unit` and a constexpr `unit`, and multiply: the product's divisibility is
then plain to see.
"""

from collections.abc import Sequence


def in_units(*strides: int) -> tuple[int, Sequence[int]]:
    """The largest of 16, 8, 4, 2, 1 that divides every stride, and the strides in that unit."""
    unit = 16
    while any(stride % unit for stride in strides):
        unit //= 2
    return unit, [stride // unit for stride in strides]

"""Functions that several kernels apply to single elements; float32 in, float32 out."""

import triton
import triton.language as tl


@triton.jit
def silu(x, EXACT: tl.constexpr):
    """x * sigmoid(x).

    EXACT divides (error below 3 units in float32's last place). Otherwise the reciprocal is the
    square of a reciprocal root, which needs neither the range check nor the scaling of a division:
    6 instructions in place of 13, good to 21 bits, for results that are rounded to 16-bit formats.
    """
    if EXACT:
        result = x / (1.0 + tl.exp(-x))
    else:
        root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        result = x * root * root
    return result


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few roundoffs at any x; beyond 20 that is x itself, as torch has it.

    It is max(x, 0) + log(1 + y) with y = exp(-|x|) in (0, 1], and the logarithm is 2 atanh(s),
    s = y / (2 + y) <= 1/3, as a series: the machine's own logarithm is good to 1e-7 absolutely, so
    a small step size would keep few correct digits.
    """
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    s2 = s * s
    series = 2.0 / 15
    series = series * s2 + 2.0 / 13
    series = series * s2 + 2.0 / 11
    series = series * s2 + 2.0 / 9
    series = series * s2 + 2.0 / 7
    series = series * s2 + 2.0 / 5
    series = series * s2 + 2.0 / 3
    # 2 s = y - y s: the leading term is y itself, exact, and what is subtracted from it smaller.
    log1p_y = y - s * (y - s2 * series)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_y

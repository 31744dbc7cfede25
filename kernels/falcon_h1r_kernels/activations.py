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
    """log(1 + exp(x)) to a few roundoffs at any x; as torch's, it is x itself where x > 20.

    max(x, 0) + log1p(u) with u = exp(-|x|) in (0, 1], and log1p(u) = 2 atanh(s), s = u / (2 + u):
    its series in s^2 <= 1/9 keeps the relative accuracy that the machine's logarithm loses near 1,
    where the small step sizes are. Beyond 20 the second term is below x's roundoff by itself.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    square = s * s
    series = 2.0 / 15
    series = series * square + 2.0 / 13
    series = series * square + 2.0 / 11
    series = series * square + 2.0 / 9
    series = series * square + 2.0 / 7
    series = series * square + 2.0 / 5
    series = series * square + 2.0 / 3
    # 2 s = u - u s: the leading term is u itself, exact.
    log1p_u = u - s * (u - square * series)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_u

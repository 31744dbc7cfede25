"""Shared by the kernel tests: inputs, the tolerance rule, layouts that are not contiguous."""

import os

import torch
from models import rms_error

ON_GPU = "FALCON_H1R_TEST_DEVICE" in os.environ
# A GPU's exp2 and rsqrt are off by up to two roundoffs of float32 where a CPU's are by one, and its
# tensor cores cut off what they add.
FACTOR = 4 if ON_GPU else 2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def normal(*shape, seed=0, dtype=torch.float32):
    """Standard normal values, representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_no_worse(found, independent, exact, factor=FACTOR):
    """At most twice the error of an independent implementation in the same dtype (`FACTOR`).

    Both as root mean square and at the worst element. The floor of two roundoffs keeps a lucky
    zero of the independent side from asking for the impossible.
    """
    assert found.dtype == independent.dtype and found.shape == exact.shape
    assert torch.isfinite(found).all()
    floor = factor * ROUNDOFF[found.dtype]
    rms = rms_error(found, exact)
    rms_allowed = max(factor * rms_error(independent, exact), floor / 2)
    assert rms <= rms_allowed, f"rms error {rms:.3g}, allowed {rms_allowed:.3g}"
    worst, other = (float((t.double() - exact).abs().max()) for t in (found, independent))
    allowed = max(factor * other, floor * float(exact.abs().max()))
    assert worst <= allowed, f"worst error {worst:.3g}, allowed {allowed:.3g}"


def assert_same(found, expected):
    """Equal to the last bit; on a GPU, where strides decide the order of sums, to rounding."""
    if ON_GPU:
        roundoff = 8 * ROUNDOFF[found.dtype]
        torch.testing.assert_close(found, expected, rtol=roundoff, atol=roundoff)
    else:
        assert torch.equal(found, expected)


def strided(like):
    """Functions that copy a tensor of `like`'s rank into memory that is not contiguous.

    Every other element of the last axis, transposed storage, and a slice with an offset; NaN
    stands wherever no element of the tensor does.
    """

    def every_other(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan).to(t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def offset(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan).to(t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    return every_other, transposed, offset

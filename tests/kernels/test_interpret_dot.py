"""tl.dot of the repaired interpreter: operand rounding, accumulation, and sizes a GPU refuses."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    c = tl.load(c_ptr + m * N + n)
    c = tl.dot(a, b, acc=c, input_precision=PRECISION, out_dtype=c_ptr.dtype.element_ty)
    tl.store(c_ptr + m * N + n, c)


def dot(a, b, precision="ieee", c=None):
    c = torch.zeros(a.shape[0], b.shape[1]) if c is None else c.clone()
    _dot_kernel[(1,)](a, b, c, *c.shape, a.shape[1], precision)
    return c


def operands(k=32, dtype=torch.float32):
    return torch.randn(16, k).to(dtype), torch.randn(k, 64).to(dtype)


def max_error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_exact_values(dtype):
    a, b = operands(dtype=dtype)
    c = torch.randn(16, 64)
    exact = c.double() + a.double() @ b.double()
    assert max_error(dot(a, b, c=c), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype):
    a, b = operands(dtype=dtype)
    assert max_error(dot(a, b), a.double() @ b.double()) < 1e-6


def test_int8_accumulates_in_int32():
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((16, 64), (64, 16)))
    found = dot(a, b, c=torch.full((16, 16), 2**20, dtype=torch.int32))
    assert torch.equal(found, a.int() @ b.int() + 2**20)


def test_float16_accumulator():
    a, b = operands(dtype=torch.float16)
    found = dot(a, b, c=torch.zeros(16, 64, dtype=torch.float16))
    assert torch.equal(found, (a.float() @ b.float()).half())


def test_float64():
    a, b = (t.double() for t in operands())
    found = dot(a, b, c=torch.zeros(16, 64, dtype=torch.float64))
    assert max_error(found, a @ b) < 1e-15


def tf32(x):
    """Ten mantissa bits, to nearest, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa.abs() * 2**11
    return torch.ldexp(torch.floor(scaled + 0.5) * mantissa.sign() / 2**11, exponent)


def test_tf32_rounds_its_operands():
    a, b = operands()
    a[0, :4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2**-130])  # ties; subnormal
    exact = a.double() @ b.double()
    found = dot(a, b, "tf32")
    assert max_error(found, tf32(a) @ tf32(b)) < 1e-6
    assert max_error(found, exact) > 1e-4 > 1e-6 > max_error(dot(a, b, "ieee"), exact)
    assert torch.equal(dot(a, b, None), found)  # what tl.dot takes when not told otherwise


def test_tf32x3_is_nearly_exact():
    a, b = operands()
    exact = a.double() @ b.double()
    found = dot(a, b, "tf32x3")
    assert max_error(found, exact) < 1e-6
    high_a, high_b = tf32(a), tf32(b)
    low_a, low_b = tf32(a.double() - high_a), tf32(b.double() - high_b)
    three = high_a @ high_b + high_a @ low_b + low_a @ high_b
    assert max_error(found, three) < 5e-7
    one = torch.zeros(16, 16)
    one[0, 0] = 1 + 2**-12 + 2**-23  # the low part, 2^-12 (1 + 2^-11), is a tie as well
    assert dot(one, torch.ones(16, 16), "tf32x3")[0, 0] == 1 + 2**-12 + 2**-22


def test_tf32_keeps_infinities():
    a, b = torch.zeros(16, 16), torch.zeros(16, 16)
    every_bit = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # a NaN
    a[0, 0], a[1, 0], b[0] = torch.inf, every_bit, 1.0
    found = dot(a, b, "tf32")
    assert found[0].eq(torch.inf).all() and found[1].isnan().all() and not found[2:].any()


@pytest.mark.parametrize(
    "dtype,enough,short",  # float32: 8 in Triton 3.9, 16 in 3.6
    [
        (torch.bfloat16, 16, 8),
        (torch.float16, 16, 8),
        (torch.float32, 16, 4),
        (torch.float8_e5m2, 32, 16),
    ],
)
def test_least_depth(dtype, enough, short):
    dot(*operands(enough, dtype))
    with pytest.raises(InterpreterError, match="should have M >= 1, N >= 1 and K >= "):
        dot(*operands(short, dtype))


@triton.jit
def _batched_kernel(a_ptr, b_ptr, c_ptr):
    s, i, j = tl.arange(0, 2)[:, None, None], tl.arange(0, 16), tl.arange(0, 16)
    at = s * 256 + i[None, :, None] * 16 + j[None, None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(c_ptr + at, c)


def test_batched():
    a, b = torch.randn(2, 16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(2, 16, 16)
    _batched_kernel[(1,)](a, b, c)
    assert max_error(c, a.double() @ b.double()) < 1e-6

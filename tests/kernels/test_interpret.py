"""The repaired interpreter against torch: every bit pattern where there are few, else the edges."""

import interpret
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

BITS = torch.arange(2**16, dtype=torch.int32)
ALL_BF16 = BITS.to(torch.int16).view(torch.bfloat16)  # wraps around: every pattern
FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def test_install_again_changes_nothing():
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    interpret.install()
    assert dict(vars(builder)) == before and builder.exact_bfloat16


@triton.jit
def _convert_kernel(x_ptr, y_ptr, n, EXPLICIT: tl.constexpr, ROUNDING: tl.constexpr):
    at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    x = tl.load(x_ptr + at, mask=at < n)
    if EXPLICIT:
        x = x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(y_ptr + at, x, mask=at < n)


def convert(x, dtype, explicit=True, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    _convert_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), explicit, rounding)
    return y


def assert_same(found, expected):
    """Bit for bit, signs of zero included; any NaN for a NaN."""
    assert found.dtype == expected.dtype
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    same = found.view(integer) == expected.view(integer)
    assert (same | (found.float().isnan() & expected.float().isnan())).all()


def around_bf16():
    """float32: each bfloat16, values next to it, the midpoint to the next and values next to it."""
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return ((BITS[:, None].long() << 16) + tails).to(torch.int32).view(torch.float32).reshape(-1)


@pytest.mark.parametrize("explicit,rounding", [(True, None), (True, "rtne"), (False, None)])
def test_float32_to_bfloat16(explicit, rounding):
    x = around_bf16()
    assert_same(convert(x, torch.bfloat16, explicit, rounding), x.bfloat16())


def test_float32_to_bfloat16_toward_zero():
    x = around_bf16()
    x = x[x.isfinite()]
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert_same(convert(x, torch.bfloat16, rounding="rtz"), truncated)


def test_float64_to_bfloat16_rounds_once():
    """Next to a midpoint by less than float32 can tell: rounding to float32 first would tie."""
    down = ALL_BF16[(ALL_BF16.float().abs() > 1e-37) & (ALL_BF16.float().abs() < 1e38)]
    up = (down.view(torch.int16) + 1).view(torch.bfloat16)
    middle = (down.double() + up.double()) / 2
    assert_same(convert(middle * (1 + 2**-40), torch.bfloat16), up)
    assert_same(convert(middle * (1 - 2**-40), torch.bfloat16), down)
    assert_same(convert(middle, torch.bfloat16), middle.float().bfloat16())
    ends = torch.tensor([torch.nan, torch.inf, -1e300, 1e-300, -0.0], dtype=torch.float64)
    assert_same(convert(ends, torch.bfloat16), ends.bfloat16())


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16])
def test_from_bfloat16(to):
    assert_same(convert(ALL_BF16, to), ALL_BF16.to(to))


def test_float16_to_bfloat16_and_integers():
    x = BITS.to(torch.int16).view(torch.float16)
    assert_same(convert(x, torch.bfloat16), x.bfloat16())
    small = ALL_BF16[ALL_BF16.float().abs() < 2**30]
    assert torch.equal(convert(small, torch.int32), small.to(torch.int32))
    whole = torch.randint(-(2**24), 2**24, (4096,), dtype=torch.int32)
    assert_same(convert(whole, torch.bfloat16), whole.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS8)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_float8(dtype, source):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert_same(convert(every, source), every.to(source))
    largest = torch.finfo(dtype).max
    x = BITS.to(torch.int16).view(torch.float16 if source is torch.float16 else torch.bfloat16)
    x = x.to(source)
    saturated = x.float().clamp(-largest, largest)  # as cvt.satfinite; torch overflows
    assert_same(convert(x, dtype), saturated.to(dtype))
    if source is torch.float32:
        x = (torch.rand(2**14) - 0.5).sign() * torch.exp2(torch.rand(2**14) * 20 - 12)
        x = x.clamp(-largest, largest)
        assert_same(convert(x, dtype), x.to(dtype))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, n):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + n + at, x - y)
    tl.store(out_ptr + 2 * n + at, x * y)
    tl.store(out_ptr + 3 * n + at, x / y)
    tl.store(out_ptr + 4 * n + at, -x)
    tl.store(out_ptr + 5 * n + at, tl.abs(x))
    tl.store(out_ptr + 6 * n + at, tl.where(x > y, x, y))
    tl.store(out_ptr + 7 * n + at, tl.where((x <= y) & (x != 0), x, y))
    tl.store(out_ptr + 8 * n + at, tl.maximum(x, y))
    tl.store(out_ptr + 9 * n + at, tl.minimum(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic(dtype):
    x = BITS.to(torch.int16).view(dtype)
    x = x[~x.isnan()][torch.randperm(2**16)[: 2**14] % 60000]
    y = x[torch.randperm(x.numel())]
    out = torch.empty(10, x.numel(), dtype=dtype)
    _arithmetic_kernel[(x.numel() // 1024,)](x, y, out, x.numel())
    expected = [x + y, x - y, x * y, x / y, 0 - x, x.abs(), torch.where(x > y, x, y)]
    expected += [torch.where((x <= y) & (x != 0), x, y), torch.maximum(x, y), torch.minimum(x, y)]
    out[4] += 0  # zeros: whether minus is 0 - x or a change of sign differs between versions
    for found, torchs in zip(out, expected, strict=True):
        assert (found.isnan() == torchs.isnan()).all()
        assert torch.equal(found.nan_to_num(7.0), torchs.nan_to_num(7.0))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 64)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr, tl.max(x, axis=0))
    tl.store(out_ptr + 1, tl.min(x, axis=0))
    tl.store(out_ptr + 2, tl.argmax(x, axis=0))
    tl.store(out_ptr + 3, tl.sum(x, axis=0))


def test_reductions_of_bfloat16():
    x = torch.randint(-9, 9, (64,)).bfloat16() * 0.5  # sums are exact
    x[37] = 6.0
    out = torch.empty(4)
    _reduce_kernel[(1,)](x, out)
    assert out.tolist() == [6.0, x.min().item(), 37.0, x.sum().item()]


@triton.jit
def _running_sum_kernel(x_ptr, y_ptr, REVERSE: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(y_ptr + at, tl.cumsum(tl.load(x_ptr + at), 0, REVERSE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_running_sums(dtype):
    x, y = torch.randint(-2, 3, (64,)).to(dtype), torch.empty(64, dtype=dtype)  # exact
    _running_sum_kernel[(1,)](x, y, False)
    assert torch.equal(y, x.cumsum(0))
    _running_sum_kernel[(1,)](x, y, True)
    assert torch.equal(y, x.flip(0).cumsum(0).flip(0))


@triton.jit
def _decayed(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def _scan_kernel(a_ptr, b_ptr, out_ptr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    pair = (tl.load(a_ptr + at), tl.load(b_ptr + at))
    _, states = tl.associative_scan(pair, AXIS, _decayed, REVERSE)
    tl.store(out_ptr + at, states)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan(axis, reverse):
    a, b = torch.rand(8, 16), torch.randn(8, 16)
    found = torch.empty(8, 16)
    _scan_kernel[(1,)](a, b, found, axis, reverse)
    expected, state = torch.empty(8, 16), 0.0
    steps = range(a.shape[axis])
    for step in reversed(steps) if reverse else steps:
        state = state * a.select(axis, step) + b.select(axis, step)
        expected.select(axis, step).copy_(state)
    torch.testing.assert_close(found, expected)


@triton.jit
def _pair_reduce_kernel(x_ptr, out_ptr, AXIS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    _, best = tl.reduce((at, tl.load(x_ptr + at)), AXIS, _later_of_larger, keep_dims=True)
    tl.store(out_ptr + tl.arange(0, N), tl.reshape(best, (N,)))


@triton.jit
def _later_of_larger(i0, x0, i1, x1):
    take = x1 >= x0
    return tl.where(take, i1, i0), tl.where(take, x1, x0)


@pytest.mark.parametrize("axis,n", [(0, 16), (1, 8), (None, 1)])
def test_reduce_with_any_function(axis, n):
    x, found = torch.randn(8, 16), torch.empty(n)
    _pair_reduce_kernel[(1,)](x, found, axis, n)
    assert torch.equal(found, (x.amax() if axis is None else x.amax(axis)).reshape(n))


@triton.jit
def _undefined_kernel(x_ptr, y_ptr, n):
    at = tl.arange(0, 8)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n))


def test_lanes_masked_off_without_other_are_not_zero():
    x, y = torch.randn(8), torch.empty(8)
    _undefined_kernel[(1,)](x, y, 5)
    assert torch.equal(y[:5], x[:5]) and y[5:].isnan().all()


@triton.jit
def _extremes_kernel(x_ptr, y_ptr, out_ptr):
    at = tl.arange(0, 4)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.maximum(x, y))
    tl.store(out_ptr + 4 + at, tl.minimum(x, y))
    tl.store(out_ptr + 8 + at, tl.clamp(x, 0.0, 2.0))
    tl.store(out_ptr + 12 + at, tl.fma(x, y, -1.0))


def test_extremes_ignore_nan_and_fma_rounds_once():
    nan, step = torch.nan, 1 + 2**-12
    x, y = torch.tensor([nan, 1.0, -3.0, step]), torch.tensor([2.0, nan, 5.0, step])
    out = torch.empty(4, 4)
    _extremes_kernel[(1,)](x, y, out)
    assert out[0].tolist() == [2.0, 1.0, 5.0, step] and out[1].tolist() == [2.0, 1.0, -3.0, step]
    assert out[2].tolist() == [0.0, 1.0, 0.0, step]
    assert out[3, 3] == 2**-11 + 2**-24 and out[3, 2] == -16.0


@triton.jit
def _scalar_mask_kernel(y_ptr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(y_ptr + at, 1.0, mask=(tl.program_id(0) > 0) & (at >= 0))


def test_scalar_comparison_in_a_mask():
    y = torch.zeros(8)
    _scalar_mask_kernel[(2,)](y)
    assert y.tolist() == [0.0] * 4 + [1.0] * 4


@triton.jit
def _one_bit_kernel(y_ptr, ADD: tl.constexpr):
    at = tl.arange(0, 4)
    low, high = at % 2 == 1, at >= 2
    tl.store(y_ptr + at, ((low ^ high) | (low * high)).to(tl.int32))
    if ADD:
        tl.store(y_ptr, (low + high).to(tl.int32))


def test_comparisons_are_one_bit():
    y = torch.empty(4, dtype=torch.int32)
    _one_bit_kernel[(1,)](y, False)
    assert y.tolist() == [0, 1, 1, 1]
    with pytest.raises(InterpreterError, match="int1 overflow in add: 0 to 2"):
        _one_bit_kernel[(1,)](y, True)


@triton.jit
def _assert_kernel(limit):
    tl.device_assert(tl.program_id(0) < limit, "too many programs")


def test_device_assert_fires():
    _assert_kernel[(3,)](3)
    with pytest.raises(InterpreterError, match=r"_assert_kernel, program \(3, 0, 0\).*too many"):
        _assert_kernel[(4,)](3)


@triton.jit
def _overflow_kernel(y_ptr, step, OPERATION: tl.constexpr, WIDE: tl.constexpr):
    number = tl.program_id(0) + tl.arange(0, 2)
    if WIDE:
        number = number.to(tl.int64)
    if OPERATION == "mul":
        number = number * step
    elif OPERATION == "add":
        number = number + step
    else:
        number = -number - step
    tl.store(y_ptr + tl.program_id(0) * 2 + tl.arange(0, 2), number)


@pytest.mark.parametrize("operation,step", [("mul", 2**30), ("add", 2**31 - 2), ("sub", 2**31 - 1)])
def test_integer_overflow_is_an_error(operation, step):
    y = torch.empty(4, dtype=torch.int64)
    _overflow_kernel[(1,)](y, step, operation, False)  # the largest values that fit
    _overflow_kernel[(2,)](y, step, operation, True)
    expected = {"mul": 2 * step, "add": 2 + step, "sub": -2 - step}[operation]
    assert y[3] == expected
    with pytest.raises(InterpreterError, match=f"int32 overflow in {operation}"):
        _overflow_kernel[(2,)](y, step, operation, False)


@triton.jit
def _atomic_kernel(y_ptr):
    at = tl.arange(0, 8)
    y = y_ptr + at // 4
    tl.atomic_add(y, tl.full((8,), 0.5, y_ptr.dtype.element_ty), mask=at != 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_atomic_add(dtype):
    y = torch.zeros(3, dtype=dtype)
    _atomic_kernel[(3,)](y)
    assert y.tolist() == [6.0, 4.5, 0.0]


@triton.jit
def _exchange_kernel(y_ptr, old_ptr):
    at = tl.arange(0, 8)
    zero, five, seven = at * 0, at * 0 + 5, tl.full((8,), 7, tl.int32)
    tl.store(old_ptr + at, tl.atomic_cas(y_ptr + at, zero, seven))
    tl.store(old_ptr + 8 + at, tl.atomic_max(y_ptr + 8 + at, five))


def test_other_atomics():
    y = torch.tensor([0, 1] * 8, dtype=torch.int32)
    y[12:] = 9
    old = torch.empty(16, dtype=torch.int32)
    before = y.clone()
    _exchange_kernel[(1,)](y, old)
    assert torch.equal(old, before)
    assert y.tolist() == [7, 1] * 4 + [5] * 4 + [9] * 4


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def _tuned_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


def test_autotune_needs_no_driver():
    x, y = torch.randn(200), torch.empty(200)
    _tuned_kernel[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, y, 200)
    assert torch.equal(x, y)


@triton.jit
def _no_op_kernel(x_ptr):
    pass


def test_launches_that_no_gpu_takes():
    with pytest.raises(interpret.MemoryFault, match=r"_no_op_kernel: grid \(1, 65536, 1\)"):
        _no_op_kernel[(1, 65536)](torch.empty(1))
    with pytest.raises(ValueError, match="x_ptr is on meta"):
        _no_op_kernel[(1,)](torch.empty(1, device="meta"))

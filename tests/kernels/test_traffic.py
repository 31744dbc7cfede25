"""Counted bytes and operations against closed forms."""

import interpret
import pytest
import torch
import triton
import triton.language as tl
from falcon_h1r_kernels.rms_norm import rms_norm


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_copy(dtype):
    x, y = torch.ones(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    with interpret.counted() as launches:
        _copy_kernel[(8,)](x, y, 1000, 128)
        _copy_kernel[(2, 1)](x, y, 100, 64)
    size = 1000 * x.itemsize
    assert launches[0] == ("_copy_kernel", (8, 1, 1), 8, size, size, size, size, 0)
    assert launches[1].grid == (2, 1, 1) and launches[1].unique_load_bytes == 100 * x.itemsize


@triton.jit
def _scale_kernel(x_ptr, weight_ptr, y_ptr, stride, D: tl.constexpr):
    column = tl.arange(0, D)
    x = tl.load(x_ptr + tl.program_id(0) * stride + column)
    y = x * tl.load(weight_ptr + column) * tl.load(weight_ptr)
    tl.store(y_ptr + tl.program_id(0) * stride + column, y)


def test_what_programs_share_is_unique_once():
    rows, d = 6, 64
    x, weight = torch.randn(rows, 2 * d)[:, :d], torch.randn(d)
    y = torch.empty(rows, 2 * d)[:, :d]
    with interpret.counted() as launches:
        _scale_kernel[(rows,)](x, weight, y, 2 * d, d)
    (launch,) = launches
    assert launch.issued_load_bytes == 4 * rows * (2 * d + 1)
    assert launch.unique_load_bytes == 4 * (rows * d + d)
    assert launch.issued_store_bytes == launch.unique_store_bytes == 4 * rows * d


def test_arguments_that_share_memory_count_once():
    x, out = torch.randn(4, 64), torch.empty(4, 64)
    with interpret.counted() as launches:
        _scale_kernel[(4,)](x, x[2], out, 64, 64)
        _scale_kernel[(4,)](x, x.view(torch.bfloat16)[2], out, 64, 64)
    assert [launch.unique_load_bytes for launch in launches] == [1024, 1024]
    assert launches[1].issued_load_bytes == 1024 + 4 * (128 + 2)


def test_a_kernel_of_ours():
    x, weight = torch.randn(5, 48).bfloat16(), torch.randn(48).bfloat16()
    with interpret.counted() as launches:
        rms_norm(x, weight, 1e-5, residual=x.clone())
    (launch,) = launches
    assert launch.unique_load_bytes == 2 * (2 * 5 * 48 + 48)
    assert launch.issued_store_bytes == launch.unique_store_bytes == 2 * (2 * 5 * 48)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        inner = start + tl.arange(0, K)
        mask = (row < m) & (inner[None, :] < k)
        a = tl.load(a_ptr + row * k + inner[None, :], mask=mask, other=0.0)
        mask = (inner[:, None] < k) & (column < n)
        b = tl.load(b_ptr + inner[:, None] * n + column, mask=mask, other=0.0)
        total = tl.dot(a, b, acc=total, input_precision="tf32x3")
    tl.store(c_ptr + row * n + column, total, mask=(row < m) & (column < n))


def test_matrix_product():
    m, n, k = 40, 50, 60
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    with interpret.counted() as launches:
        _matmul_kernel[(3, 2)](a, b, c, m, n, k, 16, 32, 64)
    torch.testing.assert_close(c, a @ b, rtol=1e-4, atol=1e-4)
    (launch,) = launches
    assert launch.programs == 6 and launch.grid == (3, 2, 1)
    assert launch.issued_load_bytes == 4 * (2 * m * k + 3 * k * n)  # once per block column, row
    assert launch.unique_load_bytes == 4 * (m * k + k * n)
    assert launch.issued_store_bytes == launch.unique_store_bytes == 4 * m * n
    assert launch.dot_flops == 2 * (3 * 16) * (2 * 32) * 64  # whole tiles


@triton.jit
def _histogram_kernel(x_ptr, counts_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(counts_ptr + x, 1)


def test_atomics_load_and_store():
    x, counts = torch.randint(0, 8, (256,), dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    x[:8] = torch.arange(8)
    with interpret.counted() as launches:
        _histogram_kernel[(4,)](x, counts, 64)
    assert torch.equal(counts, torch.bincount(x, minlength=8))
    assert launches[0][3:] == (256 * 12, 256 * 4 + 64, 256 * 8, 64, 0)


def test_counting_nests_and_needs_no_check(request):
    x, y = torch.ones(64), torch.zeros(64)
    with interpret.counted() as outer:
        _copy_kernel[(1,)](x, y, 64, 64)
        with interpret.counted() as inner:
            _copy_kernel[(1,)](x, y, 32, 64)
    _copy_kernel[(1,)](x, y, 64, 64)
    assert [launch.issued_load_bytes for launch in outer] == [256, 128]
    assert inner == outer[1:]
    with interpret.counted() as launches, pytest.raises(interpret.MemoryFault):
        _copy_kernel[(1,)](x, y, 65, 128)
    assert launches == []

"""Kernels that break the rules of the kernel report, each in the way its configuration is named.

Given to tools/kernel_report.py with --cases; compiled, never run.
"""

import torch
import triton
import triton.language as tl
from falcon_h1r_kernels.launch import Config
from kernel_launches import CASES, Direct, tensor

SIZE = 1024
TABLE = (
    Config("sound", {"M": 128, "N": 128, "K": 64}, 8, 3, "the first entry is the default"),
    Config("spills", {"M": 128, "N": 256, "K": 64}, 4, 2, "256 accumulators per thread, 255 exist"),
    Config("mma", {"M": 32, "N": 64, "K": 64}, 4, 3, "a warp group multiplies at least 64 rows"),
    Config("fits", {"M": 128, "N": 128, "K": 64}, 8, 8, "8 stages of 32 KiB"),
    Config("loads", {"M": 128, "N": 128, "K": 64}, 8, 3, "rows of 1025 elements begin anywhere"),
)


@triton.jit
def _product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    size,
    a_stride,
    b_stride,
    c_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, size, K):
        a = tl.load(a_ptr + m[:, None] * a_stride + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * b_stride + n[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * c_stride + n[None, :], total)


def launch(dtype: torch.dtype, name: str) -> None:
    config = next(entry for entry in TABLE if entry.name == (name or "sound"))
    width = SIZE + (config.name == "loads")
    a = tensor(SIZE, width, dtype=dtype)[:, :SIZE]
    b = tensor(SIZE, width, dtype=dtype)[:, :SIZE]
    c = tensor(SIZE, SIZE)
    grid = (SIZE // config.meta["M"], SIZE // config.meta["N"])
    _product_kernel[grid](a, b, c, SIZE, width, width, SIZE, **config.options)


CASES.append(Direct("planted", f"{SIZE} x {SIZE}", TABLE, launch))

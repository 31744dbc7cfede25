"""RMSNorm over the last axis, with the residual addition before it fused in.

    x' = x + residual        y = x' / sqrt(mean(x'^2) + eps) * weight

One program per row keeps the row in registers: it is read once, statistics and product are float32,
and each result is rounded once. Axes: m rows (all leading axes together), d channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, check_inputs, next_power_of_2, operator, pick
from .strides import in_units

CONFIGS = (
    Config("warps8", {}, 8, 1, "rows of up to 4096: 16 elements per thread, two 128-bit loads"),
    Config("warps4", {}, 4, 1, "rows of up to 2048: the same per thread"),
    Config("warps2", {}, 2, 1, "rows of up to 1024 (90M: 512): the same, or one load"),
    Config("warps16", {}, 16, 1, "wider rows, and few of them (decode): the shortest chain"),
)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    d,
    eps,
    x_stride_m,  # strides of rows in units of UNIT
    residual_stride_m,
    x_stride_d,
    residual_stride_d,
    UNIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    x_row = x_ptr + row * x_stride_m * UNIT
    x = tl.load(x_row + column * x_stride_d, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_stride_m * UNIT
        residual = tl.load(residual_row + column * residual_stride_d, mask=inside, other=0.0)
        x += residual.to(tl.float32)
        tl.store(sum_ptr + row * d + column, x, mask=inside)
    # The statistics are those of the exact sum, not of its rounded copy.
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / d + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + column, x * scale * weight, mask=inside)


def launch_rms_norm(
    x: Tensor, weight_d: Tensor, eps: float, residual: Tensor | None, config: str
) -> tuple[Tensor, Tensor]:
    """Validate, allocate and launch; returns y and x + residual (empty without a residual)."""
    check_inputs("rms_norm", x, weight_d, residual)
    d = x.shape[-1] if x.ndim else 0
    if d == 0:
        raise ValueError(f"rms_norm: x {tuple(x.shape)}, expected (..., d) with d > 0")
    if weight_d.shape != (d,):
        raise ValueError(f"rms_norm: weight of shape {tuple(weight_d.shape)}, expected ({d},)")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} {residual.dtype}, "
            f"expected {tuple(x.shape)} {x.dtype}"
        )
    rows = x.reshape(-1, d)
    residual_rows = None if residual is None else residual.reshape(-1, d)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    m = rows.shape[0]
    chosen = pick(CONFIGS, x.dtype, config or _default(d, m))
    x_strides = rows.stride()
    residual_strides = x_strides if residual is None else residual_rows.stride()
    unit, row_strides = in_units(x_strides[0], residual_strides[0])
    if m > 0:
        _rms_norm_kernel[(m,)](
            rows,
            residual_rows,
            weight_d.contiguous(),
            y,
            total,
            d,
            eps,
            *row_strides,
            x_strides[1],
            residual_strides[1],
            UNIT=unit,
            HAS_RESIDUAL=residual is not None,
            BLOCK_D=next_power_of_2(d),
            **chosen.options,
        )
    return y, total


def _default(d: int, rows: int) -> str:
    """16 elements per thread; at most 64 rows leave the machine idle, so they go wide."""
    if d > 4096 or (d > 1024 and rows <= 64):
        return "warps16"
    return "warps8" if d > 2048 else "warps4" if d > 1024 else "warps2"


@operator("rms_norm")
def _rms_norm_op(
    x: Tensor, weight_d: Tensor, eps: float, residual: Tensor | None, config: str
) -> tuple[Tensor, Tensor]:
    return launch_rms_norm(x, weight_d, eps, residual, config)


@_rms_norm_op.register_fake
def _(x, weight_d, eps, residual, config):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, (x.new_empty(0) if residual is None else torch.empty_like(y))


def rms_norm(
    x: Tensor, weight_d: Tensor, eps: float, *, residual: Tensor | None = None, config: str = ""
):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once.

    x: (..., d) of any strides; weight_d: (d,); eps is added to the mean square. residual: like x,
    added first (in float32); then the pair (y, x + residual) is returned, otherwise y alone, each
    (..., d) contiguous in x's dtype. config: a name in `CONFIGS`. Raises ValueError.
    """
    y, total = _rms_norm_op(x, weight_d, eps, residual, config)
    return y if residual is None else (y, total)

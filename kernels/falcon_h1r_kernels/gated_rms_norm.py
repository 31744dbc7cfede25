"""The SiLU gate and the grouped RMSNorm that close the Mamba-2 mixer, in one pass.

    u = y silu(z);  out = u / sqrt(mean_group(u^2) + eps) * weight          gate first (released)
    out = y / sqrt(mean_group(y^2) + eps) * weight * silu(z)                norm first
    out = y silu(z)                                                         no weight: gate alone

One program per row and group keeps its channels in registers: y and z are read once, everything is
float32, the result is rounded once. Because the row is in registers when its statistics are known,
there is no second pass that sums of squares from an earlier kernel could save.
Axes: b batch, l length, d channels, g groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .launch import Config, check_inputs, next_power_of_2, operator, pick
from .strides import in_units

CONFIGS = (
    Config("warps8", {}, 8, 1, "groups of up to 4096: 16 elements per thread, two 128-bit loads"),
    Config("warps4", {}, 4, 1, "groups of up to 2048 (34B: 2 groups of 2048): the same per thread"),
    Config("warps2", {}, 2, 1, "groups of up to 1024 (90M: 768): the same per thread"),
    Config("warps16", {}, 16, 1, "wider groups, and decode: one load per thread, shortest chain"),
)


@triton.jit
def _gated_rms_norm_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    length,
    groups,
    width,  # channels of a group
    eps,
    y_stride_b,  # strides of rows in units of UNIT
    y_stride_l,
    z_stride_b,
    z_stride_l,
    y_stride_d,
    z_stride_d,
    UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row, group = program // groups, program % groups
    batch, position = (row // length).to(tl.int64), (row % length).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    channel = group * width + column
    y_row = y_ptr + batch * y_stride_b * UNIT + position * (y_stride_l * UNIT)
    z_row = z_ptr + batch * z_stride_b * UNIT + position * (z_stride_l * UNIT)
    y = tl.load(y_row + channel * y_stride_d, mask=inside, other=0.0).to(tl.float32)
    gate = silu(tl.load(z_row + channel * z_stride_d, mask=inside, other=0.0).to(tl.float32), EXACT)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if not NORM_BEFORE_GATE:
            y *= gate
        out = y * (1.0 / tl.sqrt_rn(tl.sum(y * y, axis=0) / width + eps)) * weight
        if NORM_BEFORE_GATE:
            out *= gate
    else:
        out = y * gate
    tl.store(out_ptr + program.to(tl.int64) * width + column, out, mask=inside)


def launch_gated_rms_norm(
    y_bld: Tensor,
    z_bld: Tensor,
    weight_d: Tensor | None,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    config: str,
) -> Tensor:
    """Validate, allocate and launch; returns (b, l, d) contiguous in y's dtype."""
    check_inputs("gated_rms_norm", y_bld, z_bld, weight_d)
    if y_bld.ndim != 3 or z_bld.shape != y_bld.shape:
        raise ValueError(
            f"gated_rms_norm: y {tuple(y_bld.shape)} and z {tuple(z_bld.shape)}, expected (b, l, d)"
        )
    b, l, d = y_bld.shape
    if weight_d is not None and weight_d.shape != (d,):
        raise ValueError(
            f"gated_rms_norm: weight of shape {tuple(weight_d.shape)}, expected ({d},)"
        )
    if n_groups < 1 or d % n_groups:
        raise ValueError(f"gated_rms_norm: {d} channels do not divide into {n_groups} groups")
    groups = 1 if weight_d is None else n_groups
    width = d // groups
    out = torch.empty(y_bld.shape, dtype=y_bld.dtype, device=y_bld.device)
    programs = b * l * groups
    chosen = pick(CONFIGS, y_bld.dtype, config or _default(width, programs))
    unit, strides = in_units(*y_bld.stride()[:2], *z_bld.stride()[:2])
    if out.numel() > 0:
        _gated_rms_norm_kernel[(programs,)](
            y_bld,
            z_bld,
            None if weight_d is None else weight_d.contiguous(),
            out,
            l,
            groups,
            width,
            eps,
            *strides,
            y_bld.stride(2),
            z_bld.stride(2),
            UNIT=unit,
            HAS_WEIGHT=weight_d is not None,
            NORM_BEFORE_GATE=norm_before_gate,
            EXACT=y_bld.dtype is torch.float32,
            BLOCK=next_power_of_2(width),
            **chosen.options,
        )
    return out


def _default(width: int, programs: int) -> str:
    """16 elements per thread; at most 64 programs leave the machine idle, so they go wide."""
    if width > 4096 or (width > 1024 and programs <= 64):
        return "warps16"
    return "warps8" if width > 2048 else "warps4" if width > 1024 else "warps2"


@operator("gated_rms_norm")
def _gated_rms_norm_op(
    y_bld: Tensor,
    z_bld: Tensor,
    weight_d: Tensor | None,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    config: str,
) -> Tensor:
    return launch_gated_rms_norm(y_bld, z_bld, weight_d, eps, n_groups, norm_before_gate, config)


@_gated_rms_norm_op.register_fake
def _(y_bld, z_bld, weight_d, eps, n_groups, norm_before_gate, config):
    return torch.empty(y_bld.shape, dtype=y_bld.dtype, device=y_bld.device)


def gated_rms_norm(
    y_bld: Tensor,
    z_bld: Tensor,
    weight_d: Tensor | None,
    eps: float,
    n_groups: int = 1,
    norm_before_gate: bool = False,
    *,
    config: str = "",
) -> Tensor:
    """Gate y with silu(z) and normalise each group of channels, in float32, rounded once.

    y_bld, z_bld: (b, l, d) of any strides; weight_d: (d,), or None for the gate alone; eps is added
    to the mean square. n_groups: statistics are taken over d / n_groups channels. norm_before_gate:
    False gates first. Returns (b, l, d) contiguous in y's dtype. config: a name in `CONFIGS`.
    Raises ValueError. Mamba-2 paper (arXiv 2405.21060), section 7.3.
    """
    return _gated_rms_norm_op(y_bld, z_bld, weight_d, eps, n_groups, norm_before_gate, config)

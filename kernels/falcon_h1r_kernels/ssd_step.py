"""One token of the SSD recurrence, with what stands before and after it in decode fused in.

    state = exp(dt A) state + dt x (outer) B        y = state C + D x

The state is read and written once, in place, 128 bits at a time; everything else is small beside
it. A program is one warp and a few channels of one head: the sum over the state's n elements stays
inside the warp (no shared memory, no barrier), and many small programs keep enough loads in flight
at batch 1 too. Neighbouring programs share B and C through the caches.
Axes: b batch, h heads, p channels per head, g groups, n state size, c = h p + 2 g n conv channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .conv_parts import check_shape, check_weights, convolved
from .launch import (
    Config,
    check_in_place,
    check_inputs,
    check_limit,
    next_power_of_2,
    operator,
    pick,
    share_memory,
)
from .step_parts import NO_LIMIT, check_step, step_size
from .strides import in_units

# TILE: elements of state, channels times n, in registers at a time.
CONFIGS = (
    Config("tile2048", {"TILE": 2048}, 1, 1, "8 rows of 256: 16 loads of 128 bits in flight"),
    Config("tile1024", {"TILE": 1024}, 1, 1, "batch 1: 768 programs for 24 heads"),
)


@triton.jit
def _ssd_step_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_bias_ptr,
    z_ptr,
    y_ptr,
    window_ptr,
    new_window_ptr,
    weight_ptr,
    bias_ptr,
    heads,
    head_dim,
    state_size,
    groups,
    blocks,  # of channels in a head
    dt_min,
    dt_max,
    state_stride_b,  # these three in units of UNIT
    state_stride_h,
    state_stride_p,
    x_stride_b,  # these nine in units of ROW_UNIT
    B_stride_b,
    B_stride_g,
    C_stride_b,
    C_stride_g,
    window_stride_b,
    window_stride_v,
    new_window_stride_b,
    new_window_stride_v,
    state_stride_n,
    x_stride_h,
    x_stride_p,  # with a convolution: that of its channels
    dt_stride_b,
    dt_stride_h,
    B_stride_n,
    C_stride_n,
    z_stride_b,
    z_stride_h,
    z_stride_p,
    window_stride_c,
    new_window_stride_c,
    weight_stride_c,
    weight_stride_w,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    HAS_CONV: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_DT_LIMIT: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_P: tl.constexpr = TILE // BLOCK_N
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % heads
    batch = (program // blocks // heads).to(tl.int64)
    group = head // (heads // groups)
    n = tl.arange(0, BLOCK_N)
    inside_n = n < state_size

    dt = step_size(
        dt_ptr + batch * dt_stride_b + head * dt_stride_h,
        dt_bias_ptr,
        head,
        dt_min,
        dt_max,
        HAS_DT_BIAS,
        HAS_DT_LIMIT,
        DT_SOFTPLUS,
    )
    decay = tl.exp(dt * tl.load(A_ptr + head).to(tl.float32))

    x_row = x_ptr + batch * (x_stride_b * ROW_UNIT)
    if HAS_CONV:
        window = window_ptr + batch * (window_stride_b * ROW_UNIT)
        new_window = new_window_ptr + batch * (new_window_stride_b * ROW_UNIT)
        conv = (
            (x_row, x_stride_p),
            (window, window_stride_v * ROW_UNIT, window_stride_c),
            (new_window, new_window_stride_v * ROW_UNIT, new_window_stride_c),
            (weight_ptr, weight_stride_c, weight_stride_w, bias_ptr),
        )
        # A channel's window is written once: x's by the program that owns the channel, those of B
        # and C by the first program of their group.
        leads = (head % (heads // groups) == 0) & (block == 0)
        at = heads * head_dim + group * state_size
        B = convolved(conv, at, at + state_size, leads, V, PACKED, HAS_BIAS, BLOCK_N)
        at += groups * state_size
        C = convolved(conv, at, at + state_size, leads, V, PACKED, HAS_BIAS, BLOCK_N)
    else:
        B_row = B_ptr + batch * (B_stride_b * ROW_UNIT) + group * (B_stride_g * ROW_UNIT)
        B = tl.load(B_row + n * B_stride_n, mask=inside_n, other=0.0).to(tl.float32)
        C_row = C_ptr + batch * (C_stride_b * ROW_UNIT) + group * (C_stride_g * ROW_UNIT)
        C = tl.load(C_row + n * C_stride_n, mask=inside_n, other=0.0).to(tl.float32)

    state_row = state_ptr + batch * (state_stride_b * UNIT)
    state_row += head.to(tl.int64) * (state_stride_h * UNIT)
    first = block * BLOCK_P
    p = first + tl.arange(0, BLOCK_P)
    inside_p = p < head_dim
    inside = inside_p[:, None] & inside_n[None, :]
    tile = state_row + p[:, None] * (state_stride_p * UNIT) + n[None, :] * state_stride_n
    state = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_CONV:
        at = head * head_dim
        x = convolved(conv, at + first, at + head_dim, True, V, PACKED, HAS_BIAS, BLOCK_P)
    else:
        x_head = x_row + head * x_stride_h
        x = tl.load(x_head + p * x_stride_p, mask=inside_p, other=0.0).to(tl.float32)
    state = state * decay + (dt * x)[:, None] * B[None, :]
    tl.store(tile, state, mask=inside)
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        y += x * tl.load(D_ptr + head).to(tl.float32)
    if HAS_Z:
        z_head = z_ptr + batch * z_stride_b + head * z_stride_h
        z = tl.load(z_head + p * z_stride_p, mask=inside_p, other=0.0).to(tl.float32)
        y *= silu(z, EXACT)
    tl.store(y_ptr + (batch * heads + head) * head_dim + p, y, mask=inside_p)


class Conv(NamedTuple):
    """What the fused convolution takes: xBC (b, c), windows (b, v, c), weight (c, w), bias (c,)."""

    xBC_bc: Tensor
    window_bvc: Tensor
    new_window_bvc: Tensor
    weight_cw: Tensor
    bias_c: Tensor | None


def launch_ssd_step(
    state_bhpn: Tensor,
    x_bhp: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor | None,
    C_bgn: Tensor | None,
    D_h: Tensor | None,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    z_bhp: Tensor | None,
    config: str,
    groups: int,
    conv: Conv | None = None,
) -> Tensor:
    """Validate, allocate and launch; with `conv`, x, B and C come from it and are None."""
    name = "ssd_step" if conv is None else "conv_ssd_step"
    x = x_bhp if conv is None else conv.xBC_bc
    tensors = (A_h, B_bgn, C_bgn, D_h, dt_bias_h, z_bhp)
    check_inputs(name, x, state_bhpn, dt_bh, *tensors, *conv or ())
    check_step(name, state_bhpn, x_bhp, dt_bh, *tensors, groups)
    check_limit(name, *dt_limit)
    b, h, p, n = state_bhpn.shape
    v = 0
    if conv is not None:
        c = h * p + 2 * groups * n
        check_shape(name, "xBC", conv.xBC_bc, (b, c))
        v = check_weights(name, c, conv.weight_cw, conv.bias_c)
        check_shape(name, "window", conv.window_bvc, (b, v, c))
        check_shape(name, "new_window", conv.new_window_bvc, (b, v, c))
        check_in_place(name, "new_window", conv.new_window_bvc)
        if share_memory(conv.window_bvc, conv.new_window_bvc):
            raise ValueError(f"{name}: the new window must be other memory than the window")
    y = torch.empty(b, h, p, dtype=x.dtype, device=x.device)
    chosen = pick(CONFIGS, x.dtype, config or _default(state_bhpn))
    block_n = next_power_of_2(n)
    tile = min(max(chosen.meta["TILE"], block_n), block_n * next_power_of_2(p))
    blocks = triton.cdiv(p, tile // block_n)
    unit, state_strides = in_units(*state_bhpn.stride()[:3])
    if conv is None:
        row_strides = (x.stride(0), *B_bgn.stride()[:2], *C_bgn.stride()[:2], 0, 0, 0, 0)
    else:
        windows = (*conv.window_bvc.stride()[:2], *conv.new_window_bvc.stride()[:2])
        row_strides = (x.stride(0), 0, 0, 0, 0, *windows)
    row_unit, row_strides = in_units(*row_strides)
    if y.numel() > 0:
        _ssd_step_kernel[(b * h * blocks,)](
            state_bhpn,
            x,
            dt_bh,
            A_h.contiguous(),
            B_bgn,
            C_bgn,
            None if D_h is None else D_h.contiguous(),
            None if dt_bias_h is None else dt_bias_h.contiguous(),
            z_bhp,
            y,
            None if conv is None else conv.window_bvc,
            None if conv is None else conv.new_window_bvc,
            None if conv is None else conv.weight_cw,
            None if conv is None or conv.bias_c is None else conv.bias_c.contiguous(),
            h,
            p,
            n,
            groups,
            blocks,
            *dt_limit,
            *state_strides,
            *row_strides,
            state_bhpn.stride(3),
            *((0, x.stride(1)) if conv else x.stride()[1:]),
            *dt_bh.stride(),
            0 if conv else B_bgn.stride(2),
            0 if conv else C_bgn.stride(2),
            *((0, 0, 0) if z_bhp is None else z_bhp.stride()),
            conv.window_bvc.stride(2) if conv else 0,
            conv.new_window_bvc.stride(2) if conv else 0,
            *(conv.weight_cw.stride() if conv else (0, 0)),
            V=v,
            PACKED=conv is not None and v == 3 and conv.weight_cw.is_contiguous(),
            HAS_BIAS=conv is not None and conv.bias_c is not None,
            UNIT=unit,
            ROW_UNIT=row_unit,
            HAS_CONV=conv is not None,
            HAS_D=D_h is not None,
            HAS_DT_BIAS=dt_bias_h is not None,
            HAS_DT_LIMIT=tuple(dt_limit) != NO_LIMIT,
            DT_SOFTPLUS=dt_softplus,
            HAS_Z=z_bhp is not None,
            EXACT=x.dtype is torch.float32,
            BLOCK_N=block_n,
            **{**chosen.options, "TILE": tile},
        )
    return y


def _default(state_bhpn: Tensor) -> str:
    """Programs as large as still leave every processor several."""
    return "tile2048" if state_bhpn.numel() > 2**20 else "tile1024"


@operator("ssd_step", mutates_args={"state_bhpn"})
def _ssd_step_op(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    z_bhp: Tensor | None,
    config: str,
) -> Tensor:
    dt_limit, groups = (dt_min, dt_max), B_bgn.shape[1]
    return launch_ssd_step(
        state_bhpn,
        x_bhp,
        dt_bh,
        A_h,
        B_bgn,
        C_bgn,
        D_h,
        dt_bias_h,
        dt_softplus,
        dt_limit,
        z_bhp,
        config,
        groups,
    )


@_ssd_step_op.register_fake
def _(state_bhpn, x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h, dt_bias_h, dt_softplus, *_):
    return x_bhp.new_empty(x_bhp.shape)


def ssd_step(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None = None,
    *,
    dt_bias_h: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    z_bhp: Tensor | None = None,
    config: str = "",
) -> Tensor:
    """One token of the recurrence: state_bhpn (b, h, p, n) is updated in place, y_bhp is returned.

    x_bhp (b, h, p); dt_bh (b, h); A_h (h,) < 0; B_bgn, C_bgn (b, g, n); D_h (h,) or None. Any
    strides; the state in bfloat16, float16 or float32. Extras, in this order: dt_bias_h (h,) is
    added to dt, softplus applied, dt clamped to dt_limit ((0, inf) clamps nothing); z_bhp (b, h, p)
    gates: y silu(z). Float32 throughout; y is of the state before it is rounded to its dtype, and
    is returned in x's dtype. config: a name in `CONFIGS`. Raises ValueError.
    """
    return _ssd_step_op(
        state_bhpn,
        x_bhp,
        dt_bh,
        A_h,
        B_bgn,
        C_bgn,
        D_h,
        dt_bias_h,
        dt_softplus,
        *dt_limit,
        z_bhp,
        config,
    )

"""`ssd_step` and the gated RMSNorm behind it in one launch: decode from convolution to out_proj.

    state = exp(dt A) state + dt x (outer) B        y = state C + D x
    out = norm_group(y silu(z)) * weight, or norm_group(y) * weight * silu(z)

A program owns one norm group of a row, whole heads: it goes through their state tile by tile, then
normalises, because a statistic needs the group's last channel. y goes to a row of float32 scratch,
a barrier follows, and the program reads the row back from its own cache. z is read once, by the
norm, as by `gated_rms_norm`.

It saves a launch, y's trip from processor to processor, and one rounding: y is float32 until the
result is rounded. Its price is parallelism, one program per row and norm group where `ssd_step` has
one for every few channels. On an H100, H1R-7B, 64 rows take 152 microseconds to the 145 of both
launches, 256 rows 576 to about 555, one row 92 to 11: it pays where launches are what costs.

Sums over n stay inside a warp; with heads of 128 x 256 the loop over tiles has no barrier.
Axes: b batch, h heads, p channels per head, g groups of B and C, n state size, d = h p.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .conv_parts import check_shape
from .launch import Config, check_inputs, next_power_of_2, operator, pick
from .step_parts import NO_LIMIT, check_step, step_size
from .strides import in_units

# Of axes without contiguous addresses, Triton 3.9 hands the last to warps first, 3.6 the first. The
# wrong one costs shared memory and barriers in every turn, and nothing else.
OUTER = 0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 2

# TILE: elements of state, channels times n, of one turn of the loop; the next one is always on its
# way, 8 loads of 128 bits per thread.
CONFIGS = (
    Config(
        "warps8",
        {"TILE": 8192},
        8,
        1,
        "32 KiB under way per program; two on a processor at H1R-7B's size",
    ),
    Config(
        "warps16",
        {"TILE": 16384},
        16,
        1,
        "fewer rows than processors: 64 KiB under way, all registers of a processor",
    ),
)
# Multiprocessors of an H100: with no more programs each has one to itself.
ALONE = 132


@triton.jit
def _for_rows(row, stride, size, n, which, STRETCHES: tl.constexpr, WIDE: tl.constexpr):
    """`size` elements as float32, in the axes of a tile, the same for all channels of a load.

    n: of the first stretch; which: the number of a stretch, along its axis. Every thread loads
    what it multiplies: one stretch at a time has as many elements per thread as the load of a
    tile, so both get the same layout and nothing goes through shared memory.
    """
    result = tl.load(row + n * stride, mask=n < size, other=0.0).to(tl.float32)
    for i in tl.static_range(1, STRETCHES):
        n += WIDE
        part = tl.load(row + n * stride, mask=n < size, other=0.0).to(tl.float32)
        result = tl.where(which < i, result, part)
    return result


@triton.jit
def _ssd_step_norm_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_bias_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    out_ptr,
    heads,  # of one norm group
    sharing,  # heads that share B and C
    norm_groups,
    state_size,
    eps,
    dt_min,
    dt_max,
    state_stride_b,  # these three in units of UNIT
    state_stride_h,
    state_stride_p,
    x_stride_b,  # these seven in units of ROW_UNIT
    B_stride_b,
    B_stride_g,
    C_stride_b,
    C_stride_g,
    z_stride_b,
    z_stride_h,
    state_stride_n,
    x_stride_h,
    x_stride_p,
    dt_stride_b,
    dt_stride_h,
    B_stride_n,
    C_stride_n,
    z_stride_p,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_DT_LIMIT: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    ONE_GROUP: tl.constexpr,  # of B and C for all heads of a norm group
    WIDE: tl.constexpr,  # of n, the stretch that one load of a warp covers
    ROWS: tl.constexpr,  # channels that one load of every warp covers
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    OUTER: tl.constexpr,
):
    BLOCK_P: tl.constexpr = TILE // BLOCK_N
    EACH: tl.constexpr = BLOCK_P // ROWS
    STRETCHES: tl.constexpr = BLOCK_N // WIDE
    INNER: tl.constexpr = 2 - OUTER
    BLOCKS: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    batch = (program // norm_groups).to(tl.int64)
    first_head = program % norm_groups * heads
    width = heads * HEAD_DIM
    y_row = y_ptr + batch * (norm_groups * width)

    # Axes of a tile: stretches of n (INNER), channels of a thread (1), channels of a load (OUTER),
    # n of a stretch (3). The last goes to lanes, OUTER to warps (and lanes), others to registers.
    each, row, lane = tl.arange(0, EACH), tl.arange(0, ROWS) * EACH, tl.arange(0, 32)
    own, which = tl.arange(0, WIDE), tl.arange(0, STRETCHES)
    if OUTER == 2:
        column = row[None, :] + each[:, None]
        own = own + tl.zeros((1, 1, ROWS, WIDE), tl.int32)
        which, lane = which[:, None, None, None], lane[None, None, :]
    else:
        column = row[:, None] + each[None, :]
        own = own + tl.zeros((ROWS, 1, 1, WIDE), tl.int32)
        which, lane = which[None, None, :, None], lane[:, None, None]
    n = which * WIDE + tl.arange(0, WIDE)
    inside_n = n < state_size
    offset = tl.expand_dims(column[:, :, None], INNER) * (state_stride_p * UNIT)
    offset = offset + n * state_stride_n
    state_row = state_ptr + batch * (state_stride_b * UNIT)
    x_row = x_ptr + batch * (x_stride_b * ROW_UNIT)
    B_row = B_ptr + batch * (B_stride_b * ROW_UNIT)
    C_row = C_ptr + batch * (C_stride_b * ROW_UNIT)

    if ONE_GROUP:
        group = first_head // sharing
        B_group = B_row + group * (B_stride_g * ROW_UNIT)
        C_group = C_row + group * (C_stride_g * ROW_UNIT)
        B = _for_rows(B_group, B_stride_n, state_size, own, which, STRETCHES, WIDE)
        C = _for_rows(C_group, C_stride_n, state_size, own, which, STRETCHES, WIDE)
    inside = tl.expand_dims((column < HEAD_DIM)[:, :, None], INNER) & inside_n
    there = state_row + first_head.to(tl.int64) * (state_stride_h * UNIT)
    following = tl.load(there + offset, mask=inside, other=0.0)
    head, first = first_head, 0
    for _ in tl.range(heads * BLOCKS):
        last = first + BLOCK_P >= HEAD_DIM
        next_head, next_first = tl.where(last, head + 1, head), tl.where(last, 0, first + BLOCK_P)
        p = first + column
        inside_p = p < HEAD_DIM
        inside = tl.expand_dims(inside_p[:, :, None], INNER) & inside_n
        tile = state_row + head.to(tl.int64) * (state_stride_h * UNIT)
        tile += first * (state_stride_p * UNIT)
        state = following.to(tl.float32)
        there = state_row + next_head.to(tl.int64) * (state_stride_h * UNIT)
        there += next_first * (state_stride_p * UNIT)
        end = tl.where(next_head < first_head + heads, HEAD_DIM, 0)
        inside_next = (next_first + column < end)[:, :, None]
        inside_next = tl.expand_dims(inside_next, INNER) & inside_n
        following = tl.load(there + offset, mask=inside_next, other=0.0)
        if not ONE_GROUP:
            group = head // sharing
            B_group = B_row + group * (B_stride_g * ROW_UNIT)
            C_group = C_row + group * (C_stride_g * ROW_UNIT)
            B = _for_rows(B_group, B_stride_n, state_size, own, which, STRETCHES, WIDE)
            C = _for_rows(C_group, C_stride_n, state_size, own, which, STRETCHES, WIDE)
        x = tl.load(x_row + head * x_stride_h + p * x_stride_p, mask=inside_p, other=0.0)
        x = x.to(tl.float32)
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
        state = state * decay + tl.expand_dims((dt * x)[:, :, None], INNER) * B
        tl.store(tile + offset, state, mask=inside)
        y = tl.sum(tl.sum(state * C, axis=INNER), axis=2)
        if HAS_D:
            y += x * tl.load(D_ptr + head).to(tl.float32)
        # All lanes know y; the first one stores it.
        at = y_row + head * HEAD_DIM + tl.expand_dims(p, OUTER) + lane * 0
        first_lane = tl.expand_dims(inside_p, OUTER) & (lane == 0)
        tl.store(at, tl.expand_dims(y, OUTER), mask=first_lane)
        head, first = next_head, next_first

    column = tl.arange(0, BLOCK_D)
    inside = column < width
    z_row = z_ptr + batch * (z_stride_b * ROW_UNIT)
    z_head = (first_head + column // HEAD_DIM) * (z_stride_h * ROW_UNIT)
    z = tl.load(z_row + z_head + column % HEAD_DIM * z_stride_p, mask=inside, other=0.0)
    gate = silu(z.to(tl.float32), EXACT)
    weight = tl.load(weight_ptr + first_head * HEAD_DIM + column, mask=inside, other=0.0)
    tl.debug_barrier()  # the row was written by all warps
    y = tl.load(y_row + first_head * HEAD_DIM + column, mask=inside, other=0.0)
    if not NORM_BEFORE_GATE:
        y *= gate
    out = y * (1.0 / tl.sqrt_rn(tl.sum(y * y, axis=0) / width + eps)) * weight.to(tl.float32)
    if NORM_BEFORE_GATE:
        out *= gate
    tl.store(out_ptr + program.to(tl.int64) * width + column, out, mask=inside)


def _default(programs: int) -> str:
    return "warps16" if programs <= ALONE else "warps8"


@operator("ssd_step_norm", mutates_args={"state_bhpn"})
def _ssd_step_norm_op(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None,
    z_bhp: Tensor,
    weight_d: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    config: str,
) -> Tensor:
    """Validate, allocate and launch; returns (b, h, p) contiguous in x's dtype."""
    name = "ssd_step_norm"
    tensors = (A_h, B_bgn, C_bgn, D_h, dt_bias_h, z_bhp)
    check_inputs(name, x_bhp, state_bhpn, dt_bh, *tensors, weight_d)
    check_step(name, state_bhpn, x_bhp, dt_bh, *tensors, B_bgn.shape[1])
    b, h, p, n = state_bhpn.shape
    check_shape(name, "weight", weight_d, (h * p,))
    if n_groups < 1 or h % n_groups:
        raise ValueError(f"{name}: {h} heads do not divide into {n_groups} groups of the norm")
    out = torch.empty(b, h, p, dtype=x_bhp.dtype, device=x_bhp.device)
    y = torch.empty(b, h * p, dtype=torch.float32, device=x_bhp.device)
    heads, sharing = h // n_groups, h // B_bgn.shape[1]
    chosen = pick(CONFIGS, x_bhp.dtype, config or _default(b * n_groups))
    block_n = next_power_of_2(n)
    tile = min(max(chosen.meta["TILE"], block_n), block_n * next_power_of_2(p))
    lanes = 32 * 16 // state_bhpn.itemsize  # elements of state in one load of a warp
    wide = min(block_n, lanes)
    unit, state_strides = in_units(*state_bhpn.stride()[:3])
    row_unit, row_strides = in_units(
        x_bhp.stride(0), *B_bgn.stride()[:2], *C_bgn.stride()[:2], *z_bhp.stride()[:2]
    )
    if out.numel() > 0:
        _ssd_step_norm_kernel[(b * n_groups,)](
            state_bhpn,
            x_bhp,
            dt_bh,
            A_h.contiguous(),
            B_bgn,
            C_bgn,
            None if D_h is None else D_h.contiguous(),
            None if dt_bias_h is None else dt_bias_h.contiguous(),
            z_bhp,
            weight_d.contiguous(),
            y,
            out,
            heads,
            sharing,
            n_groups,
            n,
            eps,
            dt_min,
            dt_max,
            *state_strides,
            *row_strides,
            state_bhpn.stride(3),
            *x_bhp.stride()[1:],
            *dt_bh.stride(),
            B_bgn.stride(2),
            C_bgn.stride(2),
            z_bhp.stride(2),
            HEAD_DIM=p,
            UNIT=unit,
            ROW_UNIT=row_unit,
            HAS_D=D_h is not None,
            HAS_DT_BIAS=dt_bias_h is not None,
            HAS_DT_LIMIT=(dt_min, dt_max) != NO_LIMIT,
            DT_SOFTPLUS=dt_softplus,
            NORM_BEFORE_GATE=norm_before_gate,
            EXACT=x_bhp.dtype is torch.float32,
            ONE_GROUP=sharing % heads == 0,
            WIDE=wide,
            ROWS=min(chosen.num_warps * lanes // wide, tile // block_n),
            BLOCK_N=block_n,
            BLOCK_D=next_power_of_2(heads * p),
            OUTER=OUTER,
            **{**chosen.options, "TILE": tile},
        )
    return out


@_ssd_step_norm_op.register_fake
def _(state_bhpn, x_bhp, *_):
    return x_bhp.new_empty(x_bhp.shape)


def ssd_step_norm(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None,
    z_bhp: Tensor,
    weight_d: Tensor,
    eps: float,
    *,
    n_groups: int = 1,
    norm_before_gate: bool = False,
    dt_bias_h: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    config: str = "",
) -> Tensor:
    """`ssd_step`, then `gated_rms_norm` of its y with z, which is not rounded between them.

    state_bhpn (b, h, p, n) is updated in place. z_bhp (b, h, p); weight_d (d,) over the channels
    d = h p; eps is added to the mean square. n_groups: of the norm, each of whole heads, whatever
    the groups of B and C are; statistics are taken over d / n_groups channels. norm_before_gate:
    False gates first. The other arguments as in `ssd_step`; any strides. Float32 throughout,
    rounded once; returns (b, h, p) contiguous in x's dtype. config: a name in `CONFIGS`. Raises
    ValueError.
    """
    return _ssd_step_norm_op(
        state_bhpn,
        x_bhp,
        dt_bh,
        A_h,
        B_bgn,
        C_bgn,
        D_h,
        z_bhp,
        weight_d,
        eps,
        n_groups,
        norm_before_gate,
        dt_bias_h,
        dt_softplus,
        *dt_limit,
        config,
    )

"""Rotary position embedding in the half-split (NeoX) pairing, with the key multiplier before it.

    out_i = m (x_i cos_i - x_{i+e/2} sin_i)        out_{i+e/2} = m (x_{i+e/2} cos_i + x_i sin_i)

A program takes a block of positions and a few heads: cosines and sines are loaded once and serve
all its heads, each half of a head is one contiguous load. Float32, rounded once.
Axes: b batch, h heads, l length, e head size; rows run over batch and length together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, check_inputs, next_power_of_2, operator, pick
from .strides import in_units

HALF, FULL = (torch.bfloat16, torch.float16), (torch.float32,)
# TILE: elements of half heads, rows times e/2.
CONFIGS = (
    Config("tile1024", {"TILE": 1024, "HEADS": 4}, 4, 1, "8 per thread: 128 bits", HALF),
    Config("tile512", {"TILE": 512, "HEADS": 4}, 4, 1, "float32: 4 per thread are 128 bits", FULL),
    Config("decode", {"TILE": 256, "HEADS": 2}, 1, 1, "one token per row: many small programs"),
)


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,  # b * l
    length,
    heads,
    half,  # e / 2
    multiplier,
    x_stride_b,  # strides of x but the last in units of UNIT
    x_stride_h,
    x_stride_l,
    x_stride_e,
    cos_stride_b,
    sin_stride_b,
    UNIT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK_HALF
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (row < rows) & (column < half)
    batch, position = (row // length).to(tl.int64), (row % length).to(tl.int64)
    table = position * half + column
    cos = tl.load(cos_ptr + batch * cos_stride_b + table, mask=inside, other=0.0) * multiplier
    sin = tl.load(sin_ptr + batch * sin_stride_b + table, mask=inside, other=0.0) * multiplier
    x_row = x_ptr + batch * x_stride_b * UNIT + position * (x_stride_l * UNIT)
    halves = ()
    for i in tl.static_range(HEADS):  # all loads stand before the first store, which they must not
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)  # pass: so they are in flight together
        here = (row < tl.where(head < heads, rows, 0)) & (column < half)
        address = x_row + head * (x_stride_h * UNIT) + column * x_stride_e
        first = tl.load(address, mask=here, other=0.0)
        halves += (first, tl.load(address + half * x_stride_e, mask=here, other=0.0))
    for i in tl.static_range(HEADS):
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)
        here = (row < tl.where(head < heads, rows, 0)) & (column < half)
        first, second = halves[2 * i].to(tl.float32), halves[2 * i + 1].to(tl.float32)
        out = out_ptr + ((batch * heads + head) * length + position) * (2 * half) + column
        tl.store(out, first * cos - second * sin, mask=here)
        tl.store(out + half, second * cos + first * sin, mask=here)


def launch_rope(
    x_bhle: Tensor, cos_bli: Tensor, sin_bli: Tensor, multiplier: float, config: str
) -> Tensor:
    """Validate, allocate and launch; returns (b, h, l, e) contiguous in x's dtype."""
    check_inputs("rope", x_bhle, cos_bli, sin_bli)
    if x_bhle.ndim != 4:
        raise ValueError(f"rope: x {tuple(x_bhle.shape)}, expected (b, h, l, e)")
    b, h, l, e = x_bhle.shape
    tables = cos_bli.shape == sin_bli.shape and cos_bli.shape in ((b, l, e // 2), (1, l, e // 2))
    if e % 2 or not tables:
        raise ValueError(
            f"rope: x {(b, h, l, e)} needs an even head size and tables ({b} or 1, {l}, {e // 2}), "
            f"cos is {tuple(cos_bli.shape)}, sin {tuple(sin_bli.shape)}"
        )
    if cos_bli.dtype is not torch.float32 or sin_bli.dtype is not torch.float32:
        raise ValueError(f"rope: tables of {cos_bli.dtype}, {sin_bli.dtype}, expected float32")
    if b * l >= 2**31:
        raise ValueError(f"rope: {b} x {l} positions, at most {2**31 - 1} are served")
    cos_bli, sin_bli = cos_bli.contiguous(), sin_bli.contiguous()
    out = torch.empty(x_bhle.shape, dtype=x_bhle.dtype, device=x_bhle.device)
    chosen = pick(CONFIGS, x_bhle.dtype, config or ("decode" if l == 1 else ""))
    block_half = next_power_of_2(e // 2)
    tile, heads = max(chosen.meta["TILE"], block_half), min(chosen.meta["HEADS"], h)
    grid = (triton.cdiv(b * l, tile // block_half), triton.cdiv(h, heads))
    unit, strides = in_units(*x_bhle.stride()[:3])
    table_stride_b = l * (e // 2) if cos_bli.shape[0] > 1 else 0
    if out.numel() > 0:
        _rope_kernel[grid](
            x_bhle,
            cos_bli,
            sin_bli,
            out,
            b * l,
            l,
            h,
            e // 2,
            multiplier,
            *strides,
            x_bhle.stride(3),
            table_stride_b,
            table_stride_b,
            UNIT=unit,
            BLOCK_HALF=block_half,
            **{**chosen.options, "TILE": tile, "HEADS": heads},
        )
    return out


@operator("rope")
def _rope_op(
    x_bhle: Tensor, cos_bli: Tensor, sin_bli: Tensor, multiplier: float, config: str
) -> Tensor:
    return launch_rope(x_bhle, cos_bli, sin_bli, multiplier, config)


@_rope_op.register_fake
def _(x_bhle, cos_bli, sin_bli, multiplier, config):
    return torch.empty(x_bhle.shape, dtype=x_bhle.dtype, device=x_bhle.device)


def rope(
    x_bhle: Tensor,
    cos_bli: Tensor,
    sin_bli: Tensor,
    multiplier: float = 1.0,
    *,
    config: str = "",
) -> Tensor:
    """Multiply x by `multiplier` (config key key_multiplier, for keys), then rotate.

    x_bhle: (b, h, l, e) of any strides, e even; cos_bli, sin_bli: (b or 1, l, e/2) float32.
    Returns (b, h, l, e) contiguous in x's dtype. config: a name in `CONFIGS`. Raises ValueError.
    """
    return _rope_op(x_bhle, cos_bli, sin_bli, multiplier, config)

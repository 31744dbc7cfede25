"""What every form of the SSD scan starts from: step sizes with their sums, and C B^T.

    dt = clamp(softplus(dt + bias))     sum_q = dt_0 A + .. + dt_q A     CB_qs = C_q . B_s

The scan is cut into chunks of CHUNK positions, a power of two; the last one is padded with dt = 0,
which holds the state, so everything here is dense and in whole chunks. Axes: b batch, l length,
h heads, g groups, n state size, c chunks, q and s positions inside a chunk.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import softplus
from .launch import Config, check_inputs, pick

CUMSUM_CONFIGS = (
    Config("heads8", {"BLOCK_H": 8}, 4, 1, "8 heads of float32 dt are one 32-byte sector"),
    Config("heads2", {"BLOCK_H": 2}, 4, 1, "short sequences: more programs than heads8"),
)

BMM_CONFIGS = (
    Config(
        "q64s64",
        {"BLOCK_Q": 64, "BLOCK_S": 64, "BLOCK_N": 64},
        4,
        3,
        "3 of a chunk's 4 tiles are computed, and one group alone still makes enough programs",
        (torch.bfloat16, torch.float16),
    ),
    Config(
        "q128s128",
        {"BLOCK_Q": 128, "BLOCK_S": 128, "BLOCK_N": 64},
        8,
        3,
        "a whole chunk per program: B and C are read once, for long sequences",
        (torch.bfloat16, torch.float16),
    ),
    Config(
        "q32s32",
        {"BLOCK_Q": 32, "BLOCK_S": 32, "BLOCK_N": 32},
        4,
        2,
        "IEEE products of float32 are FMA, whose operands must fit registers",
        (torch.float32,),
    ),
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log2_units(log_sum):
    """Sums in the units of exp2, in their own dtype."""
    return log_sum * LOG2E


@triton.jit
def _decay(difference):
    """exp of a difference of sums that `_log2_units` gave; float32, whatever the sums are."""
    return tl.exp2(difference.to(tl.float32))


@triton.jit(do_not_specialize=["l", "chunks"])
def _chunk_cumsum_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    dt_out_ptr,
    sum_ptr,
    l,
    heads,
    chunks,
    dt_min,
    dt_max,
    dt_stride_b,
    dt_stride_l,
    dt_stride_h,
    A_stride_h,
    bias_stride_h,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q = tl.arange(0, CHUNK)
    position = chunk.to(tl.int64) * CHUNK + q
    served = (head < heads)[:, None]
    inside = served & (position < l)[None, :]

    address = dt_ptr + batch * dt_stride_b + head.to(tl.int64)[:, None] * dt_stride_h
    dt = tl.load(address + position[None, :] * dt_stride_l, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head * bias_stride_h, mask=head < heads, other=0.0)
        dt += bias.to(tl.float32)[:, None]
    if SOFTPLUS:
        dt = softplus(dt)
    # A NaN stays one: it must reach the output rather than become the smallest step.
    dt = tl.maximum(dt, dt_min, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.where(inside, dt, 0.0)

    A = tl.load(A_ptr + head * A_stride_h, mask=head < heads, other=0.0)
    wide = sum_ptr.dtype.element_ty
    log_decay = dt.to(wide) * A.to(tl.float32).to(wide)[:, None]
    offset = ((batch * heads + head[:, None]) * chunks + chunk) * CHUNK + q[None, :]
    tl.store(dt_out_ptr + offset, dt, mask=served)
    tl.store(sum_ptr + offset, tl.cumsum(log_decay, axis=1), mask=served)


@triton.jit(do_not_specialize=["l", "chunks"])
def _chunk_bmm_kernel(
    C_ptr,
    B_ptr,
    seq_idx_ptr,
    CB_ptr,
    l,
    chunks,
    groups,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    C_stride_n,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    B_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    HAS_SEQ_IDX: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES: tl.constexpr = CHUNK // BLOCK_S
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    q = tl.program_id(2) // TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    s = tl.program_id(2) % TILES * BLOCK_S + tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_N)
    position_q = chunk * CHUNK + q
    position_s = chunk * CHUNK + s
    inside_q = position_q < l
    inside_s = position_s < l

    C_block = C_ptr + batch * C_stride_b + group * C_stride_g
    C_block += position_q[:, None] * C_stride_l + k[None, :].to(tl.int64) * C_stride_n
    B_block = B_ptr + batch * B_stride_b + group * B_stride_g
    B_block += position_s[None, :] * B_stride_l + k[:, None].to(tl.int64) * B_stride_n
    # A zero that is no constant. From one, ptxas 12.8 and 12.9 (sm_90) carry the zeros past the
    # products of an unrolled loop into the mask below, and store them.
    CB = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32) + (l < 0).to(tl.float32)
    # A tile wholly above the diagonal only stores its zeros.
    first_s = tl.program_id(2) % TILES * BLOCK_S
    last_q = tl.program_id(2) // TILES * BLOCK_Q + BLOCK_Q - 1
    if first_s <= last_q:
        for start in range(0, N, BLOCK_N):
            within = k < N - start
            C = tl.load(C_block, mask=inside_q[:, None] & within[None, :], other=0.0)
            B = tl.load(B_block, mask=inside_s[None, :] & within[:, None], other=0.0)
            CB = tl.dot(C, B, CB, input_precision="ieee")
            C_block += BLOCK_N * C_stride_n
            B_block += BLOCK_N * B_stride_n

    keep = q[:, None] >= s[None, :]
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b
        document_q = tl.load(document + position_q * seq_idx_stride_l, mask=inside_q, other=0)
        document_s = tl.load(document + position_s * seq_idx_stride_l, mask=inside_s, other=0)
        keep = keep & (document_q[:, None] == document_s[None, :])
    address = CB_ptr + ((batch * chunks + chunk) * groups + group) * (CHUNK * CHUNK)
    tl.store(address + q[:, None] * CHUNK + s[None, :], tl.where(keep, CB, 0.0))


def check_chunk(operator: str, chunk: int) -> None:
    """Raise ValueError unless `chunk` is a power of two in [16, 256]."""
    if not 16 <= chunk <= 256 or chunk & (chunk - 1):
        raise ValueError(f"{operator}: chunk {chunk}, expected a power of two in [16, 256]")


def chunk_cumsum(
    dt_blh: Tensor,
    A_h: Tensor,
    chunk: int,
    *,
    dtype: torch.dtype,
    dt_bias_h: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    config: str = "",
) -> tuple[Tensor, Tensor]:
    """Step sizes and the cumulative sums of dt * A within each chunk.

    dt_blh (b, l, h) of any strides; A_h, dt_bias_h (h,); `dtype` is that of the scan's x. Returns
    dt_bhcq (b, h, c, chunk) float32, after bias, softplus and clamp and 0 beyond l, and sum_bhcq
    of the same shape, contiguous: float32 for 16-bit x, float64 for float32, whose differences
    would otherwise lose the weak decays that follow strong ones. Raises ValueError.
    """
    check_inputs("chunk_cumsum", dt_blh, A_h, dt_bias_h)
    check_chunk("chunk_cumsum", chunk)
    b, l, h = dt_blh.shape
    for name, tensor in (("A_h", A_h), ("dt_bias_h", dt_bias_h)):
        if tensor is not None and tensor.shape != (h,):
            raise ValueError(f"chunk_cumsum: {name} {tuple(tensor.shape)}, expected ({h},)")
    chunks = triton.cdiv(l, chunk)
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    dt_bhcq = torch.empty((b, h, chunks, chunk), dtype=torch.float32, device=dt_blh.device)
    sum_bhcq = torch.empty((b, h, chunks, chunk), dtype=wide, device=dt_blh.device)
    chosen = pick(CUMSUM_CONFIGS, dtype, config)
    # The default clamps nothing, as in `ssd_step`, not even a dt that no model makes.
    low, high = dt_limit if tuple(dt_limit) != (0.0, math.inf) else (-math.inf, math.inf)
    if dt_bhcq.numel() > 0:
        _chunk_cumsum_kernel[(b * chunks, triton.cdiv(h, chosen.meta["BLOCK_H"]))](
            dt_blh,
            A_h,
            dt_bias_h,
            dt_bhcq,
            sum_bhcq,
            l,
            h,
            chunks,
            float(low),
            float(high),
            *dt_blh.stride(),
            *A_h.stride(),
            *((0,) if dt_bias_h is None else dt_bias_h.stride()),
            HAS_BIAS=dt_bias_h is not None,
            SOFTPLUS=dt_softplus,
            CHUNK=chunk,
            **chosen.options,
        )
    return dt_bhcq, sum_bhcq


def chunk_bmm(
    C_blgn: Tensor,
    B_blgn: Tensor,
    chunk: int,
    seq_idx_bl: Tensor | None = None,
    *,
    config: str = "",
) -> Tensor:
    """C B^T within each chunk, once per group: CB_bcgqs (b, c, g, chunk, chunk) float32.

    B_blgn, C_blgn (b, l, g, n) of one dtype and any strides; seq_idx_bl (b, l) integers. The result
    is 0 above the diagonal, between documents and beyond l. Raises ValueError.
    """
    check_inputs("chunk_bmm", C_blgn, B_blgn, seq_idx_bl)
    check_chunk("chunk_bmm", chunk)
    b, l, g, n = C_blgn.shape
    if (B_blgn.shape, B_blgn.dtype) != (C_blgn.shape, C_blgn.dtype):
        raise ValueError(
            f"chunk_bmm: B_blgn {tuple(B_blgn.shape)} {B_blgn.dtype}, "
            f"expected {tuple(C_blgn.shape)} {C_blgn.dtype}"
        )
    if seq_idx_bl is not None and seq_idx_bl.shape != (b, l):
        raise ValueError(f"chunk_bmm: seq_idx_bl {tuple(seq_idx_bl.shape)}, expected ({b}, {l})")
    chunks = triton.cdiv(l, chunk)
    CB_bcgqs = torch.empty((b, chunks, g, chunk, chunk), dtype=torch.float32, device=C_blgn.device)
    chosen = pick(BMM_CONFIGS, C_blgn.dtype, config)
    options = fit_blocks(chosen.options, BLOCK_Q=chunk, BLOCK_S=chunk)
    tiles = (chunk // options["BLOCK_Q"]) * (chunk // options["BLOCK_S"])
    if CB_bcgqs.numel() > 0:
        _chunk_bmm_kernel[(b * chunks, g, tiles)](
            C_blgn,
            B_blgn,
            seq_idx_bl,
            CB_bcgqs,
            l,
            chunks,
            g,
            *C_blgn.stride(),
            *B_blgn.stride(),
            *((0, 0) if seq_idx_bl is None else seq_idx_bl.stride()),
            HAS_SEQ_IDX=seq_idx_bl is not None,
            N=n,
            CHUNK=chunk,
            **options,
        )
    return CB_bcgqs


def fit_blocks(options: dict, **most: int) -> dict:
    """`options` of a configuration with each named block no larger than `most` allows."""
    return {**options, **{name: min(options[name], size) for name, size in most.items()}}

"""The SSD scan in stages, each a launch of its own (arXiv 2405.21060, 6).

    1. dt and its cumulative sums, C B^T within chunks (ssd_prepare.py)
    2. the state that enters each chunk (ssd_states.py)
    3. y_q = exp(sum_q) state C_q + sum over s <= q of CB_qs exp(sum_q - sum_s) dt_s x_s + D x_q

Axes: b batch, l length, h heads, p channels per head, g groups, n state size, c chunks, q and s
positions inside a chunk. All sums are float32; operands of matrix products are rounded to x's
dtype: x dt decay and B in the states, and here C, the state, CB decay dt, and x. Every decay is the
exponential of a difference of cumulative sums. seq_idx clears the state where it changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, check_inputs, next_power_of_2, pick
from .ssd_prepare import (
    BMM_CONFIGS,
    CUMSUM_CONFIGS,
    _decay,
    _log2_units,
    chunk_bmm,
    chunk_cumsum,
    fit_blocks,
)
from .ssd_states import (
    HALVES,
    PASSING_CONFIGS,
    STATE_CONFIGS,
    WALK_CONFIGS,
    entering_states,
)

# With fewer programs the walk leaves too much of a GPU idle: an A100 has 108 SMs, an H100 132.
WALK_PROGRAMS = 96
# With so many, larger tiles win: two programs on each multiprocessor of an H100.
WIDE_WALK_PROGRAMS = 256

SCAN_CONFIGS = (
    Config(
        "q64p128",
        {"BLOCK_Q": 64, "BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_S": 32},
        4,
        3,
        "one warp group, three programs a multiprocessor; BLOCK_S of 64 leaves room for two",
        HALVES,
    ),
    Config(
        "q128p128",
        {"BLOCK_Q": 128, "BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_S": 32},
        8,
        3,
        "two warp groups read each state once, where q64p128 reads it twice",
        HALVES,
    ),
    Config(
        "q64p64",
        {"BLOCK_Q": 64, "BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_S": 32},
        4,
        3,
        "short sequences: twice the programs",
        HALVES,
    ),
    Config(
        "q32p32",
        {"BLOCK_Q": 32, "BLOCK_P": 32, "BLOCK_N": 32, "BLOCK_S": 32},
        4,
        2,
        "IEEE products of float32 are FMA, whose operands must fit registers",
        (torch.float32,),
    ),
)

TABLES = (CUMSUM_CONFIGS, BMM_CONFIGS, WALK_CONFIGS, STATE_CONFIGS, PASSING_CONFIGS, SCAN_CONFIGS)


@triton.jit(do_not_specialize=["l", "chunks"])
def _chunk_scan_kernel(
    x_ptr,
    C_ptr,
    CB_ptr,
    dt_ptr,
    sum_ptr,
    entering_ptr,
    seq_idx_ptr,
    D_ptr,
    y_ptr,
    l,
    heads,
    group_heads,
    chunks,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_p,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    C_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    D_stride_h,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_D: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    TILES: tl.constexpr = CHUNK // BLOCK_Q * TILES_P
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES
    head = (row % heads).to(tl.int64)
    chunk = (row // heads % chunks).to(tl.int64)
    batch = (row // heads // chunks).to(tl.int64)
    group = head // group_heads
    first_q = tile // TILES_P * BLOCK_Q
    q = first_q + tl.arange(0, BLOCK_Q)
    p = tile % TILES_P * BLOCK_P + tl.arange(0, BLOCK_P)
    x_column = p[None, :].to(tl.int64) * x_stride_p
    k = tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    first = chunk * CHUNK
    count = tl.minimum(l - first, CHUNK).to(tl.int32)
    inside_q = q < count

    # What the entering state brings to each position.
    C_block = C_ptr + batch * C_stride_b + group * C_stride_g + first * C_stride_l
    C_block += q[:, None].to(tl.int64) * C_stride_l + k[None, :].to(tl.int64) * C_stride_n
    entering = entering_ptr + ((batch * chunks + chunk) * heads + head) * (P * N)
    entering += p[None, :] * N + k[:, None]
    y = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    for start in range(0, N, BLOCK_N):
        within = k < N - start
        C = tl.load(C_block, mask=inside_q[:, None] & within[None, :], other=0.0)
        state = tl.load(entering + start, mask=within[:, None] & (p < P)[None, :], other=0.0)
        y = tl.dot(C, state, y, input_precision="ieee")
        C_block += BLOCK_N * C_stride_n
    sums = ((batch * heads + head) * chunks + chunk) * CHUNK
    sum_q = _log2_units(tl.load(sum_ptr + sums + q))
    carried = _decay(sum_q)
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b
        offset = (first + q) * seq_idx_stride_l
        document_q = tl.load(document + offset, mask=inside_q, other=0)
        before = tl.load(document + tl.maximum(first - 1, 0) * seq_idx_stride_l)
        y = tl.where((document_q == before)[:, None], y, 0.0)  # an infinite state times 0 is NaN
    y *= carried[:, None]

    # What the chunk's own positions bring. Above the diagonal CB is 0 but the exponential may be
    # infinite. Masked rather than clamped: Triton recomputes weights made of loads and arithmetic
    # alone in every warp that multiplies them, on sm_80 all four.
    x_head = x_ptr + batch * x_stride_b + head * x_stride_h + first * x_stride_l
    x_block = x_head + s[:, None].to(tl.int64) * x_stride_l + x_column
    CB_block = CB_ptr + ((batch * chunks + chunk) * (heads // group_heads) + group) * CHUNK * CHUNK
    CB_block += q[:, None] * CHUNK + s[None, :]
    for start in range(0, first_q + BLOCK_Q, BLOCK_S):
        inside = s < count - start
        CB = tl.load(CB_block + start)
        x = tl.load(x_block, mask=inside[:, None] & (p < P)[None, :], other=0.0)
        sum_s = _log2_units(tl.load(sum_ptr + sums + start + s))
        dt = tl.load(dt_ptr + sums + start + s)
        causal = q[:, None] >= start + s[None, :]
        decayed = tl.where(causal, CB * _decay(sum_q[:, None] - sum_s[None, :]), 0.0)
        weight = decayed * dt[None, :]
        y = tl.dot(weight.to(x.dtype), x, y, input_precision="ieee")
        x_block += BLOCK_S * x_stride_l

    mask = inside_q[:, None] & (p < P)[None, :]
    if HAS_D:
        D = tl.load(D_ptr + head * D_stride_h).to(tl.float32)
        x_own = x_head + q[:, None].to(tl.int64) * x_stride_l + x_column
        y += D * tl.load(x_own, mask=mask, other=0.0).to(tl.float32)
    address = y_ptr + ((batch * l + first + q[:, None]) * heads + head) * P + p[None, :]
    tl.store(address, y, mask=mask)


def walks(b: int, h: int, p: int, n: int, config: Config) -> bool:
    """Whether the walk makes enough programs of these sizes; the rule where nothing is asked."""
    return _programs(b, h, p, n, config) >= WALK_PROGRAMS


def default_walk(b: int, h: int, p: int, n: int, dtype: torch.dtype) -> Config:
    """The walk's configuration for these sizes."""
    serving = [config for config in WALK_CONFIGS if dtype in config.dtypes]
    wide = _programs(b, h, p, n, serving[-1]) >= WIDE_WALK_PROGRAMS
    return serving[-1 if wide else 0]


def _programs(b: int, h: int, p: int, n: int, config: Config) -> int:
    tiles = triton.cdiv(p, config.meta["BLOCK_P"]) * triton.cdiv(n, config.meta["BLOCK_N"])
    return b * h * tiles


def pick_each(dtype: torch.dtype, names: str, sizes: tuple[int, int, int, int]) -> list:
    """Configurations of the cumulative sums, C B^T, the states (a tuple: see there) and the scan.

    names: at most one of each table of `TABLES`, separated by commas; without one a table's first
    entry is taken, the walk's by `sizes` (b, h, p, n), and the walk where it makes enough programs.
    Raises ValueError for a name that no table has for this dtype, and for two ways to the states.
    """
    asked = [name for name in names.split(",") if name]
    known = [[config.name for config in table if dtype in config.dtypes] for table in TABLES]
    for name in asked:
        if not any(name in entries for entries in known):
            options = "; ".join(", ".join(entries) for entries in known)
            raise ValueError(f"no configuration {name!r} for {dtype}; there are: {options}")
    named = [[name for name in asked if name in entries] for entries in known]
    parallel = named[3] or named[4]
    if (named[2] and parallel) or any(len(of_table) > 1 for of_table in named):
        raise ValueError(f"configurations {names!r} exclude each other")
    cumsum, bmm, walk, state, passing, scan = (
        pick(table, dtype, of_table[0] if of_table else "")
        for table, of_table in zip(TABLES, named)
    )
    if not named[2]:
        walk = default_walk(*sizes, dtype)
    walking = named[2] or (not parallel and walks(*sizes, walk))
    return [cumsum, bmm, (walk,) if walking else (state, passing), scan]


def launch_ssd_staged(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    chunk_size: int,
    initial_state_bhpn: Tensor | None,
    seq_idx_bl: Tensor | None,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    config: str,
) -> tuple[Tensor, Tensor]:
    """Validate, allocate and launch; returns y_blhp and final_state_bhpn.

    x_blhp (b, l, h, p), B_blgn, C_blgn (b, l, g, n) of one dtype; the rest as for `ssd_scan`, any
    strides. chunk_size is rounded up to a power of two between 16 and 256. config: see `pick_each`.
    Raises ValueError.
    """
    name = "ssd_scan"
    check_inputs(
        name, x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl, dt_bias_h
    )
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    if l == 0 or g == 0 or h % g:
        raise ValueError(f"{name}: length {l} must be positive, {h} heads a multiple of {g} groups")
    for label, tensor, shape in (
        ("dt_blh", dt_blh, (b, l, h)),
        ("A_h", A_h, (h,)),
        ("B_blgn", B_blgn, (b, l, g, n)),
        ("C_blgn", C_blgn, (b, l, g, n)),
        ("D_h", D_h, (h,)),
        ("initial_state_bhpn", initial_state_bhpn, (b, h, p, n)),
        ("seq_idx_bl", seq_idx_bl, (b, l)),
        ("dt_bias_h", dt_bias_h, (h,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: {label} {tuple(tensor.shape)}, expected {shape}")
    if not B_blgn.dtype == C_blgn.dtype == x_blhp.dtype:
        raise ValueError(
            f"{name}: B {B_blgn.dtype} and C {C_blgn.dtype}, expected {x_blhp.dtype}, x's dtype"
        )
    cumsum, bmm, states, scan = pick_each(x_blhp.dtype, config, (b, h, p, n))
    chunk = min(next_power_of_2(min(chunk_size, l), 16), 256)
    chunks = triton.cdiv(l, chunk)

    dt_bhcq, sum_bhcq = chunk_cumsum(
        dt_blh,
        A_h,
        chunk,
        dtype=x_blhp.dtype,
        dt_bias_h=dt_bias_h,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        config=cumsum.name,
    )
    CB_bcgqs = chunk_bmm(C_blgn, B_blgn, chunk, seq_idx_bl, config=bmm.name)
    state_bchpn, final_bhpn = entering_states(
        x_blhp, B_blgn, dt_bhcq, sum_bhcq, initial_state_bhpn, seq_idx_bl, states
    )
    y_blhp = torch.empty((b, l, h, p), dtype=x_blhp.dtype, device=x_blhp.device)
    seq_idx_strides = (0, 0) if seq_idx_bl is None else seq_idx_bl.stride()
    sizes = {"HAS_SEQ_IDX": seq_idx_bl is not None, "P": p, "N": n, "CHUNK": chunk}

    width, depth = next_power_of_2(p, 16), next_power_of_2(n, 16)
    options = fit_blocks(scan.options, BLOCK_Q=chunk, BLOCK_P=width, BLOCK_N=depth, BLOCK_S=chunk)
    tiles = (chunk // options["BLOCK_Q"]) * triton.cdiv(p, options["BLOCK_P"])
    _chunk_scan_kernel[(b * chunks * h * tiles,)](
        x_blhp,
        C_blgn,
        CB_bcgqs,
        dt_bhcq,
        sum_bhcq,
        state_bchpn,
        seq_idx_bl,
        D_h,
        y_blhp,
        l,
        h,
        h // g,
        chunks,
        *x_blhp.stride(),
        *C_blgn.stride(),
        *seq_idx_strides,
        0 if D_h is None else D_h.stride(0),
        HAS_D=D_h is not None,
        **sizes,
        **options,
    )
    return y_blhp, final_bhpn

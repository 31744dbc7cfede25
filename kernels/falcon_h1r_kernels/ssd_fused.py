"""The SSD scan with its states kept on chip: one program walks many chunks (arXiv 2405.21060, 6).

    y_q   = exp(sum_q) state C_q + sum over s <= q of CB_qs exp(sum_q - sum_s) dt_s x_s + D x_q
    state = exp(sum_end) state + sum over s of exp(sum_end - sum_s) dt_s x_s (outer) B_s

A program holds the state of one head, BLOCK_P channels by all n, in registers, and takes chunk
after chunk; per chunk it reads x, B, C and CB (ssd_prepare.py; shared by the heads of a group, so
mostly from L2) and writes y. States reach device memory only where the sequence is cut: into S
segments, so that few heads still fill a machine. A first walk, without y, then leaves the state at
the end of each segment but the last, as if it had started from zero, with the decay over it; the
second walk combines those of the segments before its own: S - 1 states instead of l / chunk.

Axes: b batch, l length, h heads, p channels per head, g groups, n state size, c chunks, q and s
positions inside a chunk, e segments but the last. Sums and the state are float32; operands of
matrix products are rounded to x's dtype: C and the state, CB decay dt and x, x dt decay and B.
Every decay is the exponential of a difference of cumulative sums. seq_idx clears the state where it
changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, check_inputs, next_power_of_2, pick
from .ssd_prepare import _decay, _log2_units, chunk_bmm, chunk_cumsum, fit_blocks
from .strides import in_units

HALVES = (torch.bfloat16, torch.float16)
MAX_STATE = 256
SHARED_OF_P64Q64 = 122 * 1024

CONFIGS = (
    Config(
        "p64q64",
        {"BLOCK_P": 64, "BLOCK_Q": 64},
        8,
        2,
        "64 x 256 states are 64 registers of 256 threads; the next chunk loads behind this one",
        HALVES,
    ),
    Config(
        "p64q32",
        {"BLOCK_P": 64, "BLOCK_Q": 32},
        8,
        2,
        "half the shared memory and half the exponentials, more instructions per product",
        HALVES,
    ),
    Config(
        "p32q16",
        {"BLOCK_P": 32, "BLOCK_Q": 16},
        8,
        1,
        "IEEE products of float32 are FMA, whose operands must fit registers",
        (torch.float32,),
    ),
)


@triton.jit(do_not_specialize=["l", "chunks", "segments", "chunks_per_segment"])
def _ssd_walk_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    CB_ptr,
    dt_ptr,
    sum_ptr,
    D_ptr,
    initial_ptr,
    seq_idx_ptr,
    ends_ptr,
    decays_ptr,
    y_ptr,
    final_ptr,
    l,
    chunks,
    segments,
    chunks_per_segment,
    heads,
    groups,
    x_stride_b,
    x_stride_h,
    x_stride_p,
    B_stride_b,
    B_stride_g,
    B_stride_n,
    C_stride_b,
    C_stride_g,
    C_stride_n,
    D_stride_h,
    initial_stride_b,
    initial_stride_h,
    initial_stride_p,
    initial_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    # A model has one row stride. Known to the compiler, it leaves one address register per tile.
    x_stride_l: tl.constexpr,
    B_stride_l: tl.constexpr,
    C_stride_l: tl.constexpr,
    y_stride_l: tl.constexpr,
    X_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    WRITES_Y: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk one segment. WRITES_Y: the walk that writes y and, in the last segment, the final state;
    otherwise the one that writes a segment's own end and decay, for all segments but the last."""
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    walks = segments if WRITES_Y else segments - 1
    tile = tl.program_id(0) % TILES_P
    row = tl.program_id(0) // TILES_P
    segment = row // heads % walks
    # Divided before they are widened: a division of 64-bit integers is a call.
    group = (row % heads // (heads // groups)).to(tl.int64)
    head = (row % heads).to(tl.int64)
    batch = (row // heads // walks).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    row_q = q[:, None].to(tl.int64)

    x_block = x_ptr + (batch * x_stride_b + head * x_stride_h) * X_UNIT
    x_tile = row_q * x_stride_l + p[None, :].to(tl.int64) * x_stride_p
    B_block = B_ptr + (batch * B_stride_b + group * B_stride_g) * B_UNIT
    B_tile = row_q * B_stride_l + n[None, :].to(tl.int64) * B_stride_n
    C_block = C_ptr + (batch * C_stride_b + group * C_stride_g) * C_UNIT
    C_tile = row_q * C_stride_l + n[None, :].to(tl.int64) * C_stride_n
    CB_block = CB_ptr + (batch * chunks * groups + group) * (BLOCK_Q * BLOCK_Q)
    CB_tile = q[:, None] * BLOCK_Q + q[None, :]
    y_block = y_ptr + batch * l * y_stride_l + head * P
    y_tile = row_q * y_stride_l + p[None, :]
    sums = (batch * heads + head) * chunks * BLOCK_Q
    dt_block = dt_ptr + sums
    sum_block = sum_ptr + sums

    first = segment * chunks_per_segment
    last = tl.minimum(first + chunks_per_segment, chunks)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    offset = p[:, None] * N + n[None, :]
    inside_state = (p < P)[:, None] & (n < N)[None, :]
    if WRITES_Y:
        if HAS_INITIAL:
            address = initial_ptr + batch * initial_stride_b + head * initial_stride_h
            address += p[:, None].to(tl.int64) * initial_stride_p
            address += n[None, :].to(tl.int64) * initial_stride_n
            state = tl.load(address, mask=inside_state, other=0.0).to(tl.float32)
        ended = (batch * heads + head) * (segments - 1)
        for _ in tl.range(0, segment, num_stages=1):
            end = tl.load(ends_ptr + ended * (P * N) + offset, mask=inside_state, other=0.0)
            decay = tl.load(decays_ptr + ended)
            if HAS_SEQ_IDX:  # an infinite state times 0 would be NaN
                state = tl.where(decay > 0.0, state, 0.0)
            state = state * decay + end
            ended += 1
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b
        previous = tl.maximum(first * BLOCK_Q - 1, 0).to(tl.int64)
        entering = tl.load(document + previous * seq_idx_stride_l)
        before = entering
    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head * D_stride_h).to(tl.float32)
    total = tl.full((), 0.0, sum_ptr.dtype.element_ty)

    # Named here, num_stages also fetches ahead the vectors that no product reads.
    for chunk in tl.range(first, last, num_stages=STAGES):
        at = chunk * BLOCK_Q
        start = tl.cast(at, tl.int64)
        inside = q < l - at
        inside_x = inside[:, None]
        if P % BLOCK_P != 0:
            inside_x = inside_x & (p < P)[None, :]
        inside_B = inside[:, None]
        if N != BLOCK_N:
            inside_B = inside_B & (n < N)[None, :]
        x = tl.load(x_block + start * x_stride_l + x_tile, mask=inside_x, other=0.0)
        B = tl.load(B_block + start * B_stride_l + B_tile, mask=inside_B, other=0.0)
        dt = tl.load(dt_block + at + q)
        sum_q = _log2_units(tl.load(sum_block + at + q))
        log_end = tl.load(sum_block + at + BLOCK_Q - 1)
        sum_end = _log2_units(log_end)
        weight = _decay(sum_end - sum_q) * dt
        decay = _decay(sum_end)
        if HAS_SEQ_IDX:
            document_q = tl.load(document + (start + q) * seq_idx_stride_l, mask=inside, other=0)
            end = tl.cast(tl.minimum(at + BLOCK_Q, l), tl.int64) - 1
            now = tl.load(document + end * seq_idx_stride_l)
            weight = tl.where(document_q == now, weight, 0.0)
        if WRITES_Y:
            # Transposed, (p, q), the state is a left operand as it lies in its registers. The two
            # products are not chained: the compiler would let both warp groups compute all of y.
            C = tl.load(C_block + start * C_stride_l + C_tile, mask=inside_B, other=0.0)
            carried = _decay(sum_q)
            # CB is 0 above the diagonal, where the difference of sums is positive and its
            # exponential could be infinite.
            CB = tl.load(
                CB_block + tl.cast(chunk, tl.int64) * (groups * BLOCK_Q * BLOCK_Q) + CB_tile
            )
            difference = tl.minimum(sum_q[:, None] - sum_q[None, :], 0.0)
            mixing = (CB * _decay(difference) * dt[None, :]).to(x.dtype)
            y = tl.dot(state.to(x.dtype), tl.trans(C), input_precision="ieee")
            own = skip * tl.trans(x).to(tl.float32)
            own = tl.dot(tl.trans(x), tl.trans(mixing), own, input_precision="ieee")
            y = y * carried[None, :]
            if HAS_SEQ_IDX:
                y = tl.where((document_q == before)[None, :], y, 0.0)
            y = y + own
            y = tl.trans(y).to(y_ptr.dtype.element_ty)
            tl.store(y_block + start * y_stride_l + y_tile, y, mask=inside_x)
        else:
            total += log_end
        weighted = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
        if HAS_SEQ_IDX:
            state = tl.where(now == before, state, 0.0)
        state = tl.dot(tl.trans(weighted), B, state * decay, input_precision="ieee")
        if HAS_SEQ_IDX:
            before = now

    if WRITES_Y:
        if segment == segments - 1:
            address = final_ptr + (batch * heads + head) * (P * N) + offset
            tl.store(address, state, mask=inside_state)
    else:
        ended = (batch * heads + head) * walks + segment
        tl.store(ends_ptr + ended * (P * N) + offset, state, mask=inside_state)
        if tile == 0:
            decay = _decay(_log2_units(total))
            if HAS_SEQ_IDX:
                decay = tl.where(before == entering, decay, 0.0)
            tl.store(decays_ptr + ended, decay)


def default_config(dtype: torch.dtype, shared_memory: int) -> str:
    """The configuration for a GPU that gives a program so many bytes of shared memory.

    p64q64 needs 121 KiB on sm_80 and 193 KiB on sm_90; sm_86, sm_89 and sm_120 give 99 KiB. In
    float16 it spills on sm_90.
    """
    narrow = dtype is torch.float16 or shared_memory < SHARED_OF_P64Q64
    return "p64q32" if narrow and dtype in HALVES else pick(CONFIGS, dtype).name


def tiling(dtype: torch.dtype, p: int, config: str = "") -> tuple[int, int]:
    """Programs per head of p channels, and positions per chunk, of a configuration."""
    meta = pick(CONFIGS, dtype, config).meta
    return triton.cdiv(p, meta["BLOCK_P"]), meta["BLOCK_Q"]


def segment_lengths(length: int, block: int, segments: int) -> tuple[int, int, int]:
    """Chunks of `block` positions, chunks per segment, and the segments that this makes (>= 1)."""
    chunks = triton.cdiv(length, block)
    per_segment = triton.cdiv(chunks, segments)
    return chunks, per_segment, triton.cdiv(chunks, per_segment)


def launch_ssd_fused(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    segments: int,
    initial_state_bhpn: Tensor | None,
    seq_idx_bl: Tensor | None,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    config: str,
) -> tuple[Tensor, Tensor]:
    """Allocate and launch: two kernels of preparation, and one or two walks.

    Arguments as for `ssd_scan`, which checks their shapes; any strides (each row stride of x, B
    and C that is new compiles the kernel anew). The sequence is cut into at most `segments`
    segments of whole chunks. config: a name in `CONFIGS`. Returns
    y_blhp (b, l, h, p) in x's dtype and final_state_bhpn (b, h, p, n) float32, both contiguous.
    Raises ValueError.
    """
    check_inputs(
        "ssd_scan",
        x_blhp,
        dt_blh,
        A_h,
        B_blgn,
        C_blgn,
        D_h,
        initial_state_bhpn,
        seq_idx_bl,
        dt_bias_h,
    )
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    if n > MAX_STATE:
        raise ValueError(f"ssd_scan: state size {n}, the fused form takes at most {MAX_STATE}")
    if segments < 1:
        raise ValueError(f"ssd_scan: {segments} segments, expected at least 1")
    chosen = pick(CONFIGS, x_blhp.dtype, config)
    options = fit_blocks(chosen.options, BLOCK_P=next_power_of_2(p, 16))
    block_p, block_q = options["BLOCK_P"], options["BLOCK_Q"]
    chunks, per_segment, segments = segment_lengths(l, block_q, segments)

    dt_bhcq, sum_bhcq = chunk_cumsum(
        dt_blh,
        A_h,
        block_q,
        dtype=x_blhp.dtype,
        dt_bias_h=dt_bias_h,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    CB_bcgqs = chunk_bmm(C_blgn, B_blgn, block_q, seq_idx_bl)
    empty = {"dtype": torch.float32, "device": x_blhp.device}
    ends_bhepn = torch.empty((b, h, segments - 1, p, n), **empty)
    decays_bhe = torch.empty((b, h, segments - 1), **empty)
    final_bhpn = torch.empty((b, h, p, n), **empty)
    y_blhp = torch.empty((b, l, h, p), dtype=x_blhp.dtype, device=x_blhp.device)
    units, strides, rows = [], [], []
    for tensor in (x_blhp, B_blgn, C_blgn):
        unit, (stride_b, stride_h) = in_units(tensor.stride(0), tensor.stride(2))
        units.append(unit)
        rows.append(tensor.stride(1))
        strides += [stride_b, stride_h, tensor.stride(3)]
    for writes_y, walks in ((False, segments - 1), (True, segments)):
        programs = b * walks * h * triton.cdiv(p, block_p)
        if programs == 0:
            continue
        _ssd_walk_kernel[(programs,)](
            x_blhp,
            B_blgn,
            C_blgn,
            CB_bcgqs,
            dt_bhcq,
            sum_bhcq,
            D_h,
            initial_state_bhpn,
            seq_idx_bl,
            ends_bhepn,
            decays_bhe,
            y_blhp,
            final_bhpn,
            l,
            chunks,
            segments,
            per_segment,
            h,
            g,
            *strides,
            0 if D_h is None else D_h.stride(0),
            *((0, 0, 0, 0) if initial_state_bhpn is None else initial_state_bhpn.stride()),
            *((0, 0) if seq_idx_bl is None else seq_idx_bl.stride()),
            *rows,
            h * p,
            *units,
            WRITES_Y=writes_y,
            HAS_D=D_h is not None,
            HAS_INITIAL=initial_state_bhpn is not None,
            HAS_SEQ_IDX=seq_idx_bl is not None,
            P=p,
            N=n,
            BLOCK_N=next_power_of_2(n, 16),
            STAGES=chosen.num_stages,
            **options,
        )
    return y_blhp, final_bhpn

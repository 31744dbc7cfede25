"""The states that enter each chunk of the SSD scan, in one launch or in two.

    local_c   = sum over s of exp(sum_end - sum_s) dt_s x_s (outer) B_s     what a chunk adds
    state_c+1 = exp(sum_end) state_c + local_c                              one chunk to the next

The walk does both: a program keeps its tile of the state in registers from the first chunk to the
last, so that states are written once, in x's dtype, and rounded nowhere before that. It needs
enough heads and tiles to fill a GPU. Otherwise chunks are computed in parallel and what they add is
passed on by a second kernel, which replaces it by the states: in x's dtype it is half the bytes of
float32, for the scan's largest tensor, and costs 1.4 times the rounding error in the final state,
a sum of rounded terms then, and 1.02 times in y.

Axes: b batch, l length, h heads, p channels per head, g groups, n state size, c chunks, s positions
inside a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, next_power_of_2
from .ssd_prepare import _decay, _log2_units, fit_blocks

HALVES = (torch.bfloat16, torch.float16)
FMA = "IEEE products of float32 are FMA, whose operands must fit registers"
_SMALL = {"BLOCK_P": 32, "BLOCK_N": 32, "BLOCK_S": 32}

WALK_CONFIGS = (
    Config(
        "walk_p64n64",
        {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_S": 128},
        8,
        3,
        "192 programs for one sequence of 24 heads of 128 x 256, each with a chunk loading ahead",
        HALVES,
    ),
    Config(
        "walk_p128n128",
        {"BLOCK_P": 128, "BLOCK_N": 128, "BLOCK_S": 64},
        8,
        2,
        "batches of 6 and more: x and B are read half as often (8 x 4096: 7 % less time in all)",
        HALVES,
    ),
    Config("walk_p32n32", _SMALL, 4, 2, FMA, (torch.float32,)),
)

STATE_CONFIGS = (
    Config(
        "p128n128",
        {"BLOCK_P": 128, "BLOCK_N": 128, "BLOCK_S": 64},
        8,
        3,
        "a head of 128 x 256 reads x twice and B once",
        HALVES,
    ),
    Config(
        "p64n128",
        {"BLOCK_P": 64, "BLOCK_N": 128, "BLOCK_S": 64},
        4,
        3,
        "heads of 64 channels: one warp group",
        HALVES,
    ),
    Config("p32n32", _SMALL, 4, 2, FMA, (torch.float32,)),
)

PASSING_CONFIGS = (
    Config(
        "block1024",
        {"BLOCK": 1024, "STAGES": 4},
        4,
        4,
        "8 elements a thread are 128-bit accesses of 16 bits; three chunks are loading ahead",
    ),
    Config("block512", {"BLOCK": 512, "STAGES": 4}, 4, 4, "small batches: twice the programs"),
)


@triton.jit(do_not_specialize=["l", "chunks"])
def _chunk_state_kernel(
    x_ptr,
    B_ptr,
    dt_ptr,
    sum_ptr,
    seq_idx_ptr,
    local_ptr,
    l,
    heads,
    group_heads,
    chunks,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_p,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    B_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    HAS_SEQ_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * TILES_N
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES
    head = (row % heads).to(tl.int64)
    chunk = (row // heads % chunks).to(tl.int64)
    batch = (row // heads // chunks).to(tl.int64)
    p = tile // TILES_N * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    first = chunk * CHUNK
    count = tl.minimum(l - first, CHUNK).to(tl.int32)

    x_block = x_ptr + batch * x_stride_b + head * x_stride_h + first * x_stride_l
    x_block += p[:, None].to(tl.int64) * x_stride_p + s[None, :].to(tl.int64) * x_stride_l
    B_block = B_ptr + batch * B_stride_b + head // group_heads * B_stride_g + first * B_stride_l
    B_block += s[:, None].to(tl.int64) * B_stride_l + n[None, :].to(tl.int64) * B_stride_n
    sums = ((batch * heads + head) * chunks + chunk) * CHUNK
    sum_end = _log2_units(tl.load(sum_ptr + sums + CHUNK - 1))
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b + first * seq_idx_stride_l
        last_document = tl.load(document + (count - 1).to(tl.int64) * seq_idx_stride_l)

    local = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, BLOCK_S):
        inside = s < count - start
        x = tl.load(x_block, mask=(p < P)[:, None] & inside[None, :], other=0.0)
        B = tl.load(B_block, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        sum_s = _log2_units(tl.load(sum_ptr + sums + start + s))
        weight = tl.load(dt_ptr + sums + start + s) * _decay(sum_end - sum_s)
        if HAS_SEQ_IDX:
            offset = (start + s).to(tl.int64) * seq_idx_stride_l
            same = tl.load(document + offset, mask=inside, other=0) == last_document
            weight = tl.where(same, weight, 0.0)
        weighted = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
        local = tl.dot(weighted, B, local, input_precision="ieee")
        x_block += BLOCK_S * x_stride_l
        B_block += BLOCK_S * B_stride_l

    address = local_ptr + ((batch * chunks + chunk) * heads + head) * (P * N)
    mask = (p < P)[:, None] & (n < N)[None, :]
    tl.store(address + p[:, None] * N + n[None, :], local, mask=mask)


@triton.jit(do_not_specialize=["l", "chunks"])
def _state_passing_kernel(
    state_ptr,
    sum_ptr,
    seq_idx_ptr,
    initial_ptr,
    final_ptr,
    l,
    heads,
    chunks,
    initial_stride_b,
    initial_stride_h,
    initial_stride_p,
    initial_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (P * N + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // TILES
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    element = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = element < P * N
    if HAS_INITIAL:
        address = initial_ptr + batch * initial_stride_b + head * initial_stride_h
        p, n = (element // N).to(tl.int64), (element % N).to(tl.int64)
        address += p * initial_stride_p + n * initial_stride_n
        state = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b
        before = tl.load(document)
    sums = sum_ptr + (batch * heads + head) * chunks * CHUNK + CHUNK - 1
    offset = (batch * chunks * heads + head) * (P * N) + element
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        local = tl.load(state_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        decay = _decay(_log2_units(tl.load(sums)))
        tl.store(state_ptr + offset, state, mask=inside)
        if HAS_SEQ_IDX:
            last = tl.minimum(chunk * CHUNK + CHUNK, l) - 1
            now = tl.load(document + last.to(tl.int64) * seq_idx_stride_l)
            state = tl.where(now == before, state, 0.0)  # infinity times 0 would be NaN
            before = now
        state = state * decay + local
        sums += CHUNK
        offset += heads * (P * N)
    tl.store(final_ptr + (batch * heads + head) * (P * N) + element, state, mask=inside)


@triton.jit(do_not_specialize=["l", "chunks"])
def _state_walk_kernel(
    x_ptr,
    B_ptr,
    dt_ptr,
    sum_ptr,
    seq_idx_ptr,
    initial_ptr,
    entering_ptr,
    final_ptr,
    l,
    heads,
    group_heads,
    chunks,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_p,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    B_stride_n,
    initial_stride_b,
    initial_stride_h,
    initial_stride_p,
    initial_stride_n,
    seq_idx_stride_b,
    seq_idx_stride_l,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * TILES_N
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    p = tile // TILES_N * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    x_block = x_ptr + batch * x_stride_b + head * x_stride_h
    x_block += p[:, None].to(tl.int64) * x_stride_p + s[None, :].to(tl.int64) * x_stride_l
    B_block = B_ptr + batch * B_stride_b + head // group_heads * B_stride_g
    B_block += s[:, None].to(tl.int64) * B_stride_l + n[None, :].to(tl.int64) * B_stride_n
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    if HAS_INITIAL:
        address = initial_ptr + batch * initial_stride_b + head * initial_stride_h
        address += p[:, None].to(tl.int64) * initial_stride_p
        address += n[None, :].to(tl.int64) * initial_stride_n
        state = tl.load(address, mask=inside_pn, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_SEQ_IDX:
        document = seq_idx_ptr + batch * seq_idx_stride_b
        before = tl.load(document)
    sums = (batch * heads + head) * chunks * CHUNK
    entering = entering_ptr + (batch * chunks * heads + head) * (P * N)
    entering += p[:, None] * N + n[None, :]
    for chunk in range(0, chunks):
        tl.store(entering, state, mask=inside_pn)
        count = l - chunk * CHUNK
        sum_end = _log2_units(tl.load(sum_ptr + sums + CHUNK - 1))
        decay = _decay(sum_end)
        if HAS_SEQ_IDX:
            last = (chunk * CHUNK + tl.minimum(count, CHUNK) - 1).to(tl.int64)
            now = tl.load(document + last * seq_idx_stride_l)
            state = tl.where(now == before, state, 0.0)  # infinity times 0 would be NaN
            before = now
        state *= decay
        for start in tl.static_range(0, CHUNK, BLOCK_S):
            inside = s < count - start
            x = tl.load(x_block, mask=(p < P)[:, None] & inside[None, :], other=0.0)
            B = tl.load(B_block, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            sum_s = _log2_units(tl.load(sum_ptr + sums + start + s))
            weight = tl.load(dt_ptr + sums + start + s) * _decay(sum_end - sum_s)
            if HAS_SEQ_IDX:
                offset = (chunk * CHUNK + start + s).to(tl.int64) * seq_idx_stride_l
                same = tl.load(document + offset, mask=inside, other=0) == now
                weight = tl.where(same, weight, 0.0)
            weighted = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
            state = tl.dot(weighted, B, state, input_precision="ieee")
            x_block += BLOCK_S * x_stride_l
            B_block += BLOCK_S * B_stride_l
        sums += CHUNK
        entering += heads * (P * N)
    address = final_ptr + (batch * heads + head) * (P * N)
    tl.store(address + p[:, None] * N + n[None, :], state, mask=inside_pn)


def entering_states(
    x_blhp: Tensor,
    B_blgn: Tensor,
    dt_bhcq: Tensor,
    sum_bhcq: Tensor,
    initial_state_bhpn: Tensor | None,
    seq_idx_bl: Tensor | None,
    configs: tuple[Config, ...],
) -> tuple[Tensor, Tensor]:
    """The state entering each chunk, (b, c, h, p, n) in x's dtype, and the last, (b, h, p, n).

    dt_bhcq, sum_bhcq: as `chunk_cumsum` returns them; the others as for `ssd_scan`, already
    checked, of any strides. The final state is float32. configs: one of `WALK_CONFIGS`, or one of
    `STATE_CONFIGS` and one of `PASSING_CONFIGS`.
    """
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    chunks, chunk = dt_bhcq.shape[2:]
    state_bchpn = torch.empty((b, chunks, h, p, n), dtype=x_blhp.dtype, device=x_blhp.device)
    final_bhpn = torch.empty((b, h, p, n), dtype=torch.float32, device=x_blhp.device)
    seq_idx_strides = (0, 0) if seq_idx_bl is None else seq_idx_bl.stride()
    initial = initial_state_bhpn
    initial_strides = (0,) * 4 if initial is None else initial.stride()
    sizes = {"HAS_SEQ_IDX": seq_idx_bl is not None, "P": p, "N": n, "CHUNK": chunk}
    width, depth = next_power_of_2(p, 16), next_power_of_2(n, 16)
    options = fit_blocks(configs[0].options, BLOCK_P=width, BLOCK_N=depth, BLOCK_S=chunk)
    tiles = triton.cdiv(p, options["BLOCK_P"]) * triton.cdiv(n, options["BLOCK_N"])
    if len(configs) == 1:
        _state_walk_kernel[(b * h * tiles,)](
            x_blhp,
            B_blgn,
            dt_bhcq,
            sum_bhcq,
            seq_idx_bl,
            initial,
            state_bchpn,
            final_bhpn,
            l,
            h,
            h // g,
            chunks,
            *x_blhp.stride(),
            *B_blgn.stride(),
            *initial_strides,
            *seq_idx_strides,
            HAS_INITIAL=initial is not None,
            **sizes,
            **options,
        )
        return state_bchpn, final_bhpn
    _chunk_state_kernel[(b * chunks * h * tiles,)](
        x_blhp,
        B_blgn,
        dt_bhcq,
        sum_bhcq,
        seq_idx_bl,
        state_bchpn,
        l,
        h,
        h // g,
        chunks,
        *x_blhp.stride(),
        *B_blgn.stride(),
        *seq_idx_strides,
        **sizes,
        **options,
    )
    # What each chunk adds is read and, in its place, the state that enters the chunk is written.
    options = fit_blocks(configs[1].options, BLOCK=width * depth)
    _state_passing_kernel[(b * h * triton.cdiv(p * n, options["BLOCK"]),)](
        state_bchpn,
        sum_bhcq,
        seq_idx_bl,
        initial,
        final_bhpn,
        l,
        h,
        chunks,
        *initial_strides,
        *seq_idx_strides,
        HAS_INITIAL=initial is not None,
        **sizes,
        **options,
    )
    return state_bchpn, final_bhpn

"""Causal grouped-query attention over many new positions (prefill, chunked prefill, training).

    o_i = sum_s softmax_s(q_i k_s / sqrt(e)) v_s    over first_i <= s < last_i

Online softmax (Milakov and Gimelshein 2018; FlashAttention-2, arXiv 2307.08691) in powers of two:
log2(e) / sqrt(e) is one factor, folded into the subtraction of the maximum. A query's keys are one
interval: it ends behind its own position and begins at its document or behind the left padding. So
a block of queries meets key blocks of three kinds: those at the two edges, which pay for masks,
those between, which do not, and those outside, which are never read.

The rows of a tile are pairs (position, query head) of one key head: all heads that share it use
each key block while it is on chip, and a tile of 128 rows spans only 22 positions of six heads, so
little of the diagonal block is wasted. Axes: b batch, h query heads, j key/value heads, l queries,
s keys, e head size, r rows of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_inputs import check_keys, offset_type
from .documents import keys_without_lost
from .launch import Config, check_inputs, check_rows, next_power_of_2, operator, pick

HALVES = (torch.bfloat16, torch.float16)
CONFIGS = (
    Config(
        "rows128",
        {"BLOCK_R": 128, "BLOCK_S": 64},
        8,
        3,
        "two warpgroups of 64 rows, 64 accumulators per thread; 96 KB of keys and values in flight",
        HALVES,
    ),
    Config(
        "rows64",
        {"BLOCK_R": 64, "BLOCK_S": 64},
        4,
        2,
        "short prompts: twice as many tiles, of which two fit a multiprocessor and take turns",
        HALVES,
    ),
    Config("keys32", {"BLOCK_R": 128, "BLOCK_S": 32}, 8, 4, "where rows128 would spill", HALVES),
    Config(
        "heads256", {"BLOCK_R": 64, "BLOCK_S": 32}, 8, 2, "all is twice as wide as at 128", HALVES
    ),
    Config(
        "float32",
        {"BLOCK_R": 32, "BLOCK_S": 32},
        16,
        2,
        "IEEE products are FMAs on registers: over so many threads the tile does not spill",
        (torch.float32,),
    ),
)
# Below so many tiles of 128 rows an H100 would have idle multiprocessors.
FEW_TILES = 132
# The widest head that a configuration's registers and shared memory hold.
WIDEST = {"rows128": 128, "rows64": 128, "keys32": 128, "heads256": 256, "float32": 128}


@triton.jit
def _attend(
    q_re,
    o_re,
    peak_r,
    sum_r,
    begin,
    end,
    gap_begin,
    gap,
    first_r,
    last_r,
    least,
    most,
    k_ptr,
    v_ptr,
    k_stride_s,
    k_stride_e,
    v_stride_s,
    v_stride_e,
    scale,
    e: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Carry the running sums over the key blocks from `begin` up to `end`, multiples of BLOCK_S."""
    column = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_E)
    row = column.to(OFFSET)
    k_offset = row[None, :] * k_stride_s + channel[:, None] * k_stride_e
    v_offset = row[:, None] * v_stride_s + channel[None, :] * v_stride_e
    for step in tl.range(begin, end, BLOCK_S, num_stages=2 if MASKED else None):
        block = step
        if MASKED:
            block = tl.where(step < gap_begin, step, step + gap)
        k_block = k_ptr + tl.cast(block, tl.int64) * k_stride_s
        v_block = v_ptr + tl.cast(block, tl.int64) * v_stride_s
        if MASKED:
            # Keys that no row of the tile sees may be uninitialised memory.
            seen = (block + column < most) & (block + column >= least)
            k_es = tl.load(
                k_block + k_offset, mask=seen[None, :] & (channel[:, None] < e), other=0.0
            )
        elif e == BLOCK_E:
            k_es = tl.load(k_block + k_offset)
        else:
            k_es = tl.load(k_block + k_offset, mask=channel[:, None] < e, other=0.0)
        score_rs = tl.dot(q_re, k_es, input_precision="ieee")
        if MASKED:
            visible = (block + column)[None, :] < last_r[:, None]
            if HAS_START:
                visible = visible & ((block + column)[None, :] >= first_r[:, None])
            score_rs = tl.where(visible, score_rs, float("-inf"))
        new_peak_r = tl.maximum(peak_r, tl.max(score_rs, axis=1) * scale)
        base_r = new_peak_r
        if MASKED:
            # A row that has seen no key yet: 0 instead of -inf, so that no difference is NaN.
            base_r = tl.where(new_peak_r == float("-inf"), 0.0, new_peak_r)
        p_rs = tl.exp2(score_rs * scale - base_r[:, None])
        keep_r = tl.exp2(peak_r - base_r)
        sum_r = sum_r * keep_r + tl.sum(p_rs, axis=1)
        o_re = o_re * keep_r[:, None]
        if MASKED:
            v_se = tl.load(
                v_block + v_offset, mask=seen[:, None] & (channel[None, :] < e), other=0.0
            )
        elif e == BLOCK_E:
            v_se = tl.load(v_block + v_offset)
        else:
            v_se = tl.load(v_block + v_offset, mask=channel[None, :] < e, other=0.0)
        o_re = tl.dot(p_rs.to(v_se.dtype), v_se, o_re, input_precision="ieee")
        peak_r = new_peak_r
    return o_re, peak_r, sum_r


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    offset_ptr,
    start_ptr,
    length_ptr,
    heads,
    j,
    l,
    s,
    scale,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    q_stride_e,
    k_stride_b,
    k_stride_j,
    k_stride_s,
    k_stride_e,
    v_stride_b,
    v_stride_j,
    v_stride_s,
    v_stride_e,
    o_stride_b,
    o_stride_h,
    o_stride_l,
    o_stride_e,
    offset_stride_b,
    length_stride_b,
    start_stride_b,
    start_stride_l,
    e: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OFFSET: tl.constexpr,
):
    # The last queries have the most keys: they start first, the short ones fill the gaps.
    tile = tl.cdiv(l * GROUP, BLOCK_R) - 1 - tl.program_id(0) // heads
    batch = (tl.program_id(0) % heads // j).to(tl.int64)
    key_head = (tl.program_id(0) % heads % j).to(tl.int64)

    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < l * GROUP
    query = row // GROUP
    head = key_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_E)
    first_query = tile * BLOCK_R // GROUP
    last_query = tl.minimum((tile * BLOCK_R + BLOCK_R - 1) // GROUP, l - 1)

    offset = 0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + batch * offset_stride_b).to(tl.int32)
    length = s
    if HAS_LENGTH:
        length = tl.minimum(tl.load(length_ptr + batch * length_stride_b).to(tl.int32), s)
    last_r = offset + query + 1
    if HAS_OFFSET or HAS_LENGTH:
        last_r = tl.minimum(last_r, length)
    most = tl.minimum(offset + last_query + 1, length)
    most_common = tl.minimum(offset + first_query + 1, length)
    first_r = query
    least = 0
    least_common = 0
    if HAS_START:
        starts = start_ptr + batch * start_stride_b
        first_r = tl.load(starts + query.to(tl.int64) * start_stride_l, mask=inside, other=0)
        first_r = first_r.to(tl.int32)
        # Starts never decrease along a row.
        least = tl.load(starts + first_query.to(tl.int64) * start_stride_l).to(tl.int32)
        least = tl.maximum(least, 0)
        least_common = tl.load(starts + last_query.to(tl.int64) * start_stride_l).to(tl.int32)
    begin = least // BLOCK_S * BLOCK_S
    end = tl.cdiv(tl.maximum(most, 0), BLOCK_S) * BLOCK_S
    full_begin = tl.minimum(tl.cdiv(tl.maximum(least_common, 0), BLOCK_S) * BLOCK_S, end)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_begin, tl.maximum(most_common, 0) // BLOCK_S * BLOCK_S)

    q_ptr += batch * q_stride_b
    q_rows = head * q_stride_h + query.to(tl.int64) * q_stride_l
    whole = inside[:, None] & (channel[None, :] < e)
    q_re = tl.load(q_ptr + q_rows[:, None] + channel[None, :] * q_stride_e, mask=whole, other=0.0)
    k_ptr += batch * k_stride_b + key_head * k_stride_j
    v_ptr += batch * v_stride_b + key_head * v_stride_j

    peak_r = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_r = tl.zeros((BLOCK_R,), tl.float32)
    o_re = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    gap = full_end - full_begin
    o_re, peak_r, sum_r = _attend(
        q_re, o_re, peak_r, sum_r, begin, end - gap, full_begin, gap, first_r, last_r, least,
        most, k_ptr, v_ptr, k_stride_s, k_stride_e, v_stride_s, v_stride_e, scale, e, True,
        HAS_START, BLOCK_S, BLOCK_E, OFFSET,
    )  # fmt: skip
    o_re, peak_r, sum_r = _attend(
        q_re, o_re, peak_r, sum_r, full_begin, full_end, 0, 0, first_r, last_r, least, most,
        k_ptr, v_ptr, k_stride_s, k_stride_e, v_stride_s, v_stride_e, scale, e, False, HAS_START,
        BLOCK_S, BLOCK_E, OFFSET,
    )  # fmt: skip
    o_re = o_re / tl.where(sum_r > 0, sum_r, 1.0)[:, None]
    # The rows once more, in another form: addresses kept since the beginning would take registers
    # from the loops.
    row = tl.program_id(0) // heads * -BLOCK_R + tl.cdiv(l * GROUP, BLOCK_R) * BLOCK_R - BLOCK_R
    row += tl.arange(0, BLOCK_R)
    whole = (row < l * GROUP)[:, None] & (channel[None, :] < e)
    o_rows = (key_head * GROUP + row % GROUP) * o_stride_h
    o_rows += (row // GROUP).to(tl.int64) * o_stride_l
    o_address = o_ptr + batch * o_stride_b + o_rows[:, None] + channel[None, :] * o_stride_e
    tl.store(o_address, o_re, mask=whole)


def _configuration(q_bhle: Tensor, group: int, name: str) -> Config:
    """The one called `name`, or by rule: heads256 above 128 channels, rows64 for few tiles."""
    b, h, l, e = q_bhle.shape
    if not name and q_bhle.dtype is not torch.float32:
        few = triton.cdiv(l * group, 128) * b * (h // group) < FEW_TILES
        name = "heads256" if e > 128 else "rows64" if few else "rows128"
    config = pick(CONFIGS, q_bhle.dtype, name)
    if e > WIDEST[config.name]:
        raise ValueError(
            f"attention: configuration {config.name} serves head sizes up to "
            f"{WIDEST[config.name]}, not {e}"
        )
    return config


def launch_attention(
    q_bhle: Tensor,
    k_bjse: Tensor,
    v_bjse: Tensor,
    query_offset_b: Tensor | None,
    seq_idx_bl: Tensor | None,
    key_start_b: Tensor | None,
    key_lengths_b: Tensor | None,
    config: str,
) -> Tensor:
    """Validate, allocate and launch; see `attention`."""
    rows = (query_offset_b, seq_idx_bl, key_start_b, key_lengths_b)
    check_inputs("attention", q_bhle, k_bjse, v_bjse, *rows)
    if q_bhle.ndim != 4:
        raise ValueError(f"attention: queries {tuple(q_bhle.shape)}, expected (b, h, l, e)")
    check_keys("attention", q_bhle, k_bjse, v_bjse)
    b, h, l, e = q_bhle.shape
    j, s = k_bjse.shape[1:3]
    names = ("query_offset_b", "seq_idx_bl", "key_start_b", "key_lengths_b")
    for name, tensor in zip(names, rows):
        check_rows("attention", name, tensor, (b, l) if name == "seq_idx_bl" else (b,))
    if query_offset_b is None and s != l:
        raise ValueError(f"attention: {s} keys for {l} queries need a query_offset_b")
    if seq_idx_bl is not None and query_offset_b is not None:
        raise ValueError("attention: seq_idx_bl and query_offset_b exclude each other")
    chosen = _configuration(q_bhle, h // j, config)
    # Memory order of the caller's next step: (b, l, h, e).
    o_bhle = torch.empty((b, l, h, e), dtype=q_bhle.dtype, device=q_bhle.device).transpose(1, 2)
    tiles = triton.cdiv(l * (h // j), chosen.meta["BLOCK_R"])
    if tiles * b * j == 0:
        return o_bhle
    start_bl = _first_keys(seq_idx_bl, key_start_b, l)
    if seq_idx_bl is not None:
        lost_bl, k_bjse, v_bjse = keys_without_lost(k_bjse, v_bjse, *rows[1:])
    _attention_kernel[(tiles * b * j,)](
        q_bhle,
        k_bjse,
        v_bjse,
        o_bhle,
        query_offset_b,
        start_bl,
        key_lengths_b,
        b * j,
        j,
        l,
        s,
        math.log2(math.e) / math.sqrt(e),
        *q_bhle.stride(),
        *k_bjse.stride(),
        *v_bjse.stride(),
        *o_bhle.stride(),
        *(0 if t is None else t.stride(0) for t in (query_offset_b, key_lengths_b)),
        *((0, 0) if start_bl is None else start_bl.stride()),
        e=e,
        GROUP=h // j,
        HAS_OFFSET=query_offset_b is not None,
        HAS_START=start_bl is not None,
        HAS_LENGTH=key_lengths_b is not None,
        BLOCK_E=next_power_of_2(e, 16),
        OFFSET=offset_type(chosen.meta["BLOCK_S"], k_bjse, v_bjse),
        **chosen.options,
    )
    if seq_idx_bl is not None:
        o_bhle.masked_fill_(lost_bl[:, None, :, None], math.nan)
    return o_bhle


def _first_keys(seq_idx_bl: Tensor | None, key_start_b: Tensor | None, l: int) -> Tensor | None:
    """First visible key of each query, (b, l) int32 or None: its document's, behind the padding."""
    if seq_idx_bl is None:
        return None if key_start_b is None else key_start_b[:, None].expand(-1, l)
    # Numbers that never decrease: a document begins where its number first appears.
    seq_idx_bl = seq_idx_bl.contiguous()
    start_bl = torch.searchsorted(seq_idx_bl, seq_idx_bl, out_int32=True)
    return start_bl if key_start_b is None else torch.maximum(start_bl, key_start_b[:, None])


@operator("attention")
def _attention_op(
    q_bhle: Tensor,
    k_bjse: Tensor,
    v_bjse: Tensor,
    query_offset_b: Tensor | None,
    seq_idx_bl: Tensor | None,
    key_start_b: Tensor | None,
    key_lengths_b: Tensor | None,
    config: str,
) -> Tensor:
    return launch_attention(
        q_bhle, k_bjse, v_bjse, query_offset_b, seq_idx_bl, key_start_b, key_lengths_b, config
    )


@_attention_op.register_fake
def _(q_bhle, k_bjse, v_bjse, query_offset_b, seq_idx_bl, key_start_b, key_lengths_b, config):
    b, h, l, e = q_bhle.shape
    return torch.empty((b, l, h, e), dtype=q_bhle.dtype, device=q_bhle.device).transpose(1, 2)


def attention(
    q_bhle: Tensor,
    k_bjse: Tensor,
    v_bjse: Tensor,
    *,
    query_offset_b: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
    key_start_b: Tensor | None = None,
    key_lengths_b: Tensor | None = None,
    config: str = "",
) -> Tensor:
    """softmax(q k^T / sqrt(e)) v, causal; softmax in float32, its values in q's dtype before v.

    q_bhle: (b, h, l, e); k_bjse, v_bjse: (b, j, s, e), of any strides; query head i reads key head
    i // (h/j); e up to 256 (float32: 128). The rest are int64 or int32. query_offset_b: (b,) keys
    that precede each row's first query, >= 0: query i sees keys up to query_offset + i; None means
    0, with s = l. seq_idx_bl: (b, l), numbers of documents that never decrease along a row: a query
    sees keys of its own document; not together with query_offset_b. key_start_b: (b,) keys before
    it are not seen (left padding). key_lengths_b: (b,) keys from there on are not seen. Memory of
    keys that no query sees is never used. A query that sees no key gives 0. A document is NaN from
    what is not finite in its keys to its end. config: a name in `CONFIGS`. Returns (b, h, l, e) in
    q's dtype, in memory (b, l, h, e). Raises ValueError.
    """
    return _attention_op(
        q_bhle, k_bjse, v_bjse, query_offset_b, seq_idx_bl, key_start_b, key_lengths_b, config
    )

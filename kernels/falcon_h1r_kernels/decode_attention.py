"""Attention of one new query per row over the keys it already has (decode).

Every key and value is read once and used for one query, so memory is all that counts. The query
heads of one key head share each block they load (six of the 16 rows that a matrix product has at
least), and a row's keys are split between several programs, each with the online softmax of
`attention`. A second kernel merges the parts: with peak m_i, sum z_i and output o_i of part i,

    M = max_i m_i        o = sum_i 2^(m_i - M) o_i / sum_i 2^(m_i - M) z_i

Axes: b batch, h query heads, j key/value heads, s keys, e head size, r rows of a tile, i parts.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_inputs import check_keys, offset_type
from .launch import Config, check_inputs, check_rows, next_power_of_2, operator, pick

HALVES = (torch.bfloat16, torch.float16)
CONFIGS = (
    Config(
        "keys64",
        {"BLOCK_S": 64},
        4,
        3,
        "128 KB of loads in flight per multiprocessor at least, by two or three programs",
        HALVES,
    ),
    Config(
        "two_stages",
        {"BLOCK_S": 64},
        4,
        2,
        "half the shared memory: four programs per multiprocessor, for short or ragged rows",
        HALVES,
    ),
    Config(
        "keys128",
        {"BLOCK_S": 128},
        8,
        3,
        "one program per multiprocessor, with 128 KB of loads in flight, for very long rows",
        HALVES,
    ),
    Config(
        "heads256",
        {"BLOCK_S": 32},
        4,
        3,
        "head sizes above 128: the same bytes per block as keys64",
        HALVES,
    ),
    Config(
        "float32",
        {"BLOCK_S": 32},
        4,
        3,
        "the same bytes per block as keys64; IEEE products are FMAs on registers",
        (torch.float32,),
    ),
)
# Multiprocessors of an H100 SXM, assumed where there is no GPU to ask.
MULTIPROCESSORS = 132
# Programs per multiprocessor that the split aims at: a full machine, and a margin for ragged rows.
PROGRAMS = 4
# Key blocks that a part has at least: its float32 output is then below 5 % of what it reads.
LEAST_BLOCKS = 4
MAX_PARTS = 256
# Elements of partial outputs that a merging program holds: 64 per thread.
MERGE_TILE = 8192


@triton.jit
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    peak_ptr,
    sum_ptr,
    length_ptr,
    j,
    s,
    parts,
    scale,
    q_stride_b,
    q_stride_h,
    q_stride_e,
    k_stride_b,
    k_stride_j,
    k_stride_s,
    k_stride_e,
    v_stride_b,
    v_stride_j,
    v_stride_s,
    v_stride_e,
    length_stride_b,
    e: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OFFSET: tl.constexpr,
):
    part = tl.program_id(0) % parts
    batch = (tl.program_id(0) // parts // j).to(tl.int64)
    key_head = (tl.program_id(0) // parts % j).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_E)
    whole = (row < GROUP)[:, None] & (channel[None, :] < e)

    # Each row is split by its own length, so that ragged rows have equal parts too.
    length = s
    if HAS_LENGTH:
        length = tl.minimum(tl.load(length_ptr + batch * length_stride_b).to(tl.int32), s)
    share = tl.cdiv(tl.cdiv(tl.maximum(length, 0), parts), BLOCK_S) * BLOCK_S
    begin = part * share
    end = tl.minimum(begin + share, length)

    head = key_head * GROUP + row
    q_address = q_ptr + batch * q_stride_b + head[:, None] * q_stride_h
    q_re = tl.load(q_address + channel[None, :] * q_stride_e, mask=whole, other=0.0)
    k_ptr += batch * k_stride_b + key_head * k_stride_j
    v_ptr += batch * v_stride_b + key_head * v_stride_j
    peak_r = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_r = tl.zeros((BLOCK_R,), tl.float32)
    o_re = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    column = tl.arange(0, BLOCK_S)
    k_offset = column.to(OFFSET)[None, :] * k_stride_s + channel[:, None] * k_stride_e
    v_offset = column.to(OFFSET)[:, None] * v_stride_s + channel[None, :] * v_stride_e
    for block in tl.range(begin, end, BLOCK_S):
        # Memory behind a row's keys may be uninitialised.
        seen = block + column < end
        k_address = k_ptr + tl.cast(block, tl.int64) * k_stride_s + k_offset
        k_es = tl.load(k_address, mask=seen[None, :] & (channel < e)[:, None], other=0.0)
        score_rs = tl.dot(q_re, k_es, input_precision="ieee")
        score_rs = tl.where(seen[None, :], score_rs, float("-inf"))
        new_peak_r = tl.maximum(peak_r, tl.max(score_rs, axis=1) * scale)
        p_rs = tl.exp2(score_rs * scale - new_peak_r[:, None])
        keep_r = tl.exp2(peak_r - new_peak_r)
        sum_r = sum_r * keep_r + tl.sum(p_rs, axis=1)
        v_address = v_ptr + tl.cast(block, tl.int64) * v_stride_s + v_offset
        v_se = tl.load(v_address, mask=seen[:, None] & (channel < e)[None, :], other=0.0)
        o_re = tl.dot(p_rs.to(v_se.dtype), v_se, o_re * keep_r[:, None], input_precision="ieee")
        peak_r = new_peak_r

    # o, peaks and sums are contiguous: (b, h, parts, e) and (b, h, parts).
    part_r = (batch * j * GROUP + head) * parts + part
    if SPLIT:
        tl.store(peak_ptr + part_r, peak_r, mask=row < GROUP)
        tl.store(sum_ptr + part_r, sum_r, mask=row < GROUP)
        # Nothing is merged from a part without keys.
        whole = whole & (row * 0 + begin < end)[:, None]
    else:
        o_re = o_re / tl.where(sum_r > 0, sum_r, 1.0)[:, None]
    tl.store(o_ptr + part_r[:, None] * e + channel[None, :], o_re, mask=whole)


@triton.jit
def _decode_merge_kernel(
    part_ptr,
    peak_ptr,
    sum_ptr,
    o_ptr,
    parts,
    e: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.arange(0, BLOCK_I)
    peak_i = tl.load(peak_ptr + head * parts + part, mask=part < parts, other=float("-inf"))
    sum_i = tl.load(sum_ptr + head * parts + part, mask=part < parts, other=0.0)
    peak = tl.max(peak_i, axis=0)
    # A part without keys has peak -inf and no output; a row without keys has only such parts.
    weight_i = tl.exp2(peak_i - tl.where(peak == float("-inf"), 0.0, peak))
    address = part_ptr + (head * parts + part[:, None]) * e + channel[None, :]
    inside = (peak_i > float("-inf"))[:, None] & (channel < e)[None, :]
    o_ie = tl.load(address, mask=inside, other=0.0)
    total = tl.sum(weight_i * sum_i, axis=0)
    o_e = tl.sum(weight_i[:, None] * o_ie, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(o_ptr + head * e + channel, o_e, mask=channel < e)


def parts_of(rows: int, s: int, block: int, multiprocessors: int) -> int:
    """Between how many programs the keys of one of `rows` (b * j) rows are split.

    Enough for PROGRAMS per multiprocessor; at most one per LEAST_BLOCKS blocks of the `s` keys of
    the longest row, and MAX_PARTS. A function of shapes alone: lengths stay on the device.
    """
    wanted = -(-PROGRAMS * multiprocessors // max(rows, 1))
    return max(1, min(wanted, s // (LEAST_BLOCKS * block), MAX_PARTS))


def _configuration(q_bhe: Tensor, name: str) -> Config:
    """The one called `name`, or the first of the dtype: heads256 above 128 channels."""
    e = q_bhe.shape[2]
    if not name and e > 128 and q_bhe.dtype is not torch.float32:
        name = "heads256"
    config = pick(CONFIGS, q_bhe.dtype, name)
    if e > 128 and config.name != "heads256":
        raise ValueError(
            f"decode_attention: configuration {config.name} serves head sizes up to 128, not {e}"
        )
    return config


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_decode_attention(
    q_bhe: Tensor, k_bjse: Tensor, v_bjse: Tensor, lengths_b: Tensor | None, config: str
) -> Tensor:
    """Validate, allocate and launch; see `decode_attention`."""
    check_inputs("decode_attention", q_bhe, k_bjse, v_bjse, lengths_b)
    if q_bhe.ndim != 3:
        raise ValueError(f"decode_attention: queries {tuple(q_bhe.shape)}, expected (b, h, e)")
    check_keys("decode_attention", q_bhe, k_bjse, v_bjse)
    b, h, e = q_bhe.shape
    j, s = k_bjse.shape[1:3]
    check_rows("decode_attention", "lengths_b", lengths_b, (b,))
    chosen = _configuration(q_bhe, config)
    o_bhe = torch.empty((b, h, e), dtype=q_bhe.dtype, device=q_bhe.device)
    if o_bhe.numel() == 0:
        return o_bhe
    parts = parts_of(b * j, s, chosen.meta["BLOCK_S"], _multiprocessors(q_bhe.device))
    o_bhie, peak_bhi, sum_bhi = o_bhe, None, None
    if parts > 1:
        o_bhie = torch.empty((b, h, parts, e), dtype=torch.float32, device=q_bhe.device)
        peak_bhi = torch.empty((b, h, parts), dtype=torch.float32, device=q_bhe.device)
        sum_bhi = torch.empty_like(peak_bhi)
    block_e = next_power_of_2(e, 16)
    _decode_attention_kernel[(b * j * parts,)](
        q_bhe,
        k_bjse,
        v_bjse,
        o_bhie,
        peak_bhi,
        sum_bhi,
        lengths_b,
        j,
        s,
        parts,
        math.log2(math.e) / math.sqrt(e),
        *q_bhe.stride(),
        *k_bjse.stride(),
        *v_bjse.stride(),
        0 if lengths_b is None else lengths_b.stride(0),
        e=e,
        GROUP=h // j,
        HAS_LENGTH=lengths_b is not None,
        SPLIT=parts > 1,
        BLOCK_R=next_power_of_2(h // j, 16),
        BLOCK_E=block_e,
        OFFSET=offset_type(chosen.meta["BLOCK_S"], k_bjse, v_bjse),
        **chosen.options,
    )
    if parts > 1:
        block_i = next_power_of_2(parts)
        merge_e = min(block_e, MERGE_TILE // block_i)
        _decode_merge_kernel[(b * h, triton.cdiv(e, merge_e))](
            o_bhie,
            peak_bhi,
            sum_bhi,
            o_bhe,
            parts,
            e=e,
            BLOCK_I=block_i,
            BLOCK_E=merge_e,
            num_warps=4,
        )
    return o_bhe


@operator("decode_attention")
def _decode_attention_op(
    q_bhe: Tensor, k_bjse: Tensor, v_bjse: Tensor, lengths_b: Tensor | None, config: str
) -> Tensor:
    return launch_decode_attention(q_bhe, k_bjse, v_bjse, lengths_b, config)


@_decode_attention_op.register_fake
def _(q_bhe, k_bjse, v_bjse, lengths_b, config):
    return torch.empty(q_bhe.shape, dtype=q_bhe.dtype, device=q_bhe.device)


def decode_attention(
    q_bhe: Tensor,
    k_bjse: Tensor,
    v_bjse: Tensor,
    lengths_b: Tensor | None = None,
    *,
    config: str = "",
) -> Tensor:
    """One query per row over the first lengths_b keys of its row (None: all s).

    q_bhe: (b, h, e); k_bjse, v_bjse: (b, j, s, e), of any strides; query head i reads key head
    i // (h/j); e up to 256 (float32: 128). lengths_b: (b,) int64 or int32; more than s counts as s,
    and a row without keys gives 0. Memory behind a row's keys is never used. Softmax in float32,
    its values in q's dtype before v. config: a name in `CONFIGS`. Returns (b, h, e) in q's dtype,
    contiguous. Raises ValueError.
    """
    return _decode_attention_op(q_bhe, k_bjse, v_bjse, lengths_b, config)

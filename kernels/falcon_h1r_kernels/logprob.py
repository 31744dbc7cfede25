"""What a sampler and a trainer ask of a distribution, straight from the logits.

    ln p_c = x_c - M - ln S        H = ln S - T / S        C = mean over the k largest of ln p
    with M = max x, S = sum e^(x - M), T = sum (x - M) e^(x - M), x = multiplier * logit

C is minus the token confidence of DeepConf (arXiv 2508.15260). No (m, v) result is ever written:
one program reads one stretch of one row once, and leaves its M, S, T and the maximum of each
segment of 64 logits. The k largest logits lie in the k segments with the largest maxima (a logit
elsewhere has k maxima that are at least as large), so a second kernel, one program per row, merges
the sums, picks k segments and then k logits from those. Axes: m rows, v vocabulary, t stretches
(tiles), g segments.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, check_inputs, next_power_of_2, operator, pick

CONFIGS = (
    Config(
        "tile8192",
        {"TILE": 8192},
        8,
        1,
        "many rows: 16 instructions per logit, what an H100 can issue while it loads one bfloat16",
    ),
    Config("tile4096", {"TILE": 4096}, 8, 1, "some rows: twice as many programs read them"),
    Config("tile1024", {"TILE": 1024}, 4, 1, "few rows: eight times as many programs read them"),
)
# Rows up to which the smaller tiles are taken: above, there are four programs of the next larger
# one for each multiprocessor of an H100.
TILE1024_ROWS, TILE4096_ROWS = 16, 32
SEGMENT = tl.constexpr(64)
# Places beside a value in a key: segments of a row, or logits of 64 segments.
INDEX_BITS = tl.constexpr(13)
INDEX_MASK = tl.constexpr(2**13 - 1)
MAX_VOCABULARY = SEGMENT.value * 2**INDEX_BITS.value
MAX_K = 64


class LogProb(NamedTuple):
    """Per row, float32: see `logprob`."""

    chosen_m: Tensor
    entropy_m: Tensor
    top_k_mean_m: Tensor


@triton.jit
def _logprob_tile_kernel(
    logits_ptr,
    peak_ptr,
    sum_ptr,
    moment_ptr,
    segment_ptr,
    vocabulary,
    multiplier,
    tiles,
    segments,
    stride_m,
    stride_v,
    TILE: tl.constexpr,
    V_TYPE: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    segment = tile * (TILE // SEGMENT) + tl.arange(0, TILE // SEGMENT)
    index = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    address = logits_ptr + row * stride_m + index.to(V_TYPE) * stride_v
    x_gv = tl.load(address, mask=index < vocabulary, other=float("-inf"))
    largest_g = tl.max(x_gv, axis=1)
    tl.store(segment_ptr + row * segments + segment, largest_g, mask=segment < segments)

    peak = tl.max(largest_g, axis=0).to(tl.float32) * multiplier
    # -inf is a forbidden token; a tile may hold nothing else.
    below_gv = x_gv.to(tl.float32) * multiplier - tl.where(peak == float("-inf"), 0.0, peak)
    p_gv = tl.exp2(below_gv * 1.4426950408889634)
    # e^-1000 is 0: no 0 * -inf, and a NaN still reaches the sum.
    moment_gv = p_gv * tl.maximum(below_gv, -1000.0)
    part = row * tiles + tile
    tl.store(peak_ptr + part, peak)
    tl.store(sum_ptr + part, tl.sum(p_gv))
    tl.store(moment_ptr + part, tl.sum(moment_gv))


@triton.jit
def _to_keys(x, inside, index, DROP: tl.constexpr, KEY: tl.constexpr):
    """Integers in the order of the floats `x`, all different: `index` fills their last bits.

    A float's bits order like signed integers once those of negative numbers are flipped. DROP of
    them are 0 in any float32 that was widened from 16 bits. Outside: below everything.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = ((ordered >> DROP).to(KEY) << INDEX_BITS) | index.to(KEY)
    return tl.where(inside, key, key * 0 + (-1 << (44 - DROP)))


@triton.jit
def _value_of(key, DROP: tl.constexpr):
    ordered = (key >> INDEX_BITS).to(tl.int32) << DROP
    ordered = ordered | tl.where(ordered < 0, (1 << DROP) - 1, 0)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _logprob_merge_kernel(
    logits_ptr,
    chosen_ptr,
    peak_ptr,
    sum_ptr,
    moment_ptr,
    segment_ptr,
    chosen_out_ptr,
    entropy_out_ptr,
    top_out_ptr,
    vocabulary,
    multiplier,
    k,
    tiles,
    segments,
    stride_m,
    stride_v,
    chosen_stride_m,
    DROP: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_T)
    part = row * tiles + tile
    peak_t = tl.load(peak_ptr + part, mask=tile < tiles, other=float("-inf"))
    sum_t = tl.load(sum_ptr + part, mask=tile < tiles, other=0.0)
    moment_t = tl.load(moment_ptr + part, mask=tile < tiles, other=0.0)
    peak = tl.max(peak_t, axis=0)
    below_t = peak_t - peak
    weight_t = tl.exp2(below_t * 1.4426950408889634)
    total = tl.sum(weight_t * sum_t, axis=0)
    shifted_t = moment_t + tl.where(weight_t > 0, below_t, 0.0) * sum_t
    moment = tl.sum(weight_t * shifted_t, axis=0)
    log_total = tl.log(total)
    tl.store(entropy_out_ptr + row, log_total - moment / total)

    logits_ptr += row * stride_m
    chosen = tl.load(chosen_ptr + row * chosen_stride_m).to(tl.int64)
    known = (chosen >= 0) & (chosen < vocabulary)
    x = tl.load(logits_ptr + chosen * stride_v, mask=known, other=float("nan")).to(tl.float32)
    tl.store(chosen_out_ptr + row, x * multiplier - peak - log_total)

    segment = tl.arange(0, BLOCK_G)
    largest_g = tl.load(
        segment_ptr + row * segments + segment, mask=segment < segments, other=float("-inf")
    )
    key_g = _to_keys(largest_g, segment < segments, segment, DROP, KEY)
    slot = tl.arange(0, BLOCK_K)
    segment_k = slot * 0 - 1
    for rank in tl.range(0, tl.minimum(k, segments)):
        best = tl.max(key_g, axis=0)
        segment_k = tl.where(slot == rank, (best & INDEX_MASK).to(tl.int32), segment_k)
        key_g = tl.where(key_g == best, key_g * 0 + (-1 << (44 - DROP)), key_g)

    column = tl.arange(0, SEGMENT)
    index = segment_k[:, None] * SEGMENT + column[None, :]
    inside = (segment_k >= 0)[:, None] & (index < vocabulary)
    address = logits_ptr + index.to(tl.int64) * stride_v
    x_kv = tl.load(address, mask=inside, other=float("-inf"))
    key_kv = _to_keys(x_kv, inside, slot[:, None] * SEGMENT + column[None, :], DROP, KEY)
    top = 0.0
    for _ in tl.range(0, k):
        best = tl.max(tl.max(key_kv, axis=1), axis=0)
        top += _value_of(best, DROP) * multiplier - peak
        key_kv = tl.where(key_kv == best, key_kv * 0 + (-1 << (44 - DROP)), key_kv)
    tl.store(top_out_ptr + row, top / k - log_total)


def _configuration(logits_mv: Tensor, name: str) -> Config:
    """The one called `name`, or by rule: smaller tiles for fewer rows."""
    m = logits_mv.shape[0]
    if not name:
        few = "tile1024" if m <= TILE1024_ROWS else "tile4096"
        name = few if m <= TILE4096_ROWS else "tile8192"
    return pick(CONFIGS, logits_mv.dtype, name)


def launch_logprob(
    logits_mv: Tensor, chosen_m: Tensor, k: int, multiplier: float, config: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Validate, allocate and launch; see `logprob`."""
    check_inputs("logprob", logits_mv, chosen_m)
    if logits_mv.ndim != 2 or not 1 <= logits_mv.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"logprob: logits {tuple(logits_mv.shape)}, expected (rows, vocabulary) with a "
            f"vocabulary of 1 to {MAX_VOCABULARY}"
        )
    m, v = logits_mv.shape
    if chosen_m.shape != (m,) or chosen_m.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"logprob: chosen_m is {tuple(chosen_m.shape)} {chosen_m.dtype}, "
            f"expected ({m},) of int64 or int32"
        )
    if not 1 <= k <= min(MAX_K, v):
        raise ValueError(f"logprob: k is {k}, expected 1 to {min(MAX_K, v)}")
    if not 0 < multiplier < float("inf"):
        raise ValueError(f"logprob: multiplier is {multiplier}, expected a positive number")
    chosen = _configuration(logits_mv, config)
    tiles, segments = triton.cdiv(v, chosen.meta["TILE"]), triton.cdiv(v, SEGMENT.value)

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device=logits_mv.device)

    result = floats(m), floats(m), floats(m)
    if m == 0:
        return result
    sums = floats(m, tiles), floats(m, tiles), floats(m, tiles)
    largest_mg = torch.empty((m, segments), dtype=logits_mv.dtype, device=logits_mv.device)
    wide = abs(logits_mv.stride(1)) * tiles * chosen.meta["TILE"] >= 2**31
    _logprob_tile_kernel[(m * tiles,)](
        logits_mv,
        *sums,
        largest_mg,
        v,
        multiplier,
        tiles,
        segments,
        *logits_mv.stride(),
        V_TYPE=tl.int64 if wide else tl.int32,
        **chosen.options,
    )
    half = logits_mv.dtype is not torch.float32
    _logprob_merge_kernel[(m,)](
        logits_mv,
        chosen_m,
        *sums,
        largest_mg,
        *result,
        v,
        multiplier,
        k,
        tiles,
        segments,
        *logits_mv.stride(),
        chosen_m.stride(0),
        DROP=13 if half else 0,
        KEY=tl.int32 if half else tl.int64,
        BLOCK_T=next_power_of_2(tiles),
        BLOCK_G=next_power_of_2(segments),
        BLOCK_K=next_power_of_2(k),
        num_warps=4,
    )
    return result


@operator("logprob")
def _logprob_op(
    logits_mv: Tensor, chosen_m: Tensor, k: int, multiplier: float, config: str
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_logprob(logits_mv, chosen_m, k, multiplier, config)


@_logprob_op.register_fake
def _(logits_mv, chosen_m, k, multiplier, config):
    rows = logits_mv.shape[:1]
    return tuple(
        torch.empty(rows, dtype=torch.float32, device=logits_mv.device) for _ in LogProb._fields
    )


def logprob(
    logits_mv: Tensor,
    chosen_m: Tensor,
    *,
    k: int = 20,
    multiplier: float = 1.0,
    config: str = "",
) -> LogProb:
    """Log-probability of a token, entropy and mean log-probability of the k likeliest, per row.

    logits_mv: (rows, vocabulary) of any strides, up to 524,288 wide; -inf forbids a token. The
    distribution is softmax(multiplier * logits), multiplier > 0, computed in float32. chosen_m:
    (rows,) int64 or int32 token ids; one outside the vocabulary gives NaN. k: 1 to 64, at most the
    vocabulary; fewer allowed tokens than k give -inf. Returns `LogProb(chosen_m, entropy_m,
    top_k_mean_m)` in nats, each (rows,) float32; NaN for a row that allows no token or holds a NaN.
    config: a name in `CONFIGS`. Raises ValueError.
    """
    return LogProb(*_logprob_op(logits_mv, chosen_m, k, multiplier, config))

"""The short depthwise causal convolution with SiLU, over a stretch of positions.

    y_t = silu(bias + sum_i weight_i x_{t-v+i}),  i = 0..v

A program walks along a segment of positions with the last v samples of its channels in registers:
a sample is loaded and widened once, not once per tap, and only the v samples before a segment are
read twice. One extra program per row and channel block writes the final window.
Axes: b batch, l length, c channels, w taps, v = w - 1 samples of history; windows (b, v, c), oldest
first. A document (`seq_idx_bl`) neither sees the one before it nor gives it to its window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .conv1d_step import CONFIGS as STEP_CONFIGS
from .conv1d_step import causal_conv1d_step
from .conv_parts import check_shape, check_weights, taps
from .launch import Config, check_inputs, check_rows, operator, pick
from .strides import in_units

__all__ = ["CONFIGS", "STEP_CONFIGS", "causal_conv1d", "causal_conv1d_step"]

HALF = (torch.bfloat16, torch.float16)
# SEGMENT: positions per program. UNROLL: positions loaded together, then computed.
CONFIGS = (
    Config(
        "segment8",
        {"BLOCK_C": 512, "SEGMENT": 8, "UNROLL": 8},
        2,
        1,
        "8 channels per thread (128 bits), 3584 = 7 blocks; the halo is read again from caches",
        HALF,
    ),
    Config(
        "segment32",
        {"BLOCK_C": 512, "SEGMENT": 32, "UNROLL": 8},
        2,
        1,
        "9 % of x asked for twice instead of 38; 2 to 5 % slower than segment8 on an H100",
        HALF,
    ),
    Config(
        "channels256",
        {"BLOCK_C": 256, "SEGMENT": 32, "UNROLL": 8},
        2,
        1,
        "float32: 4 channels per thread are 128 bits",
        (torch.float32,),
    ),
)


@triton.jit
def _causal_conv1d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    window_ptr,
    lengths_ptr,
    seq_idx_ptr,
    y_ptr,
    final_ptr,
    length,
    channels,
    channel_blocks,
    segments,
    x_stride_b,  # strides of rows in units of UNIT
    x_stride_l,
    window_stride_b,
    window_stride_v,
    x_stride_c,
    window_stride_c,
    weight_stride_c,
    weight_stride_w,
    seq_idx_stride_b,
    seq_idx_stride_l,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program % channel_blocks) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    inside = channel < channels
    segment = (program // channel_blocks) % (segments + 1)
    batch = (program // channel_blocks // (segments + 1)).to(tl.int64)
    x_row = x_ptr + batch * x_stride_b * UNIT + channel * x_stride_c
    window_row = window_ptr
    if HAS_WINDOW:
        window_row += batch * window_stride_b * UNIT + channel * window_stride_c
    seq_idx_row = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_row += batch * seq_idx_stride_b

    if segment == segments:
        # The final window: the V samples up to the row's last real one, from its document only.
        end = length
        if HAS_LENGTHS:
            end = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), length)
        for i in tl.static_range(V):
            position = end - V + i
            keep = channels
            if HAS_SEQ_IDX:
                last = tl.load(seq_idx_row + tl.maximum(end - 1, 0) * seq_idx_stride_l)
                here = tl.load(seq_idx_row + tl.maximum(position, 0) * seq_idx_stride_l)
                keep = tl.where(here == last, channels, 0)
            sample = _sample(
                x_row,
                window_row,
                position,
                channel,
                keep,
                x_stride_l * UNIT,
                window_stride_v * UNIT,
                V,
                HAS_WINDOW,
            )
            tl.store(final_ptr + (batch * V + i) * channels + channel, sample, mask=inside)
    else:
        weights = taps(
            weight_ptr, first, channels, weight_stride_c, weight_stride_w, V, PACKED, BLOCK_C
        )
        bias = tl.zeros([BLOCK_C], tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        start = segment * SEGMENT
        history = ()
        documents = ()
        for i in tl.static_range(V):
            position = start - V + i
            sample = _sample(
                x_row,
                window_row,
                position,
                channel,
                channels,
                x_stride_l * UNIT,
                window_stride_v * UNIT,
                V,
                HAS_WINDOW,
            )
            history += (sample.to(tl.float32),)
            if HAS_SEQ_IDX:
                documents += (tl.load(seq_idx_row + tl.maximum(position, 0) * seq_idx_stride_l),)
        for step in range(0, SEGMENT, UNROLL):
            fresh = ()
            for u in tl.static_range(UNROLL):
                position = start + step + u
                address = x_row + position.to(tl.int64) * (x_stride_l * UNIT)
                mask = channel < tl.where(position < length, channels, 0)
                fresh += (tl.load(address, mask=mask, other=0.0),)
                if HAS_SEQ_IDX:
                    at = tl.minimum(position, length - 1)
                    documents += (tl.load(seq_idx_row + at * seq_idx_stride_l),)
            for u in tl.static_range(UNROLL):
                position = start + step + u
                history += (fresh[u].to(tl.float32),)
                y = bias
                for i in tl.static_range(V + 1):
                    tap = history[i]
                    if HAS_SEQ_IDX:
                        tap = tl.where(documents[u + i] == documents[u + V], tap, 0.0)
                    y += tap * weights[i].to(tl.float32)
                y_row = y_ptr + (batch * length + position) * channels
                mask = channel < tl.where(position < length, channels, 0)
                tl.store(y_row + channel, silu(y, EXACT), mask=mask)
                history = history[1:]
            documents = documents[UNROLL:]


@triton.jit
def _sample(
    x_row,
    window_row,
    position,
    channel,
    channels,
    x_stride_l,
    window_stride_v,
    V: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The sample at `position` (before position 0: of the initial window, or 0) in x's dtype."""
    address = x_row + position.to(tl.int64) * x_stride_l
    sample = tl.load(address, mask=channel < tl.where(position >= 0, channels, 0), other=0.0)
    if HAS_WINDOW:
        address = window_row + (position + V).to(tl.int64) * window_stride_v
        before = tl.load(address, mask=channel < tl.where(position < 0, channels, 0), other=0.0)
        sample = tl.where(position < 0, before.to(sample.dtype), sample)
    return sample


def launch_causal_conv1d(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    initial_window_bvc: Tensor | None,
    lengths_b: Tensor | None,
    seq_idx_bl: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor]:
    """Validate, allocate and launch; returns y (b, l, c) and the final window (b, v, c)."""
    name = "causal_conv1d"
    check_inputs(name, x_blc, weight_cw, bias_c, initial_window_bvc, lengths_b, seq_idx_bl)
    if x_blc.ndim != 3:
        raise ValueError(f"{name}: x {tuple(x_blc.shape)}, expected (b, l, c)")
    b, l, c = x_blc.shape
    v = check_weights(name, c, weight_cw, bias_c)
    check_shape(name, "initial window", initial_window_bvc, (b, v, c))
    check_rows(name, "lengths", lengths_b, (b,))
    check_rows(name, "seq_idx", seq_idx_bl, (b, l))
    y = torch.empty(b, l, c, dtype=x_blc.dtype, device=x_blc.device)
    final = torch.empty(b, v, c, dtype=x_blc.dtype, device=x_blc.device)
    chosen = pick(CONFIGS, x_blc.dtype, config)
    channel_blocks = triton.cdiv(c, chosen.meta["BLOCK_C"])
    segments = triton.cdiv(l, chosen.meta["SEGMENT"])
    has_window = initial_window_bvc is not None and v > 0
    window_strides = initial_window_bvc.stride() if has_window else (0, 0, 0)
    unit, strides = in_units(*x_blc.stride()[:2], *window_strides[:2])
    has_seq_idx = seq_idx_bl is not None and l > 0
    if y.numel() + final.numel() > 0:
        _causal_conv1d_kernel[(channel_blocks * (segments + 1) * b,)](
            x_blc,
            weight_cw,
            bias_c if bias_c is None else bias_c.contiguous(),
            initial_window_bvc if has_window else None,
            lengths_b if lengths_b is None else lengths_b.contiguous(),
            seq_idx_bl,
            y,
            final,
            l,
            c,
            channel_blocks,
            segments,
            *strides,
            x_blc.stride(2),
            window_strides[2],
            *weight_cw.stride(),
            *((0, 0) if seq_idx_bl is None else seq_idx_bl.stride()),
            V=v,
            PACKED=v == 3 and weight_cw.is_contiguous(),
            UNIT=unit,
            HAS_BIAS=bias_c is not None,
            HAS_WINDOW=has_window,
            HAS_LENGTHS=lengths_b is not None,
            HAS_SEQ_IDX=has_seq_idx,
            EXACT=x_blc.dtype is torch.float32,
            **chosen.options,
        )
    return y, final


@operator("causal_conv1d")
def _causal_conv1d_op(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    initial_window_bvc: Tensor | None,
    lengths_b: Tensor | None,
    seq_idx_bl: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor]:
    return launch_causal_conv1d(
        x_blc, weight_cw, bias_c, initial_window_bvc, lengths_b, seq_idx_bl, config
    )


@_causal_conv1d_op.register_fake
def _(x_blc, weight_cw, bias_c, initial_window_bvc, lengths_b, seq_idx_bl, config):
    b, l, c = x_blc.shape
    return x_blc.new_empty(b, l, c), x_blc.new_empty(b, weight_cw.shape[1] - 1, c)


def causal_conv1d(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None = None,
    *,
    initial_window_bvc: Tensor | None = None,
    lengths_b: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
    config: str = "",
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_i weight_i x_{t-v+i}) in float32, rounded once.

    x_blc: (b, l, c) of any strides; weight_cw: (c, w), 1 to 8 taps; bias_c: (c,) or None;
    initial_window_bvc: (b, v, c), rounded to x's dtype, None: zeros; lengths_b: (b,) real samples
    per row, in [0, l], None: all; seq_idx_bl: (b, l) integers that number packed documents.
    Returns y (b, l, c) and the window after the last real sample (b, v, c), contiguous, in x's
    dtype. config: a name in `CONFIGS`. Raises ValueError.
    """
    return _causal_conv1d_op(
        x_blc, weight_cw, bias_c, initial_window_bvc, lengths_b, seq_idx_bl, config
    )

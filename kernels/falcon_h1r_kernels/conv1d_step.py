"""One token of the causal convolution with SiLU; the window is moved on in place.

    y = silu(bias + sum_i weight_i history_i),  history = (window, x);  window = history[1:]

A program owns its channels of one row: it loads their window and sample, then writes. Axes: b
batch, c channels, w taps, v = w - 1 samples of history; window (b, v, c), oldest first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .conv_parts import check_shape, check_weights, taps
from .launch import DTYPES, Config, check_in_place, check_inputs, operator, pick
from .strides import in_units

HALF, FULL = (torch.bfloat16, torch.float16), (torch.float32,)
CONFIGS = (
    Config("channels256", {"BLOCK_C": 256}, 1, 1, "one warp of 128-bit loads, no waiting", HALF),
    Config("channels128", {"BLOCK_C": 128}, 1, 1, "float32: 4 channels are 128 bits", FULL),
    Config("channels1024", {"BLOCK_C": 1024}, 4, 1, "large batches: fewer programs"),
)


@triton.jit
def _causal_conv1d_step_kernel(
    x_ptr,
    window_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    channels,
    channel_blocks,
    x_stride_b,  # strides of rows in units of UNIT
    window_stride_b,
    window_stride_v,
    x_stride_c,
    window_stride_c,
    weight_stride_c,
    weight_stride_w,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // channel_blocks).to(tl.int64)
    first = (program % channel_blocks) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    inside = channel < channels
    weights = taps(
        weight_ptr, first, channels, weight_stride_c, weight_stride_w, V, PACKED, BLOCK_C
    )
    y = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    window_row = window_ptr + batch * window_stride_b * UNIT + channel * window_stride_c
    history = ()
    for i in tl.static_range(V):
        history += (tl.load(window_row + i * (window_stride_v * UNIT), mask=inside, other=0.0),)
    address = x_ptr + batch * x_stride_b * UNIT + channel * x_stride_c
    history += (tl.load(address, mask=inside, other=0.0).to(window_ptr.dtype.element_ty),)
    for i in tl.static_range(V + 1):
        y += history[i].to(tl.float32) * weights[i].to(tl.float32)
    tl.store(y_ptr + batch * channels + channel, silu(y, EXACT), mask=inside)
    tl.debug_barrier()  # loads and stores may be laid out differently over the threads
    for i in tl.static_range(V):
        tl.store(window_row + i * (window_stride_v * UNIT), history[i + 1], mask=inside)


def launch_causal_conv1d_step(
    x_bc: Tensor, window_bvc: Tensor, weight_cw: Tensor, bias_c: Tensor | None, config: str
) -> Tensor:
    """Validate, allocate and launch; the window is moved on in place, y (b, c) is returned."""
    name = "causal_conv1d_step"
    check_inputs(name, x_bc, window_bvc, weight_cw, bias_c)
    if x_bc.ndim != 2:
        raise ValueError(f"{name}: x {tuple(x_bc.shape)}, expected (b, c)")
    b, c = x_bc.shape
    v = check_weights(name, c, weight_cw, bias_c)
    check_shape(name, "window", window_bvc, (b, v, c))
    check_in_place(name, "window", window_bvc)
    if window_bvc.dtype not in DTYPES:
        raise ValueError(f"{name}: window of {window_bvc.dtype} is not served by the kernels")
    y = torch.empty(b, c, dtype=x_bc.dtype, device=x_bc.device)
    chosen = pick(CONFIGS, x_bc.dtype, config)
    channel_blocks = triton.cdiv(c, chosen.meta["BLOCK_C"])
    unit, strides = in_units(x_bc.stride(0), *window_bvc.stride()[:2])
    if y.numel() > 0:
        _causal_conv1d_step_kernel[(channel_blocks * b,)](
            x_bc,
            window_bvc,
            weight_cw,
            None if bias_c is None else bias_c.contiguous(),
            y,
            c,
            channel_blocks,
            *strides,
            x_bc.stride(1),
            window_bvc.stride(2),
            *weight_cw.stride(),
            V=v,
            PACKED=v == 3 and weight_cw.is_contiguous(),
            UNIT=unit,
            HAS_BIAS=bias_c is not None,
            EXACT=x_bc.dtype is torch.float32,
            **chosen.options,
        )
    return y


@operator("causal_conv1d_step", mutates_args={"window_bvc"})
def _causal_conv1d_step_op(
    x_bc: Tensor, window_bvc: Tensor, weight_cw: Tensor, bias_c: Tensor | None, config: str
) -> Tensor:
    return launch_causal_conv1d_step(x_bc, window_bvc, weight_cw, bias_c, config)


@_causal_conv1d_step_op.register_fake
def _(x_bc, window_bvc, weight_cw, bias_c, config):
    return x_bc.new_empty(x_bc.shape)


def causal_conv1d_step(
    x_bc: Tensor,
    window_bvc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None = None,
    *,
    config: str = "",
) -> Tensor:
    """One sample: x_bc (b, c) -> y_bc (b, c); window_bvc (b, v, c) is moved on in place.

    x is rounded to the window's dtype first. Any strides; the window's elements must not overlap.
    config: a name in `CONFIGS`. Raises ValueError.
    """
    return _causal_conv1d_step_op(x_bc, window_bvc, weight_cw, bias_c, config)

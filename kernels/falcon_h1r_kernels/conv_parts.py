"""The depthwise convolution of one sample, for every kernel that contains it, and its checks."""

import triton
import triton.language as tl
from torch import Tensor

from .activations import silu

MOST_TAPS = 8


@triton.jit
def taps(
    weight_ptr,
    first,
    channels,
    stride_c,
    stride_w,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The V + 1 weights of channels `first` to `first` + BLOCK_C - 1, oldest tap first.

    Returns a tuple of blocks of the weights' dtype. PACKED: four taps, side by side in memory; they
    come in wide loads and are taken apart in registers. Tap by tap, each thread would fetch 16 bits
    at a time.
    """
    if PACKED:
        at = first * 4 + tl.arange(0, 4 * BLOCK_C)
        flat = tl.load(weight_ptr + at, mask=at < 4 * channels, other=0.0)
        even, odd = tl.split(tl.reshape(flat, [BLOCK_C, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        weights = (w0, w1, w2, w3)
    else:
        channel = first + tl.arange(0, BLOCK_C)
        weights = ()
        for i in tl.static_range(V + 1):
            address = weight_ptr + channel * stride_c + i * stride_w
            weights += (tl.load(address, mask=channel < channels, other=0.0),)
    return weights


@triton.jit
def convolved(
    conv,
    first,
    end,
    write,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """silu(conv) of channels `first` to `end` - 1 in float32; `write`: also store their window.

    SiLU is exact here: the result enters a float32 state without being rounded before.

    conv: the row of x and of both windows, weights and bias, with the strides of each. What the
    block holds past `end` is 0, since neither sample nor bias is loaded there.
    """
    x_row, x_stride_c = conv[0]
    window_row, window_stride_v, window_stride_c = conv[1]
    new_row, new_stride_v, new_stride_c = conv[2]
    weight_ptr, weight_stride_c, weight_stride_w, bias_ptr = conv[3]
    channel = first + tl.arange(0, BLOCK)
    inside = channel < end
    weights = taps(weight_ptr, first, end, weight_stride_c, weight_stride_w, V, PACKED, BLOCK)
    history = ()
    for i in tl.static_range(V):
        address = window_row + i * window_stride_v + channel * window_stride_c
        history += (tl.load(address, mask=inside, other=0.0),)
    sample = tl.load(x_row + channel * x_stride_c, mask=inside, other=0.0)
    history += (sample.to(window_row.dtype.element_ty),)
    y = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(V + 1):
        y += history[i].to(tl.float32) * weights[i].to(tl.float32)
    for i in tl.static_range(V):
        address = new_row + i * new_stride_v + channel * new_stride_c
        tl.store(address, history[i + 1], mask=channel < tl.where(write, end, 0))
    return silu(y, True)


def check_weights(operator: str, c: int, weight_cw: Tensor, bias_c: Tensor | None) -> int:
    """v, the taps less one. Raises ValueError for weights that do not fit the channels."""
    if weight_cw.ndim != 2 or weight_cw.shape[0] != c or not 1 <= weight_cw.shape[1] <= MOST_TAPS:
        raise ValueError(
            f"{operator}: weight {tuple(weight_cw.shape)}, expected ({c}, 1 to {MOST_TAPS} taps)"
        )
    check_shape(operator, "bias", bias_c, (c,))
    return weight_cw.shape[1] - 1


def check_shape(operator: str, name: str, tensor: Tensor | None, shape: tuple) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{operator}: {name} is {tuple(tensor.shape)}, expected {shape}")

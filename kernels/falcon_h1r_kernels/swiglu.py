"""The gate of the feed-forward layer: out = (up_multiplier up) silu(gate_multiplier gate).

One pass over two tensors, which may be the halves of one projection: three elements moved for each
result, nothing kept. Axes: m rows (all leading axes together), i channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .launch import Config, check_inputs, operator, pick
from .strides import in_units

HALF = (torch.bfloat16, torch.float16)
CONFIGS = (
    Config("block2048", {"BLOCK": 2048}, 4, 1, "16 per thread: four 128-bit loads in flight", HALF),
    Config("block1024", {"BLOCK": 1024}, 4, 1, "decode and narrow layers: more programs"),
    Config("block4096", {"BLOCK": 4096}, 8, 1, "fewer, larger programs for long prefills", HALF),
)


@triton.jit
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    blocks,  # blocks of a row
    width,
    gate_multiplier,
    up_multiplier,
    gate_stride_m,  # strides of rows in units of UNIT
    up_stride_m,
    gate_stride_i,
    up_stride_i,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_row = gate_ptr + row * gate_stride_m * UNIT
    up_row = up_ptr + row * up_stride_m * UNIT
    gate = tl.load(gate_row + column * gate_stride_i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_row + column * up_stride_i, mask=inside, other=0.0).to(tl.float32)
    out = silu(gate * gate_multiplier, EXACT) * (up * up_multiplier)
    tl.store(out_ptr + row * width + column, out, mask=inside)


def launch_swiglu(
    gate: Tensor, up: Tensor, gate_multiplier: float, up_multiplier: float, config: str
) -> Tensor:
    """Validate, allocate and launch; returns gate's shape, contiguous, in gate's dtype."""
    check_inputs("swiglu", gate, up)
    if gate.shape != up.shape or gate.ndim == 0:
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)}, expected one shape"
        )
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    if gate.is_contiguous() and up.is_contiguous():
        gate_mi, up_mi = gate.view(1, -1), up.view(1, -1)  # one long row: no ragged blocks
    else:
        gate_mi, up_mi = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    rows, width = gate_mi.shape
    chosen = pick(CONFIGS, gate.dtype, config or _default(gate))
    blocks = triton.cdiv(width, chosen.meta["BLOCK"])
    unit, strides = in_units(gate_mi.stride(0), up_mi.stride(0))
    _swiglu_kernel[(rows * blocks,)](
        gate_mi,
        up_mi,
        out,
        blocks,
        width,
        gate_multiplier,
        up_multiplier,
        *strides,
        gate_mi.stride(1),
        up_mi.stride(1),
        UNIT=unit,
        EXACT=gate.dtype is torch.float32,
        **chosen.options,
    )
    return out


def _default(gate: Tensor) -> str:
    """Small blocks where large ones would not give each of some 130 processors a few programs."""
    return "block1024" if gate.numel() < 2**20 or gate.dtype is torch.float32 else "block2048"


@operator("swiglu")
def _swiglu_op(
    gate: Tensor, up: Tensor, gate_multiplier: float, up_multiplier: float, config: str
) -> Tensor:
    return launch_swiglu(gate, up, gate_multiplier, up_multiplier, config)


@_swiglu_op.register_fake
def _(gate, up, gate_multiplier, up_multiplier, config):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def swiglu(
    gate: Tensor,
    up: Tensor,
    gate_multiplier: float = 1.0,
    *,
    up_multiplier: float = 1.0,
    config: str = "",
) -> Tensor:
    """up_multiplier * up * silu(gate_multiplier * gate), in float32, rounded once to gate's dtype.

    gate, up: (..., i) of one shape and any strides. gate_multiplier stands inside silu (config key
    mlp_multipliers[0]); up_multiplier can take mlp_multipliers[1], which otherwise follows the down
    projection. config: a name in `CONFIGS`. Returns gate's shape, contiguous. Raises ValueError.
    """
    return _swiglu_op(gate, up, gate_multiplier, up_multiplier, config)

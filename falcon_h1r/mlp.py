"""The SwiGLU feed-forward layer with its two multipliers."""

import torch.nn.functional as F
from torch import Tensor, nn

from .precision import compute_dtype, scaled


def swiglu_reference(gate: Tensor, up: Tensor, gate_multiplier: float = 1.0) -> Tensor:
    """up * silu(gate_multiplier * gate), computed in `compute_dtype`, returned in gate's dtype.

    gate, up: (..., i). The multiplier stands inside silu (config key mlp_multipliers[0]).
    """
    assert gate.shape == up.shape, (gate.shape, up.shape)
    work = compute_dtype(gate)
    return F.silu(gate.to(work) * gate_multiplier).mul_(up).to(gate.dtype)


class FalconH1MLP(nn.Module):
    """`feed_forward` of a block: down(up(x) * silu(m0 gate(x))) * m1."""

    def __init__(self, config, ops):
        super().__init__()
        d, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, i, bias=bias)
        self.up_proj = nn.Linear(d, i, bias=bias)
        self.down_proj = nn.Linear(i, d, bias=bias)
        self.gate_multiplier, self.down_multiplier = config.mlp_multipliers
        self.ops = ops

    def forward(self, x_bld: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        y = self.ops.swiglu(self.gate_proj(x_bld), self.up_proj(x_bld), self.gate_multiplier)
        return scaled(self.down_proj(y).to(x_bld.dtype), self.down_multiplier)

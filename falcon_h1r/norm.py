"""RMSNorm, and the grouped RMSNorm with a SiLU gate that closes the Mamba-2 mixer.

Axes: b batch, l length, d channels, g groups.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .precision import compute_dtype


def rms_norm_reference(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: (..., d) any float dtype; weight_d: (d,); eps is added to the mean square.
    Returns (..., d) in x's dtype; everything before the final rounding in `compute_dtype`.
    """
    assert weight_d.shape == x.shape[-1:], (weight_d.shape, x.shape)
    work = x.to(compute_dtype(x))
    normed = work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_d.to(work.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` in fewer passes over memory."""
    assert weight_d.shape == x.shape[-1:], (weight_d.shape, x.shape)
    work = x.to(compute_dtype(x))
    return (work * rms_scale(work, eps)).mul_(weight_d).to(x.dtype)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays; the squares are not stored."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def gated_rms_norm_reference(
    y_bld: Tensor,
    z_bld: Tensor,
    weight_d: Tensor | None,
    eps: float,
    n_groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """Gate y with silu(z) and normalise each group of channels (Mamba-2 paper, section 7.3).

    y_bld, z_bld: (b, l, d); weight_d: (d,), or None for the gate alone, without a norm.
    n_groups: statistics are taken over d / n_groups channels (config key mamba_n_groups).
    norm_before_gate: False gates first and then normalises, as every released model with the norm.
    Returns (b, l, d) in y's dtype.
    """
    assert y_bld.shape == z_bld.shape, (y_bld.shape, z_bld.shape)
    work = compute_dtype(y_bld)
    y, gate = y_bld.to(work), F.silu(z_bld.to(work))
    if weight_d is None:
        return (y * gate).to(y_bld.dtype)
    fits = weight_d.shape == y.shape[-1:] and y.shape[-1] % n_groups == 0
    assert fits, (weight_d.shape, n_groups)
    if not norm_before_gate:
        y = y * gate
    grouped = rearrange(y, "b l (g d) -> b l g d", g=n_groups)
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = rearrange(grouped, "b l g d -> b l (g d)") * weight_d.to(work)
    if norm_before_gate:
        y = y * gate
    return y.to(y_bld.dtype)


def gated_rms_norm(y_bld, z_bld, weight_d, eps, n_groups=1, norm_before_gate=False) -> Tensor:
    """`gated_rms_norm_reference` in fewer passes over memory; same arguments."""
    assert y_bld.shape == z_bld.shape, (y_bld.shape, z_bld.shape)
    work = compute_dtype(y_bld)
    gate = F.silu(z_bld.to(work))
    if weight_d is None:
        return gate.mul_(y_bld).to(y_bld.dtype)
    y = y_bld.to(work) if norm_before_gate else gate.mul_(y_bld)
    grouped = y.unflatten(-1, (n_groups, -1))
    y = (grouped * rms_scale(grouped, eps)).flatten(-2).mul_(weight_d)
    return (y.mul_(gate) if norm_before_gate else y).to(y_bld.dtype)


class RMSNorm(nn.Module):
    """`*_layernorm` of the checkpoint; `ops.rms_norm` with a weight (d,)."""

    def __init__(self, d: int, eps: float, ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.ops.rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """`mamba.norm` of the checkpoint; `ops.gated_rms_norm` with a weight (d_ssm,)."""

    def __init__(self, config, ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_ssm))
        self.eps, self.n_groups = config.rms_norm_eps, config.mamba_n_groups
        self.norm_before_gate, self.ops = config.mamba_norm_before_gate, ops

    def forward(self, y_bld: Tensor, z_bld: Tensor) -> Tensor:
        """(b, l, d_ssm) twice -> (b, l, d_ssm)."""
        return self.ops.gated_rms_norm(
            y_bld, z_bld, self.weight, self.eps, self.n_groups, self.norm_before_gate
        )

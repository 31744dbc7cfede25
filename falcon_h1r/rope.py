"""Rotary position embedding over the whole head, in the half-split (NeoX) pairing.

Axes: b batch, h heads, l length, e head size; channel i is paired with channel i + e/2.
"""

import torch
from torch import Tensor

from .precision import compute_dtype


def rotary_table(position_bl: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """cos and sin of position * theta^(-2i/e) for i < e/2, each (b, l, e/2) in `dtype`.

    position_bl: (b, l) integers. The angles are float64: at position 2^18 a float32 angle is off by
    up to 0.008 rad, which the config's rope_theta = 1e11 does not forgive in the fast channels.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_bl.device, dtype=torch.float64)
    angle_bli = position_bl[..., None].double() * theta ** (-exponent / head_dim)
    return angle_bli.cos().to(dtype), angle_bli.sin().to(dtype)


def rope_reference(x_bhle: Tensor, cos_bli: Tensor, sin_bli: Tensor, multiplier: float = 1.0):
    """Multiply x by `multiplier` (config key key_multiplier, for keys), then rotate.

    x_bhle: (b, h, l, e); cos_bli, sin_bli: (b or 1, l, e/2) from `rotary_table`.
    Returns (b, h, l, e) in x's dtype.
    """
    b, h, l, e = x_bhle.shape
    assert cos_bli.shape == sin_bli.shape and cos_bli.shape[1:] == (l, e // 2), cos_bli.shape
    x = x_bhle.to(compute_dtype(x_bhle)) * multiplier
    cos, sin = cos_bli[:, None].to(x.dtype), sin_bli[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_bhle.dtype)

"""Attention's matrix, and the matrix that the SSM is.

For one head and one sequence the scan is a matrix too (arXiv 2405.21060, section 6; called hidden
attention in arXiv 2403.01590):

    y_t = sum_{s <= t} M[t, s] x_s + D x_t + carried_t
    M[t, s] = (C_t . B_s) exp(sum_{s < k <= t} dt_k A) dt_s
    carried_t = exp(sum_{k <= t} dt_k A) state_before C_t

M is signed and its rows do not sum to 1; attention's weights are positive and do.
Axes: b rows, l tokens (t reads s), h heads, j key/value heads, p channels, g groups, n state size,
e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import visible_keys
from ..precision import compute_dtype


def hidden_attention(dt_blh: Tensor, A_h: Tensor, B_blgn: Tensor, C_blgn: Tensor) -> Tensor:
    """M (b, h, l, l) of the scan's inputs (taps mamba.scan.dt, .A, .B, .C), in `compute_dtype`.

    The sums in the exponent are float64.
    """
    h, g = A_h.shape[0], B_blgn.shape[2]
    work = compute_dtype(B_blgn)
    sum_bhl = _log_decay(dt_blh, A_h)
    # Infinities above the diagonal are dropped with it.
    apart = (sum_bhl[..., :, None] - sum_bhl[..., None, :]).exp().to(work)
    B, C = (t.to(work).transpose(1, 2) for t in (B_blgn, C_blgn))
    CB_bhts = (C @ B.mT).repeat_interleave(h // g, dim=1)
    return (CB_bhts * apart * dt_blh.to(work).transpose(1, 2)[:, :, None]).tril()


def carried(dt_blh: Tensor, A_h: Tensor, C_blgn: Tensor, state_bhpn: Tensor) -> Tensor:
    """What a state before the first token adds to y: (b, l, h, p)."""
    work = compute_dtype(C_blgn)
    C_bhln = C_blgn.to(work).transpose(1, 2)
    C_bhln = C_bhln.repeat_interleave(A_h.shape[0] // C_blgn.shape[2], dim=1)
    decay_bhl = _log_decay(dt_blh, A_h).exp().to(work)
    return (decay_bhl[..., None] * (C_bhln @ state_bhpn.to(work).mT)).transpose(1, 2)


def reconstruct(
    M_bhts: Tensor, x_blhp: Tensor, D_h: Tensor | None = None, carried_blhp: Tensor | None = None
) -> Tensor:
    """The scan's output (b, l, h, p) from its matrix: M x + D x + `carried`."""
    x = x_blhp.to(M_bhts.dtype)
    y = (M_bhts @ x.transpose(1, 2)).transpose(1, 2)
    if D_h is not None:
        y = y + D_h.to(y.dtype)[:, None] * x
    return y if carried_blhp is None else y + carried_blhp


def attention_weights(q_bhle: Tensor, k_bjse: Tensor) -> Tensor:
    """Softmax weights (b, h, l, s) of taps self_attn.attention.q and .k, in `compute_dtype`.

    The last query stands at the last key: rows without padding.
    """
    b, h, l, e = q_bhle.shape
    j, s = k_bjse.shape[1:3]
    work = compute_dtype(q_bhle)
    k = k_bjse.to(work).repeat_interleave(h // j, dim=1)
    scores = q_bhle.to(work) @ k.mT * e**-0.5
    offset = torch.full((b,), s - l, device=q_bhle.device)
    visible = visible_keys(l, s, offset, None, q_bhle.device)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _log_decay(dt_blh: Tensor, A_h: Tensor) -> Tensor:
    """Cumulative dt A, (b, h, l) in float64."""
    return (dt_blh.double() * A_h.double()).cumsum(1).transpose(1, 2)

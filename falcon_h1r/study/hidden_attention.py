"""The matrix that the SSM is.

For one head and one sequence the scan is a matrix (arXiv 2405.21060, section 6; called hidden
attention in arXiv 2403.01590), the one that `ssd.ssd_dual` multiplies by:

    y_t = sum_{s <= t} M[t, s] x_s + D x_t + carried_t
    M[t, s] = (C_t . B_s) exp(sum_{s < k <= t} dt_k A) dt_s
    carried_t = exp(sum_{k <= t} dt_k A) state_before C_t

M is signed and its rows do not sum to 1; attention's probabilities are positive and do.
Axes: b rows, l tokens (t reads s), h heads, p channels, g groups, n state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import compute_dtype
from ..ssd import decay_matrix


def hidden_attention(dt_blh: Tensor, A_h: Tensor, B_blgn: Tensor, C_blgn: Tensor) -> Tensor:
    """M = (C B^T) o L o dt, (b, h, l, l), in `compute_dtype`; L is `ssd.decay_matrix`.

    Arguments: the scan's inputs (taps mamba.scan.dt, .A, .B, .C).
    """
    work = compute_dtype(B_blgn)
    B_bshn, C_bthn = (_to_heads(t.to(work), len(A_h)) for t in (B_blgn, C_blgn))
    L_btsh = decay_matrix(dt_blh, A_h).to(work)
    return torch.einsum("bthn,bshn,btsh,bsh->bhts", C_bthn, B_bshn, L_btsh, dt_blh.to(work))


def carried(dt_blh: Tensor, A_h: Tensor, C_blgn: Tensor, state_bhpn: Tensor) -> Tensor:
    """What a state before the first token adds to y: (b, l, h, p)."""
    work = compute_dtype(C_blgn)
    left_blh = (dt_blh.double() * A_h.double()).cumsum(1).exp().to(work)
    C_blhn = _to_heads(C_blgn.to(work), len(A_h))
    return torch.einsum("blhn,bhpn,blh->blhp", C_blhn, state_bhpn.to(work), left_blh)


def reconstruct(
    M_bhts: Tensor, x_blhp: Tensor, D_h: Tensor | None = None, carried_blhp: Tensor | None = None
) -> Tensor:
    """The scan's output (b, l, h, p) from its matrix: M x + D x + `carried`."""
    x = x_blhp.to(M_bhts.dtype)
    y = (M_bhts @ x.transpose(1, 2)).transpose(1, 2)
    if D_h is not None:
        y = y + D_h.to(y.dtype)[:, None] * x
    return y if carried_blhp is None else y + carried_blhp


def _to_heads(t_blgn: Tensor, h: int) -> Tensor:
    """(b, l, g, n) -> (b, l, h, n): head i belongs to group i // (h/g)."""
    return t_blgn.repeat_interleave(h // t_blgn.shape[2], dim=2)

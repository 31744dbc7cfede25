"""Tensors that no operator makes: attention's probabilities, the SSM state after every token.

They are computed beside an operator from what the operator is given, by the definition, in
`compute_dtype`. So they are the same for every operator table, and they do not show what an
operator does wrong. The functions that end in the name of an operator take its arguments.
Axes as in `attention.py` and `ssd.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import visible_keys
from .precision import compute_dtype


def probabilities_attention(
    q_bhle: Tensor, k_bjse: Tensor, v_bjse=None, *, query_offset_b=None, seq_idx_bl=None
) -> Tensor:
    """softmax(q k^T / sqrt(e)): (b, h, l, s), 0 at keys that a query does not see."""
    h, l, e = q_bhle.shape[1:]
    j, s = k_bjse.shape[1:3]
    work = compute_dtype(q_bhle)
    k_bhse = k_bjse.to(work).repeat_interleave(h // j, dim=1)
    scores = q_bhle.to(work) @ k_bhse.mT * e**-0.5
    visible = visible_keys(l, s, query_offset_b, seq_idx_bl, q_bhle.device)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def probabilities_decode_attention(
    q_bhe: Tensor, k_bjse: Tensor, v_bjse=None, lengths_b: Tensor | None = None
) -> Tensor:
    """`probabilities_attention` of one query per row: (b, h, 1, s)."""
    b, _, s, _ = k_bjse.shape
    lengths_b = torch.full((b,), s, device=k_bjse.device) if lengths_b is None else lengths_b
    return probabilities_attention(q_bhe[:, :, None], k_bjse, query_offset_b=lengths_b - 1)


def follow_states(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    initial_state_bhpn: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> Iterator[Tensor]:
    """The state (b, h, p, n) after each token, one after another: the recurrence of `ssd.py`."""
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    work = compute_dtype(x_blhp)
    written_blhp = dt_blh.to(work)[..., None] * x_blhp.to(work)
    kept_blh = (dt_blh.to(work) * A_h.to(work)).exp()
    same_bl = None
    if seq_idx_bl is not None:
        same_bl = F.pad(seq_idx_bl[:, 1:] == seq_idx_bl[:, :-1], (1, 0), value=True)
    B_blhn = B_blgn.to(work).repeat_interleave(h // g, dim=2)
    state = torch.zeros(b, h, p, n, dtype=work, device=x_blhp.device)
    if initial_state_bhpn is not None:
        state = initial_state_bhpn.to(work)
    for t in range(l):
        update = written_blhp[:, t, :, :, None] * B_blhn[:, t, :, None]
        if same_bl is not None:  # nothing is kept from another document, not even 0 * NaN
            state = state.where(same_bl[:, t, None, None, None], 0)
        state = kept_blh[:, t, :, None, None] * state + update
        yield state


def states_ssd_scan(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn=None,
    D_h=None,
    *,
    chunk_size: int = 128,
    initial_state_bhpn: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> Tensor:
    """All of `follow_states`: (b, l, h, p, n). C, D and chunk_size do not act on states."""
    inputs = (x_blhp, dt_blh, A_h, B_blgn, initial_state_bhpn, seq_idx_bl)
    return torch.stack(list(follow_states(*inputs)), dim=1)


def states_ssd_step(state_bhpn: Tensor, *inputs) -> Tensor:
    """The state that a step has left, as of one token: (b, 1, h, p, n)."""
    return state_bhpn[:, None]

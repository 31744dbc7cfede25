"""One chunk of the scan of `scan.py`, and of its backward in `gradients.py`, in four steps:

    1. `decays`         sums of dt A; what is left of the state at q, and of s at the chunk's end
    2. `mixing_matrix`  M = (C B^T) o L o dt, with D on its diagonal: y's share from inside a chunk
    3. `chunk_output`   y = M x + decay * (C state^T)
    4. `next_state`     state = decay * state + (x dt decay)^T B

B and C are not copied to the heads of their group. Axes are those of `ssd.py`, and two for batches
of products: i the heads of all rows, m the products with the state (`state_products`).
"""

import torch
from torch import Tensor

LONGEST_CHUNK = 64  # longer chunks take more exponentials, shorter ones smaller products


def decays(dt_bgrs: Tensor, A_gr1: Tensor, documents=None) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative dt A in float64, what is left of the state at q, and of s at the chunk's end.

    Each is (b, g, r, q). documents: numbers of the chunk's documents (b, q) and of the one before
    it (b, 1), or None.
    """
    sum_bgrq = (dt_bgrs.double() * A_gr1).cumsum(-1)
    state_left = sum_bgrq.to(dt_bgrs.dtype).exp()
    end_left = (sum_bgrq[..., -1:] - sum_bgrq).to(dt_bgrs.dtype).exp()
    if documents is not None:
        own, before = documents
        state_left = state_left * (own == before)[:, None, None]
        end_left = end_left * (own == own[:, -1:])[:, None, None]
    return sum_bgrq, state_left, end_left


def mixing_matrix(C_bgqn, B_bgsn, sum_bgrq, dt_bgrs, D_gr1, documents=None) -> Tensor:
    """M (b, g, r, q, s) = (C B^T) o L o dt, 0 where s > q, D on the diagonal."""
    CB_bgqs = (C_bgqn @ B_bgsn.mT).tril()
    if documents is not None:
        own, _ = documents
        CB_bgqs = CB_bgqs * (own[:, :, None] == own[:, None, :])[:, None]
    # The clamp touches what `tril` made 0 only: no inf * 0 there.
    L_bgrqs = (sum_bgrq[..., :, None] - sum_bgrq[..., None, :]).to(dt_bgrs.dtype).clamp_(max=0)
    M_bgrqs = (L_bgrqs.exp_() * CB_bgqs[:, :, None]).mul_(dt_bgrs[..., None, :])
    if D_gr1 is not None:
        M_bgrqs.diagonal(dim1=-2, dim2=-1).add_(D_gr1)
    return M_bgrqs


def chunk_output(M_iqs: Tensor, x_isp: Tensor, C_mqn: Tensor, left_iq1: Tensor, state) -> Tensor:
    """y (i, q, p): what stays in the chunk, and what the state brings in."""
    if state is None:
        return torch.bmm(M_iqs, x_isp)
    return read_state(C_mqn, state).mul_(left_iq1).baddbmm_(M_iqs, x_isp)


def read_state(C_mqn: Tensor, state) -> Tensor:
    """C state^T by heads, (i, q, p)."""
    state_ipn, state_mkn = state
    (i, p, _), (m, q, _) = state_ipn.shape, C_mqn.shape
    y_mqk = torch.bmm(C_mqn, state_mkn.mT)  # of all heads of a product side by side
    if m == i:
        return y_mqk
    return y_mqk.view(m, q, -1, p).transpose(1, 2).reshape(i, q, p)


def next_state(state, left_i11: Tensor, x_isp: Tensor, inputs_is1: Tensor, B_msn: Tensor):
    """The state at the end, in the old one's memory; inputs_is1: dt_s times what is left of s."""
    m, length, n = B_msn.shape
    inputs_mks = (x_isp * inputs_is1).mT.reshape(m, -1, length)
    if state is None:
        state_ipn = torch.bmm(inputs_mks, B_msn).view(len(x_isp), -1, n)
        return state_ipn, state_ipn.view(m, -1, n)
    state_ipn, state_mkn = state
    state_ipn.mul_(left_i11)
    state_mkn.baddbmm_(inputs_mks, B_msn)
    return state_ipn, state_mkn


def state_products(b: int, h: int, g: int) -> int:
    """How many products with the state: one a head, which stays in a core's cache, where all heads
    share one B and C; else one for each group of a row: B and C are not copied to the heads."""
    return h if b * g == 1 else b * g


def first_state(initial_state_bhpn: Tensor | None, m: int, work: torch.dtype):
    """A state as (i, p, n) and as (m, k, n), views of one copy; None for zeros."""
    if initial_state_bhpn is None:
        return None
    state_ipn = initial_state_bhpn.to(work).flatten(0, 1)
    state_ipn = state_ipn.clone(memory_format=torch.contiguous_format)
    return state_ipn, state_ipn.view(m, -1, state_ipn.shape[-1])


def heads_in_sequence(x_bhsp: Tensor, work: torch.dtype) -> Tensor:
    """x (i, s, p), contiguous: three passes read it, and a head's rows lie a page apart in x."""
    x_bhsp = x_bhsp.to(work, memory_format=torch.contiguous_format).contiguous()
    return x_bhsp.view(-1, *x_bhsp.shape[2:])

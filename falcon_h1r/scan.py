"""The chunked scan of `ssd.py`, tuned for a CPU: TORCH's `ssd_scan`.

For each chunk the scan takes four steps, one function each:

    1. `decays`         sums of dt A; what is left of the state at q, and of s at the chunk's end
    2. `mixing_matrix`  M = (C B^T) o L o dt, with D on its diagonal: y's share from inside a chunk
    3. `chunk_output`   y = M x + decay * (C state^T)
    4. `next_state`     state = decay * state + (x dt decay)^T B

C B^T is formed once per group, and B and C are not copied to the heads. y is written in place, and
the state keeps its memory; the backward stands in `gradients.py`. Arguments and axes are those of
`ssd.py`, and two for batches of products: i the heads of all rows, m the products with the state
(`state_products`).
"""

import torch
from einops import rearrange
from torch import Tensor

from .precision import autocasts, compute_dtype, without_autocast
from .ssd import check_shapes, ssd_recurrent

LONGEST_CHUNK = 64  # longer chunks take more exponentials, shorter ones smaller products


def ssd_scan(
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h=None,
    *, chunk_size=128, initial_state_bhpn=None, seq_idx_bl=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd.ssd_chunked` in chunks of at most LONGEST_CHUNK; extra memory is one chunk's."""
    if autocasts(x_blhp):
        return without_autocast(ssd_scan, **locals())
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError("scan.ssd_scan is a forward alone: gradients.ssd_scan has a backward")
    if seq_idx_bl is not None and not finite(inputs):
        options = {"initial_state_bhpn": initial_state_bhpn, "seq_idx_bl": seq_idx_bl}
        return ssd_recurrent(*inputs[:6], **options)
    b, l, h, p, g, n = check_shapes(*inputs)
    assert chunk_size > 0, chunk_size
    work, size, m = compute_dtype(x_blhp), min(chunk_size, LONGEST_CHUNK), state_products(b, h, g)
    A_gr1 = A_h.to(work).view(g, -1, 1)
    D_gr1 = None if D_h is None else D_h.to(work).view(g, -1, 1)
    state = first_state(initial_state_bhpn, m, work)
    y_blhp = torch.empty_like(x_blhp, memory_format=torch.contiguous_format)
    chunks = zip(
        x_blhp.transpose(1, 2).split(size, 2),
        rearrange(dt_blh, "b l (g r) -> b g r l", g=g).split(size, -1),
        rearrange(B_blgn, "b l g n -> b g l n").split(size, -2),
        rearrange(C_blgn, "b l g n -> b g l n").split(size, -2),
        strict=True,
    )
    for start, (x_bhsp, *others) in zip(range(0, l, size), chunks):
        dt_bgrs, B_bgsn, C_bgqn = (t.to(work) for t in others)
        documents = None
        if seq_idx_bl is not None:
            documents = seq_idx_bl[:, start : start + size], seq_idx_bl[:, max(start - 1, 0), None]
        sum_bgrq, state_left, end_left = decays(dt_bgrs, A_gr1, documents)
        M_bgrqs = mixing_matrix(C_bgqn, B_bgsn, sum_bgrq, dt_bgrs, D_gr1, documents)
        x_isp = heads_in_sequence(x_bhsp, work)
        B_msn, C_mqn = (t.flatten(0, 1).expand(m, -1, -1) for t in (B_bgsn, C_bgqn))
        left_iq1 = state_left[..., None].flatten(0, 2)
        y_iqp = chunk_output(M_bgrqs.flatten(0, 2), x_isp, C_mqn, left_iq1, state)
        inputs_is1 = (dt_bgrs * end_left)[..., None].flatten(0, 2)
        state = next_state(state, left_iq1[:, -1:], x_isp, inputs_is1, B_msn)
        y_blhp[:, start : start + size] = y_iqp.view(b, h, -1, p).transpose(1, 2)
    return y_blhp, state[0].view(b, h, p, n)


def finite(inputs) -> bool:
    """Whether x, dt, A, B and C are: a product over a chunk would carry NaN from one document into
    its neighbours, since 0 * NaN is NaN."""
    return all(t.isfinite().all() for t in inputs[:5])


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
    """The state at the chunk's end, in the memory of the old one.

    inputs_is1: dt_s times what is left of s at the end.
    """
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
    """A state as (i, p, n) and as (m, k, n), views of one copy; None for zeros.

    A view costs two microseconds of the half millisecond that a chunk of a small model takes.
    """
    if initial_state_bhpn is None:
        return None
    state_ipn = initial_state_bhpn.to(work).flatten(0, 1)
    state_ipn = state_ipn.clone(memory_format=torch.contiguous_format)
    return state_ipn, state_ipn.view(m, -1, state_ipn.shape[-1])


def heads_in_sequence(x_bhsp: Tensor, work: torch.dtype) -> Tensor:
    """x (i, s, p), contiguous: three passes read it, and a head's rows lie a page apart in x."""
    x_bhsp = x_bhsp.to(work, memory_format=torch.contiguous_format).contiguous()
    return x_bhsp.view(-1, *x_bhsp.shape[2:])

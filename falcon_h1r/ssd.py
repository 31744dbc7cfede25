"""State space duality: one sequence map of Mamba-2 (arXiv 2405.21060), as the paper tells it.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t (outer) B_t          y_t = state_t C_t + D x_t

`ssd_recurrent` walks along the sequence, `ssd_dual` multiplies by one (length, length) matrix like
attention, and `ssd_chunked` does the second inside chunks and the first between them. `ssd_step` is
one token of the recurrence. Tuned for a CPU: the chunked form in `scan.py`, the step in `cpu/`.

Axes: b batch, l length, h heads, p channels per head, g groups (heads of one group share B and C;
head i belongs to group i // (h/g)), r = h/g heads per group, n state size, q the position that
reads and s the position that is read. Common arguments:

    x_blhp (b, l, h, p)      dt_blh (b, l, h) >= 0, after bias, softplus, clamp; 0 holds the state
    A_h (h,) < 0             B_blgn, C_blgn (b, l, g, n)           D_h (h,) or None
    initial_state_bhpn (b, h, p, n) or None (zeros)
    seq_idx_bl (b, l) numbers packed documents, never decreasing along a row: the state is cleared
    where the number changes; the initial state belongs to a row's first document, the final state
    to its last.
    chunk_size: positions per chunk (config key mamba_chunk_size), which changes rounding only and
    has no meaning in a form without chunks.

Each returns y_blhp (b, l, h, p) in x's dtype and the final state (b, h, p, n) in `compute_dtype`,
in which everything is computed. Every decay is exp of a difference of cumulative sums; the sums are
float64, since a difference of float32 sums loses the weak decays that follow strong ones.
"""

import torch
from einops import repeat
from torch import Tensor

from .documents import with_lost, without_lost
from .precision import autocasts, compute_dtype, without_autocast


def ssd_recurrent(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None = None,
    *,
    chunk_size: int = 128,
    initial_state_bhpn: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after another: linear time, slow in Python."""
    if autocasts(x_blhp):
        return without_autocast(ssd_recurrent, **locals())
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    x, dt, A, B_blhn, C_blhn, state_bhpn = _prepare(*inputs)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx_bl is not None and t > 0:
            same_document_b = seq_idx_bl[:, t] == seq_idx_bl[:, t - 1]
            state_bhpn = state_bhpn.where(same_document_b[:, None, None, None], 0)  # 0 * NaN is NaN
        token = x[:, t], dt[:, t], A, B_blhn[:, t], C_blhn[:, t]
        y_bhp, state_bhpn = _one_token(state_bhpn, *token)
        outputs.append(y_bhp)
    y = torch.stack(outputs, dim=1)
    if D_h is not None:
        y = y + D_h.to(x.dtype)[:, None] * x
    return y.to(x_blhp.dtype), state_bhpn


def _one_token(state_bhpn, x_bhp, dt_bh, A_h, B_bhn, C_bhn) -> tuple[Tensor, Tensor]:
    """y without D x, and the state after the token."""
    input_bhpn = torch.einsum("bh,bhp,bhn->bhpn", dt_bh, x_bhp, B_bhn)
    state_bhpn = torch.exp(dt_bh * A_h)[..., None, None] * state_bhpn + input_bhpn
    return torch.einsum("bhpn,bhn->bhp", state_bhpn, C_bhn), state_bhpn


def ssd_dual(
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h=None,
    *, chunk_size=128, initial_state_bhpn=None, seq_idx_bl=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = M x with M = (C B^T) o L o dt: attention without a softmax; memory quadratic in l."""
    if autocasts(x_blhp):
        return without_autocast(ssd_dual, **locals())
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    inputs, *lost = without_lost(*inputs)
    x, dt, A, B_blhn, C_blhn, state_bhpn = _prepare(*inputs)
    L_bqsh = decay_matrix(dt, A, seq_idx_bl).to(x.dtype)
    M_bqsh = torch.einsum("bqhn,bshn,bqsh,bsh->bqsh", C_blhn, B_blhn, L_bqsh, dt)
    y = torch.einsum("bqsh,bshp->bqhp", M_bqsh, x)

    # The state before the first token has decayed by one step more than the first token.
    left_bqh = L_bqsh[:, :, 0] * torch.exp(dt[:, :1] * A)
    y = y + torch.einsum("bqhn,bhpn,bqh->bqhp", C_blhn, state_bhpn, left_bqh)
    inputs_bhpn = torch.einsum("bsh,bsh,bshp,bshn->bhpn", L_bqsh[:, -1], dt, x, B_blhn)
    state_bhpn = left_bqh[:, -1, :, None, None] * state_bhpn + inputs_bhpn
    if D_h is not None:
        y = y + D_h.to(x.dtype)[:, None] * x
    return with_lost((y.to(x_blhp.dtype), state_bhpn), *lost)


def decay_matrix(dt_blh: Tensor, A_h: Tensor, seq_idx_bl: Tensor | None = None) -> Tensor:
    """L (b, q, s, h) float64: what is left at position q of what position s wrote.

    L_qs = exp(dt_{s+1} A + .. + dt_q A); 0 where s comes after q or is in another document.
    """
    sum_blh = (dt_blh.double() * A_h.double()).cumsum(1)
    l = sum_blh.shape[1]
    seen_bqs = torch.ones(l, l, dtype=torch.bool, device=sum_blh.device).tril()[None]
    if seq_idx_bl is not None:
        seen_bqs = seen_bqs & (seq_idx_bl[:, :, None] == seq_idx_bl[:, None, :])
    between_bqsh = sum_blh[:, :, None] - sum_blh[:, None, :]
    return between_bqsh.masked_fill(~seen_bqs[..., None], -torch.inf).exp()


def ssd_chunked(
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h=None,
    *, chunk_size=128, initial_state_bhpn=None, seq_idx_bl=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The dual form inside chunks, the recurrence between them (paper section 6): linear in l."""
    assert chunk_size > 0 and x_blhp.shape[1] > 0, (chunk_size, x_blhp.shape)
    outputs, state_bhpn, documents = [], initial_state_bhpn, None
    for start in range(0, x_blhp.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        if seq_idx_bl is not None:
            documents = seq_idx_bl[:, chunk]
            if start > 0:
                same_document_b = documents[:, 0] == seq_idx_bl[:, start - 1]
                state_bhpn = state_bhpn.where(same_document_b[:, None, None, None], 0)
        x, dt, B, C = (t[:, chunk] for t in (x_blhp, dt_blh, B_blgn, C_blgn))
        options = {"initial_state_bhpn": state_bhpn, "seq_idx_bl": documents}
        y_bqhp, state_bhpn = ssd_dual(x, dt, A_h, B, C, D_h, **options)
        outputs.append(y_bqhp)
    return torch.cat(outputs, dim=1), state_bhpn


def ssd_step(state_bhpn, x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h: Tensor | None = None) -> Tensor:
    """One token of the recurrence: state_bhpn (b, h, p, n) is updated in place, y_bhp is returned.

    x_bhp (b, h, p); dt_bh (b, h); B_bgn, C_bgn (b, g, n). y is computed from the state before it is
    rounded to its storage dtype and is returned in x's dtype.
    """
    if autocasts(x_bhp):
        return without_autocast(ssd_step, **locals())
    r = check_step_shapes(state_bhpn, x_bhp, dt_bh, B_bgn, C_bgn)
    work = compute_dtype(x_bhp)
    x, dt, state, A = (t.to(work) for t in (x_bhp, dt_bh, state_bhpn, A_h))
    B_bhn, C_bhn = (repeat(t.to(work), "b g n -> b (g r) n", r=r) for t in (B_bgn, C_bgn))
    y, state = _one_token(state, x, dt, A, B_bhn, C_bhn)
    if D_h is not None:
        y = y + D_h.to(work)[:, None] * x
    state_bhpn.copy_(state.detach())
    return y.to(x_bhp.dtype)


def _prepare(x, dt, A, B, C, D, initial_state_bhpn, seq_idx_bl):
    """x, dt, A, B_blhn, C_blhn and the state in `compute_dtype`, B and C copied to the heads."""
    b, _, h, p, g, n = check_shapes(x, dt, A, B, C, D, initial_state_bhpn, seq_idx_bl)
    work = compute_dtype(x)
    x, dt, A, B, C = (t.to(work) for t in (x, dt, A, B, C))
    B, C = (repeat(t, "b l g n -> b l (g r) n", r=h // g) for t in (B, C))
    if initial_state_bhpn is None:
        initial_state_bhpn = x.new_zeros(b, h, p, n)
    return x, dt, A, B, C, initial_state_bhpn.to(work)


def check_shapes(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl):
    """(b, l, h, p, g, n) of a scan's arguments; AssertionError where they do not fit."""
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    assert l > 0 and h % g == 0, f"length {l} must be positive, {h} heads a multiple of {g} groups"
    assert dt_blh.shape == (b, l, h), dt_blh.shape
    assert A_h.shape == (h,) and (D_h is None or D_h.shape == (h,)), (A_h.shape, h)
    assert B_blgn.shape == C_blgn.shape == (b, l, g, n), (B_blgn.shape, C_blgn.shape)
    assert initial_state_bhpn is None or initial_state_bhpn.shape == (b, h, p, n), (b, h, p, n)
    assert seq_idx_bl is None or seq_idx_bl.shape == (b, l), (b, l)
    return b, l, h, p, g, n


def check_step_shapes(state_bhpn, x_bhp, dt_bh, B_bgn, C_bgn) -> int:
    """Heads per group of a step's arguments; AssertionError where they do not fit."""
    b, h, p, n = state_bhpn.shape
    g = B_bgn.shape[1]
    assert x_bhp.shape == (b, h, p) and dt_bh.shape == (b, h), (x_bhp.shape, dt_bh.shape)
    assert B_bgn.shape == C_bgn.shape == (b, g, n) and h % g == 0, (B_bgn.shape, C_bgn.shape)
    return h // g

"""State space duality: one sequence map of Mamba-2 (arXiv 2405.21060), in four forms.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t (outer) B_t          y_t = state_t C_t + D x_t

Axes: b batch, l length, h heads, p channels per head, g groups (heads of one group share B and C;
head i belongs to group i // (h/g)), r = h/g heads per group, n state size, q and s positions inside
a chunk. Common arguments:

    x_blhp (b, l, h, p)      dt_blh (b, l, h) >= 0, after bias, softplus, clamp; 0 holds the state
    A_h (h,) < 0             B_blgn, C_blgn (b, l, g, n)           D_h (h,) or None
    initial_state_bhpn (b, h, p, n) or None (zeros)
    seq_idx_bl (b, l) numbers packed documents, never decreasing along a row: the state is cleared
    where it changes; the initial state belongs to a row's first document, the final to its last.

Each returns y_blhp (b, l, h, p) in x's dtype and the final state (b, h, p, n) in `compute_dtype`,
in which everything is computed. Every decay is exp of a difference of cumulative sums; the sums are
float64, since a difference of float32 sums loses the weak decays that follow strong ones.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from .precision import compute_dtype


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
    """The recurrence, one token after another: the clearest statement, linear time, slow in Python.

    chunk_size has no meaning here; it belongs to the common signature.
    """
    b, l, h, p, g, n = _check_shapes(
        x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    )
    work = compute_dtype(x_blhp)
    x, dt, A = x_blhp.to(work), dt_blh.to(work), A_h.to(work)
    B_blhn = repeat(B_blgn.to(work), "b l g n -> b l (g r) n", r=h // g)
    C_blhn = repeat(C_blgn.to(work), "b l g n -> b l (g r) n", r=h // g)
    state = _initial_state(initial_state_bhpn, x, (b, h, p, n))
    outputs = []
    for t in range(l):
        if seq_idx_bl is not None and t > 0:
            same_document = seq_idx_bl[:, t] == seq_idx_bl[:, t - 1]
            state = state * same_document[:, None, None, None]
        decay_bh = torch.exp(dt[:, t] * A)
        update_bhpn = (dt[:, t, :, None] * x[:, t])[..., None] * B_blhn[:, t, :, None, :]
        state = decay_bh[..., None, None] * state + update_bhpn
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C_blhn[:, t]))
    y = torch.stack(outputs, dim=1)
    if D_h is not None:
        y = y + D_h.to(work)[:, None] * x
    return y.to(x_blhp.dtype), state


def ssd_dual(
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
    """The quadratic (attention-like) form: one chunk as long as the sequence, memory l^2.

    chunk_size has no meaning here either.
    """
    return ssd_chunked(
        x_blhp,
        dt_blh,
        A_h,
        B_blgn,
        C_blgn,
        D_h,
        chunk_size=x_blhp.shape[1],
        initial_state_bhpn=initial_state_bhpn,
        seq_idx_bl=seq_idx_bl,
    )


def ssd_chunked(
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
    """The dual form inside chunks, the recurrence between them (paper section 6).

    Time is linear in l, extra memory one chunk's: C B^T is formed once per group, never per head,
    and B and C are not copied to the heads. chunk_size: positions per chunk (config key
    mamba_chunk_size); the result depends on it by rounding only.
    """
    b, l, h, p, g, n = _check_shapes(
        x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    )
    assert chunk_size > 0, chunk_size
    work = compute_dtype(x_blhp)
    A_gr1 = A_h.to(work).view(g, h // g, 1)
    state = _initial_state(initial_state_bhpn, x_blhp, (b, h, p, n))
    state = rearrange(state, "b (g r) p n -> b g (r p) n", g=g)
    outputs = []
    for start in range(0, l, chunk_size):
        chunk = slice(start, start + chunk_size)
        x = rearrange(x_blhp[:, chunk].to(work), "b q (g r) p -> b g r q p", g=g)
        dt = rearrange(dt_blh[:, chunk].to(work), "b q (g r) -> b g r q", g=g)
        B = rearrange(B_blgn[:, chunk].to(work), "b s g n -> b g s n")
        C = rearrange(C_blgn[:, chunk].to(work), "b q g n -> b g q n")

        # 1. Cumulative log-decay: exp(sum_q - sum_s) carries position s to position q.
        sum_bgrq = (dt.double() * A_gr1).cumsum(-1)
        from_start = sum_bgrq.to(work).exp()
        to_end = (sum_bgrq[..., -1:] - sum_bgrq).to(work).exp()
        CB_bgqs = (C @ B.mT).tril()
        if seq_idx_bl is not None:
            idx = seq_idx_bl[:, chunk]
            before = seq_idx_bl[:, max(start - 1, 0), None]
            CB_bgqs = CB_bgqs * (idx[:, :, None] == idx[:, None, :])[:, None]
            from_start = from_start * (idx == before)[:, None, None]
            to_end = to_end * (idx == idx[:, -1:])[:, None, None]

        # 2. Inside the chunk. The clamp touches the masked upper triangle only: no inf * 0 there.
        decay_bgrqs = (sum_bgrq[..., :, None] - sum_bgrq[..., None, :]).to(work).clamp(max=0).exp()
        xdt = x * dt[..., None]
        y = (CB_bgqs[:, :, None] * decay_bgrqs) @ xdt

        # 3. What the state brings in: all heads of a group are columns of one matrix product.
        carried = rearrange(C @ state.mT, "b g q (r p) -> b g r q p", p=p)
        y = y + carried * from_start[..., None]

        # 4. The state at the chunk's end.
        update = rearrange(xdt * to_end[..., None], "b g r q p -> b g (r p) q") @ B
        state = state * from_start[..., -1].repeat_interleave(p, dim=-1)[..., None] + update
        if D_h is not None:
            y = y + D_h.to(work).view(g, h // g, 1, 1) * x
        outputs.append(rearrange(y, "b g r q p -> b q (g r) p").to(x_blhp.dtype))
    y_blhp = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return y_blhp, rearrange(state, "b g (r p) n -> b (g r) p n", p=p)


def ssd_step(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None = None,
) -> Tensor:
    """One token of the recurrence: state_bhpn (b, h, p, n) is updated in place, y_bhp is returned.

    x_bhp (b, h, p); dt_bh (b, h); B_bgn, C_bgn (b, g, n). y is computed from the state before it is
    rounded to its storage dtype and is returned in x's dtype.
    """
    b, h, p, n = state_bhpn.shape
    g = B_bgn.shape[1]
    assert x_bhp.shape == (b, h, p) and dt_bh.shape == (b, h), (x_bhp.shape, dt_bh.shape)
    assert B_bgn.shape == C_bgn.shape == (b, g, n) and h % g == 0, (B_bgn.shape, C_bgn.shape)
    work = compute_dtype(x_bhp)
    x, dt = x_bhp.to(work), dt_bh.to(work)
    B, C = B_bgn.to(work), C_bgn.to(work)
    xdt = (x * dt[..., None]).reshape(b, g, -1, 1)
    state = state_bhpn.to(work) * torch.exp(dt * A_h.to(work))[..., None, None]
    state = state.reshape(b, g, -1, n).addcmul_(xdt, B[:, :, None])
    y = (state @ C[..., None]).view(b, h, p)
    state_bhpn.copy_(state.detach().view(b, h, p, n))
    if D_h is not None:
        y = y + D_h.to(work)[:, None] * x
    return y.to(x_bhp.dtype)


def ssd_step_reference(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None = None,
) -> Tensor:
    """`ssd_step` as a sequence of one token; same arguments."""
    y, state = ssd_recurrent(
        x_bhp[:, None],
        dt_bh[:, None],
        A_h,
        B_bgn[:, None],
        C_bgn[:, None],
        D_h,
        initial_state_bhpn=state_bhpn,
    )
    state_bhpn.copy_(state.detach())
    return y[:, 0]


def _check_shapes(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl):
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    assert l > 0 and h % g == 0, f"length {l} must be positive, {h} heads a multiple of {g} groups"
    assert dt_blh.shape == (b, l, h), dt_blh.shape
    assert A_h.shape == (h,) and (D_h is None or D_h.shape == (h,)), (A_h.shape, h)
    assert B_blgn.shape == C_blgn.shape == (b, l, g, n), (B_blgn.shape, C_blgn.shape)
    assert initial_state_bhpn is None or initial_state_bhpn.shape == (b, h, p, n), (b, h, p, n)
    assert seq_idx_bl is None or seq_idx_bl.shape == (b, l), (b, l)
    return b, l, h, p, g, n


def _initial_state(initial_state_bhpn, like: Tensor, shape) -> Tensor:
    if initial_state_bhpn is None:
        return torch.zeros(shape, dtype=compute_dtype(like), device=like.device)
    return initial_state_bhpn.to(compute_dtype(like))

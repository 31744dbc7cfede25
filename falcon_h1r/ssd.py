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

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .inductor import as_buffer, in_cpu_graph
from .precision import compute_dtype

LONGEST_CHUNK = 64  # of `ssd_chunked`: exponentials grow with it, products shrink below it
STEP_BYTES = 2**20  # of states `ssd_step` takes at a time: three operators pass over them


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
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    return _scan_in_chunks(x_blhp.shape[1], *inputs)


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

    Time is linear in l, extra memory one chunk's (compiled: a (q, s) matrix for each head of each
    chunk): C B^T is formed once per group, and B and C are not copied to the heads.
    chunk_size: positions per chunk (config key mamba_chunk_size), LONGEST_CHUNK at most; the result
    depends on it by rounding only.
    """
    assert chunk_size > 0, chunk_size
    size = min(chunk_size, LONGEST_CHUNK)
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn
    if in_cpu_graph(x_blhp) and seq_idx_bl is None:
        return _scan_in_graph(size, *inputs)
    return _scan_in_chunks(size, *inputs, seq_idx_bl)


class _Chunk(NamedTuple):
    """What the products of a chunk take beside x and the state, in the compute dtype.

    Axes: i the heads of all rows, m the products with the state (`_products`).
    """

    B_msn: Tensor
    C_mqn: Tensor
    from_start_iq1: Tensor  # decay of the state before the chunk, up to and with position q
    kept_is1: Tensor  # dt_s, times the decay from behind position s to the chunk's end
    share_iqs: Tensor  # how much of x_s stands in y_q, D on the diagonal


def _products(b: int, h: int, g: int) -> int:
    """How many products with the state: one for each head, which stays in a core's cache, where all
    heads of all rows share one B and C; else one for each group of a row, since B and C are never
    copied to the heads."""
    return h if b * g == 1 else b * g


def _scan_in_chunks(
    size: int, x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
) -> tuple[Tensor, Tensor]:
    _check_shapes(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl)
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, seq_idx_bl
    return _through_chunks(size, x_blhp, _chunks(size, *inputs), initial_state_bhpn)


def _chunks(size: int, x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, seq_idx_bl) -> Iterator[_Chunk]:
    """In-place operators touch fresh tensors only, of which autograd keeps nothing."""
    b, h, g, work = x_blhp.shape[0], x_blhp.shape[2], B_blgn.shape[2], compute_dtype(x_blhp)
    m = _products(b, h, g)
    A_gr1 = A_h.to(work).view(g, -1, 1)
    D_gr1 = None if D_h is None else D_h.to(work).view(g, -1, 1)
    chunks = zip(
        rearrange(dt_blh, "b l (g r) -> b g r l", g=g).split(size, -1),
        rearrange(B_blgn, "b l g n -> b g l n").split(size, -2),
        rearrange(C_blgn, "b l g n -> b g l n").split(size, -2),
        strict=True,
    )
    for index, (dt_bgrs, B_bgsn, C_bgqn) in enumerate(chunks):
        dt, B, C = dt_bgrs.to(work), B_bgsn.to(work), C_bgqn.to(work)

        # Cumulative log-decay: exp(sum_q - sum_s) carries position s to position q.
        sum_bgrq = (dt.double() * A_gr1).cumsum(-1)
        from_start = sum_bgrq.to(work).exp()
        to_end = (sum_bgrq[..., -1:] - sum_bgrq).to(work).exp()
        CB_bgqs = (C @ B.mT).tril()
        if seq_idx_bl is not None:
            start = index * size
            idx = seq_idx_bl[:, start : start + size]
            before = seq_idx_bl[:, max(start - 1, 0), None]
            CB_bgqs = CB_bgqs * (idx[:, :, None] == idx[:, None, :])[:, None]
            from_start = from_start * (idx == before)[:, None, None]
            to_end = to_end * (idx == idx[:, -1:])[:, None, None]

        # The clamp touches the masked upper triangle only: no inf * 0 there.
        share_bgrqs = (sum_bgrq[..., :, None] - sum_bgrq[..., None, :]).to(work).clamp_(max=0)
        share_bgrqs = (share_bgrqs.exp_() * CB_bgqs[:, :, None]).mul_(dt[..., None, :])
        if D_gr1 is not None:
            share_bgrqs.diagonal(dim1=-2, dim2=-1).add_(D_gr1)
        per_head = (from_start[..., None], (dt * to_end)[..., None], share_bgrqs)
        B_msn, C_mqn = (t.flatten(0, 1).expand(m, -1, -1) for t in (B, C))
        yield _Chunk(B_msn, C_mqn, *(t.flatten(0, 2) for t in per_head))


def _through_chunks(
    size: int, x_blhp, chunks: Iterable[_Chunk], initial_state_bhpn
) -> tuple[Tensor, Tensor]:
    """The products: what stays inside a chunk, and the state from one chunk to the next.

    A view costs two microseconds of the half millisecond that a chunk of a small model takes.
    """
    b, _, h, p = x_blhp.shape
    work, graded, outputs = compute_dtype(x_blhp), torch.is_grad_enabled(), []
    state_ipn = state_mkn = None
    # A chunk's y stays in a core's cache, and its memory serves the next one; not with gradients.
    y_blhp = None if graded else torch.empty_like(x_blhp, memory_format=torch.contiguous_format)
    y_cuts = itertools.repeat(None) if graded else y_blhp.transpose(1, 2).split(size, 2)
    for x_bhsp, y_bhqp, chunk in zip(x_blhp.transpose(1, 2).split(size, 2), y_cuts, chunks):
        B_msn, C_mqn, from_start_iq1, kept_is1, share_iqs = chunk
        m, length, n = B_msn.shape
        # In sequence: two products and a loop read it, and a head's rows lie a page apart in x.
        x_bhsp = x_bhsp.to(work, memory_format=torch.contiguous_format).contiguous()
        x_isp = x_bhsp.view(b * h, length, p)
        zero = state_ipn is None and initial_state_bhpn is None
        if state_ipn is None:
            state_ipn = _initial_state(initial_state_bhpn, x_isp, (b, h, p, n)).flatten(0, 1)
            state_ipn = state_ipn.clone(memory_format=torch.contiguous_format)
            state_mkn = state_ipn.view(m, -1, n)

        # 1. What the state brings in, and what stays in the chunk.
        if zero:
            y_iqp = torch.bmm(share_iqs, x_isp)
        else:
            y_iqp = torch.bmm(C_mqn, state_mkn.mT)
            if m < b * h:  # (m, q, k) so far
                y_mrqp = y_iqp.view(m, length, -1, p).transpose(1, 2)
                y_iqp = y_mrqp.reshape(b * h, length, p)
            y_iqp.mul_(from_start_iq1).baddbmm_(share_iqs, x_isp)
        if y_bhqp is None:
            outputs.append(y_iqp.view(b, h, length, p).transpose(1, 2).to(x_blhp.dtype))
        else:
            y_bhqp.copy_(y_iqp.view(b, h, length, p))

        # 2. The state at the chunk's end, in its own memory unless gradients will need the old one.
        through_i11 = from_start_iq1[:, -1:]
        if graded:
            state_ipn = state_ipn * through_i11
            state_mkn = state_ipn.view(m, -1, n)
        else:
            state_ipn.mul_(through_i11)
        state_mkn.baddbmm_((x_isp * kept_is1).mT.reshape(m, -1, length), B_msn)
    state_bhpn = state_ipn.view(b, h, p, -1)
    return torch.cat(outputs, dim=1) if graded else y_blhp, state_bhpn


def _scan_in_graph(
    size: int, x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn
) -> tuple[Tensor, Tensor]:
    """`_scan_in_chunks` for Inductor: what the products take, for all chunks (axis c) in one loop.

    A graph holds no loop of as many turns as there are chunks: the products are one operator.
    """
    b, l, h, p, g, n = _check_shapes(
        x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, None
    )
    work, count = compute_dtype(x_blhp), (l + size - 1) // size

    def cut(t: Tensor) -> Tensor:
        """(b, l, i, ...) -> (c, b, i, s, ...), in whole chunks: dt = 0 holds the state."""
        padding = (0, 0) * (t.dim() - 2) + (0, count * size - l)
        t = F.pad(t.to(work), padding).unflatten(1, (count, size))
        return as_buffer(t.transpose(0, 1).transpose(2, 3))

    dt_cbhs, B_cbgsn, C_cbgqn = cut(dt_blh), cut(B_blgn), cut(C_blgn)
    sum_cbhq = (dt_cbhs.double() * A_h.to(work)[:, None]).cumsum(-1)
    from_start = as_buffer(sum_cbhq.to(work).exp())
    kept = as_buffer(dt_cbhs * (sum_cbhq[..., -1:] - sum_cbhq).to(work).exp())
    CB_cbhqs = (C_cbgqn @ B_cbgsn.mT).repeat_interleave(h // g, 2)
    share = (sum_cbhq[..., :, None] - sum_cbhq[..., None, :]).to(work).exp()  # inf where s > q
    q = torch.arange(size, device=x_blhp.device)[:, None]
    share = torch.where(q.mT <= q, share * CB_cbhqs * dt_cbhs[..., None, :], 0)
    if D_h is not None:
        share = torch.where(q.mT == q, share + D_h.to(work)[:, None, None], share)
    return torch.ops.falcon_h1r.through_chunks(
        x_blhp, B_cbgsn, C_cbgqn, from_start, kept, as_buffer(share), initial_state_bhpn
    )


torch.library.define(
    "falcon_h1r::through_chunks",
    "(Tensor x, Tensor B, Tensor C, Tensor from_start, Tensor kept, Tensor share, Tensor? state)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("falcon_h1r::through_chunks", "CPU")
def _through_padded_chunks(x_blhp, B_cbgsn, C_cbgqn, from_start_cbhq, kept_cbhs, share, state_bhpn):
    """`_through_chunks` of what `_scan_in_graph` made."""
    b, l, h, _ = x_blhp.shape
    m, size = _products(b, h, B_cbgsn.shape[2]), B_cbgsn.shape[3]
    of_products = (t.flatten(1, 2).expand(-1, m, -1, -1) for t in (B_cbgsn, C_cbgqn))
    of_heads = (t.flatten(1, 2) for t in (from_start_cbhq[..., None], kept_cbhs[..., None], share))
    chunks = [_Chunk(*chunk) for chunk in zip(*of_products, *of_heads)]
    if rest := l % size:
        last = _Chunk(*(t[:, :rest] for t in chunks[-1]))
        chunks[-1] = last._replace(share_iqs=last.share_iqs[..., :rest])
    return _through_chunks(size, x_blhp, chunks, state_bhpn)


@torch.library.register_fake("falcon_h1r::through_chunks")
def _(x_blhp, B_cbgsn, *others):
    b, _, h, p = x_blhp.shape
    state = x_blhp.new_empty(b, h, p, B_cbgsn.shape[-1], dtype=B_cbgsn.dtype)
    return torch.empty_like(x_blhp, memory_format=torch.contiguous_format), state


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
    if in_cpu_graph(x_bhp):
        return _ssd_step_in_one_loop(state_bhpn, x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h)
    rows = max(1, STEP_BYTES // (h * p * n * work.itemsize))
    if b > rows and not torch.compiler.is_compiling():  # compiled, it is one pass
        parts = (t.split(rows) for t in (state_bhpn, x_bhp, dt_bh, B_bgn, C_bgn))
        return torch.cat([ssd_step(s, x, dt, A_h, B, C, D_h) for s, x, dt, B, C in zip(*parts)])

    x, dt = x_bhp.to(work), dt_bh.to(work)
    B, C = B_bgn.to(work), C_bgn.to(work)
    xdt = (x * dt[..., None]).view(b, g, h // g, p, 1)
    state = state_bhpn.to(work, copy=torch.is_grad_enabled())  # no graph may grow in the cache
    state.mul_(torch.exp(dt * A_h.to(work))[..., None, None])
    state.view(b, g, h // g, p, n).addcmul_(xdt, B[:, :, None, None])
    y = (state.reshape(b, g, -1, n) @ C[..., None]).view(b, h, p)
    state_bhpn.copy_(state.detach())
    if D_h is not None:
        y.addcmul_(D_h.to(work)[:, None], x)
    return y.to(x_bhp.dtype)


def _ssd_step_in_one_loop(state_bhpn, x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h) -> Tensor:
    """`ssd_step` as Inductor makes one pass over the states of it: sums, no product.

    Buffers in one layout, else the update and the sum run over different axes, and in two loops.
    """
    h, work = state_bhpn.shape[1], compute_dtype(x_bhp)
    x, dt = x_bhp.to(work), dt_bh.to(work)
    B_bhn, C_bhn = (t.to(work).repeat_interleave(h // t.shape[1], 1) for t in (B_bgn, C_bgn))
    xdt_bhp, B_bhn, C_bhn = map(as_buffer, (x * dt[..., None], B_bhn, C_bhn))
    decay_bh = as_buffer(torch.exp(dt * A_h.to(work)))
    state = state_bhpn.to(work) * decay_bh[..., None, None]
    state = state + xdt_bhp[..., None] * B_bhn[:, :, None]
    state_bhpn.copy_(state)
    y = (state * C_bhn[:, :, None]).sum(-1)
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

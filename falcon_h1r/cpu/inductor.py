"""The functions of the operator table INDUCTOR: what a graph for a CPU is compiled from.

Each computes what the TORCH function of its name computes, without gradients, written so that
Inductor, torch.compile's compiler, makes few loops of it. Uncompiled they are right, and slow. Axes
as in `attention.py`, `conv.py`, `ssd.py` and `scan.py`, and c the chunks or pieces of a sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunk import (
    LONGEST_CHUNK,
    chunk_output,
    first_state,
    heads_in_sequence,
    next_state,
    state_products,
)
from ..conv import final_window, with_history
from ..precision import autocasts, compute_dtype, without_autocast
from ..ssd import check_shapes

# A loop keeps a sum for each channel of each query head that shares a key head. More than LOOP_SUMS
# sums outgrow the registers; then torch's fused attention is faster, for up to LOOP_ROWS - 1 rows.
LOOP_ROWS, LOOP_SUMS = 16, 256
PIECE = 128  # keys: a loop adds up the values of one piece at a time


def as_buffer(tensor: Tensor) -> Tensor:
    """The same values, written to memory, in sequence, before they are used.

    Inductor computes what leads to a tensor again at each of its uses, unless it is a buffer, and
    a view of explicit strides needs one. `contiguous` would ask whether the tensor is contiguous:
    the answer would become part of the graph.
    """
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.as_strided(tensor.shape, tensor.stride())


def decode_attention(
    q_bhe: Tensor, k_bjse: Tensor, v_bjse: Tensor, lengths_b: Tensor | None = None
) -> Tensor:
    """One query in r heads per key head as sums of products: a loop over the keys and one over the
    values, each for all r heads at once; or torch's fused attention, where that is faster."""
    if autocasts(q_bhe):
        return without_autocast(decode_attention, **locals())
    b, h, e = q_bhe.shape
    j, s = k_bjse.shape[1:3]
    mask = None
    if lengths_b is not None:
        mask = (torch.arange(s, device=q_bhe.device) < lengths_b[:, None])[:, None, None]
    q_bjre = q_bhe.view(b, j, h // j, e)
    if b >= LOOP_ROWS or h // j * e <= LOOP_SUMS:
        return _attention_in_loops(q_bjre, k_bjse, v_bjse, mask).reshape(b, h, e)
    o = F.scaled_dot_product_attention(q_bjre, k_bjse, v_bjse, attn_mask=mask)
    return o.reshape(b, h, e)


def _attention_in_loops(q_bjre: Tensor, k_bjse: Tensor, v_bjse: Tensor, mask) -> Tensor:
    work, s, e = compute_dtype(q_bjre), *k_bjse.shape[2:]
    q, k, v = as_buffer(q_bjre.to(work) * e**-0.5), k_bjse.to(work), v_bjse.to(work)
    scores_bjrs = torch.stack([(k * head[:, :, None]).sum(-1) for head in q.unbind(2)], 2)
    if mask is not None:
        scores_bjrs = scores_bjrs.masked_fill(~mask, -torch.inf)

    # Keys in pieces (axis c). There is always a piece to spare, since a graph for one piece alone
    # would be another graph.
    padding = (s // PIECE + 2) * PIECE - s
    scores_bjrcs = F.pad(scores_bjrs, (0, padding), value=-torch.inf).unflatten(3, (-1, PIECE))
    shares_bjrcs = as_buffer((scores_bjrcs - scores_bjrcs.amax((3, 4), keepdim=True)).exp())
    v_bjcse = F.pad(v, (0, 0, 0, padding)).unflatten(2, (-1, PIECE))
    # Inductor reads all keys once for each vector of channels. Written as separate sums, vectors
    # share one loop that reads each key once. For narrower types Inductor takes longer vectors.
    vectors = v_bjcse.split(16 if v_bjse.dtype == work else e, -1)
    heads = shares_bjrcs[..., None].unbind(2)
    sums = [torch.cat([(t * head).sum(3) for t in vectors], -1).sum(2) for head in heads]
    return (torch.stack(sums, 2) / shares_bjrcs.sum(4).sum(3)[..., None]).to(q_bjre.dtype)


def causal_conv1d(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None = None,
    *,
    initial_window_bvc: Tensor | None = None,
    lengths_b: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One loop over all taps. Raises ValueError for packed documents and for gradients."""
    _refuse(x_blc, seq_idx_bl)
    c, w = weight_cw.shape
    assert x_blc.shape[-1] == c and (bias_c is None or bias_c.shape == (c,)), weight_cw.shape
    history_blc, _ = with_history(x_blc, w, initial_window_bvc, None)
    work = compute_dtype(x_blc)
    bias = None if bias_c is None else bias_c.to(work)
    weight_wc, l = as_buffer(weight_cw.to(work).T), x_blc.shape[1]
    y_blc = sum(history_blc[:, i : i + l].to(work) * weight_wc[i] for i in range(w))
    y_blc = F.silu(y_blc if bias is None else y_blc + bias).to(x_blc.dtype)
    return y_blc, final_window(history_blc, w, lengths_b, None)


def causal_conv1d_step(
    x_bc: Tensor, window_bvc: Tensor, weight_cw: Tensor, bias_c: Tensor | None = None
) -> Tensor:
    """With the weights as a buffer: their columns cannot be read as vectors."""
    b, c = x_bc.shape
    w = weight_cw.shape[1]
    assert window_bvc.shape == (b, w - 1, c) and weight_cw.shape[0] == c, window_bvc.shape
    work = compute_dtype(x_bc)
    history_bwc = torch.cat([window_bvc, x_bc[:, None].to(window_bvc.dtype)], dim=1)
    weight_wc = as_buffer(weight_cw.to(work).T)
    y = (history_bwc.to(work) * weight_wc).sum(1)
    if bias_c is not None:
        y = y + bias_c.to(work)
    window_bvc.copy_(history_bwc[:, 1:].detach())
    return F.silu(y).to(x_bc.dtype)


def ssd_scan(
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
    """Steps 1 and 2 of `scan.py` for all chunks in one loop, steps 3 and 4 as one operator.

    A graph holds no loop of as many turns as there are chunks. Extra memory is a (q, s) matrix for
    each head of each chunk. Raises ValueError for packed documents and for gradients.
    """
    if autocasts(x_blhp):
        return without_autocast(ssd_scan, **locals())
    _refuse(x_blhp, seq_idx_bl)
    assert chunk_size > 0, chunk_size
    size = min(chunk_size, LONGEST_CHUNK)
    b, l, h, p, g, n = check_shapes(
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
    left_cbhq = as_buffer(sum_cbhq.to(work).exp())
    inputs_cbhs = as_buffer(dt_cbhs * (sum_cbhq[..., -1:] - sum_cbhq).to(work).exp())
    CB_cbhqs = (C_cbgqn @ B_cbgsn.mT).repeat_interleave(h // g, 2)
    M_cbhqs = (sum_cbhq[..., :, None] - sum_cbhq[..., None, :]).to(work).exp()  # inf where s > q
    q = torch.arange(size, device=x_blhp.device)[:, None]
    M_cbhqs = torch.where(q.mT <= q, M_cbhqs * CB_cbhqs * dt_cbhs[..., None, :], 0)
    if D_h is not None:
        M_cbhqs = torch.where(q.mT == q, M_cbhqs + D_h.to(work)[:, None, None], M_cbhqs)
    return torch.ops.falcon_h1r.through_chunks(
        x_blhp, B_cbgsn, C_cbgqn, left_cbhq, inputs_cbhs, as_buffer(M_cbhqs), initial_state_bhpn
    )


torch.library.define(
    "falcon_h1r::through_chunks",
    "(Tensor x, Tensor B, Tensor C, Tensor left, Tensor inputs, Tensor M, Tensor? state)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("falcon_h1r::through_chunks", "CPU")
def _through_chunks(x_blhp, B_cbgsn, C_cbgqn, left_cbhq, inputs_cbhs, M_cbhqs, initial_state_bhpn):
    """Steps 3 and 4 of `scan.py`, chunk by chunk; the last one may be shorter."""
    b, l, h, p = x_blhp.shape
    size, n = B_cbgsn.shape[3:]
    m, work = state_products(b, h, B_cbgsn.shape[2]), M_cbhqs.dtype
    B_cmsn, C_cmqn = (t.flatten(1, 2).expand(-1, m, -1, -1) for t in (B_cbgsn, C_cbgqn))
    heads = (t.flatten(1, 2) for t in (left_cbhq[..., None], inputs_cbhs[..., None], M_cbhqs))
    y_blhp = torch.empty_like(x_blhp, memory_format=torch.contiguous_format)
    cuts = (t.transpose(1, 2).split(size, 2) for t in (x_blhp, y_blhp))
    state = first_state(initial_state_bhpn, m, work)
    for x_bhsp, y_bhqp, B, C, left, inputs, M in zip(*cuts, B_cmsn, C_cmqn, *heads):
        if (length := x_bhsp.shape[2]) < size:
            B, C, left, inputs, M = (t[:, :length] for t in (B, C, left, inputs, M))
            M = M[..., :length]
        x_isp = heads_in_sequence(x_bhsp, work)
        y_bhqp.copy_(chunk_output(M, x_isp, C, left, state).view(b, h, length, p))
        state = next_state(state, left[:, -1:], x_isp, inputs, B)
    return y_blhp, state[0].view(b, h, p, n)


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
    """One pass over the states: sums, no product.

    Buffers in one layout, else the update and the sum run over different axes, and in two loops.
    """
    r, work = state_bhpn.shape[1] // B_bgn.shape[1], compute_dtype(x_bhp)
    x, dt = x_bhp.to(work), dt_bh.to(work)
    B_bhn, C_bhn = (t.to(work).repeat_interleave(r, 1) for t in (B_bgn, C_bgn))
    xdt_bhp, B_bhn, C_bhn = map(as_buffer, (x * dt[..., None], B_bhn, C_bhn))
    decay_bh = as_buffer(torch.exp(dt * A_h.to(work)))
    state = state_bhpn.to(work) * decay_bh[..., None, None]
    state = state + xdt_bhp[..., None] * B_bhn[:, :, None]
    state_bhpn.copy_(state.detach())
    y = (state * C_bhn[:, :, None]).sum(-1)
    if D_h is not None:
        y = y + D_h.to(work)[:, None] * x
    return y.to(x_bhp.dtype)


def _refuse(x: Tensor, seq_idx_bl: Tensor | None) -> None:
    """What no form here serves."""
    if seq_idx_bl is not None:
        raise ValueError("INDUCTOR: packed documents (seq_idx) need TORCH or REFERENCE")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("INDUCTOR: gives no gradients; train with TORCH, or use torch.no_grad()")

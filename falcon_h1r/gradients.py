"""The backward of the scan, in chunks, as the forward in `scan.py`: memory linear in the length.

With S the state and dS its gradient, both at a chunk's end, and s_q the sum of dt A up to q, the
gradient walks back along the sequence as the state walks forward, with B and C exchanged:

    dS_before = exp(s_end) dS + sum_q exp(s_q) dy_q (outer) C_q
    dx_s      = dt_s dx'_s + D dy_s      dx'_s = sum_q (C_q B_s) L_qs dy_q + exp(s_end - s_s) dS B_s
    dC_q      = sum_s W_qs B_s + exp(s_q) dy_q S_before      W_qs = (dy_q x_s) L_qs dt_s
    dB_s      = sum_q W_qs C_q + dt_s exp(s_end - s_s) x_s dS

Every decay is exp of a sum of dt A, so that its gradient is the value it made times what that value
got: dt_t A gets this of all that was carried over the step into t (`_of_decays`). dt gets A times
that and x_s dx'_s besides, A gets dt times that. docs/gradients.md derives each line.

What survives the forward is its inputs and a state for every SEGMENT chunks; the states between are
made again. The backward itself gives no gradients: a second backward raises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import (
    LONGEST_CHUNK,
    decays,
    first_state,
    heads_in_sequence,
    next_state,
    read_state,
    state_products,
)
from .precision import compute_dtype

SEGMENT = 16  # chunks between two states that are kept


def with_gradients(forward, chunk_size, x, dt, A, B, C, D, state, seq_idx):
    """forward(x, dt, A, B, C, D, ...) of `scan.ssd_scan`; each gradient is in its input's dtype."""
    return _Scan.apply(forward, chunk_size, x, dt, A, B, C, D, state, seq_idx)


def once(backward):
    """A `backward` that raises where its result is to be differentiated again, instead of being
    taken for a constant."""

    def refusing(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("this operator has no second derivative: create_graph is not served")
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return refusing


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, chunk_size, x, dt, A, B, C, D, state, seq_idx_bl):
        size = min(chunk_size, LONGEST_CHUNK)
        length = size * SEGMENT
        states, outputs = [state], []
        for start in range(0, x.shape[1], length):
            part = slice(start, start + length)
            documents = None if seq_idx_bl is None else seq_idx_bl[:, part]
            if seq_idx_bl is not None and start > 0:
                same_b = documents[:, 0] == seq_idx_bl[:, start - 1]
                state = state.where(same_b[:, None, None, None], 0)
            y, state = forward(
                *(x[:, part], dt[:, part], A, B[:, part], C[:, part], D),
                chunk_size=size,
                initial_state_bhpn=state,
                seq_idx_bl=documents,
            )
            outputs.append(y)
            states.append(state)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        ctx.save_for_backward(seq_idx_bl, x, dt, A, B, C, D, *states[:-1])
        ctx.size = size
        return y, state

    @staticmethod
    @once
    def backward(ctx, dy, dstate):
        seq_idx_bl, x, dt, A, B, C, D, *states = ctx.saved_tensors
        back = _Back(ctx.size, seq_idx_bl, x, dt, A, B, C, D)
        gradients = back.walk(states, dy, dstate)
        needed = zip(gradients, ctx.needs_input_grad[2:])
        return None, None, *(gradient if wanted else None for gradient, wanted in needed), None


class _Chunk(NamedTuple):
    """What the forward of a chunk takes, made again. Axes as in `scan.py`."""

    place: slice  # in the sequence
    x_isp: Tensor
    dt_bgrs: Tensor
    B_bgsn: Tensor
    C_bgqn: Tensor
    sums_bgrq: Tensor
    left_bgrq: Tensor  # of the state before the chunk, at q
    end_left_bgrs: Tensor  # of s, at the chunk's end
    same_bqs: Tensor | None  # whether q and s are of one document; None: all are

    def after(self, state, products: int):
        """The state behind the chunk; `state` is left alone."""
        if state is not None:
            state = first_state(state[0][None], products, self.x_isp.dtype)
        left_iq1, B_msn = _by_heads(self.left_bgrq), _for_products(self.B_bgsn, products)
        inputs_is1 = _by_heads(self.dt_bgrs * self.end_left_bgrs)
        return next_state(state, left_iq1[:, -1:], self.x_isp, inputs_is1, B_msn)


class _Back:
    """One walk back over the chunks of a scan."""

    def __init__(self, size, seq_idx_bl, x, dt, A, B, C, D):
        self.size, self.seq_idx_bl, self.work = size, seq_idx_bl, compute_dtype(x)
        self.inputs = x, dt, A, B, C, D
        (b, _, h, _), g = x.shape, B.shape[2]
        self.groups, self.products = (b, g, h // g), state_products(b, h, g)
        self.A_gr1 = A.to(self.work).view(g, -1, 1)
        made = (x, dt, B, C)
        self.dx, self.ddt, self.dB, self.dC = (t.new_empty(t.shape) for t in made)
        self.dA = torch.zeros(b, g, h // g, dtype=torch.float64, device=x.device)
        self.dD = None if D is None else torch.zeros_like(self.dA)

    def walk(self, states, dy, dstate):
        """Gradients of x, dt, A, B, C, D and the first state; states: before each segment."""
        x, _, A, _, _, D = self.inputs
        l, length = x.shape[1], self.size * SEGMENT
        b, h, p, n = dstate.shape
        dstate = first_state(dstate, self.products, self.work)
        for k in reversed(range(len(states))):
            end = min((k + 1) * length, l)
            starts = range(k * length, end, self.size)
            chunks = [self._chunk(slice(start, min(start + self.size, end))) for start in starts]
            befores = [first_state(states[k], self.products, self.work)]
            for chunk in chunks[:-1]:
                befores.append(chunk.after(befores[-1], self.products))
            while chunks:
                dstate = self._back(chunks.pop(), befores.pop(), dy, dstate)
        dA = self.dA.sum(0).flatten().to(A.dtype)
        dD = None if D is None else self.dD.sum(0).flatten().to(D.dtype)
        dfirst = None if states[0] is None else dstate[0].view(b, h, p, n).to(states[0].dtype)
        return self.dx, self.ddt, dA, self.dB, self.dC, dD, dfirst

    def _chunk(self, place: slice) -> _Chunk:
        x, dt, _, B, C, _ = (
            None if t is None or t.dim() == 1 else t[:, place] for t in self.inputs
        )
        _, g, r = self.groups
        x_isp = heads_in_sequence(x.transpose(1, 2), self.work)
        dt_bgrs = dt.to(self.work).unflatten(2, (g, r)).permute(0, 2, 3, 1).contiguous()
        B_bgsn, C_bgqn = (t.to(self.work).transpose(1, 2) for t in (B, C))
        documents = same_bqs = None
        if self.seq_idx_bl is not None:
            own, before = self.seq_idx_bl[:, place], self.seq_idx_bl[:, max(place.start - 1, 0)]
            documents, same_bqs = (own, before[:, None]), own[:, :, None] == own[:, None, :]
        made = decays(dt_bgrs, self.A_gr1, documents)
        return _Chunk(place, x_isp, dt_bgrs, B_bgsn, C_bgqn, *made, same_bqs)

    def _back(self, chunk: _Chunk, before, dy, dstate):
        """Write the gradients of one chunk's inputs; returns that of the state before it.

        before: the state, as `first_state` gives it; dstate: the gradient of the one after.
        """
        place, x_isp, dt, B, C, sums, left, end_left, same_bqs = chunk
        (b, g, r), m = self.groups, self.products
        dy_iqp = heads_in_sequence(dy[:, place].transpose(1, 2), self.work)
        q, left_iq1 = dy_iqp.shape[1], _by_heads(left)

        L = (sums[..., :, None] - sums[..., None, :]).to(self.work).clamp_(max=0).exp_().tril_()
        if same_bqs is not None:
            L.masked_fill_(~same_bqs[:, None, None], 0)
        CB = (C @ B.mT)[:, :, None]

        dx_isp = read_state(_for_products(B, m), dstate)
        kept = (x_isp * dx_isp).sum(-1).view(b, g, r, q) * end_left
        dx_isp.mul_(_by_heads(end_left)).baddbmm_((L * CB).flatten(0, 2).mT, dy_iqp)
        ddt = (x_isp * dx_isp).sum(-1).view(b, g, r, q)
        W = torch.bmm(dy_iqp, x_isp.mT).view(b, g, r, q, q).mul_(L).mul_(dt[..., None, :])
        inside = (W * CB).tril_(-1)
        W = W.sum(2)
        dC, dB = W @ B, W.mT @ C
        dB += self._written(place, dt * end_left, dstate)
        read, held = torch.zeros_like(dt), torch.zeros_like(dt[..., :1])
        if before is not None:
            dC_iqn = torch.bmm(dy_iqp * left_iq1, before[0]).view(b, g, r, q, -1)
            read = (dC_iqn * C[:, :, None]).sum(-1)
            dC += dC_iqn.sum(2)
            held = (dstate[0] * before[0]).sum((1, 2)).view(b, g, r, 1) * left[..., -1:]
        ds = _of_decays(inside, dt * kept, read, held, same_bqs)
        self.dA += (dt * ds).sum(-1)
        self.ddt[:, place] = (ddt + self.A_gr1 * ds).permute(0, 3, 1, 2).flatten(2)
        dx_bhsp = dx_isp.mul_(_by_heads(dt)).view(b, g * r, q, -1)
        if (D := self.inputs[5]) is not None:
            dx_bhsp.addcmul_(D.to(self.work)[:, None, None], dy_iqp.view(dx_bhsp.shape))
            self.dD += (dy_iqp * x_isp).sum((1, 2), dtype=torch.float64).view(b, g, r)
        self.dx[:, place] = dx_bhsp.transpose(1, 2)
        self.dB[:, place], self.dC[:, place] = dB.transpose(1, 2), dC.transpose(1, 2)
        return next_state(dstate, left_iq1[:, -1:], dy_iqp, left_iq1, _for_products(C, m))

    def _written(self, place: slice, inputs_bgrs: Tensor, dstate) -> Tensor:
        """What B gets for what x and B wrote to the state, (b, g, s, n): a product for a group."""
        (b, g, r), n = self.groups, dstate[0].shape[-1]
        x_bsgrp = self.inputs[0][:, place].unflatten(2, (g, r))
        x_bsgrp = x_bsgrp * inputs_bgrs.permute(0, 3, 1, 2)[..., None]
        x_bgsk = x_bsgrp.flatten(3).transpose(1, 2)
        return x_bgsk @ dstate[0].view(b, g, -1, n)


def _by_heads(t_bgrs: Tensor) -> Tensor:
    """(i, s, 1)"""
    return t_bgrs[..., None].flatten(0, 2)


def _for_products(B_bgsn: Tensor, products: int) -> Tensor:
    """(m, s, n)"""
    return B_bgsn.flatten(0, 1).expand(products, -1, -1)


def _of_decays(inside, kept, read, held, same_bqs) -> Tensor:
    """The gradient of dt_t A: what was carried over the step into t, times its gradient.

    inside (b, g, r, q, s): from s to q in the chunk; kept (b, g, r, s): from s to the end; read
    (b, g, r, q): from the start to q; held (b, g, r, 1): from the start to the end. In float64:
    what was not carried over the step is in both of two sums.
    """
    ds = inside.sum(-1, dtype=torch.float64) + read - inside.sum(-2, dtype=torch.float64)
    kept = kept.double()
    if same_bqs is None:
        return ds.flip(-1).cumsum(-1).flip(-1) + (kept.cumsum(-1) - kept) + held
    below_bqt = same_bqs.tril()[:, None, None]
    later = torch.where(below_bqt, ds[..., None], 0).sum(-2)
    earlier = torch.where(below_bqt.tril(-1), kept[..., None, :], 0).sum(-1)
    return later + earlier + held

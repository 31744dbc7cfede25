"""The backward of the scan, in chunks, as the forward in `scan.py`: memory linear in the length.

With S the state and dS its gradient, both at a chunk's end, and s_q the sum of dt A up to q, the
gradient walks back along the sequence as the state walks forward, with B and C exchanged:

    dS_before = exp(s_end) dS + sum_q exp(s_q) dy_q (outer) C_q
    dx_s      = dt_s dx'_s + D dy_s      dx'_s = sum_q (C_q B_s) L_qs dy_q + exp(s_end - s_s) dS B_s
    dC_q      = sum_s W_qs B_s + exp(s_q) dy_q S_before      W_qs = (dy_q x_s) L_qs dt_s
    dB_s      = sum_q W_qs C_q + dt_s exp(s_end - s_s) x_s dS

Every decay is exp of a difference of sums, so that its gradient is the value it made, times what
that value got: ds_q = dy_q (y_q - D x_q) - dt_s (x_s dx'_s) with s = q, and at the end of the chunk
also <dS, S>. A sum from the right turns ds into the gradient of dt A: dt gets A of it, A gets dt.
dt gets x_s dx'_s besides. docs/gradients.md derives each line.

What survives the forward is its inputs and a state for every SEGMENT chunks; the states between are
made again. The backward itself gives no gradients: a second backward raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scan
from .precision import compute_dtype
from .scan import LONGEST_CHUNK, chunk_output, decays, heads_in_sequence, next_state

SEGMENT = 16  # chunks between two states that are kept


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
    """`scan.ssd_scan` with a backward; each gradient is in its input's dtype."""
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Scan.apply(chunk_size, seq_idx_bl, *inputs)
    return scan.ssd_scan(
        *inputs[:6],
        chunk_size=chunk_size,
        initial_state_bhpn=initial_state_bhpn,
        seq_idx_bl=seq_idx_bl,
    )


def once(backward):
    """A `backward` that raises where its result is to be differentiated again, instead of being
    taken for a constant."""

    def refusing(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("this operator has no second derivative: create_graph is not served")
        return backward(ctx, *gradients)

    return refusing


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, seq_idx_bl, x, dt, A, B, C, D, state):
        size = min(chunk_size, LONGEST_CHUNK)
        length = size * SEGMENT
        states, outputs = [state], []
        for start in range(0, x.shape[1], length):
            part = slice(start, start + length)
            documents = None if seq_idx_bl is None else seq_idx_bl[:, part]
            if seq_idx_bl is not None and start > 0:
                same_b = documents[:, 0] == seq_idx_bl[:, start - 1]
                state = state.where(same_b[:, None, None, None], 0)
            y, state = scan.ssd_scan(
                *(x[:, part], dt[:, part], A, B[:, part], C[:, part], D),
                chunk_size=size,
                initial_state_bhpn=state,
                seq_idx_bl=documents,
            )
            outputs.append(y)
            states.append(state)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        ctx.save_for_backward(seq_idx_bl, x, dt, A, B, C, D, *states)
        ctx.size = size
        return y, states[-1].clone()

    @staticmethod
    @once
    def backward(ctx, dy, dstate):
        seq_idx_bl, x, dt, A, B, C, D, *states = ctx.saved_tensors
        back = _Back(ctx.size, seq_idx_bl, x, dt, A, B, C, D)
        gradients = back.walk(states, dy, dstate)
        return (
            None,
            None,
            *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[2:])),
        )


class _Back:
    """One walk back over the chunks of a scan. Axes as in `scan.py`."""

    def __init__(self, size, seq_idx_bl, x, dt, A, B, C, D):
        self.size, self.seq_idx_bl, self.work = size, seq_idx_bl, compute_dtype(x)
        self.inputs = x, dt, A, B, C, D
        (b, _, h, _), g = x.shape, B.shape[2]
        self.groups, self.products = (b, g, h // g), scan.state_products(b, h, g)
        self.A_gr1 = A.to(self.work).view(g, -1, 1)
        made = (x, dt, B, C)
        self.dx, self.ddt, self.dB, self.dC = (torch.empty_like(t) for t in made)
        self.dA = torch.zeros(b, g, h // g, dtype=torch.float64, device=x.device)
        self.dD = None if D is None else torch.zeros_like(self.dA)

    def walk(self, states, dy, dstate):
        """Gradients of x, dt, A, B, C, D and the first state; states: before each segment, and the
        last."""
        x, _, A, _, _, D = self.inputs
        l, length = x.shape[1], self.size * SEGMENT
        b, h, p, n = dstate.shape
        after = scan.first_state(states[-1], self.products, self.work)
        dstate = scan.first_state(dstate, self.products, self.work)
        for k in reversed(range(len(states) - 1)):
            end = min((k + 1) * length, l)
            starts = range(k * length, end, self.size)
            befores = self._states(states[k], starts, end)
            for start, before in zip(reversed(starts), reversed(befores)):
                dstate = self._chunk(start, min(start + self.size, end), before, after, dy, dstate)
                after = before
        dA = self.dA.sum(0).flatten().to(A.dtype)
        dD = None if D is None else self.dD.sum(0).flatten().to(D.dtype)
        dfirst = None if states[0] is None else dstate[0].view(b, h, p, n).to(states[0].dtype)
        return self.dx, self.ddt, dA, self.dB, self.dC, dD, dfirst

    def _states(self, first, starts, end):
        """The state before each chunk of a segment, from the one before the segment."""
        state = scan.first_state(first, self.products, self.work)
        states = [state]
        for start in starts[:-1]:
            x_isp, dt, B, _, _, left, end_left = self._prepare(start, min(start + self.size, end))
            if state is not None:  # a copy, since the step writes in place
                state = scan.first_state(state[0][None], self.products, self.work)
            inputs_is1 = (dt * end_left)[..., None].flatten(0, 2)
            left_iq1 = left[..., None].flatten(0, 2)
            B_msn = B.flatten(0, 1).expand(self.products, -1, -1)
            state = next_state(state, left_iq1[:, -1:], x_isp, inputs_is1, B_msn)
            states.append(state)
        return states

    def _prepare(self, start, end):
        x, dt, _, B, C, _ = self.inputs
        chunk, (_, g, r) = slice(start, end), self.groups
        x_isp = heads_in_sequence(x[:, chunk].transpose(1, 2), self.work)
        dt_bgrs = dt[:, chunk].to(self.work).unflatten(2, (g, r)).permute(0, 2, 3, 1)
        B_bgsn, C_bgqn = (t[:, chunk].to(self.work).transpose(1, 2) for t in (B, C))
        return x_isp, dt_bgrs, B_bgsn, C_bgqn, *decays(dt_bgrs, self.A_gr1, self._documents(chunk))

    def _documents(self, chunk):
        if self.seq_idx_bl is None:
            return None
        return self.seq_idx_bl[:, chunk], self.seq_idx_bl[:, max(chunk.start - 1, 0), None]

    def _chunk(self, start, end, before, after, dy, dstate):
        """Write the gradients of one chunk's inputs; returns that of the state before it.

        before, after: the states, as `scan.first_state` gives them; dstate: of the one after.
        """
        chunk, (b, g, r) = slice(start, end), self.groups
        x_isp, dt, B, C, sums, left, end_left = self._prepare(start, end)
        dy_iqp = heads_in_sequence(dy[:, chunk].transpose(1, 2), self.work)
        q, m = dy_iqp.shape[1], self.products
        B_msn, C_mqn = (t.flatten(0, 1).expand(m, -1, -1) for t in (B, C))
        left_iq1, end_left_is1 = (t[..., None].flatten(0, 2) for t in (left, end_left))

        L = (sums[..., :, None] - sums[..., None, :]).to(self.work).clamp_(max=0).exp_()
        seen = torch.ones(q, q, dtype=torch.bool, device=L.device).tril()
        if self.seq_idx_bl is not None:
            own = self.seq_idx_bl[:, chunk]
            seen = (seen & (own[:, :, None] == own[:, None, :]))[:, None, None]
        L = L.where(seen, 0)
        CB = (C @ B.mT)[:, :, None]

        dx_isp = chunk_output((L * CB).flatten(0, 2).mT, dy_iqp, B_msn, end_left_is1, dstate)
        ddt = (x_isp * dx_isp).sum(-1).view(b, g, r, q)
        W = torch.bmm(dy_iqp, x_isp.mT).view(b, g, r, q, q).mul_(L).mul_(dt[..., None, :])
        ds = (W * CB).sum(-1) - dt * ddt
        W = W.sum(2)
        dC, dB = W @ B, W.mT @ C
        dB += _group_products(x_isp * (dt * end_left)[..., None].flatten(0, 2), dstate, b, g)
        if before is not None:
            dC_iqn = torch.bmm(dy_iqp * left_iq1, before[0]).view(b, g, r, q, -1)
            ds += (dC_iqn * C[:, :, None]).sum(-1)
            dC += dC_iqn.sum(2)
        ds[..., -1] += (dstate[0] * after[0]).sum((1, 2)).view(b, g, r)
        ds = self._from_the_right(ds.double(), chunk)
        self.dA += (dt * ds).sum(-1)
        self.ddt[:, chunk] = (ddt + self.A_gr1 * ds).permute(0, 3, 1, 2).flatten(2)
        dx_bhsp = dx_isp.view(b, g * r, q, -1) * dt.flatten(1, 2)[..., None]
        if (D := self.inputs[5]) is not None:
            dy_bhqp = dy_iqp.view(dx_bhsp.shape)
            dx_bhsp += D.to(self.work)[:, None, None] * dy_bhqp
            self.dD += (dy_iqp * x_isp).sum((1, 2), dtype=torch.float64).view(b, g, r)
        self.dx[:, chunk] = dx_bhsp.transpose(1, 2)
        self.dB[:, chunk], self.dC[:, chunk] = dB.transpose(1, 2), dC.transpose(1, 2)
        return next_state(dstate, left_iq1[:, -1:], dy_iqp, left_iq1, C_mqn)

    def _from_the_right(self, ds_bgrq: Tensor, chunk) -> Tensor:
        """Sums over q and what follows it in its document: of the gradients of sums of dt A."""
        if self.seq_idx_bl is None:
            return ds_bgrq.flip(-1).cumsum(-1).flip(-1)
        own = self.seq_idx_bl[:, chunk]
        q = own.shape[1]
        later = torch.ones(q, q, dtype=torch.bool, device=own.device).tril()
        later = (later & (own[:, :, None] == own[:, None, :]))[:, None, None]  # (b, 1, 1, q, t)
        return torch.where(later, ds_bgrq[..., None], 0).sum(-2)


def _group_products(x_isp: Tensor, state, b: int, g: int) -> Tensor:
    """sum over a group's heads of x_s state, (b, g, s, n)."""
    state_ipn, _ = state
    (_, s, p), n = x_isp.shape, state_ipn.shape[-1]
    x_bgsk = x_isp.view(b, g, -1, s, p).transpose(2, 3).reshape(b * g, s, -1)
    return torch.bmm(x_bgsk, state_ipn.reshape(b * g, -1, n)).view(b, g, s, n)

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

import torch
from torch import Tensor

from . import scan
from .precision import compute_dtype
from .scan import LONGEST_CHUNK, decays, heads_in_sequence, next_state

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
        ctx.save_for_backward(seq_idx_bl, x, dt, A, B, C, D, *states[:-1])
        ctx.size = size
        return y, state

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
        """Gradients of x, dt, A, B, C, D and the first state; states: before each segment."""
        x, _, A, _, _, D = self.inputs
        l, length = x.shape[1], self.size * SEGMENT
        b, h, p, n = dstate.shape
        dstate = scan.first_state(dstate, self.products, self.work)
        for k in reversed(range(len(states))):
            end = min((k + 1) * length, l)
            starts = range(k * length, end, self.size)
            befores = self._states(states[k], starts, end)
            for start, before in zip(reversed(starts), reversed(befores)):
                dstate = self._chunk(start, min(start + self.size, end), before, dy, dstate)
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

    def _chunk(self, start, end, before, dy, dstate):
        """Write the gradients of one chunk's inputs; returns that of the state before it.

        before: the state, as `scan.first_state` gives it; dstate: the gradient of the one after.
        """
        chunk, (b, g, r) = slice(start, end), self.groups
        x_isp, dt, B, C, sums, left, end_left = self._prepare(start, end)
        dy_iqp = heads_in_sequence(dy[:, chunk].transpose(1, 2), self.work)
        q, m = dy_iqp.shape[1], self.products
        B_msn, C_mqn = (t.flatten(0, 1).expand(m, -1, -1) for t in (B, C))
        left_iq1, end_left_is1 = (t[..., None].flatten(0, 2) for t in (left, end_left))

        seen = torch.ones(q, q, dtype=torch.bool, device=dt.device).tril()
        if self.seq_idx_bl is not None:
            own = self.seq_idx_bl[:, chunk]
            seen = (seen & (own[:, :, None] == own[:, None, :]))[:, None, None]
        L = (sums[..., :, None] - sums[..., None, :]).to(self.work).clamp_(max=0).exp_()
        L = L.where(seen, 0)
        CB = (C @ B.mT)[:, :, None]

        dx_isp = _read(B_msn, dstate, len(x_isp))
        kept = (x_isp * dx_isp).sum(-1).view(b, g, r, q) * end_left
        dx_isp.mul_(end_left_is1).baddbmm_((L * CB).flatten(0, 2).mT, dy_iqp)
        ddt = (x_isp * dx_isp).sum(-1).view(b, g, r, q)
        W = torch.bmm(dy_iqp, x_isp.mT).view(b, g, r, q, q).mul_(L).mul_(dt[..., None, :])
        inside = (W * CB).tril_(-1)
        W = W.sum(2)
        dC, dB = W @ B, W.mT @ C
        dB += _group_products(x_isp * (dt * end_left)[..., None].flatten(0, 2), dstate, b, g)
        read, held = torch.zeros_like(dt), torch.zeros_like(dt[..., :1])
        if before is not None:
            dC_iqn = torch.bmm(dy_iqp * left_iq1, before[0]).view(b, g, r, q, -1)
            read = (dC_iqn * C[:, :, None]).sum(-1)
            dC += dC_iqn.sum(2)
            held = (dstate[0] * before[0]).sum((1, 2)).view(b, g, r, 1) * left[..., -1:]
        ds = self._of_decays(inside, dt * kept, read, held, chunk)
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

    def _of_decays(self, inside, kept, read, held, chunk) -> Tensor:
        """The gradient of dt_t A: what was carried over the step into t, times its gradient.

        inside (b, g, r, q, s): from s to q in the chunk; kept (b, g, r, s): from s to the end;
        read (b, g, r, q): from the start to q; held (b, g, r, 1): from the start to the end. In
        float64: what did not pass t is in both of two sums.
        """
        reads = inside.sum(-1, dtype=torch.float64) + read
        ds = reads - inside.sum(-2, dtype=torch.float64)
        kept = kept.double()
        if self.seq_idx_bl is None:
            later = ds.flip(-1).cumsum(-1).flip(-1)
            return later + (kept.cumsum(-1) - kept) + held
        own = self.seq_idx_bl[:, chunk]
        same, q = (own[:, :, None] == own[:, None, :])[:, None, None], own.shape[1]
        below = torch.ones(q, q, dtype=torch.bool, device=own.device).tril()
        later = torch.where(same & below, ds[..., None], 0).sum(-2)
        earlier = torch.where(same & below.tril(-1), kept[..., None, :], 0).sum(-1)
        return later + earlier + held


def _read(C_mqn: Tensor, state, heads: int) -> Tensor:
    """C state^T by heads, (i, q, p)."""
    y_iqp = torch.bmm(C_mqn, state[1].mT)
    if len(C_mqn) < heads:
        m, q, _ = y_iqp.shape
        y_iqp = y_iqp.view(m, q, heads // m, -1).transpose(1, 2).reshape(heads, q, -1)
    return y_iqp


def _group_products(x_isp: Tensor, state, b: int, g: int) -> Tensor:
    """sum over a group's heads of x_s state, (b, g, s, n)."""
    state_ipn, _ = state
    (_, s, p), n = x_isp.shape, state_ipn.shape[-1]
    x_bgsk = x_isp.view(b, g, -1, s, p).transpose(2, 3).reshape(b * g, s, -1)
    return torch.bmm(x_bgsk, state_ipn.reshape(b * g, -1, n)).view(b, g, s, n)

"""One step of the recurrence (`ssd.py`), tuned for a CPU's caches: TORCH's `ssd_step`."""

import torch
from torch import Tensor

from ..precision import autocasts, compute_dtype, without_autocast
from ..ssd import check_step_shapes

STEP_BYTES = 2**20  # of states taken at a time: three operators pass over them


def ssd_step(
    state_bhpn: Tensor,
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor,
    C_bgn: Tensor,
    D_h: Tensor | None = None,
) -> Tensor:
    """`ssd.ssd_step`, in place, a few rows at a time that stay in a core's cache."""
    if autocasts(x_bhp):
        return without_autocast(ssd_step, **locals())
    r = check_step_shapes(state_bhpn, x_bhp, dt_bh, B_bgn, C_bgn)
    b, h, p, n = state_bhpn.shape
    work = compute_dtype(x_bhp)
    rows = max(1, STEP_BYTES // (h * p * n * work.itemsize))
    if b > rows:
        parts = (t.split(rows) for t in (state_bhpn, x_bhp, dt_bh, B_bgn, C_bgn))
        return torch.cat([ssd_step(s, x, dt, A_h, B, C, D_h) for s, x, dt, B, C in zip(*parts)])

    x, dt, B, C = (t.to(work) for t in (x_bhp, dt_bh, B_bgn, C_bgn))
    state = state_bhpn.to(work, copy=torch.is_grad_enabled())  # no graph may grow in the cache
    state.mul_(torch.exp(dt * A_h.to(work))[..., None, None])
    xdt_bgrp1 = (x * dt[..., None]).view(b, h // r, r, p, 1)
    state.view(b, h // r, r, p, n).addcmul_(xdt_bgrp1, B[:, :, None, None])
    y = (state.reshape(b, h // r, -1, n) @ C[..., None]).view(b, h, p)
    state_bhpn.copy_(state.detach())
    if D_h is not None:
        y.addcmul_(D_h.to(work)[:, None], x)
    return y.to(x_bhp.dtype)

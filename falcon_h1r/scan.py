"""The chunked scan of `ssd.py` tuned for a CPU; steps: `chunk.py`, backward: `gradients.py`."""

import torch
from einops import rearrange
from torch import Tensor

from .chunk import (
    LONGEST_CHUNK,
    chunk_output,
    decays,
    first_state,
    heads_in_sequence,
    mixing_matrix,
    next_state,
    state_products,
)  # fmt: skip
from .documents import with_lost, without_lost
from .gradients import with_gradients
from .precision import autocasts, compute_dtype, without_autocast
from .ssd import check_shapes


def ssd_scan(
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h=None,
    *, chunk_size=128, initial_state_bhpn=None, seq_idx_bl=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd.ssd_chunked` in chunks of at most LONGEST_CHUNK; extra memory is one chunk's."""
    if autocasts(x_blhp):
        return without_autocast(ssd_scan, **locals())
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    b, l, h, p, g, n = check_shapes(*inputs)
    assert chunk_size > 0, chunk_size
    inputs, *lost = without_lost(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return with_lost(with_gradients(ssd_scan, chunk_size, *inputs), *lost)
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, _ = inputs
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
    return with_lost((y_blhp, state[0].view(b, h, p, n)), *lost)

"""Packed documents that are not finite, kept from their neighbours.

A product over several documents masks with zeros, and 0 * NaN is NaN. So what is not finite enters
a product as 0, and what depends on it is NaN: a document from there to its end, as it is causal.
"""

import functools

import torch
from torch import Tensor


def lost_positions(seq_idx_bl: Tensor, *inputs: Tensor) -> Tensor:
    """(b, l), True from the first position of a document that is not finite to its end.

    inputs: (b, l, ...), whose values act on later positions.
    """
    bad_bl = functools.reduce(torch.logical_or, map(not_finite, inputs))
    position_l = torch.arange(bad_bl.shape[1], device=bad_bl.device)
    latest_bl = torch.where(bad_bl, position_l, -1).cummax(1).values
    return (latest_bl >= 0) & (seq_idx_bl.gather(1, latest_bl.clamp(min=0)) == seq_idx_bl)


def not_finite(inputs: Tensor) -> Tensor:
    """(b, l, ...) -> (b, l), True where any value is infinite or NaN."""
    return (inputs.detach().flatten(2) * 0).sum(2) != 0  # NaN; several times as fast as isfinite


def filled(inputs: Tensor, where: Tensor, value: float = 0.0) -> Tensor:
    """`inputs` with `value` where a mask of their first axes is True."""
    return inputs.masked_fill(where.view(*where.shape, *(1,) * (inputs.dim() - where.dim())), value)


def without_lost(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl):
    """A scan's inputs without what is not finite, and where y and the final state are lost by it:
    (b, l) and (b,), both None without documents. See `with_lost`."""
    if seq_idx_bl is None:
        inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
        return inputs, None, None
    for each in (x_blhp, dt_blh, B_blgn, C_blgn):
        assert each.shape[:2] == seq_idx_bl.shape, (each.shape, seq_idx_bl.shape)
    lost_bl = lost_positions(seq_idx_bl, x_blhp, dt_blh, B_blgn)
    if initial_state_bhpn is not None:
        bad_b = not_finite(initial_state_bhpn[:, None])[:, 0]
        lost_bl = lost_bl | (bad_b[:, None] & (seq_idx_bl == seq_idx_bl[:, :1]))
        initial_state_bhpn = filled(initial_state_bhpn, bad_b)
    unread_bl = lost_bl | not_finite(C_blgn)
    x_blhp, dt_blh, B_blgn = (filled(t, lost_bl) for t in (x_blhp, dt_blh, B_blgn))
    C_blgn = filled(C_blgn, unread_bl)
    inputs = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state_bhpn, seq_idx_bl
    return inputs, unread_bl, lost_bl[:, -1]


def with_lost(outputs, unread_bl: Tensor | None, lost_b: Tensor | None):
    """A scan's y and final state, with NaN where `without_lost` says so."""
    if unread_bl is None:
        return outputs
    y_blhp, state_bhpn = outputs
    return filled(y_blhp, unread_bl, torch.nan), filled(state_bhpn, lost_b, torch.nan)


def attention_apart(attention):
    """An attention over keys and values of several documents, made safe from what is not finite."""

    @functools.wraps(attention)
    def apart(q_bhle, k_bjse, v_bjse, *, query_offset_b=None, seq_idx_bl=None):
        options = {"query_offset_b": query_offset_b, "seq_idx_bl": seq_idx_bl}
        if seq_idx_bl is None:
            return attention(q_bhle, k_bjse, v_bjse, **options)
        q, k, v = (t.transpose(1, 2) for t in (q_bhle, k_bjse, v_bjse))
        lost_bl = lost_positions(seq_idx_bl, k, v)
        blind_bl = lost_bl | not_finite(q)
        q, k, v = filled(q, blind_bl), filled(k, lost_bl), filled(v, lost_bl)
        o_bhle = attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        return filled(o_bhle.transpose(1, 2), blind_bl, torch.nan).transpose(1, 2)

    return apart


def each_document(attention):
    """An attention that takes the documents of a row one after another: no mask, and no product
    between documents, so that memory stays linear in the length of the row."""

    @functools.wraps(attention)
    def each(q_bhle, k_bjse, v_bjse, *, query_offset_b=None, seq_idx_bl=None):
        if seq_idx_bl is None:
            return attention(q_bhle, k_bjse, v_bjse, query_offset_b=query_offset_b)
        assert query_offset_b is None and seq_idx_bl.shape == (len(q_bhle), q_bhle.shape[2])
        rows = []
        for row, numbers_l in enumerate(seq_idx_bl):
            sizes = numbers_l.unique_consecutive(return_counts=True)[1].tolist()
            parts = (t[row : row + 1].split(sizes, 2) for t in (q_bhle, k_bjse, v_bjse))
            rows.append(torch.cat([attention(q, k, v) for q, k, v in zip(*parts)], 2))
        return torch.cat(rows)

    return each

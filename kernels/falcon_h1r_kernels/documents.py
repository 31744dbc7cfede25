"""Packed documents that are not finite, kept from their neighbours.

The kernels mask other documents with zeros inside products, and 0 * NaN is NaN. So what is not
finite enters a kernel as 0, and what depends on it is NaN: a document from there to its end.
Nothing here waits for the device.
"""

import torch
from torch import Tensor


def without_lost(seq_idx_bl: Tensor, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What later positions depend on: `lost_bl`, True from the first position of a document where
    any input (b, l, ...) is infinite or NaN to its end; and the inputs with zeros there."""
    bad_bl = torch.stack([not_finite(each) for each in inputs]).any(0)
    position_l = torch.arange(bad_bl.shape[1], device=bad_bl.device)
    latest_bl = torch.where(bad_bl, position_l, -1).cummax(1).values
    own_bl = seq_idx_bl.gather(1, latest_bl.clamp(min=0)) == seq_idx_bl
    lost_bl = (latest_bl >= 0) & own_bl
    return lost_bl, [fill(each, lost_bl) for each in inputs]


def keys_without_lost(k_bjse, v_bjse, seq_idx_bl, key_start_b, key_lengths_b):
    """`without_lost` of keys and values, of which those that no query sees may hold anything."""
    position_l = torch.arange(seq_idx_bl.shape[1], device=k_bjse.device)
    unseen_bl = torch.zeros_like(seq_idx_bl, dtype=torch.bool)
    if key_start_b is not None:
        unseen_bl |= position_l < key_start_b[:, None]
    if key_lengths_b is not None:
        unseen_bl |= position_l >= key_lengths_b[:, None]
    keys = (fill(t.transpose(1, 2), unseen_bl) for t in (k_bjse, v_bjse))
    lost_bl, keys = without_lost(seq_idx_bl, *keys)
    return lost_bl, *(t.transpose(1, 2) for t in keys)


def not_finite(inputs: Tensor) -> Tensor:
    """(b, l, ...) -> (b, l), True where any value is infinite or NaN."""
    return (inputs.flatten(2) * 0).sum(2) != 0  # NaN, then; several times as fast as isfinite


def fill(inputs: Tensor, where: Tensor, value: float = 0.0) -> Tensor:
    """`inputs` with `value` where a mask of their first axes is True."""
    return inputs.masked_fill(where.view(*where.shape, *(1,) * (inputs.ndim - where.ndim)), value)

"""Packed documents that are not finite, kept from their neighbours.

A product over several documents masks with zeros, and 0 * NaN is NaN. So what is not finite is
taken out before, with the rest of its document, which is causal and depends on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lost_positions(x_bld: Tensor, seq_idx_bl: Tensor) -> Tensor:
    """(b, l, 1), True from the first position of a document that is not finite to its end."""
    bad_bl = (~x_bld.isfinite()).flatten(2).any(2).int()
    count_bl = bad_bl.cumsum(1)
    starts_bl = F.pad(seq_idx_bl[:, 1:] != seq_idx_bl[:, :-1], (1, 0), value=True)
    before_bl = torch.where(starts_bl, count_bl - bad_bl, 0).cummax(1).values
    return (count_bl > before_bl)[..., None]

"""Branches turned off: what the rest of the model makes of a layer without its SSM, attention or
MLP. The branch adds 0 to the residual, its bias included; everything behind it runs as usual.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

MODULES = ("mamba", "self_attn", "feed_forward")  # in the order of contributions.BRANCHES
TOKENS = 4096  # per call of a block, of all variants together


def branch_off(block, x_bld: Tensor, span) -> Tensor:
    """One row x (1, l, d) through `block` three times, each without another branch: (3, l, d)."""
    with ExitStack() as stack:
        for row, name in enumerate(MODULES):

            def without(module, args, output, row=row):
                output = output.clone()
                output[row] = 0
                return output

            handle = getattr(block, name).register_forward_hook(without)
            stack.callback(handle.remove)
        return block(x_bld.repeat(3, 1, 1), span)


def advance(block, x_bld: Tensor, span) -> Tensor:
    """All variants so far through the next layer, a few rows at a time."""
    if not len(x_bld):
        return x_bld
    rows = max(1, TOKENS // x_bld.shape[1])
    return torch.cat([block(part, span) for part in x_bld.split(rows)])

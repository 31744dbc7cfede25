"""How long the SSM remembers, and what its state holds.

Axes: b rows, l tokens, h heads, p channels, g groups, n state size, t positions asked for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..derived import follow_states
from ..precision import compute_dtype

MASS = 0.9  # share of a row's absolute mass that a receptive field carries


def half_life(dt_blh: Tensor, A_h: Tensor) -> Tensor:
    """Tokens after which half of the state is left, if dt stayed: ln 2 / (-A dt), (b, l, h).

    Infinite where dt is 0.
    """
    return math.log(2) / (-A_h.double() * dt_blh.double())


def decay(dt_blh: Tensor, A_h: Tensor) -> Tensor:
    """exp(dt A): the share of the state that one token leaves, (b, l, h)."""
    return (dt_blh.double() * A_h.double()).exp()


class Reach(NamedTuple):
    """Integers, one per row of the matrix."""

    latest: Tensor  # so many of the latest tokens, this one included, carry the mass
    fewest: Tensor  # so many tokens, wherever they stand, carry it


def receptive_field(matrix: Tensor, mass: float = MASS) -> Reach:
    """Of each row t of matrix (..., l, l), whose entries right of the diagonal are 0.

    The row's mass is the sum of |entries|; a row of zeros has 0 tokens. Sums are float64, and 1e-12
    of the mass may be missing: rounding can leave the sum of the whole row a little short.
    """
    size = matrix.double().abs()
    l = size.shape[-1]
    # Row t read backwards from its diagonal: entry r is the token r steps ago.
    step = torch.arange(l, device=size.device)
    index = (step[:, None] - step).clamp(min=0)
    latest = size.gather(-1, index.expand(size.shape)) * (step <= step[:, None])
    return Reach(*(_needed(part, mass) for part in (latest, size.sort(-1, descending=True)[0])))


def _needed(sizes: Tensor, mass: float) -> Tensor:
    total = sizes.sum(-1, keepdim=True)
    enough = sizes.cumsum(-1) >= (mass - 1e-12) * total
    return (enough.int().argmax(-1) + 1) * (total[..., 0] > 0)


class States(NamedTuple):
    """Of the SSM state, per head; b rows."""

    norm: Tensor  # (b, h, l) Frobenius norm after each token
    rank: Tensor  # (b, h, t) numerical rank at `positions`
    effective_rank: Tensor  # (b, h, t) exp of the entropy of the singular values
    positions: Tensor  # (t,)


def states(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    initial_state_bhpn: Tensor | None = None,
    most: int = 128,
) -> States:
    """Measure the state after each token, without keeping the states.

    Ranks are taken at `most` positions at most, evenly spaced, the last among them.
    Numerical rank: singular values above max(p, n) * eps * the largest, eps of `compute_dtype`.
    Effective rank (Roy and Vetterli 2007): exp of the entropy of the singular values over their
    sum; it counts how many directions matter, and need not be whole. Both are 0 for a zero state.
    """
    l, work = x_blhp.shape[1], compute_dtype(x_blhp)
    longest = max(x_blhp.shape[-1], B_blgn.shape[-1])
    positions = torch.linspace(l - 1, 0, min(l, most)).round().long().flip(0)
    asked = set(positions.tolist())
    norms, ranks, effective = [], [], []
    for t, state in enumerate(follow_states(x_blhp, dt_blh, A_h, B_blgn, initial_state_bhpn)):
        norms.append(state.flatten(2).norm(dim=-1))
        if t in asked:
            values = torch.linalg.svdvals(state)
            least = longest * torch.finfo(work).eps * values[..., :1]
            ranks.append(((values > least) & (values > 0)).sum(-1))
            effective.append(_effective_rank(values))
    stacked = (torch.stack(parts, dim=-1) for parts in (norms, ranks, effective))
    return States(*stacked, positions)


def _effective_rank(values: Tensor) -> Tensor:
    values = values.double()
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)

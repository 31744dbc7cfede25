"""What each branch adds to the residual, and what of a logit it makes.

Axes: t tokens, d model width, n layers, a branches in the order of BRANCHES.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BRANCHES = ("ssm", "attention", "mlp")


class Sizes(NamedTuple):
    """Of one layer, each (a, t)."""

    before: Tensor  # Euclidean norm of the residual that the branch is added to
    norm: Tensor  # Euclidean norm of what the branch adds
    cosine: Tensor  # with the residual that it is added to; 0 where one of them is 0


def sizes(added_atd: Tensor, before_atd: Tensor) -> Sizes:
    """added_atd: what each branch adds, after its multiplier; before_atd: what it is added to.

    The SSM and attention are added to the block's input, the MLP to the sum of all three.
    """
    added, before = added_atd.double(), before_atd.double()
    norm, length = added.norm(dim=-1), before.norm(dim=-1)
    scale = norm * length
    product = (added * before).sum(-1)
    return Sizes(length, norm, torch.where(scale > 0, product / scale, torch.zeros_like(scale)))


class Attribution(NamedTuple):
    """Parts of the logit of one token per position; their sum is that logit."""

    embedding: Tensor  # (t,)
    branches: Tensor  # (n, a, t)
    rounding: Tensor  # (t,): the model's logit less all of the above


def attribute(
    embedding_td: Tensor,
    added_natd: Tensor,
    residual_td: Tensor,
    norm_weight_d: Tensor,
    eps: float,
    head_td: Tensor,
    multiplier: float,
    logit_t: Tensor,
) -> Attribution:
    """Direct logit attribution, with the final norm's scale as it was in the forward.

    A logit is linear in the last residual once the norm's 1 / rms is taken as given, and the last
    residual is the embedding plus everything that was added: so each summand has its part. What a
    branch does through later layers is theirs.

    residual_td: the last residual; norm_weight_d, eps: of final_layernorm; head_td: the head's row
    of the token that is explained at each position; multiplier: lm_head_multiplier; logit_t: the
    model's own logit of that token. Computed and returned in float64.
    """
    residual = residual_td.double()
    scale_t1 = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    direction_td = head_td.double() * norm_weight_d.double() * scale_t1 * multiplier
    embedding = (embedding_td.double() * direction_td).sum(-1)
    branches = torch.stack(
        [(added_atd.double() * direction_td).sum(-1) for added_atd in added_natd]
    )
    return Attribution(embedding, branches, logit_t.double() - embedding - branches.sum(dim=(0, 1)))

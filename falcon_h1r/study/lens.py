"""The logit lens: what the head would say after each layer.

Axes: t tokens, d model width, w vocabulary, k best tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..precision import compute_dtype, scaled


class Lens(NamedTuple):
    """Of one residual."""

    top_ids: Tensor  # (t, k) likeliest tokens, first the likeliest
    top_probabilities: Tensor  # (t, k)
    kl: Tensor  # (t,) nats: KL(final distribution || this one), 0 at the last layer
    rank: Tensor  # (t - 1,) place of the true next token, 1 the likeliest; shared by equals


def head_logits(x_td: Tensor, norm, head_wd: Tensor, multiplier: float) -> Tensor:
    """Final norm and head as the model applies them: (t, w) in `compute_dtype`.

    norm: the module final_layernorm; head_wd: weight of lm_head, or of the tied embedding.
    """
    return scaled(F.linear(norm(x_td), head_wd).to(compute_dtype(x_td)), multiplier)


def lens(logits_tw: Tensor, final_tw: Tensor, ids_t: Tensor, k: int = 5) -> Lens:
    """Compare the logits of one layer with the model's own; ids_t: the tokens themselves."""
    log_p, log_q = final_tw.double().log_softmax(-1), logits_tw.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
    values, top = log_q.topk(min(k, log_q.shape[-1]), dim=-1)
    own = logits_tw[:-1].gather(-1, ids_t[1:, None])
    rank = (logits_tw[:-1] > own).sum(-1) + 1
    return Lens(top, values.exp(), kl, rank)


def token_losses(logits_tw: Tensor, ids_t: Tensor) -> Tensor:
    """-log p of each next token, (t - 1,) nats in float64."""
    return F.cross_entropy(logits_tw[:-1].double(), ids_t[1:], reduction="none")

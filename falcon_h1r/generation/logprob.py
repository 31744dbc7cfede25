"""What a distribution over the vocabulary says of a token and of itself; plain torch.

Axes: m rows, v vocabulary. The kernel of the same name, `falcon_h1r_kernels.logprob`, takes one
pass where this takes several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import compute_dtype


class LogProb(NamedTuple):
    """Three numbers per row, in nats: each (m,) float32, or float64 from float64 logits."""

    chosen_m: Tensor  # log-probability of the given token
    entropy_m: Tensor  # of the whole distribution
    top_k_mean_m: Tensor  # mean log-probability of the k likeliest tokens


def logprob(
    logits_mv: Tensor, chosen_m: Tensor, *, k: int = 20, multiplier: float = 1.0
) -> LogProb:
    """Of softmax(multiplier * logits): log-probability of a token, entropy, mean over the top k.

    logits_mv: (m, v); -inf forbids a token. chosen_m: (m,) token ids; one outside the vocabulary
    raises. k: 1 to v; with fewer allowed tokens the mean is -inf. Minus the mean is the token
    confidence of DeepConf (arXiv 2508.15260), which takes k = 20.
    """
    m, v = logits_mv.shape
    assert chosen_m.shape == (m,) and 1 <= k <= v, (chosen_m.shape, k, v)
    work = compute_dtype(logits_mv)
    logp_mv = (logits_mv.to(work) * multiplier).log_softmax(-1)
    chosen = logp_mv.gather(1, chosen_m.long()[:, None])[:, 0]
    # Not xlogy(p, p): a forbidden token has p = 0 and log p = -inf, and counts for nothing.
    entropy = -(logp_mv.exp() * logp_mv.clamp(min=torch.finfo(work).min)).sum(-1)
    return LogProb(chosen, entropy, logp_mv.topk(k).values.mean(-1))

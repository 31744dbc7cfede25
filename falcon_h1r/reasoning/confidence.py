"""How sure a trace is: DeepConf's confidences (arXiv 2508.15260, section 3), exact and incremental.

The confidence of a token is minus the mean log-probability of the k = 20 likeliest tokens of the
model's unmodified distribution, before temperature, penalties and filters: high where the
distribution is peaked. It is kept in float32, and what is kept is what every measure is made of.

Sums are sums of integers: a confidence is taken as a multiple of 2**-28, which represents every
float32 above 1/16 without rounding. A running sum is then the sum, however long it runs and in
whatever order it was made, and a decision made live is the decision made again from a record.

Axes: r rows, v vocabulary, k likeliest tokens, n tokens of a trace.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_integer
from ..generation.logprob import logprob

TOP_K = 20
WINDOW = 2048
MEASURES = ("mean", "lowest-group", "bottom-10", "tail")

_BITS = 28
# 2**63 = _MOST * MOST_TOKENS * 2**_BITS, so that no sum overflows.
_MOST, MOST_TOKENS = 2**14, 2**21


def confidence_of_logits(logits_rv: Tensor, k: int = TOP_K) -> Tensor:
    """(r,) float32 from logits (r, v) before any processing; float64 logits are used as such."""
    check_integer("k", k, 1, logits_rv.shape[-1])
    first = logits_rv.new_zeros(len(logits_rv), dtype=torch.int64)
    return -logprob(logits_rv, first, k=k).top_k_mean_m.float()


def token_confidence(top_logprobs: Tensor, k: int = TOP_K) -> Tensor:
    """(...) float32 from the log-probabilities (..., at least k) of the likeliest tokens.

    top_logprobs: in any order, as many as there are; the k largest count, so that an entry added
    for a sampled token outside them does not. The mean is taken in float64. Raises ValueError with
    fewer than k, or where one of them is not finite or above 0.
    """
    check_integer("k", k, 1, top_logprobs.shape[-1])
    kept = top_logprobs.double().topk(k).values
    # A little above 0 is rounding of a log-softmax.
    if not bool((kept.isfinite() & (kept < 1e-3)).all()):
        raise ValueError("top_logprobs: expected finite log-probabilities, found others")
    return (-kept.mean(-1)).clamp(min=0).float()


def _units(confidence: Tensor) -> Tensor:
    """Confidences as int64 multiples of 2**-28."""
    return (confidence.double() * 2**_BITS).round().long()


def _checked(confidence: Tensor) -> Tensor:
    """Confidences as float32; ValueError for others than `_units` can take."""
    values = confidence.detach().cpu().float()
    if not bool(((values >= 0) & (values < _MOST)).all()):
        raise ValueError(f"confidence: expected finite numbers in 0 .. {_MOST}, found others")
    return values


def _mean(sums: Tensor, counts: Tensor | int) -> Tensor:
    """float64; the one division by which sums of units become confidences."""
    return sums.double() / 2.0**_BITS / counts


class RunningConfidence:
    """Means over the last `window` tokens and over all tokens, for many traces side by side.

    rows: how many traces; row i is trace i of the caller. Memory: 4 * rows * window bytes.
    """

    def __init__(self, rows: int, window: int = WINDOW):
        check_integer("rows", rows, 1, 2**31)
        check_integer("window", window, 1, MOST_TOKENS)
        self.window = window
        self.counts = torch.zeros(rows, dtype=torch.int64)
        self._totals = torch.zeros(rows, dtype=torch.int64)
        self._sums = torch.zeros(rows, dtype=torch.int64)
        self._ring = torch.zeros(rows, window)
        self._lowest = torch.full((rows,), math.inf, dtype=torch.float64)

    def update(self, rows: Tensor, confidence: Tensor) -> Tensor:
        """Add a token to some rows, each named once; confidence: (r,). Returns `group(rows)`."""
        confidence = _checked(confidence)
        new = _units(confidence)
        if bool((self.counts[rows] >= MOST_TOKENS).any()):
            raise ValueError(f"more than {MOST_TOKENS} tokens in a trace")
        slots = self.counts[rows] % self.window
        old = _units(self._ring[rows, slots])  # 0 until the window is full
        self._ring[rows, slots] = confidence
        self._sums[rows] += new - old
        self._totals[rows] += new
        self.counts[rows] += 1
        group = self.group(rows)
        lowest = torch.minimum(self._lowest[rows], group)
        self._lowest[rows] = torch.where(self.full(rows), lowest, self._lowest[rows])
        return group

    def group(self, rows: Tensor) -> Tensor:
        """(r,) float64: mean of the last `window` tokens, or of all if fewer; NaN of none."""
        return _mean(self._sums[rows], self.counts[rows].clamp(max=self.window))

    def full(self, rows: Tensor) -> Tensor:
        """(r,) bool: whether there are `window` tokens."""
        return self.counts[rows] >= self.window

    def mean(self, rows: Tensor) -> Tensor:
        """(r,) float64: mean of all tokens."""
        return _mean(self._totals[rows], self.counts[rows])

    def lowest(self, rows: Tensor) -> Tensor:
        """(r,) float64: lowest group so far; the mean of all where no window is full yet."""
        return torch.where(self.full(rows), self._lowest[rows], self.group(rows))


class Measures(NamedTuple):
    """The measures of a whole trace, nats; `of(name)` takes the names in `MEASURES`."""

    mean: float
    lowest_group: float
    bottom_10: float
    tail: float

    def of(self, name: str) -> float:
        return self[MEASURES.index(name)]


def group_confidences(confidence_n: Tensor, window: int = WINDOW) -> Tensor:
    """(n - window + 1,) float64: means of all full windows, stride 1.

    A trace shorter than the window is one group, (1,).
    """
    check_integer("window", window, 1, MOST_TOKENS)
    if len(confidence_n) == 0:
        raise ValueError("a trace without tokens has no confidence")
    if len(confidence_n) > MOST_TOKENS:
        raise ValueError(f"more than {MOST_TOKENS} tokens in a trace")
    sums = torch.nn.functional.pad(_units(_checked(confidence_n)).cumsum(0), (1, 0))
    width = min(window, len(confidence_n))
    return _mean(sums[width:] - sums[:-width], width)


def trace_measures(confidence_n: Tensor, window: int = WINDOW, tail: int | None = None) -> Measures:
    """All measures of a trace from the confidences (n,) of its tokens.

    mean: of all tokens. lowest-group: the least of `group_confidences`. bottom-10: mean of the
    lowest tenth of them, rounded down to whole windows, at least one. tail: mean of the last `tail`
    tokens (None: as many as the window), of all where there are fewer.
    """
    groups = group_confidences(confidence_n, window)
    tail = window if tail is None else tail
    lowest = groups.sort().values[: max(1, len(groups) // 10)].tolist()
    return Measures(
        mean=float(group_confidences(confidence_n, len(confidence_n))[0]),
        lowest_group=lowest[0],
        bottom_10=math.fsum(lowest) / len(lowest),
        tail=float(group_confidences(confidence_n, tail)[-1]),
    )


def first_below(confidence_n: Tensor, threshold: float, window: int = WINDOW) -> int | None:
    """Tokens after which a full window first lies below a threshold; None if none ever does."""
    if len(confidence_n) < window:
        return None
    below = (group_confidences(confidence_n, window) < threshold).nonzero()
    return None if len(below) == 0 else int(below[0, 0]) + window

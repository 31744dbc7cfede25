"""DeepConf's policies as data, and the offline vote (arXiv 2508.15260, sections 3 and 4).

Offline: all traces are there; each votes with a weight, perhaps after the least sure were left out.
Online: `DeepConf` says when `online.OnlinePolicy` stops traces and when no more are needed.

Where the paper and its code differ, the paper's form is the default and the other one a parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..checks import check_integer, check_number, refuse
from .answers import Equality, Vote, vote
from .confidence import MEASURES, MOST_TOKENS, TOP_K, WINDOW, Measures

MAJORITY = "majority"
PERCENTILE_METHODS = ("linear", "lower", "higher", "nearest", "midpoint")


class _Policy:
    def _check_choice(self, name: str, *accepted) -> None:
        if getattr(self, name) not in accepted:
            refuse(name, getattr(self, name), f"one of {accepted}")

    def _check_windows(self) -> None:
        check_integer("window", self.window, 1, MOST_TOKENS)
        check_integer("tail", self.tail, 1, MOST_TOKENS, none=True)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Offline(_Policy):
    """A vote over finished traces.

    weight: `majority` (every trace 1), or the measure of `confidence.MEASURES` that weighs.
    keep: percentage of traces that vote, the surest (the paper takes 10 and 90): those whose
        measure reaches the (100 - keep)-th percentile of all that have an answer; None: all.
    keep_by: the measure that decides who is kept; None: the weight, which then is a measure.
    window, tail: tokens in a group and in the tail (None: as the window).
    budget: only the first so many traces, by number; None: all.

    Raises ValueError, naming the parameter, for a value outside its range.
    """

    weight: str = MAJORITY
    keep: float | None = None
    keep_by: str | None = None
    window: int = WINDOW
    tail: int | None = None
    budget: int | None = None

    def __post_init__(self):
        check_integer("budget", self.budget, 1, none=True)
        self._check_choice("weight", *MEASURES, MAJORITY)
        self._check_choice("keep_by", *MEASURES, None)
        check_number("keep", self.keep, above=0, most=100, none=True)
        self._check_windows()
        if self.keep is not None and self.keep_by is None and self.weight == MAJORITY:
            raise ValueError("keep: a majority has no measure to keep traces by; give keep_by")


@dataclass(frozen=True, kw_only=True)
class DeepConf(_Policy):
    """Online DeepConf (the paper's algorithm 2) with every number it has; default: DeepConf-low.

    k: likeliest tokens in a token's confidence.
    window, tail: tokens in a group and in the tail (None: as the window).
    warmup: traces that run to their end first, N_init; their lowest groups set the threshold.
    budget: most traces, the warm-up included, K.
    eta: percentage of warm-up traces to be at or above the threshold.
    percentile: where among the warm-up's lowest groups the threshold lies; None: 100 - eta, as in
        DeepConf. Falcon-H1R's report (arXiv 2601.02346) can be read as eta itself.
    percentile_method: between two traces, as in numpy.percentile; the authors' code is linear.
    margin: nats by which a group must be below the threshold to count as below. The paper has none,
        hence 0. Traces that say the same up to their lowest group differ there by the rounding of
        batches of other widths only (some 1e-6 in float32), which a margin of 1e-4 leaves out.
    tau: the vote ends all once the leader has this part of all weight; None: never.
    min_voters: and once this many traces vote. The paper has no such number, hence 1: with eta 10
        and 16 traces of warm-up two may vote at its end, and end all if they agree.
    weight: of a vote: a measure, or `majority`.
    filter: a trace whose lowest group is below the threshold does not vote, even though it came to
        its end; filter_warmup: nor if it is one of the warm-up.

    A trace stops when the mean confidence of its last `window` tokens is below the threshold, not
    at it, and never before it has that many tokens.

    Raises ValueError, naming the parameter, for a value outside its range.
    """

    k: int = TOP_K
    window: int = WINDOW
    tail: int | None = None
    warmup: int = 16
    budget: int = 512
    eta: float = 10.0
    percentile: float | None = None
    percentile_method: str = "linear"
    margin: float = 0.0
    tau: float | None = 0.95
    min_voters: int = 1
    weight: str = "lowest-group"
    filter: bool = True
    filter_warmup: bool = True

    def __post_init__(self):
        for name in ("k", "warmup", "budget", "min_voters"):
            check_integer(name, getattr(self, name), 1)
        self._check_windows()
        if self.budget < self.warmup:
            refuse("budget", self.budget, f"at least warmup, {self.warmup}")
        check_number("eta", self.eta, above=0, most=100)
        check_number("percentile", self.percentile, 0, 100, none=True)
        self._check_choice("percentile_method", *PERCENTILE_METHODS)
        check_number("margin", self.margin, 0)
        check_number("tau", self.tau, above=0, most=1, none=True)
        self._check_choice("weight", *MEASURES, MAJORITY)
        for name in ("filter", "filter_warmup"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, getattr(self, name), "True or False")

    def threshold(self, lowest_groups: list[float]) -> float:
        """From the lowest groups of the warm-up traces, answered or not."""
        position = 100 - self.eta if self.percentile is None else self.percentile
        return percentile(lowest_groups, position, self.percentile_method)


PRESETS: dict[str, DeepConf] = {
    "low": DeepConf(eta=10.0),  # strict: at the 90th percentile of the warm-up
    "high": DeepConf(eta=90.0),  # lenient: at the 10th
    # As the authors' code: no consensus ends the run, all traces of the budget are started.
    "low-authors": DeepConf(eta=10.0, tau=None),
    "high-authors": DeepConf(eta=90.0, tau=None),
}


def percentile(values: list[float], position: float, method: str = "linear") -> float:
    """numpy.percentile of a list that is not empty."""
    import numpy

    return float(
        numpy.percentile(numpy.asarray(values, dtype=numpy.float64), position, method=method)
    )


class Ballot(NamedTuple):
    """A finished trace in an offline vote."""

    trace: int
    answer: str | None
    measures: Measures


def offline_vote(
    ballots: Iterable[Ballot], policy: Offline, equality: Equality | None = None
) -> Vote:
    """The vote of an `Offline` policy; a trace without an answer neither votes nor counts for it.

    The measures must have been taken with the policy's window and tail.
    """
    most = math.inf if policy.budget is None else policy.budget
    answered = [b for b in ballots if b.answer is not None and b.trace < most]
    if policy.keep is not None and answered:
        by = policy.keep_by or policy.weight
        values = [ballot.measures.of(by) for ballot in answered]
        bar = percentile(values, 100 - policy.keep)
        answered = [ballot for ballot, value in zip(answered, values) if value >= bar]
    return vote(
        ((b.trace, b.answer, weight_of(b.measures, policy.weight)) for b in answered), equality
    )


def weight_of(measures: Measures, name: str) -> float:
    """What a trace's vote weighs."""
    return 1.0 if name == MAJORITY else measures.of(name)

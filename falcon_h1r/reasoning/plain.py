"""Plain sampling behind the interface of `OnlinePolicy`: all traces to their end, then a vote."""

from __future__ import annotations

from dataclasses import replace

import torch

from .confidence import TOP_K, Measures, trace_measures
from .deepconf import MAJORITY, Ballot, DeepConf, Offline, offline_vote, weight_of
from .online import OnlinePolicy, OnlineResult


class PlainPolicy(OnlinePolicy):
    """One question's traces under an `Offline` policy: as many as its budget, none is stopped.

    k: likeliest tokens in a token's confidence. Further arguments: of `OnlinePolicy`.
    done: "" while traces run; then `all` or `interrupted`. `result().vote` is `offline_vote`'s over
    the traces that came to their end, `unfiltered` the same with all of them kept.

    Raises ValueError for a policy without a budget.
    """

    def __init__(self, offline: Offline, *, k: int = TOP_K, **options):
        if offline.budget is None:
            raise ValueError("budget is None, expected the number of traces to sample")
        # A warm-up that is all there is: no threshold ever comes to stop a trace by.
        params = DeepConf(
            k=k,
            window=offline.window,
            tail=offline.tail,
            warmup=offline.budget,
            budget=offline.budget,
            tau=None,
            filter=False,
            weight=MAJORITY,
        )
        super().__init__(params, **options)
        self.offline = offline
        self._kept = {}
        self._measures: dict[int, Measures] = {}

    def result(self) -> OnlineResult:
        base, offline, measures = super().result(), self.offline, self._measures
        ballots = [Ballot(t, self.answer(t), measures[t]) for t in sorted(measures)]
        tally = offline_vote(ballots, offline, self._equality)
        voters = {trace for candidate in tally.candidates for trace in candidate.traces}
        return replace(
            base,
            answer=tally.answer,
            vote=tally,
            unfiltered=offline_vote(ballots, replace(offline, keep=None), self._equality),
            traces=tuple(
                replace(
                    outcome,
                    weight=weight_of(measures[outcome.trace], offline.weight)
                    if outcome.trace in voters
                    else None,
                )
                for outcome in base.traces
            ),
            params=offline,
        )

    def _weight(self, trace: int) -> float:
        confidence = torch.tensor(self._kept.pop(trace))
        self._measures[trace] = trace_measures(confidence, self.offline.window, self.offline.tail)
        return weight_of(self._measures[trace], self.offline.weight)

    def _end_warmup(self) -> None:
        self.done = "all"
        self._note("all")

"""Online DeepConf: which traces run, which stop, and when no more are needed.

`OnlinePolicy` decides; whoever makes the tokens, an engine or a record, asks it and obeys:

    while not policy.done:
        for trace in policy.start(free_slots):
            begin(trace, seed=policy.seeds[trace])
        traces, tokens, confidence, finished = one_step()
        for trace, reason in policy.step(traces, tokens, confidence, finished).items():
            end(trace, reason)
    result = policy.result()

A decision depends on the confidences and answers that came so far, and on which steps they came in,
not on the order of rows within a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..generation import SamplingParams, derive_seeds
from .answers import Classes, Equality, Vote, vote
from .confidence import RunningConfidence, trace_measures
from .deepconf import MAJORITY, DeepConf, Offline
from .extract import Extractor, make_extractor

LOW, CONSENSUS, INTERRUPTED = "low_confidence", "consensus", "interrupted"
NATURAL = ("stop", "stop_string", "length")


class Ended(NamedTuple):
    """How a trace came to its own end. reason: `stop`, `stop_string` or `length`."""

    reason: str
    text: str


class Event(NamedTuple):
    """A decision. what: `start`, `end` (value: reason), `low_confidence` (value: its group),
    `threshold` (value), `consensus` (value: share; or of one trace), `budget`, `interrupted`."""

    step: int
    what: str
    trace: int | None = None
    value: float | str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one trace. answer: None if it was stopped, or gave none. weight: of its vote,
    None if it has none. mean, lowest_group: None of no tokens."""

    trace: int
    seed: int
    tokens: int
    reason: str
    answer: str | None
    mean: float | None
    lowest_group: float | None
    weight: float | None


@dataclass(frozen=True)
class OnlineResult:
    """answer: the weighted vote's, None where no trace with a vote gave one. unfiltered: the same
    vote without the threshold. done: `consensus`, `budget`, `interrupted`, "" while running, or
    `all` of a `plain.PlainPolicy`, whose params are an `Offline`. traces: all that were started, by
    number. log: every decision."""

    answer: str | None
    vote: Vote
    unfiltered: Vote
    threshold: float | None
    done: str
    traces: tuple[Outcome, ...]
    log: tuple[Event, ...]
    params: DeepConf | Offline

    @property
    def tokens(self) -> int:
        """Of all traces, those that were stopped included."""
        return sum(trace.tokens for trace in self.traces)

    def count(self, reason: str) -> int:
        """How many traces ended for a reason."""
        return sum(trace.reason == reason for trace in self.traces)

    def to_dict(self) -> dict:
        """For JSON."""
        values = asdict(self)
        for name in ("vote", "unfiltered"):
            tally: Vote = getattr(self, name)
            values[name] = {
                **tally._asdict(),
                "candidates": [candidate._asdict() for candidate in tally.candidates],
            }
        values["log"] = [event._asdict() for event in self.log]
        return {**values, "tokens": self.tokens}


class OnlinePolicy:
    """One question's traces under a `DeepConf`.

    seed: trace i has seed + i modulo 2**63, as `derive_seeds` gives it; None draws a fresh one.
    equality: how answers are compared; None: `Equality()`.
    extractor: reads the answer out of a finished trace's text; a description is one of
        `make_extractor`.
    stop_token_ids: all tokens that end a trace. Given, `step` refuses a trace that goes on behind
        one of them, or stops without.

    done: "" while traces may run; then `consensus`, `budget` or `interrupted`. threshold: None
    until the warm-up has ended. steps: how many were taken.
    """

    def __init__(
        self,
        params: DeepConf,
        *,
        seed: int | None = None,
        equality: Equality | None = None,
        extractor: str | Extractor = "boxed",
        stop_token_ids: Iterable[int] | None = None,
    ):
        self.params = params
        self.seeds = derive_seeds(SamplingParams(seed=seed, n=params.budget), 1)
        self.threshold: float | None = None
        self.done = ""
        self.steps = 0
        self.log: list[Event] = []
        self._extract = make_extractor(extractor) if isinstance(extractor, str) else extractor
        self._stops = None if stop_token_ids is None else torch.tensor(sorted(stop_token_ids))
        self._equality = equality or Equality()
        # Of those that may vote, and of all: those who are in it make a class.
        self._classes = {kind: Classes(self._equality) for kind in (True, False)}
        self._running: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._answers: dict[int, str] = {}
        self._weights: dict[int, float] = {}
        self._started = 0
        self._confidence = RunningConfidence(params.budget, params.window)
        # These two measures need all confidences of a trace; the others are kept up as they come.
        keep = params.weight in ("bottom-10", "tail")
        self._kept: dict[int, list[float]] | None = {} if keep else None

    @property
    def running(self) -> tuple[int, ...]:
        """Traces that were started and have not ended, ascending."""
        return tuple(sorted(self._running))

    def waiting(self) -> int:
        """How many traces may be started now: the warm-up's, then, once it has ended, the rest."""
        if self.done:
            return 0
        allowed = self.params.warmup if self.threshold is None else self.params.budget
        return allowed - self._started

    def start(self, slots: int | None = None) -> list[int]:
        """Start as many traces as may be and `slots` allows; their numbers, in order."""
        count = self.waiting() if slots is None else min(self.waiting(), max(0, slots))
        numbers = list(range(self._started, self._started + count))
        self._started += count
        self._running.update(numbers)
        self._note("start", numbers)
        if self._kept is not None:
            self._kept.update((number, []) for number in numbers)
        return numbers

    def step(
        self,
        traces: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        finished: Mapping[int, Ended] | None = None,
    ) -> dict[int, str]:
        """One new token in some running traces, each at most once; which traces end now, and why.

        traces, tokens: (r,) integers; confidence: (r,) of `confidence.token_confidence`.
        finished: the traces among them that came to their own end with this token.
        Returns trace -> `low_confidence` or `consensus`, of traces that are to make no more tokens.

        Raises ValueError for traces that are not running or named twice, and see `stop_token_ids`.
        """
        traces = torch.as_tensor(traces, device="cpu").long()
        finished = dict(finished or {})
        self._check(traces, tokens, confidence, finished)
        group = self._confidence.update(traces, confidence)
        if self._kept is not None:
            for trace, value in zip(traces.tolist(), confidence.float().tolist()):
                self._kept[trace].append(value)
        stops: dict[int, str] = {}
        if self.threshold is not None:
            below = self._confidence.full(traces) & (group < self.threshold - self.params.margin)
            low = sorted(zip(traces[below].tolist(), group[below].tolist()))
            for trace, value in low:
                if trace not in finished:
                    stops[trace] = LOW
                    self._end(trace, LOW, value)
        for trace in sorted(finished):
            reason, text = finished[trace]
            self._end(trace, reason, self._extract(text))
        if self.threshold is None and self._started == self.params.warmup and not self._running:
            self._end_warmup()
        self._finish(stops, bool(finished))
        self.steps += 1
        return stops

    def interrupt(self) -> list[int]:
        """End everything now; the traces that were running. The result is of what there is."""
        ended = list(self.running)
        if not self.done:
            self.done = INTERRUPTED
            self._note(INTERRUPTED)
            for trace in ended:
                self._end(trace, INTERRUPTED)
        return ended

    def result(self) -> OnlineResult:
        """What is known so far; `done` says whether it is final."""
        filtered, unfiltered = self._vote(True), self._vote(False)
        voters = {trace for candidate in filtered.candidates for trace in candidate.traces}
        rows = torch.arange(self._started)
        counts = self._confidence.counts[rows].tolist()
        means = self._confidence.mean(rows).tolist()
        lowest = self._confidence.lowest(rows).tolist()
        traces = [
            Outcome(
                trace=i,
                seed=self.seeds[i],
                tokens=counts[i],
                reason=self._reasons.get(i, "running"),
                answer=self._answers.get(i),
                mean=means[i] if counts[i] else None,
                lowest_group=lowest[i] if counts[i] else None,
                weight=self._weights[i] if i in voters else None,
            )
            for i in range(self._started)
        ]
        return OnlineResult(
            answer=filtered.answer,
            vote=filtered,
            unfiltered=unfiltered,
            threshold=self.threshold,
            done=self.done,
            traces=tuple(traces),
            log=tuple(self.log),
            params=self.params,
        )

    def live(self, traces: Iterable[int]) -> list[tuple[int, float, float]]:
        """(tokens, current group, mean) of traces; NaN in place of means of no tokens."""
        rows = torch.tensor(list(traces), dtype=torch.int64)
        values = self._confidence
        counts, groups = values.counts[rows].tolist(), values.group(rows).tolist()
        return list(zip(counts, groups, values.mean(rows).tolist()))

    def answer(self, trace: int) -> str | None:
        """Of a trace that came to its own end; None of others, and where it gave none."""
        return self._answers.get(trace)

    def _check(self, traces, tokens, confidence, finished) -> None:
        numbers = traces.tolist()
        if self.done:
            raise ValueError(f"the policy is done ({self.done}) and takes no more tokens")
        if len(numbers) != len(set(numbers)) or not len(numbers) == len(tokens) == len(confidence):
            raise ValueError("traces, tokens and confidence: one of each per trace, no trace twice")
        for trace in (*numbers, *finished):
            if trace not in self._running:
                raise ValueError(f"trace {trace} is not running")
        for trace, (reason, _) in finished.items():
            if trace not in numbers:
                raise ValueError(f"trace {trace} finished, but has no token in this step")
            if reason not in NATURAL:
                raise ValueError(f"trace {trace} finished with {reason!r}, expected {NATURAL}")
        if self._stops is None:
            return
        stopping = torch.isin(torch.as_tensor(tokens).cpu(), self._stops).tolist()
        for trace, stop in zip(numbers, stopping):
            reason = finished[trace].reason if trace in finished else "none"
            if stop != (reason == "stop"):
                kind = "a stop token" if stop else "no stop token"
                raise ValueError(f"trace {trace} has {kind}, and its finish reason is {reason}")

    def _end(self, trace: int, reason: str, value: float | str | None = None) -> None:
        self._running.discard(trace)
        self._reasons[trace] = reason
        if reason not in NATURAL:
            if reason != INTERRUPTED:
                self._note(reason, [trace], value)
            return
        self._note("end", [trace], reason)
        if value is not None:
            self._answers[trace] = value
        self._weights[trace] = self._weight(trace)

    def _end_warmup(self) -> None:
        lowest = self._confidence.lowest(torch.arange(self.params.warmup))
        self.threshold = self.params.threshold(lowest.tolist())
        self._classes[True] = Classes(self._equality)
        self._note("threshold", value=self.threshold)

    def _weight(self, trace: int) -> float:
        params, row = self.params, torch.tensor([trace])
        if params.weight == MAJORITY:
            return 1.0
        if self._kept is not None:
            confidence = torch.tensor(self._kept[trace])
            return trace_measures(confidence, params.window, params.tail).of(params.weight)
        values = self._confidence.mean if params.weight == "mean" else self._confidence.lowest
        return float(values(row)[0])

    def _vote(self, filtered: bool) -> Vote:
        traces = sorted(self._answers)
        if filtered and self.threshold is not None and self.params.filter:
            lowest = self._confidence.lowest(torch.tensor(traces, dtype=torch.int64)).tolist()
            spared = 0 if self.params.filter_warmup else self.params.warmup
            bar = self.threshold - self.params.margin
            traces = [t for t, value in zip(traces, lowest) if value >= bar or t < spared]
        ballots = [(t, self._answers[t], self._weights[t]) for t in traces]
        return vote(ballots, classes=self._classes[filtered])

    def _finish(self, stops: dict[int, str], voted: bool) -> None:
        """Whether this step was the last; adds the traces that the consensus ends to `stops`."""
        if self.threshold is None:
            return
        if voted and self.params.tau is not None and self._agreed(tally := self._vote(True)):
            self.done = CONSENSUS
            self._note(CONSENSUS, value=tally.share)
            for trace in self.running:
                stops[trace] = CONSENSUS
                self._end(trace, CONSENSUS)
        elif self._started == self.params.budget and not self._running:
            self.done = "budget"
            self._note("budget")

    def _agreed(self, tally: Vote) -> bool:
        voters = sum(len(candidate.traces) for candidate in tally.candidates)
        return tally.share >= self.params.tau and voters >= self.params.min_voters

    def _note(self, what: str, traces: list[int] | None = None, value=None) -> None:
        for trace in [None] if traces is None else traces:
            self.log.append(Event(self.steps, what, trace, value))

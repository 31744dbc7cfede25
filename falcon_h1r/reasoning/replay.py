"""Any policy applied to recorded traces, without a model.

Offline policies vote over the record's traces. Online ones run: `OnlinePolicy` is fed what the
record holds, as an engine fed it live. In which order, is one of

recorded     as the tokens arrived in the run that made the record. With that run's own policy every
             decision, stop position and count comes out as it did then.
simulated    as an engine with `parallel` slots would have made them: every running trace gets one
             token per step, a free slot is taken at once. For policies that start or stop traces
             at other points than the recorded run.

A trace that the recorded run stopped says nothing of how it would have gone on: a policy that needs
to know is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer
from .answers import Equality, Vote
from .confidence import MEASURES, trace_measures
from .deepconf import MAJORITY, PRESETS, Ballot, DeepConf, Offline, offline_vote
from .extract import Extractor, make_extractor
from .online import INTERRUPTED, LOW, Ended, OnlinePolicy, OnlineResult
from .traces import Record, RecordedTrace

RECORDED, SIMULATED = "recorded", "simulated"
_ONLINE = {f"deepconf-{name}": params for name, params in PRESETS.items()}
POLICIES = (MAJORITY, *MEASURES, "deepconf", *_ONLINE)


@dataclass(frozen=True)
class Replayed:
    """What a policy makes of a record.

    right: whether the answer is the record's reference; None where it has none. tokens: spent,
    those of stopped traces up to their stop. all_tokens: of every trace run to its end; None where
    the record holds stopped ones. traces: that were started. stopped: by low confidence; cut: by
    the consensus. order: `recorded`, `simulated`, or None of an offline policy. online: the whole
    result of an online policy.
    """

    answer: str | None
    vote: Vote
    right: bool | None
    tokens: int
    all_tokens: int | None
    traces: int
    stopped: int = 0
    cut: int = 0
    done: str = "all"
    order: str | None = None
    online: OnlineResult | None = None


def make_policy(name: str, **options) -> Offline | DeepConf:
    """A policy by its name in `POLICIES`; what is None or not given keeps its default.

    options: fields of `DeepConf`. eta: percentage of traces kept: by the filter of an offline
    policy, or of `deepconf`'s warm-up. A majority keeps by the lowest group. An offline policy has
    eta, window, tail and budget alone.
    Raises ValueError for an unknown name, and for an option that the policy has not.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if name not in POLICIES:
        raise ValueError(f"policy {name!r}: known are {', '.join(POLICIES)}")
    if name in (MAJORITY, *MEASURES):
        keep = options.pop("eta", None)
        for option in options:
            if option not in ("window", "tail", "budget"):
                raise ValueError(f"{option}: the policy {name} has none, the online ones have")
        keep_by = "lowest-group" if name == MAJORITY and keep is not None else None
        return Offline(weight=name, keep=keep, keep_by=keep_by, **options)
    if "eta" in options and name in _ONLINE:
        raise ValueError(f"eta: {name} has its own, {_ONLINE[name].eta:g}; deepconf takes one")
    return dataclasses.replace(_ONLINE.get(name, DeepConf()), **options)


def recorded_policy(record: Record) -> Offline | DeepConf | None:
    """The policy of the run that made the record; ValueError where it is none of ours."""
    values = record.manifest.policy
    if values is None:
        return None
    try:
        return (Offline if "keep" in values else DeepConf)(**values)
    except TypeError as error:
        raise ValueError(f"{record.folder}: its policy is unknown here: {error}") from error


def replay(
    record: Record,
    policy: Offline | DeepConf,
    *,
    order: str | None = None,
    parallel: int | None = None,
    equality: Equality | None = None,
    extractor: str | Extractor | None = None,
) -> Replayed:
    """Apply a policy to a record.

    order: None: recorded if this is the policy of the recorded run, else simulated. parallel: slots
    of the simulation; None: as many as there are traces to start. equality: None: by the record's
    own rule. extractor: None: the answers are those that were recorded; else they are read anew.

    Raises ValueError where the record cannot tell what the policy would have done.
    """
    if not record.traces:
        raise ValueError(f"{record.folder}: holds no traces")
    equality = Equality(record.manifest.rule) if equality is None else equality
    extract = make_extractor(extractor) if isinstance(extractor, str) else extractor
    answers = {
        t.number: (t.answer if extract is None else extract(t.text)) if t.whole else None
        for t in record.traces
    }
    if isinstance(policy, Offline):
        return _offline(record, policy, equality, answers)
    if order is None:
        order = RECORDED if recorded_policy(record) == policy else SIMULATED
    if order not in (RECORDED, SIMULATED):
        raise ValueError(f"order is {order!r}, expected {RECORDED!r} or {SIMULATED!r}")
    check_integer("parallel", parallel, 1, none=True)
    run = _Run(record, policy, equality, answers)
    run.recorded() if order == RECORDED else run.simulated(parallel)
    result = run.policy.result()
    return Replayed(
        answer=result.answer,
        vote=result.vote,
        right=_right(record, result.answer, equality),
        tokens=result.tokens,
        all_tokens=_all_tokens(record),
        traces=len(result.traces),
        stopped=result.count(LOW),
        cut=result.count("consensus"),
        done=result.done,
        order=order,
        online=result,
    )


def _offline(record, policy, equality, answers) -> Replayed:
    traces = record.traces
    if policy.budget is not None:
        traces = [trace for trace in traces if trace.number < policy.budget]
        if len(traces) < policy.budget:
            raise ValueError(
                f"{record.folder}: holds {len(record.traces)} traces, the budget is {policy.budget}"
            )
    stopped = [t.number for t in traces if not t.whole and t.reason != INTERRUPTED]
    if stopped:
        raise ValueError(
            f"{record.folder}: the recorded run stopped {len(stopped)} of {len(traces)} "
            "traces, whose answers are not known: only its own policy can be replayed"
        )
    ballots = [
        Ballot(
            t.number, answers[t.number], trace_measures(t.confidence, policy.window, policy.tail)
        )
        for t in traces
        if t.whole
    ]
    tally = offline_vote(ballots, policy, equality)
    return Replayed(
        answer=tally.answer,
        vote=tally,
        right=_right(record, tally.answer, equality),
        tokens=sum(map(len, traces)),
        all_tokens=_all_tokens(record),
        traces=len(traces),
    )


def _right(record: Record, answer: str | None, equality: Equality) -> bool | None:
    reference = record.manifest.reference
    if reference is None:
        return None
    return answer is not None and equality.same(reference, answer)


def _all_tokens(record: Record) -> int | None:
    return record.tokens if all(trace.whole for trace in record.traces) else None


class _Run:
    """One online policy over one record."""

    def __init__(self, record: Record, params: DeepConf, equality: Equality, answers: dict):
        manifest = record.manifest
        if params.k != manifest.k:
            raise ValueError(
                f"{record.folder}: confidences of k = {manifest.k}, the policy's k is {params.k}"
            )
        self.record = record
        self.traces = {trace.number: trace for trace in record.traces}
        # All tokens of all traces in a row: a step is a set of places in it.
        lengths = torch.tensor([len(trace) for trace in record.traces])
        ends = lengths.cumsum(0)
        self.first = dict(zip(self.traces, (ends - lengths).tolist()))
        self.owner = torch.tensor(list(self.traces)).repeat_interleave(lengths)
        self.tokens = torch.cat([trace.tokens for trace in record.traces])
        self.confidence = torch.cat([trace.confidence for trace in record.traces])
        whole = torch.tensor([trace.whole for trace in record.traces])
        self.closing = torch.zeros(len(self.owner), dtype=torch.bool)
        self.closing[ends[whole] - 1] = True
        # Where the recorded run stopped a trace: there its record breaks off.
        low = torch.tensor([trace.reason == LOW for trace in record.traces])
        self.broken = torch.zeros(len(self.owner), dtype=torch.bool)
        self.broken[ends[low] - 1] = True
        self.gone = torch.zeros(max(self.traces) + 1, dtype=torch.bool)
        self.answers = answers
        self.interrupted = not record.complete or record.end.get("done") == INTERRUPTED
        self.policy = OnlinePolicy(
            params,
            seed=manifest.seed or 0,
            equality=equality,
            extractor=lambda answer: answer or None,
            stop_token_ids=manifest.stop_token_ids,
        )

    def recorded(self) -> None:
        """By the record's own clock."""
        starts: dict[int, list[int]] = {}
        for trace in self.record.traces:
            starts.setdefault(trace.start, []).append(trace.number)
        arrival = torch.cat([trace.steps for trace in self.record.traces])
        last = int(arrival.max()) + 1 if len(arrival) else 0
        steps = self.record.end.get("steps", last)
        in_order = arrival.argsort(stable=True)
        moments, counts = arrival.unique(return_counts=True)
        places = dict(zip(moments.tolist(), in_order.split(counts.tolist())))
        # A step without tokens decides nothing, and a forged record may have any number of them.
        for step in sorted({*places, *starts}):
            if self.policy.done:
                return
            self.policy.steps = step
            new = sorted(starts.get(step, []))
            given = self.policy.start(len(new))
            if given != new:
                raise ValueError(
                    f"{self.record.folder}: traces {new} were started before step {step}, "
                    f"where this policy would have started {given}"
                )
            if step in places:  # else they were started, and the run ended before their first token
                self._step(places[step][~self.gone[self.owner[places[step]]]])
        if not self.policy.done:
            self.policy.steps = steps
            self._leave()

    def simulated(self, parallel: int | None) -> None:
        """By a clock that gives every running trace one token per step."""
        at: dict[int, int] = {}
        while not self.policy.done:
            free = None if parallel is None else parallel - len(at)
            for number in self.policy.start(free):
                at[number] = 0
            rows = [row for row in at.items() if not self._exhausted(*row)]
            if not rows:
                self._leave()
                return
            self._step(torch.tensor([self.first[number] + position for number, position in rows]))
            at.update((number, position + 1) for number, position in rows)
            running = set(self.policy.running)
            at = {number: position for number, position in at.items() if number in running}

    def _exhausted(self, number: int, position: int) -> bool:
        """Whether an interrupted run left nothing more of a trace."""
        trace = self.traces.get(number)
        if trace is None and not self.interrupted:
            raise self._too_few()
        if trace is not None and position < len(trace):
            return False
        if trace is not None and trace.reason != INTERRUPTED:
            raise self._unknown(trace)
        return True

    def _too_few(self) -> ValueError:
        count = len(self.traces)
        return ValueError(
            f"{self.record.folder}: holds {count} traces, and the policy would have started more, "
            f"up to its budget of {self.policy.params.budget}"
        )

    def _unknown(self, trace: RecordedTrace) -> ValueError:
        return ValueError(
            f"{self.record.folder}: the recorded run stopped trace {trace.number} after "
            f"{len(trace)} tokens ({trace.reason}), this policy would have gone on"
        )

    def _step(self, places: Tensor) -> None:
        numbers = self.owner[places]
        finished = {
            number: Ended(self.traces[number].reason, self.answers[number] or "")
            for number in numbers[self.closing[places]].tolist()
        }
        stops = self.policy.step(numbers, self.tokens[places], self.confidence[places], finished)
        self.gone[list(stops)] = True
        for number in numbers[self.broken[places]].tolist():
            if number not in stops:
                raise self._unknown(self.traces[number])

    def _leave(self) -> None:
        """The record is at its end and the policy is not: so was a run that was interrupted."""
        for number in self.policy.running:
            trace = self.traces.get(number)
            if trace is not None and trace.reason != INTERRUPTED:
                raise self._unknown(trace)
        if not self.interrupted:
            raise self._too_few()
        self.policy.interrupt()

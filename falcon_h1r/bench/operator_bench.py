"""`bench ops`: every implementation of every operator at every shape."""

from __future__ import annotations

from collections.abc import Iterable

from . import gate
from .implementations import away, contestants
from .registry import Case
from .session import Session, Subject


def subject(case: Case, bench: str = "ops") -> Subject:
    return Subject(bench, case.op, case.model, case.workload, case.dtype, case.cost)


def run(cases: Iterable[Case], session: Session) -> int:
    """Measure the cases; returns how many implementations were wrong or failed, peers aside."""
    cases = list(cases)
    session.results.absent(away(session.device, {case.op for case in cases}))
    wrong = 0
    for case in cases:

        def prepare(case=case):
            inputs = case.inputs(session.device, session.seed)
            return contestants(case, session), inputs, gate.find_expected(case, inputs)

        wrong += session.measure(subject(case), prepare)
    return wrong

"""`bench ops`: every implementation of every operator at every shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import contest, gate
from .implementations import contestants
from .machine import Ceilings
from .registry import Case
from .report import Report, summary
from .timing import Budget


def describe(case: Case) -> dict[str, Any]:
    """The part of a record that names a case and its cost."""
    w, cost = case.workload, case.cost
    return {
        "bench": "ops",
        "op": case.op,
        "model": case.model,
        "phase": w.phase,
        "batch": w.batch,
        "length": w.length,
        "past": w.past,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes_read": cost.read,
        "bytes_written": cost.written,
        "bytes": cost.bytes,
        "flops": cost.flops,
    }


def run(
    cases: Iterable[Case],
    device: torch.device,
    clock,
    ceilings: Ceilings,
    budget: Budget,
    report: Report,
    compiled: bool = False,
    seed: int = 0,
) -> int:
    """Measure the cases into `report`; returns how many of our own implementations were wrong."""
    wrong = 0
    for case in cases:
        cost = case.cost
        bound = contest.bound_by(cost, case.dtype, ceilings)
        shared = describe(case) | {"bound": bound}
        title = summary(str(case), cost, bound)
        try:
            inputs = case.inputs(device, seed)
            with torch.no_grad():
                truth = gate.find_truth(case, inputs)
            people = contestants(case, device, compiled)
            parts = contest.run(people, inputs, truth, clock, budget)
        except Exception as error:
            if not contest.out_of_memory(error):
                raise
            report.skipped(title, shared, "out of memory")
            continue
        finally:
            inputs = truth = None
        for name, part in parts.items():
            contest.rates(part, cost, case.dtype, ceilings)
            ours = name in ("reference", "torch", "torch.compile", "triton")
            wrong += ours and part["status"] in ("wrong", "failed")
        report.results(title, shared, parts)
    return wrong

"""`bench ops --tune`: every configuration of a kernel at a shape, and the line that uses the best.

Tuning is asked for, never done behind a caller's back, and runs on private copies of every tensor
that a kernel overwrites: live state is never touched.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import torch

from . import contest, gate, operator_bench
from .implementations import Implementation, kernel, ours
from .machine import Ceilings
from .registry import Case
from .report import Report, shown
from .timing import Budget

# Forms of one function with configurations of their own: module, its table or tables. Several
# tables belong to the kernels of one call: names of each are joined by commas.
FORMS = {"ssd_scan": {"fused": ("ssd_fused", "CONFIGS"), "staged": ("ssd_staged", "TABLES")}}


# Functions that launch another module's kernel, with its configurations.
TABLE_OF = {"conv_ssd_step": "falcon_h1r_kernels.ssd_step"}


class Candidate(NamedTuple):
    """Keyword arguments of one configuration; table: which kernel's of the form it is."""

    name: str
    options: dict[str, Any]
    table: int = 0


def candidates(case: Case) -> list[Candidate]:
    """Every configuration that serves the case's dtype, and each form's own choice."""
    forms = FORMS.get(case.op)
    if forms is None:
        module = TABLE_OF.get(case.op) or kernel(case).__module__
        table = importlib.import_module(module).CONFIGS
        return [Candidate(c.name, {"config": c.name}) for c in table if case.dtype in c.dtypes]
    out = []
    for form, (module, attribute) in forms.items():
        found = getattr(importlib.import_module(f"falcon_h1r_kernels.{module}"), attribute)
        out.append(Candidate(f"{form} default", {"form": form}, -1))
        for index, table in enumerate(found if attribute == "TABLES" else (found,)):
            for config in table:
                if case.dtype in config.dtypes:
                    options = {"form": form, "config": config.name}
                    out.append(Candidate(f"{form} {config.name}", options, index))
    return out


def use_line(case: Case, options: dict[str, Any]) -> str:
    """Python that builds a table with the chosen configuration."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    field = case.operator.field
    if not field:
        return f"functools.partial({case.op}, {arguments})"
    return f"TRITON._replace({field}=functools.partial(TRITON.{field}, {arguments}))"


def combine(found: list[tuple[Candidate, float]], default: float) -> Candidate | None:
    """The fastest of each table of one form together, or None where fewer than two help."""
    best: dict[int, tuple[Candidate, float]] = {}
    for candidate, seconds in found:
        if candidate.table >= 0 and seconds < default:
            held = best.get(candidate.table)
            if held is None or seconds < held[1]:
                best[candidate.table] = (candidate, seconds)
    if len(best) < 2:
        return None
    names = ",".join(candidate.options["config"] for _, (candidate, _) in sorted(best.items()))
    first = next(iter(best.values()))[0]
    return Candidate(f"{first.options['form']} {names}", {**first.options, "config": names})


def run(
    case: Case,
    device: torch.device,
    clock,
    ceilings: Ceilings,
    budget: Budget,
    report: Report,
    seed: int = 0,
) -> int:
    """Tune one case into `report`; returns how many configurations were wrong.

    Raises ValueError where there is no GPU: an interpreter's times say nothing.
    """
    if device.type != "cuda":
        raise ValueError(f"--tune: kernels are tuned on a GPU, --device is {device}")
    return tune(case, kernel(case), candidates(case), device, clock, ceilings, budget, report, seed)


def tune(case, function, choices, device, clock, ceilings, budget, report, seed=0) -> int:
    """`run` for a given function: gate and time its default and each candidate."""
    inputs = case.inputs(device, seed)
    with torch.no_grad():
        truth = gate.find_truth(case, inputs)
    by_name = {c.name: c for c in choices}

    def bound(candidate: Candidate) -> Implementation:
        return ours(candidate.name, case, partial(function, **candidate.options))

    people = [ours("default", case, function), *map(bound, choices)]
    parts = contest.run(people, inputs, truth, clock, budget)
    timed = {name: part["seconds"]["p50"] for name, part in parts.items() if "seconds" in part}
    together = []
    for form in sorted({c.options["form"] for c in choices if "form" in c.options}):
        own = [
            (by_name[name], seconds)
            for name, seconds in timed.items()
            if name in by_name and by_name[name].options["form"] == form
        ]
        joined = combine(own, timed.get(f"{form} default", float("inf")))
        together += [joined] if joined is not None else []
    if together:  # all again, so that the combinations stand beside the others in every round
        by_name |= {c.name: c for c in together}
        parts = contest.run([*people, *map(bound, together)], inputs, truth, clock, budget)
    for part in parts.values():
        contest.rates(part, case.cost, case.dtype, ceilings)
    shared = operator_bench.describe(case) | {
        "bench": "tune",
        "bound": contest.bound_by(case.cost, case.dtype, ceilings),
    }
    report.results(f"tune {case}", shared, parts)
    timed = {name: part["seconds"]["p50"] for name, part in parts.items() if "seconds" in part}
    if timed:
        best = min(timed, key=timed.get)
        report.say(f"best: {best}, {shown(timed[best])}")
        if best in by_name:
            report.say(f"  {use_line(case, by_name[best].options)}")
        report.add({"record": "best", **shared, "implementation": best, "median": timed[best]})
    # A combination may join what excludes each other; that is refused, and no fault.
    joined = {c.name for c in together}
    bad = {name for name, part in parts.items() if part["status"] in ("wrong", "failed")}
    return len(bad - joined)

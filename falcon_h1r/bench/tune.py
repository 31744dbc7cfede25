"""`bench ops --tune`: every configuration of a kernel at a shape, and the line that uses the best.

Tuning is asked for, never done behind a caller's back, and runs on private copies of every tensor
that a kernel overwrites: live state is never touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from . import contest, gate, operator_bench
from .contest import Implementation
from .implementations import kernel, ours
from .registry import Case
from .report import shown
from .session import Session

# Forms of one function with configurations of their own: module, its table or tables. Several
# tables belong to the kernels of one call: names of each are joined by commas.
FORMS = {"ssd_scan": {"fused": ("ssd_fused", "CONFIGS"), "staged": ("ssd_staged", "TABLES")}}


# Functions that launch another module's kernel, with its configurations.
TABLE_OF = {"conv_ssd_step": "falcon_h1r_kernels.ssd_step"}


class Trial(NamedTuple):
    """Keyword arguments of one configuration; table: which kernel's of the form it is."""

    name: str
    options: dict[str, Any]
    table: int = 0


def trials(case: Case) -> list[Trial]:
    """Every configuration that serves the case's dtype, and each form's own choice."""
    forms = FORMS.get(case.op)
    if forms is None:
        module = TABLE_OF.get(case.op) or kernel(case).__module__
        table = importlib.import_module(module).CONFIGS
        return [Trial(c.name, {"config": c.name}) for c in table if case.dtype in c.dtypes]
    out = []
    for form, (module, attribute) in forms.items():
        found = getattr(importlib.import_module(f"falcon_h1r_kernels.{module}"), attribute)
        out.append(Trial(f"{form} default", {"form": form}, -1))
        for index, table in enumerate(found if attribute == "TABLES" else (found,)):
            for config in table:
                if case.dtype in config.dtypes:
                    options = {"form": form, "config": config.name}
                    out.append(Trial(f"{form} {config.name}", options, index))
    return out


def use_line(case: Case, options: dict[str, Any]) -> str:
    """Python that builds a table with the chosen configuration."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    field = case.operator.field
    if not field:
        return f"functools.partial({case.op}, {arguments})"
    return f"TRITON._replace({field}=functools.partial(TRITON.{field}, {arguments}))"


def combine(found: list[tuple[Trial, float]], default: float) -> Trial | None:
    """The fastest of each table of one form together, or None where fewer than two help."""
    best: dict[int, tuple[Trial, float]] = {}
    for trial, seconds in found:
        if trial.table >= 0 and seconds < default:
            held = best.get(trial.table)
            if held is None or seconds < held[1]:
                best[trial.table] = (trial, seconds)
    if len(best) < 2:
        return None
    names = ",".join(trial.options["config"] for _, (trial, _) in sorted(best.items()))
    first = next(iter(best.values()))[0]
    return Trial(f"{first.options['form']} {names}", {**first.options, "config": names})


def run(case: Case, session: Session) -> int:
    """Tune one case; returns how many configurations were wrong.

    Raises ValueError where there is no GPU: an interpreter's times say nothing.
    """
    if session.device.type != "cuda":
        raise ValueError(f"--tune: kernels are tuned on a GPU, --device is {session.device}")
    return tune(case, kernel(case), trials(case), session)


def tune(case: Case, function: Callable, choices: list[Trial], session: Session) -> int:
    """`run` for a given function: gate and time its default and each trial."""
    inputs = case.inputs(session.device, session.seed)
    with torch.no_grad():
        expected = gate.find_expected(case, inputs)
    rest = (inputs, expected, session.clock, session.budget)
    by_name = {c.name: c for c in choices}

    def bound(trial: Trial) -> Implementation:
        return ours(trial.name, case, partial(function, **trial.options))

    people = [ours("default", case, function), *map(bound, choices)]
    parts = contest.run(people, *rest)
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
        parts = contest.run([*people, *map(bound, together)], *rest)
    subject, results = operator_bench.subject(case, "tune"), session.results
    session.publish(subject, parts)
    timed = {name: part["seconds"]["p50"] for name, part in parts.items() if "seconds" in part}
    if timed:
        best = min(timed, key=timed.get)
        results.say(f"best: {best}, {shown(timed[best])}")
        if best in by_name:
            results.say(f"  {use_line(case, by_name[best].options)}")
        found = {"implementation": best, "median": timed[best]}
        results.add({"record": "best", **session.record(subject), **found})
    # A combination may join what excludes each other; that is refused, and no fault.
    return len(contest.faulty(parts, {trial.name for trial in together}))

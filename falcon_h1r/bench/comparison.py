"""A function of one's own beside ours and the installed peers, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..config import FalconH1Config
from . import contest, gate, operator_bench, peers
from .axes import parse, sized
from .machine import Ceilings, find_device, measure_ceilings
from .registry import select
from .report import Results
from .session import Session
from .timing import FULL, clock_for
from .user_operator import UserOperator, check_signature

_TAKEN = ("reference", "torch", "torch.compile", "triton", *peers.NAMES)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found out. `print` shows it as a table.

    records: one for each implementation, by name, as `bench ops` writes them. text: the table.
    """

    records: dict[str, dict[str, Any]]
    text: str

    @property
    def seconds(self) -> dict[str, float]:
        """The median time of a call, of those who were timed."""
        return {n: r["seconds"]["p50"] for n, r in self.records.items() if "seconds" in r}

    @property
    def errors(self) -> dict[str, float]:
        """Root mean square error relative to float64's, of those whose output could be judged."""
        return {n: r["gate"]["rms"] for n, r in self.records.items() if "rms" in r.get("gate", ())}

    @property
    def wrong(self) -> dict[str, str]:
        """Who was wrong or failed, and why; peers left aside."""
        names = contest.faulty(self.records, peers.NAMES)
        return {name: self.records[name]["reason"] for name in self.records if name in names}

    def __repr__(self) -> str:
        return self.text


def compare(
    op: str,
    function: Callable | Mapping[str, Callable],
    sizes: Mapping[str, int] | str | None = None,
    *,
    model: str | FalconH1Config = "falcon-h1r-7b",
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str | None = None,
    seconds: float = FULL.seconds,
    compiled: bool = False,
    seed: int = 0,
) -> Comparison:
    """Hold `function` against float64, and time it in turns with ours and the installed peers.

        compare("ssd_scan", my_scan, "l=777,h=4,p=64")

    op: an operator of the registry, such as "ssd_scan". function: called as the model calls that
    operator, with REFERENCE's signature; or several by name. sizes: of the operator's axes by their
    letters (`axes.AXES`), as text or as a mapping; the others are those of `model`, a preset or a
    config. device: by default a GPU where there is one. seconds: of timing, for each
    implementation. compiled: also torch.compile of ours. Nobody who does not pass is timed. Raises
    ValueError for an unknown operator, axis, preset or device, and for a function that cannot take
    the operator's arguments.
    """
    select([op])
    named = dict(function) if isinstance(function, Mapping) else {_name(function): function}
    config = model if isinstance(model, FalconH1Config) else FalconH1Config.preset(model)
    shape = "a config" if isinstance(model, FalconH1Config) else model
    device, dtype = find_device(device), _dtype(dtype)
    sizes = parse(sizes) if isinstance(sizes, str) else sizes or {}
    case = sized(op, sizes, shape, config, dtype)
    user = tuple(UserOperator(op, name, one) for name, one in named.items())
    for one in user:
        if one.name in _TAKEN:
            raise ValueError(f"a function is called {one.name!r}, which names one of: {_TAKEN}")
        if not callable(one.function):
            raise ValueError(f"{one.name} is of type {type(one.function).__name__}, no function")
        check_signature(one, case)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds is {seconds}, expected a number above 0")
    lines: list[str] = []
    results, budget = Results(None, lines.append), FULL._replace(seconds=seconds)
    session = Session(
        device, clock_for(device), _ceilings(device, dtype), budget, results, compiled, seed, user
    )
    operator_bench.run([case], session)
    found = {r["implementation"]: r for r in results.records if r["record"] == "result"}
    return Comparison(found, "\n".join(lines).strip())


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in gate.ROUNDOFF:
        known = ", ".join(str(one).removeprefix("torch.") for one in gate.ROUNDOFF)
        raise ValueError(f"dtype is {dtype!r}, expected one of: {known}")
    return found


@cache
def _ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    return measure_ceilings(device, [dtype], clock_for(device))

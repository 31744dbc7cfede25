"""One case, everyone who takes part: gate, then interleaved times, then records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gate, timing
from .machine import Ceilings
from .sizes import Cost


class Bound(NamedTuple):
    """A call with its inputs in place, and its results in the registry's layout.

    call: what is timed. outputs: what `call` returned -> the outputs that `Case.call` gives.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], tuple[Tensor, ...]]


class Implementation(NamedTuple):
    """bind(inputs) -> `Bound`, or None with the reason. slack: see `gate.judge`."""

    name: str
    bind: Callable[[dict[str, Any]], Bound] | None
    reason: str = ""
    slack: float = 1.0


def run(
    implementations: Sequence[Implementation],
    inputs: dict[str, Any],
    expected: gate.Expected,
    clock,
    budget: timing.TimeBudget,
) -> dict[str, dict[str, Any]]:
    """Gate everyone and time those who pass.

    Returns a part of a record by name: "status" is "timed", "absent" (not here, or no memory for
    it), "failed" (raised) or "wrong" (refused by the gate), with "reason"; "gate" and "seconds"
    where they exist.
    """
    out: dict[str, dict[str, Any]] = {}
    calls = {}
    for one in implementations:
        if one.bind is None:
            out[one.name] = {"status": "absent", "reason": one.reason}
            continue
        try:
            with torch.no_grad():
                bound = one.bind(inputs)
                verdict = gate.judge(bound.outputs(bound.call()), expected, one.slack)
        except Exception as error:  # anybody's code: an error is a result, the others go on
            if out_of_memory(error):
                out[one.name] = {"status": "absent", "reason": "out of memory"}
            else:
                out[one.name] = {"status": "failed", "reason": describe(error)}
            continue
        out[one.name] = verdict_part(verdict)
        out[one.name]["gate"]["slack"] = one.slack
        if verdict.passed:
            calls[one.name] = bound.call
    with torch.no_grad():
        for name, taken in timing.measure(calls, clock, budget).items():
            out[name] |= times(taken)
    return out


def verdict_part(verdict: gate.GateResult) -> dict[str, Any]:
    """The part of a record that the gate fills; "timed" is what it lets happen next."""
    checked = verdict._asdict()
    passed, reason = checked.pop("passed"), checked.pop("reason")
    kept = {name: value for name, value in checked.items() if value < float("inf")}
    return {"status": "timed" if passed else "wrong", "reason": reason, "gate": kept}


def faulty(parts: dict[str, dict[str, Any]], peers: Sequence[str]) -> set[str]:
    """Names of those who are wrong or failed, `peers` left aside: their faults are not ours."""
    bad = {name for name, part in parts.items() if part["status"] in ("wrong", "failed")}
    return bad - set(peers)


def times(taken: timing.Timing) -> dict[str, Any]:
    """The part of a record that a measurement fills."""
    seconds = {"p20": taken.p20, "p50": taken.p50, "p80": taken.p80}
    host = {} if taken.host is None else {"host_seconds": taken.host}
    return {"seconds": seconds, "rounds": taken.rounds, **host}


def rates(part: dict[str, Any], cost: Cost, dtype: torch.dtype, ceilings: Ceilings) -> None:
    """Add to a timed part of a record what its median means against the machine's ceilings."""
    if "seconds" not in part:
        return
    median = part["seconds"]["p50"]
    part["bytes_per_second"] = cost.bytes / median
    part["flops_per_second"] = cost.flops / median
    part["percent_of_ceiling"] = 100 * ceilings.seconds(cost.bytes, cost.flops, dtype) / median


def bound_by(cost: Cost, dtype: torch.dtype, ceilings: Ceilings) -> str:
    """Which of the two ceilings the least time comes from."""
    memory = cost.bytes / ceilings.bandwidth(cost.bytes)
    return "memory" if memory >= cost.flops / ceilings.matmul[dtype] else "compute"


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left."""
    allocator = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or allocator

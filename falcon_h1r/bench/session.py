"""What the measurements of one run share, and how a case becomes records and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import contest, gate, peers
from .contest import Implementation
from .machine import Ceilings
from .registry import Workload
from .report import Results, amount
from .sizes import Cost
from .timing import TimeBudget
from .user_operator import UserOperator


class Subject(NamedTuple):
    """What one table of results is about.

    bench: "ops", "layer", "generate" or "tune". op: an operator; "layer"; of a whole model the
    phase.
    """

    bench: str
    op: str
    model: str
    workload: Workload
    dtype: torch.dtype
    cost: Cost

    @property
    def kind(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        what = {"ops": self.op, "tune": f"tune {self.op}"}.get(self.bench, self.bench)
        return f"{what} {self.model} {self.workload} {self.kind}"


@dataclass(frozen=True)
class Session:
    """One run on one device.

    clock: of `timing`. ceilings: the device's own, measured before. budget: time per case. results:
    takes records and text. compiled: also measure torch.compile of our functions. seed: of inputs
    and weights. user: functions of the user's, measured beside ours.
    """

    device: torch.device
    clock: Any
    ceilings: Ceilings
    budget: TimeBudget
    results: Results
    compiled: bool = False
    seed: int = 0
    user: tuple[UserOperator, ...] = ()

    @torch.no_grad()
    def measure(
        self,
        subject: Subject,
        prepare: Callable[[], tuple[Sequence[Implementation], dict[str, Any], gate.Expected]],
    ) -> int:
        """Gate and time everyone; returns how many were wrong or failed, peers aside.

        prepare() -> who takes part, the inputs, and what is expected of them. Where memory runs out
        in it, the case is skipped.
        """
        try:
            parts = contest.run(*prepare(), self.clock, self.budget)
        except Exception as error:
            if not contest.out_of_memory(error):
                raise
            self.skip(subject)
            return 0
        self.publish(subject, parts)
        return len(contest.faulty(parts, peers.NAMES))

    def publish(self, subject: Subject, parts: dict[str, dict[str, Any]]) -> None:
        """Write what was found out about a case, with what its times mean on this machine."""
        for part in parts.values():
            contest.rates(part, subject.cost, subject.dtype, self.ceilings)
        self.results.table(self._heading(subject), self.record(subject), parts)

    def skip(self, subject: Subject) -> None:
        """Write that the memory does not suffice for a case."""
        self.results.skipped(self._heading(subject), self.record(subject), "out of memory")

    def record(self, subject: Subject) -> dict[str, Any]:
        """The part of a record that names a case and its cost."""
        w, cost = subject.workload, subject.cost
        out = {
            "bench": subject.bench,
            "op": subject.op,
            "model": subject.model,
            "phase": w.phase,
            "batch": w.batch,
            "length": w.length,
            "past": w.past,
            "dtype": subject.kind,
            "bytes_read": cost.read,
            "bytes_written": cost.written,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "bound": self._bound(subject),
        }
        if subject.bench == "generate":
            out["bytes_per_token"] = cost.bytes / (w.batch * w.length)
        return out

    def _bound(self, subject: Subject) -> str:
        return contest.bound_by(subject.cost, subject.dtype, self.ceilings)

    def _heading(self, subject: Subject) -> str:
        size = f"{amount(subject.cost.bytes, 'B')}, {amount(subject.cost.flops, 'FLOP')}"
        return f"{subject.title}: {size}, bound by {self._bound(subject)}"

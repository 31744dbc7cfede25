"""Tiny shapes and stand-ins for the benchmark tests."""

import math
from pathlib import Path

import torch
from models import make_config

from falcon_h1r.bench.machine import Bandwidth, Ceilings
from falcon_h1r.bench.registry import Workload, cases
from falcon_h1r.bench.report import Results
from falcon_h1r.bench.session import Session
from falcon_h1r.bench.timing import TimeBudget

TWO_GROUPS = make_config("two_groups", mamba_chunk_size=16)
BARE_GATE = make_config("no_gated_norm")
CONFIGS = {"two-groups": TWO_GROUPS, "bare-gate": BARE_GATE}
WORKLOADS = (
    Workload("prefill", 2, 37),
    Workload("prefill", 1, 70),  # above the scan's Python loop
    Workload("resume", 2, 5, 9),
    Workload("decode", 3, 1, 20),
)
CPU = torch.device("cpu")
CEILINGS = Ceilings(
    (Bandwidth(2**20, 4e9, 5e9), Bandwidth(2**28, 1e9, 2e9)),
    {torch.float32: 1e11, torch.bfloat16: 2e11, torch.float16: 3e11, torch.float64: 5e10},
)
BUDGET = TimeBudget(seconds=1.0, least=3, most=5, warmup_calls=1)


def tiny_cases(ops=(), dtypes=(torch.float32,), workloads=WORKLOADS, configs=CONFIGS):
    return list(cases(list(configs), ops, dtypes, workloads, configs))


class FakeClock:
    """Counts samples, and gives each call the next of its scripted times (the last one forever).

    `log` holds the calls in the order in which they were made.
    """

    description = "fake"

    def __init__(self, scripts=None):
        self.scripts = {call: list(times) for call, times in (scripts or {}).items()}
        self.log = []

    def sample(self, call):
        self.log.append(call)
        call()
        times = self.scripts.get(call, [0.5])
        return (times.pop(0) if len(times) > 1 else times[0]), None


def tiny_session(device=CPU, results=None, **options) -> Session:
    """A session whose clock counts; results: a Results, one without file and text by default."""
    results = Results(None, lambda text: None) if results is None else results
    clock = options.pop("clock", None) or FakeClock()
    return Session(device, clock, CEILINGS, options.pop("budget", BUDGET), results, **options)


def elements(tensors) -> int:
    """Bytes of tensors, each element once."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def temporary(tmp_path: Path, name: str) -> Path:
    return tmp_path / "new" / name

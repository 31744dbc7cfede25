"""The registry: operators x shapes of the released family, each case complete in itself.

    from falcon_h1r.bench.registry import cases
    for case in cases(models=["falcon-h1r-7b"], ops=["ssd_scan"]):
        inputs = case.inputs(device="cuda")         # arguments by name, seeded
        outputs = case.call(TRITON.ssd_scan, inputs)  # a tuple, tensors written in place included
        case.cost                                     # bytes and FLOPs at the least, by formula

Benchmarks, the correctness gate and reports on kernels all read the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import FalconH1Config
from .operators import OPERATORS, Cost, Draw, Operator, Size

# Seven sizes were released; these five span every width, head size and group count of them.
FAMILY = ("falcon-h1r-7b", "falcon-h1-34b", "falcon-h1-1.5b", "falcon-h1-0.5b", "tiny-90m")


@dataclass(frozen=True)
class Workload:
    """b rows at once.

    prefill: `length` new tokens per row, nothing before them. resume: `length` new tokens behind
    `past` others (a long prompt read in pieces). decode: one new token behind `past` others.
    As text: prefill BxL, resume BxL@PAST, decode B@TOKENS, the new one among them.
    """

    phase: str
    batch: int
    length: int
    past: int = 0

    def __post_init__(self):
        fits = {"prefill": self.past == 0, "resume": self.past > 0, "decode": self.length == 1}
        if not fits.get(self.phase, False) or min(self.batch, self.length) < 1 or self.past < 0:
            raise ValueError(f"{self!r} is no workload: {Workload.__doc__.strip()}")

    def __str__(self) -> str:
        if self.phase == "prefill":
            return f"prefill {self.batch}x{self.length}"
        if self.phase == "resume":
            return f"resume {self.batch}x{self.length}@{self.past}"
        return f"decode {self.batch}@{self.past + 1}"


# Decode: one sequence, a vote of 16, a full batch; 32768 is where keys outweigh the SSM state.
GPU_WORKLOADS = (
    Workload("prefill", 1, 512),
    Workload("prefill", 1, 4096),
    Workload("prefill", 8, 4096),
    Workload("prefill", 1, 32768),
    Workload("resume", 1, 4096, 28672),
    Workload("decode", 1, 1, 2047),
    Workload("decode", 16, 1, 2047),
    Workload("decode", 128, 1, 2047),
    Workload("decode", 1, 1, 32767),
    Workload("decode", 16, 1, 32767),
)
CPU_WORKLOADS = (
    Workload("prefill", 1, 512),
    Workload("prefill", 1, 2048),
    Workload("resume", 1, 512, 1536),
    Workload("decode", 1, 1, 2047),
    Workload("decode", 8, 1, 2047),
)
QUICK_WORKLOADS = (Workload("prefill", 1, 512), Workload("decode", 1, 1, 2047))


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `model` names the config, a preset or another's name."""

    op: str
    model: str
    config: FalconH1Config
    workload: Workload
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op} {self.model} {self.workload} {str(self.dtype).removeprefix('torch.')}"

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.op]

    @cached_property
    def size(self) -> Size:
        w = self.workload
        return Size(self.config, self.dtype, w.batch, w.length, w.past)

    @property
    def cost(self) -> Cost:
        return self.operator.cost(self.size)

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of one call by the names in REFERENCE's signature, strides the model's."""
        return self.operator.inputs(self.size, Draw(seed, device))

    def call(self, function: Callable, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """What `function` returns, then the tensors it wrote in place, as one tuple.

        The call works on a copy of what it overwrites: `inputs` stays as it is.
        """
        inputs = self.scratch(inputs)
        return self.outputs(function(**inputs), inputs)

    def outputs(self, returned: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """What a call with `inputs` returned, then the tensors it wrote in place."""
        first = returned if isinstance(returned, (tuple, list)) else (returned,)
        return (*first, *(inputs[name] for name in self.operator.mutates))

    def scratch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with a copy of each tensor that a call overwrites."""
        return inputs | {name: inputs[name].clone() for name in self.operator.mutates}


def cases(
    models: Sequence[str] = FAMILY,
    ops: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    workloads: Sequence[Workload] = GPU_WORKLOADS,
    configs: dict[str, FalconH1Config] | None = None,
) -> Iterator[Case]:
    """Every case of the product that exists, operator by operator.

    models: presets, or names in `configs`. ops: names of operators, or of a field of `Ops` for all
    its operators; none: all. An operator that does not depend on the past is listed once per
    batch and length. Raises ValueError for an unknown name.
    """
    configs = configs or {}
    chosen = {name: configs.get(name) or FalconH1Config.preset(name) for name in models}
    for operator in select(ops):
        seen = set()
        for model, config in chosen.items():
            for dtype in dtypes:
                for workload in workloads:
                    if workload.phase not in operator.phases:
                        continue
                    uses_past = "attention" in operator.field
                    key = (model, dtype, workload.phase, workload.batch, workload.length)
                    if not uses_past and key in seen:
                        continue
                    if operator.name.endswith("_ragged") and workload.batch == 1:
                        continue
                    seen.add(key)
                    yield Case(operator.name, model, config, workload, dtype)


def select(names: Sequence[str]) -> list[Operator]:
    """Operators of the given names; an empty sequence means all."""
    known = {operator.field for operator in OPERATORS.values()} - {""} | set(OPERATORS)
    for name in names:
        if name not in known:
            raise ValueError(f"no operator {name!r}; there are: {', '.join(OPERATORS)}")
    return [o for o in OPERATORS.values() if not names or o.name in names or o.field in names]

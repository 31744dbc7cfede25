"""The correctness gate: nothing is timed that does not compute the right thing.

The truth is REFERENCE in float64 on the very inputs that are timed (attention in blocks of queries,
to bound its memory). Where REFERENCE is a Python loop over many tokens, the scan, it is TORCH in
float64, which the tests hold against REFERENCE.

The rule, for every returned tensor and every tensor written in place, as root mean square over all
elements and at the worst one: at most twice the error of an independent torch implementation in the
case's dtype (the yardstick: REFERENCE, or TORCH with another chunk size), or as many roundoffs of
that dtype as SLACK says, where that is more. Those admit 16-bit operands of matrix products,
which a float32 yardstick does not have, and float32 sums in another order; TF32, 2^-11, stays
refused in float32. Operators whose arithmetic and results are all float32 are judged as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .registry import Case

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-12,
    torch.bfloat16: 2.0**-9,
}
SLACK = {torch.float64: 64, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}
LOOP_TOKENS = 64  # the scan's Python loop is run up to here
BLOCK_BYTES = 2**28  # of scores in one block of the attention's truth


class GateResult(NamedTuple):
    """The gate's decision. Errors are relative: to the rms, and to the largest element."""

    passed: bool
    rms: float
    worst: float
    rms_allowed: float
    worst_allowed: float
    reason: str


class Expected(NamedTuple):
    """Float64 outputs of a case, and how far off a correct implementation may be, per output.

    dtypes: of the outputs, where they matter.
    """

    outputs: tuple[Tensor, ...]
    allowed: tuple[tuple[float, float], ...]
    dtypes: tuple[torch.dtype, ...] = ()


def reference(case: Case):
    """The REFERENCE function of a case, of a table or of an operator that exists alone."""
    operator = case.operator
    return operator.alone.reference if operator.alone else getattr(ops.REFERENCE, operator.field)


def torch_form(case: Case):
    """The TORCH function of a case."""
    operator = case.operator
    return operator.alone.torch if operator.alone else getattr(ops.TORCH, operator.field)


def is_slow_loop(case: Case) -> bool:
    """Whether REFERENCE walks so many tokens in Python that it is neither truth nor timed."""
    return case.operator.field == "ssd_scan" and case.workload.length > LOOP_TOKENS


def oracle(case: Case, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of the clearest implementation that is affordable, in the inputs' dtype."""
    if case.operator.field == "attention":
        return (_attention_in_blocks(case, inputs),)
    if case.operator.field == "decode_attention":
        return (_decode_attention_in_blocks(case, inputs),)
    return case.call(torch_form(case) if is_slow_loop(case) else reference(case), inputs)


def find_expected(case: Case, inputs: dict[str, Any]) -> Expected:
    """Compute the float64 outputs of a case, and the yardstick's errors."""
    double = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    outputs = oracle(case, double)
    del double
    if is_slow_loop(case):
        inputs = inputs | {"chunk_size": max(inputs["chunk_size"] // 2, 1)}
    if case.operator.alone:  # the usual form rounds where the kernel need not
        yardstick = case.call(torch_form(case), inputs)
    else:
        yardstick = oracle(case, inputs)
    dtype = case.size.wide if case.operator.wide_results else case.dtype
    floor = SLACK[dtype] * ROUNDOFF[dtype]
    allowed = []
    for found, exact in zip(yardstick, outputs):
        rms, worst = errors(found, exact)
        allowed.append((max(2 * rms, floor), max(2 * worst, floor)))
    return Expected(outputs, tuple(allowed), tuple(found.dtype for found in yardstick))


def judge(found: Sequence[Tensor], expected: Expected, slack: float = 1.0) -> GateResult:
    """Hold outputs against what is expected.

    slack: factor on what is allowed, for peers that state a reason (`peers.PeerPackage.slack`).
    The result carries the errors of the output that comes closest to its bound, or passes it most.
    """
    for index, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            return _refused(f"output {index} is of type {type(tensor).__name__}, expected a tensor")
    if len(found) != len(expected.outputs):
        return _refused(f"{len(found)} outputs, expected {len(expected.outputs)}")
    tightest, share = None, -1.0
    for index, (tensor, exact, allowed) in enumerate(
        zip(found, expected.outputs, expected.allowed)
    ):
        if tensor.shape != exact.shape:
            return _refused(
                f"output {index} has shape {tuple(tensor.shape)}, expected {tuple(exact.shape)}"
            )
        if expected.dtypes and tensor.dtype != expected.dtypes[index]:
            return _refused(f"output {index} is {tensor.dtype}, expected {expected.dtypes[index]}")
        if not torch.isfinite(tensor).all():
            return _refused(f"output {index} is not finite")
        rms, worst = errors(tensor, exact)
        rms_allowed, worst_allowed = (slack * value for value in allowed)
        use = max(rms / rms_allowed, worst / worst_allowed)
        if use > share:
            reason = "" if use <= 1 else f"output {index} is {use:.3g} times as far off as allowed"
            tightest = GateResult(use <= 1, rms, worst, rms_allowed, worst_allowed, reason)
            share = use
    return tightest


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors: rms over the truth's rms, worst element over the truth's largest."""
    difference = found.double() - exact
    scale = exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    largest = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    rms = float(difference.square().mean().sqrt() / scale)
    return rms, float(difference.abs().max() / largest)


def _refused(reason: str) -> GateResult:
    return GateResult(False, float("inf"), float("inf"), 0.0, 0.0, reason)


def _attention_in_blocks(case: Case, inputs: dict[str, Any]) -> Tensor:
    """REFERENCE attention, a block of queries at a time over the keys that they can see."""
    q, k, v = (inputs[name] for name in ("q_bhle", "k_bjse", "v_bjse"))
    b, h, l, _ = q.shape
    past, function = case.workload.past, reference(case)
    rows = max(1, BLOCK_BYTES // (8 * b * h * k.shape[2]))
    blocks = []
    for start in range(0, l, rows):
        end = min(start + rows, l)
        offset_b = torch.full((b,), past + start, device=q.device)
        keys = (k[:, :, : past + end], v[:, :, : past + end])
        blocks.append(function(q[:, :, start:end], *keys, query_offset_b=offset_b))
    return torch.cat(blocks, dim=2)


def _decode_attention_in_blocks(case: Case, inputs: dict[str, Any]) -> Tensor:
    """REFERENCE decode attention, some rows at a time: it copies keys to every query head."""
    k = inputs["k_bjse"]
    row_bytes = 8 * inputs["q_bhe"].shape[1] * k.shape[2] * k.shape[3]
    rows = max(1, BLOCK_BYTES // row_bytes)
    blocks = []
    for start in range(0, len(k), rows):
        block = {
            name: value[start : start + rows] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        blocks.append(reference(case)(**block))
    return torch.cat(blocks)

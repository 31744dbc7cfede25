"""Who takes part in a case: our tables, torch.compile, Triton, and installed peers.

An implementation is a name and either a function that binds inputs to a call, or the reason why it
is not run; nobody is left out silently.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import table
from . import gate, peers
from .registry import Case

REFERENCE_BYTES = 2**30  # of scores: above, the plain attention is not timed


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


def bind(case: Case, function: Callable, inputs: dict[str, Any]) -> Bound:
    """Bind `inputs`, with a private copy of what a call overwrites, to one of our functions."""
    own = case.scratch(inputs)

    def outputs(out) -> tuple[Tensor, ...]:
        returned = out if isinstance(out, tuple) else (out,)
        return (*returned, *(own[name] for name in case.operator.mutates))

    return Bound(partial(function, **own), outputs)


def ours(name: str, case: Case, function: Callable) -> Implementation:
    return Implementation(name, partial(bind, case, function))


def contestants(case: Case, device: torch.device, compiled: bool = False) -> list[Implementation]:
    """Everyone for a case, runnable or not. compiled: also torch.compile of TORCH."""
    return [
        _reference(case),
        ours("torch", case, gate.torch_form(case)),
        *([_compiled(case)] if compiled else []),
        _triton(case, device),
        *(_peer(peer, case, device) for peer in peers.PEERS if case.op in peer.adapters),
    ]


def _reference(case: Case) -> Implementation:
    if gate.reference(case) is gate.torch_form(case):
        return Implementation("reference", None, "is the same function as torch")
    if gate.is_slow_loop(case):
        return Implementation("reference", None, "a Python loop over tokens")
    if case.operator.field == "attention":
        w, c = case.workload, case.config
        scores = 8 * w.batch * c.num_attention_heads * w.length * (w.past + w.length)
        if scores > REFERENCE_BYTES:
            return Implementation("reference", None, "holds every score in memory")
    return ours("reference", case, gate.reference(case))


def _compiled(case: Case) -> Implementation:
    def compile_and_bind(inputs):
        # A new shape of a function that was compiled before would count as a recompilation.
        torch.compiler.reset()
        function = torch.compile(gate.torch_form(case), dynamic=False, fullgraph=True)
        return bind(case, function, inputs)

    return Implementation("torch.compile", compile_and_bind)


def kernel(case: Case) -> Callable:
    """The Triton kernel's public function of a case. Raises ImportError where there is none."""
    if case.operator.alone is None:
        return getattr(table("triton"), case.operator.field)
    module, function = case.operator.alone.kernel
    return getattr(importlib.import_module(f"falcon_h1r_kernels.{module}"), function)


def _triton(case: Case, device: torch.device) -> Implementation:
    if device.type != "cuda":
        return Implementation("triton", None, "needs a GPU (its interpreter is no benchmark)")
    if case.dtype == torch.float64:
        return Implementation("triton", None, "the kernels do not serve float64")
    try:
        return ours("triton", case, kernel(case))
    except ImportError as error:
        return Implementation("triton", None, f"cannot be imported: {error}")


def _peer(peer: peers.Peer, case: Case, device: torch.device) -> Implementation:
    reason = peers.why_not(peer, case, device)
    if reason:
        return Implementation(peer.name, None, reason)
    adapter = peer.adapters[case.op]

    def bind_peer(inputs):
        return Bound(*adapter(case, case.scratch(inputs)))

    return Implementation(peer.name, bind_peer, slack=peer.slack)

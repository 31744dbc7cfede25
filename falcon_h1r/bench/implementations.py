"""Who takes part in a case: our tables, torch.compile, Triton, the user's own, installed peers.

An implementation is a name and either a function that binds inputs to a call, or the reason why it
is not run in this case. Who takes part in no case on this machine is told by `away`; nobody is left
out silently.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from .. import ops
from . import gate, peers, user_operator
from .contest import Bound, Implementation
from .registry import Case
from .session import Session

REFERENCE_BYTES = 2**30  # of scores: above, the plain attention is not timed
COMPILED = ops.INDUCTOR  # the table that --compile hands to torch.compile
NO_FLOAT64 = "the kernels do not serve float64"


def bind(case: Case, function: Callable, inputs: dict[str, Any]) -> Bound:
    """Bind `inputs`, with a private copy of what a call overwrites, to one of our functions."""
    own = case.scratch(inputs)
    return Bound(partial(function, **own), lambda out: case.outputs(out, own))


def ours(name: str, case: Case, function: Callable) -> Implementation:
    return Implementation(name, partial(bind, case, function))


def kernels_away(device: torch.device) -> str:
    """Why the Triton kernels are not run on a device; "" if they are."""
    if device.type != "cuda":
        return "needs a GPU"
    try:
        ops.table("triton")
    except ValueError as error:  # Triton or the kernels are missing
        return str(error)
    return ""


def away(device: torch.device, operators: Collection[str]) -> dict[str, str]:
    """Who takes part in no case of these operators on a device: names, and the reasons."""
    reasons = {"triton": kernels_away(device)}
    for peer in peers.PEERS:
        if not peer.adapters.keys().isdisjoint(operators):
            reasons[peer.name] = peers.why_away(peer, device)
    return {name: reason for name, reason in reasons.items() if reason}


def contestants(case: Case, session: Session) -> list[Implementation]:
    """Everyone for a case who is not away; some with the reason why they are not run in it."""
    absent = away(session.device, [case.op])
    found = [
        _reference(case),
        ours("torch", case, gate.torch_form(case)),
        *([_compiled(case)] if session.compiled else []),
        *([] if "triton" in absent else [_triton(case)]),
    ]
    found += [user_operator.implementation(u, case) for u in session.user if u.op == case.op]
    for peer in peers.PEERS:
        if case.op in peer.adapters and peer.name not in absent:
            found.append(_peer(peer, case))
    return found


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
        operator = case.operator
        form = operator.alone.torch if operator.alone else getattr(COMPILED, operator.field)
        return bind(case, torch.compile(form, dynamic=False, fullgraph=True), inputs)

    return Implementation("torch.compile", compile_and_bind)


def kernel(case: Case) -> Callable:
    """The Triton kernel's public function of a case."""
    if case.operator.alone is None:
        return getattr(ops.table("triton"), case.operator.field)
    module, function = case.operator.alone.kernel
    return getattr(importlib.import_module(f"falcon_h1r_kernels.{module}"), function)


def _triton(case: Case) -> Implementation:
    if case.dtype == torch.float64:
        return Implementation("triton", None, NO_FLOAT64)
    return ours("triton", case, kernel(case))


def _peer(peer: peers.PeerPackage, case: Case) -> Implementation:
    if reason := peer.refuses(case):
        return Implementation(peer.name, None, reason)
    adapter = peer.adapters[case.op]

    def bind_peer(inputs):
        return Bound(*adapter(case, case.scratch(inputs)))

    return Implementation(peer.name, bind_peer, slack=peer.slack)

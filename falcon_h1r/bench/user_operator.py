"""An operator of the user's own, measured beside ours: how it is called, and what it may not do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gate
from .contest import Bound, Implementation
from .registry import Case

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


class UserOperator(NamedTuple):
    """op: an operator of the registry. name: in tables and records. function: called as the model
    calls that operator, and returns what REFERENCE's function returns."""

    op: str
    name: str
    function: Callable


def as_the_model_calls(case: Case, inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments in the order of REFERENCE's signature, the others by name.

    So the function's own names of positional arguments are free.
    """
    positional, named = [], dict(inputs)
    for parameter in inspect.signature(gate.reference(case)).parameters.values():
        if parameter.kind is not POSITIONAL or parameter.name not in named:
            break
        positional.append(named.pop(parameter.name))
    return positional, named


def check_signature(user: UserOperator, case: Case) -> None:
    """Raise ValueError where the function cannot take a case's arguments; makes no tensors."""
    try:
        signature = inspect.signature(user.function)
    except (TypeError, ValueError):  # a compiled function may have none
        return
    inputs = case.inputs("meta")
    positional, named = as_the_model_calls(case, inputs)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        shown = ", ".join([*list(inputs)[: len(positional)], *(f"{name}=..." for name in named)])
        raise ValueError(f"{user.name} is called as {case.op}({shown}): {error}") from None


def implementation(user: UserOperator, case: Case) -> Implementation:
    return Implementation(user.name, partial(_bind, user.function, case))


def _bind(function: Callable, case: Case, inputs: dict[str, Any]) -> Bound:
    own = case.scratch(inputs)
    positional, named = as_the_model_calls(case, own)
    kept = {
        name: tensor.clone()
        for name, tensor in inputs.items()
        if isinstance(tensor, Tensor) and name not in case.operator.mutates
    }

    def outputs(out) -> tuple[Tensor, ...]:
        changed = [name for name, before in kept.items() if not torch.equal(inputs[name], before)]
        for name in changed:  # the inputs are everybody's
            inputs[name].copy_(kept[name])
        kept.clear()
        if changed:
            raise ValueError(f"overwrites its argument {changed[0]}")
        return case.outputs(out, own)

    return Bound(partial(function, *positional, **named), outputs)

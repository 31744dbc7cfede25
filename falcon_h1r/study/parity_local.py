"""The first operator that computes something else than the float64 forward.

The model runs once more. At each tap of FORCED the input that the float64 forward has there,
rounded to the input's dtype, takes the place of the model's own. So no error spreads: a tensor that
is off was made wrong by the operator that made it. One such forward judges all operators. The first
of them, in the order of the forward, is named whose error is more than twice the error of REFERENCE
in the same dtype on the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import REFERENCE, Ops
from ..tap_table import inner_name
from ..taps import full_names, record, tap_of
from .budget import FACTOR, FLOOR, relative, truth_of
from .dump import Inputs, compared_names, in_layout, real_values
from .faults import Patient

# Taps at which an input is replaced, and those that only ours have as a place of their own.
FORCED = tuple(
    "residual.in mamba.in_proj.in mamba.conv.x mamba.scan.x mamba.scan.B mamba.scan.C mamba.gate.y "
    "mamba.gate.z self_attn.in residual.mid final_layernorm.in".split()
)
_OURS = ("mamba.scan.dt", "mamba.scan.state_in", "mamba.conv.window_in")
_FLOOR = 2.0**-23  # one float32 roundoff


class Divergence(NamedTuple):
    """The first tensor that is off."""

    tensor: str
    operator: str  # "layers.3.mamba.ssd_scan: y"
    error: float  # relative rms, of what this place alone does
    tolerance: float

    def __str__(self) -> str:
        return f"{self.operator} ({self.error:.1e}, twice REFERENCE's is {self.tolerance:.1e})"


class Truth:
    """The float64 forward of a model's weights on some inputs, every tensor and call of it."""

    def __init__(self, model, inputs: Inputs):
        self.model, self.inputs = model, inputs
        self.calls: dict[str, list[Tensor]] = {}
        self.tensors: dict[str, Tensor] = {}
        truth_of(model)(*inputs, observe=self._keep)

    @contextmanager
    def _keep(self, model) -> Iterator[None]:
        with record(model) as recording:
            yield
        for name in recording:
            self.calls[name] = recording.calls(name)
            if "s" not in tap_of(name).axes.split():
                self.tensors[name] = in_layout(name, recording[name], self.inputs.mask)

    def errors_of(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Relative rms errors of the compared tensors, in the order of the forward."""
        mask = self.inputs.mask
        return {
            name: relative(*(real_values(name, t[name], mask) for t in (tensors, self.tensors)))[0]
            for name in compared_names(self.model.config)
            if name in tensors and name in self.tensors
        }


def operator_of(name: str) -> str:
    """The operator and which of its tensors, as in "layers.3.mamba.ssd_scan: y"."""
    own = inner_name(name)
    module, what = tap_of(own).maker
    return f"{name[: len(name) - len(own)]}{module}: {what}"


@torch.no_grad()
def ours(truth: Truth, ops: Ops, faults: Sequence = ()) -> dict[str, Tensor]:
    """Tensors of our model under `ops`, each operator fed the truth."""
    patient = Patient(truth.model, faults, ops=ops)
    seen: dict[str, Tensor] = {}

    @contextmanager
    def observe(model) -> Iterator[None]:
        with record(model, compared_names(model.config)) as recording, ExitStack() as stack:
            for name in full_names(model.config, (*FORCED, *_OURS)):
                if name in truth.calls:
                    _force(stack, model, name, truth.calls[name])
            yield
        seen.update(recording)

    patient(*truth.inputs, observe=observe)
    mask = None if patient.parts.keep_padding else truth.inputs.mask
    return {name: in_layout(name, tensor, mask) for name, tensor in seen.items()}


def _force(stack: ExitStack, model, name: str, calls: list[Tensor]) -> None:
    """Replace an input by the truth's, call by call; recorded is what was there."""
    left = iter(calls)
    prefix = name[: len(name) - len(inner_name(name))]
    for source in tap_of(name).sources:

        def hook(module, args, kwargs, index=source.index):
            old = kwargs.get(index) if isinstance(index, str) else args[index]
            if old is None:
                return None
            new = next(left).to(old.dtype).reshape(old.shape)
            if isinstance(index, str):
                return args, {**kwargs, index: new}
            return (*args[:index], new, *args[index + 1 :]), kwargs

        path = f"model.{prefix}{source.module}" if prefix else source.module
        module = model.get_submodule(path.rstrip("."))
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def first_divergence(
    truth: Truth, errors: dict[str, float], yardstick: dict[str, float] | None = None
) -> Divergence | None:
    """The first tensor whose own error is beyond twice that of REFERENCE in the same dtype.

    errors: `truth.errors_of` of a side that was fed the truth; yardstick: those of REFERENCE.
    """
    if yardstick is None:
        yardstick = truth.errors_of(ours(truth, REFERENCE))
    for name, error in errors.items():
        tolerance = FACTOR * max(yardstick.get(name, 0.0), FLOOR)
        if not error <= tolerance:
            return Divergence(name, operator_of(name), error, tolerance)
    return None


def forced_inputs(truth: Truth) -> dict[str, Tensor]:
    """What another side is to be fed, by taps."""
    names = full_names(truth.model.config, FORCED)
    return {name: truth.tensors[name] for name in names}

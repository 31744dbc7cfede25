"""Which known fault of a backward explains gradients that another implementation computed.

A gradient dump is a safetensors file: `input_ids` (b, l), and the gradient of the mean over all
positions of -log p(next token) for any parameters, by their names in the checkpoint. Each fault is
a scan whose forward is right and whose backward is wrong, in float64. The one that comes nearest
is named if it explains most of what the true gradient does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..checks import as_ids, shown
from ..model import FalconH1ForCausalLM
from ..ops import REFERENCE
from ..ssd import ssd_dual, ssd_recurrent
from ..tables import aligned
from ..tensor_file import read_header, read_tensors
from .budget import relative

RIGHT = "right"
EXPLAINS = 0.2  # of the distance to the truth that a named fault leaves, at most


class _Backward(torch.autograd.Function):
    """Itself, with another gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def softplus_of_derivative_1(x, dt, A, B, C, D=None, **options):
    """softplus'(h) = 1 - exp(-softplus(h)) is left out on the way to dt_bias."""
    rate = 1 - torch.exp(-dt.detach())
    return ssd_recurrent(x, _Backward.apply(dt, lambda g: g / rate), A, B, C, D, **options)


def decay_held_fixed(x, dt, A, B, C, D=None, **options):
    """exp(dt A) is taken for a constant: dt learns from what is written to the state alone."""
    steps = dt.detach()
    written = x * (dt / steps)[..., None]
    y, state = ssd_recurrent(written, steps, A.detach() + 0 * A, B, C, None, **options)
    return y if D is None else y + D[:, None] * x, state


def first_head_of_a_group(x, dt, A, B, C, D=None, **options):
    """B and C get the gradient of the first head of their group, not the sum over its heads."""
    r = x.shape[2] // B.shape[2]
    first = (torch.arange(x.shape[2]) % r == 0)[:, None]
    B, C = (t.repeat_interleave(r, 2) for t in (B, C))
    B, C = (torch.where(first, t, t.detach()) for t in (B, C))
    return ssd_recurrent(x, dt, A, B, C, D, **options)


def state_cut_between_chunks(x, dt, A, B, C, D=None, *, chunk_size=128, **options):
    """The state that enters a chunk has no gradient."""
    outputs, state = [], options["initial_state_bhpn"]
    for start in range(0, x.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        inputs = x[:, part], dt[:, part], A, B[:, part], C[:, part], D
        y, state = ssd_dual(*inputs, initial_state_bhpn=state)
        state = state.detach()
        outputs.append(y)
    return torch.cat(outputs, 1), state


def A_without_gradient(x, dt, A, B, C, D=None, **options):
    """A_log learns nothing."""
    return ssd_recurrent(x, dt, A.detach() + 0 * A, B, C, D, **options)


FAULTS: dict[str, Callable] = {
    "the derivative of dt's softplus is missing": softplus_of_derivative_1,
    "the decay's gradient is dropped": decay_held_fixed,
    "the gradients of a group's heads are not summed": first_head_of_a_group,
    "the state's gradient is cut between chunks": state_cut_between_chunks,
    "A has no gradient": A_without_gradient,
}


class GradientDiagnosis(NamedTuple):
    """What is nearest; distances: by fault, root mean squares over kinds of relative errors."""

    distances: dict[str, float]
    kinds: dict[str, tuple[float, float]]  # relative error to the truth, and to the nearest
    tolerance: float = 1e-3

    @property
    def nearest(self) -> str:
        return min(self.distances, key=self.distances.get)

    @property
    def fault(self) -> str | None:
        """Its name; "" where nothing explains the gradients, None where they are right."""
        if self.distances[RIGHT] <= self.tolerance:
            return None
        named = self.distances[self.nearest] <= EXPLAINS * self.distances[RIGHT]
        return self.nearest if named else ""

    def __str__(self) -> str:
        verdict = {None: "the gradients are right", "": "wrong gradients, by no known fault"}
        lines = [verdict.get(self.fault, self.fault or ""), ""]
        rows = [
            (name, f"{d:.1e}") for name, d in sorted(self.distances.items(), key=lambda p: p[1])
        ]
        lines += aligned([("distance of the gradients to", ""), *rows], "lr")
        worst = sorted(self.kinds.items(), key=lambda pair: -pair[1][0])[:8]
        rows = [(kind, f"{truth:.1e}", f"{near:.1e}") for kind, (truth, near) in worst]
        return "\n".join([*lines, "", *aligned([("gradient of", "truth", "nearest"), *rows], "lr")])


def read_gradients(path: str | Path, model) -> tuple[Tensor, dict[str, Tensor]]:
    """(input_ids, gradients by name) of a dump. Raises ValueError for what is none; OSError."""
    tensors = read_tensors(read_header(path), path)
    if "input_ids" not in tensors:
        raise ValueError(f"{path}: no tensor 'input_ids'")
    ids = as_ids(f"{path}: input_ids", tensors.pop("input_ids"), model.config.vocab_size)
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"{path}: input_ids {tuple(ids.shape)}, expected (b, l) with l > 1")
    known = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in known:
            raise ValueError(f"{path}: the model has no parameter {shown(name)}")
        if tensor.shape != known[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(known[name].shape)} of floats"
            )
    if not tensors:
        raise ValueError(f"{path}: no gradients")
    return ids, tensors


def diagnose_gradients(
    model: FalconH1ForCausalLM,
    ids: Tensor,
    gradients: dict[str, Tensor],
    tolerance: float = 1e-3,
    progress: Callable[[str], None] = lambda text: None,
) -> GradientDiagnosis:
    """Compare with the true gradients and with those of each fault.

    tolerance: relative error of right gradients: 1e-3 serves float32, 0.3 bfloat16.
    """
    found = _by_kind(gradients)
    errors = {}
    for name, scan in {RIGHT: REFERENCE.ssd_scan, **FAULTS}.items():
        progress(name)
        made = _by_kind(_gradients(model, scan, ids, gradients))
        errors[name] = {kind: relative(found[kind], made[kind])[0] for kind in found}
    distances = {
        name: (sum(min(e, 1e6) ** 2 for e in kinds.values()) / len(kinds)) ** 0.5
        for name, kinds in errors.items()
    }
    nearest = min(distances, key=distances.get)
    kinds = {kind: (errors[RIGHT][kind], errors[nearest][kind]) for kind in found}
    return GradientDiagnosis(distances, kinds, tolerance)


def _gradients(model, scan, ids: Tensor, names) -> dict[str, Tensor]:
    ops = REFERENCE._replace(ssd_scan=scan)
    copy = FalconH1ForCausalLM(model.config, ops=ops, dtype=torch.float64)
    copy.load_state_dict(model.state_dict())
    loss = cross_entropy(copy(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parameters = dict(copy.named_parameters())
    made = torch.autograd.grad(
        loss, [parameters[name] for name in names], materialize_grads=True, allow_unused=True
    )
    return dict(zip(names, made))


def _by_kind(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        kind = re.sub(r"\.\d+\.", ".N.", name.removeprefix("model."))
        kinds.setdefault(kind, []).append(gradients[name].flatten().double())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}

"""Where each tensor's error comes from, and the tolerance that follows from it.

Four changes lead from the float64 tensor to the one that is computed. What each of them adds is a
part of the tensor's error:

    weights      float64 maths with the weights rounded to the dtype, against the stored ones. Zero
                 by definition where the checkpoint stores no wider ones
    activations  the same maths with results rounded where the precision policy rounds them: every
                 operator and every linear layer computes in float64 and is rounded once
    algorithm    the scan as the table computes it, in its working dtype (recurrence or chunks)
    kernel       the rest: linear layers and the other operators as they are

As vectors they sum to the whole error; their sizes are root mean squares over that of the float64
tensor. The tolerance of a tensor is twice the root sum square of the last three parts under
REFERENCE, an implementation independent of the tables that are judged: the truth of a comparison
has the rounded weights. The factor 2: two right orders of evaluation differ by chance.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..cache_file import fingerprint
from ..files import write_file
from ..json_file import read_json_object
from ..model import FalconH1ForCausalLM
from ..ops import REFERENCE, Ops
from ..precision import compute_dtype
from .dump import Inputs, real_values, take_dump
from .faults import Patient

FACTOR = 2.0
FLOOR = 2.0**-23  # of a yardstick: one float32 roundoff; an error may be 0 by chance
FORMAT = "falcon_h1r.budget"
SHIPPED = Path(__file__).parent / "budget-h1r-pico.json"


class ErrorParts(NamedTuple):
    """Sizes of a tensor's error, relative to the tensor."""

    weights: float
    activations: float
    algorithm: float
    kernel: float
    total: float  # of the sum of the four

    @property
    def combined(self) -> float:
        """Root sum square of the parts but for the weights'."""
        return math.hypot(self.activations, self.algorithm, self.kernel)


@torch.no_grad()
def rounded(model: FalconH1ForCausalLM, dtype: torch.dtype) -> FalconH1ForCausalLM:
    """`model` in `dtype`, every parameter a value of it: A_log, D and dt_bias too.

    So that float64, ours and an implementation that keeps those three in the model's dtype start
    from the same numbers, as with a released bfloat16 checkpoint.
    """
    out = FalconH1ForCausalLM(model.config, ops=model.ops, dtype=dtype, device="meta")
    wanted = out.state_dict()
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    out.load_state_dict({n: w.to(wanted[n].dtype) for n, w in weights.items()}, assign=True)
    return out.eval()


def truth_of(model: FalconH1ForCausalLM) -> Patient:
    """The float64 forward of REFERENCE with the weights of `model`."""
    return Patient(model, ops=REFERENCE, dtype=torch.float64)


def relative(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(rms, max) of the difference over the rms and the max of the truth."""
    found, truth = found.double(), truth.double()
    difference = found - truth
    if not bool(difference.any()):
        return 0.0, 0.0
    if not bool(difference.isfinite().all()):
        return math.inf, math.inf
    scales = _rms(truth), float(truth.abs().max())
    sizes = _rms(difference), float(difference.abs().max())
    return tuple(a / b if b else math.inf for a, b in zip(sizes, scales))


def split_error(
    model: FalconH1ForCausalLM, dtype: torch.dtype, table: Ops, inputs: Inputs, names=None
) -> dict[str, ErrorParts]:
    """The parts of every tensor's error of `model` in `dtype` under `table`.

    model: in the dtype it is stored in. names: taps, as in `taps.full_names`.
    """
    narrow = rounded(model, dtype)
    exact, algorithm = _exact(table=None), _exact(table)
    runs = [
        take_dump(truth_of(model), model, inputs, names),
        take_dump(truth_of(narrow), model, inputs, names),
    ]
    for ops in (exact, algorithm):
        with _ExactLinear():
            runs.append(take_dump(Patient(narrow, ops=ops), narrow, inputs, names))
    runs.append(take_dump(Patient(narrow, ops=table), narrow, inputs, names))
    if dtype == model.dtype or torch.promote_types(dtype, model.dtype) == dtype:
        runs[0] = runs[1]  # no narrower than stored: nothing is rounded
    out = {}
    for name in runs[1].tensors:
        values = [real_values(name, run.tensors[name], inputs.mask).double() for run in runs]
        scale = _rms(values[1]) or 1.0
        steps = [_rms(b - a) / scale for a, b in itertools.pairwise(values)]
        out[name] = ErrorParts(*steps, total=_rms(values[-1] - values[0]) / scale)
    return out


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


class _ExactLinear(TorchFunctionMode):
    """Linear layers in float64, rounded once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3] if len(args) < 3 else args
        wide = func(x.double(), weight.double(), None if bias is None else bias.double())
        return wide.to(x.dtype)


_IN_PLACE = {"causal_conv1d_step": 1, "ssd_step": 0}  # the argument that an operator updates


def _exact(table: Ops | None) -> Ops:
    """REFERENCE in float64 with results rounded as its own are; `table`'s scan and step, if any."""

    def wide(value):
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def rounding(name: str):
        operator, updated = getattr(REFERENCE, name), _IN_PLACE.get(name)

        def exact(*inputs, **options):
            widened = [wide(value) for value in inputs]
            out = operator(*widened, **{key: wide(value) for key, value in options.items()})
            if updated is not None:
                inputs[updated].copy_(widened[updated])
            dtype = inputs[1 if updated == 0 else 0].dtype
            if not isinstance(out, tuple):
                return out.to(dtype)
            second = compute_dtype(dtype) if name == "ssd_scan" else dtype
            return out[0].to(dtype), out[1].to(second)

        return exact

    exact = Ops(**{name: rounding(name) for name in Ops._fields})
    if table is None:
        return exact
    return exact._replace(ssd_scan=table.ssd_scan, ssd_step=table.ssd_step)


class Budget:
    """ErrorParts and tolerances of a model's tensors, by dtype and path."""

    def __init__(self, entries: Mapping, made_for: str, fingerprint: str, versions: Mapping):
        self.entries, self.made_for = entries, made_for
        self.fingerprint, self.versions = fingerprint, versions

    def tolerance(self, dtype: str, path: str, name: str) -> float | None:
        """Of a tensor's relative rms error; None where the budget does not have it."""
        entry = self.entries.get(dtype, {}).get(path, {}).get(name)
        return None if entry is None else entry["tolerance"]

    def parts(self, dtype: str, path: str, name: str, table: str) -> ErrorParts | None:
        entry = self.entries.get(dtype, {}).get(path, {}).get(name, {}).get(table)
        return None if entry is None else ErrorParts(*entry)

    def covers(self, dtypes, paths) -> bool:
        return all(path in self.entries.get(dtype, {}) for dtype in dtypes for path in paths)

    def write(self, path: str | Path) -> None:
        document = {
            "format": FORMAT,
            "model": self.made_for,
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
            "rule": f"tolerance = {FACTOR:g} x root sum square of activations, algorithm and "
            f"kernel under reference; relative root mean square",
            "parts": list(ErrorParts._fields),
            "entries": self.entries,
        }
        write_file(path, json.dumps(document, separators=(",", ":")) + "\n")


def make_budget(
    model: FalconH1ForCausalLM,
    inputs: Mapping[str, Inputs],
    dtypes,
    tables: Mapping[str, Ops],
    made_for: str = "",
    names=None,
) -> Budget:
    """Measure a budget. inputs: by path; dtypes: names; tables: further ones to split, by name."""
    entries: dict = {}
    for dtype in dtypes:
        for path, given in inputs.items():
            splits = {
                name: split_error(model, getattr(torch, dtype), table, given, names)
                for name, table in {**tables, "reference": REFERENCE}.items()
            }
            cell = entries.setdefault(dtype, {}).setdefault(path, {})
            for name, parts in splits["reference"].items():
                tolerance = FACTOR * parts.combined
                row = {table: [_short(v) for v in split[name]] for table, split in splits.items()}
                cell[name] = {"tolerance": _short(tolerance), **row}
    versions = {"torch": torch.__version__}
    return Budget(entries, made_for, fingerprint(model), versions)


def read_budget(path: str | Path) -> Budget:
    """Raises ValueError for a file that is no budget."""
    try:
        document = read_json_object(path, extended=True)
        if document["format"] != FORMAT:
            raise ValueError("format")
        texts = document["model"], document["fingerprint"]
        if not (_is_budget(document["entries"]) and all(isinstance(text, str) for text in texts)):
            raise ValueError("entries")
        return Budget(document["entries"], *texts, document["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a budget file ({error!r})") from error


def _is_budget(entries) -> bool:
    """Whether entries are {dtype: {path: {name: {"tolerance": number, table: five numbers}}}}."""
    cells = [entries]
    for _ in range(3):
        if not all(isinstance(cell, dict) for cell in cells):
            return False
        cells = [inner for cell in cells for inner in cell.values()]
    return all(isinstance(cell, dict) and "tolerance" in cell for cell in cells) and all(
        isinstance(part, (int, float)) and not isinstance(part, bool)
        for cell in cells
        for name, parts in cell.items()
        for part in ([parts] if name == "tolerance" else _five(parts))
    )


def _five(parts) -> list:
    return parts if isinstance(parts, list) and len(parts) == len(ErrorParts._fields) else [None]


def shipped_budget(model: FalconH1ForCausalLM) -> Budget | None:
    """The budget that comes with the package, if it is of this model's weights."""
    if not SHIPPED.is_file():
        return None
    budget = read_budget(SHIPPED)
    return budget if budget.fingerprint == fingerprint(model) else None


def _short(value: float) -> float:
    return float(f"{value:.3g}")

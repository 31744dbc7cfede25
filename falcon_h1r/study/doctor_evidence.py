"""What a port gave, and what each fault would have given in its place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import TORCH
from ..taps import full_names
from .budget import rounded
from .dump import Dump, Inputs, real_values, take_dump
from .faults import Fault, Patient

LIMIT = 4.0  # times the noise: twice the rule's factor, for ports that round more often than ours
_FLOOR = 1e-7  # relative, about a float32 roundoff: no port is asked to be better
_FAR = 1e9  # relative distance where one side is not finite


class Evidence(NamedTuple):
    """Tensors of a port for one input, in float64 and without padding."""

    label: str
    inputs: Inputs
    tensors: dict[str, Tensor]


def of_dump(dump: Dump, label: str = "dump") -> Evidence:
    """Raises ValueError for a dump without tensors."""
    if not dump.tensors:
        raise ValueError(f"{label}: it holds no tensor but its inputs")
    mask = dump.inputs.mask
    values = {name: real_values(name, t, mask).double() for name, t in dump.tensors.items()}
    return Evidence(label, dump.inputs, values)


def probes(config, seed: int = 0) -> dict[str, Inputs]:
    """Inputs that together show every fault: a prefill, pieces and steps behind a cache, padding.

    The prefill is longer than two chunks of the scan.
    """
    length = min(max(40, 2 * config.mamba_chunk_size + 5), 160)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    short = ids[:, :32]
    mask = torch.ones_like(short, dtype=torch.bool)
    mask[0, :7], mask[1, -5:] = False, False
    return {
        "prefill": Inputs(ids),
        "chunked": Inputs(short, pieces=(11, 9, 12)),
        "decode": Inputs(short, pieces=(24,) + (1,) * 8),
        "padded": Inputs(short, mask),
    }


def ask(port: Callable, config, seed: int = 0) -> tuple[list[Evidence], torch.dtype | None]:
    """Run a port on the probes it can take: port(input_ids, ...) -> logits (b, l, vocab).

    It is given `attention_mask` and `pieces` where it has arguments of these names: pieces is a
    tuple of lengths into which the rows are cut, each to be read behind a cache of those before it.
    Also returns the dtype that its logits are values of, if that is a narrow one.
    """
    takes = inspect.signature(port).parameters
    found, dtypes = [], set()
    for label, inputs in probes(config, seed).items():
        options = {}
        if inputs.mask is not None:
            options["attention_mask"] = inputs.mask.long()
        if inputs.pieces is not None:
            options["pieces"] = inputs.pieces
        if not set(options) <= set(takes):
            continue
        logits = port(inputs.ids, **options)
        expected = (*inputs.ids.shape, config.vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the port returned {shape}, expected logits {expected}")
        logits = logits.detach()
        dtypes.add(values_dtype([logits]))
        found.append(of_dump(Dump(inputs, {"logits": logits}), label))
    return found, dtypes.pop() if len(dtypes) == 1 else None


def values_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """bfloat16 or float16 if every value is one, else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(dtype).double(), t.double()) for t in tensors):
            return dtype
    return torch.float32


class Witness:
    """Predictions of any faults for some evidence, kept once made.

    model: in the dtype it is stored in. dtype: what the port computes in; the weights are rounded
    to it. Predictions are float64, under the TORCH operators.
    """

    def __init__(self, model, evidence: Sequence[Evidence], dtype: torch.dtype):
        self.model, self.evidence = rounded(model, dtype), list(evidence)
        self._kept: dict[tuple, dict[str, Tensor]] = {}
        self._noise: dict[tuple, dict[str, float]] = {}
        self._distances: dict[tuple, dict[str, float]] = {}  # these depend on the evidence

    def with_evidence(self, evidence: Sequence[Evidence]) -> Witness:
        """For other values of the same tensors on the same inputs; predictions are shared."""
        other = object.__new__(Witness)
        other.__dict__.update(self.__dict__, evidence=list(evidence), _distances={})
        return other

    def predict(self, faults: Sequence[Fault], index: int) -> dict[str, Tensor]:
        """What evidence `index` would hold."""
        key = (_names(faults), index)
        if key not in self._kept:
            self._kept[key] = self._run(faults, index, torch.float64)
        return self._kept[key]

    def _run(self, faults, index: int, dtype) -> dict[str, Tensor]:
        _, inputs, tensors = self.evidence[index]
        patient = Patient(self.model, faults, ops=TORCH, dtype=dtype)
        if set(tensors) == {"logits"}:
            found = {"logits": patient(*inputs)}
        else:
            known = set(full_names(patient.model.config))
            names = [name for name in tensors if name in known]
            found = take_dump(patient, patient.model, inputs, names).tensors
        return {n: real_values(n, t, inputs.mask).double() for n, t in found.items()}

    def noise(self, faults: Sequence[Fault], index: int) -> dict[str, float]:
        """How far this fault's own forward in the port's dtype is from its float64 one."""
        key = (_names(faults), index)
        if key not in self._noise:
            exact = self.predict(faults, index)
            found = self._run(faults, index, self.model.dtype)
            scales = self.predict((), index)
            self._noise[key] = {
                name: max(distance(found[name], exact[name], scales.get(name, exact[name])), _FLOOR)
                for name in exact
            }
        return self._noise[key]

    def distances(self, faults: Sequence[Fault], index: int) -> dict[str, float]:
        """Of each tensor of the evidence to the prediction, relative to the right tensor."""
        key = (_names(faults), index)
        if key not in self._distances:
            predicted, right = self.predict(faults, index), self.predict((), index)
            self._distances[key] = {
                name: distance(tensor, predicted[name], right[name])
                for name, tensor in self.evidence[index].tensors.items()
                if name in predicted and name in right
            }
        return self._distances[key]

    def cost(self, faults: Sequence[Fault], index: int) -> float:
        """How badly the faults explain evidence `index`: mean of log(1 + (distance / noise)^2)."""
        noise = self.noise((), index)
        distances = self.distances(faults, index)
        terms = [math.log1p((d / noise[name]) ** 2) for name, d in distances.items()]
        return sum(terms) / len(terms) if terms else math.inf

    def effect(self, faults: Sequence[Fault], index: int) -> float:
        """How far the faults move any tensor of evidence `index`, in units of the noise."""
        right, noise = self.predict((), index), self.noise((), index)
        found = self.predict(faults, index)
        shown = [n for n in self.evidence[index].tensors if n in found and n in right]
        moves = (distance(found[name], right[name], right[name]) / noise[name] for name in shown)
        return max(moves, default=0.0)

    def excess(self, faults: Sequence[Fault], index: int, own_noise: bool = True) -> float:
        """The largest distance of any tensor that is left, in units of the noise.

        own_noise: the noise of the faults too, where it is larger, for another forward.
        """
        usual = self.noise((), index)
        noise = self.noise(faults, index) if own_noise else usual
        distances = self.distances(faults, index)
        return max((d / max(noise[n], usual.get(n, 0)) for n, d in distances.items()), default=0.0)


def _names(faults: Sequence[Fault]) -> tuple[str, ...]:
    return tuple(sorted(fault.name for fault in faults))


def distance(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Root mean square of the difference over that of `scale`."""
    if found.shape != expected.shape:
        return _FAR
    finite = found.isfinite() & expected.isfinite()
    if not bool((finite | (found.isfinite() == expected.isfinite())).all()):
        return _FAR
    difference = torch.where(finite, found - expected, 0).square().mean().sqrt()
    size = float(scale.square().mean().sqrt())
    ratio = float(difference) / size if size else float(difference)
    return min(ratio, _FAR) if ratio == ratio else _FAR

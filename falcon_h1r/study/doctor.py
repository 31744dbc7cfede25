"""Which known fault a port has, from what it computes.

Every fault of `faults_list.py` is planted in our model, run in float64 on the port's own inputs,
and judged by how much of the difference between the port and the right tensors it explains. Where
no single fault explains it, two are tried. Answers: "no fault", "fault", "two faults", and "unknown
fault", with the first tensor that differs where inner tensors were given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import torch

from . import doctor_evidence
from .doctor_evidence import LIMIT, Witness
from .dump import Dump
from .faults import Fault
from .faults_list import FAULTS
from .parity_local import operator_of

CALIBRATION = Path(__file__).parent / "doctor-calibration.json"
# A pair holds one of so many single faults, those that explain the evidence best.
_FIRST = 8
# Tensors within the noise may still show a small fault. It is named if it leaves at most this share
# of the sum of squared distances to the right tensors.
_LESS = 0.64
# Every pair is judged by the evidence that is cheapest to predict, then so many of them by all.
_FULL = 10


@dataclass
class Explanation:
    """Faults that may have made the evidence, and how well they explain it."""

    faults: tuple[str, ...]
    residual: float  # distance that the faults leave unexplained, relative to the right tensors
    excess: float  # the largest such distance of any tensor, in units of the noise
    cost: float  # of `Witness.cost`, mean over the evidence: lower is better
    energy: float  # sum of the squares of all distances, in units of the noise

    @property
    def explains(self) -> bool:
        return self.excess <= LIMIT


@dataclass
class Diagnosis:
    """What the doctor found."""

    status: str  # "no fault", "fault", "two faults", "unknown fault"
    faults: tuple[str, ...]  # the best explanation's; of an unknown fault: ()
    alternatives: list[tuple[str, ...]]  # that the evidence does not tell from it
    confidence: float  # that one of these is right; calibrated on planted faults
    residual: float  # relative distance to the right tensors, before any fault
    candidates: list[Explanation]  # best first
    first_divergence: str  # of what no known fault explains, where inner tensors show it
    hidden: dict[str, str]  # faults that cannot be seen, and why
    dtype: str  # of the port's arithmetic
    evidence: list[str]
    hints: dict[str, str] = field(default_factory=dict)
    margin: float = 0.0  # by how much the best explanation's cost is below the next one's

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"evidence: {', '.join(self.evidence)}; arithmetic: {self.dtype}; distance to the "
            f"right tensors: {self.residual:.2e}"
        )
        if self.status == "no fault":
            yield "no fault: the tensors are right, as far as this evidence can tell"
        elif self.status == "unknown fault":
            yield "unknown fault: no known fault, nor two of them, explain the difference"
            where = "inner tensors would tell where it begins; give a dump that holds some"
            yield f"first divergence: {self.first_divergence or where}"
        else:
            yield f"{self.status}: {' and '.join(self.faults)} (confidence {self.confidence:.3f})"
            for name in self.faults:
                yield f"  {name}: {self.hints[name]}"
            for other in self.alternatives:
                yield f"  not to be told from: {' and '.join(other)}"
        for candidate in self.candidates[:5]:
            what = " and ".join(candidate.faults) or "no fault"
            yield f"    distance with {what}: {candidate.residual:.2e}"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.hidden.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            yield f"cannot be seen ({reason}): {', '.join(names)}"


def diagnose(
    port: Dump | Sequence[Dump] | Callable,
    model,
    dtype: torch.dtype | None = None,
    faults: Sequence[Fault] = FAULTS,
    pairs: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Diagnose a port of `model`, which is in the dtype its checkpoint stores.

    port: a dump (or several) with any subset of tensors, or a function ids -> logits, which may
    take `attention_mask` and `pieces` (`doctor_evidence.ask`). dtype: what the port computes in;
    None: what a dump says, or else its values show. pairs: look for two faults where one does not
    do. Needs room for the model in float64, and runs it once per fault.
    Raises ValueError for a dump without tensors and logits of a wrong shape.
    """
    guess = None
    if callable(port):
        evidence, guess = doctor_evidence.ask(port, model.config)
    else:
        dumps = [port] if isinstance(port, Dump) else list(port)
        evidence = [
            doctor_evidence.of_dump(dump, dump.source or f"dump {i + 1}")
            for i, dump in enumerate(dumps)
        ]
        said = {dump.dtype for dump in dumps} - {None}
        dtype = said.pop() if dtype is None and len(said) == 1 else dtype
        if dtype is None:
            values = [tensor for dump in dumps for tensor in dump.tensors.values()]
            guess = doctor_evidence.values_dtype(values)
    found = _diagnose(model, evidence, dtype or guess or torch.float32, faults, pairs, progress)
    if dtype is None and guess == torch.float32 and found.status == "unknown fault":
        # Logits of narrow arithmetic may come in float32.
        other = _diagnose(model, evidence, torch.bfloat16, faults, pairs, progress)
        found = other if other.status != "unknown fault" else found
    return found


def _diagnose(model, evidence, dtype, faults, pairs, progress) -> Diagnosis:
    return examine(Witness(model, evidence, dtype), faults, pairs, progress)


@torch.no_grad()
def examine(
    witness: Witness,
    faults: Sequence[Fault] = FAULTS,
    pairs: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """`diagnose` for evidence at hand."""
    every = range(len(witness.evidence))
    config = witness.model.config
    hidden = {f.name: reason for f in faults if (reason := f.hidden(config))}
    seen = []
    for fault in faults:
        if fault.name in hidden:
            continue
        progress(fault.name)
        if all(witness.effect((fault,), i) < 1 for i in every):
            hidden[fault.name] = _why_unseen(witness, fault)
        else:
            seen.append(fault)
    right = _explanation(witness, (), every)
    singles = sorted((_explanation(witness, (f,), every) for f in seen), key=lambda c: c.cost)
    by_name = {fault.name: fault for fault in faults}
    if right.explains:
        # A fault moves tensors in a direction of its own, rounding does not. So a fault that
        # explains a large share of the difference is there, even where the difference is small.
        better = [c for c in singles if c.explains and c.energy < _LESS * right.energy]
        if not better:
            return _report(witness, "no fault", [right], hidden)
        return _report(witness, "fault", sorted(better, key=lambda c: c.energy), hidden, by_name)
    if any(candidate.explains for candidate in singles):
        return _report(witness, "fault", singles, hidden, by_name)
    found = []
    if pairs:
        found = _pairs(witness, singles, by_name, seen, progress)
        if any(candidate.explains for candidate in found):
            return _report(witness, "two faults", found, hidden, by_name)
    ranked = sorted([*singles[:5], *found], key=lambda c: c.cost)
    return _report(witness, "unknown fault", [*ranked, right], hidden)


def _why_unseen(witness: Witness, fault: Fault) -> str:
    inputs = [evidence.inputs for evidence in witness.evidence]
    given = {"prefill"}
    for one in inputs:
        if one.mask is not None:
            given.add("padded")
        if one.pieces is not None:
            given.add("decode" if 1 in one.pieces[1:] else "chunked")
    if fault.needs not in given:
        return f"needs {fault.needs} evidence"
    return "its effect here is below the noise of this arithmetic"


def _explanation(witness: Witness, faults: tuple[Fault, ...], indices) -> Explanation:
    cost = sum(witness.cost(faults, i) for i in indices) / len(indices)
    distances = [d for i in indices for d in witness.distances(faults, i).values()]
    residual = math.sqrt(sum(d * d for d in distances) / max(len(distances), 1))
    energy = sum(
        (d / witness.noise((), i)[name]) ** 2
        for i in indices
        for name, d in witness.distances(faults, i).items()
    )
    # The faults' own noise costs another forward, so it is asked for only where it may decide.
    excess = max(witness.excess(faults, i, own_noise=False) for i in indices)
    if LIMIT < excess < 100 * LIMIT:
        excess = max(witness.excess(faults, i) for i in indices)
    return Explanation(tuple(fault.name for fault in faults), residual, excess, cost, energy)


def _pairs(witness, singles, by_name, seen, progress) -> list[Explanation]:
    """Pairs that begin with one of the best single faults, cheapest evidence first."""
    every = range(len(witness.evidence))
    first = [by_name[c.faults[0]] for c in singles[:_FIRST]]
    # Evidence that no single fault explains, the fewest forwards first.
    open_ones = [i for i in every if witness.excess((), i) > LIMIT]
    costs = sorted(open_ones, key=lambda i: len(witness.evidence[i].inputs.pieces or (1,)))
    cheap = costs[:1] or [0]
    tried = {}
    for one, other in combinations(seen, 2):
        if one.site != other.site and (one in first or other in first):
            progress(f"{one.name} and {other.name}")
            tried[one.name, other.name] = sum(witness.cost((one, other), i) for i in cheap)
    best = sorted(tried, key=tried.get)[:_FULL]
    found = [_explanation(witness, tuple(by_name[n] for n in names), every) for names in best]
    return sorted(found, key=lambda c: c.cost)


def _report(witness, status, candidates, hidden, by_name=None) -> Diagnosis:
    right = _explanation(witness, (), range(len(witness.evidence)))
    out = Diagnosis(
        status,
        (),
        [],
        0.0,
        right.residual,
        candidates[:10],
        "",
        hidden,
        str(witness.model.dtype).removeprefix("torch."),
        [evidence.label for evidence in witness.evidence],
    )
    if status == "unknown fault":
        out.first_divergence = _first_divergence(witness)
    if by_name is None:
        return out
    explaining = [c for c in candidates if c.explains]
    best = explaining[0]
    out.faults, out.alternatives = best.faults, [c.faults for c in explaining[1:]]
    others = [c.cost for c in candidates if not c.explains]
    out.margin = min([*others, right.cost]) - best.cost
    out.confidence = confidence(out.margin)
    out.hints = {name: by_name[name].hint for name in best.faults}
    return out


def _first_divergence(witness: Witness) -> str:
    """The first given tensor, in the order of the forward, that is not right."""
    for i in range(len(witness.evidence)):
        noise, distances = witness.noise((), i), witness.distances((), i)
        if set(distances) == {"logits"}:
            continue
        for name, found in distances.items():
            if found > LIMIT * noise[name]:
                return f"{operator_of(name)} ({found:.1e}, noise {noise[name]:.1e})"
    return ""


def confidence(margin: float) -> float:
    """How often an answer with at least this margin was right among planted faults."""
    if not CALIBRATION.is_file():
        return math.nan
    steps = json.loads(CALIBRATION.read_text())["steps"]
    return max((share for least, share in steps if margin >= least), default=0.0)

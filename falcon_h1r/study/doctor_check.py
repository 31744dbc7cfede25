"""How often the doctor is right: faults planted in observers of several configurations.

An observer is our model with faults, run in float32 or bfloat16; the doctor gets its logits, alone
or with some inner tensors, and predicts in float64. A fault counts as identifiable where it moves
what is observed by more than the doctor's own limit; of the others "no fault" is the right answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..files import write_file
from ..model import FalconH1ForCausalLM
from ..ops import TORCH
from ..taps import full_names, tap_of
from .adversarial import CONFIGS, random_model
from .budget import rounded
from .doctor import Diagnosis, examine
from .doctor_evidence import LIMIT, Evidence, Witness, of_dump, probes
from .dump import Dump, Inputs, take_dump
from .faults import Fault, Patient
from .faults_list import FAULTS

DTYPES = ("float32", "bfloat16")


class Planting(NamedTuple):
    """One planted observer and what the doctor said."""

    config: str
    dtype: str
    evidence: str  # "logits" of all probes, "prefill logits", "some tensors"
    planted: tuple[str, ...]
    identifiable: bool
    answer: Diagnosis

    @property
    def first(self) -> bool:
        """Whether the best explanation is what was planted."""
        return set(self.answer.faults) == set(self.planted)

    @property
    def right(self) -> bool:
        """Whether that is the best explanation or one named as equal to it; of what is below the
        noise, "no fault" is right as well."""
        named = [set(faults) for faults in (self.answer.faults, *self.answer.alternatives)]
        quiet = not self.identifiable and self.answer.status == "no fault"
        return quiet or (bool(self.planted) and set(self.planted) in named)


class Observer:
    """Makes evidence from a model with planted faults, in one dtype."""

    def __init__(self, model, dtype: str, kind: str, seed: int = 0):
        self.model, self.kind = rounded(model, getattr(torch, dtype)), kind
        inputs = probes(model.config, seed)
        self.inputs = {"prefill": inputs["prefill"]} if kind != "logits" else inputs
        self.names = ["logits"]
        if kind == "some tensors":
            known = [n for n in full_names(model.config) if "s" not in tap_of(n).axes.split()]
            self.names = sorted(random.Random(seed).sample(known, 12), key=known.index)
        right = [self._take((), label, given) for label, given in self.inputs.items()]
        self.witness = Witness(model, right, self.model.dtype)

    def _take(self, faults: Sequence[Fault], label: str, inputs: Inputs) -> Evidence:
        patient = Patient(self.model, faults, ops=TORCH)
        if self.names == ["logits"]:
            return of_dump(Dump(inputs, {"logits": patient(*inputs)}), label)
        known = [name for name in self.names if name in full_names(patient.model.config)]
        return of_dump(take_dump(patient, patient.model, inputs, known), label)

    def see(self, faults: Sequence[Fault]) -> Witness:
        evidence = [self._take(faults, label, given) for label, given in self.inputs.items()]
        return self.witness.with_evidence(evidence)

    def moves(self, faults: Sequence[Fault]) -> bool:
        """Whether the faults move anything observed by more than the doctor's limit."""
        witness = self.witness
        return any(witness.effect(faults, i) > 2 * LIMIT for i in range(len(witness.evidence)))


def try_singles(observer: Observer, config: str, dtype: str, faults=FAULTS) -> list[Planting]:
    """The right model, and each fault that the configuration can show."""
    plantings = [(), *((f,) for f in faults if not f.hidden(observer.model.config))]
    return [_planting(observer, config, dtype, planted, faults, False) for planted in plantings]


def try_pairs(
    observer: Observer, config: str, dtype: str, count: int, seed: int = 0, faults=FAULTS
) -> list[Planting]:
    """A random sample of pairs, each fault of which shows with the other one planted too."""
    chooser = random.Random(seed)
    able = [f for f in faults if not f.hidden(observer.model.config) and observer.moves((f,))]
    out = []
    while len(out) < count:
        one, other = chooser.sample(able, 2)
        if one.site != other.site:
            out.append(_planting(observer, config, dtype, (one, other), faults, True))
    return out


def _planting(observer, config, dtype, planted, faults, pairs: bool) -> Planting:
    answer = examine(observer.see(planted), faults, pairs=pairs)
    names = tuple(fault.name for fault in planted)
    moves = bool(planted) and observer.moves(planted)
    return Planting(config, dtype, observer.kind, names, moves, answer)


def self_test(
    models: dict[str, FalconH1ForCausalLM] | None = None,
    pairs: int = 60,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Planting]:
    """All single faults of several models, dtypes and kinds of evidence, and a sample of pairs.

    models: by name, None for random ones of CONFIGS.
    """
    if models is None:
        models = {name: random_model(config, seed) for name, config in CONFIGS.items()}
    cases: list[Planting] = []
    share, extra = divmod(pairs, len(models))
    for index, (name, model) in enumerate(models.items()):
        for dtype in DTYPES:
            for kind in ("logits", "prefill logits", "some tensors"):
                progress(f"{name}, {dtype}, {kind}")
                observer = Observer(model, dtype, kind, seed)
                cases += try_singles(observer, name, dtype)
                if kind == "logits" and dtype == "float32":
                    count = share + (index < extra)
                    cases += try_pairs(observer, name, dtype, count, seed)
    return cases


def summary(cases: Sequence[Planting]) -> str:
    """Accuracies by configuration, dtype and evidence, and every miss."""
    lines = ["planted   identifiable  named first  named  | configuration, dtype, evidence"]
    keys = dict.fromkeys((c.config, c.dtype, c.evidence, len(c.planted) == 2) for c in cases)
    for key in keys:
        own = [c for c in cases if (c.config, c.dtype, c.evidence, len(c.planted) == 2) == key]
        seen = [c for c in own if c.identifiable]
        first, among = sum(c.first for c in seen), sum(c.right for c in seen)
        label = ", ".join(key[:3]) + (", pairs" if key[3] else "")
        lines.append(f"{len(own):7} {len(seen):13} {first:12} {among:6}  | {label}")
    seen = [c for c in cases if c.identifiable]
    quiet = [c for c in cases if not c.identifiable]
    lines.append(
        f"of {len(seen)} identifiable plantings {sum(c.first for c in seen)} are named first and "
        f"{sum(c.right for c in seen)} named; of {len(quiet)} others (right models, and faults "
        f"below the noise) {sum(c.right for c in quiet)} are called no fault or what they are"
    )
    for c in cases:
        if not c.right:
            planted = " and ".join(c.planted) or "nothing"
            said = " and ".join(c.answer.faults) or c.answer.status
            lines.append(f"  {c.config}, {c.dtype}, {c.evidence}: {planted} was called {said}")
    return "\n".join(lines)


def as_json(cases: Sequence[Planting]) -> str:
    rows = [
        {**case._asdict(), "answer": case.answer.status, "faults": case.answer.faults}
        | {"alternatives": case.answer.alternatives, "margin": case.answer.margin}
        | {"first": case.first, "right": case.right}
        for case in cases
    ]
    return json.dumps({"cases": rows, "calibration": calibrate(cases)})


def calibrate(cases: Sequence[Planting]) -> list[tuple[float, float]]:
    """(margin, share): at least this share of the answers with at least this margin were right.

    Shares are (right + 1) / (all + 2), so that few cases do not make certainty.
    """
    answers = [(c.answer.margin, c.right) for c in cases if c.answer.faults]
    steps = []
    for least in (0.0, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 12.0):
        right = [was for margin, was in answers if margin >= least]
        steps.append((least, round((sum(right) + 1) / (len(right) + 2), 4)))
    return steps


def write_calibration(cases: Sequence[Planting], path: str | Path) -> None:
    document = {
        "what": "share of right answers among planted faults, by the margin of the answer",
        "cases": len(cases),
        "steps": calibrate(cases),
    }
    write_file(path, json.dumps(document, indent=1) + "\n")

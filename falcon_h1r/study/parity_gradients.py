"""Errors of gradients: each kind of parameter beside float64, REFERENCE and transformers.

The gradients are those of the mean of -log p(next token) over each text; errors are root mean
squares over the texts. The truth is autograd through REFERENCE in float64, the recurrence token by
token; a kind is all layers' parameters of one name together, since some have a handful of numbers.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..model import FalconH1ForCausalLM
from ..ops import REFERENCE, Ops
from ..tables import aligned
from .budget import FACTOR, FLOOR, relative, rounded

PEER = "transformers"


class GradientErrors(NamedTuple):
    """Relative rms errors by kind of parameter, "layers.N.mamba.A_log", and by who made them."""

    errors: dict[str, dict[str, float]]  # kind -> name of a table, or PEER -> error
    budget: dict[str, float]  # kind -> FACTOR times the larger error of REFERENCE and of the peer
    dtype: str
    loss: dict[str, float]

    @property
    def beyond(self) -> list[tuple[str, str]]:
        """(kind, table) of what is beyond its budget, or has no gradient."""
        return [
            (kind, name)
            for kind, found in self.errors.items()
            for name in self.loss
            if name != PEER and not found.get(name, math.inf) <= self.budget[kind]
        ]

    def __str__(self) -> str:
        names = list(self.loss)
        rows = [("gradient of", *names, "budget", "")]
        for kind, found in self.errors.items():
            wrong = "beyond" if any(kind == other for other, _ in self.beyond) else ""
            cells = (f"{found[name]:.1e}" if name in found else "-" for name in names)
            rows.append((kind, *cells, f"{self.budget[kind]:.1e}", wrong))
        losses = ", ".join(f"{name} {loss:.6f}" for name, loss in self.loss.items())
        return "\n".join(
            [f"{self.dtype}; loss: {losses}", *aligned(rows, "l" + "r" * len(rows[0]))]
        )


def compare_gradients(
    model: FalconH1ForCausalLM,
    ids: Tensor,
    dtype: torch.dtype,
    tables: dict[str, Ops],
    peer: bool = True,
) -> GradientErrors:
    """The gradients of `model`'s weights, rounded to `dtype`, under each table and transformers.

    ids: (b, l), l >= 2. Raises ValueError for a table without a backward.
    """
    if ids.shape[1] < 2:
        raise ValueError("a gradient needs two tokens: the second is predicted from the first")
    narrow = rounded(model, dtype)
    exact = _gradients(_copy(narrow, torch.float64, REFERENCE), ids)[0]

    def errors_of(network) -> tuple[dict[str, float], float]:
        texts, mean = _gradients(network, ids)
        squares: dict[str, list[float]] = {}
        for gradients, truth in zip(texts, exact):
            for kind, gradient in gradients.items():
                squares.setdefault(kind, []).append(relative(gradient, truth[kind])[0] ** 2)
        return {kind: math.sqrt(sum(s) / len(s)) for kind, s in squares.items()}, mean

    judges = [errors_of(_copy(narrow, dtype, REFERENCE))[0]]
    found, loss = {}, {}
    for name, table in tables.items():
        try:
            found[name], loss[name] = errors_of(_copy(narrow, dtype, table))
        except RuntimeError as error:
            raise ValueError(f"the table {name} gave no gradient: {error}") from error
    if peer:
        from ..bench.peer_model import transformers_model

        theirs = transformers_model(_copy(narrow, dtype, REFERENCE))
        if isinstance(theirs, str):
            raise ValueError(f"transformers: {theirs}")
        theirs.model.embed_tokens.padding_idx = None  # else one token's embedding learns nothing
        found[PEER], loss[PEER] = errors_of(theirs.requires_grad_(True))
        judges.append(found[PEER])
    errors = {
        kind: {name: kinds[kind] for name, kinds in found.items() if kind in kinds}
        for kind in exact[0]
    }
    least = FLOOR if dtype == torch.float32 else torch.finfo(dtype).eps
    budget = {
        kind: FACTOR * max(least, *(judge.get(kind, 0.0) for judge in judges)) for kind in errors
    }
    return GradientErrors(errors, budget, str(dtype).removeprefix("torch."), loss)


def _copy(model: FalconH1ForCausalLM, dtype: torch.dtype, table: Ops) -> FalconH1ForCausalLM:
    """Weights of its own, which a gradient may be taken of."""
    copy = FalconH1ForCausalLM(model.config, ops=table, dtype=dtype, device=model.device)
    copy.load_state_dict(model.state_dict())
    return copy


def _gradients(model, ids: Tensor) -> tuple[list[dict[str, Tensor]], float]:
    """By kind of parameter for each text, and the mean loss."""
    texts, losses = [], []
    for row in ids.split(1):
        model.zero_grad()
        out = model(row)
        logits = getattr(out, "logits", out)[0, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = cross_entropy(wide, row[0, 1:])
        loss.backward()
        kinds: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                kind = re.sub(r"\.\d+\.", ".N.", name.removeprefix("model."))
                kinds.setdefault(kind, []).append(parameter.grad.flatten().clone())
        texts.append({kind: torch.cat(parts) for kind, parts in kinds.items()})
        losses.append(loss.item())
    return texts, sum(losses) / len(losses)

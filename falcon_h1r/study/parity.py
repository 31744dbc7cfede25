"""Ours and another implementation beside the float64 forward: every tensor, dtype and path.

The truth is our float64 REFERENCE forward with the weights as they are rounded to the dtype. Errors
are relative: the root mean square of the difference over that of the truth, and the largest
difference over the largest value. Ours is judged by the root mean square, against the tolerance of
`budget.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..ops import REFERENCE, Ops
from . import parity_known, parity_local, peers
from .budget import Budget, ErrorParts, make_budget, relative, rounded, truth_of
from .dump import Dump, Inputs, compared_names, real_values, take_dump
from .faults import Patient

PATHS = ("prefill", "chunked", "decode", "padded")


class Row(NamedTuple):
    """One tensor in one dtype, on one path, under one operator table."""

    tensor: str
    dtype: str
    path: str
    table: str
    rms: float
    max: float
    peer_rms: float | None  # None: the other side does not show it
    peer_max: float | None
    tolerance: float | None
    notes: tuple[str, ...]  # keys of `parity_known.KNOWN`, for the other side's error
    parts: ErrorParts | None = None  # of ours, as the budget measured them; None: it did not

    @property
    def within(self) -> bool:
        return self.tolerance is None or self.rms <= self.tolerance

    @property
    def peer_within(self) -> bool:
        return self.tolerance is None or self.peer_rms is None or self.peer_rms <= self.tolerance

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None where one is missing or theirs is exact."""
        return self.rms / self.peer_rms if self.peer_rms else None


class Report(NamedTuple):
    """What `compare` found."""

    rows: list[Row]
    peer: str  # "transformers 5.23.0", "llama.cpp ...", a file's name, "" for none
    divergences: dict[tuple[str, str, str], str]  # (side, dtype, path) -> "layers.0.mamba..."

    @property
    def beyond(self) -> list[Row]:
        """Rows of ours beyond the tolerance, in the order of the forward."""
        return [row for row in self.rows if not row.within]


def make_inputs(config, path: str, ids: torch.Tensor | None = None, seed: int = 0) -> Inputs:
    """What a path is fed: three rows, random without `ids`, longer than two chunks of the scan.

    chunked: three uneven pieces behind a cache. decode: one half, then token by token. padded: a
    row padded left, one right, one not.
    """
    if ids is None:
        length = min(max(40, 2 * config.mamba_chunk_size + 5), 96)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (3, length), generator=generator)
    l = ids.shape[1]
    if path == "prefill":
        return Inputs(ids)
    if l < 8:
        raise ValueError(f"the path {path} needs at least 8 tokens, {l} were given")
    if path == "chunked":
        first, second = l // 3, l // 4 + 1
        return Inputs(ids, pieces=(first, second, l - first - second))
    if path == "decode":
        return Inputs(ids, pieces=(l - l // 2,) + (1,) * (l // 2))
    if path == "padded":
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, : l // 8] = False
        if len(ids) > 1:
            mask[1, l - l // 5 :] = False
        return Inputs(ids, mask)
    raise ValueError(f"no path {path!r}; there are: {', '.join(PATHS)}")


class Peer(NamedTuple):
    """The other side. trace(model in the dtype, inputs) -> tensors by tap names; a side that can
    be fed the truth takes `forced` as well, see `parity_local`."""

    name: str  # as in `parity_known`
    version: str
    trace: Callable[..., Mapping[str, torch.Tensor]]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def transformers_peer() -> Peer:
    """The installed transformers; raises ValueError where there is none."""
    return Peer(
        parity_known.TRANSFORMERS,
        peers.version(),
        lambda model, inputs, forced=None: peers.TransformersPeer(model).trace(inputs, forced),
    )


def of_dump(dump: Dump, name: str) -> Peer:
    return Peer(name, "", lambda model, inputs: dump.tensors)


def compare(
    model,
    inputs: Mapping[str, Inputs],
    dtypes: Sequence[str],
    tables: Mapping[str, Ops],
    budget: Budget | None = None,
    peer: Peer | None = None,
    layers: Sequence[int] | None = None,
    faults: Sequence = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Every tensor of every dtype, path and table.

    model: in the dtype it is stored in; inputs: by path; tables: by name; budget: of this model,
    for these dtypes and paths; None: measured here, by five more forwards of each. layers: whose
    taps to compare, None for all; faults: planted in ours, for tests. Raises ValueError for a
    budget that lacks a dtype or path.
    """
    names = compared_names(model.config, layers)
    if budget is None:
        budget = make_budget(model, inputs, dtypes, {}, names=names)
    elif not budget.covers(dtypes, inputs):
        raise ValueError("budget: it lacks a dtype or path that is compared")
    rows, divergences = [], {}
    for dtype in dtypes:
        narrow = rounded(model, getattr(torch, dtype))
        for path, given in inputs.items():
            progress(f"{dtype} {path}")
            truth = take_dump(truth_of(narrow), narrow, given, names).tensors
            theirs = {} if peer is None else peer.trace(narrow, given)
            notes = {}
            if peer is not None:
                where = parity_known.Where(peer.name, peer.version, model.config, dtype, given)
                notes = parity_known.explain(names, where)

            def errors(tensors, name, truth=truth, mask=given.mask):
                pair = (real_values(name, t[name], mask) for t in (tensors, truth))
                return relative(*pair)

            seen = [name for name in names if name in theirs and name in truth]
            peer_errors = {name: errors(theirs, name) for name in seen}
            for table, ops in tables.items():
                ours = take_dump(Patient(narrow, faults, ops=ops), narrow, given, names).tensors
                rows += [
                    Row(
                        name,
                        dtype,
                        path,
                        table,
                        *errors(ours, name),
                        *peer_errors.get(name, (None, None)),
                        budget.tolerance(dtype, path, name),
                        tuple(notes.get(name, ())) if name in peer_errors else (),
                        budget.parts(dtype, path, name, table),
                    )
                    for name in names
                    if name in ours and name in truth
                ]
            divergences |= _diverging(narrow, given, dtype, path, rows, tables, peer, faults)
    return Report(rows, "" if peer is None else str(peer), divergences)


def _diverging(narrow, given, dtype, path, rows, tables, peer, faults):
    """First divergences of the sides that are beyond a tolerance in this dtype and path."""
    here = [row for row in rows if (row.dtype, row.path) == (dtype, path)]
    off = {row.table for row in here if not row.within}
    theirs = next((row for row in here if not row.peer_within), None)
    found = {}
    if not off and theirs is None:
        return found
    key = (dtype, path)
    truth = parity_local.Truth(narrow, given)
    yardstick = truth.errors_of(parity_local.ours(truth, REFERENCE))
    for table in off:
        errors = truth.errors_of(parity_local.ours(truth, tables[table], faults))
        found[(f"ours {table}", *key)] = parity_local.first_divergence(truth, errors, yardstick)
    if theirs is not None and peer.name == parity_known.TRANSFORMERS:
        errors = truth.errors_of(peer.trace(narrow, given, parity_local.forced_inputs(truth)))
        found[(peer.name, *key)] = parity_local.first_divergence(truth, errors, yardstick)
    elif theirs is not None:  # it cannot be fed: errors add up on the way
        found[(peer.name, *key)] = (
            f"{parity_local.operator_of(theirs.tensor)} ({theirs.peer_rms:.1e}, the tolerance is "
            f"{theirs.tolerance:.1e}; the first of the tensors that it shows)"
        )
    return {side: str(where) for side, where in found.items() if where is not None}

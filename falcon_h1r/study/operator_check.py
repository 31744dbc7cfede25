"""Which operator of a table is wrong, on which call, and which argument makes it wrong.

Small models with every option and every constant of its own (`adversarial.py`) run under REFERENCE,
in prefills around the scan's chunk borders, with padding, packed documents, pieces and steps behind
level and ragged caches. Every call that they make of an operator is made of the judged one too, and
both are compared with REFERENCE in float64 on the same arguments. The rule of the house decides: at
most twice the error of REFERENCE in the same dtype.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..ops import REFERENCE, Ops
from .adversarial import CONFIGS, random_model
from .budget import rounded
from .faults import Patient
from .operator_calls import OperatorCall

DTYPES = ("float32", "bfloat16", "float16")
_CHUNKS = (8, 7, 64)  # mamba_chunk_size of the small models: short, odd, longest in TORCH
_DIAGNOSED = 8  # wrong calls of an operator and result whose arguments are taken apart


class WrongOperator(NamedTuple):
    """One way in which an operator is wrong, as its first call of that kind shows."""

    operator: str  # as in `Ops`
    case: str  # which model, dtype and input, and the layer
    what: str  # of its results, as in "y" or "window_bvc in place"; "" where it raised
    error: float | None  # relative root mean square to float64; None: text has no number
    tolerance: float | None
    triggers: tuple[str, ...]  # arguments without which the call is right; (): any make it wrong
    text: str  # what is wrong, in words
    calls: int  # that were wrong in this way, of those that were taken apart

    def __str__(self) -> str:
        cause = (
            f"triggered by {' or '.join(self.triggers)}"
            if self.triggers
            else "whatever it is given"
        )
        return f"{self.operator}: {self.text}; {cause}; first in {self.case}"


class TableCheck(NamedTuple):
    """What `check` found; true if every operator is right."""

    wrong: tuple[WrongOperator, ...]
    calls: dict[str, int]  # judged, by operator
    wrong_calls: dict[str, int]
    shares: dict[str, float]  # the largest share of its tolerance that a right call took
    skipped: tuple[str, ...]  # operators that are REFERENCE's own functions

    @property
    def ok(self) -> bool:
        return not self.wrong_calls

    def __bool__(self) -> bool:
        return self.ok

    @property
    def runs(self) -> bool:
        """Whether a model can run under the table: no operator raised or gave another shape."""
        return all(wrong.error is not None for wrong in self.wrong)

    def __repr__(self) -> str:
        total = sum(self.calls.values())
        lines = [f"wrong operators: {len(self.wrong_calls)} of {len(self.calls)}, in {total} calls"]
        for name, count in self.calls.items():
            if name not in self.wrong_calls:
                share = self.shares.get(name, 0.0)
                lines.append(
                    f"  {name}: right in {count} calls, {share:.2f} of the tolerance at most"
                )
                continue
            lines.append(f"  {name}: wrong in {self.wrong_calls[name]} of {count} calls")
            own = (wrong for wrong in self.wrong if wrong.operator == name)
            lines += [f"    {str(wrong).removeprefix(f'{name}: ')}" for wrong in own]
        if self.skipped:
            lines.append(f"  REFERENCE's own, not judged: {', '.join(self.skipped)}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Ready for JSON."""
        wrong = [one._asdict() for one in self.wrong]
        for one in wrong:
            if one["error"] is not None and not math.isfinite(one["error"]):
                one["error"] = None  # JSON has no infinity
        return {**self._asdict(), "wrong": wrong, "ok": self.ok}


@torch.no_grad()
def check(
    ops=None,
    model=None,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str | torch.device | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **operators: Callable,
) -> TableCheck:
    """Judge the operators of a table, or single ones: `check(mine)`, `check(ssd_scan=my_scan)`.

    ops: an `Ops`, or anything that `as_table` takes. operators: functions by the fields of `Ops`,
    in place of those of `ops`. model: check on this model's sizes and weights as well, in its own
    dtype. dtypes: of the small models, from DTYPES. device: of the small models; default: the
    model's, or a GPU where there is one. An operator that raises is a finding and does not stop the
    check. Raises ValueError where no operator is given and for a name that `Ops` does not have.
    """
    judged = {} if ops is None else as_table(ops)._asdict()
    for name, function in operators.items():
        if name not in Ops._fields:
            close = difflib.get_close_matches(name, Ops._fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"check: there is no operator {name!r}; did you mean {close!r}?")
        if not callable(function):
            raise ValueError(f"check: {name} is {function!r}, expected a function")
        judged[name] = function
    if not judged:
        raise ValueError("check: no operator was given: check(TABLE) or check(ssd_scan=FUNCTION)")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"check: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    judge = _Judge(judged)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = device if model is None else model.device
    for chunk, (name, config) in zip(_CHUNKS, CONFIGS.items(), strict=True):
        lengths = (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 1)
        for dtype in dtypes:
            progress(f"{name}, {dtype}")
            small = random_model(
                dataclasses.replace(config, num_hidden_layers=1, mamba_chunk_size=chunk)
            ).to(device)
            judge.watch(rounded(small, getattr(torch, dtype)), f"{name}, {dtype}", lengths)
    if model is not None:
        dtype = torch.float32 if model.dtype == torch.float64 else model.dtype
        label = f"the model, {str(dtype).removeprefix('torch.')}"
        progress(label)
        length = min(max(40, 2 * model.config.mamba_chunk_size + 5), 96)
        judge.watch(rounded(model, dtype), label, (length,))
    return judge.found()


def as_table(value, name: str = "ops") -> Ops:
    """An `Ops`, or the table that a mapping or an object with its ten fields is.

    Raises ValueError where fields are missing or are no functions; name: what to call the value.
    """
    held = (
        value
        if isinstance(value, Mapping)
        else {field: getattr(value, field) for field in Ops._fields if hasattr(value, field)}
    )
    missing = [field for field in Ops._fields if field not in held]
    if len(missing) == len(Ops._fields):
        hint = (
            f", as in TORCH._replace(ssd_scan={value.__name__})"
            if inspect.isfunction(value)
            else ""
        )
        raise ValueError(f"{name} is a {type(value).__name__}, expected an operator table{hint}")
    if missing:
        raise ValueError(f"{name} is no operator table: it lacks {', '.join(missing)}")
    table = Ops(**{field: held[field] for field in Ops._fields})
    for field, function in table._asdict().items():
        if not callable(function):
            raise ValueError(f"{name}: {field} is {function!r}, expected a function")
    return table


class _Judge:
    """Runs models under REFERENCE and judges operators on the calls that the models make."""

    def __init__(self, judged: Mapping[str, Callable]):
        own = {name for name, f in judged.items() if f is getattr(REFERENCE, name)}
        self.judged = {name: f for name, f in judged.items() if name not in own}
        self.skipped = tuple(name for name in judged if name in own)
        self.calls = dict.fromkeys(self.judged, 0)
        self.wrong_calls: dict[str, int] = {}
        self.shares: dict[str, float] = {}
        self.wrong: dict[tuple, WrongOperator] = {}
        self.case = self.layer = ""

    def watch(self, model, label: str, lengths: Sequence[int]) -> None:
        """Every case of `_cases` through a model."""
        table = REFERENCE._replace(**{name: self._watched(name) for name in self.judged})
        twin = Patient(model, ops=table).model
        for number, block in enumerate(twin.model["layers"]):

            def entered(module, args, number=number):
                self.layer = f"layer {number}"

            block.register_forward_pre_hook(entered)
        for case, run in _cases(model.config, lengths, model.device):
            self.case, self.layer = f"{label}, {case}", "behind the layers"
            run(twin)

    def _watched(self, name: str) -> Callable:
        reference = getattr(REFERENCE, name)

        def operator(*args, **kwargs):
            self._judge(OperatorCall.of(name, args, kwargs))
            return reference(*args, **kwargs)

        return operator

    def _judge(self, call: OperatorCall) -> None:
        name, function = call.operator, self.judged[call.operator]
        self.calls[name] += 1
        deviation, share = call.deviation(function)
        if deviation is None:
            self.shares[name] = max(self.shares.get(name, 0.0), share)
            return
        self.wrong_calls[name] = self.wrong_calls.get(name, 0) + 1
        taken_apart = [w.calls for w in self.wrong.values() if w[:3:2] == (name, deviation.what)]
        if sum(taken_apart) >= _DIAGNOSED:
            return
        triggers = tuple(call.triggers(function))
        key = (name, deviation.what, triggers)
        if key in self.wrong:
            self.wrong[key] = self.wrong[key]._replace(calls=self.wrong[key].calls + 1)
            return
        case = f"{self.case}, {self.layer}"
        self.wrong[key] = WrongOperator(
            name,
            case,
            deviation.what,
            deviation.error,
            deviation.tolerance,
            triggers,
            deviation.text,
            1,
        )

    def found(self) -> TableCheck:
        wrong = tuple(self.wrong.values())
        return TableCheck(wrong, self.calls, self.wrong_calls, self.shares, self.skipped)


def _cases(config, lengths: Sequence[int], device) -> Iterator[tuple[str, Callable]]:
    """(what is run, how): each gives a model three rows of random tokens, two when packed."""
    generator = torch.Generator().manual_seed(0)

    def random_ids(rows: int, length: int) -> torch.Tensor:
        ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
        return ids.to(device)

    for length in lengths:
        ids = random_ids(3, length)
        yield f"a prefill of {length} token{'s' * (length > 1)}", lambda model, ids=ids: model(ids)
    border = min(config.mamba_chunk_size, 64)
    ids = random_ids(3, border + 9)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, border - 2 :] = 0, 0
    yield "a padded prefill", lambda model: model(ids, attention_mask=mask)
    documents = torch.zeros_like(ids[:2])
    for row, starts in enumerate([(3, 4, border), (border + 1, border + 2)]):
        for start in starts:
            documents[row, start:] += 1
    yield "packed documents", lambda model: model(ids[:2], seq_idx=documents)

    def level(model) -> None:
        cache = model.new_cache(3, ids.shape[1])
        for piece in ids.split([border - 1, 8, 1, 1], dim=1):
            model(piece, cache=cache)

    def ragged(model) -> None:
        cache = model.new_cache(3, ids.shape[1])
        model(ids[:, :border], mask[:, :border], cache=cache)
        model(ids[:, border : border + 7], mask.flip(1)[:, :7], cache=cache)
        for token in ids[:, -2:].split(1, dim=1):
            model(token, cache=cache)

    yield "pieces and steps behind a cache", level
    yield "pieces and steps behind a ragged cache", ragged

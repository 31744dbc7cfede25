"""What can be observed in a forward: named tensors, their axes, and where they are made.

Nothing in the model's forward knows of this file, and nothing is slower while nobody looks.
`attached(model)` puts each layer's operators behind small modules for as long as it lasts, so that
plain forward hooks see them by name (`model.layers.3.mamba.ssd_scan`); `record(model)` does that
and collects tensors by the names of `tap_table.py`.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import derived
from .precision import scaled
from .tap_table import (
    DERIVED_TAPS,
    MODEL_TAPS,
    TAPS,
    Source,
    Tap,
    full_names,
    inner_name,
    tap_of,
)

__all__ = [
    "DERIVED_TAPS",
    "MODEL_TAPS",
    "TAPS",
    "MissingTap",
    "Recording",
    "Source",
    "Tap",
    "TappedOperator",
    "attached",
    "full_names",
    "record",
    "tap_of",
]
PACKAGE = Path(__file__).parent
MAKERS = {tap.file for tap in (*TAPS, *MODEL_TAPS)}  # files whose lines are worth naming


class TappedOperator(nn.Module):
    """A function of an operator table as a module, for hooks to see."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@contextmanager
def attached(model) -> Iterator[None]:
    """Put every layer's operators behind modules of their names, until the end of the block.

    Each layer gets `mamba.causal_conv1d`, `.causal_conv1d_step`, `.ssd_scan`, `.ssd_step` and
    `.gated_rms_norm`, `self_attn.rope_q`, `.rope_k`, `.attention` and `.decode_attention`, and
    `feed_forward.swiglu`. What a module's `ops` held is called, and is put back at the end, also
    after an exception. Inside another `attached` of the same model nothing happens.
    """
    with ExitStack() as stack:
        for block in model.model["layers"]:
            if "swiglu" in block.feed_forward._modules:
                continue
            stack.callback(_restore, block, _tables(block))
            _wrap(block.mamba, "causal_conv1d causal_conv1d_step ssd_scan ssd_step gated_rms_norm")
            if hasattr(block.mamba, "norm"):
                norm = block.mamba.norm
                block.mamba.gated_rms_norm.function = norm.ops.gated_rms_norm
                norm.ops = norm.ops._replace(gated_rms_norm=block.mamba.gated_rms_norm)
            _wrap(block.self_attn, "attention decode_attention")
            _wrap_rope(block.self_attn)
            _wrap(block.feed_forward, "swiglu")
        yield


def _tables(block) -> dict[str, object]:
    return {name: module.ops for name, module in block.named_modules() if hasattr(module, "ops")}


def _restore(block, tables) -> None:
    for name, module in list(block.named_modules()):
        for child, operator in list(module._modules.items()):
            if isinstance(operator, TappedOperator):
                del module._modules[child]
        if name in tables:
            module.ops = tables[name]


def _wrap(module, names: str) -> None:
    for name in names.split():
        operator = TappedOperator(getattr(module.ops, name))
        module.add_module(name, operator)
        module.ops = module.ops._replace(**{name: operator})


def _wrap_rope(attention) -> None:
    """The one operator is called for queries and for keys, which have a multiplier."""
    function = attention.ops.rope
    queries, keys = TappedOperator(function), TappedOperator(function)
    attention.add_module("rope_q", queries)
    attention.add_module("rope_k", keys)

    def rope(*args, **kwargs):
        return (keys if "multiplier" in kwargs else queries)(*args, **kwargs)

    attention.ops = attention.ops._replace(rope=rope)


class MissingTap(KeyError):
    """A `Recording` does not hold the tensor of that name; says what it holds."""

    def __str__(self) -> str:
        return self.args[0]  # a KeyError would show the message in quotes


class Recording(Mapping):
    """Tensors by full name, in the order in which the forward made them.

    `recording[name]` joins the calls of several forwards along l; of a tensor without that axis
    (states, windows, all keys so far) it is the last call's. Where the axis s has grown from call
    to call, the shorter ones are filled with 0. Tensors are detached copies. A name that was not
    recorded raises MissingTap, a KeyError, with what to do about it.
    """

    def __init__(self, asked: Iterable[str] = ()):
        self._asked = tuple(asked)
        self._calls: dict[str, list[Tensor]] = {}
        self.where: dict[str, str] = {}  # full name -> "file:line" of the code that makes it

    def __getitem__(self, name: str) -> Tensor:
        calls = self.calls(name)
        axes = tap_of(name).axes.split()
        if len(calls) == 1 or "l" not in axes:
            return calls[-1]
        if axes[-1] == "s":
            longest = max(call.shape[-1] for call in calls)
            calls = [nn.functional.pad(call, (0, longest - call.shape[-1])) for call in calls]
        return torch.cat(calls, dim=axes.index("l"))

    def __iter__(self):
        return iter(self._calls)

    def __len__(self):
        return len(self._calls)

    def __contains__(self, name) -> bool:
        return name in self._calls

    def __repr__(self) -> str:
        """One line per tap: layers, shape, dtype, forwards, bytes of all."""
        total = sum(call.nbytes for calls in self._calls.values() for call in calls)
        lines = [f"Recording of {len(self)} tensors, {total:,} bytes{':' if self else ''}"]
        same: dict[tuple, list[str]] = {}
        for name, calls in self._calls.items():
            same.setdefault((inner_name(name), _shapes(name, calls)), []).append(name)
        width = max((len(own) for own, _ in same), default=0)
        for (own, shapes), names in same.items():
            size = sum(call.nbytes for name in names for call in self._calls[name])
            lines.append(f"  {own:{width}}  {_layers(names):12} {shapes}, {size:,} bytes")
        return "\n".join(lines)

    def calls(self, name: str) -> list[Tensor]:
        """One tensor per forward in which the tap was passed."""
        if name not in self._calls:
            raise MissingTap(self._why_missing(name))
        return self._calls[name]

    def clear(self) -> None:
        """Forget the tensors, to go on recording."""
        self._calls.clear()

    def _why_missing(self, name) -> str:
        held = ", ".join(dict.fromkeys(map(inner_name, self._calls))) or "nothing so far"
        if name in self._asked:
            reason = "a forward without a cache does not pass it" if self else "no forward ran yet"
            return f"{name!r} was asked for and not passed: {reason}"
        try:
            tap = tap_of(str(name))
        except ValueError as error:
            close = difflib.get_close_matches(str(name), [*self._calls], n=3, cutoff=0.4)
            nearest = f"; the closest recorded names are {', '.join(close)}" if close else ""
            return f"{error}{nearest}; recorded: {held}"
        of_layers = [full for full in self._calls if inner_name(full) == tap.name]
        if of_layers:
            what = "needs its layer in front" if name == tap.name else "was not asked for"
            names = f"{of_layers[0]} to {of_layers[-1]}" if of_layers[1:] else of_layers[0]
            return f"{name!r} {what}; recorded: {names}"
        return (
            f"{name!r} is a tap, but was not asked for: record(model, names=[{tap.name!r}, ...]); "
            f"recorded: {held}"
        )

    def _add(self, name: str, tensor, source: Source, config, where) -> None:
        if tensor is None:  # no cache, so no state before
            return
        tensor = tensor.detach()
        tensor = scaled(tensor, getattr(config, source.multiplier) if source.multiplier else 1.0)
        axes = tap_of(name).axes.split()
        if source.axes and source.axes.split() != axes:  # a step, which has no l
            tensor = tensor.unsqueeze(axes.index("l"))
        self._calls.setdefault(name, []).append(tensor.clone())
        if name not in self.where:
            self.where[name] = where() or _short(PACKAGE / tap_of(name).file)


def _shapes(name: str, calls: list[Tensor]) -> str:
    """As in "b=2 l=9 d=48 float32"; of several forwards, that of the last."""
    axes = zip(tap_of(name).axes.split(), calls[-1].shape)
    shape = " ".join(f"{axis}={size}" for axis, size in axes)
    dtype = str(calls[-1].dtype).removeprefix("torch.")
    return f"{shape} {dtype}" + (f", {len(calls)} forwards" if calls[1:] else "")


def _layers(names: list[str]) -> str:
    """The layers of full names, as in "layers 0-2, 5"; "" for a tap of the model."""
    numbers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"layer{'s' if numbers[1:] else ''} {text}" if numbers else ""


@contextmanager
def record(
    model, names: Iterable[str] | None = None, layers: Iterable[int] | None = None
) -> Iterator[Recording]:
    """Collect taps of every forward inside the block: `with record(model) as r: model(ids)`.

    names, layers: as in `full_names`; None: every tap but DERIVED_TAPS, which take l x p x n values
    per head (states) and l x s (probabilities). Any operator table and dtype; prefill, pieces of
    it, and decode steps behind a cache. Not for a captured step, whose replay calls no Python.
    """
    wanted = full_names(model.config, names, layers)
    recording = Recording(wanted)
    with ExitStack() as stack:
        stack.enter_context(attached(model))
        for name in wanted:
            prefix = "model." + name[: -len(inner_name(name))] if name.startswith("layers.") else ""
            for source in tap_of(name).sources:
                module = model.get_submodule((prefix + source.module).rstrip("."))
                if source.port == "derived":
                    parent = model.get_submodule(prefix + source.module.rpartition(".")[0])
                    handles = _derive(recording, parent, module, name, source)
                else:
                    handles = [_hook(recording, module, name, source, model.config)]
                for handle in handles:
                    stack.callback(handle.remove)
        yield recording


def _hook(recording: Recording, module, name: str, source: Source, config):
    def pick(args, kwargs):
        return kwargs.get(source.index) if isinstance(source.index, str) else args[source.index]

    def before(module, args, kwargs):
        recording._add(name, pick(args, kwargs), source, config, _caller)

    def after(module, args, kwargs, output):
        tensor = pick(args, kwargs) if source.port == "after" else output
        if isinstance(tensor, tuple):
            tensor = tensor[source.index]
        where = _caller if source.multiplier else lambda: _maker(module)
        recording._add(name, tensor, source, config, where)

    if source.port == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _derive(recording: Recording, parent, module, name: str, source: Source) -> list:
    """Hooks that compute a derived tap behind an operator; parent: the module that calls it."""
    function, padding = getattr(derived, source.index), []

    def keep_padding(module, args, kwargs):
        span = kwargs["span"] if "span" in kwargs else args[1]
        padding[:] = [span.padding_bl]

    def after(module, args, kwargs, output):
        with torch.no_grad():
            tensor = function(*args, **kwargs)
            if tap_of(name).axes == "b h l s" and padding[0] is not None:
                tensor.masked_fill_(padding[0][:, None, :, None], 0)
        recording._add(name, tensor, source, None, lambda: _line_of(function))

    return [
        parent.register_forward_pre_hook(keep_padding, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _maker(module) -> str:
    """Where a module's result is made: an operator's function, our module's last line, or, of a
    linear layer, the line that calls it."""
    if isinstance(module, TappedOperator):
        return _line_of(module.function) or _caller()
    if Path(sys.modules[type(module).__module__].__file__).parent != PACKAGE:
        return _caller()
    lines, first = inspect.getsourcelines(type(module).forward)
    return f"{_short(inspect.getfile(type(module)))}:{first + len(lines) - 1}"


def _line_of(function) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{_short(code.co_filename)}:{code.co_firstlineno}" if code else ""


def _caller() -> str:
    """The line of the architecture's code that is calling; "" where a module is called alone."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == PACKAGE and path.name in MAKERS:
            return f"{_short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _short(path) -> str:
    """A path from the source root on."""
    path = Path(path)
    for root in (PACKAGE.parent, PACKAGE.parent / "kernels"):
        if root in path.parents:
            return str(path.relative_to(root))
    return path.name

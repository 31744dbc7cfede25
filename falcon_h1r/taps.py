"""What can be observed in a forward: named tensors, their axes, and where they are made.

Nothing in the model's forward knows of this file, and nothing is slower while nobody looks.
`attached(model)` puts each layer's operators behind small modules for as long as it lasts, so that
plain forward hooks see them by name (`model.layers.3.mamba.ssd_scan`); `record(model)` does that
and collects tensors by the names of `tap_table.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .precision import scaled
from .tap_table import MODEL_TAPS, TAPS, Source, Tap, full_names, inner_name, tap_of

__all__ = [
    "MODEL_TAPS",
    "TAPS",
    "Operator",
    "Recording",
    "Source",
    "Tap",
    "attached",
    "full_names",
    "record",
    "tap_of",
]
PACKAGE = Path(__file__).parent
MAKERS = {tap.file for tap in (*TAPS, *MODEL_TAPS)}  # files whose lines are worth naming


class Operator(nn.Module):
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
            if isinstance(operator, Operator):
                del module._modules[child]
        if name in tables:
            module.ops = tables[name]


def _wrap(module, names: str) -> None:
    for name in names.split():
        operator = Operator(getattr(module.ops, name))
        module.add_module(name, operator)
        module.ops = module.ops._replace(**{name: operator})


def _wrap_rope(attention) -> None:
    """The one operator is called for queries and for keys, which have a multiplier."""
    function = attention.ops.rope
    queries, keys = Operator(function), Operator(function)
    attention.add_module("rope_q", queries)
    attention.add_module("rope_k", keys)

    def rope(*args, **kwargs):
        return (keys if "multiplier" in kwargs else queries)(*args, **kwargs)

    attention.ops = attention.ops._replace(rope=rope)


class Recording(Mapping):
    """Tensors by full name, in the order in which the forward made them.

    `recording[name]` joins the calls of several forwards along l; of a tensor without that axis
    (states, windows, all keys so far) it is the last call's. Tensors are detached copies.
    """

    def __init__(self):
        self._calls: dict[str, list[Tensor]] = {}
        self.where: dict[str, str] = {}  # full name -> "file:line" of the code that makes it

    def __getitem__(self, name: str) -> Tensor:
        calls = self._calls[name]
        axes = tap_of(name).axes.split()
        if len(calls) == 1 or "l" not in axes:
            return calls[-1]
        return torch.cat(calls, dim=axes.index("l"))

    def __iter__(self):
        return iter(self._calls)

    def __len__(self):
        return len(self._calls)

    def calls(self, name: str) -> list[Tensor]:
        """One tensor per forward in which the tap was passed."""
        return self._calls[name]

    def clear(self) -> None:
        """Forget the tensors, to go on recording."""
        self._calls.clear()

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


@contextmanager
def record(
    model, names: Iterable[str] | None = None, layers: Iterable[int] | None = None
) -> Iterator[Recording]:
    """Collect taps of every forward inside the block: `with record(model) as r: model(ids)`.

    names, layers: as in `full_names`. Any operator table and dtype; prefill, pieces of it, and
    decode steps behind a cache. Not for a captured step, whose replay calls no Python.
    """
    recording, wanted = Recording(), full_names(model.config, names, layers)
    with ExitStack() as stack:
        stack.enter_context(attached(model))
        for name in wanted:
            prefix = "model." + name[: -len(inner_name(name))] if name.startswith("layers.") else ""
            for source in tap_of(name).sources:
                module = model.get_submodule((prefix + source.module).rstrip("."))
                handle = _hook(recording, module, name, source, model.config)
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


def _maker(module) -> str:
    """Where a module's result is made: an operator's function, our module's last line, or, of a
    linear layer, the line that calls it."""
    if isinstance(module, Operator):
        code = getattr(inspect.unwrap(module.function), "__code__", None)
        return f"{_short(code.co_filename)}:{code.co_firstlineno}" if code else _caller()
    if Path(sys.modules[type(module).__module__].__file__).parent != PACKAGE:
        return _caller()
    lines, first = inspect.getsourcelines(type(module).forward)
    return f"{_short(inspect.getfile(type(module)))}:{first + len(lines) - 1}"


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

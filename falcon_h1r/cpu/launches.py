"""Calls of Inductor's graphs, made again as the launches of their kernels.

Around its kernels, one for a whole block, the code that Inductor generates allocates some eighty
buffers in Python, and AOTAutograd and torch.compile stand above it. With weights streaming through
the caches in between, which leave nothing of Python there, that costs more than 100 us a block.
The same shapes make the same launches: they are recorded, as a CUDA graph records them, and made
again on buffers that stay.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor

_watching = threading.local()


def inductor(graph, examples) -> Callable:
    """torch.compile's own compiler, as a backend whose graphs a `Replay` can record.

    One function, not one for each object: torch.compile shares graphs by it.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._inductor.compile_fx import compile_fx_inner

    def compile_inner(*arguments, **options):
        code = compile_fx_inner(*arguments, **options)
        if hasattr(code, "current_callable"):  # not where a graph computes nothing
            code.current_callable = _watched(code.current_callable)
        return code

    # What AOTAutograd finds in its own cache is never given to `compile_inner`; Inductor's cache,
    # which saves the compiling, stays. Assertions on sizes are thirty a block.
    settings = (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(size_asserts=False),
    )
    with settings[0], settings[1]:
        return lookup_backend("inductor")(graph, examples, inner_compile=compile_inner)


def _watched(code: Callable) -> Callable:
    def watched(arguments: list):
        calls = getattr(_watching, "calls", None)
        if calls is None:
            return code(arguments)
        inputs = list(arguments)  # the code empties the list
        outputs = code(arguments)
        calls.append((code, inputs, outputs))
        return outputs

    return watched


class Replay:
    """A chain of compiled functions, recorded in one run through it, each of them to be called
    again with another first argument.

    The others stay as they are: numbers, and tensors, whose content may change. What a call returns
    is overwritten when the chain is played again.
    """

    def __init__(self):
        self.whole = True  # False: something was called that is no graph of ours
        self._calls: list[Callable[[Tensor], Tensor]] = []
        # Two sets, in turns: what a call returns, the next one reads while it writes its own.
        self._buffers: tuple[dict, dict] = {}, {}
        self._last: tuple[Tensor, Tensor] | None = None  # returned: now, and when it is played

    def record(self, function: Callable, x: Tensor, *arguments) -> Tensor:
        """function(x, *arguments), which `inductor` compiled, as the next call of the chain."""
        _watching.calls = calls = []
        try:
            out = function(x, *arguments)
        finally:
            del _watching.calls
        match calls:
            case [(code, inputs, [found])] if found is out:
                self._add(code, inputs, x, out)
            case _:
                self.whole = False
        return out

    def _add(self, code: Callable, inputs: list, x: Tensor, out: Tensor) -> None:
        follows = self._last is not None and self._last[0] is x
        given = self._last[1] if follows else x.clone()
        inputs = [given if part is x else part for part in inputs]
        planned = _launches(code, inputs, self._buffers[len(self._calls) % 2])
        self._last = None
        if planned is None:

            def call(x: Tensor) -> Tensor:
                given.copy_(x)
                return code(list(inputs))[0]

        else:
            launches, made = planned
            self._last = out, made

            def call(x: Tensor) -> Tensor:
                if x is not given:
                    given.copy_(x)
                for kernel, arguments in launches:
                    kernel(*arguments)
                return made

        self._calls.append(call)

    def play(self, x: Tensor) -> Tensor:
        """The whole chain once more, from another x."""
        for call in self._calls:
            x = call(x)
        return x

    def owns(self, tensor: Tensor) -> bool:
        """Whether a call's result is the memory of this one, to be overwritten."""
        return self._last is not None and _memory(self._last[1]) == _memory(tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_DTYPES = SimpleNamespace(**{k: v for k, v in vars(torch).items() if isinstance(v, torch.dtype)})


def _launches(code: Callable, inputs: list, buffers: dict) -> tuple[list, Tensor] | None:
    """What generated `code` launches for these inputs, as (kernel, arguments), and its output.

    The code runs, on `buffers`, with kernels that only take notes. It knows no names but those of
    kernels, buffers and dtypes: None where it asks for anything else, such as a library's product.
    """
    function = getattr(code, "__func__", code)
    if not isinstance(function, FunctionType) or function.__closure__:
        return None
    launches, position, names = [], itertools.count(), function.__globals__

    def allocate(size, stride, dtype):
        key = next(position), size, stride, dtype
        if key not in buffers:
            buffers[key] = torch.empty_strided(size, stride, dtype=dtype)
        return buffers[key]

    def noted(kernel):
        return lambda *arguments: launches.append((kernel, arguments))

    known = {n: noted(kernel) for n, kernel in names.items() if n.startswith("cpp_fused")}
    known |= {"empty_strided_cpu": allocate, "torch": _DTYPES}
    if "reinterpret_tensor" in names:
        known["reinterpret_tensor"] = names["reinterpret_tensor"]
    owner = () if function is code else (code.__self__,)
    try:
        [out] = FunctionType(function.__code__, known)(*owner, list(inputs))
    except (NameError, AttributeError):
        return None
    return launches, out

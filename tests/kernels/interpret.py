"""Triton's interpreter made fit for proof.

install()                       repairs it, for the whole process (interpret_repair.py)
with sanitized(): ...           launches are checked: bounds, races (interpret_memory, _sanitize)
with counted() as launches:     launches are measured: bytes, FLOPs (interpret_traffic.py)
with only(programs):            of each launch only some programs run

The first two raise or report per launch, in the order of launches, and nest in any way. Tensors
live on the CPU. Not seen: shapes that are not run, threads of one program beyond what
interpret_sanitize.py names, values that nobody wrote (tests fill new memory with NaN).
"""

import contextlib
import inspect
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from interpret_memory import Memory, MemoryFault
from interpret_repair import Repaired, contiguous, mask_of, repair
from interpret_sanitize import Sanitizer
from interpret_speed import hasten
from interpret_traffic import Counter, Launch
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Launch", "MemoryFault", "counted", "install", "only", "sanitized"]

GRID_LIMITS = (2**31 - 1, 65535, 65535)


class _State:
    """What is switched on, and the memory of the launch under way."""

    sanitizing = 0
    counts: list[list[Launch]] = []  # noqa: RUF012 - one per open `counted`
    memory: Memory | None = None
    programs = None  # what `only` was given


@contextlib.contextmanager
def only(programs):
    """Run just `programs(kernel, grid)` of each launch: indices of three numbers, in this order.

    So a grid may be as large as a GPU's. What the other programs would have written stays as it is.
    """
    before, _State.programs = _State.programs, programs
    try:
        yield
    finally:
        _State.programs = before


@contextlib.contextmanager
def sanitized():
    """Raise MemoryFault where a launch leaves a tensor argument's view or races."""
    _State.sanitizing += 1
    try:
        yield
    finally:
        _State.sanitizing -= 1


@contextlib.contextmanager
def counted():
    """Yield a list that gets one Launch for each launch that ends inside."""
    launches = []
    _State.counts.append(launches)
    try:
        yield launches
    finally:
        _State.counts.pop()


def _tensors(name: str, value):
    """Pairs of name and tensor within one argument."""
    if isinstance(value, TensorDescriptor):
        yield from _tensors(name, value.base)
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from _tensors(f"{name}[{number}]", part)
    elif hasattr(value, "data_ptr"):
        yield name, value.base if isinstance(value, TensorWrapper) else value


def _argument(value, addresses):
    """A launch argument as the interpreter's value; `addresses` yields those of its tensors."""
    if isinstance(value, tuple):
        parts = [_argument(part, addresses) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    converted = stock._implicit_cvt(value)
    if isinstance(value, TensorDescriptor):
        base = converted.handle.base
        converted.handle.base = TensorHandle(_address(base.data, addresses), base.dtype)
    elif hasattr(value, "data_ptr"):
        converted.handle.data = _address(converted.handle.data, addresses)
    return converted


def _address(true, addresses):
    virtual = next(addresses, None)
    return true if virtual is None else np.array([virtual], np.uint64)


def _launch(self, *args, **kwargs):
    """GridExecutor.__call__: run every program of one launch, in order, under the observers."""
    names = inspect.signature(self.fn).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    for hook in self.pre_run_hooks:
        hook(*args, **kwargs)
    arguments = inspect.getcallargs(self.fn, *args, **kwargs)
    grid = self.grid(arguments) if callable(self.grid) else self.grid
    grid = (*map(int, grid), 1, 1)[:3] if len(grid) < 3 else tuple(map(int, grid))
    if any(n > limit for n, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise MemoryFault(f"kernel {self.fn.__name__}: grid {grid} exceeds {GRID_LIMITS}")
    run = {name: value for name, value in arguments.items() if name not in self.constexprs}
    tensors = [pair for name, value in run.items() for pair in _tensors(name, value)]
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"{self.fn.__name__}: {name} is on {tensor.device}, not on the CPU")
    counters = [Counter() for _ in _State.counts]
    observers = counters + [Sanitizer()] * bool(_State.sanitizing)
    memory = Memory(self.fn.__name__, tensors, observers) if observers else None
    addresses = iter([a.virtual for a in memory.arguments] if memory else [])
    arguments |= {name: _argument(value, addresses) for name, value in run.items()}
    _State.memory = memory
    try:
        with np.errstate(all="ignore"):
            _run_programs(self.fn, arguments, grid, memory)
    finally:
        _State.memory = None
    for launches, counter in zip(_State.counts, counters, strict=True):
        launches.append(counter.result(self.fn.__name__, grid))


def _run_programs(fn, arguments, grid, memory) -> None:
    builder = stock.interpreter_builder
    builder.set_grid_dim(*grid)
    indices = _State.programs(fn.__name__, grid) if _State.programs else np.ndindex(grid)
    for index in indices:
        builder.set_grid_idx(*index)
        if memory is not None:
            memory.begin_program(index)
        try:
            fn(**arguments)
        except MemoryFault:
            raise
        except Exception as error:
            words = f"kernel {fn.__name__}, program {index}: {error!r}"
            raise InterpreterError(words) from error


def _call(self, *args, **kwargs):
    """InterpretedFunction.__call__: a function that a kernel calls."""
    return self.rewrite()(*args, **kwargs)


def _seen(kind, pointer, mask):
    """The pointer with true addresses, after the observers have seen the access."""
    if _State.memory is None:
        return pointer
    itemsize = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
    data = _State.memory.access(kind, pointer.data, mask_of(mask), itemsize)
    return TensorHandle(data, pointer.dtype)


class _Observed(Repaired):
    """Builder methods that tell of memory accesses, barriers and dots."""

    def create_masked_load(self, ptrs, mask, other, *options, **more):
        return Repaired.create_masked_load(self, _seen("load", ptrs, mask), mask, other)

    def create_masked_store(self, ptrs, value, mask, *options, **more):
        return Repaired.create_masked_store(self, _seen("store", ptrs, mask), value, mask)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        true = _seen("atomic", ptr, mask)
        return Repaired.create_atomic_rmw(self, op, true, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        true = _seen("atomic", ptr, np.ones(ptr.data.shape, bool))
        true, cmp, val = (contiguous(handle) for handle in (true, cmp, val))
        return _stock_atomic_cas(self, true, cmp, val, sem, scope)

    def create_barrier(self):
        if _State.memory is not None:
            _State.memory.barrier()

    def create_dot(self, a, b, d, *options):
        if _State.memory is not None:
            _State.memory.dot(2 * d.data.size * a.data.shape[-1])
        return Repaired.create_dot(self, a, b, d, *options)


_stock_atomic_cas = InterpreterBuilder.create_atomic_cas


def install() -> None:
    """Repair the interpreter of this process (idempotent).

    The language is turned into its interpreted form once and stays so: stock, that happens again at
    each launch and at each call of a function inside a kernel, and takes most of the time.
    """
    if getattr(InterpreterBuilder, "exact_bfloat16", False):
        return
    repair()
    hasten()
    for name, method in vars(_Observed).items():
        if not name.startswith("__"):
            setattr(InterpreterBuilder, name, method)
    GridExecutor.__call__ = _launch
    InterpretedFunction.__call__ = _call
    stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # Triton 3.6 converts an array of one element to an integer, which numpy 2.4 refuses.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

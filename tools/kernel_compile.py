"""Compiles Triton kernels through their launchers with no GPU: every launch becomes a compilation.

A launcher is called with tensors on the meta device, which hold no memory but know their strides
and offsets, so that each kernel is compiled with exactly the specialisation of a real launch
(divisibility by 16, arguments equal to one). Needs a process without TRITON_INTERPRET.
"""

import contextlib
import os
import time
from typing import NamedTuple

from kernel_targets import TARGETS

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and compiles none")

# Fusion of a multiplication with an addition is what Triton 3.6 to 3.9 do when nothing is said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from torch.library import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launched(NamedTuple):
    """One launch of a kernel. `compiled`: Triton's CompiledKernel; `seconds`: compilation alone."""

    kernel: str
    grid: tuple[int, ...]
    meta: dict
    compiled: object
    seconds: float


class Driver:
    """What Triton asks of a driver before it compiles. Each target is a device of its own."""

    def __init__(self, target: str):
        backend, arch, warp = TARGETS[target].backend, TARGETS[target].arch, TARGETS[target].warp
        self.target, self.device = GPUTarget(backend, arch, warp), list(TARGETS).index(target)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target


@contextlib.contextmanager
def compiling(target: str):
    """Within it, kernel launches compile for `target` and are appended to the list it yields."""
    launches: list[Launched] = []
    real_run, real_call = JITFunction.run, CustomOpDef.__call__

    def run(kernel, *args, grid, warmup, **options):
        start = time.perf_counter()
        compiled = real_run(kernel, *args, grid=grid, warmup=True, **options)
        seconds = time.perf_counter() - start
        named = {**dict(zip(kernel.arg_names, args)), **options}
        if callable(grid):
            grid = grid(named)
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        meta = {name: value for name, value in named.items() if name in constexprs}
        launches.append(Launched(kernel.fn.__name__, tuple(grid), meta, compiled, seconds))
        return compiled

    triton.runtime.driver.set_active(Driver(target))
    JITFunction.run = run
    # Tensors without memory would be sent to an operator's shape function, and nothing launched.
    CustomOpDef.__call__ = lambda operator, *args, **named: operator._init_fn(*args, **named)
    try:
        yield launches
    finally:
        JITFunction.run, CustomOpDef.__call__ = real_run, real_call

"""The tests of the kernels on a GPU: every launch is compiled and runs there, all else stays.

Tensors, truths and yardsticks are those of the interpreted tests, on the CPU; a launch takes copies
of its arguments' memory to the GPU, with their strides and offsets, and brings all of it back.
"""

import importlib
import pkgutil
from types import SimpleNamespace

import falcon_h1r_kernels
import torch
from falcon_h1r_kernels import launch
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.jit import JITFunction

WHOLE = 2**28  # bytes of memory up to which gaps between a view's elements are copied too


class DeviceCopies:
    """Copies of tensors on the GPU; views of one memory stay views of one memory."""

    def __init__(self, device: str):
        self.device, self.storages, self.pairs = device, {}, []

    def copy(self, value):
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        key = storage.data_ptr()
        if key not in self.storages:
            self.storages[key] = torch.empty(
                storage.nbytes(), dtype=torch.uint8, device=self.device
            )
            if storage.nbytes() <= WHOLE:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._pair(whole, self.storages[key])
        view = torch.empty(0, dtype=value.dtype, device=self.device).set_(
            self.storages[key].untyped_storage(),
            value.storage_offset(),
            value.shape,
            value.stride(),
        )
        if storage.nbytes() > WHOLE:
            self._pair(value, view)
        return view

    def _pair(self, there, here):
        here.copy_(there)
        self.pairs.append((there, here))

    def bring_back(self):
        for there, here in self.pairs:
            there.copy_(here)


def install(device: str) -> None:
    """Send launches with tensors on the CPU to `device`, for the whole process."""
    for module in pkgutil.iter_modules(falcon_h1r_kernels.__path__):
        importlib.import_module(f"falcon_h1r_kernels.{module.name}")
    run = JITFunction.run

    def run_there(kernel, *args, grid, warmup, **named):
        memory = DeviceCopies(device)
        there = [memory.copy(value) for value in args]
        out = run(kernel, *there, grid=grid, warmup=warmup, **named)
        memory.bring_back()
        large = any(len(bytes_) > WHOLE for bytes_ in memory.storages.values())
        del there, memory
        if large:  # other processes test on the same GPU
            torch.cuda.empty_cache()
        return out

    JITFunction.run = run_there
    # Launchers refuse tensors on a CPU unless they are interpreted, exactly.
    launch.knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
    InterpreterBuilder.exact_bfloat16 = True

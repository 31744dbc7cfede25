"""The memory that one launch sees: which tensor argument, and which element, each access means.

Every tensor argument gets an address range of its own, far from all others, so a pointer says
whose it is whatever was done to it: added to, selected, cast to an integer and back. An access has
to stay inside the argument's own view, not merely inside the storage behind it. Arguments that
overlap in true memory share a region, in whose units (bytes, or wider) observers are told of each
access.
"""

import contextlib
import math
import mmap

import numpy as np
from numpy.lib.stride_tricks import as_strided

WINDOW = 44  # log2 of the bytes of address space per argument
LARGE = 1 << 24  # bytes from which arrays are mapped
MAP_NORESERVE = 0x4000  # Linux; mmap has no name for it


class MemoryFault(Exception):
    """What a kernel did that a GPU answers with wrong values or a crash."""


def zeros(elements: int, dtype) -> np.ndarray:
    """numpy.zeros, however large: pages of 4 KB that nobody touched take no memory."""
    dtype = np.dtype(dtype)
    if elements * dtype.itemsize < LARGE:
        return np.zeros(elements, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype)


class Region:
    """Memory of one argument, or of several that overlap: `units` pieces of `unit` bytes."""

    def __init__(self, first: int, last: int, unit: int):
        self.first, self.unit = first, unit
        self.units = (last - first) // unit


def _dense(shape, stride) -> bool:
    """Whether a view has an element at every offset between its first and its last."""
    reach = 1
    for step, size in sorted(zip(stride, shape)):
        if size > 1 and step > reach:
            return False
        reach += (size - 1) * step
    return True


class Argument:
    """One tensor argument. `real`, `virtual`: its first element's addresses; `start`: its unit."""

    def __init__(self, name: str, tensor, number: int):
        self.name, self.shape, self.stride = name, tuple(tensor.shape), tuple(tensor.stride())
        self.itemsize = tensor.element_size()
        self.real = tensor.data_ptr()
        self.virtual = (number << WINDOW) + (1 << WINDOW - 1) + self.real % 4096
        elements = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        self.bytes = 0 if 0 in self.shape else elements * self.itemsize
        self.dense = _dense(self.shape, self.stride)
        self.region = self.inside = None
        self.start = 0

    def place(self, region: Region) -> None:
        """Settle in a region; views with gaps note which of their units are elements."""
        self.region = region
        self.start = (self.real - region.first) // region.unit
        if not self.dense:
            ratio = self.itemsize // region.unit
            self.inside = zeros(self.bytes // region.unit, bool)
            strides = [s * ratio for s in self.stride]
            as_strided(self.inside, (*self.shape, ratio), (*strides, 1))[...] = True


class Memory:
    """The tensor arguments of one launch; tells `observers` of every access, raises MemoryFault.

    named_tensors: pairs of name and tensor, in any order and with repetitions.
    """

    def __init__(self, kernel: str, named_tensors, observers):
        self.kernel, self.observers = kernel, observers
        self.index, self.program = (0, 0, 0), 0
        self.arguments = [Argument(n, t, 1 + k) for k, (n, t) in enumerate(named_tensors)]
        self._place()

    def _place(self) -> None:
        group, end = [], 0
        for argument in sorted(self.arguments, key=lambda a: a.real):
            if group and argument.real >= end:
                self._share_region(group, end)
                group, end = [], 0
            group.append(argument)
            end = max(end, argument.real + argument.bytes)
        if group:
            self._share_region(group, end)

    def _share_region(self, group, end) -> None:
        first = group[0].real
        unit = math.gcd(*(a.itemsize for a in group), *(a.real - first for a in group))
        region = Region(first, end, unit)
        for argument in group:
            argument.place(region)

    def begin_program(self, index: tuple[int, int, int]) -> None:
        self.index = index
        self.program += 1
        for observer in self.observers:
            observer.begin_program(self.program)

    def barrier(self) -> None:
        for observer in self.observers:
            observer.barrier()

    def dot(self, flops: int) -> None:
        for observer in self.observers:
            observer.dot(flops)

    def access(self, kind: str, addresses, mask, itemsize: int) -> np.ndarray:
        """Check a "load", "store" or "atomic" of the lanes in `mask`; returns true addresses.

        addresses: uint64 of any shape; mask: bool, the same; itemsize: bytes per lane.
        """
        lanes = None if mask.all() else np.flatnonzero(mask)
        active = addresses.reshape(-1)
        if lanes is not None:
            active = active[lanes]
        if active.size == 0:
            return addresses
        low, high = int(active.min()), int(active.max())
        if low >> WINDOW == high >> WINDOW:
            argument = self._argument(kind, low)
            self._access(kind, argument, active, lanes, low, high, itemsize)
            return addresses + np.uint64((argument.real - argument.virtual) % 2**64)
        real = addresses.copy()
        windows = np.where(mask, addresses >> np.uint64(WINDOW), np.uint64(0))
        for window in np.unique(active >> np.uint64(WINDOW)):
            part = windows == window
            real[part] = self.access(kind, addresses, part, itemsize)[part]
        return real

    def _argument(self, kind, address) -> Argument:
        number = address >> WINDOW
        if not 1 <= number <= len(self.arguments):
            raise self.fault(f"{kind} through a pointer that is no argument's: {address:#x}")
        return self.arguments[number - 1]

    def _access(self, kind, argument, active, lanes, low, high, itemsize) -> None:
        region = argument.region
        if low < argument.virtual or high + itemsize > argument.virtual + argument.bytes:
            self._outside(kind, argument, active, itemsize)
        origin = argument.virtual - argument.start * region.unit
        index = (active - np.uint64(origin)).view(np.int64)
        if itemsize != argument.itemsize and (index % itemsize).any():
            raise self.fault(f"misaligned {kind} of {itemsize} bytes at {argument.name}")
        if region.unit > 1:
            index >>= region.unit.bit_length() - 1
        if itemsize > region.unit:
            index = (index[:, None] + np.arange(itemsize // region.unit)).reshape(-1)
        if argument.inside is not None and not argument.inside[index - argument.start].all():
            self._outside(kind, argument, active, itemsize)
        for observer in self.observers:
            getattr(observer, kind)(self, argument, index, lanes, active.size, itemsize)

    def _outside(self, kind, argument, active, itemsize):
        offset = active.view(np.int64) - argument.virtual
        wrong = (offset < 0) | (offset + itemsize > argument.bytes)
        if argument.inside is not None:
            unit = argument.region.unit
            allowed = argument.inside[np.where(wrong, 0, offset) // unit]
            wrong |= ~allowed
        raise self.fault(
            f"{kind} outside {argument.name}: {int(wrong.sum())} of {active.size} lanes, the first "
            f"at element offset {int(offset[wrong][0]) // argument.itemsize} of a tensor of shape "
            f"{argument.shape}, strides {argument.stride}"
        )

    def fault(self, words: str) -> MemoryFault:
        return MemoryFault(f"kernel {self.kernel}, program {self.index}: {words}")

    def element(self, argument: Argument, unit_index: int) -> str:
        """Names a unit of an argument's region as an element offset."""
        ratio = argument.itemsize // argument.region.unit
        return f"{argument.name}, element offset {(unit_index - argument.start) // ratio}"

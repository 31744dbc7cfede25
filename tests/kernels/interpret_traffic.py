"""How many bytes a launch moves and how many operations its tl.dot calls take.

Issued bytes are what the lanes ask for (masked ones ask for nothing): traffic to the caches. Unique
bytes count each element of memory once per launch: what device memory has to deliver at least. An
atomic counts as a load and a store. FLOPs are 2 m n k per tl.dot, masked or not, once for tf32x3.
"""

from typing import NamedTuple

import numpy as np
from interpret_memory import zeros


class Launch(NamedTuple):
    """One launch: `grid` of three axes, `programs` their product, bytes, operations."""

    kernel: str
    grid: tuple[int, int, int]
    programs: int
    issued_load_bytes: int
    unique_load_bytes: int
    issued_store_bytes: int
    unique_store_bytes: int
    dot_flops: int


class _Direction:
    """Loads, or stores: issued bytes, and a bit for each unit of each region that was touched."""

    def __init__(self):
        self.issued = 0
        self.touched = {}

    def add(self, region, index, issued) -> None:
        self.issued += issued
        if region not in self.touched:
            self.touched[region] = zeros(region.units, bool)
        self.touched[region][index] = True

    def unique(self) -> int:
        return sum(r.unit * int(np.count_nonzero(bits)) for r, bits in self.touched.items())


class Counter:
    """Observes one launch; `result` tells what it saw."""

    def __init__(self):
        self.loads, self.stores, self.flops = _Direction(), _Direction(), 0

    def begin_program(self, program: int) -> None:
        pass

    def barrier(self) -> None:
        pass

    def dot(self, flops: int) -> None:
        self.flops += flops

    def load(self, memory, argument, index, lanes, active, itemsize) -> None:
        self.loads.add(argument.region, index, active * itemsize)

    def store(self, memory, argument, index, lanes, active, itemsize) -> None:
        self.stores.add(argument.region, index, active * itemsize)

    def atomic(self, *access) -> None:
        self.load(*access)
        self.store(*access)

    def result(self, kernel: str, grid: tuple[int, int, int]) -> Launch:
        loads, stores = self.loads, self.stores
        programs = grid[0] * grid[1] * grid[2]
        moved = (loads.issued, loads.unique(), stores.issued, stores.unique())
        return Launch(kernel, grid, programs, *moved, self.flops)

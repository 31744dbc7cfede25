"""What the registry's operators are made of: where a call stands, its cost, random tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import FalconH1Config

CACHE_ROOM = 128  # positions a cache has left: keys are slices of it, as in a running generation
SILU = 3  # exp, addition, division


class Cost(NamedTuple):
    """Bytes read, bytes written and floating-point operations of one call, at the least."""

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Size(NamedTuple):
    """One call's place: b rows of l new tokens each, of a model, `past` tokens in front of them."""

    config: FalconH1Config
    dtype: torch.dtype
    b: int
    l: int
    past: int

    @property
    def item(self) -> int:
        """Bytes of an element in the model's dtype."""
        return self.dtype.itemsize

    @property
    def wide(self) -> torch.dtype:
        """The dtype of dt, A, D, rotary tables and SSM states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def total(self) -> int:
        """Keys per row after the call."""
        return self.past + self.l


class Draw:
    """Seeded random tensors on one device; on "meta", tensors without memory and values."""

    def __init__(self, seed: int, device: str | torch.device):
        self.device = torch.device(device)
        self.generator = None
        if self.device.type != "meta":
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return out.normal_(0, scale, generator=self.generator)

    def uniform(self, *shape: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return out.uniform_(low, high, generator=self.generator)


class Alone(NamedTuple):
    """An operator of no table: its plain torch forms, and where its kernel is.

    reference, torch: as REFERENCE's and TORCH's functions. kernel: module and function in
    `falcon_h1r_kernels`; all take the same arguments.
    """

    reference: Callable
    torch: Callable
    kernel: tuple[str, str]


class Operator(NamedTuple):
    """One line of the registry.

    field: the field of `ops.Ops` that computes it, "" where no table has it, then `alone` tells
    who does. phases: of "prefill", "resume", "decode". mutates: names of arguments that a call
    overwrites. inputs(size, draw) -> arguments by name; cost(size) -> `Cost`. wide_results: all
    results and all arithmetic are float32 whatever the inputs are, and are judged so.
    """

    name: str
    field: str
    phases: tuple[str, ...]
    inputs: Callable[[Size, Draw], dict[str, Any]]
    cost: Callable[[Size], Cost]
    mutates: tuple[str, ...] = ()
    alone: Alone | None = None
    wide_results: bool = False

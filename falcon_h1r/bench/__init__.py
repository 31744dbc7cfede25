"""Microbenchmarks: operators, one layer, generation; each gated by a correctness check."""

from .comparison import Comparison, compare

__all__ = ["Comparison", "compare"]

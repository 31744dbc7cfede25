"""Microbenchmarks: operators, one layer, generation; each gated by a correctness check."""

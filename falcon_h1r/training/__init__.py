"""Training: losses that fit into memory."""

from .cross_entropy import linear_cross_entropy, linear_logprobs

__all__ = ["linear_cross_entropy", "linear_logprobs"]

"""Training: losses that fit into memory."""

from .cross_entropy import linear_cross_entropy, linear_logprobs
from .loss import next_token_logprobs, next_token_loss

__all__ = ["linear_cross_entropy", "linear_logprobs", "next_token_logprobs", "next_token_loss"]

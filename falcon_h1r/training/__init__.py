"""Training: losses that fit into memory, and low-rank adapters."""

from .cross_entropy import linear_cross_entropy, linear_logprobs
from .lora import add_lora, load_lora, merge_lora, remove_lora, save_lora, trainable
from .loss import next_token_logprobs, next_token_loss

__all__ = [
    "add_lora",
    "linear_cross_entropy",
    "linear_logprobs",
    "load_lora",
    "merge_lora",
    "next_token_logprobs",
    "next_token_loss",
    "remove_lora",
    "save_lora",
    "trainable",
]

"""Falcon-H1 and Falcon-H1R in PyTorch: a reference to study, test against and measure with."""

from .cache import Cache
from .checkpoint import CheckpointError
from .config import ConfigError, FalconH1Config
from .generation import SamplingParams, generate, stream
from .model import FalconH1ForCausalLM
from .text import load_tokenizer

__all__ = [
    "Cache",
    "CheckpointError",
    "ConfigError",
    "FalconH1Config",
    "FalconH1ForCausalLM",
    "SamplingParams",
    "generate",
    "load_tokenizer",
    "stream",
]

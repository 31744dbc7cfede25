"""Falcon-H1 and Falcon-H1R in PyTorch: a reference to study, test against and measure with."""

from .cache import Cache
from .config import ConfigError, FalconH1Config
from .model import FalconH1ForCausalLM

__all__ = ["Cache", "ConfigError", "FalconH1Config", "FalconH1ForCausalLM"]

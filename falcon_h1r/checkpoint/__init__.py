"""Checkpoints in the released layout: safetensors in, safetensors (or GGUF) out, never a pickle."""

from .errors import CheckpointError
from .fold import fold_multipliers
from .generation_config import end_token_ids, read_generation_config, sampling_defaults
from .gguf import save_gguf
from .hub import resolve
from .layout import TensorInfo, config_values, inspect, stored_dtype
from .loader import load
from .saver import save
from .stream import Streamed, stream_modules

__all__ = [
    "CheckpointError",
    "Streamed",
    "TensorInfo",
    "config_values",
    "end_token_ids",
    "fold_multipliers",
    "inspect",
    "load",
    "read_generation_config",
    "resolve",
    "sampling_defaults",
    "save",
    "save_gguf",
    "stored_dtype",
    "stream_modules",
]

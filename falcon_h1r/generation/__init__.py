"""Sampling, generation of one batch, and the engine that decodes many traces side by side."""

from .engine import Engine
from .generate import Stream, generate, stream
from .output import EngineStep, GenerateOutput, Step, TraceOutput
from .params import SamplingParams, derive_seeds
from .sampling import uniform
from .slots import Plan

__all__ = [
    "Engine",
    "EngineStep",
    "GenerateOutput",
    "Plan",
    "SamplingParams",
    "Step",
    "Stream",
    "TraceOutput",
    "derive_seeds",
    "generate",
    "stream",
    "uniform",
]

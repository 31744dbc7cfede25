"""Sampling, and generation for ragged batches with several samples per prompt."""

from .generate import Stream, generate, stream
from .output import GenerateOutput, Step
from .params import SamplingParams, derive_seeds
from .sampling import uniform

__all__ = [
    "GenerateOutput",
    "SamplingParams",
    "Step",
    "Stream",
    "derive_seeds",
    "generate",
    "stream",
    "uniform",
]

"""All faults the doctor knows.

Most have been seen: dropped multipliers and `repeat` for `repeat_interleave` in transformers' first
torch path, the key multiplier in mlx-lm, a multiplier before the norm in Megatron-Bridge, a
bidirectional prefill in vMLX, the clamp in prefill only, chunks from a zero state and padding at
batch 1 in transformers, a bfloat16 state in vLLM.
"""

from __future__ import annotations

import difflib

from .faults import Fault
from .faults_attention import ATTENTION
from .faults_mixer import MIXER
from .faults_scaling import SCALING

FAULTS: tuple[Fault, ...] = (*SCALING, *ATTENTION, *MIXER)


def find(name: str) -> Fault:
    """The fault of that name; raises ValueError with the nearest one."""
    for fault in FAULTS:
        if fault.name == name:
            return fault
    close = difflib.get_close_matches(name, [fault.name for fault in FAULTS], n=1, cutoff=0.0)
    raise ValueError(f"no fault {name!r}; did you mean {close[0]!r}?")

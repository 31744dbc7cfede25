"""What makes a CPU fast; `docs/cpu.md` says what each part buys and what it leans on in torch.

`inductor` holds the functions of the operator table INDUCTOR, `compiled` the decode step and the
prefill compiled from it, `launches` the recorded steps, `onednn` and `int8` linear layers.
"""

from .compiled import CompiledPrefill, CompiledStep, require_compiler
from .int8 import use_int8
from .onednn import use_onednn

__all__ = ["CompiledPrefill", "CompiledStep", "require_compiler", "use_int8", "use_onednn"]

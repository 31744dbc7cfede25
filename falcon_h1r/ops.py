"""The operator tables: the only place that decides which code computes a hot operator.

REFERENCE is the clearest statement of each operator and runs in float64; TORCH is the fast pure
PyTorch form, the default on a CPU; INDUCTOR holds what a compiled CPU graph is made of (`cpu/`),
without gradients; TRITON holds the kernels, forward only, the default on a GPU, and imports Triton
when it is asked for. A model is built with one table; mixing is explicit:
`FalconH1ForCausalLM(config, ops=TORCH._replace(ssd_scan=my_scan))`. Nothing falls back.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import attention, conv, mlp, norm, operator_gradients, rope, scan, ssd
from .cpu import inductor, step
from .table_names import NAMES


class Ops(NamedTuple):
    """One function per hot operator; signatures and shapes are those of the REFERENCE functions."""

    rms_norm: Callable
    gated_rms_norm: Callable
    rope: Callable
    causal_conv1d: Callable
    causal_conv1d_step: Callable
    ssd_scan: Callable
    ssd_step: Callable
    attention: Callable
    decode_attention: Callable
    swiglu: Callable

    def __repr__(self) -> str:
        """The nearest table's name, and what differs from it."""
        made = [n for n in NAMES if n != "triton" or _triton.cache_info().currsize]
        others = [[f for f, a, b in zip(self._fields, self, table(n)) if a is not b] for n in made]
        name, own = min(zip(made, others), key=lambda pair: len(pair[1]))
        return f"{name.upper()} with another {', '.join(own)}" if own else name.upper()


REFERENCE = Ops(
    rms_norm=norm.rms_norm_reference,
    gated_rms_norm=norm.gated_rms_norm_reference,
    rope=rope.rope_reference,
    causal_conv1d=conv.causal_conv1d_reference,
    causal_conv1d_step=conv.causal_conv1d_step,
    ssd_scan=ssd.ssd_recurrent,
    ssd_step=ssd.ssd_step,
    attention=attention.attention_reference,
    decode_attention=attention.decode_attention_reference,
    swiglu=mlp.swiglu_reference,
)

TORCH = REFERENCE._replace(
    rms_norm=operator_gradients.rms_norm,
    gated_rms_norm=operator_gradients.gated_rms_norm,
    causal_conv1d=operator_gradients.causal_conv1d,
    swiglu=operator_gradients.swiglu,
    ssd_scan=scan.ssd_scan,
    ssd_step=step.ssd_step,
    attention=attention.attention,
    decode_attention=attention.decode_attention,
)

INDUCTOR = TORCH._replace(
    causal_conv1d=inductor.causal_conv1d,
    causal_conv1d_step=inductor.causal_conv1d_step,
    ssd_scan=inductor.ssd_scan,
    ssd_step=inductor.ssd_step,
    decode_attention=inductor.decode_attention,
)


@functools.cache
def _triton() -> Ops:
    files = {"causal_conv1d": "conv1d", "causal_conv1d_step": "conv1d"}
    try:
        kernels = importlib.import_module("falcon_h1r_kernels")
        names = [f"{kernels.__name__}.{files.get(name, name)}" for name in Ops._fields]
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ValueError(f"the table TRITON cannot be made ({error}); use TORCH") from error
    return Ops(*(getattr(module, name) for module, name in zip(modules, Ops._fields)))


def __getattr__(name: str) -> Ops:
    if name == "TRITON":
        return _triton()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def table(name: str) -> Ops:
    """The table of one of NAMES.

    Raises ValueError for another name, and for "triton" where Triton or the kernels are missing.
    """
    if name not in NAMES:
        raise ValueError(f"no operator table {name!r}; there are: {', '.join(NAMES)}")
    return _triton() if name == "triton" else globals()[name.upper()]


def default_table(device: torch.device, dtype: torch.dtype) -> Ops:
    """TRITON on a GPU, TORCH elsewhere and in float64, which the kernels do not serve."""
    return _triton() if device.type == "cuda" and dtype != torch.float64 else TORCH

"""The operator tables: the only place that decides which code computes a hot operator.

REFERENCE is the clearest statement of each operator and runs in float64; TORCH is the fast pure
PyTorch form and the default. A model is built with one table, and mixing is explicit:
`FalconH1ForCausalLM(config, ops=TORCH._replace(ssd_scan=REFERENCE.ssd_scan))`. Nothing is detected
and nothing falls back: an operator that cannot serve a request raises.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import attention, conv, mlp, norm, rope, ssd


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


REFERENCE = Ops(
    rms_norm=norm.rms_norm_reference,
    gated_rms_norm=norm.gated_rms_norm_reference,
    rope=rope.rope_reference,
    causal_conv1d=conv.causal_conv1d_reference,
    causal_conv1d_step=conv.causal_conv1d_step,
    ssd_scan=ssd.ssd_recurrent,
    ssd_step=ssd.ssd_step_reference,
    attention=attention.attention_reference,
    decode_attention=attention.decode_attention_reference,
    swiglu=mlp.swiglu_reference,
)

TORCH = Ops(
    rms_norm=norm.rms_norm,
    gated_rms_norm=norm.gated_rms_norm,
    rope=rope.rope_reference,
    causal_conv1d=conv.causal_conv1d,
    causal_conv1d_step=conv.causal_conv1d_step,
    ssd_scan=ssd.ssd_chunked,
    ssd_step=ssd.ssd_step,
    attention=attention.attention,
    decode_attention=attention.decode_attention,
    swiglu=mlp.swiglu_reference,
)

TABLES = {"reference": REFERENCE, "torch": TORCH}

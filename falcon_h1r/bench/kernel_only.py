"""Operators that no table has: kernels that stand alone, and the plain torch they are held against.

Same argument names as the kernels' public functions, so that cases, gate and timing treat them like
all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ssd
from ..conv import causal_conv1d_reference, causal_conv1d_step
from ..cpu.step import ssd_step
from ..generation.logprob import logprob
from ..norm import rms_norm, rms_norm_reference
from ..precision import compute_dtype
from .mixer_operators import OPERATORS as MIXER
from .mixer_operators import conv_step_inputs, ssd_step_inputs
from .sizes import Alone, Cost, Draw, Operator, Size


def rms_norm_residual_reference(x: Tensor, weight_d: Tensor, eps: float, residual: Tensor):
    """rms_norm(x + residual) and the sum itself, (..., d) each in x's dtype.

    The sum is normalised before it is rounded.
    """
    work = compute_dtype(x)
    total = x.to(work) + residual.to(work)
    return rms_norm_reference(total, weight_d, eps).to(x.dtype), total.to(x.dtype)


def rms_norm_residual(x: Tensor, weight_d: Tensor, eps: float, residual: Tensor):
    """As a model without the kernel does it: add, round, normalise."""
    total = x + residual
    return rms_norm(total, weight_d, eps), total


def _residual_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    d = s.config.hidden_size
    return {
        "x": draw.normal(s.b, s.l, d, dtype=s.dtype),
        "weight_d": 1 + draw.normal(d, dtype=s.dtype, scale=0.1),
        "eps": s.config.rms_norm_eps,
        "residual": draw.normal(s.b, s.l, d, dtype=s.dtype),
    }


def _residual_cost(s: Size) -> Cost:
    elements, d = s.b * s.l * s.config.hidden_size, s.config.hidden_size
    return Cost((2 * elements + d) * s.item, 2 * elements * s.item, 5 * elements)


def _cut(xBC_bc: Tensor, state_bhpn: Tensor, groups: int):
    """x_bhp, B_bgn and C_bgn, the channels of the convolution in this order."""
    b, h, p, n = state_bhpn.shape
    x, B, C = xBC_bc.split([h * p, groups * n, groups * n], dim=-1)
    return x.view(b, h, p), B.view(b, groups, n), C.view(b, groups, n)


def conv_ssd_step_reference(
    state_bhpn: Tensor,
    xBC_bc: Tensor,
    window_bvc: Tensor,
    new_window_bvc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    D_h: Tensor | None,
    groups: int,
) -> Tensor:
    """causal_conv1d_step and ssd_step in one: y_bhp in xBC's dtype, nothing rounded in between.

    state_bhpn (b, h, p, n) is updated in place; window_bvc (b, v, c) is read and the next one
    written to new_window_bvc; xBC_bc (b, c), c = h p + 2 groups n; the rest as in the two.
    """
    work = compute_dtype(xBC_bc)
    convolved, window = causal_conv1d_reference(
        xBC_bc[:, None].to(work),
        weight_cw,
        bias_c,
        initial_window_bvc=window_bvc,
    )
    new_window_bvc.copy_(window)
    x, B, C = _cut(convolved[:, 0], state_bhpn, groups)
    return ssd.ssd_step(state_bhpn, x, dt_bh, A_h, B, C, D_h).to(xBC_bc.dtype)


def conv_ssd_step(
    state_bhpn: Tensor,
    xBC_bc: Tensor,
    window_bvc: Tensor,
    new_window_bvc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    D_h: Tensor | None,
    groups: int,
) -> Tensor:
    """As a model without the kernel does it: one after the other."""
    new_window_bvc.copy_(window_bvc)
    convolved = causal_conv1d_step(xBC_bc, new_window_bvc, weight_cw, bias_c)
    x, B, C = _cut(convolved, state_bhpn, groups)
    return ssd_step(state_bhpn, x, dt_bh, A_h, B, C, D_h)


def _conv_ssd_step_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    conv, step = conv_step_inputs(s, draw), ssd_step_inputs(s, draw)
    return {
        "state_bhpn": step["state_bhpn"],
        "xBC_bc": conv["x_bc"],
        "window_bvc": conv["window_bvc"],
        "new_window_bvc": torch.zeros_like(conv["window_bvc"]),
        "weight_cw": conv["weight_cw"],
        "bias_c": conv["bias_c"],
        "dt_bh": step["dt_bh"],
        "A_h": step["A_h"],
        "D_h": step["D_h"],
        "groups": s.config.mamba_n_groups,
    }


def _conv_ssd_step_cost(s: Size) -> Cost:
    """The two operators' FLOPs; what passes between them is not moved."""
    conv, step = (o.cost(s) for o in MIXER if o.name in ("causal_conv1d_step", "ssd_step"))
    between = s.b * s.config.conv_dim * s.item
    flops = conv.flops + step.flops
    return Cost(conv.read + step.read - between, conv.written + step.written - between, flops)


def _logprob_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    """Logits before the head's multiplier, as the head gives them; k as DeepConf takes it."""
    v, multiplier = s.config.vocab_size, s.config.lm_head_multiplier
    return {
        "logits_mv": draw.normal(s.b, v, dtype=s.dtype, scale=3 / multiplier),
        "chosen_m": torch.arange(s.b, device=draw.device) * 7919 % v,
        "k": min(20, v),
        "multiplier": multiplier,
    }


def _logprob_cost(s: Size) -> Cost:
    """Per logit: times the multiplier, minus the maximum, exp, and its two sums."""
    logits = s.b * s.config.vocab_size
    return Cost(logits * s.item + 8 * s.b, 3 * s.b * s.wide.itemsize, 6 * logits)


OPERATORS = (
    Operator(
        "rms_norm_residual",
        "",
        ("prefill", "decode"),
        _residual_inputs,
        _residual_cost,
        alone=Alone(rms_norm_residual_reference, rms_norm_residual, ("rms_norm", "rms_norm")),
    ),
    Operator(
        "conv_ssd_step",
        "",
        ("decode",),
        _conv_ssd_step_inputs,
        _conv_ssd_step_cost,
        mutates=("state_bhpn", "new_window_bvc"),
        alone=Alone(conv_ssd_step_reference, conv_ssd_step, ("conv_ssd_step", "conv_ssd_step")),
    ),
    Operator(
        "logprob",
        "",
        ("decode",),
        _logprob_inputs,
        _logprob_cost,
        alone=Alone(logprob, logprob, ("logprob", "logprob")),
        wide_results=True,
    ),
)

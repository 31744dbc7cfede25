"""The mixer's operators in the registry: convolution, scan, step, gate; see `operators.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sizes import SILU, Cost, Draw, Operator, Size


def _gated_rms_norm_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    c = s.config
    shared = {
        "y_bld": draw.normal(s.b, s.l, c.d_ssm, dtype=s.dtype),
        "z_bld": draw.normal(s.b, s.l, c.d_ssm, dtype=s.dtype),
        "weight_d": None,
        "eps": c.rms_norm_eps,
    }
    if not c.mamba_rms_norm:
        return shared
    return shared | {
        "weight_d": 1 + draw.normal(c.d_ssm, dtype=s.dtype, scale=0.1),
        "n_groups": c.mamba_n_groups,
        "norm_before_gate": c.mamba_norm_before_gate,
    }


def _gated_rms_norm_cost(s: Size) -> Cost:
    elements, normed = s.b * s.l * s.config.d_ssm, s.config.mamba_rms_norm
    weight = s.config.d_ssm * normed
    flops = (SILU + 1 + 4 * normed) * elements
    return Cost((2 * elements + weight) * s.item, elements * s.item, flops)


def _conv_parameters(s: Size, draw: Draw) -> dict[str, Any]:
    c = s.config
    weight = draw.normal(c.conv_dim, 1, c.mamba_d_conv, dtype=s.dtype, scale=0.5)[:, 0]
    bias = draw.normal(c.conv_dim, dtype=s.dtype) if c.mamba_conv_bias else None
    return {"weight_cw": weight, "bias_c": bias}


def _conv_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    c = s.config
    return {
        "x_blc": draw.normal(s.b, s.l, c.conv_dim, dtype=s.dtype),
        **_conv_parameters(s, draw),
        "initial_window_bvc": draw.normal(s.b, c.mamba_d_conv - 1, c.conv_dim, dtype=s.dtype),
    }


def conv_step_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    c = s.config
    return {
        "x_bc": draw.normal(s.b, 1, c.conv_dim, dtype=s.dtype)[:, 0],
        "window_bvc": draw.normal(s.b, c.mamba_d_conv - 1, c.conv_dim, dtype=s.dtype),
        **_conv_parameters(s, draw),
    }


def _conv_cost(s: Size) -> Cost:
    """Both phases: the window is read, and written back or returned."""
    c, w = s.config, s.config.mamba_d_conv
    samples, window = s.b * s.l * c.conv_dim, s.b * (w - 1) * c.conv_dim
    parameters = c.conv_dim * (w + c.mamba_conv_bias)
    moved = (samples + window) * s.item
    return Cost(moved + parameters * s.item, moved, (2 * w + SILU) * samples)


def _ssm_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    """x, B and C as slices of the convolution's output; dt as at a model's initialisation."""
    c, h = s.config, s.config.mamba_n_heads
    bc = c.mamba_n_groups * c.mamba_d_state
    xBC = draw.normal(s.b, s.l, c.conv_dim, dtype=s.dtype)
    x, B, C = xBC.split([c.d_ssm, bc, bc], dim=-1)
    groups = (c.mamba_n_groups, c.mamba_d_state)
    return {
        "x_blhp": x.unflatten(-1, (h, -1)),
        "dt_blh": draw.uniform(s.b, s.l, h, low=-6.9, high=-2.3, dtype=s.wide).exp(),
        "A_h": -torch.arange(1, h + 1, device=draw.device, dtype=s.wide),
        "B_blgn": B.unflatten(-1, groups),
        "C_blgn": C.unflatten(-1, groups),
        "D_h": draw.normal(h, dtype=s.wide),
    }


def _state(s: Size, draw: Draw) -> Tensor:
    c = s.config
    shape = (s.b, c.mamba_n_heads, c.mamba_head_dim, c.mamba_d_state)
    return draw.normal(*shape, dtype=s.wide)


def _ssd_scan_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    state = _state(s, draw)
    chunk = s.config.mamba_chunk_size
    return {**_ssm_inputs(s, draw), "chunk_size": chunk, "initial_state_bhpn": state}


def ssd_step_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    state = _state(s, draw)
    named = _ssm_inputs(s, draw)
    steps = {"x_blhp": "x_bhp", "dt_blh": "dt_bh", "B_blgn": "B_bgn", "C_blgn": "C_bgn"}
    order = ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn", "D_h")
    sliced = {steps.get(n, n): named[n][:, 0] if n in steps else named[n] for n in order}
    return {"state_bhpn": state, **sliced}


def _ssm_traffic(s: Size) -> tuple[int, int, int]:
    """Bytes read and written, and elements of the states."""
    c, h = s.config, s.config.mamba_n_heads
    tokens, state = s.b * s.l, s.b * h * c.mamba_head_dim * c.mamba_d_state
    read = tokens * (c.conv_dim * s.item + h * s.wide.itemsize) + 2 * h * s.wide.itemsize
    states = state * s.wide.itemsize
    return read + states, tokens * c.d_ssm * s.item + states, state


def _ssd_scan_cost(s: Size) -> Cost:
    """FLOPs of the chunked dual form at the config's chunk size, whatever form computes it.

    Per chunk of q positions, over its q(q+1)/2 causal pairs: C B^T once per group (n wide), its
    product with x per head (p wide); per position the product with the state, and the state's sum.
    """
    c, h, p, n = s.config, s.config.mamba_n_heads, s.config.mamba_head_dim, s.config.mamba_d_state
    whole, rest = divmod(s.l, c.mamba_chunk_size)
    pairs = sum(k * (q * (q + 1) // 2) for k, q in ((whole, c.mamba_chunk_size), (1, rest)))
    inside = 2 * pairs * (c.mamba_n_groups * n + h * p)
    between = 4 * s.l * h * p * n + 2 * s.l * h * p
    read, written, _ = _ssm_traffic(s)
    return Cost(read, written, s.b * (inside + between))


def _ssd_step_cost(s: Size) -> Cost:
    """Three multiply-adds per state element, as in `cost.decode_flops`, and D's per channel."""
    read, written, state = _ssm_traffic(s)
    return Cost(read, written, 6 * state + 2 * s.b * s.config.d_ssm)


OPERATORS = (
    Operator(
        "gated_rms_norm",
        "gated_rms_norm",
        ("prefill", "decode"),
        _gated_rms_norm_inputs,
        _gated_rms_norm_cost,
    ),
    Operator("causal_conv1d", "causal_conv1d", ("prefill",), _conv_inputs, _conv_cost),
    Operator(
        "causal_conv1d_step",
        "causal_conv1d_step",
        ("decode",),
        conv_step_inputs,
        _conv_cost,
        mutates=("window_bvc",),
    ),
    Operator("ssd_scan", "ssd_scan", ("prefill",), _ssd_scan_inputs, _ssd_scan_cost),
    Operator(
        "ssd_step",
        "ssd_step",
        ("decode",),
        ssd_step_inputs,
        _ssd_step_cost,
        mutates=("state_bhpn",),
    ),
)

"""Faults of the Mamba-2 mixer: projection, convolution, dt, scan, gate.

Wrapped operators keep the signatures of `ops.Ops`; axes as in `ssd.py` and `conv.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .faults import Fault, ModelParts, unless
from .faults_attention import mask_keys

_UNIT_GATE = 1.2784645427610738  # silu of it is 1
_GROUPS = unless(lambda c: c.mamba_n_groups > 1, "mamba_n_groups is 1")
_NORM = unless(lambda c: c.mamba_rms_norm, "mamba_rms_norm is false")
_LIMITS = unless(lambda c: c.time_step_limit != (0.0, math.inf), "time_step_limit is (0, inf)")


# --- projection -----------------------------------------------------------------------------------


def _z_and_x_swapped(parts: ModelParts) -> None:
    """The multipliers stay with their columns, as in a port that only splits wrongly."""
    d = parts.config.d_ssm
    for kind in ("weight", "bias"):
        parts.change_weights(
            f".in_proj.{kind}", lambda w: torch.cat([w[d : 2 * d], w[:d], w[2 * d :]])
        )
    z, x, B, C, dt = parts.config.ssm_multipliers
    parts.set(ssm_multipliers=(x, z, B, C, dt))


# --- step size and decay --------------------------------------------------------------------------


def _dt(parts: ModelParts, change, scan: bool = True, step: bool = True) -> None:
    """change(dt before softplus) -> dt, then clamped; softplus undone, padding (0) kept.

    scan, step: whether the stretch and the decode step are clamped.
    """
    limits = parts.config.time_step_limit
    parts.set(time_step_limit=(0.0, math.inf))

    def changed(x, dt, A, B, C, D):
        raw = dt + torch.log(-torch.expm1(-dt))
        clamped = scan if x.dim() == 4 else step
        new = change(raw).clamp(*(limits if clamped else (0.0, math.inf)))
        return x, torch.where(dt == 0, 0, new.to(dt.dtype)), A, B, C, D

    parts.ssd(changed)


def _bf16_softplus(raw: Tensor) -> Tensor:
    return F.softplus(raw.bfloat16()).to(raw.dtype)


def _no_dt_bias(parts: ModelParts) -> None:
    parts.change_weights(".dt_bias", torch.zeros_like)


def _no_clamp(parts: ModelParts) -> None:
    parts.set(time_step_limit=(0.0, math.inf))


def _decay(change):
    """change(A) -> A."""

    def plant(parts: ModelParts) -> None:
        parts.ssd(lambda x, dt, A, B, C, D: (x, dt, change(A), B, C, D))

    return plant


# --- scan -----------------------------------------------------------------------------------------


def _no_skip(parts: ModelParts) -> None:
    parts.ssd(lambda x, dt, A, B, C, D: (x, dt, A, B, C, torch.zeros_like(D)))


def _b_and_c_swapped(parts: ModelParts) -> None:
    parts.ssd(lambda x, dt, A, B, C, D: (x, dt, A, C, B, D))


def _groups_in_turn(parts: ModelParts) -> None:
    """Head i reads group i % g. The group axis is the last but one of B and C."""

    def inner(op, heads_axis):
        def changed(*inputs, **options):
            *front, B, C, D = inputs
            copies = front[heads_axis].shape[-2] // B.shape[-2]
            sizes = (*[1] * (B.dim() - 2), copies, 1)
            return op(*front, B.repeat(sizes), C.repeat(sizes), D, **options)

        return changed

    parts.wrap("ssd_scan", lambda op: inner(op, 0))
    parts.wrap("ssd_step", lambda op: inner(op, 1))


def _bf16_state(parts: ModelParts) -> None:
    def scan(op):
        def changed(*inputs, **options):
            y, state = op(*inputs, **options)
            return y, state.bfloat16().to(state.dtype)

        return changed

    def step(op):
        def changed(state, *inputs):
            y = op(state, *inputs)
            state.copy_(state.bfloat16())
            return y

        return changed

    parts.wrap("ssd_scan", scan)
    parts.wrap("ssd_step", step)


def _lost(operator: str, option: str):
    """An operator that does not get what the tokens before have left."""

    def plant(parts: ModelParts) -> None:
        parts.wrap(operator, lambda op: lambda *a, **options: op(*a, **options | {option: None}))

    return plant


def _state_lost_inside(parts: ModelParts) -> None:
    """Between the scan's own chunks: their states are not passed on."""

    def make(op):
        def scan(x, dt, A, B, C, D, *, chunk_size, initial_state_bhpn=None, **options):
            outputs, state = [], initial_state_bhpn
            pieces = zip(*(t.split(chunk_size, 1) for t in (x, dt, B, C)))
            for x_part, dt_part, B_part, C_part in pieces:
                given = {"chunk_size": chunk_size, "initial_state_bhpn": state}
                y, last = op(x_part, dt_part, A, B_part, C_part, D, **given)
                outputs.append(y)
                state = None
            return torch.cat(outputs, dim=1), last

        return scan

    parts.wrap("ssd_scan", make)


# --- convolution ----------------------------------------------------------------------------------


def _history(x_blc, weight_cw, window_bvc) -> Tensor:
    """x behind the given samples, None for zeros: (b, v + l, c)."""
    if window_bvc is None:
        window_bvc = x_blc.new_zeros(len(x_blc), weight_cw.shape[1] - 1, x_blc.shape[2])
    return torch.cat([window_bvc.to(x_blc.dtype), x_blc], dim=1)


def _taps_sum(x_blc, weight_cw, bias_c, window_bvc) -> Tensor:
    """The convolution before SiLU, behind the given samples."""
    l, taps = x_blc.shape[1], weight_cw.shape[1]
    history = _history(x_blc, weight_cw, window_bvc)
    y = sum(history[:, i : i + l] * weight_cw[:, i] for i in range(taps))
    return (y if bias_c is None else y + bias_c).to(x_blc.dtype)


def _no_silu(parts: ModelParts) -> None:
    def stretch(op):
        def conv(x, weight, bias=None, *, initial_window_bvc=None, **options):
            _, window = op(x, weight, bias, initial_window_bvc=initial_window_bvc, **options)
            return _taps_sum(x, weight, bias, initial_window_bvc), window

        return conv

    def step(op):
        def conv(x, window, weight, bias=None):
            before = window.clone()
            op(x, window, weight, bias)
            return _taps_sum(x[:, None], weight, bias, before)[:, 0]

        return conv

    parts.wrap("causal_conv1d", stretch)
    parts.wrap("causal_conv1d_step", step)


def _conv_shifted(parts: ModelParts, late: bool) -> None:
    """In a stretch of tokens; a decode step has its own code in every port."""

    def make(op):
        def conv(x, weight, bias=None, *, initial_window_bvc=None, **options):
            options["initial_window_bvc"] = initial_window_bvc
            _, window = op(x, weight, bias, **options)
            if parts.call.lengths_b is not None:  # what stands behind a row is nothing
                real = torch.arange(x.shape[1]) < parts.call.lengths_b[:, None]
                x = x * real[..., None].to(x)
            history = _history(x, weight, initial_window_bvc)
            history = F.pad(history, (0, 0, 1, -1) if late else (0, 0, -1, 1))
            v = weight.shape[1] - 1
            options["initial_window_bvc"] = history[:, :v]
            return op(history[:, v:], weight, bias, **options)[0], window

        return conv

    parts.wrap("causal_conv1d", make)


def _taps_reversed(parts: ModelParts) -> None:
    parts.change_weights(".conv1d.weight", lambda w: w.flip(-1))


def _no_conv_bias(parts: ModelParts) -> None:
    parts.change_weights(".conv1d.bias", torch.zeros_like)


def _padding_in(parts: ModelParts) -> None:
    """The mixer reads padding as tokens, attention does not."""
    parts.keep_padding = True
    mask_keys(parts)


# --- gate -----------------------------------------------------------------------------------------


def _gate(make):
    """make(op) -> f(y, z, weight, eps, n_groups, norm_before_gate)."""

    def plant(parts: ModelParts) -> None:
        def wrap(op):
            changed = make(op)

            def gated(y, z, weight, eps, n_groups=1, norm_before_gate=False):
                return changed(y, z, weight, eps, n_groups, norm_before_gate)

            return gated

        parts.wrap("gated_rms_norm", wrap)

    return plant


def _gate_without_silu(op):
    def gated(y, z, weight, eps, n_groups, norm_before_gate):
        one = torch.full_like(z, _UNIT_GATE)
        if norm_before_gate:
            return op(y, one, weight, eps, n_groups, True) * z
        return op(y * z, one, weight, eps, n_groups, norm_before_gate)

    return gated


def _flipped(parts: ModelParts) -> None:
    parts.set(mamba_norm_before_gate=not parts.config.mamba_norm_before_gate)


MIXER: tuple[Fault, ...] = (
    Fault("z and x exchanged", "in_proj split", _z_and_x_swapped, "in_proj gives z, x, B, C, dt"),
    Fault("B and C exchanged", "B and C", _b_and_c_swapped, "B writes to the state, C reads it"),
    Fault(
        "groups of B and C repeated in turn",
        "B and C",
        _groups_in_turn,
        "head i belongs to group i // (heads / groups): repeat_interleave, not repeat",
        unless(
            lambda c: 1 < c.mamba_n_groups < c.mamba_n_heads,
            "there is one group, or one for each head",
        ),
    ),
    Fault("dt_bias missing", "dt_bias", _no_dt_bias, "it is added before softplus"),
    Fault("softplus missing", "dt", lambda p: _dt(p, lambda raw: raw), "dt = softplus(dt + bias)"),
    Fault(
        "softplus in bfloat16",
        "dt",
        lambda p: _dt(p, _bf16_softplus),
        "dt, its bias and softplus belong in float32",
    ),
    Fault("clamp of dt missing", "dt", _no_clamp, "time_step_limit bounds dt", _LIMITS),
    Fault(
        "clamp of dt missing in decode",
        "dt",
        lambda p: _dt(p, F.softplus, step=False),
        "time_step_limit bounds dt in a step too",
        _LIMITS,
        "decode",
    ),
    Fault(
        "exp of A_log missing",
        "A",
        _decay(lambda A: -torch.log(-A)),
        "A = -exp(A_log)",
    ),
    Fault(
        "A converted twice",
        "A",
        _decay(lambda A: -torch.exp(A)),
        "the stored A is -exp(A_log) already, as in GGUF's ssm_a",
    ),
    Fault("minus sign of A missing", "A", _decay(lambda A: -A), "A = -exp(A_log)"),
    Fault("D skip missing", "D", _no_skip, "y = C state + D x"),
    Fault(
        "state in bfloat16",
        "state",
        _bf16_state,
        "the state is kept in float32 between tokens",
        needs="decode",
    ),
    Fault(
        "state lost between calls",
        "state",
        _lost("ssd_scan", "initial_state_bhpn"),
        "a chunk of a prompt starts from the cached state",
        needs="chunked",
    ),
    Fault(
        "state lost between the scan's chunks",
        "state",
        _state_lost_inside,
        "the state of each mamba_chunk_size tokens is passed on",
    ),
    Fault("SiLU missing after the convolution", "conv SiLU", _no_silu, "on x, B and C"),
    Fault(
        "convolution one token late",
        "conv shift",
        lambda p: _conv_shifted(p, True),
        "the last tap belongs to the present token",
    ),
    Fault(
        "convolution one token ahead",
        "conv shift",
        lambda p: _conv_shifted(p, False),
        "with padding d_conv - 1 on both sides, keep the first l outputs",
    ),
    Fault(
        "convolution taps reversed",
        "conv taps",
        _taps_reversed,
        "tap 0 belongs to the oldest sample",
        unless(lambda c: c.mamba_d_conv > 1, "the convolution has one tap"),
    ),
    Fault(
        "convolution bias missing",
        "conv bias",
        _no_conv_bias,
        "conv1d.bias is added before SiLU",
        unless(lambda c: c.mamba_conv_bias, "mamba_conv_bias is false"),
    ),
    Fault(
        "convolution window lost between calls",
        "conv window",
        _lost("causal_conv1d", "initial_window_bvc"),
        "a chunk starts from the cached last inputs",
        unless(lambda c: c.mamba_d_conv > 1, "the convolution has one tap"),
        "chunked",
    ),
    Fault(
        "padding enters the mixer",
        "padding",
        _padding_in,
        "zero x at padding before and after the convolution, at batch 1 too",
        needs="padded",
    ),
    Fault(
        "gate and norm in the other order",
        "gate order",
        _flipped,
        "mamba_norm_before_gate false: gate first, then the norm",
        _NORM,
    ),
    Fault(
        "gated norm not grouped",
        "gate groups",
        _gate(lambda op: lambda y, z, w, eps, g, first: op(y, z, w, eps, 1, first)),
        "statistics are taken over d_ssm / mamba_n_groups channels",
        lambda c: _NORM(c) or _GROUPS(c),
    ),
    Fault(
        "gated norm missing",
        "gate norm",
        _gate(lambda op: lambda y, z, w, eps, g, first: op(y, z, None, eps)),
        "mamba_rms_norm is true: mamba.norm stands behind the gate",
        _NORM,
    ),
    Fault("SiLU missing in the gate", "gate SiLU", _gate(_gate_without_silu), "y silu(z)"),
)

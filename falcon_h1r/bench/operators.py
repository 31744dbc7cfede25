"""What each operator of a Falcon-H1 layer is given, and what that must cost at least.

`Operator.inputs` makes the arguments of one call, by name, with the shapes, dtypes and strides of
the model's own calls: slices of a projection or of a cache stay slices. Where the tables differ -
TORCH's convolution returns channels-first memory - the layout is position-major, as the kernels
write it. `Operator.cost` is a formula of the shapes alone.

Costs. Bytes: every distinct element that must be read, and that must be written, once; weights and
tables of a call included. FLOPs: two per multiply-add, one per other elementary operation (exp,
division and square root too); of the attention and scan the matrix products only, over the pairs
that causality leaves. Axes as in the operators' files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rope import rotary_table
from . import kernel_only, mixer_operators
from .sizes import CACHE_ROOM, SILU, Cost, Draw, Operator, Size

__all__ = ["CACHE_ROOM", "OPERATORS", "Cost", "Draw", "Operator", "Size", "ragged_lengths"]


def _rms_norm_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    d = s.config.hidden_size
    return {
        "x": draw.normal(s.b, s.l, d, dtype=s.dtype),
        "weight_d": 1 + draw.normal(d, dtype=s.dtype, scale=0.1),
        "eps": s.config.rms_norm_eps,
    }


def _rms_norm_cost(s: Size) -> Cost:
    elements, d = s.b * s.l * s.config.hidden_size, s.config.hidden_size
    return Cost((elements + d) * s.item, elements * s.item, 4 * elements)


def _rope_inputs(s: Size, draw: Draw, heads: int, multiplier: float | None) -> dict[str, Any]:
    e = s.config.head_dim
    projected = draw.normal(s.b, s.l, heads * e, dtype=s.dtype)
    position_bl = torch.arange(s.past, s.total, device=draw.device)[None]
    cos, sin = rotary_table(position_bl, e, s.config.rope_theta, s.wide)
    out = {"x_bhle": projected.view(s.b, s.l, heads, e).transpose(1, 2), "cos_bli": cos}
    out["sin_bli"] = sin
    return out if multiplier is None else out | {"multiplier": multiplier}


def _rope_cost(s: Size, heads: int, multiplied: bool) -> Cost:
    elements = s.b * s.l * heads * s.config.head_dim
    table = s.l * s.config.head_dim * s.wide.itemsize
    return Cost(elements * s.item + table, elements * s.item, (3 + multiplied) * elements)


def _cached(s: Size, draw: Draw) -> Tensor:
    """Keys or values of all positions: a slice of a cache with room for more."""
    c = s.config
    room = draw.normal(s.b, c.num_key_value_heads, s.total + CACHE_ROOM, c.head_dim, dtype=s.dtype)
    return room[:, :, : s.total]


def _query(s: Size, draw: Draw) -> Tensor:
    return draw.normal(s.b, s.config.num_attention_heads, s.l, s.config.head_dim, dtype=s.dtype)


def _attention_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    """Without a past, values are the projection itself; behind one, keys and values are cached."""
    c, e = s.config, s.config.head_dim
    j = c.num_key_value_heads
    if s.past:
        offset = torch.full((s.b,), s.past, device=draw.device)
        keys = {"k_bjse": _cached(s, draw), "v_bjse": _cached(s, draw)}
        return {"q_bhle": _query(s, draw), **keys, "query_offset_b": offset}
    value = draw.normal(s.b, s.l, j * e, dtype=s.dtype).view(s.b, s.l, j, e).transpose(1, 2)
    key = draw.normal(s.b, j, s.l, e, dtype=s.dtype)
    return {"q_bhle": _query(s, draw), "k_bjse": key, "v_bjse": value}


def _attention_cost(s: Size) -> Cost:
    c, e = s.config, s.config.head_dim
    heads = s.b * c.num_attention_heads
    kv = 2 * s.b * c.num_key_value_heads * s.total * e
    offsets = 8 * s.b if s.past else 0
    pairs = s.l * s.past + s.l * (s.l + 1) // 2
    queries = heads * s.l * e * s.item
    return Cost(queries + kv * s.item + offsets, queries, 4 * heads * pairs * e)


def _decode_attention_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    keys = {"k_bjse": _cached(s, draw), "v_bjse": _cached(s, draw)}
    return {"q_bhe": _query(s, draw)[:, :, 0], **keys}


def ragged_lengths(b: int, total: int) -> list[int]:
    """Keys held by each of b rows: evenly from half of `total` up to `total` itself."""
    return [total - (total // 2) * (b - 1 - row) // max(b - 1, 1) for row in range(b)]


def _ragged_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    lengths = torch.tensor(ragged_lengths(s.b, s.total), device=draw.device)
    return {**_decode_attention_inputs(s, draw), "lengths_b": lengths}


def _decode_attention_cost(s: Size, ragged: bool) -> Cost:
    c, e = s.config, s.config.head_dim
    keys = sum(ragged_lengths(s.b, s.total)) if ragged else s.b * s.total
    query = s.b * c.num_attention_heads * e * s.item
    kv = 2 * c.num_key_value_heads * keys * e * s.item
    flops = 4 * c.num_attention_heads * keys * e
    return Cost(query + kv + 8 * s.b * ragged, query, flops)


def _swiglu_inputs(s: Size, draw: Draw) -> dict[str, Any]:
    shape = (s.b, s.l, s.config.intermediate_size)
    return {
        "gate": draw.normal(*shape, dtype=s.dtype),
        "up": draw.normal(*shape, dtype=s.dtype),
        "gate_multiplier": s.config.mlp_multipliers[0],
    }


def _swiglu_cost(s: Size) -> Cost:
    elements = s.b * s.l * s.config.intermediate_size
    return Cost(2 * elements * s.item, elements * s.item, (SILU + 2) * elements)


_BOTH = ("prefill", "decode")

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("rms_norm", "rms_norm", _BOTH, _rms_norm_inputs, _rms_norm_cost),
        Operator(
            "rope",
            "rope",
            _BOTH,
            lambda s, draw: _rope_inputs(s, draw, s.config.num_attention_heads, None),
            lambda s: _rope_cost(s, s.config.num_attention_heads, False),
        ),
        Operator(
            "rope_key",
            "rope",
            _BOTH,
            lambda s, draw: _rope_inputs(
                s, draw, s.config.num_key_value_heads, s.config.key_multiplier
            ),
            lambda s: _rope_cost(s, s.config.num_key_value_heads, True),
        ),
        *mixer_operators.OPERATORS,
        Operator(
            "attention", "attention", ("prefill", "resume"), _attention_inputs, _attention_cost
        ),
        Operator(
            "decode_attention",
            "decode_attention",
            ("decode",),
            _decode_attention_inputs,
            lambda s: _decode_attention_cost(s, False),
        ),
        Operator(
            "decode_attention_ragged",
            "decode_attention",
            ("decode",),
            _ragged_inputs,
            lambda s: _decode_attention_cost(s, True),
        ),
        Operator("swiglu", "swiglu", _BOTH, _swiglu_inputs, _swiglu_cost),
        *kernel_only.OPERATORS,
    )
}

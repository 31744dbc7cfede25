"""Faults of rotation and attention.

Wrapped operators keep the signatures of `ops.Ops`; axes as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..rope import rotary_table
from .faults import Fault, ModelParts, unless


def attend(parts: ModelParts, change: Callable) -> None:
    """Give attention, of a stretch and of a step, change(q, k, v); heads are axis 1 of each."""

    def make(op):
        return lambda q, k, v, *rest, **options: op(*change(q, k, v), *rest, **options)

    parts.wrap("attention", make)
    parts.wrap("decode_attention", make)


def _rope(parts: ModelParts, make: Callable) -> None:
    """make(op) -> f(x, cos, sin, multiplier)."""

    def wrap(op):
        changed = make(op)

        def rope(x, cos, sin, **options):  # taps tell keys by their `multiplier`
            return changed(x, cos, sin, options.get("multiplier", 1.0))

        return rope

    parts.wrap("rope", wrap)


def _interleaved(parts: ModelParts) -> None:
    def make(op):
        def rope(x, cos, sin, multiplier):
            halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
            first, second = op(halves, cos, sin, multiplier).chunk(2, dim=-1)
            return torch.stack([first, second], dim=-1).flatten(-2)

        return rope

    _rope(parts, make)


def _no_rotation(parts: ModelParts) -> None:
    _rope(parts, lambda op: lambda x, cos, sin, multiplier: x * multiplier)


def _positions_restart(parts: ModelParts) -> None:
    def make(op):
        def rope(x, cos, sin, multiplier):
            position = torch.arange(x.shape[2], device=x.device)[None]
            theta = parts.config.rope_theta
            return op(x, *rotary_table(position, x.shape[-1], theta, cos.dtype), multiplier)

        return rope

    _rope(parts, make)


def _theta(parts: ModelParts) -> None:
    parts.set(rope_theta=1e4)


def _scale_missing(parts: ModelParts) -> None:
    attend(parts, lambda q, k, v: (q * q.shape[-1] ** 0.5, k, v))


def _scale_of_derived_heads(parts: ModelParts) -> None:
    c = parts.config
    factor = (c.head_dim * c.num_attention_heads / c.hidden_size) ** 0.5
    attend(parts, lambda q, k, v: (q * factor, k, v))


def _repeat_heads(parts: ModelParts) -> None:
    def change(q, k, v):
        copies = q.shape[1] // k.shape[1]
        return q, k.repeat(1, copies, 1, 1), v.repeat(1, copies, 1, 1)

    attend(parts, change)


def _bidirectional(parts: ModelParts) -> None:
    def make(op):
        def attention(q, k, v, **options):
            visible = None
            if parts.call.lengths_b is not None:
                lengths = parts.call.lengths_b.to(k.device)
                visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
                visible = visible[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)

        return attention

    parts.wrap("attention", make)


def _past_keys_lost(parts: ModelParts) -> None:
    def make(op):
        def attention(q, k, v, *, query_offset_b=None, seq_idx_bl=None):
            l = q.shape[2]
            return op(q, k[:, :, -l:], v[:, :, -l:], seq_idx_bl=seq_idx_bl)

        return attention

    parts.wrap("attention", make)


def mask_keys(parts: ModelParts) -> None:
    """Attention that leaves out padding which the layers were given as tokens."""

    def make(op):
        def attention(q, k, v, **options):
            if parts.call.mask_bl is None or not parts.keep_padding:
                return op(q, k, v, **options)
            l = q.shape[2]
            visible = torch.ones(l, l, dtype=torch.bool, device=q.device).tril()
            visible = visible & parts.call.mask_bl.to(q.device)[:, None, None]
            # A query that sees no key is padding itself: it may see all.
            visible = visible | ~visible.any(-1, keepdim=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)

        return attention

    parts.wrap("attention", make)


def _padding_seen(parts: ModelParts) -> None:
    """The mixer holds its state over padding, attention reads it."""
    parts.keep_padding = True

    def real(tensor):
        mask = parts.call.mask_bl
        if mask is None:
            return tensor
        return tensor * mask.view(*mask.shape, *[1] * (tensor.dim() - 2)).to(tensor.dtype)

    def conv(op):
        return lambda x, *rest, **options: op(real(x), *rest, **options)

    parts.wrap("causal_conv1d", conv)
    parts.ssd(lambda x, dt, A, B, C, D: (x, real(dt) if dt.dim() == 3 else dt, A, B, C, D))


ATTENTION: tuple[Fault, ...] = (
    Fault(
        "rope interleaved",
        "rope",
        _interleaved,
        "channel i turns with channel i + head_dim / 2, not with its neighbour",
    ),
    Fault("rope missing", "rope", _no_rotation, "queries and keys are rotated by position"),
    Fault(
        "rope_theta 1e4",
        "rope",
        _theta,
        "read rope_theta from the config",
        unless(lambda c: c.rope_theta != 1e4, "rope_theta is 1e4"),
    ),
    Fault(
        "positions restart in every call",
        "rope",
        _positions_restart,
        "positions go on behind the cache",
        needs="chunked",
    ),
    Fault(
        "softmax scale missing",
        "softmax scale",
        _scale_missing,
        "scores are divided by sqrt(head_dim)",
    ),
    Fault(
        "softmax scale of hidden_size / heads",
        "softmax scale",
        _scale_of_derived_heads,
        "head_dim is a key of its own, not hidden_size / num_attention_heads",
        unless(
            lambda c: c.head_dim * c.num_attention_heads != c.hidden_size,
            "head_dim is hidden_size / num_attention_heads",
        ),
    ),
    Fault(
        "key/value heads repeated in turn",
        "key/value heads",
        _repeat_heads,
        "query head i reads key head i // (heads / key heads): repeat_interleave, not repeat",
        unless(
            lambda c: 1 < c.num_key_value_heads < c.num_attention_heads,
            "there is one key/value head, or one for each query head",
        ),
    ),
    Fault("attention not causal", "causal mask", _bidirectional, "is_causal in a prefill"),
    Fault(
        "keys of earlier chunks lost",
        "cached keys",
        _past_keys_lost,
        "a chunk's queries see the cache's keys as well",
        needs="chunked",
    ),
    Fault(
        "padding seen by attention",
        "padding",
        _padding_seen,
        "mask the keys of padding, at batch 1 too",
        needs="padded",
    ),
)

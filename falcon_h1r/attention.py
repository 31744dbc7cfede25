"""Grouped-query attention with a key multiplier.

Axes: b batch, h query heads, j key/value heads (h/j query heads share one), l new positions,
s positions attended to, e head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as _fused

from .documents import attention_apart, each_document
from .precision import autocasts, compute_dtype, without_autocast


@attention_apart
def attention_reference(
    q_bhle: Tensor,
    k_bjse: Tensor,
    v_bjse: Tensor,
    *,
    query_offset_b: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(e)) v, causal; softmax in `compute_dtype`.

    q_bhle: (b, h, l, e); k_bjse, v_bjse: (b, j, s, e); query head i reads key head i // (h/j).
    query_offset_b: (b,) keys that precede each row's first query: query i sees keys up to
    query_offset + i. None means 0 and s = l. seq_idx_bl: (b, l), with s = l only: a query sees
    keys of its own document. Returns (b, h, l, e) in q's dtype.
    """
    if autocasts(q_bhle):
        return without_autocast(attention_reference, **locals())
    b, h, l, e = q_bhle.shape
    j, s = k_bjse.shape[1:3]
    assert k_bjse.shape == v_bjse.shape == (b, j, s, e) and h % j == 0, (k_bjse.shape, q_bhle.shape)
    work = compute_dtype(q_bhle)
    k, v = (t.to(work).repeat_interleave(h // j, dim=1) for t in (k_bjse, v_bjse))
    scores = q_bhle.to(work) @ k.mT * e**-0.5
    visible = visible_keys(l, s, query_offset_b, seq_idx_bl, q_bhle.device)
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (probabilities @ v).to(q_bhle.dtype)


@each_document
def attention(q_bhle, k_bjse, v_bjse, *, query_offset_b=None, seq_idx_bl=None) -> Tensor:
    """`attention_reference` through torch's fused attention; same arguments."""
    if autocasts(q_bhle):
        return without_autocast(attention, **locals())
    l, s = q_bhle.shape[2], k_bjse.shape[2]
    alone = query_offset_b is None
    assert l == s or not alone, (l, s)
    mask = None if alone else visible_keys(l, s, query_offset_b, None, q_bhle.device)
    return _fused(q_bhle, k_bjse, v_bjse, mask, is_causal=alone, enable_gqa=True)


def decode_attention_reference(
    q_bhe: Tensor, k_bjse: Tensor, v_bjse: Tensor, lengths_b: Tensor | None = None
) -> Tensor:
    """One query per row over the first lengths_b keys of its row (None: all s).

    q_bhe: (b, h, e); k_bjse, v_bjse: (b, j, s, e); lengths_b: (b,), each >= 1. Returns (b, h, e).
    """
    if lengths_b is None:
        lengths_b = torch.full((len(k_bjse),), k_bjse.shape[2], device=k_bjse.device)
    q_bhle = q_bhe[:, :, None]
    return attention_reference(q_bhle, k_bjse, v_bjse, query_offset_b=lengths_b - 1)[:, :, 0]


def decode_attention(q_bhe, k_bjse, v_bjse, lengths_b=None) -> Tensor:
    """`decode_attention_reference`, with the query heads of a key head as rows of one product."""
    if autocasts(q_bhe):
        return without_autocast(decode_attention, **locals())
    b, h, e = q_bhe.shape
    j, s = k_bjse.shape[1:3]
    mask = None
    if lengths_b is not None:
        mask = (torch.arange(s, device=q_bhe.device) < lengths_b[:, None])[:, None, None]
    return _fused(q_bhe.view(b, j, h // j, e), k_bjse, v_bjse, mask).reshape(b, h, e)


def visible_keys(l: int, s: int, query_offset_b, seq_idx_bl, device) -> Tensor:
    """Boolean (b or 1, 1, l, s): which key each query attends to."""
    key_s = torch.arange(s, device=device)
    query_l1 = torch.arange(l, device=device)[:, None]
    if query_offset_b is None:
        visible = (key_s <= query_l1)[None, None]
    else:
        visible = (key_s <= query_l1 + query_offset_b[:, None, None])[:, None]
    if seq_idx_bl is not None:
        visible = visible & (seq_idx_bl[:, :, None] == seq_idx_bl[:, None, :])[:, None]
    return visible


class FalconH1Attention(nn.Module):
    """`self_attn` of a block."""

    def __init__(self, config, ops):
        super().__init__()
        d, e, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(d, config.num_attention_heads * e, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * e, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * e, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * e, d, bias=bias)
        self.head_dim, self.key_multiplier, self.ops = e, config.key_multiplier, ops

    def forward(self, x_bld: Tensor, span, layer=None) -> Tensor:
        """(b, l, d) -> (b, l, d). span: `cache.Span`; layer: `cache.LayerCache` or None."""
        b, l, _ = x_bld.shape
        heads = (b, l, -1, self.head_dim)
        q = self.q_proj(x_bld).view(heads).transpose(1, 2)
        k = self.k_proj(x_bld).view(heads).transpose(1, 2)
        v = self.v_proj(x_bld).view(heads).transpose(1, 2)
        q = self.ops.rope(q, span.cos_bli, span.sin_bli)
        k = self.ops.rope(k, span.cos_bli, span.sin_bli, multiplier=self.key_multiplier)
        if layer is not None:
            kept = layer.keys_bjse.dtype
            layer.write_keys(k.to(kept), v.to(kept), span)
            if span.is_step or span.past_b is not None:
                k = layer.keys_bjse[:, :, : span.total]
                v = layer.values_bjse[:, :, : span.total]
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, what the cache holds is wider
        if span.is_step:
            o = self.ops.decode_attention(q[:, :, 0], k, v, span.key_lengths_b)
            return self.o_proj(o.reshape(b, 1, -1))
        o = self.ops.attention(q, k, v, query_offset_b=span.past_b, seq_idx_bl=span.seq_idx_bl)
        return self.o_proj(o.transpose(1, 2).reshape(b, l, -1))

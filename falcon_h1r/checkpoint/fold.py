"""The fourteen multipliers folded into weights: a model that computes the same with fewer products.

Each multiplier scales the input or the output of a linear layer (or of a bias with it), so it can
be part of that layer's weights once and for all. Released checkpoints keep them apart, because
folded weights are rounded; so this is a step one asks for, never what loading does by itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import EMBEDDING, HEAD, refuse_adapters

if TYPE_CHECKING:
    from ..config import FalconH1Config
    from ..model import FalconH1ForCausalLM

PIECE = 2**24  # values multiplied at a time
ONES = {
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "key_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "ssm_multipliers": (1.0,) * 5,
    "mlp_multipliers": (1.0, 1.0),
}


def fold_factors(config: FalconH1Config) -> dict[str, float | Tensor]:
    """What each parameter is multiplied with, by its name (in a layer: without "model.layers.N.").

    Parameters that keep their values are left out. A factor is a number, or float64 of one value
    per row of in_proj. A bias takes the multipliers of its layer's output, not those of the input.
    """
    c, bc_width = config, config.mamba_n_groups * config.mamba_d_state
    sizes = torch.tensor([c.d_ssm, c.d_ssm, bc_width, bc_width, c.mamba_n_heads])
    rows = torch.tensor(c.ssm_multipliers, dtype=torch.float64).repeat_interleave(sizes)
    gate, down = c.mlp_multipliers
    return {
        EMBEDDING: c.embedding_multiplier,
        HEAD: c.lm_head_multiplier,
        "self_attn.q_proj.weight": c.attention_in_multiplier,
        "self_attn.k_proj.weight": c.attention_in_multiplier * c.key_multiplier,
        "self_attn.k_proj.bias": c.key_multiplier,
        "self_attn.v_proj.weight": c.attention_in_multiplier,
        "self_attn.o_proj.weight": c.attention_out_multiplier,
        "self_attn.o_proj.bias": c.attention_out_multiplier,
        "mamba.in_proj.weight": (c.ssm_in_multiplier * rows)[:, None],
        "mamba.in_proj.bias": rows,
        "mamba.out_proj.weight": c.ssm_out_multiplier,
        "mamba.out_proj.bias": c.ssm_out_multiplier,
        "feed_forward.gate_proj.weight": gate,
        "feed_forward.gate_proj.bias": gate,
        "feed_forward.down_proj.weight": down,
        "feed_forward.down_proj.bias": down,
    }


@torch.no_grad()
def fold_multipliers(model: FalconH1ForCausalLM) -> FalconH1ForCausalLM:
    """A model whose multipliers are all 1, with the same operator table, dtype and device.

    Products are taken in float64 and rounded once, to the dtype of the weight: in a float32 model
    a folded weight is off by at most 2^-24 of its value, in a bfloat16 one by 2^-8, as much as the
    checkpoint itself was rounded by. Parameters without a factor are shared with `model`,
    all others are new. Tied embeddings come apart, since both ends have factors of their own.
    """
    refuse_adapters(model)
    config = dataclasses.replace(model.config, **ONES, tie_word_embeddings=False)
    factors = fold_factors(model.config)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    folded = type(model)(config, ops=model.ops, dtype=model.dtype, device="meta")
    for name, value in weights.items():
        factor = factors.get(name.split(".", 3)[-1] if ".layers." in name else name, 1.0)
        if isinstance(factor, Tensor):
            factor = factor.to(value.device)
        if isinstance(factor, Tensor) or factor != 1.0:
            weights[name] = _times(value, factor)
    folded.load_state_dict(weights, strict=True, assign=True)
    folded.source, folded.eos_token_ids = model.source, model.eos_token_ids
    return folded.train(model.training)


def _times(value: Tensor, factor: float | Tensor) -> Tensor:
    """value * factor in float64, some rows at a time: the embedding of 7B would take 3.2 GB."""
    out = torch.empty_like(value)
    step = max(1, PIECE // max(1, value[:1].numel()))
    for start in range(0, len(value), step):
        rows = slice(start, start + step)
        part = factor[rows] if isinstance(factor, Tensor) else factor
        out[rows] = (value[rows].double() * part).to(value.dtype)
    return out

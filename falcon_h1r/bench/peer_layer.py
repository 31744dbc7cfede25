"""transformers' FalconH1DecoderLayer with the weights and the cache of one of our blocks."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..attention import visible_keys
from .contest import Bound, Implementation
from .peer_model import SEED_TOKENS, cache_name, set_multipliers, transformers_config
from .peers import TRANSFORMERS


def transformers_layer(model, slack: float) -> Implementation:
    """slack: see `gate.judge`; doubled, since transformers rounds more often."""
    if model.dtype == torch.float64:
        return Implementation("transformers", None, "computes in float32")
    return Implementation("transformers", lambda inputs: _bind(model, inputs), slack=2 * slack)


def _bind(model, inputs: dict[str, Any]) -> Bound:
    """In prefill every call begins an empty DynamicCache, as `generate` does; behind a past, every
    call puts the same keys back, so that the context does not grow from call to call."""
    falcon, x, w = importlib.import_module(TRANSFORMERS), inputs["x_bld"], inputs["workload"]
    dynamic_cache = importlib.import_module("transformers").DynamicCache
    config = transformers_config(model.config)
    layer = _layer(falcon, config, model)
    name = cache_name(layer)
    rotary = falcon.FalconH1RotaryEmbedding(config).to(x.device)
    position = torch.arange(w.past, w.past + w.length, device=x.device)[None]
    options = {"position_ids": position, "position_embeddings": rotary(x, position)}
    mask = None
    if w.phase == "resume":
        past_b = torch.full((1,), w.past, device=x.device)
        mask = visible_keys(w.length, w.past + w.length, past_b, None, x.device)

    def forward(cache):
        return layer(x, attention_mask=mask, use_cache=True, **{name: cache}, **options)[0]

    if not w.past:
        caches = []

        def begin():
            caches[:] = [dynamic_cache(config=config)]
            return forward(caches[0])

        return Bound(begin, lambda out: (out, caches[0].layers[0].recurrent_states[0]))

    cache, own = dynamic_cache(config=config), inputs["cache"].layers()[0]
    few = torch.arange(SEED_TOKENS, device=x.device)[None]
    seed = x.new_zeros(w.batch, SEED_TOKENS, x.shape[-1])
    layer(seed, use_cache=True, position_embeddings=rotary(seed, few), **{name: cache})
    held = cache.layers[0]
    keys, values = (t[:, :, : w.past].contiguous() for t in (own.keys_bjse, own.values_bjse))
    v = own.window_bvc.shape[1]
    held.conv_states[0][:, :, -v:] = own.window_bvc.mT
    held.recurrent_states[0] = own.state_bhpn.clone()

    def proceed():
        held.keys, held.values = keys, values
        return forward(cache)

    return Bound(proceed, lambda out: (out, held.recurrent_states[0]))


def _layer(falcon, config, model):
    """A_log, D and dt_bias stay in float32, though its own loader would narrow them."""
    block = model.model["layers"][0]
    with torch.device("meta"):
        layer = falcon.FalconH1DecoderLayer(config, 0)
    layer.load_state_dict(block.state_dict(), strict=True, assign=True)
    set_multipliers(layer, config, model)
    return layer.eval()

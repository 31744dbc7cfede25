"""transformers' FalconH1ForCausalLM with the weights of one of our models, for `bench generate`."""

from __future__ import annotations

import importlib
import inspect

import torch

from ..cache import Cache
from ..config import FalconH1Config
from .peers import TRANSFORMERS, import_error
from .registry import Workload

SEED_TOKENS = 4  # of a true prefill, after which the cache holds tensors to be replaced


def transformers_model(model):
    """The peer in eval mode with our parameters, no copies; or, as a string, why there is none."""
    if reason := import_error(TRANSFORMERS):
        return reason
    if model.dtype == torch.float64:
        return "computes in float32"
    falcon, config = importlib.import_module(TRANSFORMERS), transformers_config(model.config)
    with torch.device("meta"):
        peer = falcon.FalconH1ForCausalLM(config)
    # A_log, D and dt_bias stay in float32, though its own loader would narrow them.
    peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    if config.tie_word_embeddings:
        peer.lm_head.weight = peer.model.embed_tokens.weight
    for layer in peer.model.layers:
        set_multipliers(layer, config, model)
    peer.model.rotary_emb = falcon.FalconH1RotaryEmbedding(config).to(model.device)
    return peer.eval()


def cache_name(module: torch.nn.Module) -> str:
    """The argument of a transformers module that takes its cache, and the output's field for it.

    `cache` since 5.24; before, `past_key_values`, which transformers accepts until 5.40.
    """
    known = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def transformers_config(config: FalconH1Config):
    """Theirs of the same values; attention through torch's fused function."""
    values = config.to_dict() | {"time_step_limit": config.time_step_limit}
    out = importlib.import_module(TRANSFORMERS).FalconH1Config(**values)
    out._attn_implementation = "sdpa"
    return out


def set_multipliers(layer, config, model) -> None:
    """Give a layer of theirs the mixer's multipliers as a vector, which no checkpoint holds."""
    multipliers = importlib.import_module(TRANSFORMERS).compute_mup_vector(config)
    multipliers = multipliers.to(model.device, model.dtype)
    layer.mamba.register_buffer("mup_vector", multipliers, persistent=False)


@torch.no_grad()
def last_logits(peer, ids: torch.Tensor) -> torch.Tensor:
    """(b, vocab) behind `ids`, read as a prefill of all but one token and a step of one."""
    name = cache_name(peer)
    held = {name: peer(ids[:, :-1], use_cache=True, logits_to_keep=1)[name]}
    return peer(ids[:, -1:], use_cache=True, logits_to_keep=1, **held).logits[:, -1]


def make_step(peer, workload: Workload, ids: torch.Tensor, cache: Cache):
    """One forward as `generate` calls it, always from the same depth.

    An empty DynamicCache in prefill; behind a past one that holds the keys, windows and states of
    `cache`, and gets its keys back before every call.
    """
    if workload.phase == "prefill":
        return lambda: peer(ids, use_cache=True, logits_to_keep=1)
    seed = ids.new_zeros(workload.batch, SEED_TOKENS)
    name = cache_name(peer)
    held = peer(seed, use_cache=True, logits_to_keep=1)[name]
    past, v = workload.past, cache.windows.shape[2]
    keys, values = (
        [t[:, :, :past].contiguous() for t in tensor] for tensor in (cache.keys, cache.values)
    )
    for index, layer in enumerate(held.layers):
        layer.conv_states[0][:, :, -v:] = cache.windows[index].mT
        layer.recurrent_states[0] = cache.states[index].clone()
    token = {"ids": ids}

    def proceed():
        for layer, k, v in zip(held.layers, keys, values):
            layer.keys, layer.values = k, v
        out = peer(token["ids"], use_cache=True, logits_to_keep=1, **{name: held})
        if workload.phase == "decode":
            token["ids"] = out.logits[:, -1:].argmax(-1)

    return proceed

"""A dissection as one HTML file: template, style, scripts and data in it, nothing fetched.

The files beside this one are written as they are shipped: page.html with three marks, page.css,
page.js (data, controls, tooltips), figures.js (drawing).
"""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..files import write_file
from .contributions import BRANCHES
from .dissect import Dissection

MOST_TOKENS = 256  # the matrices of all heads grow with tokens^2, and no screen shows more
# Taps of the walk through the block, in its order.
WALK = (
    *("residual.in", "input_layernorm", "mamba.in_proj", "mamba.conv.out", "mamba.scan.dt"),
    *("mamba.scan.y", "mamba.gate.out", "contribution.ssm", "self_attn.attention.q"),
    *("self_attn.attention.k", "self_attn.attention.v", "self_attn.attention.o"),
    *("contribution.attention", "residual.mid", "feed_forward.swiglu.out", "contribution.mlp"),
    "residual.out",
)
# Multipliers that act between a box of the walk and the one before; [n] picks one of several.
MULTIPLIERS = {
    "residual.in": ("embedding_multiplier",),
    "mamba.in_proj": ("ssm_in_multiplier",),
    "mamba.conv.out": ("ssm_multipliers[1]", "ssm_multipliers[2]", "ssm_multipliers[3]"),
    "mamba.scan.dt": ("ssm_multipliers[4]",),
    "mamba.gate.out": ("ssm_multipliers[0]",),
    "contribution.ssm": ("ssm_out_multiplier",),
    "self_attn.attention.q": ("attention_in_multiplier",),
    "self_attn.attention.k": ("attention_in_multiplier", "key_multiplier"),
    "self_attn.attention.v": ("attention_in_multiplier",),
    "contribution.attention": ("attention_out_multiplier",),
    "feed_forward.swiglu.out": ("mlp_multipliers[0]",),
    "contribution.mlp": ("mlp_multipliers[1]",),
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def page(dissection: Dissection, tokenizer, *, model: str, prompt_tokens: int, title: str) -> str:
    """The HTML. model: its name; prompt_tokens: how many of the tokens are the prompt's."""
    count = len(dissection.ids)
    if count > MOST_TOKENS:
        raise ValueError(f"dissect: {count} tokens, the page shows at most {MOST_TOKENS}")
    data = {
        "title": title,
        "model": model,
        "dtype": dissection.dtype,
        "promptTokens": prompt_tokens,
        "ids": dissection.ids,
        "branches": list(BRANCHES),
        "text": _texts(dissection, tokenizer),
        "config": dissection.config.to_dict(),
        "tensors": {name: _packed(name, t) for name, t in _tensors(dissection).items()},
        "walk": _walk(dissection),
    }
    # "<" cannot stand in a script element's text; JSON's escape means the same.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    here = files("falcon_h1r") / "study"
    read = {name: (here / name).read_text(encoding="utf-8") for name in _FILES}
    html = read["page.html"].replace("/* style */", read["page.css"])
    html = html.replace("/* script */", read["figures.js"] + read["page.js"])
    return html.replace("/* data */", text)


_FILES = ("page.html", "page.css", "page.js", "figures.js")


def write_page(path: str | Path, html: str) -> None:
    """Whole or not at all."""
    write_file(path, html)


def _tensors(dissection: Dissection) -> dict[str, Tensor]:
    """What the page draws; of the convolution, quantiles over the channels of x, B and C."""
    tensors = dict(dissection.tensors)
    config, taps = dissection.config, tensors.pop("conv.taps").float()
    width = config.mamba_n_groups * config.mamba_d_state
    parts = taps.split([config.d_ssm, width, width], dim=1)
    at = torch.tensor(QUANTILES)
    tensors["conv.quantiles"] = torch.stack(
        [part.quantile(at, dim=1).transpose(0, 1) for part in parts], dim=2
    )
    return tensors


def _packed(name: str, tensor: Tensor) -> dict[str, Any]:
    """Little-endian float32 in base64; of matrices that end at the diagonal the lower half."""
    shape, lower = list(tensor.shape), name in ("attention", "hidden_attention")
    values = tensor.float()
    if lower:
        row, column = torch.tril_indices(*shape[-2:])
        values = values[..., row, column]
    raw = values.contiguous().numpy().astype(numpy.dtype("<f4")).tobytes()
    return {"shape": shape, "lower": lower, "f32": base64.b64encode(raw).decode("ascii")}


def _texts(dissection: Dissection, tokenizer) -> dict[str, str]:
    """The text of every id that the page names."""
    tensors = dissection.tensors
    used = {*dissection.ids, *tensors["attribution.token"].tolist()}
    used |= set(tensors["lens.top_ids"].flatten().tolist())
    return {str(i): tokenizer.decode([i]) for i in sorted(used)}


def _multiplier(config, key: str) -> float:
    name, _, index = key.rstrip("]").partition("[")
    value = getattr(config, name)
    return value[int(index)] if index else value


def _walk(dissection: Dissection) -> list[dict[str, Any]]:
    """Per layer, tap -> shape, axes, file and line, extremes, packed values of each token."""
    layers = []
    for number in range(dissection.config.num_hidden_layers):
        taps = {}
        for name in WALK:
            entry = dict(dissection.walk[f"layers.{number}.{name}"])
            keys = MULTIPLIERS.get(name, ()) if name != "residual.in" or number == 0 else ()
            for key in ("token_rms", "token_values"):
                entry[key] = _packed(key, entry[key])
            entry["multipliers"] = {key: _multiplier(dissection.config, key) for key in keys}
            taps[name] = entry
        layers.append(taps)
    return layers

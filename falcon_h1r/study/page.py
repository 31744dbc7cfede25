"""A dissection as one HTML file: template, style, scripts and data in it, nothing fetched.

The files beside this one are written as they are shipped: page.html with four marks, page.css,
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
from ..tap_table import AXES
from .block_picture import BOXES, block_svg, multipliers_of
from .contributions import BRANCHES
from .dissect import Dissection

MOST_TOKENS = 256  # the matrices of all heads grow with tokens^2, and no screen shows more
# Widths of the drawing of the block: for a screen, and for a phone.
WIDE, NARROW = 760, 358
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
        "axes": AXES,
        "boxes": [box._asdict() for box in BOXES],
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
    return html.replace("<!-- block -->", _drawings(dissection)).replace("/* data */", text)


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


def _drawings(dissection: Dissection) -> str:
    """The block twice; the style shows the one that suits the screen."""
    first = {box.tap: dissection.walk[f"layers.0.{box.tap}"] for box in BOXES}
    return "".join(
        f'<div class="{name}">{block_svg(first, dissection.config, width=width, links=True)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _walk(dissection: Dissection) -> list[dict[str, Any]]:
    """Per layer, tap -> shape, axes, file and line, extremes, packed values of each token."""
    layers = []
    for number in range(dissection.config.num_hidden_layers):
        taps = {}
        for box in BOXES:
            entry = dict(dissection.walk[f"layers.{number}.{box.tap}"])
            for key in ("token_rms", "token_values"):
                entry[key] = _packed(key, entry[key])
            entry["multipliers"] = multipliers_of(box, dissection.config, number)
            taps[box.tap] = entry
        layers.append(taps)
    return layers

"""Everything that is measured of one prompt, in one pass over the layers.

A layer is used once, so a checkpoint that is `Streamed` is read once, and memory holds one layer's
weights at a time. What is kept of each layer grows with tokens^2 (the two matrices of each head);
the branch switches carry three more rows for every layer that has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache import Span
from ..checkpoint import Streamed
from ..derived import probabilities_attention
from ..precision import compute_dtype, scaled
from ..taps import full_names, record, tap_of
from . import contributions, hidden_attention, switches, timescales
from .lens import head_logits, lens, token_losses
from .measures import MEASURES

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.final_layernorm", "lm_head"
WALK_VALUES = 6  # of each tap and token, kept for the walk


@dataclass
class Dissection:
    """tensors: by the names of MEASURES, on the CPU; branches that were not switched off have no
    "switch.loss". walk: per layer, full tap name -> what `Walk` keeps. logits: (tokens, vocab)."""

    config: Any
    ids: list[int]
    dtype: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    walk: dict[str, dict[str, Any]] = field(default_factory=dict)
    logits: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: every tensor as nested lists, infinities and NaN as null."""
        measures = {
            measure.name: {
                "axes": measure.axes.split(", "),
                "unit": measure.unit,
                "meaning": measure.meaning,
                "values": plain(self.tensors[measure.name]),
            }
            for measure in MEASURES
            if measure.name in self.tensors
        }
        return {
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "ids": self.ids,
            "branches": list(contributions.BRANCHES),
            "measures": measures,
        }


def plain(tensor: Tensor):
    """Nested lists; JSON has no infinity."""
    if tensor.dim() == 0:
        value = tensor.item()
        return value if abs(value) < float("inf") else None
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return [plain(part) for part in tensor]
    return tensor.tolist()


@torch.no_grad()
def dissect(
    source,
    ids: list[int],
    *,
    top_k: int = 5,
    branch_switches: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Dissection:
    """Measure one prompt of at least two tokens.

    source: a model, or what `checkpoint.stream_modules` returns; any operator table and dtype.
    progress: called with (layers done, layers in all). Raises ValueError for too few tokens and for
    ids outside the vocabulary.
    """
    model = source.model if isinstance(source, Streamed) else source
    config = model.config
    _check(config, ids)
    device = source.device
    row = torch.tensor([ids], device=device)
    span = Span.plan(config, None, row, None, None, compute_dtype(model.dtype))
    with _loaded(source, EMBEDDING) as embedding:
        x = scaled(embedding(row), config.embedding_multiplier)

    out = Dissection(config, list(ids), str(model.dtype).removeprefix("torch."))
    layers: dict[str, list[Tensor]] = {}
    residuals, added, variants = [x], [], x[:0]
    for number in range(config.num_hidden_layers):
        with _loaded(source, f"model.layers.{number}") as block:
            names = [n for n in full_names(config, layers=[number]) if n.startswith("layers.")]
            with record(model, names) as recording:
                following = block(x, span)
            seen = {name.split(".", 2)[2]: tensor for name, tensor in recording.items()}
            out.walk.update(_walk(recording))
            for name, tensor in _of_layer(block, seen).items():
                layers.setdefault(name, []).append(tensor.cpu())
            added.append(torch.cat([seen[f"contribution.{a}"] for a in contributions.BRANCHES]))
            if branch_switches:
                variants = switches.advance(block, variants, span)
                variants = torch.cat([variants, switches.branch_off(block, x, span)])
            x = following
            residuals.append(x)
        if progress is not None:
            progress(number + 1, config.num_hidden_layers)

    tensors = {name: torch.stack(parts) for name, parts in layers.items()}
    tensors["state.positions"] = tensors["state.positions"][0]
    norms = [residual[0].double().norm(dim=-1) for residual in residuals]
    tensors["residual.norm"] = torch.stack(norms)
    tied = config.tie_word_embeddings
    with _loaded(source, NORM) as norm, _loaded(source, EMBEDDING if tied else HEAD) as head:
        weight = getattr(head, "weight", None)
        if weight is None:
            raise ValueError("dissect: the head's weights are packed; use the model as it was")
        # A measure at a time: the logits of a large vocabulary fill more memory than a layer.
        ends = (head_logits(r, norm, weight, config.lm_head_multiplier)[0] for r in residuals)
        final = head_logits(x, norm, weight, config.lm_head_multiplier)[0]
        tensors |= _lenses(ends, final, row[0], top_k)
        tensors |= _attribution(residuals, added, norm, weight, final, config)
        tensors["loss"] = token_losses(final, row[0])
        if branch_switches:
            losses = [
                token_losses(
                    head_logits(v[None], norm, weight, config.lm_head_multiplier)[0], row[0]
                )
                for v in variants
            ]
            change = torch.stack(losses) - tensors["loss"]
            tensors["switch.loss"] = change.unflatten(0, (-1, len(contributions.BRANCHES)))
    out.logits = final.cpu()
    out.tensors = {m.name: tensors[m.name].cpu() for m in MEASURES if m.name in tensors}
    return out


def _check(config, ids) -> None:
    if len(ids) < 2:
        raise ValueError(f"dissect: {len(ids)} tokens, expected at least 2")
    bad = [i for i in ids if not 0 <= i < config.vocab_size]
    if bad:
        raise ValueError(f"dissect: id {bad[0]} is outside the vocabulary of {config.vocab_size}")


@contextmanager
def _loaded(source, path: str):
    """A module of a model, or of a streamed checkpoint for as long as it is used."""
    if isinstance(source, Streamed):
        with source.loaded(path) as module:
            yield module
    else:
        yield source.get_submodule(path)


def _of_layer(block, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Measures of one layer, without their layer axis."""
    x, dt, A, B, C = (seen[f"mamba.scan.{name}"] for name in ("x", "dt", "A", "B", "C"))
    before = torch.cat([seen["residual.in"], seen["residual.in"], seen["residual.mid"]])
    added = torch.cat([seen[f"contribution.{name}"] for name in contributions.BRANCHES])
    size = contributions.sizes(added, before)
    weights = probabilities_attention(*(seen[f"self_attn.attention.{name}"] for name in "qk"))
    hidden = hidden_attention.hidden_attention(dt, A, B, C)
    visible, own = timescales.receptive_field(weights), timescales.receptive_field(hidden)
    state = timescales.states(x, dt, A, B)
    return {
        "residual.before": size.before,
        "contribution.norm": size.norm,
        "contribution.cosine": size.cosine,
        "attention": weights[0],
        "attention.reach": visible.latest[0],
        "attention.fewest": visible.fewest[0],
        "hidden_attention": hidden[0],
        "hidden_attention.reach": own.latest[0],
        "hidden_attention.fewest": own.fewest[0],
        "skip": seen["mamba.scan.D"],
        "dt": dt[0].T,
        "decay": timescales.decay(dt, A)[0].T,
        "half_life": timescales.half_life(dt, A)[0].T,
        "state.norm": state.norm[0],
        "state.rank": state.rank[0],
        "state.effective_rank": state.effective_rank[0],
        "state.positions": state.positions,
        "conv.taps": block.mamba.conv1d.weight[:, 0].detach().clone(),
    }


def _walk(recording) -> dict[str, dict[str, Any]]:
    """Of each tap: shape, axes, dtype, where it is made, extremes, and per token its root mean
    square and first values."""
    out = {}
    for name, tensor in recording.items():
        axes = tap_of(name).axes.split()
        values = tensor.float()
        entry = {
            "shape": list(tensor.shape),
            "axes": axes,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "where": recording.where[name],
            "min": float(values.min()),
            "max": float(values.max()),
            "rms": float(values.square().mean().sqrt()),
        }
        token_axis = "l" if "l" in axes else "s"  # keys and values: one per token too
        if token_axis in axes:
            rows = values[0].movedim(axes.index(token_axis) - 1, 0).flatten(1)
            entry["token_rms"] = rows.square().mean(-1).sqrt().cpu()
            entry["token_values"] = rows[:, :WALK_VALUES].clone().cpu()
        out[name] = entry
    return out


def _lenses(ends, final: Tensor, ids: Tensor, top_k: int) -> dict[str, Tensor]:
    parts = zip(*(lens(logits, final, ids, top_k) for logits in ends))
    names = ("top_ids", "top_probabilities", "kl", "rank")
    return {f"lens.{name}": torch.stack(part) for name, part in zip(names, parts)}


def _attribution(residuals, added, norm, weight, final: Tensor, config) -> dict[str, Tensor]:
    target = final.argmax(-1)
    logit = final.gather(-1, target[:, None])[:, 0]
    part = contributions.attribute(
        residuals[0][0],
        torch.stack(added),
        residuals[-1][0],
        norm.weight,
        norm.eps,
        weight[target],
        config.lm_head_multiplier,
        logit,
    )
    return {
        "attribution.token": target,
        "attribution.logit": logit,
        "attribution.embedding": part.embedding,
        "attribution.branches": part.branches,
        "attribution.rounding": part.rounding,
    }

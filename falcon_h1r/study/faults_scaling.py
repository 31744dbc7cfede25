"""Faults of multipliers, norms, the head and the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.fold import ONES, fold_factors
from ..checkpoint.loader import EMBEDDING, HEAD
from .faults import Fault, ModelParts, is_one, unless
from .faults_attention import attend


def _dropped(key: str, hint: str, index: int | None = None, label: str = "") -> Fault:
    def plant(parts: ModelParts) -> None:
        value = 1.0
        if index is not None:
            values = list(getattr(parts.config, key))
            values[index] = 1.0
            value = tuple(values)
        parts.set(**{key: value})

    return Fault(f"{key}{label} dropped", f"{key}{label}", plant, hint, is_one(key, index))


def _squared_key(parts: ModelParts) -> None:
    parts.set(key_multiplier=parts.config.key_multiplier**2)


def _key_on_values(parts: ModelParts) -> None:
    multiplier = parts.config.key_multiplier
    parts.set(key_multiplier=1.0)
    attend(parts, lambda q, k, v: (q, k, v * multiplier))


def _values_not_scaled(parts: ModelParts) -> None:
    multiplier = parts.config.attention_in_multiplier
    parts.change_weights(".v_proj.weight", lambda w: (w.double() / multiplier).to(w.dtype))


def _before_the_norm(key: str) -> Fault:
    """norm(m x) with eps is norm(x) with eps / m^2: the multiplier is gone but for eps."""

    def plant(parts: ModelParts) -> None:
        multiplier = getattr(parts.config, key)
        parts.set(**{key: 1.0})

        def act(model) -> None:
            for block in model.model["layers"]:
                block.input_layernorm.eps /= multiplier**2

        parts.finish.append(act)

    hint = "a norm cancels what its input is multiplied with: the multiplier belongs behind it"
    return Fault(f"{key} before the norm", key, plant, hint, is_one(key))


def _gate_multiplier_outside(parts: ModelParts) -> None:
    parts.wrap("swiglu", lambda op: lambda gate, up, m=1.0: op(gate, up, 1.0) * m)


def _multipliers_out_of_order(parts: ModelParts) -> None:
    z, x, B, C, dt = parts.config.ssm_multipliers
    parts.set(ssm_multipliers=(x, z, B, C, dt))


def _folded_and_kept(parts: ModelParts) -> None:
    config, weights = parts.config, parts.weights
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
        parts.set(tie_word_embeddings=False)
    factors = fold_factors(config)
    for name, value in weights.items():
        factor = factors.get(name.split(".", 3)[-1] if ".layers." in name else name)
        if factor is not None:
            factor = factor.to(value.device) if isinstance(factor, Tensor) else factor
            weights[name] = (value.double() * factor).to(value.dtype)


def _all_one(config) -> str:
    ones = all(getattr(config, key) == value for key, value in ONES.items())
    return "every multiplier is 1" if ones else ""


def _head_scaled(parts: ModelParts) -> None:
    c = parts.config
    parts.set(lm_head_multiplier=c.lm_head_multiplier * c.embedding_multiplier)


def _tied_head(parts: ModelParts) -> None:
    parts.weights[HEAD] = parts.weights[EMBEDDING]


def _no_final_norm(parts: ModelParts) -> None:
    parts.finish.append(lambda m: m.model.update({"final_layernorm": torch.nn.Identity()}))


def _other_eps(parts: ModelParts) -> None:
    parts.set(rms_norm_eps=1e-6 if parts.config.rms_norm_eps != 1e-6 else 1e-5)


def _weight_plus_one(parts: ModelParts) -> None:
    parts.wrap("rms_norm", lambda op: lambda x, weight, eps: op(x, weight + 1, eps))


def _centred(parts: ModelParts) -> None:
    parts.wrap("rms_norm", lambda op: lambda x, w, eps: op(x - x.mean(-1, keepdim=True), w, eps))


def _norms_exchanged(parts: ModelParts) -> None:
    parts.swap_weights(".input_layernorm.weight", ".pre_ff_layernorm.weight")


def _gate_and_up_exchanged(parts: ModelParts) -> None:
    for kind in ("weight", "bias"):
        parts.swap_weights(f".gate_proj.{kind}", f".up_proj.{kind}")


SCALING: tuple[Fault, ...] = (
    _dropped("embedding_multiplier", "it acts on the embedding's output, before the first block"),
    _dropped("lm_head_multiplier", "it acts on the logits, behind the head"),
    _dropped("attention_in_multiplier", "it acts on the normalised input of q, k and v"),
    _dropped("attention_out_multiplier", "it acts on o_proj's output, before the residual sum"),
    _dropped("key_multiplier", "it acts on k_proj's output"),
    _dropped("ssm_in_multiplier", "it acts on the normalised input of in_proj"),
    _dropped("ssm_out_multiplier", "it acts on out_proj's output, before the residual sum"),
    *(
        _dropped(
            "ssm_multipliers", f"it acts on {part}, a part of in_proj's output", i, f"[{part}]"
        )
        for i, part in enumerate(("z", "x", "B", "C", "dt"))
    ),
    _dropped("mlp_multipliers", "it acts on gate_proj's output, inside silu", 0, "[gate]"),
    _dropped("mlp_multipliers", "it acts on down_proj's output", 1, "[down]"),
    Fault(
        "key_multiplier applied twice",
        "key_multiplier",
        _squared_key,
        "on q as well as on k, or folded into a weight and kept",
        is_one("key_multiplier"),
    ),
    Fault(
        "key_multiplier on the values",
        "key_multiplier",
        _key_on_values,
        "it belongs to k_proj's output alone",
        is_one("key_multiplier"),
    ),
    Fault(
        "attention_in_multiplier missing on the values",
        "attention_in_multiplier",
        _values_not_scaled,
        "it acts on the input of v_proj as well as on that of q_proj and k_proj",
        is_one("attention_in_multiplier"),
    ),
    _before_the_norm("ssm_in_multiplier"),
    _before_the_norm("attention_in_multiplier"),
    Fault(
        "mlp gate multiplier outside silu",
        "mlp_multipliers[gate]",
        _gate_multiplier_outside,
        "silu(m gate) up, not m silu(gate) up",
        is_one("mlp_multipliers", 0),
    ),
    Fault(
        "ssm_multipliers of z and x exchanged",
        "ssm_multipliers order",
        _multipliers_out_of_order,
        "the order is z, x, B, C, dt",
        unless(
            lambda c: c.ssm_multipliers[0] != c.ssm_multipliers[1],
            "ssm_multipliers[0] and [1] are equal",
        ),
    ),
    Fault(
        "multipliers folded and applied again",
        "folding",
        _folded_and_kept,
        "the weights hold the multipliers already: set all of them to 1",
        _all_one,
    ),
    Fault(
        "head scaled by embedding_multiplier",
        "lm_head_multiplier",
        _head_scaled,
        "the scaled embedding table must not serve as the head",
        is_one("embedding_multiplier"),
    ),
    Fault(
        "head taken from the embedding",
        "head",
        _tied_head,
        "tie_word_embeddings is false: the head is lm_head.weight",
        unless(lambda c: not c.tie_word_embeddings, "tie_word_embeddings is true"),
    ),
    Fault("final norm missing", "final norm", _no_final_norm, "model.final_layernorm"),
    Fault("rms_norm_eps wrong", "eps", _other_eps, "it is read from the config, and added inside"),
    Fault("norm weight plus one", "norm", _weight_plus_one, "the weight is w, not 1 + w"),
    Fault("mean subtracted in the norm", "norm", _centred, "RMSNorm, not LayerNorm"),
    Fault(
        "the two layer norms exchanged",
        "layer norms",
        _norms_exchanged,
        "input_layernorm stands before the mixers, pre_ff_layernorm before the MLP",
    ),
    Fault(
        "gate_proj and up_proj exchanged",
        "mlp projections",
        _gate_and_up_exchanged,
        "silu acts on gate_proj",
    ),
)

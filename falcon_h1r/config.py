"""Every hyperparameter of Falcon-H1 under its name in `config.json`, and the derived sizes.

What is unusual in this architecture:
- every block runs attention and a Mamba-2 mixer side by side on one normalised input and adds both;
- fourteen scalar multipliers (muP) act in the forward pass; released checkpoints keep them separate
  from the weights, and leaving out a single one gives fluent nonsense;
- `head_dim` is free: 12 heads of 128 at width 3072, so q and o are 3072 <-> 1536;
- rope's base is 1e11;
- transformers' class defaults differ from every released checkpoint, so a missing architecture key
  is an error here and never a default.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .checks import is_integer, shown
from .config_keys import IGNORED, NEUTRAL, NULL_VALUES, OPTIONAL, OWN, REQUIRED_VALUES
from .presets import PRESETS


class ConfigError(ValueError):
    """A configuration that does not describe a Falcon-H1 model this package can run."""


_MOST = 2**128  # of integers: what is made of them still fits a float


@dataclass(frozen=True, kw_only=True)
class FalconH1Config:
    """Falcon-H1 hyperparameters; field names are the keys of `config.json`.

    Symbols in the comments are those of the Mamba-2 paper (arXiv 2405.21060) and of
    docs/architecture.md. Raises `ConfigError` on construction when values contradict each other.
    """

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # j
    head_dim: int  # e; independent of hidden_size / num_attention_heads
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k, v and o
    mlp_bias: bool  # on gate, up and down

    mamba_d_ssm: int | None  # h * p; null means mamba_expand * hidden_size
    mamba_expand: int  # read only where mamba_d_ssm is null
    mamba_n_heads: int  # h
    mamba_d_head: int | str  # p; "auto" means d_ssm / mamba_n_heads
    mamba_d_state: int  # n
    mamba_n_groups: int  # g: heads of one group share B and C
    mamba_d_conv: int  # w: taps of the causal convolution
    mamba_chunk_size: int  # q: how the scan is cut; results depend on it by rounding only
    mamba_conv_bias: bool
    mamba_proj_bias: bool  # on mamba.in_proj
    projectors_bias: bool  # on mamba.out_proj
    mamba_rms_norm: bool  # grouped RMSNorm at the mixer's gate
    mamba_norm_before_gate: bool

    embedding_multiplier: float
    lm_head_multiplier: float
    attention_in_multiplier: float
    attention_out_multiplier: float
    key_multiplier: float
    ssm_in_multiplier: float
    ssm_out_multiplier: float
    ssm_multipliers: tuple[float, float, float, float, float]  # on z, x, B, C, dt
    mlp_multipliers: tuple[float, float]  # on gate (inside silu), on down's output

    time_step_limit: tuple[float, float] = (0.0, math.inf)  # bounds of dt after softplus
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in ("ssm_multipliers", "mlp_multipliers", "time_step_limit", "eos_token_id"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_types(self)
        _check_sizes(self)
        for field in fields(self):  # 1 and 1.0 are one value, and write one file
            value = getattr(self, field.name)
            if field.type == "float":
                object.__setattr__(self, field.name, float(value))
            elif field.type.startswith("tuple[float"):
                object.__setattr__(self, field.name, tuple(map(float, value)))

    @property
    def d_ssm(self) -> int:
        """Width of the mixer's inner stream, heads * head size."""
        if self.mamba_d_ssm is None:
            return self.mamba_expand * self.hidden_size
        return self.mamba_d_ssm

    @property
    def mamba_head_dim(self) -> int:
        """p: channels per SSM head."""
        return self.d_ssm // self.mamba_n_heads

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_ssm + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of mamba.in_proj: z, x, B, C and dt."""
        return self.d_ssm + self.conv_dim + self.mamba_n_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, empty when there is none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FalconH1Config:
        """Read the content of a `config.json`.

        Rope keys may be flat (`rope_theta`, `rope_scaling`) or nested (`rope_parameters`); eos may
        be an int or a list, and -1 means none; `head_dim`, where absent, is hidden_size /
        num_attention_heads, as its absence means in saved files (the tensors' shapes are checked at
        loading). Keys without effect on the forward pass are let through: `ignored_keys` lists
        them. So are unknown keys whose value is null.
        Raises `ConfigError` for a missing or unknown architecture key and for a value the package
        has no code for.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"config: expected a JSON object, found {type(values).__name__}")
        if odd := [key for key in values if not isinstance(key, str)]:
            raise ConfigError(f"config: the key {shown(odd[0])} is no string")
        values = {key: _decode_special_float(value) for key, value in values.items()}
        if (found := values.get("model_type", "falcon_h1")) != "falcon_h1":
            raise ConfigError(f"config: model_type is {shown(found)}, expected 'falcon_h1'")
        for key in ("quantization_config", "quantization"):
            if values.get(key) is not None:
                raise ConfigError(f"config: {key}: quantised checkpoints cannot be loaded")
        values = _flatten_rope(values)
        values = {key: value for key, value in values.items() if not _is_ignored(key, value)}
        for key, expected in REQUIRED_VALUES.items():
            if values.pop(key, expected) != expected:
                raise ConfigError(f"config: only {key}={json.dumps(expected)} is supported")
        _fill_nulls(values)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            close = difflib.get_close_matches(unknown[0][:99], known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            names = ", ".join(shown(name) for name in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise ConfigError(f"config: unknown keys: {names}{more}{hint}")
        if missing := [name for name in known if name not in values and name not in OPTIONAL]:
            raise ConfigError(f"config: missing keys: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` in the released layout; `from_dict` gives it back."""
        out: dict[str, Any] = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
        for field in fields(self):
            value = getattr(self, field.name)
            out[field.name] = list(value) if isinstance(value, tuple) else value
        if self.time_step_limit == OPTIONAL["time_step_limit"]:
            del out["time_step_limit"]  # as in the released files
        else:  # JSON has no infinity: this is the form in which transformers writes and reads it
            out["time_step_limit"] = [
                {"__float__": "Infinity"} if bound == math.inf else bound
                for bound in self.time_step_limit
            ]
        return out | REQUIRED_VALUES | {"rope_scaling": None}

    @classmethod
    def preset(cls, name: str) -> FalconH1Config:
        """The configuration of a released model, e.g. "falcon-h1r-7b". Provenance: `presets.py`."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
        merged: dict[str, Any] = {}
        for source in PRESETS[name]:
            merged |= source.values
        return cls(**merged)

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, revision: str | None = None):
        """Read `config.json` of a local folder, a hub repository or the embedded "h1r-pico".

        Raises `CheckpointError` when the folder, repository or file cannot be had, `ConfigError`
        when its content does not describe a supported model.
        """
        from .checkpoint import config_values

        path, values = config_values(path_or_repo_id, revision)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def ignored_keys(values: dict[str, Any]) -> list[str]:
    """The keys of a `config.json` that say nothing about the forward pass and are not ours."""
    return sorted(key for key in values if key not in OWN and _is_ignored(key, values[key]))


def _is_ignored(key: str, value: Any) -> bool:
    if key in FalconH1Config.__dataclass_fields__ or key == "hidden_act":
        return False
    private = key.startswith("_")  # of transformers: _name_or_path, _attn_implementation, ...
    return (
        value is None
        or private
        or key in IGNORED
        or (key in NEUTRAL and type(value) is type(NEUTRAL[key]) and value == NEUTRAL[key])
    )


def _fill_nulls(values: dict[str, Any]) -> None:
    """Put in place what null means."""
    for key, meaning in NULL_VALUES.items():
        if key in values and values[key] is None:
            values[key] = meaning
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if values.get("eos_token_id") == -1:
        values["eos_token_id"] = None
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and is_integer(width, 1) and is_integer(heads, 1):
        values["head_dim"] = width // heads


def _decode_special_float(value: Any) -> Any:
    if isinstance(value, list):  # of numbers, wherever one has a meaning here
        return [_decode_special_float(item) if isinstance(item, dict) else item for item in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        try:
            return float(value["__float__"])
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"config: {shown(value)} is not a number") from error
    return value


def _flatten_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Reduce flat and nested rope keys to `rope_theta`; refuse every scaling by its name."""
    values = dict(values)
    thetas = [values.pop("rope_theta")] if values.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        nested = values.pop(key, None)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            raise ConfigError(f"config: {key} is {shown(nested)}, expected null or an object")
        nested = {str(name): value for name, value in nested.items()}
        for name in ("rope_type", "type"):
            if (kind := nested.pop(name, "default")) != "default":
                raise ConfigError(
                    f"config: {key}: rope type {shown(kind)} is not supported, only 'default'"
                )
        if "rope_theta" in nested:
            thetas.append(nested.pop("rope_theta"))
        if unknown := sorted(name for name in nested if not _is_ignored(name, nested[name])):
            raise ConfigError(f"config: {key}: unknown keys: {shown(unknown)}")
    if any(theta != thetas[0] for theta in thetas):
        raise ConfigError(f"config: contradicting rope_theta values {shown(thetas)}")
    if thetas:
        values["rope_theta"] = thetas[0]
    return values


def _check_types(config: FalconH1Config) -> None:
    def refuse(name: str, expected: str):
        raise ConfigError(f"config: {name} is {shown(getattr(config, name))}, expected {expected}")

    def is_number(value) -> bool:  # a finite one; an integer may be beyond what a float holds
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max

    def is_count(value) -> bool:
        return is_integer(value, 1, _MOST)

    for field in fields(config):
        name, value, kind = field.name, getattr(config, field.name), field.type
        if kind == "int" and not is_count(value):
            refuse(name, "a positive integer")
        elif kind == "bool" and not isinstance(value, bool):
            refuse(name, "true or false")
        elif kind == "float" and not is_number(value):
            refuse(name, "a finite number")
        elif kind == "int | None" and not (value is None or is_integer(value, -_MOST, _MOST)):
            refuse(name, "an integer or null")
    for name, length in (("ssm_multipliers", 5), ("mlp_multipliers", 2)):
        value = getattr(config, name)
        if not (isinstance(value, tuple) and len(value) == length and all(map(is_number, value))):
            refuse(name, f"{length} finite numbers")
    bounds = config.time_step_limit
    if not (
        isinstance(bounds, tuple)
        and len(bounds) == 2
        and all(is_number(bound) or bound == math.inf for bound in bounds)
        and 0 <= bounds[0] < bounds[1]
    ):
        refuse("time_step_limit", "two numbers, 0 <= low < high")
    if config.mamba_d_head != "auto" and not is_count(config.mamba_d_head):
        refuse("mamba_d_head", 'a positive integer or "auto"')
    if config.mamba_d_ssm is not None and not is_count(config.mamba_d_ssm):
        refuse("mamba_d_ssm", "a positive integer or null")
    eos = config.eos_token_ids
    if not (isinstance(eos, tuple) and all(is_integer(i, 0, _MOST) for i in eos)):
        refuse("eos_token_id", "a token id, a list of them or null")


def _check_sizes(config: FalconH1Config) -> None:
    def need(condition: bool, text: str):
        if not condition:
            raise ConfigError(f"config: {text}")

    c = config
    need(
        c.num_attention_heads % c.num_key_value_heads == 0,
        f"num_attention_heads={c.num_attention_heads} is no multiple of "
        f"num_key_value_heads={c.num_key_value_heads}",
    )
    need(c.head_dim % 2 == 0, f"head_dim={c.head_dim} must be even for rotary embeddings")
    need(
        c.d_ssm % c.mamba_n_heads == 0,
        f"the mixer's width {c.d_ssm} is no multiple of mamba_n_heads={c.mamba_n_heads}",
    )
    need(
        c.mamba_d_head in ("auto", c.mamba_head_dim),
        f"mamba_d_head={c.mamba_d_head} contradicts d_ssm / mamba_n_heads = {c.mamba_head_dim}",
    )
    need(
        c.mamba_n_heads % c.mamba_n_groups == 0,
        f"mamba_n_heads={c.mamba_n_heads} is no multiple of mamba_n_groups={c.mamba_n_groups}",
    )
    need(c.rms_norm_eps > 0, f"rms_norm_eps={c.rms_norm_eps} must be positive")
    need(c.rope_theta > 0, f"rope_theta={c.rope_theta} must be positive")

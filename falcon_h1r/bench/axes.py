"""Cases of sizes that no model has: an operator's axes by their letters.

The letters are those of the operators' argument names: `ssd_scan` takes `x_blhp` and `B_blgn`, so
its axes are b, l, h, p, g and n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..config import FalconH1Config
from .registry import Case, Workload

LENGTH, KEYS = 512, 2048  # of l and s where they are not given
_NORM = {"b": "", "l": "", "d": "hidden_size"}
_SCAN = {"b": "", "h": "mamba_n_heads", "p": "mamba_head_dim"}
_SCAN |= {"g": "mamba_n_groups", "n": "mamba_d_state"}
_CONV = {"b": "", "c": "conv_dim", "w": "mamba_d_conv"}
_DECODE = {"b": "", "h": "num_attention_heads", "j": "num_key_value_heads", "s": ""}
_DECODE |= {"e": "head_dim"}
# Letter -> the config's name of it; "" where a workload has it.
AXES: dict[str, dict[str, str]] = {
    "rms_norm": _NORM,
    "rope": {"b": "", "l": "", "h": "num_attention_heads", "e": "head_dim"},
    "rope_key": {"b": "", "l": "", "h": "num_key_value_heads", "e": "head_dim"},
    "gated_rms_norm": {"b": "", "l": "", "d": "d_ssm", "g": "mamba_n_groups"},
    "causal_conv1d": _CONV | {"l": ""},
    "causal_conv1d_step": _CONV,
    "ssd_scan": _SCAN | {"l": "", "q": "mamba_chunk_size"},
    "ssd_step": _SCAN,
    "attention": _DECODE | {"l": ""},
    "decode_attention": _DECODE,
    "decode_attention_ragged": _DECODE,
    "swiglu": {"b": "", "l": "", "i": "intermediate_size"},
    "rms_norm_residual": _NORM,
    "conv_ssd_step": _SCAN | {"w": "mamba_d_conv"},
    "logprob": {"m": "", "v": "vocab_size"},
}


def parse(text: str) -> dict[str, int]:
    """`l=777,h=4` as a mapping. Raises ValueError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        letter, equals, number = part.partition("=")
        if not (equals and letter and number.isdecimal() and int(number)) or letter in sizes:
            raise ValueError(
                f"sizes are {text!r}, expected AXIS=N,AXIS=N,... such as b=1,l=777, each axis "
                "once, N a positive integer"
            )
        sizes[letter] = int(number)
    return sizes


def sized(
    op: str, sizes: Mapping[str, int], model: str, config: FalconH1Config, dtype: torch.dtype
) -> Case:
    """One operator's case with these sizes; those that are not given are the config's.

    b (and m) is 1 otherwise, l is LENGTH and s, the keys per row, is l, or KEYS in decoding.
    model: the config's name. Raises ValueError for an axis that the operator does not have, and for
    sizes that contradict each other.
    """
    axes = AXES[op]
    if unknown := [letter for letter in sizes if letter not in axes]:
        known = ", ".join(axes)
        raise ValueError(f"{op} has no axis {unknown[0]!r}; it has: {known}")
    for letter, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{op}: {letter} is {size!r}, expected a positive integer")
    try:
        changed = replace(config, **_fields(op, sizes, config))
    except ValueError as error:
        raise ValueError(f"{op} with {_shown(sizes)}: {error}") from None
    named = {letter: size for letter, size in sizes.items() if axes[letter]}
    name = f"{model} with {_shown(named)}" if named else model
    return Case(op, name, changed, _workload(op, sizes), dtype)


def _shown(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{letter}={size}" for letter, size in sizes.items())


def _workload(op: str, sizes: Mapping[str, int]) -> Workload:
    b = sizes.get("m" if op == "logprob" else "b", 1)
    if "l" not in AXES[op]:
        return Workload("decode", b, 1, sizes.get("s", KEYS) - 1)
    l = sizes.get("l", LENGTH)
    past = sizes.get("s", l) - l
    if past < 0:
        raise ValueError(f"{op} with {_shown(sizes)}: s, the keys, are fewer than l = {l} tokens")
    return Workload("resume" if past else "prefill", b, l, past)


def _fields(op: str, sizes: Mapping[str, int], config: FalconH1Config) -> dict[str, int]:
    """The config's fields that give an operator its sizes."""
    names = AXES[op]
    fields = {names[letter]: size for letter, size in sizes.items() if names[letter]}
    heads, groups = config.mamba_n_heads, config.mamba_n_groups
    if {"mamba_n_heads", "mamba_head_dim"} & set(fields):
        p = fields.pop("mamba_head_dim", config.mamba_head_dim)
        fields |= {"mamba_d_ssm": p * fields.get("mamba_n_heads", heads), "mamba_d_head": p}
    if op == "gated_rms_norm" and fields:  # a head for each group of the norm
        d, groups = fields.pop("d_ssm", config.d_ssm), fields.get("mamba_n_groups", groups)
        fields |= {"mamba_d_ssm": d, "mamba_d_head": "auto", "mamba_n_groups": groups}
        fields["mamba_n_heads"] = groups
    if op in ("rope", "rope_key") and "h" in sizes:  # queries and keys alike: either has all heads
        fields = {"num_attention_heads": sizes["h"], "num_key_value_heads": sizes["h"], **fields}
    if "conv_dim" in fields:  # of c channels one is B's and one C's
        c = fields.pop("conv_dim")
        if c < 3:
            raise ValueError(f"c is {c}, expected 3 or more")
        fields |= {"mamba_n_groups": 1, "mamba_d_state": 1, "mamba_n_heads": 1}
        fields |= {"mamba_d_ssm": c - 2, "mamba_d_head": c - 2}
    return fields

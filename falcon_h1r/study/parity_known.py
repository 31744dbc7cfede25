"""Known differences between ours and other implementations, and where they show.

Each says of which versions it is true, under which configuration and on which path, and which
tensors it touches. An `error` is a wrong result, which spreads to all tensors behind it; the rest
is rounding. Versions: those of transformers' path without kernels, as measured on 4.53 to 5.24.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..tap_table import inner_name
from .dump import Inputs

TRANSFORMERS, LLAMA = "transformers", "llama.cpp"


class Where(NamedTuple):
    """The circumstances of a cell."""

    peer: str
    version: str
    config: object
    dtype: str
    inputs: Inputs


class Known(NamedTuple):
    """One difference."""

    key: str
    tensors: tuple[str, ...]  # patterns of taps' names
    text: str
    holds: Callable[[Where], bool]
    since: tuple[int, ...] = (0,)
    until: tuple[int, ...] | None = None  # the first version without it
    error: bool = False
    peer: str = TRANSFORMERS


def _narrow(where: Where) -> bool:
    return where.dtype in ("bfloat16", "float16")


def _always(where: Where) -> bool:
    return True


def _steps(where: Where) -> bool:
    """Whether a step of one token stands behind a cache."""
    return where.inputs.pieces is not None and 1 in where.inputs.pieces[1:]


def _stretches(where: Where) -> bool:
    """Whether a stretch of several tokens stands behind a cache."""
    pieces = where.inputs.pieces
    return pieces is not None and any(piece > 1 for piece in pieces[1:])


def _left_padded(where: Where) -> bool:
    mask = where.inputs.mask
    return mask is not None and bool((~mask[:, 0]).any())


def _right_padded(where: Where) -> bool:
    mask = where.inputs.mask
    return mask is not None and bool((~mask[:, -1]).any())


def _finite_limit(where: Where) -> bool:
    return where.config.time_step_limit != (0.0, math.inf)


KNOWN: tuple[Known, ...] = (
    Known(
        "clamp in decode",
        ("mamba.scan.dt", "mamba.scan.y", "mamba.scan.state"),
        "transformers applies time_step_limit in a prefill and forgets it in a cached step; ours "
        "clamps in both. Its whole forward decides which is right, and agrees with ours",
        lambda w: _finite_limit(w) and _steps(w),
        since=(5, 15),
        error=True,
    ),
    Known(
        "clamp hard-coded",
        ("mamba.scan.dt", "mamba.scan.y", "mamba.scan.state"),
        "transformers before 5.4 ignores the config's time_step_limit",
        _finite_limit,
        until=(5, 4),
        error=True,
    ),
    Known(
        "state behind right padding",
        ("mamba.scan.state",),
        "transformers lets the SSM state decay over padding that stands behind a row, so a row "
        "cannot be continued; ours holds it (dt = 0). The row run alone decides",
        _right_padded,
        error=False,
    ),
    Known(
        "left padding with mamba_proj_bias",
        ("mamba.conv.out", "mamba.scan.[xBCy]", "mamba.scan.state"),
        "transformers zeroes the input of in_proj at padding, whose bias then enters the "
        "convolution's window of the first real tokens. The row run alone decides",
        lambda w: _left_padded(w) and w.config.mamba_proj_bias,
        error=True,
    ),
    Known(
        "padding unmasked at batch 1",
        ("mamba.conv.out", "mamba.scan.*"),
        "transformers before 5.15 does not mask the padding of a single row in the mixer",
        lambda w: _left_padded(w) and len(w.inputs.ids) == 1,
        until=(5, 15),
        error=True,
    ),
    Known(
        "pieces from a zero state",
        ("mamba.conv.out", "mamba.scan.y", "mamba.scan.state"),
        "transformers before 5.14 starts a stretch of tokens behind a cache from a zero state",
        _stretches,
        until=(5, 14),
        error=True,
    ),
    Known(
        "state in the model's dtype",
        ("mamba.scan.y", "mamba.scan.state"),
        "transformers before 5.14 keeps the SSM state of a narrow model in its dtype",
        lambda w: _narrow(w) and _steps(w),
        until=(5, 14),
    ),
    Known(
        "steps with the gated norm",
        ("mamba.gate.out",),
        "transformers before 5.23 raises, or returns a wrong shape, in a step of several rows "
        "where mamba_rms_norm is true",
        lambda w: w.config.mamba_rms_norm and _steps(w) and len(w.inputs.ids) > 1,
        until=(5, 23),
        error=True,
    ),
    Known(
        "softplus in the model's dtype",
        ("mamba.scan.dt", "mamba.scan.y", "mamba.scan.state"),
        "transformers adds dt_bias and takes softplus in the model's dtype, which costs about "
        "0.3 % of y in bfloat16; ours does both in float32",
        _narrow,
    ),
    Known(
        "segment multipliers rounded",
        ("mamba.conv.x", "mamba.gate.z", "mamba.scan.dt"),
        "transformers keeps ssm_multipliers as a vector in the model's dtype; ours are exact",
        _narrow,
    ),
    Known(
        "norm rounds before its weight",
        ("input_layernorm", "pre_ff_layernorm", "final_layernorm"),
        "transformers rounds the normalised values before it multiplies by the weight; ours once",
        _narrow,
    ),
    Known(
        "gate alone in the model's dtype",
        ("mamba.gate.out",),
        "without a gated norm transformers gates in the model's dtype; ours in float32",
        lambda w: _narrow(w) and not w.config.mamba_rms_norm,
    ),
    Known(
        "rotation in the model's dtype",
        ("self_attn.rope.q", "self_attn.rope.k"),
        "transformers rounds cos, sin and each product to the model's dtype; ours rounds once",
        _narrow,
    ),
    Known(
        "float32 rotary angles",
        ("self_attn.rope.q", "self_attn.rope.k"),
        "transformers multiplies position and frequency in float32, off by 0.008 rad at position "
        "2^18; ours in float64",
        _always,
    ),
    Known(
        "SwiGLU in the model's dtype",
        ("feed_forward.swiglu.out",),
        "transformers rounds silu and its products to the model's dtype; ours once",
        _narrow,
    ),
    Known(
        "convolution in the model's dtype",
        ("mamba.conv.out",),
        "transformers rounds the convolution before SiLU; ours once, behind it",
        _narrow,
    ),
    Known(
        "log-decays summed in float32",
        ("mamba.scan.y", "mamba.scan.state"),
        "transformers sums log-decays in float32, ours in float64",
        _always,
    ),
    Known(
        "logits in the model's dtype",
        ("logits",),
        "transformers multiplies the logits in the model's dtype; ours in float32",
        _narrow,
    ),
    Known(
        "conv1d and act are not called",
        ("mamba.conv.out",),
        "transformers' modules `conv1d` and `act` are never called, so hooks on them see nothing; "
        "this tensor is taken from the function its mixer calls",
        _always,
        since=(5, 15),
    ),
    Known(
        "activations in float32",
        ("logits",),
        "llama.cpp keeps activations in float32 beside bfloat16 matrices: it rounds less than a "
        "bfloat16 model does",
        _narrow,
        peer=LLAMA,
    ),
    Known(
        "multipliers folded",
        ("logits",),
        "a GGUF file holds weights with the multipliers folded in, each rounded once more",
        _always,
        peer=LLAMA,
    ),
)


def applying(where: Where) -> list[Known]:
    """The differences whose conditions hold."""
    version = tuple(int(part) for part in re.findall(r"\d+", where.version)[:2])
    return [
        known
        for known in KNOWN
        if known.peer == where.peer
        and (known.peer != TRANSFORMERS or known.since <= version)
        and (known.until is None or version < known.until)
        and known.holds(where)
    ]


def explain(names: Sequence[str], where: Where) -> dict[str, list[str]]:
    """Keys of known differences by tensor, names in the order of the forward.

    Behind the first tensor of an error stands "behind: KEY".
    """
    out: dict[str, list[str]] = {name: [] for name in names}
    for known in applying(where):
        reached = False
        for name in names:
            own = inner_name(name)
            if any(fnmatch.fnmatchcase(own, pattern) for pattern in known.tensors):
                out[name].append(known.key)
                reached = True
            elif reached and known.error:
                out[name].append(f"behind: {known.key}")
    return out


def text_of(key: str) -> str:
    """The explanation of a key, or of "behind: KEY"."""
    known = next(k for k in KNOWN if k.key == key.removeprefix("behind: "))
    return known.text

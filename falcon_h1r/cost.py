"""What a Falcon-H1 model costs: parameters, bytes and floating-point operations, from its config.

Everything is a closed formula of the config, so a sheet needs no weights. FLOPs count a
multiply-add as two. The formulas follow from the shapes in `config.py` and the operators in
`ssd.py` and `attention.py`; the tests check them against the model's own tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from .checks import is_integer, refuse
from .config import FalconH1Config
from .tables import aligned


def parameter_counts(config: FalconH1Config) -> dict[str, int]:
    """Parameters by component, and their "total"."""
    c, d = config, config.hidden_size
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = d * (heads + 2 * kv) + heads * d
    attention += (heads + 2 * kv + d) * c.attention_bias
    mamba = c.d_in_proj * (d + c.mamba_proj_bias)
    mamba += c.conv_dim * (c.mamba_d_conv + c.mamba_conv_bias)
    mamba += 3 * c.mamba_n_heads + c.d_ssm * c.mamba_rms_norm
    mamba += d * (c.d_ssm + c.projectors_bias)
    mlp = 3 * d * c.intermediate_size + (2 * c.intermediate_size + d) * c.mlp_bias
    counts = {
        "embedding": c.vocab_size * d,
        "attention": c.num_hidden_layers * attention,
        "mamba": c.num_hidden_layers * mamba,
        "mlp": c.num_hidden_layers * mlp,
        "norms": (2 * c.num_hidden_layers + 1) * d,
        "head": 0 if c.tie_word_embeddings else c.vocab_size * d,
    }
    return counts | {"total": sum(counts.values())}


def weight_bytes(config: FalconH1Config, dtype: torch.dtype) -> int:
    """Bytes of the loaded weights; A_log, D and dt_bias are at least float32."""
    wide = 3 * config.mamba_n_heads * config.num_hidden_layers
    narrow = parameter_counts(config)["total"] - wide
    return narrow * dtype.itemsize + wide * max(dtype.itemsize, 4)


def kv_bytes(config: FalconH1Config, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sequence of `tokens` tokens, all layers."""
    c = config
    per_layer = 2 * c.num_key_value_heads * c.head_dim * dtype.itemsize
    return c.num_hidden_layers * per_layer * tokens


def state_bytes(config: FalconH1Config, dtype: torch.dtype) -> dict[str, int]:
    """Bytes one sequence keeps whatever its length: the SSM states (float32) and conv windows."""
    c = config
    ssm = c.mamba_n_heads * c.mamba_head_dim * c.mamba_d_state * max(dtype.itemsize, 4)
    window = (c.mamba_d_conv - 1) * c.conv_dim * dtype.itemsize
    return {"ssm": c.num_hidden_layers * ssm, "conv": c.num_hidden_layers * window}


def decode_flops(config: FalconH1Config, context: int) -> dict[str, int]:
    """FLOPs of one decode step of one sequence that holds `context` tokens."""
    c = config
    counts = parameter_counts(c)
    matrices = counts["total"] - counts["embedding"] - counts["head"] - counts["norms"]
    matrices -= c.num_hidden_layers * (3 * c.mamba_n_heads + c.d_ssm * c.mamba_rms_norm)
    state = c.mamba_n_heads * c.mamba_head_dim * c.mamba_d_state
    attention = 4 * c.num_attention_heads * c.head_dim * context
    parts = {
        "linear_and_conv": 2 * matrices,
        "head": 2 * c.vocab_size * c.hidden_size,
        "attention": c.num_hidden_layers * attention,
        # decay * state + dt x B, then the product with C: three multiply-adds per state element.
        "ssm": c.num_hidden_layers * 6 * state,
    }
    return parts | {"total": sum(parts.values())}


def decode_bytes(
    config: FalconH1Config, context: int, traces: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Bytes that one decode step of `traces` sequences must move, and the part that dominates.

    weights: each matrix once (of the embedding only the rows looked up, unless it is the head too);
    kv: every key and value read once; state: SSM state and window, read and written.
    """
    weights = weight_bytes(config, dtype)
    if not config.tie_word_embeddings:
        weights -= (config.vocab_size - traces) * config.hidden_size * dtype.itemsize
    parts = {
        "weights": weights,
        "kv": traces * kv_bytes(config, context, dtype),
        "state": 2 * traces * sum(state_bytes(config, dtype).values()),
    }
    bound = max(parts, key=parts.get)
    return parts | {"total": sum(parts.values()), "bound": bound}


def sheet(
    config: FalconH1Config,
    dtype: torch.dtype = torch.bfloat16,
    contexts: tuple[int, ...] = (2048, 32768, 262144),
    traces: tuple[int, ...] = (1, 16, 64, 512),
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """The whole cost sheet as plain JSON values; `render` prints it.

    decode[i]: one step of `traces` sequences at `context` tokens: memory held, bytes moved by part,
    FLOPs, FLOPs per byte moved and, with a memory bandwidth in bytes per second, the most steps per
    second that it allows.
    """
    for name, values in (("contexts", contexts), ("traces", traces)):
        if not values or not all(is_integer(value, 1) for value in values):
            refuse(name, list(values), "integers >= 1")
    weights, states = weight_bytes(config, dtype), state_bytes(config, dtype)
    rows = []
    for context in contexts:
        for count in traces:
            moved = decode_bytes(config, context, count, dtype)
            flops = count * decode_flops(config, context)["total"]
            held = count * (kv_bytes(config, context, dtype) + sum(states.values()))
            row = {
                "context": context,
                "traces": count,
                "cache_bytes": held,
                "memory_bytes": weights + held,
                "moved_bytes": moved,
                "flops": flops,
                "flops_per_byte": flops / moved["total"],
            }
            if bandwidth is not None:
                row["steps_per_second"] = bandwidth / moved["total"]
            rows.append(row)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameter_counts(config),
        "weight_bytes": weights,
        "kv_bytes_per_token": kv_bytes(config, 1, dtype),
        "state_bytes_per_trace": states,
        "flops_per_token": {str(context): decode_flops(config, context) for context in contexts},
        "decode": rows,
    }


def render(name: str, values: dict[str, Any]) -> str:
    """The values of `sheet` as text."""
    parameters = values["parameters"]
    parts = ", ".join(f"{k} {v:,}" for k, v in parameters.items() if k != "total" and v)
    states = values["state_bytes_per_trace"]
    lines = [
        f"{name}, {values['dtype']}",
        f"parameters  {parameters['total']:,} ({parts})",
        f"weights     {in_units(values['weight_bytes'])}",
        f"per token   {in_units(values['kv_bytes_per_token'])} of keys and values",
        f"per trace   {in_units(sum(states.values()))} of state "
        f"(SSM {in_units(states['ssm'])}, convolution {in_units(states['conv'])})",
        "",
        "One decode step: memory held; bytes moved for weights, KV and state; what bounds it",
    ]
    header = [
        "context",
        "traces",
        "memory",
        "weights",
        "KV",
        "state",
        "bound by",
        "GFLOP",
        "FLOP/B",
    ]
    bounded = "steps_per_second" in values["decode"][0]
    rows = [header + (["steps/s <="] if bounded else [])]
    for row in values["decode"]:
        moved = row["moved_bytes"]
        cells = [
            f"{row['context']:,}",
            f"{row['traces']}",
            in_units(row["memory_bytes"]),
            *(in_units(moved[part]) for part in ("weights", "kv", "state")),
            moved["bound"],
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['flops_per_byte']:.1f}",
        ]
        rows.append(cells + ([f"{row['steps_per_second']:,.2f}"] if bounded else []))
    return "\n".join([*lines, *aligned(rows, "r")])


def in_units(count: float) -> str:
    """Bytes for people, as in "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError

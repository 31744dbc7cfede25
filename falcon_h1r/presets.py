"""Configurations of the released family, each group of values with where it was seen.

Grades: "printed" - the value stands in a model card, paper, or a published copy of the model's own
config.json; "derived" - the value follows from a rule that reproduces the printed values of the
other sizes (see `closed_form_multipliers`) or from a published parameter count, and was itself not
seen.
A checkpoint's own config.json always decides over a preset.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Provenance(NamedTuple):
    """A group of config values with one provenance."""

    grade: str  # "printed" or "derived"
    where: str
    values: dict[str, Any]


def closed_form_multipliers(
    hidden: int, intermediate: int, head_dim: int, d_ssm: int, d_state: int
) -> dict[str, Any]:
    """The fit that reproduces every printed multiplier of the family except the Tiny models.

    It centres on width 1280, the base width of the Falcon-H1 paper's muP. Used for presets whose
    own values were not seen in print, and to cross-check the others; never in place of a
    config.json.
    """
    root2 = math.sqrt(2)
    return {
        "embedding_multiplier": 4 * root2,
        "lm_head_multiplier": 40 / hidden,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 983040 / hidden**2,
        "key_multiplier": 0.390625 * (1024 / hidden) ** 2 * math.sqrt(64 / head_dim),
        "ssm_in_multiplier": 1280 / hidden,
        "ssm_out_multiplier": 256 * root2 / d_ssm,
        "ssm_multipliers": (root2 / 4, 0.25, 32 * root2 / d_state, 0.5, root2 / 4),
        "mlp_multipliers": (640 * root2 / hidden, 1228800 / (hidden * intermediate)),
    }


_CARD = "Falcon-H1R paper (arXiv 2601.02346) table 8 and the model card"
_PLAN = "published copies of the family's config.json values"
_TINY = "published copies of Falcon-H1-Tiny-90M config.json values"

_COMMON = Provenance(
    "printed",
    _PLAN,
    {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e11,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "mamba_norm_before_gate": False,
        "initializer_range": 0.02,
    },
)
_TOKENS = Provenance(
    "printed",
    "config.json and generation_config.json of sibling models",
    {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": (11, 228)},
)


def _geometry(
    grade: str,
    where: str,
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int, int],
    ssm: tuple[int, int, int],
    state: int,
    groups: int = 1,
    norm: bool = True,
    positions: int,
) -> Provenance:
    """heads: query heads, key/value heads, head_dim. ssm: width, heads, head size."""
    return Provenance(
        grade,
        where,
        {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "mamba_d_ssm": ssm[0],
            "mamba_n_heads": ssm[1],
            "mamba_d_head": ssm[2],
            "mamba_d_state": state,
            "mamba_n_groups": groups,
            "mamba_chunk_size": 128,
            "mamba_rms_norm": norm,
            "max_position_embeddings": positions,
        },
    )


_MULTIPLIERS_7B = Provenance(
    "printed",
    "config.json copies, six digits printed; the remaining digits are derived",
    {
        "embedding_multiplier": 5.656854249492381,
        "lm_head_multiplier": 0.013020833333333334,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.10416666666666667,
        "key_multiplier": 0.03069039848899946,
        "ssm_in_multiplier": 0.4166666666666667,
        "ssm_out_multiplier": 0.11785113019775793,
        "ssm_multipliers": (
            0.3535533905932738,
            0.25,
            0.1767766952966369,
            0.5,
            0.3535533905932738,
        ),
        "mlp_multipliers": (0.2946278254943948, 0.032552083333333336),
    },
)
_SHAPE_7B = {
    "vocab": 130048,
    "hidden": 3072,
    "intermediate": 12288,
    "layers": 44,
    "heads": (12, 2, 128),
    "ssm": (3072, 24, 128),
    "state": 256,
    "positions": 262144,
}

PRESETS: dict[str, tuple[Provenance, ...]] = {
    "falcon-h1r-7b": (
        _COMMON,
        _TOKENS,
        _geometry("printed", _CARD + "; " + _PLAN, **_SHAPE_7B),
        _MULTIPLIERS_7B,
    ),
    "falcon-h1-0.5b": (
        _COMMON,
        _TOKENS,
        _geometry(
            "printed",
            _PLAN,
            vocab=32784,
            hidden=1024,
            intermediate=2048,
            layers=36,
            heads=(8, 2, 64),
            ssm=(1536, 24, 64),
            state=128,
            norm=False,
            positions=16384,
        ),
        Provenance(
            "printed",
            "published copies of the 0.5B config.json",
            {
                "embedding_multiplier": 5.656854249492381,
                "lm_head_multiplier": 0.0390625,
                "attention_in_multiplier": 1.0,
                "attention_out_multiplier": 0.9375,
                "key_multiplier": 0.39062499999999994,
                "ssm_in_multiplier": 1.25,
                "ssm_out_multiplier": 0.23570226039551587,
                "ssm_multipliers": (
                    0.3535533905932738,
                    0.25,
                    0.3535533905932738,
                    0.5,
                    0.3535533905932738,
                ),
                "mlp_multipliers": (0.8838834764831844, 0.5859375),
            },
        ),
    ),
    "falcon-h1-1.5b": (
        _COMMON,
        _TOKENS,
        _geometry(
            "printed",
            _PLAN,
            vocab=65536,
            hidden=2048,
            intermediate=4608,
            layers=24,
            heads=(8, 2, 128),
            ssm=(3072, 48, 64),
            state=256,
            positions=131072,
        ),
        Provenance(
            "derived",
            "closed_form_multipliers",
            closed_form_multipliers(2048, 4608, 128, 3072, 256),
        ),
    ),
    "falcon-h1-1.5b-deep": (
        _COMMON,
        _TOKENS,
        _geometry(
            "derived",
            _PLAN + "; intermediate_size from the published parameter count; chunk size not seen",
            vocab=65536,
            hidden=1280,
            intermediate=3072,
            layers=66,
            heads=(6, 2, 128),
            ssm=(1536, 24, 64),
            state=256,
            positions=131072,
        ),
        Provenance(
            "derived",
            "closed_form_multipliers",
            closed_form_multipliers(1280, 3072, 128, 1536, 256),
        ),
    ),
    "falcon-h1-3b": (
        _COMMON,
        _TOKENS,
        _geometry(
            "printed",
            _PLAN,
            vocab=65536,
            hidden=2560,
            intermediate=6144,
            layers=32,
            heads=(10, 2, 128),
            ssm=(4096, 32, 128),
            state=256,
            positions=131072,
        ),
        Provenance(
            "derived",
            "closed_form_multipliers; about three digits of each are printed",
            closed_form_multipliers(2560, 6144, 128, 4096, 256),
        ),
    ),
    "falcon-h1-7b": (
        _COMMON,
        _TOKENS,
        # Of the Base model; the Instruct model's vocabulary is 130049 and its chunk 256.
        _geometry("printed", _PLAN, **_SHAPE_7B),
        _MULTIPLIERS_7B,
    ),
    "falcon-h1-34b": (
        _COMMON,
        _TOKENS,
        _geometry(
            "printed",
            _PLAN,
            vocab=261120,
            hidden=5120,
            intermediate=21504,
            layers=72,
            heads=(20, 4, 128),
            ssm=(4096, 32, 128),
            state=256,
            groups=2,
            positions=262144,
        ),
        Provenance(
            "printed",
            "published excerpts of configs made from the 34B",
            {
                "embedding_multiplier": 5.656854249492381,
                "lm_head_multiplier": 0.0078125,
                "attention_in_multiplier": 1.0,
                "attention_out_multiplier": 0.0375,
                "key_multiplier": 0.011048543456039804,
                "ssm_in_multiplier": 0.25,
                "ssm_out_multiplier": 0.08838834764831845,
                "ssm_multipliers": (
                    0.3535533905932738,
                    0.25,
                    0.1767766952966369,
                    0.5,
                    0.3535533905932738,
                ),
                "mlp_multipliers": (0.1767766952966369, 0.011160714285714284),
            },
        ),
    ),
    "tiny-90m": (
        _COMMON,
        _TOKENS,
        _geometry(
            "printed",
            _TINY,
            vocab=32768,
            hidden=512,
            intermediate=768,
            layers=24,
            heads=(8, 2, 64),
            ssm=(768, 24, 32),
            state=64,
            norm=False,
            positions=262144,
        ),
        Provenance(
            "printed",
            _TINY + " (embedding_multiplier of the Instruct model)",
            {
                "tie_word_embeddings": True,
                "embedding_multiplier": 0.11083984375,
                "lm_head_multiplier": 0.078125,
                "attention_in_multiplier": 1.0,
                "attention_out_multiplier": 1.0,
                "key_multiplier": 1.0,
                "ssm_in_multiplier": 1.0,
                "ssm_out_multiplier": 1.0,
                "ssm_multipliers": (1.0, 1.0, 1.0, 1.0, 1.0),
                "mlp_multipliers": (1.0, 1.0),
            },
        ),
    ),
}

"""Tiny adversarial configurations and random models for them; shared by all tests."""

import dataclasses
import functools
import math

import textbook
import torch

from falcon_h1r import checkpoint
from falcon_h1r.config import FalconH1Config
from falcon_h1r.model import FalconH1ForCausalLM

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden / heads = 12
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.6,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.45,
    "ssm_multipliers": (0.35, 0.8, 0.55, 0.5, 0.3),
    "mlp_multipliers": (0.9, 0.58),
    "time_step_limit": (0.0, math.inf),
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": (11, 28),
}

# Every structural option is taken at least once, and every multiplier differs from 1.
VARIANTS = {
    "h1r_like": {"mamba_n_groups": 1, "num_attention_heads": 6},
    "two_groups": {},
    "norm_before_gate": {"mamba_norm_before_gate": True},
    "no_gated_norm": {"mamba_rms_norm": False},
    "all_biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "mamba_proj_bias": True,
        "projectors_bias": True,
    },
    "no_conv_bias_three_taps": {"mamba_conv_bias": False, "mamba_d_conv": 3},
    "finite_dt_limit": {"time_step_limit": (0.02, 0.05)},
    "tied": {"tie_word_embeddings": True},
    "d_ssm_null_auto_head": {"mamba_d_ssm": None, "mamba_expand": 2, "mamba_d_head": "auto"},
    "multi_query_odd_chunk": {"num_key_value_heads": 1, "mamba_chunk_size": 7, "rope_theta": 1e11},
}

load = FalconH1ForCausalLM.from_pretrained
stream_modules = functools.partial(checkpoint.stream_modules, FalconH1ForCausalLM)


def make_config(variant: str = "two_groups", **changes) -> FalconH1Config:
    return FalconH1Config(**{**BASE, **VARIANTS[variant], **changes})


def make_model(config: FalconH1Config, ops=None, dtype=torch.float32, seed: int = 0):
    """Weights that make every path matter: O(1) activations, biases and norms away from 0 and 1.

    Equal for one seed in every dtype: drawn in float32, then converted.
    """
    generator = torch.Generator().manual_seed(seed)
    model = FalconH1ForCausalLM(config, ops=ops, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                value = noise.abs().add(0.5).log()
            elif name.endswith("dt_bias"):
                value = noise - 3
            elif name.endswith(("norm.weight", "D")):
                value = 1 + 0.3 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif name.endswith("embed_tokens.weight"):
                value = 0.3 * noise
            elif name.endswith("conv1d.weight"):
                value = 0.5 * noise
            else:
                value = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(value)
    return model.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `expected`."""
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    found, expected = found.double(), expected.double()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def random_ids(config: FalconH1Config, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def same_weights(model, ops=None, dtype=None, **changes) -> FalconH1ForCausalLM:
    """The weights of `model` under another table or dtype, or under a changed configuration."""
    config = dataclasses.replace(model.config, **changes)
    ops = model.ops if ops is None else ops
    copy = FalconH1ForCausalLM(config, ops=ops, dtype=model.dtype if dtype is None else dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def textbook_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each row of ids (b, l) from the plain-Python oracle, in float64."""
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    values = dataclasses.asdict(model.config)
    return torch.tensor(
        [textbook.logits(values, weights, row) for row in ids.tolist()], dtype=torch.float64
    )

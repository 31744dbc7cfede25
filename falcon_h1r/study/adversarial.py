"""Small models in which every path and every constant matters, to check operators and ports on."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..config import FalconH1Config
from ..model import FalconH1ForCausalLM
from ..ops import TORCH

# Two groups, biases, a finite dt limit, untied, rope far from 1e4, every multiplier its own number.
ADVERSARIAL = FalconH1Config(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=1e11,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    mamba_d_ssm=64,
    mamba_expand=2,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=24,
    mamba_n_groups=2,
    mamba_d_conv=4,
    mamba_chunk_size=8,
    mamba_conv_bias=True,
    mamba_proj_bias=False,
    projectors_bias=False,
    mamba_rms_norm=True,
    mamba_norm_before_gate=False,
    embedding_multiplier=5.6,
    lm_head_multiplier=0.7,
    attention_in_multiplier=1.3,
    attention_out_multiplier=0.6,
    key_multiplier=0.4,
    ssm_in_multiplier=1.25,
    ssm_out_multiplier=0.45,
    ssm_multipliers=(0.35, 0.8, 0.55, 0.5, 0.3),
    mlp_multipliers=(0.9, 0.58),
    time_step_limit=(0.02, 0.15),
)
CONFIGS: dict[str, FalconH1Config] = {
    "adversarial": ADVERSARIAL,
    "no gated norm, tied": dataclasses.replace(
        ADVERSARIAL, mamba_rms_norm=False, tie_word_embeddings=True, attention_bias=True
    ),
    "norm first, one group, no dt limit": dataclasses.replace(
        ADVERSARIAL,
        mamba_norm_before_gate=True,
        mamba_n_groups=1,
        time_step_limit=(0.0, math.inf),
        mamba_proj_bias=True,
    ),
}


@torch.no_grad()
def random_model(config: FalconH1Config, seed: int = 0) -> FalconH1ForCausalLM:
    """Weights with which every path matters: activations of order 1, biases and norms of their
    own."""
    generator = torch.Generator().manual_seed(seed)
    model = FalconH1ForCausalLM(config, ops=TORCH).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            value = noise.abs().add(0.5).log()
        elif name.endswith("dt_bias"):
            value = noise - 3
        elif name.endswith(("norm.weight", ".D")):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif parameter.dim() == 2 and "embed" not in name:
            value = noise * parameter.shape[-1] ** -0.5
        else:
            value = 0.4 * noise
        parameter.copy_(value)
    return model

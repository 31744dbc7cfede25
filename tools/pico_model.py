"""The architecture and the start values of h1r-pico."""

from __future__ import annotations

import math

import torch
from pico_tokenizer import BOS, EOS, IM_END, PAD, VOCAB_SIZE
from torch import Tensor, nn

from falcon_h1r.config import FalconH1Config
from falcon_h1r.model import FalconH1ForCausalLM


def pico_config() -> FalconH1Config:
    """The architecture: every kind of part of the family, small, and no multiplier left at 1."""
    return FalconH1Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        mamba_d_ssm=192,
        mamba_expand=2,
        mamba_n_heads=6,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_chunk_size=32,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        projectors_bias=False,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        embedding_multiplier=5.656854249492381,
        lm_head_multiplier=0.3125,
        attention_in_multiplier=1.25,
        attention_out_multiplier=0.9375,
        key_multiplier=0.7071067811865476,
        ssm_in_multiplier=2.5,
        ssm_out_multiplier=0.75,
        ssm_multipliers=(0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
        mlp_multipliers=(0.8838834764831844, 0.5859375),
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=(EOS, IM_END),
    )


@torch.no_grad()
def initialise(model: nn.Module, config: FalconH1Config, generator: torch.Generator) -> None:
    """Draw every weight so that activations start at about 1 in spite of the multipliers.

    A linear weight is normal with deviation 1 / (sqrt(inputs) * its multiplier); what writes into
    the residual stream is scaled down by sqrt(2 * layers). As in Mamba-2, softplus(dt_bias) is
    log-uniform in 0.001..0.1 and A uniform in 1..16. (`init_weights` of the model draws all
    matrices alike, which suits the multipliers of the large models, not these.)
    """
    z, x, b, c, dt = config.ssm_multipliers
    bc = config.mamba_n_groups * config.mamba_d_state
    widths = [config.d_ssm, config.d_ssm, bc, bc, config.mamba_n_heads]
    segments = torch.tensor([z, x, b, c, dt]).repeat_interleave(torch.tensor(widths))
    residual = math.sqrt(2 * config.num_hidden_layers)
    gate, down = config.mlp_multipliers
    multipliers = {
        "embed_tokens.weight": config.embedding_multiplier / math.sqrt(config.hidden_size),
        "lm_head.weight": 1.0,
        "q_proj.weight": config.attention_in_multiplier,
        "k_proj.weight": config.attention_in_multiplier * config.key_multiplier,
        "v_proj.weight": config.attention_in_multiplier,
        "o_proj.weight": config.attention_out_multiplier * residual,
        "mamba.in_proj.weight": config.ssm_in_multiplier * segments[:, None],
        "mamba.out_proj.weight": config.ssm_out_multiplier * residual,
        "gate_proj.weight": gate,
        "up_proj.weight": 1.0,
        "down_proj.weight": down * residual,
        "mamba.conv1d.weight": 1.0,
    }

    def uniform(parameter: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(parameter.shape, generator=generator) * (high - low) + low

    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(uniform(parameter, 1.0, 16.0).log())
        elif name.endswith("dt_bias"):
            step = uniform(parameter, math.log(1e-3), math.log(1e-1)).exp()
            parameter.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        elif name.endswith("conv1d.bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # norm weights and D
            parameter.fill_(1.0)
        else:
            multiplier = next(value for end, value in multipliers.items() if name.endswith(end))
            inputs = math.prod(parameter.shape[1:])
            normal = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(normal / math.sqrt(inputs) / multiplier)


def new_model(seed: int) -> FalconH1ForCausalLM:
    """The untrained model, the same for the same seed."""
    model = FalconH1ForCausalLM(pico_config())
    initialise(model, model.config, torch.Generator().manual_seed(seed))
    return model

"""One hybrid block: a shared norm, attention beside the Mamba-2 mixer, their sum, then the MLP."""

import torch
from torch import Tensor, nn

from .attention import FalconH1Attention
from .documents import filled, lost_positions
from .mamba2 import Mamba2Mixer
from .mlp import FalconH1MLP
from .norm import RMSNorm
from .precision import scaled


class HybridBlock(nn.Module):
    """`model.layers.N`."""

    def __init__(self, config, ops):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = FalconH1Attention(config, ops)
        self.mamba = Mamba2Mixer(config, ops)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.feed_forward = FalconH1MLP(config, ops)
        self.attention_in_multiplier = config.attention_in_multiplier
        self.attention_out_multiplier = config.attention_out_multiplier
        self.ssm_out_multiplier = config.ssm_out_multiplier

    def forward(self, x_bld: Tensor, span, layer=None) -> Tensor:
        """(b, l, d) -> (b, l, d). span: `cache.Span`; layer: `cache.LayerCache` or None.

        ssm_in_multiplier acts inside the mixer, after the norm; attention_in_multiplier here.
        """
        if span.seq_idx_bl is not None:
            lost_bl = lost_positions(span.seq_idx_bl, x_bld)
            x_bld = filled(x_bld, lost_bl)
        normed = self.input_layernorm(x_bld)
        mamba = scaled(self.mamba(normed, span, layer).to(x_bld.dtype), self.ssm_out_multiplier)
        attention = self.self_attn(scaled(normed, self.attention_in_multiplier), span, layer)
        attention = scaled(attention.to(x_bld.dtype), self.attention_out_multiplier)
        x_bld = x_bld + (mamba + attention)
        x_bld = x_bld + self.feed_forward(self.pre_ff_layernorm(x_bld))
        return x_bld if span.seq_idx_bl is None else filled(x_bld, lost_bl, torch.nan)

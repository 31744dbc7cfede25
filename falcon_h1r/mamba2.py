"""The Mamba-2 mixer: in_proj, multipliers, convolution, dt, SSD, gate and norm, out_proj.

Axes as in `ssd.py`, plus d model width. Prefill and decode share everything but the convolution and
the scan, so dt is prepared, and clamped, in one place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import CausalConv1d
from .norm import GatedRMSNorm
from .precision import compute_dtype, scaled


class Mamba2Mixer(nn.Module):
    """`mamba` of a block. A_log, D and dt_bias stay in float32 in a narrower model."""

    def __init__(self, config, ops):
        super().__init__()
        self.config, self.ops = config, ops
        d, h = config.hidden_size, config.mamba_n_heads
        self.groups = config.mamba_n_groups, config.mamba_d_state
        self.widths = [config.d_ssm, math.prod(self.groups), math.prod(self.groups)]  # of x, B, C
        self.in_proj = nn.Linear(d, config.d_in_proj, bias=config.mamba_proj_bias)
        self.conv1d = CausalConv1d(config)
        self.A_log = nn.Parameter(torch.zeros(h))
        self.D = nn.Parameter(torch.ones(h))
        self.dt_bias = nn.Parameter(torch.zeros(h))
        if config.mamba_rms_norm:
            self.norm = GatedRMSNorm(config, ops)
        self.out_proj = nn.Linear(config.d_ssm, d, bias=config.projectors_bias)

    def _apply(self, fn, recurse=True):
        """A_log, D and dt_bias stay at least float32: they enter exponentials."""
        for child in self.children() if recurse else ():
            child._apply(fn)

        def wide(parameter: Tensor) -> Tensor:
            moved = fn(parameter)
            work = compute_dtype(moved)
            return moved if moved.dtype == work else parameter.to(moved.device, work)

        return super()._apply(wide, recurse=False)

    def forward(self, u_bld: Tensor, span, layer=None) -> Tensor:
        """(b, l, d) -> (b, l, d). span: `cache.Span`; layer: `cache.LayerCache` or None."""
        c, ops, work = self.config, self.ops, compute_dtype(u_bld)

        # 1. One projection, cut into five segments, each with its own multiplier.
        projected = self.in_proj(scaled(u_bld, c.ssm_in_multiplier)).to(u_bld.dtype)
        z, xBC, dt = projected.split([c.d_ssm, c.conv_dim, c.mamba_n_heads], dim=-1)
        z, dt = scaled(z, c.ssm_multipliers[0]), scaled(dt, c.ssm_multipliers[4])
        if c.ssm_multipliers[1:4] != (1.0, 1.0, 1.0):
            segments = zip(c.ssm_multipliers[1:4], xBC.split(self.widths, dim=-1))
            xBC = torch.cat([multiplier * segment for multiplier, segment in segments], dim=-1)

        # 2. Step size and decay rate. dt = 0 makes right padding hold the state.
        dt = F.softplus(dt.to(work) + self.dt_bias.to(work)).clamp(*c.time_step_limit)
        if span.lengths_b is not None:
            dt = dt.masked_fill(span.padding_bl[..., None], 0)
        # Past exp(60) any decay is 0 already; an infinite A would make NaN of it where dt is 0.
        A = -torch.exp(self.A_log.to(work).clamp(max=60))

        # 3. Convolution and scan: one step of both from the cache, or a whole stretch.
        if not isinstance(self.conv1d, CausalConv1d):
            raise ValueError(f"mamba.conv1d: {type(self.conv1d).__name__}, expected CausalConv1d")
        if span.is_step:
            xBC = self.conv1d(xBC[:, 0], layer.window_bvc, ops, step=True)
            x, B, C = self._heads(xBC)
            y = ops.ssd_step(layer.state_bhpn, x, dt[:, 0], A, B, C, self.D).flatten(-2)[:, None]
        else:
            window, state = (None, None) if layer is None else (layer.window_bvc, layer.state_bhpn)
            options = {"lengths_b": span.lengths_b, "seq_idx_bl": span.seq_idx_bl}
            xBC, window = self.conv1d(xBC, window, ops, **options)
            x, B, C = self._heads(xBC)
            options = {"chunk_size": c.mamba_chunk_size, "seq_idx_bl": span.seq_idx_bl}
            y, state = ops.ssd_scan(x, dt, A, B, C, self.D, initial_state_bhpn=state, **options)
            y = y.flatten(-2)
            if layer is not None:
                layer.write_mixer(window, state)

        # 4. Gate, with the grouped norm where the model has one, and the way back.
        if c.mamba_rms_norm:
            y = self.norm(y, z)
        else:
            y = ops.gated_rms_norm(y, z, None, c.rms_norm_eps)
        return self.out_proj(y)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., h, p), B and C (..., g, n)."""
        x, B, C = xBC.split(self.widths, dim=-1)
        heads = (self.config.mamba_n_heads, -1)
        return x.unflatten(-1, heads), B.unflatten(-1, self.groups), C.unflatten(-1, self.groups)

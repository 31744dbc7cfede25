"""Backwards of the norms, SwiGLU and the convolution, which keep their inputs alone.

With n = x r, r = 1 / sqrt(mean(x^2) + eps) and dn = w dy, a norm's backward is

    dx = r (dn - n mean(dn n))      dw = sum dy n

and silu'(h) = s (1 + h (1 - s)), s = sigmoid(h). What autograd would keep besides - squares, gates,
products - is made again here, one operator at a time. Attention has torch's own backward, and rope
is linear. Everything is computed in `compute_dtype`; a second backward raises.

The functions have the names and arguments of the operators and are those of the table TORCH.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from . import conv, mlp, norm
from .gradients import once
from .precision import autocasts, compute_dtype, without_autocast


def learns(*inputs: Tensor | None) -> bool:
    """Whether autograd wants a gradient of any input."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


@functools.wraps(norm.rms_norm)
def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    if not learns(x, weight_d):
        return norm.rms_norm(x, weight_d, eps)
    return _RMSNorm.apply(x, weight_d, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_d, eps):
        ctx.save_for_backward(x, weight_d)
        ctx.eps = eps
        return norm.rms_norm(x, weight_d, eps)

    @staticmethod
    @once
    def backward(ctx, dy):
        x, weight_d = ctx.saved_tensors
        work = x.to(compute_dtype(x))
        dx, dweight = _norm_back(work, weight_d, dy.to(work.dtype), ctx.eps, 1)
        return dx.to(x.dtype), dweight, None


@functools.wraps(norm.gated_rms_norm)
def gated_rms_norm(y_bld, z_bld, weight_d, eps, n_groups=1, norm_before_gate=False) -> Tensor:
    if not learns(y_bld, z_bld, weight_d):
        return norm.gated_rms_norm(y_bld, z_bld, weight_d, eps, n_groups, norm_before_gate)
    return _GatedRMSNorm.apply(y_bld, z_bld, weight_d, eps, n_groups, norm_before_gate)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight_d, *options):
        ctx.save_for_backward(y, z, weight_d)
        ctx.options = options
        return norm.gated_rms_norm(y, z, weight_d, *options)

    @staticmethod
    @once
    def backward(ctx, dout):
        y, z, weight_d = ctx.saved_tensors
        eps, groups, norm_before_gate = ctx.options
        work = compute_dtype(y)
        wide_y, wide_z, dout = (t.to(work) for t in (y, z, dout))
        gate, dweight = F.silu(wide_z), None
        if weight_d is not None and norm_before_gate:
            normed, _ = _normed(wide_y, eps, groups)
            dgate = dout * normed.flatten(-2) * weight_d
            dy, dweight = _norm_back(wide_y, weight_d, dout * gate, eps, groups)
        else:
            if weight_d is not None:
                dout, dweight = _norm_back(wide_y * gate, weight_d, dout, eps, groups)
            dgate, dy = dout * wide_y, dout * gate
        dz = aten.silu_backward(dgate, wide_z)
        return dy.to(y.dtype), dz.to(z.dtype), dweight, None, None, None


def _normed(x: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """x r (..., g, d / g), and r (..., g, 1)."""
    grouped = x.unflatten(-1, (groups, -1))
    scale = norm.rms_scale(grouped, eps)
    return grouped * scale, scale


def _norm_back(x: Tensor, weight_d: Tensor, dy: Tensor, eps: float, groups: int):
    """The gradients of the input (..., d) of a norm over groups of channels, and of its weight."""
    normed, scale = _normed(x, eps, groups)
    dweight = (dy * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight_d.dtype)
    dnormed = (dy * weight_d).view(normed.shape)
    mean = (dnormed * normed).mean(-1, keepdim=True)
    return dnormed.addcmul_(normed, mean, value=-1).mul_(scale).flatten(-2), dweight


@functools.wraps(mlp.swiglu_reference)
def swiglu(gate: Tensor, up: Tensor, gate_multiplier: float = 1.0) -> Tensor:
    if not learns(gate, up):
        return mlp.swiglu_reference(gate, up, gate_multiplier)
    return _SwiGLU.apply(gate, up, gate_multiplier)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, multiplier):
        ctx.save_for_backward(gate, up)
        ctx.multiplier = multiplier
        return mlp.swiglu_reference(gate, up, multiplier)

    @staticmethod
    @once
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        h = gate.to(compute_dtype(gate)) * ctx.multiplier
        dy = dy.to(h.dtype)
        dup = (dy * F.silu(h)).to(up.dtype)
        dgate = aten.silu_backward(dy * up, h).mul_(ctx.multiplier)
        return dgate.to(gate.dtype), dup, None


@functools.wraps(conv.causal_conv1d)
def causal_conv1d(
    x_blc, weight_cw, bias_c=None, *, initial_window_bvc=None, lengths_b=None, seq_idx_bl=None
) -> tuple[Tensor, Tensor]:
    if autocasts(x_blc):
        return without_autocast(causal_conv1d, **locals())
    options = {"initial_window_bvc": initial_window_bvc, "lengths_b": lengths_b}
    if seq_idx_bl is not None or not learns(x_blc, weight_cw, bias_c, initial_window_bvc):
        return conv.causal_conv1d(x_blc, weight_cw, bias_c, **options, seq_idx_bl=seq_idx_bl)
    w = weight_cw.shape[1]
    history_blc, _ = conv.with_history(x_blc, w, initial_window_bvc, None)
    y_blc = _Conv.apply(history_blc, weight_cw, bias_c)
    return y_blc, conv.final_window(history_blc, w, lengths_b, None)


def _product(history_blc: Tensor, weight_cw: Tensor, bias_c: Tensor | None) -> Tensor:
    """The convolution before SiLU, (b, l, c), as in `conv.causal_conv1d`."""
    work, c = compute_dtype(history_blc), len(weight_cw)
    bias = None if bias_c is None else bias_c.to(work)
    image = history_blc.to(work).mT[:, :, None]
    return F.conv2d(image, weight_cw.to(work)[:, None, None], bias, groups=c)[:, :, 0].mT


class _Conv(torch.autograd.Function):
    """silu(conv(history)), (b, v + l, c) -> (b, l, c)."""

    @staticmethod
    def forward(ctx, history_blc, weight_cw, bias_c):
        ctx.save_for_backward(history_blc, weight_cw, bias_c)
        return F.silu(_product(history_blc, weight_cw, bias_c)).to(history_blc.dtype)

    @staticmethod
    @once
    def backward(ctx, dy):
        history_blc, weight_cw, bias_c = ctx.saved_tensors
        h = _product(history_blc, weight_cw, bias_c)
        dh = aten.silu_backward(dy.to(h.dtype), h)
        c, w = weight_cw.shape
        image, taps = history_blc.to(h.dtype).mT[:, :, None], weight_cw.to(h.dtype)[:, None, None]
        sizes = None if bias_c is None else [c]
        wanted = [True, True, bias_c is not None]
        found = aten.convolution_backward(
            dh.mT[:, :, None], image, taps, sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], c, wanted
        )
        dhistory, dweight, dbias = found
        dhistory = dhistory[:, :, 0].mT.to(history_blc.dtype)
        dweight = dweight.view(c, w).to(weight_cw.dtype)
        return dhistory, dweight, None if bias_c is None else dbias.to(bias_c.dtype)

"""The short depthwise causal convolution over x, B and C, with SiLU.

Axes: b batch, l length, c channels, w taps, v = w - 1 samples of history.
A window_bvc holds the last v inputs of each row, oldest first, zeros before the start; tap 0
multiplies the oldest. `seq_idx_bl` numbers the documents packed into a row, never decreasing: no
tap reaches into another document; a window belongs to the first (initial) or last (final) one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import autocasts, compute_dtype, without_autocast


def causal_conv1d_reference(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None = None,
    *,
    initial_window_bvc: Tensor | None = None,
    lengths_b: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_i weight_i x_{t-v+i}), tap by tap, in `compute_dtype`.

    x_blc: (b, l, c); weight_cw: (c, w); bias_c: (c,); initial_window_bvc: (b, v, c), None: zeros.
    lengths_b: (b,) real samples per row, the rest being right padding; None means all l.
    Returns y_blc (b, l, c) and the final window (b, v, c) after the last real sample, in x's dtype.
    """
    b, l, c = x_blc.shape
    w = weight_cw.shape[1]
    assert weight_cw.shape == (c, w) and (bias_c is None or bias_c.shape == (c,)), weight_cw.shape
    history_blc, seq_idx_history = with_history(x_blc, w, initial_window_bvc, seq_idx_bl)
    work = compute_dtype(x_blc)
    y = torch.zeros(b, l, c, dtype=work, device=x_blc.device)
    for tap in range(w):
        sample = history_blc[:, tap : tap + l].to(work)
        if seq_idx_bl is not None:
            own_bl = seq_idx_history[:, tap : tap + l] == seq_idx_bl
            sample = sample.where(own_bl[..., None], 0)  # 0 * NaN would be NaN
        y = y + sample * weight_cw[:, tap].to(work)
    if bias_c is not None:
        y = y + bias_c.to(work)
    return F.silu(y).to(x_blc.dtype), final_window(history_blc, w, lengths_b, seq_idx_history)


def causal_conv1d(
    x_blc, weight_cw, bias_c=None, *, initial_window_bvc=None, lengths_b=None, seq_idx_bl=None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_reference` through torch's depthwise convolution; same arguments.

    As an image of height 1, (b, l, c) is a channels-last image and need not be transposed.
    """
    if autocasts(x_blc):
        return without_autocast(causal_conv1d, **locals())
    if seq_idx_bl is not None:
        options = {"initial_window_bvc": initial_window_bvc, "lengths_b": lengths_b}
        return causal_conv1d_reference(x_blc, weight_cw, bias_c, **options, seq_idx_bl=seq_idx_bl)
    c, w = weight_cw.shape
    assert x_blc.shape[-1] == c and (bias_c is None or bias_c.shape == (c,)), weight_cw.shape
    history_blc, _ = with_history(x_blc, w, initial_window_bvc, None)
    work = compute_dtype(x_blc)
    bias = None if bias_c is None else bias_c.to(work)
    image_bc1l = history_blc.to(work).mT[:, :, None]
    y_bc1l = F.conv2d(image_bc1l, weight_cw.to(work)[:, None, None], bias, groups=c)
    y_blc = F.silu(y_bc1l, inplace=True)[:, :, 0].mT.to(x_blc.dtype)
    return y_blc, final_window(history_blc, w, lengths_b, None)


def causal_conv1d_step(
    x_bc: Tensor, window_bvc: Tensor, weight_cw: Tensor, bias_c: Tensor | None = None
) -> Tensor:
    """One sample: x_bc (b, c) -> y_bc (b, c); window_bvc (b, v, c) is moved on in place."""
    b, c = x_bc.shape
    w = weight_cw.shape[1]
    assert window_bvc.shape == (b, w - 1, c) and weight_cw.shape[0] == c, window_bvc.shape
    work = compute_dtype(x_bc)
    history_bwc = torch.cat([window_bvc, x_bc[:, None].to(window_bvc.dtype)], dim=1)
    y = (history_bwc.to(work) * weight_cw.to(work).T).sum(1)
    if bias_c is not None:
        y = y + bias_c.to(work)
    window_bvc.copy_(history_bwc[:, 1:].detach())
    return F.silu(y).to(x_bc.dtype)


def with_history(x_blc, w: int, initial_window_bvc, seq_idx_bl):
    """x and seq_idx with the v samples before them: (b, v + l, c) and (b, v + l) or None."""
    b, _, c = x_blc.shape
    if initial_window_bvc is None:
        initial_window_bvc = x_blc.new_zeros(b, w - 1, c)
    assert initial_window_bvc.shape == (b, w - 1, c), initial_window_bvc.shape
    history_blc = torch.cat([initial_window_bvc.to(x_blc.dtype), x_blc], dim=1)
    if seq_idx_bl is not None:
        seq_idx_bl = torch.cat([seq_idx_bl[:, :1].expand(b, w - 1), seq_idx_bl], dim=1)
    return history_blc, seq_idx_bl


def final_window(history_blc, w: int, lengths_b, seq_idx_history):
    """The v samples that end at each row's last real one."""
    b, total, c = history_blc.shape
    if lengths_b is None and seq_idx_history is None:
        return history_blc[:, total - (w - 1) :]
    if lengths_b is None:
        lengths_b = torch.full((b,), total - (w - 1), device=history_blc.device)
    index_bv = lengths_b[:, None] + torch.arange(w - 1, device=history_blc.device)
    window = history_blc.gather(1, index_bv[..., None].expand(-1, -1, c))
    if seq_idx_history is not None:
        last_b1 = seq_idx_history.gather(1, lengths_b[:, None] + w - 2)
        window = window.where((seq_idx_history.gather(1, index_bv) == last_b1)[..., None], 0)
    return window


class CausalConv1d(nn.Conv1d):
    """`mamba.conv1d` of the checkpoint; calls the mixer's operators with its weights."""

    def __init__(self, config):
        c, bias = config.conv_dim, config.mamba_conv_bias
        super().__init__(c, c, config.mamba_d_conv, groups=c, bias=bias)

    def forward(self, x: Tensor, window_bvc=None, ops=None, step: bool = False, **options):
        """(b, l, c) -> (b, l, c), final window; step: (b, c) -> (b, c). No ops: as nn.Conv1d."""
        if ops is None:
            return super().forward(x)
        weight_cw = self.weight[:, 0]
        if step:
            return ops.causal_conv1d_step(x, window_bvc, weight_cw, self.bias)
        return ops.causal_conv1d(x, weight_cw, self.bias, initial_window_bvc=window_bvc, **options)

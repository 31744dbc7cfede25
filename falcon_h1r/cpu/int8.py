"""Linear layers in int8, for inference on a CPU: a quarter of float32's bytes, and faster.

Weights are int8 with a scale per output, w = scale * q, scale = max |w| / 127. Inputs are quantised
in every call to 8 bits with one scale and one zero for the whole call, as PyTorch's dynamic
quantisation does. So a token's result depends a little on what it is computed with: the other rows
of the batch, and where a prompt is cut. Each product has an error of about one per cent; about two
on a processor without VNNI, which adds products of 8 bits in 16, where they overflow unless inputs
have 7 bits.
"""

import warnings

import torch
from torch import Tensor, nn

from .forward_only import forward_only

SEVEN_BITS = not torch.cpu._is_vnni_supported()  # of inputs


class Int8Linear(nn.Module):
    """An `nn.Linear` without gradients that holds its weights packed in int8."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        bias = None if linear.bias is None else linear.bias.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # The packed weights know no other way in; `unusable` says when a release has none.
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            q = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(q, bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(
            f"{prefix}weight is packed in int8: a state_dict, and so saving a checkpoint or a "
            f"cache, needs the model as it was before use_int8"
        )

    @forward_only
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in x's dtype."""
        rows = x.float().reshape(-1, self.in_features)
        y = torch.ops.quantized.linear_dynamic(rows, self.packed, SEVEN_BITS)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def unusable(model) -> str:
    """Why int8 cannot serve this model, or ""."""
    if model.device.type != "cpu":
        return f"int8 layers compute on a CPU, the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"int8 layers serve float32 and bfloat16, the model is {model.dtype}"
    if not hasattr(torch, "quantize_per_channel") or torch.backends.quantized.engine == "none":
        return "this build of PyTorch has no dynamic int8 layers"
    return ""


@torch.no_grad()
def use_int8(model):
    """Put every linear layer of `model`, the head too, in int8, in place; returns the model.

    Embedding, norms, convolutions, scan and attention stay in the model's dtype. The model cannot
    be trained, saved or moved any more. Raises ValueError with the reason where int8 cannot serve.
    """
    if reason := unusable(model):
        raise ValueError(f"use_int8: {reason}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
    if model.config.tie_word_embeddings:
        table = model.model["embed_tokens"].weight
        head = nn.Linear(*reversed(table.shape), bias=False, device="meta")
        head.weight = table
        model.lm_head = Int8Linear(head)
    return model

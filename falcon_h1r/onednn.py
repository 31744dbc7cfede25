"""Linear layers through oneDNN, for inference on a CPU.

`torch.nn.functional.linear` hands bfloat16 weights to oneDNN as they lie, to be brought into its
own order in every call; here that is done once. It multiplies float32 with MKL, which on AMD
processors reads a matrix for one row with one thread, unless the matrix lies the other way round,
and is slower than oneDNN for several rows; here the weights lie that way, and oneDNN takes all but
single rows. Results are those of the same product: only the order of sums may differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneDNNLinear(nn.Module):
    """An `nn.Linear` without gradients: `weight` with its columns in sequence in float32, packed in
    bfloat16."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if linear.weight.dtype == torch.bfloat16:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        else:
            columns = linear.weight.detach().T.contiguous()
            self.packed, self.weight = None, nn.Parameter(columns.T, requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.packed is not None:
            raise ValueError(
                f"{prefix}weight is packed for oneDNN: a state_dict, and so saving a checkpoint or "
                f"a cache, needs the model as it was before use_onednn"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if x.numel() == self.in_features:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def unusable(model) -> str:
    """Why oneDNN cannot serve this model, or ""."""
    if model.device.type != "cpu":
        return f"oneDNN computes on a CPU, the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN serves float32 and bfloat16, the model is {model.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return ""


@torch.no_grad()
def use_onednn(model):
    """Put every linear layer of `model` through oneDNN, in place; returns the model.

    A bfloat16 model keeps its packed weights alone, layer by layer in place of the others (a tied
    head gets packed ones beside the embedding): it cannot be trained, saved or moved any more. A
    float32 model keeps its weights, but gets no gradients. Raises ValueError with the reason where
    oneDNN cannot serve it.
    """
    if reason := unusable(model):
        raise ValueError(f"use_onednn: {reason}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, OneDNNLinear(child))
    if model.config.tie_word_embeddings and model.dtype == torch.bfloat16:
        table = model.model["embed_tokens"].weight
        head = nn.Linear(*reversed(table.shape), bias=False, device="meta")
        head.weight = table
        model.lm_head = OneDNNLinear(head)
    return model

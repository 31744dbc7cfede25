"""Linear layers for inference on a CPU: through oneDNN, and streamed in a compiled step.

`torch.nn.functional.linear` hands bfloat16 weights to oneDNN as they lie, to be brought into its
own order in every call; here that is done once. It multiplies float32 with MKL, which on AMD
processors reads a matrix for one row with one thread, unless the matrix lies the other way round,
and is slower than oneDNN for several rows; here the weights lie that way, and oneDNN takes all but
single rows. Results are those of the same product: only the order of sums may differ.

No library reads a matrix for one row as fast as memory gives it. Under `torch.compile`
(`compiled.py`) a layer with `stream` is written as products and sums instead, which the
compiler turns into one pass over the weights by all threads.
"""

import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import compute_dtype
from .forward_only import forward_only

# Up to this many rows a compiled step streams the weights. Beyond, arithmetic is the limit, at
# which oneDNN is better: from 3 rows on with packed bfloat16, from 9 in float32.
STREAMED_ROWS = {torch.float32: 8, torch.bfloat16: 2}

_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_keys = itertools.count()


class OneDNNLinear(nn.Module):
    """An `nn.Linear` without gradients.

    bfloat16: `packed` in oneDNN's order; float32: `weight` with its columns in sequence, or as it
    is where it is streamed or the embedding's. stream: `weight` stays as it is, beside the packed
    one in bfloat16, for compiled steps.
    """

    def __init__(self, linear: nn.Linear, stream: bool = False, tied: bool = False):
        super().__init__()
        self.tied = tied  # the weights are the embedding's, which a state_dict holds once
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.packed, weight = linear.bias, None, linear.weight.detach()
        self.transposed = not (stream or tied or weight.dtype == torch.bfloat16)
        if weight.dtype == torch.bfloat16:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        elif self.transposed:
            weight = weight.T.contiguous().T
        self.streamed_rows = STREAMED_ROWS[weight.dtype] if stream else 0
        if stream or self.packed is None:
            self.weight = nn.Parameter(weight, requires_grad=False)
        # A compiled graph is shared by all layers: a layer is its input, as a number.
        key = next(_keys)
        _layers[key] = self
        self.register_buffer("key", torch.tensor(key), persistent=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.packed is not None:
            raise ValueError(
                f"{prefix}weight is packed for oneDNN: a state_dict, and so saving a checkpoint or "
                f"a cache, needs the model as it was before use_onednn"
            )
        if not self.tied:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    @forward_only
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = x.numel() // self.in_features
        if torch.compiler.is_compiling():
            if rows <= self.streamed_rows:
                return streamed_linear(x, self.weight, self.bias)
            return torch.ops.falcon_h1r.onednn_linear(x, self.key, self.out_features)
        if rows == 1 and self.transposed:
            return F.linear(x, self.weight, self.bias)
        return _library_product(self, x)


def streamed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias as sums of products, for a few rows and Inductor; sums in `compute_dtype`.

    x: (..., k); weight: (n, k); bias: (n,) or None. Returns (..., n) in x's dtype. All rows are
    summed in one loop over the weights.
    """
    work = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(work)
    # Makes a buffer of x: else what leads to it is computed again for each of the n outputs.
    rows = rows.as_strided(rows.shape, rows.stride())
    # Two outputs at a time: an element of x is loaded once for both, and what a sum costs beside
    # its products is shared.
    parts = weight.to(work).chunk(2)
    y = torch.stack([torch.cat([(part * row).sum(-1) for part in parts]) for row in rows.unbind()])
    if bias is not None:
        y = y + bias.to(work)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


# A graph cannot hold packed weights, and has MKL for others: both are found by their layer's key.
# Defined without `custom_op`, whose checks take three times as long as the call, some two hundred
# times a step.
torch.library.define(
    "falcon_h1r::onednn_linear", "(Tensor x, Tensor key, int out_features) -> Tensor"
)


@torch.library.impl("falcon_h1r::onednn_linear", "CPU")
def _packed_linear(x: Tensor, key: Tensor, out_features: int) -> Tensor:
    return _library_product(_layers[key.item()], x)


def _library_product(layer: OneDNNLinear, x: Tensor) -> Tensor:
    weight = layer.weight if layer.packed is None else layer.packed
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


@torch.library.register_fake("falcon_h1r::onednn_linear")
def _(x, key, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


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
def use_onednn(model, stream: bool = False):
    """Put every linear layer of `model` through oneDNN, in place; returns the model.

    A bfloat16 model keeps its packed weights alone, layer by layer in place of the others (a tied
    head gets packed ones beside the embedding): it cannot be trained, saved or moved any more. A
    float32 model keeps its weights, but gets no gradients. stream: as the compiled step of
    `compiled.py` wants the layers; bfloat16 weights are then held twice. Raises
    ValueError with the reason where oneDNN cannot serve it.
    """
    if reason := unusable(model):
        raise ValueError(f"use_onednn: {reason}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, OneDNNLinear(child, stream))
    if model.config.tie_word_embeddings:
        table = model.model["embed_tokens"].weight
        head = nn.Linear(*reversed(table.shape), bias=False, device="meta")
        head.weight = table
        model.lm_head = OneDNNLinear(head, stream, tied=True)
    return model

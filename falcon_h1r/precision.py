"""The precision policy, in one place; docs/precision.md lists each deviation from transformers.

Weights and activations are in the model's dtype. Computed in `compute_dtype` (float32, or float64
in a float64 model): RMS statistics, the rotation of q and k, softmax, dt with its bias and
softplus, decays, the convolution's sum, the SSM state, the gate, and the head's multiplier. Rotary
angles and the cumulative sums behind the decays are float64. Decays are always the exponential of
a difference of sums, never a ratio of exponentials, which would overflow.
"""

import torch


def compute_dtype(of: torch.Tensor | torch.dtype) -> torch.dtype:
    """float32 for a tensor or dtype of float32 and narrower, float64 for float64."""
    return torch.promote_types(of if isinstance(of, torch.dtype) else of.dtype, torch.float32)


def scaled(tensor: torch.Tensor, multiplier: float) -> torch.Tensor:
    """tensor * multiplier, and no work where a multiplier is 1: see `checkpoint/fold.py`."""
    return tensor if multiplier == 1.0 else tensor * multiplier

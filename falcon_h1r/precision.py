"""The precision policy, in one place; docs/precision.md lists each deviation from transformers.

Weights and activations are in the model's dtype. Computed in `compute_dtype` (float32, or float64
in a float64 model): RMS statistics, the rotation of q and k, softmax, dt with its bias and
softplus, decays, the convolution's sum, the SSM state, the gate, and the head's multiplier. Rotary
angles and the cumulative sums behind the decays are float64. Decays are always the exponential of
a difference of sums, never a ratio of exponentials, which would overflow.

Under torch.autocast linear layers alone multiply in its dtype. What they return is widened to the
model's dtype again, but for q, k and v. Operators that hold a product run with autocast off.
"""

from collections.abc import Callable

import torch


def compute_dtype(of: torch.Tensor | torch.dtype) -> torch.dtype:
    """float32 for a tensor or dtype of float32 and narrower, float64 for float64."""
    return torch.promote_types(of if isinstance(of, torch.dtype) else of.dtype, torch.float32)


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device: products would take its dtype."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(operator: Callable, **arguments):
    """operator(**arguments), of which the first is a tensor, with torch.autocast off."""
    with torch.autocast(next(iter(arguments.values())).device.type, enabled=False):
        return operator(**arguments)


def scaled(tensor: torch.Tensor, multiplier: float) -> torch.Tensor:
    """tensor * multiplier, and no work where a multiplier is 1: see `checkpoint/fold.py`."""
    return tensor if multiplier == 1.0 else tensor * multiplier

"""Kernels count along the last axis in int32: what does not fit is refused before a launch."""

import pytest
import torch

from falcon_h1r.ops import TRITON


def far(*shape, step=2**23):
    """Without memory; elements of the last axis stand `step` apart."""
    strides = (1,) * (len(shape) - 1) + (step,)
    return torch.empty_strided(shape, strides, device="meta")


def test_channels_too_far_apart():
    weight = torch.empty(300, 4, device="meta")
    calls = {
        "rms_norm": lambda x: TRITON.rms_norm(x, weight[:, 0], 1e-5),
        "gated_rms_norm": lambda x: TRITON.gated_rms_norm(x, x, weight[:, 0], 1e-5),
        "causal_conv1d": lambda x: TRITON.causal_conv1d(x, weight),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"channels x stride < 2\^31"):
            call(far(1, 4, 300))
        call(far(1, 4, 300, step=2**20))

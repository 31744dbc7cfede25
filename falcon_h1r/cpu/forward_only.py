"""Layers of libraries that have no backward: a gradient through them is refused, not lost."""

import functools

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, name: str) -> Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(f"{ctx.name} has no gradient: train the model before its layers change")


def forward_only(forward):
    """A module's forward whose result may be looked at, and not differentiated."""

    @functools.wraps(forward)
    def guarded(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return forward(self, x)
        with torch.no_grad():
            y = forward(self, x)
        return _Refused.apply(x, y, type(self).__name__)

    return guarded

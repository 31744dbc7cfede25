"""Layouts in which the model, or a very large batch, hands tensors to the kernels."""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from interpret_memory import LARGE, zeros


def inside_projection(t, before, after):
    """A copy of t (..., c) as columns of a wider tensor, as a segment of in_proj's output is.

    NaN stands in the `before` columns to its left and the `after` columns to its right.
    """
    left, right = (t.new_full((*t.shape[:-1], n), torch.nan) for n in (before, after))
    return torch.cat([left, t, right], dim=-1)[..., before : before + t.shape[-1]]


def far_apart(t, stride=2**30):
    """A copy of t whose first axis has a stride of 2^30 elements: three rows pass int32.

    The memory between the rows is reserved by the system, never touched.
    """
    elements = (t.shape[0] - 1) * stride + t[0].numel()
    memory = reserved(elements, dtype=t.dtype)
    return memory.as_strided(t.shape, (stride, *t[0].contiguous().stride())).copy_(t)


def reserved(*shape, dtype):
    """Zeros of any size, of which only the pages that are touched take memory."""
    memory = zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


@contextlib.contextmanager
def reserved_outputs():
    """Within, large tensors of torch.empty and torch.empty_like are `reserved`."""

    def without_memory(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            like = make(*args, **{**kwargs, "device": "meta"})
            large = like.nbytes >= LARGE
            return reserved(*like.shape, dtype=like.dtype) if large else make(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, without_memory(getattr(torch, name)))
        yield

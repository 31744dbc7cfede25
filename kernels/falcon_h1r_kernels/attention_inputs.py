"""What prefill and decode attention refuse, and how far their blocks reach.

Axes: b batch, h query heads, j key/value heads, s keys, e head size.
"""

import triton.language as tl
from torch import Tensor

from .launch import next_power_of_2

MAX_HEAD_DIM = 256


def check_keys(operator: str, q: Tensor, k_bjse: Tensor, v_bjse: Tensor) -> None:
    """Raise ValueError unless q (b, h, ..., e), keys and values belong together."""
    b, h, e = q.shape[0], q.shape[1], q.shape[-1]
    if k_bjse.ndim != 4 or k_bjse.shape != v_bjse.shape or k_bjse.shape[1] == 0:
        raise ValueError(
            f"{operator}: keys {tuple(k_bjse.shape)} and values {tuple(v_bjse.shape)}, "
            f"expected one shape (b, j, s, e)"
        )
    if (k_bjse.shape[0], k_bjse.shape[3]) != (b, e) or h % k_bjse.shape[1]:
        raise ValueError(
            f"{operator}: keys {tuple(k_bjse.shape)} for queries {tuple(q.shape)}: batch and head "
            f"size must agree and the key heads divide the query heads"
        )
    if not q.dtype == k_bjse.dtype == v_bjse.dtype:
        raise ValueError(
            f"{operator}: queries {q.dtype}, keys {k_bjse.dtype}, values {v_bjse.dtype}, "
            f"expected one dtype"
        )
    if not 1 <= e <= MAX_HEAD_DIM:
        raise ValueError(f"{operator}: head size {e}, expected 1 to {MAX_HEAD_DIM}")


def offset_type(block: int, *tensors: Tensor):
    """The integer type in which offsets inside a block of `block` rows cannot overflow."""
    reach = max(
        block * abs(t.stride(-2)) + next_power_of_2(t.shape[-1]) * abs(t.stride(-1))
        for t in tensors
    )
    return tl.int32 if reach < 2**31 else tl.int64

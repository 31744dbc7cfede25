"""What the kernels with a step of the recurrence share: the step size, and the checks."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .activations import softplus
from .conv_parts import check_shape
from .launch import DTYPES, check_in_place

NO_LIMIT = (0.0, math.inf)


@triton.jit
def step_size(
    dt_ptr,
    dt_bias_ptr,
    head,
    dt_min,
    dt_max,
    HAS_DT_BIAS: tl.constexpr,
    HAS_DT_LIMIT: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
):
    """The step size at dt_ptr with the head's bias, softplus and limits, float32."""
    dt = tl.load(dt_ptr).to(tl.float32)
    if HAS_DT_BIAS:
        dt += tl.load(dt_bias_ptr + head).to(tl.float32)
    if DT_SOFTPLUS:
        dt = softplus(dt)
    if HAS_DT_LIMIT:
        dt = tl.clamp(dt, dt_min, dt_max, propagate_nan=tl.PropagateNan.ALL)
    return dt


def check_step(
    name: str,
    state_bhpn: Tensor,
    x_bhp: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    B_bgn: Tensor | None,
    C_bgn: Tensor | None,
    D_h: Tensor | None,
    dt_bias_h: Tensor | None,
    z_bhp: Tensor | None,
    groups: int,
) -> None:
    """Raise ValueError unless the tensors of a step fit its state, which can be updated."""
    if state_bhpn.ndim != 4:
        raise ValueError(f"{name}: state is {tuple(state_bhpn.shape)}, expected (b, h, p, n)")
    b, h, p, n = state_bhpn.shape
    if groups < 1 or h % groups:
        raise ValueError(f"{name}: {h} heads do not divide into {groups} groups")
    if state_bhpn.dtype not in DTYPES:
        raise ValueError(f"{name}: a state of {state_bhpn.dtype} is not served by the kernels")
    check_shape(name, "x", x_bhp, (b, h, p))
    check_shape(name, "dt", dt_bh, (b, h))
    for label, tensor in (("B", B_bgn), ("C", C_bgn)):
        check_shape(name, label, tensor, (b, groups, n))
    for label, tensor in (("A", A_h), ("D", D_h), ("dt_bias", dt_bias_h)):
        check_shape(name, label, tensor, (h,))
    check_shape(name, "z", z_bhp, (b, h, p))
    check_in_place(name, "state", state_bhpn)

"""`causal_conv1d_step` and `ssd_step` in one launch: the mixer's decode step between projections.

It saves a launch, and the trip of x, B and C through memory. Its price: every program convolves the
channels of B and C of its group again, 8 KiB of samples, window and weights that come from the
caches, to 8 KiB of state, read and written. On an H100, H1R-7B, 64 rows take 144 microseconds to
the 146 of both launches. See `ssd_step` for the kernel. Axes as there.
"""

from torch import Tensor

from .launch import operator
from .ssd_step import NO_LIMIT, Conv, launch_ssd_step


@operator("conv_ssd_step", mutates_args={"state_bhpn", "new_window_bvc"})
def _conv_ssd_step_op(
    state_bhpn: Tensor,
    xBC_bc: Tensor,
    window_bvc: Tensor,
    new_window_bvc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    D_h: Tensor | None,
    groups: int,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    z_bhp: Tensor | None,
    config: str,
) -> Tensor:
    conv = Conv(xBC_bc, window_bvc, new_window_bvc, weight_cw, bias_c)
    dt_limit = (dt_min, dt_max)
    return launch_ssd_step(
        state_bhpn,
        None,
        dt_bh,
        A_h,
        None,
        None,
        D_h,
        dt_bias_h,
        dt_softplus,
        dt_limit,
        z_bhp,
        config,
        groups,
        conv,
    )


@_conv_ssd_step_op.register_fake
def _(state_bhpn, xBC_bc, *_):
    return xBC_bc.new_empty(state_bhpn.shape[:3])


def conv_ssd_step(
    state_bhpn: Tensor,
    xBC_bc: Tensor,
    window_bvc: Tensor,
    new_window_bvc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    dt_bh: Tensor,
    A_h: Tensor,
    D_h: Tensor | None = None,
    *,
    groups: int = 1,
    dt_bias_h: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    z_bhp: Tensor | None = None,
    config: str = "",
) -> Tensor:
    """`causal_conv1d_step` and `ssd_step` in one launch; x, B and C are not rounded between them.

    xBC_bc (b, c) with c = h p + 2 g n, channels of x, B, C in this order; weight_cw (c, w); bias_c
    (c,) or None. window_bvc (b, v, c) is read, the one that follows it is written to
    new_window_bvc: other memory, since all heads of a group read the channels of B and C. The rest
    as in `ssd_step`; y (b, h, p) is in xBC's dtype.
    """
    return _conv_ssd_step_op(
        state_bhpn,
        xBC_bc,
        window_bvc,
        new_window_bvc,
        weight_cw,
        bias_c,
        dt_bh,
        A_h,
        D_h,
        groups,
        dt_bias_h,
        dt_softplus,
        *dt_limit,
        z_bhp,
        config,
    )

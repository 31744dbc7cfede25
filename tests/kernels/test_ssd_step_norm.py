"""One token of the recurrence and its gated norm, against float64 beside torch in float32."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, assert_no_worse, assert_same, normal, strided
from falcon_h1r_kernels.ssd_step import ssd_step
from falcon_h1r_kernels.ssd_step_norm import CONFIGS, _default, _ssd_step_norm_op, ssd_step_norm
from layouts import far_apart, inside_projection
from models import rms_error

from falcon_h1r.ops import REFERENCE, TORCH

EPS = 0.1  # large enough to be seen


def inputs(b, h, p, g, n, dtype=torch.float32, state_dtype=torch.float32):
    """The tensors of ssd_step_norm, in its order."""
    x, B, C, z = (
        normal(b, *shape, seed=seed, dtype=dtype)
        for seed, shape in ((1, (h, p)), (4, (g, n)), (5, (g, n)), (7, (h, p)))
    )
    dt, A = F.softplus(normal(b, h, seed=2)), -(1 + normal(h, seed=3).abs() * 4)
    weight = (1 + normal(h * p, seed=8) / 4).to(dtype)
    state = normal(b, h, p, n, dtype=state_dtype)
    return state, x, dt, A, B, C, normal(h, seed=6), z, weight


def composed(ops, dtype, state, x, dt, A, B, C, D, z, weight, groups=1, before=False):
    """The two operators one after the other, everything but the state in `dtype`."""
    x, dt, A, B, C, z, weight = (t.to(dtype) for t in (x, dt, A, B, C, z, weight))
    y = ops.ssd_step(state, x, dt, A, B, C, None if D is None else D.to(dtype))
    flat = ops.gated_rms_norm(
        y.flatten(1)[:, None], z.flatten(1)[:, None], weight, EPS, groups, before
    )
    return flat.view(x.shape)


def check(state, *rest, groups=1, before=False, prepared=None, **extra):
    """Output and state are judged; `prepared`: the step sizes that raw ones must give.

    Two implementations stand beside the kernel, since one alone may be exact by luck.
    """
    steps = rest if prepared is None else (rest[0], prepared, *rest[2:])
    exact_state, states = state.double(), (state.clone(), state.clone())
    exact = composed(REFERENCE, torch.float64, exact_state, *steps, groups, before)
    peers = [
        (composed(table, torch.float32, own, *steps, groups, before).to(rest[0].dtype), own)
        for table, own in zip((REFERENCE, TORCH), states)
    ]
    independent, own = max(peers, key=lambda peer: rms_error(peer[0], exact))
    found = ssd_step_norm(state, *rest, EPS, n_groups=groups, norm_before_gate=before, **extra)
    assert found.is_contiguous()
    assert_no_worse(found, independent, exact)
    assert_no_worse(state, own, exact_state)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("before", [False, True])
def test_dtypes_and_orders(before, state_dtype, dtype):
    check(*inputs(6, 4, 16, 2, 32, dtype, state_dtype), groups=2, before=before)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "h, p, g, n",
    [(4, 1, 1, 1), (4, 32, 1, 64), (4, 33, 2, 31), (8, 5, 4, 33), (4, 64, 1, 128), (4, 9, 2, 100)],
)
def test_sizes_and_groups(h, p, g, n, groups):
    check(*inputs(2, h, p, g, n), groups=groups)


@pytest.mark.parametrize("groups, g", [(1, 3), (3, 1), (3, 2), (2, 3), (6, 6), (2, 6)])
def test_groups_of_the_norm_are_not_those_of_B_and_C(groups, g):
    # Three norm groups of two heads over two groups of B and C cut those in the middle.
    check(*inputs(2, 6, 5, g, 40), groups=groups, before=groups == 2)


@pytest.mark.parametrize("before", [False, True])
def test_groups_of_different_size_do_not_mix(before):
    state, x, *rest = inputs(2, 4, 16, 2, 32)
    state[:, :2] *= 100
    found = check(state, x, *rest, groups=2, before=before)
    assert float(found[:, 2:].square().mean()) > 0.05


def test_without_D():
    state, x, dt, A, B, C, _, z, weight = inputs(2, 4, 16, 2, 32)
    check(state, x, dt, A, B, C, None, z, weight)


@pytest.mark.parametrize("config", ["", *(config.name for config in CONFIGS)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_every_configuration_at_real_size(state_dtype, config):
    check(*inputs(1, 2, 128, 1, 256, torch.bfloat16, state_dtype), config=config)


@pytest.mark.parametrize("config", [config.name for config in CONFIGS])
@pytest.mark.parametrize("p, n", [(80, 256), (130, 250), (64, 600), (24, 40)])
def test_every_configuration_with_ragged_tiles(p, n, config):
    check(*inputs(2, 4, p, 2, n), groups=2, config=config)


@pytest.mark.parametrize("config", [config.name for config in CONFIGS])
@pytest.mark.parametrize("outer", [0, 2])
def test_either_order_of_axes(outer, config, monkeypatch):
    module = importlib.import_module("falcon_h1r_kernels.ssd_step_norm")
    monkeypatch.setattr(module, "OUTER", outer)
    check(*inputs(2, 6, 72, 2, 250), groups=3, config=config)


def test_y_is_not_rounded_before_the_norm():
    state, *rest = inputs(2, 4, 128, 1, 64, torch.bfloat16)
    wide = ssd_step_norm(state.clone(), *(t.float() for t in rest), EPS)
    narrow = ssd_step_norm(state, *rest, EPS)
    assert float((narrow != wide.bfloat16()).float().mean()) < 0.01


def test_y_is_of_the_state_before_it_is_rounded():
    state, *rest = inputs(1, 2, 16, 1, 64)
    narrow = state.bfloat16()
    expected = ssd_step_norm(narrow.float(), *rest, EPS)
    assert_same(ssd_step_norm(narrow, *rest, EPS), expected)


def test_the_state_is_that_of_ssd_step():
    state, *rest = inputs(2, 4, 24, 2, 48, torch.bfloat16)
    alone = state.clone()
    ssd_step(alone, *rest[:6])
    ssd_step_norm(state, *rest, EPS)
    assert_same(state, alone)


def test_strided_and_offset_inputs():
    state, *rest = inputs(2, 4, 16, 2, 32)
    expected, bias = state.clone(), normal(4, seed=9)
    out = ssd_step_norm(expected, *rest, EPS, n_groups=2, dt_bias_h=bias)
    for make in (*strided(state), lambda t: inside_projection(t, 8, 16)):
        again, *views = (make(t) for t in (state, *rest))
        found = ssd_step_norm(again, *views, EPS, n_groups=2, dt_bias_h=make(bias))
        assert_same(found, out)
        assert_same(again, expected)


def test_on_a_layer_of_a_strided_cache():
    state, *rest = inputs(2, 4, 16, 2, 32)
    expected = state.clone()
    out = ssd_step_norm(expected, *rest, EPS)
    states = normal(3, 2, 4, 16, 32, seed=9)
    before = states.clone()
    states[1] = state
    assert_same(ssd_step_norm(states[1], *rest, EPS), out)
    assert_same(states[1], expected)
    assert torch.equal(states[0], before[0]) and torch.equal(states[2], before[2])


def test_segments_of_projections():
    # As in the model: z, dt of in_proj's output, x, B and C of the convolution's.
    state, x, dt, A, B, C, D, z, weight = inputs(2, 4, 16, 2, 32)
    flat = torch.cat([x.flatten(1), B.flatten(1), C.flatten(1)], dim=1)
    x, B, C = flat.split([64, 64, 64], dim=1)
    z = inside_projection(z.flatten(1), 0, 196).unflatten(1, (4, 16))
    dt = inside_projection(dt, 256, 0)
    x, B, C = x.unflatten(1, (4, 16)), B.unflatten(1, (2, 32)), C.unflatten(1, (2, 32))
    check(state, x, dt, A, B, C, D, z, weight, groups=2)


def test_rows_that_lie_2_to_the_30_apart():
    state, x, dt, A, B, C, D, z, weight = inputs(3, 2, 4, 1, 8, torch.float16, torch.float16)
    x, dt, B, C, z = (far_apart(t) for t in (x, dt.half(), B, C, z))
    check(far_apart(state), x, dt, A, B, C, D, z, weight)


@pytest.mark.parametrize("config", ["warps8", "warps16"])
def test_heads_that_lie_2_to_the_30_apart(config):
    state, *rest = inputs(1, 4, 4, 2, 8, torch.float16, torch.float16)
    state = far_apart(state.transpose(0, 1)).transpose(0, 1)
    check(state, *rest, groups=2, config=config)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.9)])
def test_step_size_preparation(limit, softplus, with_bias):
    state, x, _, A, B, C, D, z, weight = inputs(3, 8, 16, 2, 16)
    raw = normal(3, 8, seed=7) * 6
    raw[0, :4] = torch.tensor([-12.0, 19.9, 20.1, 60.0])
    raw = raw if softplus else raw.abs()
    bias = normal(8, seed=8).abs() if with_bias else None
    dt = raw.double() if bias is None else raw.double() + bias.double()
    dt = (F.softplus(dt) if softplus else dt).clamp(*limit)
    A = A * 0.02  # so that large steps do not wipe the state
    check(
        state,
        *(x, raw, A, B, C, D, z, weight),
        groups=2,
        prepared=dt,
        dt_bias_h=bias,
        dt_softplus=softplus,
        dt_limit=limit,
    )


def test_gates_beyond_the_range_of_exp():
    state, x, dt, A, B, C, D, z, weight = inputs(1, 2, 16, 1, 16, torch.bfloat16)
    z[0, 0, :4] = torch.tensor([-200.0, -30.0, 30.0, 200.0])
    check(state.clone(), x, dt, A, B, C, D, z, weight)
    check(state, x, dt, A, B, C, D, z, weight, before=True)


def test_no_rows():
    state, *rest = inputs(0, 2, 4, 1, 8)
    assert ssd_step_norm(state, *rest, EPS).shape == (0, 2, 4)


def test_operator_registration():
    tensors = inputs(2, 4, 8, 2, 16)
    extras = (EPS, 2, True, tensors[6], True, 0.0, 1.0, "")
    torch.library.opcheck(_ssd_step_norm_op, (*tensors, *extras))
    state, x, dt, A, B, C, _, z, weight = tensors
    extras = (EPS, 1, False, None, False, 0.0, math.inf, "")
    z = inside_projection(z, 3, 2)
    torch.library.opcheck(_ssd_step_norm_op, (state, x, dt, A, B, C, None, z, weight, *extras))


def test_refusals():
    names = ("state_bhpn", "x_bhp", "dt_bh", "A_h", "B_bgn", "C_bgn", "D_h", "z_bhp", "weight_d")
    good = dict(zip(names, inputs(2, 4, 8, 2, 16)))
    state, x, dt, A, B, C, D, z, weight = good.values()
    for words, changed in (
        ("x is \\(2, 3, 8\\)", {"x_bhp": x[:, :3]}),
        ("dt is \\(2, 3\\)", {"dt_bh": dt[:, :3]}),
        ("A is \\(2,\\)", {"A_h": A[:2]}),
        ("B is \\(2, 2, 4\\)", {"B_bgn": B[..., :4]}),
        ("C is \\(2, 1, 16\\)", {"C_bgn": C[:, :1]}),
        ("D is \\(3,\\)", {"D_h": D[:3]}),
        ("dt_bias is \\(3,\\)", {"dt_bias_h": D[:3]}),
        ("z is \\(1, 4, 8\\)", {"z_bhp": z[:1]}),
        ("weight is \\(31,\\)", {"weight_d": weight[:31]}),
        ("4 heads .* 3 groups", {"B_bgn": normal(2, 3, 16), "C_bgn": normal(2, 3, 16)}),
        ("4 heads .* 3 groups of the norm", {"n_groups": 3}),
        ("4 heads .* 0 groups of the norm", {"n_groups": 0}),
        ("float64", {"state_bhpn": state.double()}),
        ("float64", {"x_bhp": x.double()}),
        ("float64", {"z_bhp": z.double()}),
        ("float64", {"weight_d": weight.double()}),
        ("torch.int32 is not served", {"state_bhpn": state.int()}),
        ("expanded", {"state_bhpn": state[:1].expand(2, -1, -1, -1)}),
        ("there are: warps8", {"config": "x"}),
    ):
        with pytest.raises(ValueError, match=words):
            ssd_step_norm(**good | {"eps": EPS} | changed)


def test_the_default_leaves_each_program_a_processor_where_it_can():
    assert [_default(programs) for programs in (1, 132, 133, 512)] == 2 * ["warps16"] + 2 * [
        "warps8"
    ]

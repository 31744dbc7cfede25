"""One token of the recurrence, with what is fused into it, against float64 beside REFERENCE."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, assert_no_worse, assert_same, normal, strided
from falcon_h1r_kernels.conv_ssd_step import _conv_ssd_step_op, conv_ssd_step
from falcon_h1r_kernels.ssd_step import CONFIGS, _ssd_step_op, ssd_step
from layouts import far_apart, inside_projection

from falcon_h1r.ops import REFERENCE, TORCH

MODEL_EXTRAS = {"dt_softplus": True, "dt_limit": (0.01, 1.5)}


def inputs(b, h, p, g, n, dtype=torch.float32, state_dtype=torch.float32):
    """The arguments of ssd_step, in its order; D is in them."""
    dt = F.softplus(normal(b, h, seed=2))
    A = -(1 + normal(h, seed=3).abs() * 4)
    x, B, C = (
        normal(b, *shape, seed=seed, dtype=dtype)
        for seed, shape in ((1, (h, p)), (4, (g, n)), (5, (g, n)))
    )
    return normal(b, h, p, n, dtype=state_dtype), x, dt, A, B, C, normal(h, seed=6)


def double(*tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def check(state, *rest, config="", **extra):
    """The state is updated in place; y and state are judged."""
    exact_state, torch_state = state.double(), state.clone()
    exact = REFERENCE.ssd_step(exact_state, *double(*rest))
    torchs = REFERENCE.ssd_step(torch_state, *rest)
    found = ssd_step(state, *rest, config=config, **extra)
    assert_no_worse(found, torchs, exact)
    assert_no_worse(state, torch_state, exact_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_dtypes(state_dtype, dtype):
    check(*inputs(2, 4, 16, 2, 32, dtype, state_dtype))


@pytest.mark.parametrize(
    "h, p, g, n",
    [(1, 1, 1, 1), (4, 32, 1, 64), (4, 33, 2, 31), (4, 5, 4, 33), (2, 64, 1, 128), (8, 9, 2, 100)],
)
def test_sizes_and_groups(h, p, g, n):
    check(*inputs(2, h, p, g, n))


def test_without_D():
    check(*inputs(2, 4, 16, 2, 32)[:-1])


@pytest.mark.parametrize("config", ["", *(config.name for config in CONFIGS)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_every_configuration_at_real_size(state_dtype, config):
    check(*inputs(1, 2, 128, 1, 256, torch.bfloat16, state_dtype), config=config)


def test_many_rows_take_the_default_of_large_states():
    check(*inputs(9, 4, 128, 1, 256, torch.bfloat16))


def test_y_is_of_the_state_before_it_is_rounded():
    state, x, dt, A, B, C, D = inputs(1, 2, 16, 1, 64)
    narrow = state.bfloat16()
    expected = ssd_step(narrow.float(), x, dt, A, B, C, D)
    assert_same(ssd_step(narrow, x, dt, A, B, C, D), expected)


def test_on_a_layer_of_a_strided_cache():
    state, *rest = inputs(2, 4, 16, 2, 32)
    expected = state.clone()
    y = ssd_step(expected, *rest)
    states = normal(3, 2, 4, 16, 32, seed=9)
    before = states.clone()
    states[1] = state
    assert_same(ssd_step(states[1], *rest), y)
    assert_same(states[1], expected)
    assert torch.equal(states[0], before[0]) and torch.equal(states[2], before[2])
    for make in (*strided(state), lambda t: inside_projection(t, 8, 8)):
        view = make(state)
        assert_same(ssd_step(view, *rest), y)
        assert_same(view, expected)


def test_strided_and_offset_inputs():
    state, x, dt, A, B, C, D = inputs(2, 4, 16, 2, 32)
    expected = state.clone()
    y = ssd_step(expected, x, dt, A, B, C, D, z_bhp=x, dt_bias_h=D)
    for make in (*strided(x), lambda t: inside_projection(t, 8, 16)):
        a = [make(t) for t in (x, dt, A, B, C, D, D)]
        again = state.clone()
        found = ssd_step(again, *a[:-1], z_bhp=make(x), dt_bias_h=a[-1])
        assert_same(found, y)
        assert_same(again, expected)


def test_segments_of_one_projection():
    # As in the model: x, B and C are segments of the convolution's output, dt one of in_proj's.
    state, x, dt, A, B, C, D = inputs(2, 4, 16, 2, 32)
    flat = torch.cat([dt, x.flatten(1), B.flatten(1), C.flatten(1), dt * torch.nan], dim=1)
    dt, x, B, C, _ = flat.split([4, 64, 64, 64, 4], dim=1)
    check(
        state, x.unflatten(1, (4, 16)), dt, A, B.unflatten(1, (2, 32)), C.unflatten(1, (2, 32)), D
    )


def test_rows_that_lie_2_to_the_30_apart():
    state, x, dt, A, B, C, D = inputs(3, 2, 4, 1, 8, torch.float16, torch.float16)
    x, B, C = far_apart(x), far_apart(B), far_apart(C)
    check(far_apart(state), x, dt, A, B, C, D)
    state, *rest = inputs(1, 4, 4, 2, 8, torch.float16, torch.float16)
    check(far_apart(state.transpose(0, 1)).transpose(0, 1), *rest)


def prepared(dt, bias=None, softplus=False, limit=(0.0, math.inf)):
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.9)])
def test_step_size_preparation(limit, softplus, with_bias):
    state, x, _, A, B, C, D = inputs(3, 8, 32, 2, 16)
    raw = normal(3, 8, seed=7) * 6
    raw[0, :4] = torch.tensor([-12.0, 19.9, 20.1, 60.0])
    raw = raw if softplus else raw.abs()
    bias = normal(8, seed=8).abs() if with_bias else None
    A = A * 0.02  # so that large steps do not wipe the state
    exact_state, torch_state = state.double(), state.clone()
    exact_dt = prepared(raw.double(), bias, softplus, limit)
    exact = REFERENCE.ssd_step(exact_state, *double(x, exact_dt, A, B, C, D))
    dt = prepared(raw, bias, softplus, limit)
    torchs = TORCH.ssd_step(torch_state, x, dt, A, B, C, D)
    found = ssd_step(
        state, x, raw, A, B, C, D, dt_bias_h=bias, dt_softplus=softplus, dt_limit=limit
    )
    assert_no_worse(found, torchs, exact)
    assert_no_worse(state, torch_state, exact_state)


def test_small_step_sizes_keep_their_digits():
    # softplus(-15) = 3e-7: log(1 + exp(x)) in float32 would have one digit left.
    state, x, _, A, B, C, _ = inputs(1, 2, 4, 1, 16)
    raw, state = torch.full((1, 2), -15.0), torch.zeros_like(state)
    ssd_step(state, x, raw, A, B, C, dt_softplus=True)
    exact = F.softplus(raw.double())[0, 0] * x.double()[..., None] * B.double()[:, :, None]
    assert torch.allclose(state.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype):
    state, *rest = inputs(2, 4, 16, 2, 32, dtype)
    z = normal(2, 4, 16, seed=7, dtype=dtype) * 3
    exact = REFERENCE.ssd_step(state.double(), *double(*rest)) * F.silu(z.double())
    independent = TORCH.ssd_step(state.clone(), rest[0].float(), *rest[1:]) * F.silu(z.float())
    found = ssd_step(state, *rest, z_bhp=inside_projection(z, 4, 4))
    assert_no_worse(found, independent.to(dtype), exact)


def conv_inputs(b, h, p, g, n, w, dtype=torch.float32):
    c = h * p + 2 * g * n
    xBC, weight = normal(b, c, seed=10, dtype=dtype), normal(c, w, seed=11, dtype=dtype)
    return xBC, normal(b, w - 1, c, seed=12, dtype=dtype), weight, normal(c, seed=13, dtype=dtype)


def composed(ops, state, xBC, window, weight, bias, raw, A, D, g, dt_bias, z):
    """Convolution, step size, recurrence and gate one after another in one dtype."""
    b, h, p, n = state.shape
    y = ops.causal_conv1d_step(xBC, window, weight, bias)
    x, B, C = y.split([h * p, g * n, g * n], dim=1)
    x, B, C = x.unflatten(1, (h, p)), B.unflatten(1, (g, n)), C.unflatten(1, (g, n))
    dt = prepared(raw, dt_bias, True, MODEL_EXTRAS["dt_limit"])
    return ops.ssd_step(state, x, dt, A, B, C, D) * F.silu(z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "h, p, g, n, w", [(4, 16, 1, 32, 4), (4, 17, 2, 31, 4), (4, 5, 4, 8, 2), (2, 3, 1, 8, 1)]
)
def test_convolution_and_everything_fused(h, p, g, n, w, dtype):
    state, _, _, A, _, _, D = inputs(2, h, p, g, n)
    xBC, window, weight, bias = conv_inputs(2, h, p, g, n, w, dtype)
    raw, dt_bias, z = normal(2, h, seed=2), normal(h, seed=8), normal(2, h, p, seed=7, dtype=dtype)
    exact_state, exact_window = state.double(), window.double()
    exact = composed(
        REFERENCE,
        exact_state,
        *double(xBC)[0:1],
        exact_window,
        *double(weight, bias, raw, A, D),
        g,
        *double(dt_bias, z),
    )
    single_state, single_window = state.clone(), window.float().clone()
    independent = composed(
        TORCH,
        single_state,
        xBC.float(),
        single_window,
        weight.float(),
        bias.float(),
        raw,
        A,
        D,
        g,
        dt_bias,
        z.float(),
    )
    before, new_window = window.clone(), torch.empty_like(window)
    found = conv_ssd_step(
        state,
        inside_projection(xBC, 8, 4),
        window,
        new_window,
        weight,
        bias,
        raw,
        A,
        D,
        groups=g,
        dt_bias_h=dt_bias,
        z_bhp=z,
        **MODEL_EXTRAS,
    )
    assert_no_worse(found, independent.to(dtype), exact)
    assert_no_worse(state, single_state, exact_state)
    assert torch.equal(new_window, exact_window.to(dtype)) and torch.equal(window, before)


def test_convolution_at_real_size_without_bias_or_gate():
    state, _, dt, A, _, _, D = inputs(1, 2, 128, 1, 256)
    xBC, window, weight, _ = conv_inputs(1, 2, 128, 1, 256, 4, torch.bfloat16)
    new_window, state_2, window_2 = torch.empty_like(window), state.clone(), window.float()
    for config in ("", *(config.name for config in CONFIGS)):
        copy = state.clone()
        found = conv_ssd_step(copy, xBC, window, new_window, weight, None, dt, A, D, config=config)
    y = TORCH.causal_conv1d_step(xBC.float(), window_2, weight.float())
    x, B, C = (t[:, None] for t in y.split([256, 256, 256], dim=1))
    expected = TORCH.ssd_step(state_2, x.view(1, 2, 128), dt, A, B, C, D)
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-5)
    assert torch.allclose(copy, state_2, rtol=1e-5, atol=1e-5)
    assert torch.equal(new_window, window_2.bfloat16())


def test_padding_of_blocks_does_not_reach_results():
    # Biases past a head or a group would show in its neighbour's padding if they were loaded.
    state, _, dt, A, _, _, D = inputs(1, 2, 3, 1, 5)
    xBC, window, weight, bias = conv_inputs(1, 2, 3, 1, 5, 4)
    views = [inside_projection(t, 0, 16) for t in (xBC, window, bias)]
    new_window, again = torch.empty_like(window), torch.empty_like(window)
    state_2 = state.clone()
    y = conv_ssd_step(state, xBC, window, new_window, weight, bias, dt, A, D)
    y_2 = conv_ssd_step(state_2, views[0], views[1], again, weight, views[2], dt, A, D)
    assert_same(y, y_2)
    assert_same(state, state_2)
    assert torch.equal(new_window, again)


def test_no_rows():
    state, *rest = inputs(0, 2, 4, 1, 8)
    assert ssd_step(state, *rest).shape == (0, 2, 4)


def test_operator_registration():
    state, x, dt, A, B, C, D = inputs(2, 4, 8, 2, 16)
    extras = (D, True, 0.0, 1.0, x, "")
    torch.library.opcheck(_ssd_step_op, (state, x, dt, A, B, C, D, *extras))
    plain = (None, None, False, 0.0, math.inf, None, "")
    torch.library.opcheck(_ssd_step_op, (state, x, dt, A, B, C, *plain))
    xBC, window, weight, bias = conv_inputs(2, 4, 8, 2, 16, 4)
    conv = (xBC, window, torch.empty_like(window), weight, bias)
    torch.library.opcheck(_conv_ssd_step_op, (state, *conv, dt, A, D, 2, *extras))


def test_refusals():
    state, x, dt, A, B, C, D = inputs(2, 4, 8, 2, 16)
    xBC, window, weight, bias = conv_inputs(2, 4, 8, 2, 16, 4)
    wide = torch.cat([window, window], dim=1)

    def conv(x=xBC, old=window, new=None, groups=2):
        new = torch.empty_like(window) if new is None else new
        return conv_ssd_step(state, x, old, new, weight, bias, dt, A, D, groups=groups)

    for call, words in (
        (lambda: ssd_step(state, x[:, :3], dt, A, B, C), "x is \\(2, 3, 8\\)"),
        (lambda: ssd_step(state, x, dt[:, :3], A, B, C), "dt is \\(2, 3\\)"),
        (lambda: ssd_step(state, x, dt, A, B[..., :4], C), "B is \\(2, 2, 4\\)"),
        (lambda: ssd_step(state, x, dt, A, B, C[:, :1]), "C is \\(2, 1, 16\\)"),
        (lambda: ssd_step(state, x, dt, A[:2], B, C), "A is \\(2,\\)"),
        (lambda: ssd_step(state, x, dt, A, normal(2, 3, 16), C), "4 heads .* 3 groups"),
        (lambda: ssd_step(state, x, dt, A, B, C, z_bhp=x[:1]), "z is \\(1, 4, 8\\)"),
        (lambda: ssd_step(state.double(), x, dt, A, B, C), "torch.float64 is not served"),
        (lambda: ssd_step(state, x.double(), dt, A, B, C), "float64"),
        (lambda: ssd_step(state, x, dt, A, B, C, config="x"), "there are: tile2048"),
        (lambda: conv(x=xBC[:, :5]), "xBC is \\(2, 5\\)"),
        (lambda: conv(old=window[:, :2]), "window is \\(2, 2, 96\\)"),
        (lambda: conv(new=window[:, :2]), "new_window is \\(2, 2, 96\\)"),
        (lambda: conv(new=window), "other memory"),
        (lambda: conv(old=wide[:, :3], new=wide[:, 1:4]), "other memory"),
        (lambda: ssd_step(state[:1].expand(2, -1, -1, -1), x, dt, A, B, C), "expanded"),
        (lambda: conv(groups=3), "4 heads"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

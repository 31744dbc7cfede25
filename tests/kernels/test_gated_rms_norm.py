"""The gate and grouped norm against float64, beside TORCH in the same dtype."""

import pytest
import torch
from checks import DTYPES, assert_no_worse, normal, strided
from falcon_h1r_kernels.gated_rms_norm import CONFIGS, _gated_rms_norm_op, gated_rms_norm
from layouts import far_apart, inside_projection

from falcon_h1r.ops import REFERENCE, TORCH


def inputs(b, l, d, dtype=torch.float32):
    y, z = normal(b, l, d, dtype=dtype) * 2, normal(b, l, d, seed=1, dtype=dtype) * 2
    return y, z, normal(d, seed=2, dtype=dtype)


def exact(y, z, weight, *rest):
    weight = None if weight is None else weight.double()
    return REFERENCE.gated_rms_norm(y.double(), z.double(), weight, *rest)


def check(y, z, weight, *rest, **extra):
    found = gated_rms_norm(y, z, weight, *rest, **extra)
    torchs = TORCH.gated_rms_norm(y, z, weight, *rest)
    assert_no_worse(found, torchs, exact(y, z, weight, *rest))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups, width", [(1, 1), (1, 31), (2, 32), (4, 33), (2, 80)])
def test_norm_and_gate(groups, width, norm_before_gate, dtype):
    y, z, weight = inputs(2, 3, groups * width, dtype)
    check(y, z, weight, 0.1, groups, norm_before_gate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_different_size_do_not_mix(dtype):
    y, z, weight = inputs(2, 3, 64, dtype)
    y[..., 16:32] *= 100
    found = check(y, z, weight, 1e-5, 4)
    assert float(found[..., :16].square().mean()) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_alone(dtype):
    y, z, _ = inputs(2, 3, 40, dtype)
    z[0, 0, :4] = torch.tensor([-200.0, -30.0, 30.0, 200.0])
    check(y, z, None, 1e-5)
    check(y, z, None, 1e-5, 4, True)


def test_strided_and_offset_inputs():
    y, z, weight = inputs(3, 4, 48)
    expected = gated_rms_norm(y, z, weight, 1e-5, 2)
    for make in strided(y):
        assert torch.equal(gated_rms_norm(make(y), make(z), make(weight), 1e-5, 2), expected)
    for wide in (inside_projection(z, 8, 13), inside_projection(z, 0, 8), z.expand(3, 4, 48)):
        assert torch.equal(gated_rms_norm(y, wide, weight, 1e-5, 2), expected)


def test_rows_that_lie_2_to_the_30_apart():
    y, z, weight = inputs(3, 2, 16, torch.float16)
    expected = gated_rms_norm(y, z, weight, 1e-5)
    assert torch.equal(gated_rms_norm(far_apart(y), far_apart(z), weight, 1e-5), expected)


@pytest.mark.parametrize("config", ["", *(config.name for config in CONFIGS)])
def test_every_configuration_at_real_width(config):
    y, z, weight = inputs(1, 2, 3072, torch.bfloat16)
    check(y, inside_projection(z, 0, 3608), weight, 1e-5, config=config)


def test_groups_of_the_34b_model():
    check(*inputs(1, 2, 4096, torch.bfloat16), 1e-5, 2)


def test_no_rows():
    y, z, weight = inputs(2, 0, 16)
    assert gated_rms_norm(y, z, weight, 1e-5).shape == (2, 0, 16)


def test_operator_registration():
    y, z, weight = inputs(2, 3, 16)
    for arguments in ((weight, 1e-5, 2, False, ""), (None, 1e-5, 1, False, "")):
        torch.library.opcheck(_gated_rms_norm_op, (y, inside_projection(z, 3, 2), *arguments))


def test_refusals():
    y, z, weight = inputs(2, 3, 8)
    for call, words in (
        (lambda: gated_rms_norm(y, z, normal(7), 1e-5), "expected \\(8,\\)"),
        (lambda: gated_rms_norm(y, z[:, :2], weight, 1e-5), "z \\(2, 2, 8\\)"),
        (lambda: gated_rms_norm(y, z, weight, 1e-5, 3), "8 channels .* 3 groups"),
        (lambda: gated_rms_norm(y.double(), z, weight, 1e-5), "float64"),
        (lambda: gated_rms_norm(y, z, weight, 1e-5, config="x"), "there are: warps8, "),
    ):
        with pytest.raises(ValueError, match=words):
            call()

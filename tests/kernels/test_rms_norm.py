"""The RMSNorm kernel against float64, beside TORCH in the same dtype."""

import pytest
import torch
from checks import DTYPES, assert_no_worse, normal, strided
from falcon_h1r_kernels.rms_norm import CONFIGS, _rms_norm_op, rms_norm

from falcon_h1r.ops import REFERENCE, TORCH


def exact(x, weight, eps, residual=None):
    x = x.double() if residual is None else x.double() + residual.double()
    return REFERENCE.rms_norm(x, weight.double(), eps), x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 31, 32, 33, 80])
def test_rms_norm(d, dtype):
    x, weight = normal(2, 3, d, dtype=dtype) * 3, normal(d, seed=1, dtype=dtype)
    found, torchs = rms_norm(x, weight, 0.1), TORCH.rms_norm(x, weight, 0.1)
    assert_no_worse(found, torchs, exact(x, weight, 0.1)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(dtype):
    x, residual = normal(2, 5, 48, dtype=dtype), normal(2, 5, 48, seed=2, dtype=dtype)
    weight = normal(48, seed=1, dtype=dtype)
    y, total = rms_norm(x, weight, 1e-5, residual=residual)
    exact_y, exact_total = exact(x, weight, 1e-5, residual)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    assert_no_worse(y, TORCH.rms_norm(x + residual, weight, 1e-5), exact_y)
    assert_no_worse(total, x + residual, exact_total)


def test_strided_and_offset_inputs():
    x, residual = normal(3, 4, 48), normal(3, 4, 48, seed=2)
    weight = normal(48, seed=1)
    expected = rms_norm(x, weight, 1e-5, residual=residual)
    for make in strided(x):
        found = rms_norm(make(x), weight, 1e-5, residual=make(residual))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("config", [config.name for config in CONFIGS])
def test_every_configuration_at_real_width(config):
    x, weight = normal(2, 3072, dtype=torch.bfloat16), normal(3072, dtype=torch.bfloat16)
    found = rms_norm(x, weight, 1e-5, config=config)
    assert_no_worse(found, TORCH.rms_norm(x, weight, 1e-5), exact(x, weight, 1e-5)[0])


def test_operator_registration():
    x, residual, weight = normal(2, 48), normal(2, 48, seed=2), normal(48, seed=1)
    for extra in (None, residual):
        torch.library.opcheck(_rms_norm_op, (x, weight, 1e-5, extra, ""))


def test_refusals():
    x, weight = normal(2, 8), normal(8)
    for call, words in (
        (lambda: rms_norm(x, normal(7), 1e-5), "expected \\(8,\\)"),
        (lambda: rms_norm(x.double(), weight, 1e-5), "float64"),
        (lambda: rms_norm(x, weight, 1e-5, residual=normal(3, 8)), "residual \\(3, 8\\)"),
        (lambda: rms_norm(x, weight, 1e-5, config="fast"), "there are: warps8, "),
    ):
        with pytest.raises(ValueError, match=words):
            call()

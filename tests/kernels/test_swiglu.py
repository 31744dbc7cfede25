"""The SwiGLU gate against float64, beside TORCH in the same dtype."""

import pytest
import torch
from checks import DTYPES, assert_no_worse, normal, strided
from falcon_h1r_kernels.swiglu import CONFIGS, _swiglu_op, swiglu
from layouts import far_apart

from falcon_h1r.ops import REFERENCE, TORCH


def check(gate, up, *rest, **extra):
    exact = REFERENCE.swiglu(gate.double(), up.double(), *rest)
    found = swiglu(gate, up, *rest, **extra)
    assert_no_worse(found, TORCH.swiglu(gate, up, *rest), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 80, 1023, 1024, 1025, 2050])
def test_contiguous(width, dtype):
    gate, up = normal(2, 3, width, dtype=dtype) * 3, normal(2, 3, width, seed=1, dtype=dtype)
    gate.view(-1)[: min(width, 4)] = torch.tensor([-200.0, -30.0, 30.0, 200.0])[:width]
    check(gate, up, 0.2946278254943948)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 80, 1023, 1024, 1025, 2056])
def test_halves_of_one_projection(width, dtype):
    gate, up = (normal(3, 2, 2 * width, dtype=dtype) * 2).chunk(2, dim=-1)
    check(gate, up, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_up_multiplier(dtype):
    gate, up = normal(3, 50, dtype=dtype), normal(3, 50, seed=1, dtype=dtype)
    exact = REFERENCE.swiglu(gate.double(), up.double() * 0.03, 0.7)
    independent = (REFERENCE.swiglu(gate.float(), up.float(), 0.7) * 0.03).to(dtype)
    assert_no_worse(swiglu(gate, up, 0.7, up_multiplier=0.03), independent, exact)


def test_strided_and_offset_inputs():
    gate, up = normal(3, 4, 48), normal(3, 4, 48, seed=1)
    expected = swiglu(gate, up, 0.5)
    for make in strided(gate):
        assert torch.equal(swiglu(make(gate), make(up), 0.5), expected)
        assert torch.equal(swiglu(make(gate), up, 0.5), expected)
    assert torch.equal(swiglu(gate[0, 0], up[0, 0], 0.5), expected[0, 0])


def test_rows_that_lie_2_to_the_30_apart():
    gate, up = normal(3, 16, dtype=torch.float16), normal(3, 16, seed=1, dtype=torch.float16)
    assert torch.equal(swiglu(far_apart(gate), far_apart(up)), swiglu(gate, up))


def test_columns_that_lie_2_to_the_30_apart():
    gate, up = normal(2, 3, dtype=torch.float16), normal(2, 3, seed=1, dtype=torch.float16)
    assert torch.equal(swiglu(far_apart(gate.T).T, up), swiglu(gate, up))


@pytest.mark.parametrize("config", [config.name for config in CONFIGS])
def test_every_configuration_at_real_width(config):
    gate, up = normal(2, 2 * 12288, dtype=torch.bfloat16).chunk(2, dim=-1)
    check(gate, up, 0.2946278254943948, config=config)


def test_no_rows():
    assert swiglu(normal(2, 0, 8), normal(2, 0, 8)).shape == (2, 0, 8)


def test_operator_registration():
    gate, up = normal(3, 16).chunk(2, dim=-1)
    torch.library.opcheck(_swiglu_op, (gate, up, 0.5, 2.0, ""))


def test_refusals():
    gate = normal(2, 8)
    for call, words in (
        (lambda: swiglu(gate, normal(2, 7)), "up \\(2, 7\\)"),
        (lambda: swiglu(gate.double(), gate), "float64"),
        (lambda: swiglu(gate, gate, config="block2048"), "there are: block1024"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

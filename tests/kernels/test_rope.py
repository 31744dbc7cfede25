"""The rotation against float64, beside TORCH in the same dtype."""

import pytest
import torch
from checks import DTYPES, assert_no_worse, normal, strided
from falcon_h1r_kernels.rope import CONFIGS, _rope_op, rope
from layouts import far_apart

from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.rope import rotary_table


def tables(b, l, e, dtype=torch.float32):
    """Row i starts at position 1000 i + 7."""
    position_bl = torch.arange(l) + 1000 * torch.arange(b)[:, None] + 7
    return rotary_table(position_bl, e, 1e4, dtype)


def check(x, *rest, **extra):
    b, _, l, e = x.shape
    cos, sin = extra.pop("tables", None) or tables(b, l, e)
    exact = REFERENCE.rope(x.double(), cos.double(), sin.double(), *rest)
    assert_no_worse(rope(x, cos, sin, *rest, **extra), TORCH.rope(x, cos, sin, *rest), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", [2, 6, 64, 80, 128])
@pytest.mark.parametrize("h, l", [(1, 1), (5, 17)])
def test_head_sizes(h, l, e, dtype):
    check(normal(2, h, l, e, dtype=dtype))


@pytest.mark.parametrize("l", [1, 15, 16, 17, 33])
def test_lengths_around_the_block(l):
    check(normal(2, 2, l, 128, dtype=torch.bfloat16), 0.03069039848899946)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_table_for_all_rows(dtype):
    check(normal(3, 2, 5, 64, dtype=dtype), 0.5, tables=tables(1, 5, 64))
    check(normal(3, 2, 1, 64, dtype=dtype), 0.5, tables=tables(1, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_projections(dtype):
    # As the model makes them: heads of one fused projection, transposed.
    projection = normal(2, 9, 10 * 64, dtype=dtype)
    q, k, _ = projection.split([6 * 64, 2 * 64, 2 * 64], dim=-1)
    check(q.unflatten(-1, (6, 64)).transpose(1, 2))
    check(k.unflatten(-1, (2, 64)).transpose(1, 2), 0.03)


def test_strided_and_offset_inputs():
    x, (cos, sin) = normal(2, 3, 5, 48), tables(2, 5, 48)
    expected = rope(x, cos, sin, 0.5)
    for make in strided(x):
        assert torch.equal(rope(make(x), make(cos), make(sin), 0.5), expected)


def test_rows_that_lie_2_to_the_30_apart():
    x, table = normal(3, 3, 3, 16, dtype=torch.float16), tables(3, 3, 16)
    expected = rope(x, *table)
    assert torch.equal(rope(far_apart(x), *table), expected)
    for axis in (1, 2):
        far = far_apart(x.transpose(0, axis)).transpose(0, axis)
        assert torch.equal(rope(far, *table), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration_at_real_size(config):
    check(normal(2, 12, 18, 128, dtype=config.dtypes[0]), 0.03, config=config.name)


def test_no_positions():
    assert rope(normal(2, 3, 0, 8), *tables(2, 0, 8)).shape == (2, 3, 0, 8)


def test_operator_registration():
    x, (cos, sin) = normal(2, 5, 3, 8).transpose(1, 2), tables(1, 5, 8)
    torch.library.opcheck(_rope_op, (x, cos, sin, 0.5, ""))


def test_refusals():
    x, (cos, sin) = normal(2, 3, 5, 8), tables(2, 5, 8)
    for call, words in (
        (lambda: rope(normal(2, 3, 5, 7), cos, sin), "even head size"),
        (lambda: rope(x, cos[:, :4], sin[:, :4]), "tables \\(2 or 1, 5, 4\\)"),
        (lambda: rope(x, cos.double(), sin), "float32"),
        (lambda: rope(x.double(), cos, sin), "float64"),
        (lambda: rope(x, cos, sin, config="tile1024"), "there are: tile512"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

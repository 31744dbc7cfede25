"""The SSM's matrix and attention's: hand-made cases, and the operators' outputs built from them."""

import math

import pytest
import torch
from models import relative_error

from falcon_h1r.attention import attention_reference
from falcon_h1r.derived import probabilities_attention
from falcon_h1r.ssd import ssd_recurrent
from falcon_h1r.study.hidden_attention import carried, hidden_attention, reconstruct

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def normal(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype, groups, b=2, l=19, h=4, p=5, n=6):
    x, B, C = (
        normal(b, l, *s, seed=i, dtype=dtype)
        for i, s in enumerate(((h, p), (groups, n), (groups, n)))
    )
    dt = normal(b, l, h, seed=3, dtype=dtype).exp() * 0.1
    A, D = -normal(h, seed=4, dtype=dtype).exp(), normal(h, seed=5, dtype=dtype)
    return x, dt, A, B, C, D


def test_two_tokens_by_hand():
    """One head, one channel, state size 2: M[1, 0] = C_1 . B_0 exp(dt_1 A) dt_0."""
    dt = torch.tensor([[[0.5], [2.0]]], dtype=torch.float64)
    B = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]], dtype=torch.float64)
    C = torch.tensor([[[[1.0, 1.0]], [[-2.0, 0.5]]]], dtype=torch.float64)
    A = torch.tensor([-0.25], dtype=torch.float64)
    expected = [[3 * 0.5, 0], [(-2 + 1) * math.exp(-0.5) * 0.5, (-6 - 0.5) * 2]]
    found = hidden_attention(dt, A, B, C)
    assert found.shape == (1, 1, 2, 2)
    assert torch.allclose(
        found[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
    )
    state = torch.tensor([[[[2.0, 4.0]]]], dtype=torch.float64)
    expected = [math.exp(-0.125) * 6, math.exp(-0.625) * (-4 + 2)]
    found = carried(dt, A, C, state)
    assert found.shape == (1, 2, 1, 1)
    assert torch.allclose(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_scan_is_rebuilt_from_its_matrix(dtype, groups):
    x, dt, A, B, C, D = inputs(dtype, groups)
    M = hidden_attention(dt, A, B, C)
    assert M.dtype == dtype and not M.triu(1).any()
    y, _ = ssd_recurrent(x, dt, A, B, C, D)
    assert relative_error(reconstruct(M, x, D), y) < BOUNDS[dtype]
    y, _ = ssd_recurrent(x, dt, A, B, C)
    assert relative_error(reconstruct(M, x), y) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_state_before_the_first_token_adds_its_term(dtype, groups):
    x, dt, A, B, C, D = inputs(dtype, groups)
    state = normal(2, 4, 5, 6, seed=9, dtype=dtype)
    y, _ = ssd_recurrent(x, dt, A, B, C, D, initial_state_bhpn=state)
    found = reconstruct(hidden_attention(dt, A, B, C), x, D, carried(dt, A, C, state))
    assert relative_error(found, y) < BOUNDS[dtype]
    assert relative_error(reconstruct(hidden_attention(dt, A, B, C), x, D), y) > 0.01


def test_strong_decays_neither_overflow_nor_lose_weak_ones():
    """exp of a difference: a token that erases the state stands between weak decays."""
    x, dt, A, B, C, D = inputs(torch.float32, 1)
    dt[:, 7], A[:] = 1e4, -1.0
    M = hidden_attention(dt, A, B, C)
    assert M.isfinite().all()
    assert not M[:, :, 8:, :7].any()
    y, _ = ssd_recurrent(*(t.double() for t in (x, dt, A, B, C, D)))
    later = slice(8, None)
    assert relative_error(reconstruct(M, x, D)[:, later], y[:, later]) < 1e-5


def test_a_held_state_has_an_empty_row():
    """dt = 0 writes nothing and forgets nothing: the column is 0, the next rows skip it."""
    x, dt, A, B, C, D = inputs(torch.float64, 2)
    dt[:, 5] = 0
    M = hidden_attention(dt, A, B, C)
    assert not M[:, :, :, 5].any() and M[:, :, 5, :5].any()


def test_narrow_inputs_are_computed_in_float32():
    x, dt, A, B, C, D = inputs(torch.float64, 2)
    found = hidden_attention(dt.float(), A.float(), B.bfloat16(), C.bfloat16())
    assert found.dtype == torch.float32
    exact = hidden_attention(dt.float(), A.float(), B.bfloat16().double(), C.bfloat16().double())
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("s", [11, 17])
def test_attention_is_rebuilt_from_its_probabilities(s):
    """Four query heads on two key heads; with s > 11 the first keys come from a cache."""
    q, k, v = (normal(2, h, n, 8, seed=i) for i, (h, n) in enumerate(((4, 11), (2, s), (2, s))))
    past = torch.full((2,), s - 11)
    weights = probabilities_attention(q, k, query_offset_b=past)
    assert weights.shape == (2, 4, 11, s)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 11, dtype=torch.float64), atol=1e-14)
    assert not weights.triu(s - 11 + 1).any()
    expected = attention_reference(q, k, v, query_offset_b=past)
    assert relative_error(weights @ v.repeat_interleave(2, dim=1), expected) < 1e-14


def test_probabilities_by_hand():
    q = torch.tensor([[[[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]], dtype=torch.float64)
    share = math.e / (math.e + 1)  # scores 2 / sqrt(4) and 0
    expected = torch.tensor([[1.0, 0.0], [share, 1 - share]], dtype=torch.float64)
    assert torch.allclose(probabilities_attention(q, k)[0, 0], expected, rtol=1e-15, atol=0)

"""Half-lives, receptive fields, states: closed forms, and the recurrence itself."""

import math

import pytest
import torch
from models import relative_error

from falcon_h1r.ssd import ssd_recurrent
from falcon_h1r.study.timescales import decay, half_life, receptive_field, states


def test_half_of_a_state_is_left_after_the_half_life():
    A, dt = torch.tensor([-0.5, -4.0]), torch.tensor([0.01, 0.3]).expand(1, 1, 2)
    tokens = half_life(dt, A)
    assert tokens.shape == (1, 1, 2) and tokens.dtype == torch.float64
    assert torch.allclose(decay(dt, A) ** tokens, torch.tensor(0.5, dtype=torch.float64), rtol=1e-6)
    assert math.isclose(float(tokens[0, 0, 0]), math.log(2) / 0.005, rel_tol=1e-6)
    assert half_life(torch.zeros(1, 1, 2), A).isposinf().all()
    assert decay(torch.zeros(1, 1, 2), A).eq(1).all()


def test_receptive_fields_by_hand():
    rows = [
        [5.0, 0, 0, 0, 0],  # itself
        [0, 0, 0, 0, 0],  # reads nothing
        [9.0, -0.5, 0.5, 0, 0],  # one token, two steps ago, carries 90 %
        [-1.0, 1, -1, 1, 0],  # four of one size
        [0.05, 0.04, 0, -0.4, 0.5],  # the two latest
    ]
    reach = receptive_field(torch.tensor(rows, dtype=torch.float64))
    assert reach.latest.tolist() == [1, 0, 3, 4, 2]
    assert reach.fewest.tolist() == [1, 0, 1, 4, 2]
    wide = receptive_field(torch.tensor(rows, dtype=torch.float64), mass=0.95)
    assert wide.latest.tolist() == [1, 0, 3, 4, 5] and wide.fewest.tolist() == [1, 0, 2, 4, 3]


def test_the_reach_of_a_steady_decay():
    """A row of weights r^k: k tokens carry 1 - r^k of an endless one."""
    r, l = 0.8, 200
    steps = torch.arange(l)
    matrix = (r ** (steps[:, None] - steps).double()).tril()
    reach = receptive_field(matrix)
    assert int(reach.latest[-1]) == int(reach.fewest[-1]) == math.ceil(math.log(0.1, r))
    assert reach.latest.shape == (l,)
    heads = receptive_field(torch.stack([matrix, matrix.flip(0).flip(1).mT]))
    assert torch.equal(heads.latest[0], reach.latest)


def scan_inputs(b=2, l=13, h=4, p=5, n=6, g=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, B, C = draw(b, l, h, p), draw(b, l, g, n), draw(b, l, g, n)
    return x, draw(b, l, h).exp() * 0.2, -draw(h).exp(), B, C


@pytest.mark.parametrize("with_state", [False, True])
def test_norms_and_ranks_are_those_of_the_recurrences_states(with_state):
    x, dt, A, B, C = scan_inputs()
    before = torch.randn(2, 4, 5, 6, dtype=torch.float64) if with_state else None
    found = states(x, dt, A, B, before)
    assert found.positions.tolist() == list(range(13))
    for t in range(13):
        part = (x[:, : t + 1], dt[:, : t + 1], A, B[:, : t + 1], C[:, : t + 1])
        _, state = ssd_recurrent(*part, initial_state_bhpn=before)
        assert relative_error(found.norm[..., t], state.flatten(2).norm(dim=-1)) < 1e-14
        assert torch.equal(found.rank[..., t], torch.linalg.matrix_rank(state))
        share = torch.linalg.svdvals(state)
        share = share / share.sum(-1, keepdim=True)
        expected = (-(share * share.log()).nan_to_num().sum(-1)).exp()
        assert relative_error(found.effective_rank[..., t], expected) < 1e-12
    full = 5 if with_state else 1
    assert found.rank[..., 0].eq(full).all() and found.rank[..., -1].eq(5).all()


def test_effective_rank_counts_equal_directions():
    """Three orthogonal writes of the same size, nothing forgotten: singular values 2, 2, 2."""
    x = torch.eye(4, dtype=torch.float64)[:3, None, :][None]  # (1, 3, 1, 4)
    B = torch.eye(6, dtype=torch.float64)[1:4, None, :][None]
    dt, A = torch.full((1, 3, 1), 2.0, dtype=torch.float64), torch.tensor([-1e-300])
    found = states(x, dt, A.double(), B)
    assert torch.allclose(found.effective_rank[0, 0], torch.tensor([1.0, 2, 3]).double())
    assert found.rank[0, 0].tolist() == [1, 2, 3]
    assert torch.allclose(found.norm[0, 0], 2 * torch.tensor([1.0, 2, 3]).double().sqrt())


def test_a_zero_state_has_no_rank():
    x, dt, A, B, _ = scan_inputs()
    found = states(x * 0, dt, A, B)
    assert not found.norm.any() and not found.rank.any() and not found.effective_rank.any()


def test_ranks_of_long_texts_are_taken_at_even_places():
    x, dt, A, B, _ = scan_inputs(b=1, l=41, h=1, g=1)
    every, some = states(x, dt, A, B), states(x, dt, A, B, most=5)
    assert some.positions.tolist() == [0, 10, 20, 30, 40]
    assert torch.equal(some.effective_rank, every.effective_rank[..., some.positions])
    assert torch.equal(some.norm, every.norm)
    assert states(x, dt, A, B, most=1).positions.tolist() == [40]
    short = states(x[:, :12], dt[:, :12], A, B[:, :12], most=5)
    assert short.positions.tolist() == [0, 3, 6, 8, 11]

"""The random numbers and the draw. Seeds are fixed, so no test here can fail by chance."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_h1r.generation import uniform
from falcon_h1r.generation.sampling import draw


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Normal score of Pearson's statistic: |score| < 4 happens with probability 0.9999."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_numbers_are_in_the_half_open_interval_and_fine_grained():
    u = uniform(torch.arange(200_000), 0)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert u.unique().numel() == u.numel()
    assert torch.equal(u * 2**53, (u * 2**53).round())


def unsigned_reference(seed: int, position: int) -> float:
    """The same definition in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    step = 0x9E3779B97F4A7C15
    state = (mix((seed + step) & mask) + (position + 1) * step) & mask
    return (mix(state) >> 11) / 2**53


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_numbers_are_the_definitions(seed, position):
    assert float(uniform(torch.tensor([seed]), position)[0]) == unsigned_reference(seed, position)


def test_the_mixing_is_splitmix64():
    """First outputs of splitmix64 seeded with 0, as published with the algorithm."""
    from falcon_h1r.generation.sampling import _STEP, _mix, _signed

    states = torch.tensor([1, 2, 3]) * _signed(_STEP)
    outputs = [value % 2**64 for value in _mix(states).tolist()]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_number_depends_on_its_seed_and_position_alone():
    seeds = torch.tensor([5, 9, 2**63 - 1, 0])
    together = uniform(seeds, 7)
    for slot, seed in enumerate(seeds):
        assert uniform(seed[None], 7)[0] == together[slot]
    grid = uniform(seeds[:, None], torch.arange(10))
    assert torch.equal(grid[:, 7], together)


@pytest.mark.parametrize("kind", ["positions_of_a_seed", "seeds_in_a_row", "distant_seeds"])
def test_numbers_are_uniform(kind):
    count, bins = 200_000, 1000
    u = {
        "positions_of_a_seed": lambda: uniform(torch.tensor([3]), torch.arange(count)),
        "seeds_in_a_row": lambda: uniform(torch.arange(count), 11),
        "distant_seeds": lambda: uniform(torch.arange(count) * 2**43, 0),
    }[kind]()
    counts = torch.histc(u, bins, 0, 1)
    assert abs(chi_square(counts, torch.full((bins,), count / bins))) < 4


@pytest.mark.parametrize(("seed_step", "position_step"), [(0, 1), (1, 0), (1, 1), (1, -1), (64, 0)])
def test_pairs_of_neighbours_are_independent(seed_step, position_step):
    seeds, positions = torch.arange(1000, 1400)[:, None], torch.arange(10, 510)
    first = uniform(seeds, positions).flatten()
    second = uniform(seeds + seed_step, positions + position_step).flatten()
    side = 20
    cells = (first * side).long() * side + (second * side).long()
    counts = cells.bincount(minlength=side * side).double()
    assert abs(chi_square(counts, torch.full_like(counts, len(first) / side**2))) < 4
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / len(first) ** 0.5


def test_every_bit_of_the_number_is_fair():
    integers = (uniform(torch.arange(100_000), 1) * 2**53).long()
    for bit in range(53):
        share = float(((integers >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 4 * 0.5 / 100_000**0.5, bit


def test_drawn_frequencies_are_the_probabilities():
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 60, generator=generator)
    tokens = draw(logits.expand(count, -1), uniform(torch.arange(count), 0))
    expected = logits[0].double().softmax(0) * count
    assert abs(chi_square(tokens.bincount(minlength=60).double(), expected)) < 4


def test_the_draw_inverts_the_cumulative_distribution_in_order_of_ids():
    # Four tokens of exactly 1/4 each.
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0, -torch.inf, 0.0, -torch.inf]])
    quarter = 0.25 - 2**-54
    for u, token in [(0, 0), (quarter, 0), (0.25, 2), (0.5, 3), (0.75, 5), (1 - 2**-53, 5)]:
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_masked_tokens_are_never_drawn(u, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 30, generator=generator)
    allowed = torch.rand(4, 30, generator=generator) < 0.2
    allowed[:, 17] = True
    tokens = draw(logits.masked_fill(~allowed, -torch.inf), torch.full((4,), u).double())
    assert allowed.gather(1, tokens[:, None]).all()


def test_the_extreme_numbers_stay_inside_a_large_vocabulary():
    logits = torch.randn(2, 130_048, generator=torch.Generator().manual_seed(2))
    for u in (0.0, 1 - 2**-53):
        tokens = draw(logits, torch.full((2,), u, dtype=torch.float64))
        assert (tokens >= 0).all() and (tokens < 130_048).all()


def test_a_rows_draw_does_not_depend_on_its_neighbours_or_its_slot():
    generator = torch.Generator().manual_seed(4)
    logits, seeds = torch.randn(6, 97, generator=generator), torch.arange(6) * 31
    together = draw(logits, uniform(seeds, 3))
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        order = torch.tensor(order)
        assert torch.equal(draw(logits[order], uniform(seeds[order], 3)), together[order])
    for row in range(6):
        assert draw(logits[row : row + 1], uniform(seeds[row : row + 1], 3)) == together[row]

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from falcon_h1r.generation.sampling import (
    apply_count_penalties,
    apply_repetition_penalty,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
)

INF = math.inf


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def kept(logits):
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def probabilities(*values):
    return rows(*values).log()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = rows([2.0, -2.0, 0.0, 2.0], [2.0, -2.0, 0.0, 2.0])
    seen = torch.tensor([[True, True, True, False]] * 2)
    out = apply_repetition_penalty(logits, seen, torch.tensor([2.0, 0.5]))
    assert out.tolist() == [[1.0, -4.0, 0.0, 2.0], [4.0, -1.0, 0.0, 2.0]]


def test_presence_is_subtracted_once_and_frequency_per_occurrence():
    counts = torch.tensor([[0, 1, 3]] * 2, dtype=torch.int32)
    out = apply_count_penalties(
        torch.ones(2, 3), counts, torch.tensor([0.5, 0.0]), torch.tensor([0.25, -1.0])
    )
    assert out.tolist() == [[1.0, 0.25, -0.25], [1.0, 2.0, 4.0]]


def test_temperature_divides_and_zero_leaves_the_maximum():
    logits = rows([1.0, 3.0, 2.0], [3.0, 1.0, 3.0])
    out = apply_temperature(logits, torch.tensor([0.5, 0.0]))
    assert out[0].tolist() == [-4.0, 0.0, -2.0]
    assert out.softmax(1)[1].tolist() == [0.5, 0.0, 0.5]
    near = torch.tensor([[1e-30, 1.0000001e-30, -1e-30]])
    assert apply_temperature(near, torch.zeros(1)).softmax(1).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30])
def test_extreme_temperatures_stay_finite_at_the_top(temperature):
    logits = torch.tensor([[1e30, -1e30, 0.0]])
    out = apply_temperature(logits, torch.tensor([temperature], dtype=torch.float64))
    assert not out.isnan().any() and out[0, 0] == 0


def test_top_k_keeps_ties_with_the_kth_and_zero_keeps_all():
    logits = rows(*[[1.0, 3.0, 3.0, 0.0, 2.0]] * 5)
    top_k = torch.tensor([0, 1, 2, 3, 99])
    out = filter_top_k(logits, top_k)
    assert kept(out) == [[0, 1, 2, 3, 4], [1, 2], [1, 2], [1, 2, 4], [0, 1, 2, 3, 4]]
    assert torch.equal(filter_top_k(logits, top_k, largest=99), out)
    assert torch.equal(filter_top_k(logits, torch.zeros(5).long()), logits)


def test_top_p_keeps_the_token_that_crosses():
    logits = probabilities(*[[0.5, 0.2, 0.25, 0.05]] * 6)
    top_p = torch.tensor([0.49, 0.51, 0.74, 0.76, 0.951, 1.0])
    expected = [[0], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(filter_top_p(logits, top_p)) == expected


def test_top_p_at_the_sum_exactly_takes_no_more():
    logits = probabilities([0.5, 0.25, 0.125, 0.125])
    assert kept(filter_top_p(logits, torch.tensor([0.5]))) == [[0]]
    assert kept(filter_top_p(logits, torch.tensor([0.75]))) == [[0, 1]]


def test_top_p_keeps_all_ties_of_the_last_token_kept():
    logits = probabilities([0.25, 0.25, 0.4, 0.1])
    assert kept(filter_top_p(logits, torch.tensor([0.5]))) == [[0, 1, 2]]


def test_top_p_never_empties_a_row_and_counts_only_what_is_left():
    logits = probabilities([0.6, 0.4, 0.0], [1.0, 0.0, 0.0])
    assert kept(filter_top_p(logits, torch.tensor([1e-9, 1e-9]))) == [[0], [0]]
    left = filter_top_k(probabilities([0.4, 0.3, 0.2, 0.1]), torch.tensor([2]))
    assert kept(filter_top_p(left, torch.tensor([0.57]))) == [[0]], "0.4 is 0.571 of what is left"
    assert kept(filter_top_p(left, torch.tensor([0.58]))) == [[0, 1]]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_of_a_large_vocabulary_agrees_with_transformers(spread):
    """Flat rows need more tokens than are sorted first, peaked ones fewer; a batch has both."""
    generator = torch.Generator().manual_seed(8)
    scale = torch.tensor([spread, 3.0, 0.5, 6.0]).double()[:, None]
    logits = scale * torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    top_p = torch.tensor([0.9, 0.5, 1.0, 0.99]).double()
    out = filter_top_p(logits, top_p)
    for row in range(4):
        theirs = TopPLogitsWarper(float(top_p[row]))(None, logits[row : row + 1].clone())
        assert torch.equal(out[row : row + 1], theirs) or top_p[row] == 1
    assert torch.equal(out[2], logits[2])


def test_min_p_is_relative_to_the_likeliest():
    logits = probabilities(*[[0.5, 0.26, 0.24, 1e-9]] * 4)
    out = filter_min_p(logits, torch.tensor([0.0, 0.5, 0.1, 1.0]))
    assert kept(out) == [[0, 1, 2, 3], [0, 1], [0, 1, 2], [0]]


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.05, 3), st.floats(0.01, 0.99))
def test_filters_agree_with_transformers_on_random_logits(seed, top_k, temperature, share):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 50, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 50, (3, 12), generator=generator)
    penalty, top_p, min_p = 0.5 + share, share, share / 5
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )(ids, logits.clone())

    def column(value, dtype=torch.float64):
        return torch.tensor([value] * 3, dtype=dtype)

    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    ours = apply_repetition_penalty(logits, seen, column(penalty))
    ours = apply_temperature(ours, column(temperature))
    ours = filter_top_k(ours, column(top_k, torch.int64))
    ours = filter_top_p(ours, column(top_p))
    ours = filter_min_p(ours, column(min_p))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.softmax(1), theirs.softmax(1), rtol=1e-12, atol=1e-14)


def test_rows_are_filtered_by_their_own_parameters():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    params = {
        filter_top_k: torch.tensor([0, 3, 7, 1]),
        filter_top_p: torch.tensor([1.0, 0.3, 0.9, 0.5]),
        filter_min_p: torch.tensor([0.0, 0.3, 0.1, 1.0]),
        apply_temperature: torch.tensor([1.0, 0.3, 0.0, 2.0]),
    }
    for function, values in params.items():
        together = function(logits, values)
        for row in range(4):
            alone = function(logits[row : row + 1], values[row : row + 1])
            assert torch.equal(together[row : row + 1], alone), function


def test_filters_change_nothing_in_place():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    before, ones = logits.clone(), torch.ones(2)
    apply_repetition_penalty(logits, torch.ones(2, 9, dtype=torch.bool), ones * 2)
    apply_count_penalties(logits, torch.ones(2, 9), ones, ones)
    for result in (
        apply_temperature(logits, ones * 0.5),
        filter_top_k(logits, ones.long()),
        filter_top_p(logits, ones * 0.5),
        filter_min_p(logits, ones * 0.5),
    ):
        assert result is not logits
    assert torch.equal(logits, before)

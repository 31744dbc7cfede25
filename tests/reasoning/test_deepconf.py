"""`reasoning.deepconf`: parameters, thresholds and offline votes by hand."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_h1r.reasoning import (
    PRESETS,
    Ballot,
    DeepConf,
    Equality,
    Measures,
    Offline,
    offline_vote,
)
from falcon_h1r.reasoning.deepconf import percentile

EXACT = Equality("exact")


def ballots(*rows):
    """(answer, mean, lowest, bottom, tail) each."""
    return [Ballot(i, answer, Measures(*values)) for i, (answer, *values) in enumerate(rows)]


CAST = ballots(
    ("a", 1.0, 1.0, 1.0, 9.0),
    ("a", 1.0, 1.0, 1.0, 1.0),
    ("a", 1.0, 1.0, 1.5, 1.0),
    ("b", 4.0, 1.0, 1.0, 1.0),
    ("c", 1.0, 3.5, 1.0, 1.0),
    (None, 99.0, 99.0, 99.0, 99.0),
)


@pytest.mark.parametrize(
    ("weight", "answer", "total"),
    [
        ("majority", "a", 3.0),
        ("mean", "b", 4.0),
        ("lowest-group", "c", 3.5),
        ("bottom-10", "a", 3.5),
        ("tail", "a", 11.0),
    ],
)
def test_each_weight_by_hand(weight, answer, total):
    tally = offline_vote(CAST, Offline(weight=weight), EXACT)
    assert (tally.answer, tally.candidates[0].weight) == (answer, total)


def test_the_filter_by_hand():
    cast = ballots(*(("x" if i < 9 else "y", float(i), 0, 0, 0) for i in range(11)))
    # Eleven values 0 .. 10: the 90th percentile is 9, the 10th is 1.
    best = offline_vote(cast, Offline(weight="mean", keep=10), EXACT)
    assert best.candidates == (("y", 19.0, (9, 10)),)
    most = offline_vote(cast, Offline(weight="mean", keep=90), EXACT)
    assert [c.traces for c in most.candidates] == [tuple(range(1, 9)), (9, 10)]
    assert offline_vote(cast, Offline(weight="mean", keep=100), EXACT).candidates[0].traces == (
        tuple(range(9))
    )
    # A trace without an answer does not take a place among the best.
    more = [*cast, *(Ballot(20 + i, None, Measures(50.0, 0, 0, 0)) for i in range(9))]
    assert offline_vote(more, Offline(weight="mean", keep=10), EXACT) == best
    # A majority among those that another measure keeps.
    tally = offline_vote(cast, Offline(keep=10, keep_by="mean"), EXACT)
    assert tally.candidates == (("y", 2.0, (9, 10)),)
    # The first traces only; then the filter is among them.
    tally = offline_vote(cast, Offline(weight="mean", keep=10, budget=6), EXACT)
    assert tally.candidates == (("x", 5.0, (5,)),)
    assert offline_vote([], Offline(weight="mean", keep=10), EXACT).answer is None


def test_percentiles_by_hand():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 10, 50, 90, 100)] == pytest.approx(
        [1, 1.4, 3, 4.6, 5]
    )
    assert percentile(values, 90, "lower") == 4 and percentile(values, 90, "higher") == 5


def test_thresholds():
    lows = [float(i) for i in range(1, 17)]  # 16 warm-up traces: positions 13.5 and 1.5
    assert PRESETS["low"].threshold(lows) == pytest.approx(14.5)
    assert PRESETS["high"].threshold(lows) == pytest.approx(2.5)
    assert DeepConf(percentile=10).threshold(lows) == pytest.approx(2.5)
    assert DeepConf(percentile_method="higher").threshold(lows) == 15
    assert DeepConf(percentile_method="lower").threshold(lows) == 14
    # eta percent of the warm-up are at or above it: 2 of 16, and 14 of 16.
    assert sum(low >= 14.5 for low in lows) == 2 and sum(low >= 2.5 for low in lows) == 14


def test_the_presets_are_the_papers():
    low, high = PRESETS["low"], PRESETS["high"]
    for params in (low, high):
        assert (params.k, params.window, params.warmup, params.budget) == (20, 2048, 16, 512)
        assert (params.tau, params.weight, params.filter) == (0.95, "lowest-group", True)
        assert params.percentile is None and params.percentile_method == "linear"
    assert (low.eta, high.eta) == (10, 90)
    assert dataclasses.replace(low, eta=90.0) == high


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 15}, "budget is 15, expected at least warmup, 16"),
        ({"warmup": 0}, "warmup is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": True}, "k is True"),
        ({"window": 0}, "window is 0"),
        ({"tail": 0}, "tail is 0"),
        ({"eta": 0}, "eta is 0, expected 0 < eta <= 100"),
        ({"eta": 101}, "eta is 101"),
        ({"eta": None}, "eta is None"),
        ({"eta": math.nan}, "eta is nan"),
        ({"percentile": -1}, "percentile is -1, expected None or 0 <= percentile <= 100"),
        ({"percentile_method": "hazen"}, "percentile_method is 'hazen'"),
        ({"tau": 0}, "tau is 0"),
        ({"tau": 1.01}, "tau is 1.01"),
        ({"weight": "sum"}, "weight is 'sum'"),
        ({"filter": 1}, "filter is 1"),
        ({"filter_warmup": None}, "filter_warmup is None"),
    ],
)
def test_parameters_that_are_refused(values, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        DeepConf(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": "sum"}, "weight is 'sum'"),
        ({"keep": 10}, "keep: a majority has no measure"),
        ({"weight": "mean", "keep": 0}, "keep is 0"),
        ({"keep_by": "majority", "keep": 10}, "keep_by is 'majority'"),
        ({"window": -1}, "window is -1"),
        ({"budget": 0}, "budget is 0"),
    ],
)
def test_offline_parameters_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Offline(**values)


MEASURED = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.floats(0, 9)), min_size=1, max_size=20
)


@given(MEASURED, st.randoms(use_true_random=False), st.sampled_from([None, 10.0, 50.0, 90.0]))
def test_an_offline_vote_does_not_depend_on_the_order(cast, rng, keep):
    cast = ballots(*((answer, value, value, value, value) for answer, value in cast))
    policy = Offline(weight="mean", keep=keep)
    shuffled = rng.sample(cast, len(cast))
    assert offline_vote(cast, policy, EXACT) == offline_vote(shuffled, policy, EXACT)


@given(MEASURED, st.floats(1, 100), st.floats(1, 100))
def test_a_larger_share_keeps_all_that_a_smaller_one_keeps(cast, a, b):
    cast = ballots(*((answer, value, value, value, value) for answer, value in cast))

    def kept(share):
        tally = offline_vote(cast, Offline(weight="mean", keep=share), EXACT)
        return {trace for candidate in tally.candidates for trace in candidate.traces}

    few, many = kept(min(a, b)), kept(max(a, b))
    answered = {ballot.trace for ballot in cast if ballot.answer is not None}
    assert few <= many <= answered and bool(few) == bool(answered)
    assert kept(100) == answered

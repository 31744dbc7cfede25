"""`reasoning.confidence`: against float64 from scratch, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_h1r.generation import SamplingParams, generate
from falcon_h1r.reasoning import (
    RunningConfidence,
    confidence_of_logits,
    first_below,
    group_confidences,
    token_confidence,
    trace_measures,
)

CONFIDENCES = st.lists(st.floats(0, 40, width=32), min_size=1, max_size=60)


def plain(values, window):
    """Group confidences from their definition, each by itself, in float64."""
    values = [float(v) for v in values]
    if len(values) < window:
        return [math.fsum(values) / len(values)]
    return [math.fsum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def test_a_token_by_hand():
    # Probabilities 1/2, 1/4, 1/4: the two likeliest have a mean log-probability of -1.5 ln 2.
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert confidence_of_logits(logits, 2)[0].item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert confidence_of_logits(logits * 1 + 7, 3)[0].item() == pytest.approx(
        5 / 3 * math.log(2), rel=1e-6
    )
    uniform = torch.zeros(2, 20)
    assert confidence_of_logits(uniform, 20)[1].item() == pytest.approx(math.log(20), rel=1e-6)


def test_confidence_from_logits_and_from_top_logprobs_are_that_of_float64():
    logits = torch.randn(50, 300) * torch.linspace(0.1, 12, 50)[:, None]
    wide = logits.double().numpy()
    logp = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    logp -= wide.max(1, keepdims=True)
    truth = -np.sort(logp, axis=1)[:, -20:].mean(1)
    top = logits.log_softmax(-1).topk(21).values
    for made in (
        confidence_of_logits(logits),
        token_confidence(top),
        token_confidence(top[:, :20]),
    ):
        assert made.dtype == torch.float32
        # float32 log-probabilities as large as 60 carry errors of some 1e-5.
        assert np.abs(made.numpy() - truth).max() < 1e-5
    assert np.abs(confidence_of_logits(logits.double()).numpy() - truth).max() < 2e-6


def test_the_sampled_token_outside_the_top_does_not_count():
    top = torch.tensor([[-0.1, -3.0, -4.0, -9.0]])
    assert token_confidence(top[:, [3, 0, 1, 2]], 3).item() == pytest.approx(7.1 / 3)


def test_what_generation_reports_is_what_is_needed():
    from tiny_cli import tiny_model

    model = tiny_model()
    params = SamplingParams(
        max_new_tokens=5, logprobs=20, temperature=0.7, top_p=0.5, seed=3, stop_token_ids=()
    )
    out = generate(model, [[5, 6, 7]], params)
    _, top = out.top_logprobs[0]
    ids = torch.cat([torch.tensor([5, 6, 7]), out.sequences[0][:-1]])
    with torch.no_grad():
        logits = model(ids[None])[0, 2:].double()  # of every position that chose a token
    truth = -logits.log_softmax(-1).sort().values[:, -20:].mean(-1)
    assert torch.allclose(token_confidence(top).double(), truth, atol=1e-4)


@pytest.mark.parametrize(
    ("top", "k", "message"),
    [
        (torch.full((2, 5), -1.0), 20, "k is 20"),
        (torch.full((2, 5), -1.0), 0, "k is 0"),
        (torch.tensor([[-1.0, -math.inf]]), 2, "finite"),
        (torch.tensor([[-1.0, math.nan]]), 2, "finite"),
        (torch.tensor([[0.5, -1.0]]), 2, "finite"),
    ],
)
def test_log_probabilities_that_are_none(top, k, message):
    with pytest.raises(ValueError, match=message):
        token_confidence(top, k)


def test_measures_by_hand():
    values = torch.tensor([4.0, 2.0, 6.0, 8.0, 1.0])
    # Windows of 2: 3, 4, 7, 4.5; a tenth of four windows is rounded to one.
    assert group_confidences(values, 2).tolist() == [3, 4, 7, 4.5]
    measures = trace_measures(values, 2)
    assert measures == (4.2, 3.0, 3.0, 4.5) and measures.of("tail") == 4.5
    assert trace_measures(values, 2, tail=3).tail == 5.0
    # Shorter than the window: one group of all.
    assert trace_measures(values, 6) == (4.2, 4.2, 4.2, 4.2)
    assert trace_measures(values, 5) == (4.2, 4.2, 4.2, 4.2)
    assert trace_measures(values, 1, tail=99) == (4.2, 1.0, 1.0, 4.2)
    # 29 windows of 1: two lowest; 30: three.
    ascending = torch.arange(1, 31).float()
    assert trace_measures(ascending[:29], 1).bottom_10 == 1.5
    assert trace_measures(ascending.flip(0), 1).bottom_10 == 2.0
    with pytest.raises(ValueError, match="without tokens"):
        trace_measures(torch.zeros(0), 2)
    for window in (0, True, 2.0, 2**22):
        with pytest.raises(ValueError, match="window is"):
            trace_measures(values, window)


@given(CONFIDENCES, st.integers(1, 70), st.integers(1, 70))
def test_measures_are_those_of_the_definition(values, window, tail):
    groups = plain(values, window)
    lowest = sorted(groups)[: max(1, len(groups) // 10)]
    expected = (
        math.fsum(values) / len(values),
        min(groups),
        math.fsum(lowest) / len(lowest),
        plain(values, tail)[-1],
    )
    made = trace_measures(torch.tensor(values), window, tail)
    # Exact but for values below 1/16, which are kept to 2**-29.
    assert made == pytest.approx(expected, rel=1e-12, abs=2**-28)


@given(st.lists(CONFIDENCES, min_size=1, max_size=4), st.integers(1, 20), st.randoms())
def test_rows_that_come_in_any_mixture_are_each_their_own(traces, window, rng):
    running = RunningConfidence(len(traces), window)
    at = [0] * len(traces)
    lowest = [math.inf] * len(traces)
    while any(at[i] < len(traces[i]) for i in range(len(traces))):
        rows = [i for i in range(len(traces)) if at[i] < len(traces[i]) and rng.random() < 0.7]
        rng.shuffle(rows)
        index = torch.tensor(rows, dtype=torch.int64)
        group = running.update(index, torch.tensor([traces[i][at[i]] for i in rows]))
        for i, value in zip(rows, group.tolist()):
            at[i] += 1
            seen = torch.tensor(traces[i][: at[i]])
            # In bits: the last group of all tokens so far, from scratch.
            assert value == float(group_confidences(seen, window)[-1])
            if at[i] >= window:
                lowest[i] = min(lowest[i], value)
    everything = torch.arange(len(traces))
    for i, values in enumerate(traces):
        measures = trace_measures(torch.tensor(values), window)
        assert float(running.mean(everything)[i]) == measures.mean
        assert float(running.lowest(everything)[i]) == measures.lowest_group
        assert bool(running.full(everything)[i]) == (len(values) >= window)


def test_a_running_sum_does_not_drift_over_20_thousand_tokens():
    steps, window = 20_000, 2048
    # Strong and weak confidences in turn: where a float32 running sum loses most.
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(steps, 2, generator=generator) * 0.9 + 0.07
    values[::3] *= 30
    values[8_000:8_100] = 900.0
    running = RunningConfidence(2, window)
    rows = torch.arange(2)
    made = torch.stack([running.update(rows, values[i]) for i in range(steps)])
    sums = np.cumsum(values.double().numpy(), axis=0)
    for at in (window, 8_050, 11_000, 14_000, steps):
        scratch = values[at - window : at].double().numpy()
        truth = [math.fsum(column) / window for column in scratch.T]
        assert made[at - 1].tolist() == truth  # in bits
    floats = torch.zeros(2)
    for i in range(steps):  # what the test would see of a plain float32 sum
        floats += values[i] - (values[i - window] if i >= window else 0)
    assert (floats.double() / window - made[-1]).abs().max() > 1e-6
    assert running.mean(rows).tolist() == pytest.approx((sums[-1] / steps).tolist(), rel=1e-12)


@given(CONFIDENCES, st.integers(1, 20), st.floats(0, 40), st.floats(0, 40))
def test_a_higher_threshold_stops_no_later_and_never_before_a_full_window(values, window, a, b):
    values = torch.tensor(values)
    low, high = sorted((a, b))
    ends = [first_below(values, threshold, window) for threshold in (low, high)]
    late, early = (math.inf if end is None else end for end in ends)
    assert window <= early <= late
    groups = plain(values, window) if len(values) >= window else []
    assert (ends[0] is None) == all(group >= low for group in map(float, groups)) or any(
        abs(group - low) < 1e-6 for group in groups
    )


def test_a_group_at_the_threshold_is_not_below_it():
    values = torch.tensor([3.0, 3.0, 2.0, 4.0, 1.0])
    assert first_below(values, 3.0, 2) == 3
    assert first_below(values, 2.5, 2) is None
    assert first_below(values[:1], 99.0, 2) is None
    assert first_below(values, 2.75, 2) == 3


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 20000.0])
def test_confidences_that_are_none(value):
    with pytest.raises(ValueError, match="confidence"):
        RunningConfidence(1, 4).update(torch.tensor([0]), torch.tensor([value]))
    with pytest.raises(ValueError, match="confidence"):
        trace_measures(torch.tensor([value]), 4)

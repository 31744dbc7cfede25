"""`reasoning.online`: thresholds, stops, consensus and votes by hand, and what always holds."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reasoning import synthetic
from reasoning.synthetic import STOP_TOKENS, make_pool, pool_of, run_live

from falcon_h1r.generation import SamplingParams, derive_seeds
from falcon_h1r.reasoning import (
    DeepConf,
    Ended,
    Equality,
    OnlinePolicy,
    first_below,
    trace_measures,
)

EXACT = Equality("exact")


def small(**values):
    given = {"k": 1, "window": 2, "warmup": 2, "budget": 4, "eta": 50.0, "tau": None}
    return DeepConf(**{**given, **values})


# Lowest groups of two: 2.0 and 4.0, so the threshold at the median is 3.0.
WARMUP = [[5.0, 2.0, 2.0], [4.0, 4.0, 6.0]]


def test_a_run_by_hand():
    # Trace 2 falls below 3 with its third token (mean 2.5), trace 3 touches 3 and goes on.
    pool = pool_of([*WARMUP, [9.0, 3.0, 2.0, 9.0], [4.0, 2.0, 8.0]], ["7", "8", "7", "8"])
    policy = run_live(pool, small())
    result = policy.result()
    assert policy.threshold == result.threshold == 3.0 and result.done == "budget"
    assert [t.tokens for t in result.traces] == [3, 3, 3, 3] and result.tokens == 12
    assert [t.reason for t in result.traces] == ["stop", "stop", "low_confidence", "stop"]
    assert [t.answer for t in result.traces] == ["7", "8", None, "8"]
    # Trace 0 has a lowest group of 2: below the threshold, so it does not vote.
    assert [t.weight for t in result.traces] == [None, 4.0, None, 3.0]
    assert (result.answer, result.vote.share) == ("8", 1.0)
    assert result.vote.candidates == (("8", 7.0, (1, 3)),)
    assert result.unfiltered.candidates == (("8", 7.0, (1, 3)), ("7", 2.0, (0,)))
    assert [tuple(e) for e in result.log] == [
        (0, "start", 0, None),
        (0, "start", 1, None),
        (2, "end", 0, "stop"),
        (2, "end", 1, "stop"),
        (2, "threshold", None, 3.0),
        (3, "start", 2, None),
        (3, "start", 3, None),
        (5, "low_confidence", 2, 2.5),
        (5, "end", 3, "stop"),
        (5, "budget", None, None),
    ]
    assert result.count("low_confidence") == 1 and policy.steps == 6


def test_the_warm_up_may_be_spared_by_the_filter():
    pool = pool_of([*WARMUP, [1.0, 1.0], [1.0, 1.0]], ["7", "8", "9", "9"])
    result = run_live(pool, small(filter_warmup=False)).result()
    assert result.vote.candidates == (("8", 4.0, (1,)), ("7", 2.0, (0,)))
    result = run_live(pool, small(filter=False)).result()
    # Both fall below at their last token, which is their own end: nothing was stopped.
    assert result.count("low_confidence") == 0
    assert result.vote.candidates == (("8", 4.0, (1,)), ("9", 2.0, (2, 3)), ("7", 2.0, (0,)))


def test_an_end_below_the_threshold_does_not_vote():
    pool = pool_of([*WARMUP, [9.0, 9.0, 1.0, 1.0], [1.0]], ["7", "8", "9", "9"])
    result = run_live(pool, small()).result()
    # Trace 2: 5.0 after three tokens, 1.0 after four, where it ends by itself. Trace 3 never has a
    # full window: it runs to its end, and its mean, 1.0, is below.
    assert [t.reason for t in result.traces] == ["stop"] * 4
    assert [t.weight for t in result.traces] == [None, 4.0, None, None]
    assert [t.answer for t in result.traces] == ["7", "8", "9", "9"]
    assert not [event for event in result.log if event.what == "low_confidence"]


def test_no_warm_up_trace_is_stopped_and_none_starts_before_the_threshold():
    policy = OnlinePolicy(small(), seed=1, equality=EXACT)
    assert policy.waiting() == 2 and policy.start(1) == [0] and policy.start() == [1]
    assert policy.start() == [] and policy.running == (0, 1)
    rows, tokens = torch.tensor([0, 1]), torch.tensor([50, 50])
    for _ in range(9):
        assert policy.step(rows, tokens, torch.tensor([0.1, 9.0])) == {}
    assert policy.threshold is None and policy.waiting() == 0
    ended = {i: Ended("stop", rf"\boxed{{{i}}}") for i in (0, 1)}
    policy.step(rows, tokens, torch.tensor([0.1, 9.0]), ended)
    assert policy.threshold == pytest.approx(4.55) and policy.waiting() == 2
    assert policy.start(-1) == [] and policy.start(1) == [2] and policy.start(5) == [3]
    assert policy.waiting() == 0


def test_a_consensus_ends_everything():
    pool = pool_of([*WARMUP, [4.0] * 3, [9.0] * 9, [9.0] * 9], ["7", "8", "8", "8", "9"])
    params = small(budget=5, filter=False, tau=0.8)
    result = run_live(pool, params).result()
    # After the warm-up 8 has 4 of 6; after trace 2's third token 8 of 10, exactly tau.
    assert (result.done, result.answer, result.vote.share) == ("consensus", "8", 0.8)
    assert [t.tokens for t in result.traces] == [3, 3, 3, 3, 3]
    assert [t.reason for t in result.traces[3:]] == ["consensus"] * 2
    assert run_live(pool, dataclasses.replace(params, tau=0.81)).result().tokens == 27
    # With slots for one only, the rest is never started.
    alone = run_live(pool, params, slots=1).result()
    assert [t.tokens for t in alone.traces] == [3, 3, 3] and alone.done == "consensus"
    # A consensus of the warm-up's survivors ends the run before anything else is started.
    result = run_live(pool, small(budget=5, tau=0.95)).result()
    assert result.done == "consensus" and len(result.traces) == 2 and result.answer == "8"
    assert [e.what for e in result.log[-2:]] == ["threshold", "consensus"]


def test_stops_in_the_step_of_a_consensus_are_stops():
    pool = pool_of([*WARMUP, [4.0] * 3, [9.0, 9.0, 0.0], [9.0, 1.0, 1.0, 9.0]], list("78889"))
    result = run_live(pool, small(budget=5, filter=False, tau=0.8)).result()
    assert [t.reason for t in result.traces[2:]] == ["stop", "stop", "low_confidence"]
    assert result.done == "consensus"


def test_nothing_that_may_vote_has_an_answer():
    pool = pool_of([*WARMUP, [1.0] * 5, [1.0] * 5], ["7", None, "9", "9"])
    result = run_live(pool, small(tau=0.5)).result()
    assert result.answer is None and result.vote.candidates == () and result.done == "budget"
    assert result.unfiltered.answer == "7" and result.count("low_confidence") == 2
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_interruption_votes_over_what_there_is():
    pool = pool_of([[5.0, 2.0, 2.0], [4.0] * 9], ["7", "8"])
    policy = run_live(pool, small(), interrupt_at=5)
    result = policy.result()
    assert (result.done, result.answer, result.threshold) == ("interrupted", "7", None)
    assert [t.reason for t in result.traces] == ["stop", "interrupted"]
    assert policy.waiting() == 0 and policy.start() == [] and policy.interrupt() == []
    nothing = OnlinePolicy(small(), seed=1, equality=EXACT)
    nothing.start()
    nothing.interrupt()
    result = nothing.result()
    assert result.answer is None and result.traces[0].mean is None and result.tokens == 0
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [("majority", 1.0), ("mean", 5.0), ("lowest-group", 3.0), ("bottom-10", 3.0), ("tail", 6.0)],
)
def test_each_weight(weight, expected):
    pool = pool_of([[3.0, 3.0, 6.0, 11.0, 5.0, 2.0]] * 2, ["7", "7"])
    params = small(warmup=2, budget=2, weight=weight, tail=3, filter=False)
    result = run_live(pool, params).result()
    assert [t.weight for t in result.traces] == [expected] * 2


def test_seeds_are_those_of_generation():
    policy = OnlinePolicy(small(), seed=2**63 - 2, equality=EXACT)
    assert policy.seeds == [2**63 - 2, 2**63 - 1, 0, 1]
    assert policy.seeds == derive_seeds(SamplingParams(seed=2**63 - 2, n=4), 1)
    fresh = [OnlinePolicy(small(), equality=EXACT).seeds for _ in range(2)]
    assert fresh[0] != fresh[1] and fresh[0][3] == fresh[0][0] + 3


def step(policy, traces, tokens=None, confidence=None, finished=None):
    count = len(traces)
    return policy.step(
        torch.tensor(traces),
        torch.tensor([50] * count if tokens is None else tokens),
        torch.full((count,), 5.0) if confidence is None else torch.tensor(confidence),
        finished,
    )


def test_an_engine_that_errs_is_told():
    policy = OnlinePolicy(small(), seed=0, equality=EXACT, stop_token_ids=STOP_TOKENS)
    policy.start()
    text = r"\boxed{1}"
    for arguments, message in [
        (([0, 0],), "no trace twice"),
        (([0, 1], [50]), "one of each"),
        (([0, 2],), "trace 2 is not running"),
        (([0], None, None, {1: Ended("length", text)}), "no token in this step"),
        (([0], None, None, {5: Ended("length", text)}), "trace 5 is not running"),
        (([0], None, None, {0: Ended("eos", text)}), "finished with 'eos'"),
        (([0], None, None, {0: Ended("stop", text)}), "trace 0 has no stop token"),
        # Either of the stop tokens ends a trace; an engine that knows one only is found out.
        (([0], [STOP_TOKENS[0]]), "trace 0 has a stop token"),
        (([0], [STOP_TOKENS[1]]), "trace 0 has a stop token"),
        (([0], [STOP_TOKENS[1]], None, {0: Ended("length", text)}), "reason is length"),
        (([0], None, [math.nan]), "confidence"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(policy, *arguments)
    assert policy.steps == 0 and policy.result().tokens == 0
    step(policy, [0], [STOP_TOKENS[1]], None, {0: Ended("stop", text)})
    with pytest.raises(ValueError, match="trace 0 is not running"):
        step(policy, [0])
    policy.interrupt()
    with pytest.raises(ValueError, match="done"):
        step(policy, [1])


def test_answers_are_read_by_the_extractor_and_compared_as_mathematics():
    texts = ["it is 1/2", "it is 0.50", "it is 3"]
    params = small(warmup=3, budget=3, filter=False)
    policy = OnlinePolicy(params, seed=0, equality=EXACT, extractor="boxed,number")
    policy.start()
    step(policy, [0, 1, 2], finished={i: Ended("length", t) for i, t in enumerate(texts)})
    assert policy.result().vote.candidates[0] == ("1/2", 10.0, (0, 1))
    with pytest.raises(ValueError, match="extractor"):
        OnlinePolicy(params, extractor="box")


PARAMS = st.fixed_dictionaries(
    {
        "window": st.integers(1, 30),
        "warmup": st.integers(1, 6),
        "eta": st.floats(1, 100),
        "tau": st.sampled_from([None, 0.5, 0.8, 0.95, 1.0]),
        "weight": st.sampled_from("majority mean lowest-group bottom-10 tail".split()),
        "tail": st.sampled_from([None, 1, 7, 100]),
        "filter": st.booleans(),
        "filter_warmup": st.booleans(),
        "percentile_method": st.sampled_from(["linear", "lower", "higher"]),
    }
)


@given(PARAMS, st.integers(0, 999), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_what_always_holds(values, seed, slots, chaos, unlimited):
    params = DeepConf(k=4, budget=12, **values)
    pool = make_pool(seed, params.budget)
    policy = run_live(pool, params, slots=None if unlimited else slots, chaos=chaos)
    result = policy.result()
    assert result.done in ("consensus", "budget") and not policy.running
    assert params.warmup <= len(result.traces) <= params.budget
    assert [t.trace for t in result.traces] == list(range(len(result.traces)))
    lows = []
    for trace, whole in zip(result.traces, pool):
        confidence = whole.confidence
        fall = None
        if trace.trace >= params.warmup:
            fall = first_below(confidence, result.threshold, params.window)
        fall = math.inf if fall is None else fall
        if trace.reason == "low_confidence":
            assert trace.tokens == fall >= params.window and fall < len(confidence)
        elif trace.reason == "consensus":
            assert trace.tokens < min(fall, len(confidence)) and result.done == "consensus"
        else:
            assert trace.reason == whole.reason
            assert trace.tokens == len(confidence) <= fall
            measures = trace_measures(confidence, params.window, params.tail)
            assert (trace.mean, trace.lowest_group) == (measures.mean, measures.lowest_group)
            weight = 1.0 if params.weight == "majority" else measures.of(params.weight)
            spared = trace.trace < params.warmup and not params.filter_warmup
            votes = not params.filter or spared or measures.lowest_group >= result.threshold
            votes = votes and trace.answer is not None
            assert trace.weight == (weight if votes else None)
            if trace.trace < params.warmup:
                lows.append(measures.lowest_group)
    ends = [event.trace for event in result.log if event.trace is not None]
    assert sorted(ends) == sorted([*range(len(result.traces))] * 2)  # one start, one end
    assert len(lows) == params.warmup and result.threshold == params.threshold(lows)
    assert result.tokens == sum(t.tokens for t in result.traces)
    if result.done == "consensus":
        assert result.vote.share >= params.tau
    else:
        assert len(result.traces) == params.budget


@given(PARAMS, st.integers(0, 999))
def test_rows_in_any_order_within_a_step_are_the_same_run(values, seed):
    params = DeepConf(k=4, budget=8, **values)
    pool = make_pool(seed, params.budget)

    class Backwards(OnlinePolicy):
        def step(self, traces, tokens, confidence, finished=None):
            finished = dict(reversed(list((finished or {}).items())))
            return super().step(traces.flip(0), tokens.flip(0), confidence.flip(0), finished)

    straight = run_live(pool, params).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "OnlinePolicy", Backwards)
        assert run_live(pool, params).result() == straight


@given(st.integers(0, 999), st.integers(1, 9))
def test_without_a_consensus_slots_and_delays_change_nothing_but_the_order(seed, slots):
    """A trace's fate depends on itself and the warm-up only."""
    params = DeepConf(k=4, window=5, warmup=4, budget=12, eta=30.0, tau=None)
    pool = make_pool(seed, params.budget)
    results = [
        run_live(pool, params, slots=slots, chaos=seed + 1).result(),
        run_live(pool, params).result(),
    ]
    assert results[0].traces == results[1].traces
    assert results[0].vote == results[1].vote and results[0].threshold == results[1].threshold


@given(st.integers(0, 999), st.floats(1, 99), st.floats(1, 99))
def test_a_stricter_eta_spends_no_more_tokens(seed, a, b):
    strict, lenient = sorted((a, b))
    pool = make_pool(seed, 12)
    params = DeepConf(k=4, window=5, warmup=4, budget=12, tau=None)
    made = [
        run_live(pool, dataclasses.replace(params, eta=eta)).result() for eta in (strict, lenient)
    ]
    assert made[0].threshold >= made[1].threshold
    for first, second in zip(made[0].traces, made[1].traces):
        assert first.tokens <= second.tokens

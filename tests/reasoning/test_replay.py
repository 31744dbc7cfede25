"""`reasoning.replay`: a record's own policy decides again as it did, others as they would have."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reasoning.synthetic import edit_manifest, make_pool, pool_of, record_pool, run_live
from reasoning.test_online import PARAMS, WARMUP, small

from falcon_h1r.reasoning import (
    DeepConf,
    Equality,
    Offline,
    make_policy,
    read_record,
    recorded_policy,
    replay,
    trace_measures,
)
from falcon_h1r.reasoning.traces import MOST_STEPS

REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def fresh(tmp_path):
    """A new folder for each of hypothesis' examples."""
    return tmp_path / str(sum(1 for _ in tmp_path.iterdir()))


@settings(REUSED, max_examples=80)
@given(
    PARAMS,
    st.integers(0, 999),
    st.integers(1, 9),
    st.integers(0, 3),
    st.none() | st.integers(0, 70),
)
def test_a_run_and_the_replay_of_its_record_decide_alike(
    tmp_path, values, seed, slots, chaos, interrupt_at
):
    params = DeepConf(k=4, budget=12, **values)
    folder = fresh(tmp_path)
    live = run_live(
        make_pool(seed, 12), params, folder, slots=slots, chaos=chaos, interrupt_at=interrupt_at
    ).result()
    record = read_record(folder)
    assert recorded_policy(record) == params
    again = replay(record, params)
    # Every decision with its step, every count, weight, measure and vote, in bits.
    assert again.order == "recorded" and again.online == live
    assert again.tokens == live.tokens == record.tokens
    assert replay(read_record(folder, tensors=False), params).online == live


@REUSED
@given(PARAMS, st.integers(0, 999), st.integers(1, 9))
def test_a_simulation_is_what_a_prompt_engine_does(tmp_path, values, seed, slots):
    """Over a pool of whole traces: the live run over that pool with so many slots."""
    params = DeepConf(k=4, budget=9, **values)
    pool = make_pool(seed, 12)
    folder = fresh(tmp_path)
    record_pool(pool, folder, chaos=seed, slots=5)
    record = read_record(folder)
    made = replay(record, params, parallel=slots)
    assert made.order == "simulated"
    live = run_live(pool, params, slots=slots).result()
    assert made.online.log == live.log and made.online.vote == live.vote
    assert [t.tokens for t in made.online.traces] == [t.tokens for t in live.traces]
    assert made.tokens <= made.all_tokens == sum(len(whole.tokens) for whole in pool)
    assert replay(record, params).online.log == run_live(pool, params).result().log


def test_offline_policies_by_hand(tmp_path):
    pool = pool_of([[1.0, 5.0], [4.0, 4.0, 4.0, 0.5], [2.0], [9.0]], ["7", "8", "7.0", None])
    record_pool(pool, tmp_path / "a", k=1, reference="7")
    record = read_record(tmp_path / "a")
    majority = replay(record, Offline())
    assert (majority.answer, majority.right, majority.order) == ("7", True, None)
    assert majority.tokens == majority.all_tokens == 8 and majority.traces == 4
    assert majority.vote.candidates == (("7", 2.0, (0, 2)), ("8", 1.0, (1,)))
    mean = replay(record, Offline(weight="mean"))
    assert [c.weight for c in mean.vote.candidates] == [5.0, 3.125] and mean.right
    best = replay(record, Offline(weight="mean", keep=10))
    assert (best.answer, best.right) == ("8", False)
    assert replay(record, Offline(weight="tail", window=1)).vote.candidates[0].weight == 7.0
    first = replay(record, Offline(budget=2))
    assert first.vote.candidates[0].traces == (0,) and (first.tokens, first.all_tokens) == (6, 8)
    with pytest.raises(ValueError, match="holds 4 traces, the budget is 5"):
        replay(record, Offline(budget=5))
    for trace, whole in zip(record.traces, pool):
        assert trace_measures(trace.confidence, 2) == trace_measures(whole.confidence, 2)


def test_answers_may_be_read_anew_and_compared_by_another_rule(tmp_path):
    pool = pool_of([[1.0], [1.0], [1.0]], ["1/2", "0.5", "3"])
    pool[2] = dataclasses.replace(pool[2], text=r"\boxed{3} no, 1/2")
    record_pool(pool, tmp_path / "a", k=1, reference="0.50")
    record = read_record(tmp_path / "a")
    assert replay(record, Offline()).vote.candidates[0] == ("1/2", 2.0, (0, 1))
    assert replay(record, Offline(), extractor="number").vote.candidates[0][2] == (0, 1, 2)
    assert replay(record, Offline(), extractor=lambda text: None).right is False
    online = small(warmup=3, budget=3, filter=False)
    assert len(replay(record, online, extractor="number").vote.candidates) == 1
    edit_manifest(tmp_path / "a", reference=None)
    assert replay(read_record(tmp_path / "a"), Offline()).right is None

    class Never(Equality):
        def compare(self, a, b):
            return super().compare(a, b)._replace(equal=False)

    tally = replay(record, Offline(), equality=Never("exact"))
    assert len(tally.vote.candidates) == 3 - 1 and tally.right is False


@pytest.fixture
def stopped(tmp_path):
    pool = pool_of([*WARMUP, [9.0, 3.0, 2.0, 9.0], [4.0, 2.0, 8.0]], ["7", "8", "7", "8"])
    run_live(pool, small(), tmp_path / "run")
    return read_record(tmp_path / "run")


def test_what_a_record_cannot_tell_is_refused(tmp_path, stopped):
    with pytest.raises(ValueError, match="stopped 1 of 4 traces, whose answers are not known"):
        replay(stopped, Offline())
    with pytest.raises(ValueError, match="stopped trace 2 after 3 tokens"):
        replay(stopped, small(eta=100.0))
    with pytest.raises(ValueError, match="stopped trace 2 after 3 tokens"):
        replay(stopped, small(eta=100.0), order="recorded")
    with pytest.raises(ValueError, match="holds 4 traces, and the policy would have started more"):
        replay(stopped, small(budget=5))
    with pytest.raises(ValueError, match="holds 4 traces"):
        replay(stopped, small(budget=5), order="recorded")
    with pytest.raises(ValueError, match=r"were started before step 3"):
        replay(stopped, small(warmup=3), order="recorded")
    with pytest.raises(ValueError, match="k = 1, the policy's k is 20"):
        replay(stopped, small(k=20))
    with pytest.raises(ValueError, match="order is 'live'"):
        replay(stopped, small(), order="live")
    for parallel in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"parallel is {parallel}, expected None or an int"):
            replay(stopped, small(), parallel=parallel)
    assert replay(stopped, small()).all_tokens is None
    # A stricter policy stops before the recorded one did: the record is enough.
    strict = replay(stopped, small(eta=1.0))
    assert strict.order == "simulated" and strict.stopped == 2 and strict.tokens == 3 + 3 + 3 + 2
    assert replay(stopped, small(eta=1.0), order="recorded").online == strict.online
    edit_manifest(stopped.folder, policy={"temperature": 1})
    with pytest.raises(ValueError, match="its policy is unknown here"):
        recorded_policy(read_record(stopped.folder))


def test_a_consensus_of_the_others_does_not_make_up_for_a_trace_that_is_not_known(tmp_path):
    pool = pool_of([*WARMUP, [9.0, 3.0, 2.0, 9.0], [9.0] * 9], ["7", "8", "7", "8"])
    run_live(pool, small(filter=False), tmp_path / "a")
    record = read_record(tmp_path / "a")
    consensus = small(filter=False, tau=0.8)
    assert replay(record, consensus).done == "consensus"
    for order in ("simulated", "recorded"):
        with pytest.raises(ValueError, match="stopped trace 2 after 3 tokens"):
            replay(record, dataclasses.replace(consensus, eta=100.0), order=order)


def test_nor_for_one_that_the_consensus_ended(tmp_path):
    pool = pool_of([*WARMUP, [9.0] * 9, [4.0] * 3, [4.0] * 4], ["7", "8", "7", "8", "8"])
    params = small(budget=5, filter=False, tau=0.85)
    assert run_live(pool, params, tmp_path / "a").result().traces[2].tokens == 4
    record = read_record(tmp_path / "a")
    assert replay(record, params).done == "consensus"
    # With two slots trace 4 begins later, and trace 2 would have gone on until it ends.
    with pytest.raises(ValueError, match=r"stopped trace 2 after 4 tokens \(consensus\)"):
        replay(record, params, order="simulated", parallel=2)


def test_an_interrupted_record(tmp_path):
    pool = pool_of([[5.0, 2.0, 2.0], [4.0] * 9, [1.0] * 3], ["7", "8", "7"])
    record_pool(pool, tmp_path / "a", k=1, interrupt_at=5)
    record = read_record(tmp_path / "a")
    assert [t.reason for t in record.traces] == ["stop", "interrupted", "stop"]
    tally = replay(record, Offline())
    assert tally.answer == "7" and tally.all_tokens is None and tally.tokens == 11
    online = replay(record, small(budget=3), parallel=1)
    assert online.done == "interrupted" and online.answer == "7" and online.tokens == 8
    # Without its last line it says the same.
    path = tmp_path / "a" / "traces.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    record = read_record(tmp_path / "a")
    assert not record.complete and replay(record, small(budget=9)).done == "interrupted"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no traces"):
        replay(read_record(tmp_path / "a"), Offline())


def test_a_record_checks_its_stop_tokens(tmp_path):
    pool = pool_of(WARMUP, ["7", "8"])
    record_pool(pool, tmp_path / "a", k=1)
    edit_manifest(tmp_path / "a", stop_token_ids=[11])
    with pytest.raises(ValueError, match="has no stop token"):
        replay(read_record(tmp_path / "a"), small(budget=2))


def test_policies_by_name():
    assert make_policy("majority") == Offline()
    assert make_policy("majority", eta=10.0) == Offline(keep=10.0, keep_by="lowest-group")
    assert make_policy("tail", eta=90.0, window=7, budget=3) == Offline(
        weight="tail", keep=90.0, window=7, budget=3
    )
    assert make_policy("deepconf-low") == DeepConf(eta=10.0)
    for option in ("window", "eta", "tau", "budget", "warmup", "min_voters"):  # None: the default
        assert make_policy("majority", **{option: None}) == Offline()
        assert make_policy("deepconf-low", **{option: None}) == DeepConf(eta=10.0)
    assert make_policy("deepconf-high", tau=0.5) == DeepConf(eta=90.0, tau=0.5)
    assert make_policy("deepconf", eta=40.0, warmup=3, budget=9, window=5) == DeepConf(
        eta=40.0, warmup=3, budget=9, window=5
    )
    for name, options, message in [
        ("median", {}, "policy 'median': known are majority"),
        ("mean", {"tau": 0.5}, "tau: the policy mean has none"),
        ("majority", {"warmup": 4}, "warmup: the policy majority has none"),
        ("deepconf-low", {"eta": 20.0}, "eta: deepconf-low has its own, 10"),
        ("deepconf", {"budget": 4}, "budget is 4, expected at least warmup, 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_policy(name, **options)


def test_a_record_of_h1r_pico(tmp_path):
    """Real traces: what DeepConf decides from the model's own numbers, recorded and replayed."""
    from models import load

    from falcon_h1r.commands.common import locate
    from falcon_h1r.generation import SamplingParams, generate
    from falcon_h1r.reasoning import Manifest, TraceRecorder, token_confidence
    from falcon_h1r.text import load_tokenizer

    folder = locate("h1r-pico")
    model, tokenizer = load(folder, dtype=torch.float32), load_tokenizer(folder)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is 47+25-8?"}])
    params = SamplingParams(max_new_tokens=200, temperature=0.8, seed=1, n=6, logprobs=20)
    steps = []
    out = generate(model, [prompt], params, tokenizer=tokenizer, on_step=steps.append)
    from falcon_h1r.reasoning import last_boxed

    with TraceRecorder(tmp_path / "a", Manifest(reference="64", seed=1)) as writer:
        writer.start(range(6), out.seeds)
        for s in steps:
            confidence = token_confidence(s.top_logprobs)
            writer.step(s.sequences, s.tokens, confidence, s.top_ids, s.top_logprobs)
            for i, reason in s.finished.items():
                writer.end(i, reason, out.texts[i], last_boxed(out.texts[i]))
        writer.close({"done": "all"})
    record = read_record(tmp_path / "a")
    for i, trace in enumerate(record.traces):
        assert torch.equal(trace.tokens, out.sequences[i]) and trace.seed == out.seeds[i]
        ids = torch.cat([torch.tensor(prompt), trace.tokens[:-1]])
        with torch.no_grad():
            logits = model(ids[None])[0, len(prompt) - 1 :].double()
        truth = -logits.log_softmax(-1).topk(20).values.mean(-1)
        # A prefill and a step round differently: some 1e-5 of numbers around 15.
        assert torch.allclose(trace.confidence.double(), truth, atol=1e-3)
    majority = replay(record, Offline(window=16))
    assert majority.right and majority.answer == "64"
    online = replay(record, DeepConf(window=16, warmup=3, budget=6))
    assert online.right and online.tokens <= majority.tokens


def test_a_forged_step_number_costs_no_walk(tmp_path):
    # Nothing decides in a step without tokens, whatever their number.
    params = DeepConf(k=4, window=6, warmup=4, budget=10, eta=20.0, tau=None)
    policy = run_live(make_pool(3, 10), params, tmp_path / "a", slots=3, chaos=5)
    record = read_record(tmp_path / "a")
    late = max(int(trace.steps[-1]) for trace in record.traces)
    traces = [
        dataclasses.replace(t, steps=torch.where(t.steps == late, MOST_STEPS - 1, t.steps))
        for t in record.traces
    ]
    forged = dataclasses.replace(record, traces=traces, end={**record.end, "steps": MOST_STEPS})
    replayed = replay(forged, params).online
    assert replayed.traces == policy.result().traces
    assert replayed.log[-1].step == MOST_STEPS - 1

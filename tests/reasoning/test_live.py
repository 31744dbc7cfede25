"""`reasoning.live`: policies over an engine do what they do alone, and what a replay does."""

import os
import random
import signal

import pytest
import torch
from reasoning.fake_engine import FakeEngine, from_pools
from reasoning.synthetic import STOP_TOKENS, make_pool, pool_of, run_live

from falcon_h1r.generation import SamplingParams
from falcon_h1r.reasoning import (
    Ballot,
    DeepConf,
    Equality,
    LiveRun,
    Manifest,
    Offline,
    OnlinePolicy,
    PlainPolicy,
    Question,
    TraceRecorder,
    fitting_window,
    live,
    offline_vote,
    read_record,
    replay,
    tokens_of_all,
    trace_measures,
)

EXACT = Equality("exact")
PARAMS = DeepConf(k=4, window=5, warmup=4, budget=14, eta=40.0, tau=0.9)


def ask(params, folder=None, number=0, reference=None):
    """Question `number`, of prompt (number,), under a DeepConf or an Offline."""
    seed = 7 + 1000 * number
    options = {"seed": seed, "equality": EXACT, "stop_token_ids": STOP_TOKENS}
    online = isinstance(params, DeepConf)
    k = params.k if online else 4
    policy = OnlinePolicy(params, **options) if online else PlainPolicy(params, k=k, **options)
    recorder = None
    if folder is not None:
        manifest = Manifest(
            k=k,
            seed=seed,
            policy=params.to_dict() if online else None,
            stop_token_ids=list(STOP_TOKENS),
            rule="exact",
            reference=reference,
        )
        recorder = TraceRecorder(folder, manifest)
    return Question([number], policy, recorder=recorder, name=str(number))


def run_one(pool, params, folder=None, **engine):
    question = ask(params, folder)
    fake = FakeEngine(from_pools([pool]), **engine)
    run = LiveRun(fake, [question])
    question.interrupted = run.run()
    assert not fake.held and not fake.traces and not fake.rows and not fake.queue
    assert run.done == [question] and not run.open
    return question


def same_run(result, other):
    """Decisions, stop positions, tokens, weights, answers; all but the clock's readings."""
    assert result.to_dict() == other.to_dict()


@pytest.mark.parametrize("seed", range(8))
def test_a_live_run_is_that_of_the_policy_alone(seed):
    pool = make_pool(seed, 14)
    slots = [None, 3, 14, 5][seed % 4]
    question = run_one(pool, PARAMS, max_rows=slots or 64)
    same_run(question.policy.result(), run_live(pool, PARAMS, slots=slots).result())
    assert question.tokens == question.policy.result().tokens


@pytest.mark.parametrize("seed", range(12))
def test_a_recorded_run_replays_to_the_same_decisions(tmp_path, seed):
    rng = random.Random(seed)
    pool = make_pool(seed, 14)
    rows, slow = rng.choice([1, 2, 3, 7, 64]), rng.choice([0, 0, 2, 5])
    question = run_one(pool, PARAMS, tmp_path / "run", max_rows=rows, slow=slow)
    live_result = question.policy.result()
    record = read_record(tmp_path / "run")
    assert record.complete and record.end["done"] == live_result.done != ""
    assert record.end["answer"] == live_result.answer
    assert record.end["tokens"] == live_result.tokens == record.tokens
    again = replay(record, PARAMS)
    assert again.order == "recorded"
    same_run(again.online, live_result)
    for trace, outcome in zip(record.traces, live_result.traces):
        whole = pool[trace.number]
        assert torch.equal(trace.tokens, whole.tokens[: outcome.tokens])
        assert torch.equal(trace.confidence, whole.confidence[: outcome.tokens])
        assert torch.equal(trace.top_logprobs, whole.top_logprobs[: outcome.tokens])
        assert trace.seed == 7 + trace.number and trace.answer == outcome.answer
        assert trace.text == (whole.text if trace.whole else "")


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_run_votes_over_what_there_is(tmp_path, seed):
    rng = random.Random(seed)
    pool = make_pool(seed, 14)
    rows = rng.choice([2, 5, 64])
    at = rng.randrange(run_one(pool, PARAMS, max_rows=rows).policy.steps)
    question = run_one(pool, PARAMS, tmp_path / "run", max_rows=rows, interrupt_at=[at])
    result = question.policy.result()
    record = read_record(tmp_path / "run")
    assert question.interrupted and record.complete
    assert result.done == "interrupted" == record.end["done"]
    assert result.count("interrupted") > 0
    assert len(record.traces) == len(result.traces)
    same_run(replay(record, PARAMS).online, result)
    same_run(result, run_live(pool, PARAMS, slots=rows, interrupt_at=at).result())


def test_ctrl_c_never_comes_between_a_step_and_its_bookkeeping(tmp_path, monkeypatch):
    pool = make_pool(3, 14)
    seen = []
    step = OnlinePolicy.step

    def pressed(self, *arguments):
        stops = step(self, *arguments)
        if self.steps == 9:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(self.done)
        return stops

    monkeypatch.setattr(OnlinePolicy, "step", pressed)
    question = run_one(pool, PARAMS, tmp_path / "run", max_rows=3)
    monkeypatch.undo()
    assert seen == [""] and question.interrupted
    result = question.policy.result()
    assert result.done == "interrupted" and question.policy.steps == 9
    same_run(replay(read_record(tmp_path / "run"), PARAMS).online, result)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_all_with_the_record_closed(tmp_path, monkeypatch):
    end = TraceRecorder.end

    def pressed(self, trace, reason, *rest):
        if reason == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        end(self, trace, reason, *rest)

    monkeypatch.setattr(TraceRecorder, "end", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_one(make_pool(3, 14), PARAMS, tmp_path / "run", interrupt_at=[5])
    assert read_record(tmp_path / "run").end["done"] == "interrupted"


def test_a_question_that_is_done_when_ctrl_c_comes_is_handed_over():
    pool = pool_of([[5.0, 5.0]] * 3, ["1"] * 3)
    params = DeepConf(k=1, window=2, warmup=2, budget=3, tau=0.5)
    handed = []
    question = ask(params)
    step = question.policy.step

    def pressed(*arguments):
        stops = step(*arguments)
        if question.policy.done:
            os.kill(os.getpid(), signal.SIGINT)
        return stops

    question.policy.step = pressed
    assert LiveRun(FakeEngine(from_pools([pool])), [question]).run(on_done=handed.append)
    assert handed == [question] and question.policy.done == "consensus"


def many(count, params, folder=None):
    pools = [make_pool(100 + i, 14) for i in range(count)]
    place = (lambda i: None) if folder is None else (lambda i: folder / f"q{i}")
    return pools, (ask(params, place(i), i) for i in range(count))


@pytest.mark.parametrize(
    ("params", "rows"), [(PARAMS, 64), (DeepConf(**{**PARAMS.to_dict(), "tau": None}), 5)]
)
def test_many_questions_decide_as_one_at_a_time(tmp_path, params, rows):
    pools, questions = many(6, params, tmp_path)
    fake = FakeEngine(from_pools(pools), max_rows=rows, slow=1)
    done = {}
    most = 0

    def watch(run):
        nonlocal most
        most = max(most, len(run.open))

    run = LiveRun(fake, questions, most_open=4)
    assert not run.run(watch, lambda question: done.update({int(question.name): question}))
    assert sorted(done) == list(range(6)) and run.asked == 6 and run.done == []
    assert most == (4 if rows == 64 else most) and 1 < most <= 4
    assert fake.most_rows == min(rows, fake.most_rows) and not fake.held and not fake.traces
    for i, question in done.items():
        result, record = question.policy.result(), read_record(tmp_path / f"q{i}")
        alone = ask(params, None, i)
        LiveRun(FakeEngine(from_pools(pools)), [alone]).run()
        expected = alone.policy.result()
        for ours, theirs in zip(result.traces, expected.traces, strict=True):
            if rows == 64 or params.tau is None:
                assert ours == theirs
        assert (result.answer, result.threshold) == (expected.answer, expected.threshold)
        same_run(replay(record, params).online, result)


def test_rows_go_to_the_oldest_question_first():
    # Two rows, two questions of three traces: the second gets the row that the first cannot use.
    pools = [pool_of([[5.0] * n for n in (2, 4, 2)], ["1"] * 3) for _ in range(2)]
    params = DeepConf(k=1, window=1, warmup=2, budget=3, tau=None)
    fake = FakeEngine(from_pools(pools), max_rows=2)
    widths = []
    run = LiveRun(fake, [ask(params, None, 0), ask(params, None, 1)])
    run.run(lambda run: widths.append([len(q.traces) for q in run.open]))
    # The warm-up's second trace runs alone while the third must wait for the threshold.
    assert widths[:5] == [[2], [1], [1, 1], [0, 0], [1, 1]]
    assert [q.policy.result().tokens for q in run.done] == [8, 8]


def test_no_more_questions_are_taken_after_ctrl_c(tmp_path):
    pools, questions = many(6, PARAMS, tmp_path)
    run = LiveRun(FakeEngine(from_pools(pools), interrupt_at=[10]), questions, most_open=2)
    assert run.run()
    asked = run.asked
    assert asked < 6 and len(list(questions)) == 6 - asked and len(run.done) == asked
    assert {q.policy.done for q in run.done[-2:]} == {"interrupted"}


def test_an_error_leaves_the_traces_so_far(tmp_path):
    question = ask(PARAMS, tmp_path / "run")

    def broken(run):
        if run.engine.steps == 6:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        LiveRun(FakeEngine(from_pools([make_pool(3, 14)])), [question]).run(broken)
    record = read_record(tmp_path / "run")
    assert record.complete and record.end["done"] == "interrupted" and record.end["steps"] == 6
    assert len(record.traces) == 4


@pytest.mark.parametrize("weight", ["majority", "mean", "lowest-group", "bottom-10", "tail"])
@pytest.mark.parametrize("keep", [None, 30.0])
def test_plain_sampling(tmp_path, weight, keep):
    pool = make_pool(5, 10)
    by = "lowest-group" if weight == "majority" and keep else None
    offline = Offline(weight=weight, keep=keep, keep_by=by, budget=9, window=5, tail=3)
    question = run_one(pool, offline, tmp_path / "run", max_rows=4)
    result = question.policy.result()
    ballots = []
    for i, whole in enumerate(pool[:9]):
        answer = "".join(c for c in whole.text if c.isdigit()) or None
        ballots.append(Ballot(i, answer, trace_measures(whole.confidence, 5, 3)))
    assert result.vote == offline_vote(ballots, offline, EXACT)
    assert result.answer == result.vote.answer and result.done == "all"
    assert result.threshold is None and result.params == offline
    assert result.tokens == sum(len(whole.tokens) for whole in pool[:9])
    assert {event.what for event in result.log} == {"start", "end", "all"}
    voters = {trace for candidate in result.vote.candidates for trace in candidate.traces}
    assert {trace.trace for trace in result.traces if trace.weight is not None} == voters
    total = sum(trace.weight for trace in result.traces if trace.weight is not None)
    assert total == pytest.approx(sum(candidate.weight for candidate in result.vote.candidates))
    everybody = {t for candidate in result.unfiltered.candidates for t in candidate.traces}
    assert everybody == {ballot.trace for ballot in ballots if ballot.answer is not None}
    again = replay(read_record(tmp_path / "run"), offline)
    assert again.vote == result.vote and again.tokens == result.tokens
    assert tokens_of_all(result) == result.tokens


def test_plain_sampling_interrupted(tmp_path):
    offline = Offline(weight="tail", budget=9, window=5)
    question = run_one(make_pool(5, 10), offline, tmp_path / "run", max_rows=4, interrupt_at=[25])
    result = question.policy.result()
    assert question.interrupted and result.done == "interrupted" and result.answer is not None
    again = replay(read_record(tmp_path / "run"), Offline(weight="tail", window=5))
    assert again.vote == result.vote
    with pytest.raises(ValueError, match="budget is None"):
        PlainPolicy(Offline())


def test_no_trace_answers(tmp_path):
    pool = pool_of([[5.0, 5.0]] * 4, [None] * 4)
    params = DeepConf(k=1, window=1, warmup=2, budget=4)
    result = run_one(pool, params, tmp_path / "run").policy.result()
    assert (result.answer, result.done, result.vote.candidates) == (None, "budget", ())
    same_run(replay(read_record(tmp_path / "run"), params).online, result)


def test_all_later_traces_are_stopped():
    # The surest of the warm-up gave no answer, the rest is below the threshold: nobody votes.
    pool = pool_of([[3.0, 3.0], [5.0, 5.0], [1.0, 9.0], [2.0, 9.0]], ["1", None, "1", "1"])
    params = DeepConf(k=1, window=1, warmup=2, budget=4, eta=10.0)
    result = run_one(pool, params).policy.result()
    assert result.count("low_confidence") == 2 and result.done == "budget"
    assert result.answer is None and result.unfiltered.answer == "1"
    assert tokens_of_all(result) == 4 * 2 and result.tokens == 6


def test_fewer_warmup_traces_than_rows_and_more(tmp_path):
    pool = make_pool(3, 14)
    for rows in (1, 4, 14):
        question = run_one(pool, PARAMS, max_rows=rows)
        assert question.policy.threshold == run_live(pool, PARAMS).threshold


def test_a_consensus_needs_its_voters(tmp_path):
    # eta 10 of 4 traces: one voter after the warm-up, whose share is 1.
    confidences = [[5.0 + i, 5.0 + i] for i in range(4)] + [[20.0, 20.0]] * 6
    pool = pool_of(confidences, ["1"] * 10)
    for least, tokens in ((1, 8), (2, 10), (4, 14), (99, 20)):
        params = DeepConf(k=1, window=2, warmup=4, budget=10, min_voters=least)
        folder = tmp_path / str(least)
        result = run_one(pool, params, folder, max_rows=1).policy.result()
        assert (result.tokens, result.answer) == (tokens, "1")
        assert result.done == ("budget" if least == 99 else "consensus")
        again = replay(read_record(folder), params)
        same_run(again.online, result)
    # A record from before there was such a number has the paper's rule.
    values = params.to_dict()
    del values["min_voters"]
    assert DeepConf(**values).min_voters == 1
    with pytest.raises(ValueError, match="min_voters is 0"):
        DeepConf(min_voters=0)


def test_what_is_below_by_rounding_only_counts_with_a_margin(tmp_path):
    # All traces say the same, and their lowest groups differ in the last bit.
    near = 5.0 + 2.0**-20
    pool = pool_of([[near, near], [near, near], [5.0, 5.0], [near, near], [4.0, 6.0]], ["1"] * 5)
    for margin, reasons, voters in (
        (0.0, ["stop", "stop", "low_confidence", "stop", "low_confidence"], (0, 1, 3)),
        (1e-4, ["stop", "stop", "stop", "stop", "low_confidence"], (0, 1, 2, 3)),
        (1.0 + 2.0**-20, ["stop"] * 5, (0, 1, 2, 3, 4)),  # at the bar is not below
    ):
        params = DeepConf(k=1, window=1, warmup=2, budget=5, margin=margin, tau=None)
        folder = tmp_path / str(margin)
        result = run_one(pool, params, folder).policy.result()
        assert [trace.reason for trace in result.traces] == reasons
        assert result.vote.candidates[0].traces == voters and result.threshold == near
        same_run(replay(read_record(folder), params).online, result)
    with pytest.raises(ValueError, match="margin is -1"):
        DeepConf(margin=-1)
    # It decides who of the warm-up votes, too.
    pool = pool_of([[near, near], [5.0, 5.0]], ["1", "2"])
    for margin, voters in ((0.0, 1), (1e-4, 2)):
        params = DeepConf(k=1, window=1, warmup=2, budget=2, margin=margin, tau=None)
        assert len(run_one(pool, params).policy.result().vote.candidates) == voters


def test_an_engine_without_a_tokenizer():
    class Decoder:
        def decode(self, ids):
            assert not set(ids) & set(STOP_TOKENS)
            return f"\\boxed{{{len(ids)}}}"

    pool = pool_of([[5.0] * 3] * 2, ["x", "y"])
    pool += pool_of([[5.0] * 2], ["z"], reason="length")
    question = ask(DeepConf(k=1, window=1, warmup=3, budget=3, tau=None))
    LiveRun(FakeEngine(from_pools([pool]), with_text=False), [question], Decoder()).run()
    assert [trace.answer for trace in question.policy.result().traces] == ["2", "2", "2"]
    with pytest.raises(ValueError, match="neither the engine nor the run"):
        LiveRun(FakeEngine(from_pools([make_pool(1, 14)]), with_text=False), [ask(PARAMS)]).run()


def test_more_alternatives_than_the_engine_gives():
    pool = make_pool(1, 14, k=2)
    with pytest.raises(ValueError, match=r"k is 4, expected an integer in 1 \.\. 2"):
        run_one(pool, PARAMS)


def test_a_step_of_several_ks():
    # Rows that ask for fewer alternatives get the columns of the one that asks for most.
    pools = [make_pool(1, 4), make_pool(2, 4)]
    questions = []
    for number, k in enumerate((2, 4)):
        params = DeepConf(k=k, window=3, warmup=4, budget=4)
        policy = OnlinePolicy(params, seed=7 + 1000 * number, equality=EXACT)
        questions.append(Question([number], policy))
    LiveRun(FakeEngine(from_pools(pools)), questions).run()
    for question, pool, k in zip(questions, pools, (2, 4)):
        assert question.sampling.logprobs == k
        for outcome, whole in zip(question.policy.result().traces, pool):
            exact = -whole.top_logprobs[:, :k].double().mean(-1).float()
            mean = trace_measures(exact, 3).mean
            assert outcome.mean == pytest.approx(mean, abs=1e-12)


def test_an_engine_that_stands_still_is_an_error():
    class Still(FakeEngine):
        def step(self):
            return None

    with pytest.raises(RuntimeError, match="nothing to do"):
        LiveRun(Still(from_pools([make_pool(1, 14)])), [ask(PARAMS)]).run()
    for most_open in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"most_open is {most_open}, expected an integer >= 1"):
            LiveRun(None, [], most_open=most_open)
    assert LiveRun(FakeEngine(None), []).run() is False


def test_an_engine_without_room_says_why():
    class Full(FakeEngine):
        free = 0

        def add(self, *arguments, **options):
            raise ValueError("memory_budget is 1 B")

    with pytest.raises(ValueError, match="memory_budget is 1 B"):
        LiveRun(Full(None), [ask(PARAMS)]).run()


def test_windows_that_fit():
    assert [fitting_window(n) for n in (1, 256, 320, 1024, 32768, 65536, 10**6)] == [
        *(8, 8, 10, 32, 1024, 2048, 2048)
    ]


def test_sampling_is_the_policys():
    question = Question([1, 2], OnlinePolicy(PARAMS), SamplingParams(temperature=0.5, seed=3, n=9))
    assert question.sampling.temperature == 0.5 and question.sampling.seed is None
    assert question.seconds == 0.0 and live.TraceRecorder is TraceRecorder

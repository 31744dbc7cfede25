"""What differs from row to row lasts as long as the row does, whoever leaves the batch before."""

import functools
import random

import pytest
import torch
from models import make_config, make_model, random_ids

from falcon_h1r.generation import Engine, SamplingParams, generate, stream
from falcon_h1r.generation.params import STRONGEST

PROMPTS = [random_ids(make_config(), length, seed=length).tolist() for length in (5, 1, 17, 9)]


@functools.cache
def tiny_model():
    return make_model(make_config("two_groups"), dtype=torch.float64)


def drawn(chance: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=chance.choice([1, 2, 5, 9]),
        stop_token_ids=tuple(chance.sample(range(97), chance.choice([0, 10, 30]))),
        logprobs=chance.choice([False, False, True, 0, 1, 2, 5, 200]),
        temperature=chance.choice([0.0, 0.7, 1.5]),
        top_k=chance.choice([0, 0, 3]),
        top_p=chance.choice([1.0, 0.8]),
        min_p=chance.choice([0.0, 0.05]),
        repetition_penalty=chance.choice([1.0, 1.3]),
        presence_penalty=chance.choice([0.0, 0.5]),
        frequency_penalty=chance.choice([0.0, 0.2]),
        seed=chance.randrange(1000),
    )


def check(found, alone):
    """found, alone: (tokens, logprobs or None, alternatives or None) of one sequence."""
    assert torch.equal(found[0], alone[0])
    assert [part is None for part in found[1:]] == [part is None for part in alone[1:]]
    if found[1] is not None:
        torch.testing.assert_close(found[1], alone[1])
    if len(found) > 2 and found[2] is not None:
        assert torch.equal(found[2][0], alone[2][0])
        torch.testing.assert_close(found[2][1], alone[2][1])


def sequence(out, i: int):
    tops = None if out.top_logprobs is None else out.top_logprobs[i]
    return out.sequences[i], None if out.logprobs is None else out.logprobs[i], tops


@pytest.mark.parametrize("seed", range(20))
def test_a_row_is_what_it_is_alone_whatever_the_others_ask_for(seed):
    chance, model = random.Random(seed), tiny_model()
    params = [drawn(chance) for _ in PROMPTS]
    together = generate(model, PROMPTS, params)
    engine = Engine(model, max_rows=chance.choice([1, 2, 3]))
    numbers = [engine.add(prompt, p)[0] for prompt, p in zip(PROMPTS, params)]
    for _ in engine:
        pass
    for i, (prompt, one) in enumerate(zip(PROMPTS, params)):
        alone = sequence(generate(model, [prompt], one), 0)
        check(sequence(together, i), alone)
        traced = engine.pop(numbers[i])
        check((traced.tokens, traced.logprobs), alone[:2])


@pytest.mark.parametrize("asked", [(2, False), (False, 2), (5, 2), (2, 5), (True, 3), (0, False)])
@pytest.mark.parametrize("lengths", [(2, 6), (6, 2)])
def test_rows_that_ask_for_other_logprobs_may_leave_first(asked, lengths):
    params = [
        SamplingParams(max_new_tokens=length, stop_token_ids=(), logprobs=wanted)
        for length, wanted in zip(lengths, asked)
    ]
    out = generate(tiny_model(), PROMPTS[:2], params)
    for i, (length, wanted) in enumerate(zip(lengths, asked)):
        _, logprobs, tops = sequence(out, i)
        assert (logprobs is None) == (wanted is False)
        assert logprobs is None or (logprobs.shape == (length,) and bool((logprobs < 0).all()))
        if isinstance(wanted, bool) or not wanted:
            assert tops is None
        else:
            assert tops[0].shape == tops[1].shape == (length, wanted) and bool((tops[1] < 0).all())


def test_what_there_is_before_and_between_steps_has_the_same_form():
    params = [
        SamplingParams(max_new_tokens=3, stop_token_ids=(), logprobs=wanted)
        for wanted in (2, False, 4)
    ]
    run = stream(tiny_model(), PROMPTS[:3], params)
    for count in range(4):
        out = run.result()
        assert [len(tokens) for tokens in out.sequences] == [count] * 3
        assert [tops is None for tops in out.top_logprobs] == [False, True, False]
        assert [logprobs is None for logprobs in out.logprobs] == [False, True, False]
        next(iter(run), None)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_strongest_penalties_overflow_nothing(sign):
    params = SamplingParams(
        max_new_tokens=40,
        stop_token_ids=(),
        repetition_penalty=STRONGEST**sign,
        presence_penalty=sign * STRONGEST,
        frequency_penalty=sign * STRONGEST,
        temperature=1e-300,
        seed=1,
    )
    model = make_model(make_config())
    assert len(generate(model, PROMPTS[:1], params).sequences[0]) == 40

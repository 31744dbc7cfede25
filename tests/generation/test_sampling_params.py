import math
from dataclasses import FrozenInstanceError

import pytest

from falcon_h1r.generation import SamplingParams, derive_seeds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", 10**400),
        pytest.param("temperature", -(10**5000), id="5,000 digits"),
        ("max_new_tokens", 10**30),
        ("n", 10**12),
        ("top_k", 2**63),
        ("logprobs", 2**40),
        ("thinking_budget", 10**30),
        pytest.param("stop_token_ids", (10**5000,), id="a stop of 5,000 digits"),
        ("stop_token_ids", tuple(range(-1000, 0))),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("presence_penalty", 1e39),
        ("frequency_penalty", -1e39),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", None),
        ("stop_token_ids", 3),
        ("stop_token_ids", (1, -2)),
        ("stop_token_ids", ("a",)),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("n", 0),
        ("logprobs", -1),
        ("logprobs", None),
        ("logprobs", 1.0),
        ("thinking_budget", -1),
        ("thinking_budget", 1.5),
    ],
)
def test_bad_values_are_refused_by_name_in_one_line(name, value):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} is ") and "expected" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_default_is_greedy_with_nothing_switched_on():
    params = SamplingParams()
    assert params.temperature == 0 and not params.wants_logprobs and not params.needs_tokenizer


def test_lists_become_tuples_and_one_string_a_tuple_of_one():
    params = SamplingParams(stop="x", stop_token_ids=[1, 2])
    assert params.stop == ("x",) and params.stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(stop=["x"], stop_token_ids=(1, 2)))
    with pytest.raises(FrozenInstanceError):
        params.seed = 1


@pytest.mark.parametrize(
    ("logprobs", "wanted", "alternatives"),
    [(False, False, 0), (True, True, 0), (0, True, 0), (5, True, 5)],
)
def test_logprobs_counts_alternatives(logprobs, wanted, alternatives):
    params = SamplingParams(logprobs=logprobs)
    assert (params.wants_logprobs, params.alternatives) == (wanted, alternatives)


def test_seeds_of_a_batch_count_prompts_and_samples():
    assert derive_seeds(SamplingParams(seed=10, n=3), 2) == [10, 11, 12, 13, 14, 15]
    rows = [SamplingParams(seed=10, n=2), SamplingParams(seed=5, n=2)]
    assert derive_seeds(rows, 2) == [10, 11, 5, 6]
    assert derive_seeds(SamplingParams(seed=2**63 - 1, n=2), 1) == [2**63 - 1, 0]


def test_fresh_seeds_differ_and_are_whole_numbers_to_every_json_reader():
    first, second = (derive_seeds(SamplingParams(n=2), 2) for _ in range(2))
    assert first != second and first == list(range(first[0], first[0] + 4))
    assert all(0 <= seed < 2**53 for seed in first[:1] + second[:1])
    rows = derive_seeds([SamplingParams(), SamplingParams()], 2)
    assert rows[1] != rows[0] + 1


def test_params_per_prompt_must_fit_the_batch():
    with pytest.raises(ValueError, match="params: 1 given for 2 prompts"):
        derive_seeds([SamplingParams()], 2)
    with pytest.raises(ValueError, match="n: must be the same for all prompts"):
        derive_seeds([SamplingParams(n=1), SamplingParams(n=2)], 2)
    with pytest.raises(ValueError, match="params: expected a SamplingParams"):
        derive_seeds([{"seed": 1}], 1)

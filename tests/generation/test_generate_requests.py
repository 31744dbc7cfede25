"""Requests that generation refuses, before anything runs where it can, and naming what is wrong."""

import functools

import pytest
import torch
from models import make_config, make_model, random_ids

from falcon_h1r.generation import SamplingParams, generate, stream


@functools.cache
def tiny_model():
    return make_model(make_config("two_groups"))


def params(**changes):
    return SamplingParams(**{"max_new_tokens": 12, "stop_token_ids": (), **changes})


PROMPT = random_ids(make_config(), 5).tolist()


def test_caches_that_do_not_fit_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="cache: 2 rows for 1 prompts"):
        stream(model, [PROMPT], params(), cache=model.new_cache(2, 64))
    with pytest.raises(
        ValueError, match="cache: prompt and new tokens need 16 positions, it has 15"
    ):
        stream(model, [PROMPT], params(), cache=model.new_cache(1, 15))
    cache = model.new_cache(1, 64)
    with torch.no_grad():
        model(torch.tensor([PROMPT]), cache=cache)
    with pytest.raises(ValueError, match="cache: row 0 holds 5 tokens"):
        stream(model, [PROMPT], params(), cache=cache)


def masked(*rows):
    return {"attention_mask": torch.tensor(rows)}


def ones(*shape):
    return torch.ones(shape, dtype=torch.int64)


BAD_INPUTS = {
    "no prompts": ([], {}, "expected a .batch, length. tensor or a list"),
    "empty prompt": ([[1], []], {}, "prompt 1 has no tokens"),
    "flat list": ([1, 2], {}, "prompt 0 is not a list of ids"),
    "text": ("hello", {}, "expected a .batch, length. tensor or a list"),
    "floats": ([[1.5]], {}, "prompt 0: expected integers"),
    "words": ([["a"]], {}, "prompt 0 is not a list of ids"),
    "1-D tensor": (ones(2), {}, r"expected the shape \(batch, length\), found \(2,\)"),
    "float tensor": (ones(1, 2).float(), {}, "expected integers, found torch.float32"),
    "id too large": ([[1], [97]], {}, "prompt 1: id 97 is outside the vocabulary of 97"),
    "id negative": ([[-1]], {}, "prompt 0: id -1 is outside"),
    "mask beside list": ([[1]], masked([1]), "only beside a tensor"),
    "mask shape": (ones(1, 2), masked([1, 1, 1]), r"shape \(1, 2\)"),
    "mask values": (ones(1, 2), masked([2, 2]), "expected 1 at real tokens"),
    "mask hole": (ones(1, 3), masked([1, 0, 1]), "row 0 has padding"),
    "mask empty row": (ones(2, 2), masked([1, 1], [0, 0]), "prompt 1 has no tokens"),
    "too long": ([[1] * 501], {}, "501 tokens . max_new_tokens 12 = 513, more than .* 512"),
    "chunk": ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
    "chunk of a bool": ([[1]], {"prefill_chunk": True}, "prefill_chunk is True, expected None or"),
    "params": ([[1]], {"params": [SamplingParams(), SamplingParams()]}, "2 given for 1 prompts"),
    "stop": ([[1]], {"params": params(stop="x")}, "stop: needs a tokenizer"),
    "budget": ([[1]], {"params": params(thinking_budget=3)}, "thinking_budget: needs a tokenizer"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_requests_are_refused_before_anything_runs(case):
    input_ids, options, message = BAD_INPUTS[case]
    options = {"params": params(), **options}
    with pytest.raises(ValueError, match=message) as error:
        stream(tiny_model(), input_ids, **options)
    assert "\n" not in str(error.value)


def test_padding_ids_are_never_looked_up():
    ids = torch.tensor([[-100, 5, 6]])
    out = generate(tiny_model(), ids, params(), attention_mask=torch.tensor([[0, 1, 1]]))
    assert torch.equal(out.sequences[0], generate(tiny_model(), [[5, 6]], params()).sequences[0])


def test_logits_that_are_not_finite_are_an_error_not_a_token():
    model = make_model(make_config())
    with torch.no_grad():
        model.lm_head.weight[40] = torch.nan
    for how in (params(), params(temperature=1.0, logprobs=1), params(top_p=0.5, temperature=1.0)):
        with pytest.raises(
            ValueError, match="row 0, new token 0: the model's logits are not finite"
        ):
            generate(model, [PROMPT], how)

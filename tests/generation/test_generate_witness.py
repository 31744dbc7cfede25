"""Greedy generation against transformers, whose decode is the independent witness.

Unpadded, one prompt at a time: transformers 5.24 is wrong for left padding with projection biases.
Its decode leaves out `time_step_limit`, so that variant is compared with full forwards instead.
"""

import pytest
import torch
from models import VARIANTS, make_config, make_model, random_ids
from witness import make_witness

from falcon_h1r.generation import SamplingParams, generate

NEW = 64


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "finite_dt_limit"])
def test_greedy_tokens_are_transformers(variant):
    config = make_config(variant)
    model = make_model(config, seed=3)
    witness = make_witness(model)
    witness.generation_config.eos_token_id = None
    ids = random_ids(config, 1, 11, seed=5)
    for penalty in (1.0, 1.3):
        expected = witness.generate(
            ids, max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty, pad_token_id=0
        )[0, 11:]
        params = SamplingParams(max_new_tokens=NEW, stop_token_ids=(), repetition_penalty=penalty)
        assert torch.equal(generate(model, ids, params).sequences[0], expected), penalty


def test_stopping_is_transformers():
    config = make_config(eos_token_id=None)
    model = make_model(config, seed=3)
    ids = random_ids(config, 1, 11, seed=5)
    free = generate(model, ids, SamplingParams(max_new_tokens=NEW)).sequences[0].tolist()
    ends = [free[20], free[9]]
    witness = make_witness(model)
    expected = witness.generate(
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0
    )[0, 11:]
    params = SamplingParams(max_new_tokens=NEW, stop_token_ids=ends)
    out = generate(model, ids, params)
    assert torch.equal(out.sequences[0], expected) and out.finish_reasons == ["stop"]

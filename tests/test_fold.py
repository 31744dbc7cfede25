"""Folding the multipliers: the same function, rounded once, in the released layout."""

import pytest
import torch
from measure import rounded_model
from models import VARIANTS, make_config, make_model, random_ids, rms_error, same_weights
from witness import make_witness, witness_logits

from falcon_h1r import FalconH1ForCausalLM
from falcon_h1r.checkpoint import fold, fold_multipliers
from falcon_h1r.ops import REFERENCE
from falcon_h1r.tap_table import MODEL_TAPS, MULTIPLIERS, TAPS, config_value
from falcon_h1r.taps import record


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_same_function_in_float64(variant, monkeypatch):
    """Every multiplier of these models differs from 1, biases stand where they can."""
    monkeypatch.setattr(fold, "PIECE", 100)
    model = make_model(make_config(variant), dtype=torch.float64)
    folded = fold_multipliers(model)
    for key in MULTIPLIERS:
        assert config_value(folded.config, key) == 1.0 != config_value(model.config, key), key
    ids = random_ids(model.config, 2, 21)
    assert rms_error(folded(ids), model(ids)) < 1e-14
    caches = [m.new_cache(2, 24) for m in (folded, model)]
    for part in (ids[:, :20], ids[:, 20:]):
        found, expected = (m(part, cache=c) for m, c in zip((folded, model), caches))
    assert rms_error(found, expected) < 1e-14


@torch.no_grad()
def test_the_tensors_agree_where_the_table_says_that_a_multiplier_acts():
    """The input of a linear layer lacks its multiplier, which is in the weights behind it."""
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    ids = random_ids(model.config, 2, 21)
    seen = []
    for m in (model, fold_multipliers(model)):
        with record(m) as recording:
            m(ids)
        seen.append(recording)
    for tap in (*TAPS, *MODEL_TAPS):
        name = tap.name if tap in MODEL_TAPS else f"layers.1.{tap.name}"
        if tap.multipliers and name in seen[0]:
            late = config_value(model.config, tap.multipliers[0]) if name.endswith(".in") else 1.0
            assert rms_error(seen[1][name] * late, seen[0][name]) < 1e-13, name


@pytest.mark.parametrize("dtype, roundoff", [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
def test_each_weight_is_rounded_once(dtype, roundoff):
    model = make_model(make_config("all_biases"), dtype=dtype)
    exact = fold_multipliers(same_weights(model, dtype=torch.float64)).state_dict()
    found = fold_multipliers(model).state_dict()
    assert found.keys() == exact.keys()
    for name, value in found.items():
        error = (value.double() - exact[name]).abs()
        assert (error <= roundoff * exact[name].abs()).all(), name


@torch.no_grad()
def test_bfloat16_is_about_as_far_from_the_truth_as_unfolded():
    """One more rounding of each weight beside those of every activation."""
    model = rounded_model("h1r_like", torch.bfloat16, seed=3)
    ids = random_ids(model.config, 4, 40)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)(ids)
    assert rms_error(fold_multipliers(model)(ids), exact) < 1.5 * rms_error(model(ids), exact)


def test_what_is_not_scaled_is_shared_and_the_rest_is_not():
    model = make_model(make_config("tied"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_multipliers(model)
    assert not folded.config.tie_word_embeddings and model.config.tie_word_embeddings
    ours, theirs = model.state_dict(), folded.state_dict()
    shared = {n for n in ours if ours[n].data_ptr() == theirs[n].data_ptr()}
    assert "model.layers.0.feed_forward.up_proj.weight" in shared
    assert "model.layers.0.mamba.in_proj.weight" not in shared
    with torch.no_grad():
        for name in set(theirs) - shared:
            theirs[name].zero_()
    for name, value in before.items():
        assert torch.equal(ours[name], value), name


@torch.no_grad()
def test_a_folded_model_is_a_checkpoint_like_any_other(tmp_path):
    model = fold_multipliers(make_model(make_config("two_groups")))
    model.save_pretrained(tmp_path)
    loaded = FalconH1ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = random_ids(model.config, 2, 17)
    assert torch.equal(loaded(ids), model(ids))
    assert rms_error(witness_logits(make_witness(loaded), ids), model(ids)) < 1e-6

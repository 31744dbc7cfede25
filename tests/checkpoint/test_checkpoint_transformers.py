"""The layout is the released one: what either program saves, the other loads to the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint.tiny_checkpoints import assert_same_weights
from models import VARIANTS, load, make_config, make_model, random_ids, relative_error
from transformers import AutoConfig, FalconH1ForCausalLM
from witness import make_witness, witness_logits

from falcon_h1r.checkpoint import save

STORED = {"two_groups", "all_biases", "tied", "no_gated_norm", "d_ssm_null_auto_head"}
# Both sides compute in float32 on float32 weights; sums are ordered differently.
TOLERANCE = 2e-5


@pytest.mark.parametrize("variant", sorted(STORED & set(VARIANTS)))
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 50_000], ids=["single", "sharded"])
def test_transformers_loads_ours(variant, max_shard_bytes, tmp_path):
    model = make_model(make_config(variant))
    save(model, tmp_path / "c", max_shard_bytes=max_shard_bytes)
    theirs, info = FalconH1ForCausalLM.from_pretrained(
        tmp_path / "c", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = random_ids(model.config, 2, 11)
    with torch.no_grad():
        expected = model(ids)
    assert relative_error(witness_logits(theirs, ids), expected) < TOLERANCE


@pytest.mark.parametrize("variant", sorted(STORED & set(VARIANTS)))
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"], ids=["single", "sharded"])
def test_we_load_what_transformers_saves(variant, max_shard_size, tmp_path):
    model = make_model(make_config(variant))
    make_witness(model).save_pretrained(tmp_path / "c", max_shard_size=max_shard_size)
    assert (tmp_path / "c" / "model.safetensors").exists() == (max_shard_size == "5GB")
    loaded = load(tmp_path / "c", dtype=torch.float32, check=True)
    assert_same_weights(loaded, model.state_dict())
    ids = random_ids(model.config, 2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_dtype_auto_is_the_models(tmp_path):
    save(make_model(make_config(), dtype=torch.bfloat16), tmp_path / "c")
    assert AutoConfig.from_pretrained(tmp_path / "c").dtype == torch.bfloat16
    theirs = FalconH1ForCausalLM.from_pretrained(tmp_path / "c", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.eos_token_id == [11, 28]


def test_a_finite_dt_limit_survives(tmp_path):
    model = make_model(make_config("finite_dt_limit"))
    save(model, tmp_path / "c")
    limit = model.config.time_step_limit
    assert tuple(AutoConfig.from_pretrained(tmp_path / "c").time_step_limit) == limit
    assert tuple(json.loads((tmp_path / "c/config.json").read_text())["time_step_limit"]) == limit
    assert load(tmp_path / "c").config.time_step_limit == limit

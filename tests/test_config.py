"""Configurations: strict reading, faithful writing, presets against published counts."""

import copy
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, make_config
from transformers import FalconH1Config as WitnessConfig

from falcon_h1r.config import OPTIONAL, OWN, ConfigError, FalconH1Config, ignored_keys
from falcon_h1r.model import FalconH1ForCausalLM
from falcon_h1r.presets import PRESETS, closed_form_multipliers

RELEASED = FalconH1Config.preset("falcon-h1r-7b").to_dict()
REQUIRED = sorted(
    field.name
    for field in dataclasses.fields(FalconH1Config)
    if field.name not in OPTIONAL and field.name != "head_dim"
)


def read(**changes) -> FalconH1Config:
    return FalconH1Config.from_dict(copy.deepcopy(RELEASED) | changes)


def refused(match: str, **changes) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        read(**changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_json(variant):
    config = make_config(variant)
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert FalconH1Config.from_dict(json.loads(text)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    config = FalconH1Config.preset(name)
    assert FalconH1Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("eos", [None, 11, (11, 28)], ids=str)
def test_what_transformers_saves_is_read(variant, eos, tmp_path):
    config = make_config(variant, eos_token_id=eos)
    values = config.to_dict() | {"time_step_limit": config.time_step_limit}
    WitnessConfig(**values).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    found = FalconH1Config.from_dict(saved)
    if config.mamba_d_head == "auto":  # transformers writes the number it stands for
        config = dataclasses.replace(config, mamba_d_head=config.mamba_head_dim)
    assert found == config
    assert FalconH1Config.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_transformers_reads(variant, tmp_path):
    config = make_config(variant)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = WitnessConfig.from_pretrained(tmp_path)
    assert found.rope_parameters["rope_theta"] == config.rope_theta
    assert tuple(found.time_step_limit) == config.time_step_limit
    assert found.mamba_d_head == config.mamba_head_dim
    for field in dataclasses.fields(config):
        if field.name not in ("rope_theta", "time_step_limit", "mamba_d_head"):
            expected = getattr(config, field.name)
            expected = list(expected) if isinstance(expected, tuple) else expected
            value = getattr(found, field.name)
            assert (list(value) if isinstance(value, tuple) else value) == expected, field.name


@pytest.mark.parametrize("key", REQUIRED)
def test_every_missing_key_is_named(key):
    values = copy.deepcopy(RELEASED)
    del values[key]
    with pytest.raises(ConfigError, match=rf"missing.*\b{key}\b"):
        FalconH1Config.from_dict(values)


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_what_absence_means(key):
    values = copy.deepcopy(RELEASED)
    values.pop(key, None)
    assert getattr(FalconH1Config.from_dict(values), key) == OPTIONAL[key]


def test_absent_head_dim_is_width_over_heads():
    for absent in ({"head_dim": None}, {}):
        values = {k: v for k, v in RELEASED.items() if k != "head_dim"} | absent
        assert FalconH1Config.from_dict(values).head_dim == 3072 // 12
    assert read().head_dim == 128


@pytest.mark.parametrize(
    "key, close",
    [
        ("mamba_d_states", "mamba_d_state"),
        ("rope_thetas", "rope_theta"),
        ("ssm_multiplier", "ssm_multipliers"),
        ("key_multipliers", "key_multiplier"),
    ],
)
def test_unknown_keys_suggest_a_name(key, close):
    refused(f"unknown.*{key}.*'{close}'", **{key: 1})


def test_unknown_keys_without_a_likeness_are_still_named():
    assert "did you mean" not in refused("unknown.*zzz", zzz=1)


BOOKKEEPING = {
    "unsloth_version": "2025.1",
    "unsloth_fixed": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "torchscript": True,
    "_attn_implementation": "sdpa",
    "_attn_implementation_autoset": True,
    "_commit_hash": "0" * 40,
    "use_cache": False,
    "transformers_version": "9",
    "num_labels": 2,
    "id2label": {"0": "a"},
    "temperature": 0.7,
    "bad_words_ids": [[5]],
    "auto_map": {"AutoConfig": "a.b"},
    "is_decoder": True,
    "task_specific_params": None,
    "sliding_window": None,
    "quantization_config": None,
    "layer_types": None,
    "an_unknown_key": None,
    "pruned_heads": {},
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
}


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_keys_without_effect_are_let_through_and_listed(key):
    values = RELEASED | {key: BOOKKEEPING[key], "torch_dtype": "float32", "dtype": "float16"}
    assert FalconH1Config.from_dict(values) == read()
    assert ignored_keys(values) == [key] and ignored_keys(RELEASED) == []


def test_all_keys_that_transformers_writes_are_known():
    """Nothing is listed of it but what has no effect; nothing is refused."""
    values = WitnessConfig(**RELEASED).to_dict()
    assert FalconH1Config.from_dict(values | BOOKKEEPING) == read()
    assert set(ignored_keys(values)) < set(values) - set(RELEASED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("use_sliding_window", 0),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", True),
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("use_bfloat16", True),
        ("layer_types", ["full_attention"]),
        ("final_logit_softcapping", 30.0),
        ("quantization_config", {"bits": 4}),
        ("quantization", {"bits": 4}),
        ("residual_multiplier", 1.0),
    ],
)
def test_keys_that_could_change_the_arithmetic_are_refused(key, value):
    refused(key, **{key: value})


def test_null_means_what_it_means_in_transformers():
    assert read(num_key_value_heads=None).num_key_value_heads == 12
    assert read(ssm_multipliers=None).ssm_multipliers == (1.0,) * 5
    assert read(mlp_multipliers=None).mlp_multipliers == (1.0, 1.0)
    for key in ("mamba_conv_bias", "mamba_proj_bias", "projectors_bias"):
        assert getattr(read(**{key: None}), key) is False
    assert not read(mamba_rms_norm=None).mamba_rms_norm
    assert read(attention_dropout=None, mamba_use_mlp=None) == read()
    assert read(rope_theta=None, rope_parameters={"rope_theta": 1e11, "factor": None}) == read()
    assert read(eos_token_id=-1).eos_token_ids == ()
    witness = WitnessConfig(**(RELEASED | {"num_key_value_heads": None, "mlp_multipliers": None}))
    assert (witness.num_key_value_heads, witness.mlp_multipliers) == (12, [1.0, 1.0])
    for key in ("hidden_size", "key_multiplier", "rms_norm_eps", "mamba_n_groups", "hidden_act"):
        refused(key, **{key: None})


def test_numbers_as_python_writes_them(tmp_path):
    """Older versions of transformers write Infinity; a NaN is refused by its key, not as JSON."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED | {"time_step_limit": [0.0, math.inf], "_loss": math.nan}))
    assert FalconH1Config.from_pretrained(tmp_path) == read()
    file.write_text(json.dumps(RELEASED | {"key_multiplier": math.nan}))
    with pytest.raises(ConfigError, match=r"config\.json: .*key_multiplier is nan"):
        FalconH1Config.from_pretrained(tmp_path)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("key", sorted({*RELEASED, "rope_parameters", "unknown"} - OWN))
def test_values_that_cannot_be_shown_are_refused_too(key):
    for value in (deep(10_000), 10**5000, [10**5000] * 5, [deep(10_000)] * 2, {1: 2}, math.nan):
        with pytest.raises(ConfigError) as caught:
            FalconH1Config.from_dict(RELEASED | {key: value})
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_keys_are_strings_and_shown_as_such():
    for key in (1, None, ("a",)):
        with pytest.raises(ConfigError, match="is no string"):
            FalconH1Config.from_dict(RELEASED | {key: 1})
    message = refused("unknown", **{"a\nb": 1} | {f"k{n}" * 500: 1 for n in range(50)})
    assert "and 43 more" in message and len(message) < 1500


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3", None])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_rope_scaling_is_refused_by_name(key, name, kind):
    refused(f"{key}.*{kind!r}", **{key: {name: kind, "factor": 4.0}})


def test_contradicting_rope_types_are_refused():
    refused("rope_parameters", rope_parameters={"rope_type": "default", "type": "yarn"})


def test_rope_theta_flat_nested_or_both():
    flat = {k: v for k, v in RELEASED.items() if k != "rope_theta"}
    for key in ("rope_parameters", "rope_scaling"):
        nested = {key: {"rope_theta": 1e6, "rope_type": "default"}}
        assert FalconH1Config.from_dict(flat | nested).rope_theta == 1e6
        assert FalconH1Config.from_dict(flat | {"rope_theta": 1e6} | nested).rope_theta == 1e6
        refused("contradicting rope_theta", **nested)
    refused("rope_parameters.*unknown.*factor", rope_parameters={"factor": 2.0})
    refused("rope_parameters.*'yarn'", rope_parameters="yarn")
    with pytest.raises(ConfigError, match=r"missing.*rope_theta"):
        FalconH1Config.from_dict(flat | {"rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize("value", [None, "abc", "1e4", [], [1e4], {}, True, 0, -1.0, math.inf])
def test_rope_theta_must_be_a_positive_number(value):
    refused("rope_theta", rope_theta=value)
    refused("rope_theta", rope_parameters={"rope_theta": value})


def test_other_models_and_unsupported_values_are_refused():
    refused("model_type.*'llama'", model_type="llama")
    refused("hidden_act", hidden_act="gelu")
    refused("attention_dropout", attention_dropout=0.1)
    refused("attn_layer_indices", attn_layer_indices=[0])
    with pytest.raises(ConfigError, match="JSON object"):
        FalconH1Config.from_dict([])


def test_special_floats():
    infinite = {"__float__": "Infinity"}
    assert read(time_step_limit=[0.0, infinite]).time_step_limit == (0.0, math.inf)
    assert read(time_step_limit=[0.01, infinite]).time_step_limit == (0.01, math.inf)
    written = read(time_step_limit=[0.01, infinite]).to_dict()["time_step_limit"]
    assert written == [0.01, infinite]
    assert "time_step_limit" not in read().to_dict()
    refused("not a number", time_step_limit=[0.0, {"__float__": "wide"}])
    refused("not a number", time_step_limit=[0.0, {"__float__": 10**400}])
    refused("time_step_limit", time_step_limit=[{"__float__": "NaN"}, 1.0])
    for limit in ([0.1], [0.2, 0.1], [0.1, 0.1], [-1.0, 1.0], None, "0, 1", [None, 1.0]):
        refused("time_step_limit", time_step_limit=limit)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_key_value_heads": 5}, "num_attention_heads=12.*num_key_value_heads=5"),
        ({"head_dim": 127}, "head_dim=127.*even"),
        ({"mamba_n_heads": 25}, "3072.*mamba_n_heads=25"),
        ({"mamba_d_head": 64}, "mamba_d_head=64.*128"),
        ({"mamba_n_groups": 5}, "mamba_n_heads=24.*mamba_n_groups=5"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 10.0}, r"vocab_size is 10\.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"mamba_rms_norm": 1}, "mamba_rms_norm is 1"),
        ({"key_multiplier": "1"}, "key_multiplier is '1'"),
        ({"key_multiplier": math.nan}, "key_multiplier is nan"),
        ({"key_multiplier": 10**400}, "key_multiplier"),
        ({"ssm_multipliers": [1.0] * 4}, "ssm_multipliers.*5 .*numbers"),
        ({"ssm_multipliers": [1.0] * 4 + [math.nan]}, "ssm_multipliers"),
        ({"mlp_multipliers": [1.0, math.inf]}, "mlp_multipliers"),
        ({"mlp_multipliers": 1.0}, "mlp_multipliers.*2 .*numbers"),
        ({"mamba_d_ssm": 0}, "mamba_d_ssm is 0"),
        ({"mamba_d_ssm": math.inf}, "mamba_d_ssm"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"bos_token_id": 2.0}, "bos_token_id"),
        ({"pad_token_id": math.nan}, "pad_token_id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_by_name(changes, words):
    refused(words, **changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
) | st.sampled_from(
    [10**400, [10**400] * 5, {"__float__": "NaN"}, {"__float__": []}, {"rope_type": []}]
)


@settings(max_examples=300)
@given(key=st.sampled_from([*sorted(RELEASED), "rope_parameters", "time_step_limit"]), value=JSON)
def test_any_json_value_gives_a_config_or_a_config_error(key, value):
    try:
        config = read(**{key: value})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert FalconH1Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_is_a_value():
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    assert hash(config) == hash(read()) and config != read(rope_theta=1e4)
    with pytest.raises(ConfigError):
        dataclasses.replace(config, head_dim=3)


def test_derived_sizes():
    config = read()
    assert (config.d_ssm, config.mamba_head_dim) == (3072, 128)
    assert config.conv_dim == 3072 + 2 * 256 and config.d_in_proj == 2 * 3072 + 2 * 256 + 24
    assert read(mamba_d_ssm=None, mamba_d_head="auto").d_ssm == 2 * 3072


PARAMETERS = {
    "falcon-h1r-7b": 7_585_648_736,
    "falcon-h1-0.5b": 521_411_104,
    "falcon-h1-1.5b": 1_554_859_392,
    "falcon-h1-1.5b-deep": 1_554_872_208,
    "falcon-h1-3b": 3_149_387_264,
    "falcon-h1-7b": 7_585_648_736,
    "falcon-h1-34b": 33_642_516_224,
    "tiny-90m": 91_131_072,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_parameter_counts(name):
    model = FalconH1ForCausalLM(FalconH1Config.preset(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_released_7b_has_the_checkpoints_tensors():
    """3 + 44 * 17 tensors, as in the published index, with shapes known from it."""
    state = FalconH1ForCausalLM(FalconH1Config.preset("falcon-h1r-7b"), device="meta").state_dict()
    assert len(state) == 3 + 44 * 17
    layer = "model.layers.43."
    expected = {
        "model.embed_tokens.weight": (130048, 3072),
        "lm_head.weight": (130048, 3072),
        layer + "self_attn.q_proj.weight": (1536, 3072),
        layer + "self_attn.o_proj.weight": (3072, 1536),
        layer + "mamba.in_proj.weight": (6680, 3072),
        layer + "mamba.conv1d.weight": (3584, 1, 4),
        layer + "mamba.norm.weight": (3072,),
        layer + "mamba.A_log": (24,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("tiny")])
def test_printed_multipliers_follow_the_closed_form(name):
    """To six digits, as many as are printed; the Tiny models were trained with other ones."""
    config = FalconH1Config.preset(name)
    expected = closed_form_multipliers(
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.d_ssm,
        config.mamba_d_state,
    )
    for key, value in expected.items():
        found = getattr(config, key)
        found, value = (v if isinstance(v, tuple) else (v,) for v in (found, value))
        assert all(map(lambda a, b: math.isclose(a, b, rel_tol=5e-7), found, value)), key


def test_the_7b_preset_is_of_one_model():
    """Base: vocabulary 130048, chunk 128. Instruct has 130049 and 256."""
    base = FalconH1Config.preset("falcon-h1-7b")
    assert (base.vocab_size, base.mamba_chunk_size) == (130048, 128)


def test_presets_name_their_sources():
    assert set(PRESETS) == set(PARAMETERS)
    for sources in PRESETS.values():
        assert all(source.grade in ("printed", "derived") and source.where for source in sources)
    with pytest.raises(ConfigError, match=r"'falcon-9b'.*falcon-h1r-7b"):
        FalconH1Config.preset("falcon-9b")


def test_whole_numbers_are_the_floats_they_equal():
    """One text for one configuration: a cache's fingerprint is taken over it."""
    whole = read(rope_theta=10**11, key_multiplier=1, mlp_multipliers=[1, 2])
    same = read(rope_theta=1e11, key_multiplier=1.0, mlp_multipliers=[1.0, 2.0])
    assert json.dumps(whole.to_dict()) == json.dumps(same.to_dict())

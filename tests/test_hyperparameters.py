"""Every hyperparameter matters: for each field of the configuration, something that fails if the
package ignores it.

Where a change leaves the shapes alone, the same weights must give other logits, and the ones that
the plain-Python textbook gives for the changed configuration.
"""

import dataclasses

import pytest
import torch
from models import (
    make_config,
    make_model,
    random_ids,
    relative_error,
    same_weights,
    textbook_logits,
)

from falcon_h1r.config import ConfigError, FalconH1Config
from falcon_h1r.model import FalconH1ForCausalLM
from falcon_h1r.ops import REFERENCE, TORCH

BOUND = 1e-13  # about 500 roundoffs of float64
TABLES = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])


def one_of(name: str, index: int, factor: float = 1.5):
    """The multipliers `name` with one of them changed."""
    values = list(getattr(make_config(), name))
    values[index] *= factor
    return {name: tuple(values)}


# Changes that leave every shape as it is, from "two_groups" unless a start is named.
SAME_SHAPES = {
    "embedding_multiplier": {"embedding_multiplier": 7.0},
    "lm_head_multiplier": {"lm_head_multiplier": 0.9},
    "attention_in_multiplier": {"attention_in_multiplier": 1.0},
    "attention_out_multiplier": {"attention_out_multiplier": 1.0},
    "key_multiplier": {"key_multiplier": 1.0},
    "ssm_in_multiplier": {"ssm_in_multiplier": 1.0},
    "ssm_out_multiplier": {"ssm_out_multiplier": 1.0},
    "ssm_multipliers z": one_of("ssm_multipliers", 0),
    "ssm_multipliers x": one_of("ssm_multipliers", 1),
    "ssm_multipliers B": one_of("ssm_multipliers", 2),
    "ssm_multipliers C": one_of("ssm_multipliers", 3),
    "ssm_multipliers dt": one_of("ssm_multipliers", 4),
    "mlp_multipliers gate": one_of("mlp_multipliers", 0),
    "mlp_multipliers down": one_of("mlp_multipliers", 1),
    "time_step_limit low": {"time_step_limit": (0.05, float("inf"))},
    "time_step_limit high": {"time_step_limit": (0.0, 0.05)},
    "rope_theta": {"rope_theta": 1e11},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "mamba_norm_before_gate": {"mamba_norm_before_gate": True},
    "head_dim (with half the heads)": {
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "mamba_n_groups (with twice the state)": {"mamba_n_groups": 1, "mamba_d_state": 48},
}

# Changes of shapes, with the parameter that shows it and the change of its shape.
LAYER = "model.layers.1."
OTHER_SHAPES = {
    "vocab_size": ({"vocab_size": 98}, "lm_head.weight", (98, 48)),
    "hidden_size": ({"hidden_size": 50}, "model.embed_tokens.weight", (97, 50)),
    "intermediate_size": (
        {"intermediate_size": 70},
        LAYER + "feed_forward.down_proj.weight",
        (48, 70),
    ),
    "num_attention_heads": (
        {"num_attention_heads": 6},
        LAYER + "self_attn.q_proj.weight",
        (96, 48),
    ),
    "num_key_value_heads": (
        {"num_key_value_heads": 4},
        LAYER + "self_attn.v_proj.weight",
        (64, 48),
    ),
    "head_dim": ({"head_dim": 10}, LAYER + "self_attn.o_proj.weight", (48, 40)),
    "mamba_d_ssm": (
        {"mamba_d_ssm": 80, "mamba_d_head": "auto"},
        LAYER + "mamba.out_proj.weight",
        (48, 80),
    ),
    "mamba_expand": (
        {"mamba_expand": 3, "mamba_d_ssm": None, "mamba_d_head": 36},
        LAYER + "mamba.out_proj.weight",
        (48, 144),
    ),
    "mamba_n_heads": ({"mamba_n_heads": 8, "mamba_d_head": 8}, LAYER + "mamba.A_log", (8,)),
    "mamba_d_state": ({"mamba_d_state": 20}, LAYER + "mamba.in_proj.weight", (212, 48)),
    "mamba_n_groups": ({"mamba_n_groups": 4}, LAYER + "mamba.conv1d.weight", (256, 1, 4)),
    "mamba_d_conv": ({"mamba_d_conv": 2}, LAYER + "mamba.conv1d.weight", (160, 1, 2)),
    "one tap": ({"mamba_d_conv": 1}, LAYER + "mamba.conv1d.weight", (160, 1, 1)),
}

# Switches that add or remove parameters: those with the switch on.
ATTENTION = [LAYER + f"self_attn.{name}_proj.bias" for name in "qkvo"]
MLP = [LAYER + f"feed_forward.{name}_proj.bias" for name in ("gate", "up", "down")]
SWITCHES = {
    "attention_bias": ATTENTION,
    "mlp_bias": MLP,
    "mamba_proj_bias": [LAYER + "mamba.in_proj.bias"],
    "projectors_bias": [LAYER + "mamba.out_proj.bias"],
    "mamba_conv_bias": [LAYER + "mamba.conv1d.bias"],
    "mamba_rms_norm": [LAYER + "mamba.norm.weight"],
}

# Fields with a test of their own below.
ELSEWHERE = {
    "num_hidden_layers",
    "tie_word_embeddings",
    "mamba_d_head",
    "mamba_chunk_size",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
}


def test_every_field_is_covered():
    changed = {key for change in SAME_SHAPES.values() for key in change}
    changed |= {key for change, *_ in OTHER_SHAPES.values() for key in change}
    fields = {field.name for field in dataclasses.fields(FalconH1Config)}
    assert fields == changed | set(SWITCHES) | ELSEWHERE


def shapes(model) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
@TABLES
@pytest.mark.parametrize("case", SAME_SHAPES)
def test_a_change_with_the_same_weights(case, ops):
    start = make_model(make_config(), ops=ops, dtype=torch.float64)
    changed = same_weights(start, **SAME_SHAPES[case])
    ids = random_ids(start.config, 1, 9)
    before, after = start(ids), changed(ids)
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, textbook_logits(changed, ids)) < BOUND
    cache = changed.new_cache(1, 9)
    steps = [changed(ids[:, t : t + 1], cache=cache) for t in range(9)]
    assert relative_error(torch.cat(steps, dim=1), after) < BOUND


@torch.no_grad()
@TABLES
@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_a_change_of_shapes(case, ops):
    change, name, expected = OTHER_SHAPES[case]
    start = make_model(make_config(), ops=ops, dtype=torch.float64)
    changed = make_model(make_config(**change), ops=ops, dtype=torch.float64)
    assert shapes(changed)[name] == expected != shapes(start).get(name)
    ids = random_ids(start.config, 1, 9)
    assert relative_error(changed(ids), textbook_logits(changed, ids)) < BOUND


@torch.no_grad()
@TABLES
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_that_adds_parameters(switch, ops):
    """Exactly the named parameters come and go, each acts, and nothing else stands for them."""
    off, on = (
        make_model(make_config(**{switch: value}), ops=ops, dtype=torch.float64)
        for value in (False, True)
    )
    added = set(on.state_dict()) - set(off.state_dict())
    in_one_layer = {name for name in added if name.startswith(LAYER)}
    assert in_one_layer == set(SWITCHES[switch]) and len(added) == 3 * len(in_one_layer)
    assert not set(off.state_dict()) - set(on.state_dict())
    ids = random_ids(on.config, 1, 9)
    logits = on(ids)
    assert relative_error(logits, textbook_logits(on, ids)) < BOUND
    assert relative_error(off(ids), textbook_logits(off, ids)) < BOUND
    for name in SWITCHES[switch]:
        parameter = dict(on.named_parameters())[name]
        kept = parameter.clone()
        parameter += torch.randn(parameter.shape, dtype=parameter.dtype)
        # k_proj's bias moves all scores of a query by an amount that rope makes depend on the key.
        assert relative_error(on(ids), logits) > 1e-4, name
        parameter.copy_(kept)


def test_num_hidden_layers():
    for layers in (1, 2, 4):
        model = make_model(make_config(num_hidden_layers=layers), dtype=torch.float64)
        assert len(model.model["layers"]) == layers == len(model.new_cache(1, 1).states)
        ids = random_ids(model.config, 1, 5)
        with torch.no_grad():
            assert relative_error(model(ids), textbook_logits(model, ids)) < BOUND


def test_tie_word_embeddings():
    model = make_model(make_config("tied"), dtype=torch.float64)
    assert "lm_head.weight" not in model.state_dict() and not hasattr(model, "lm_head")
    ids = random_ids(model.config, 1, 5)
    before = model(ids)
    assert relative_error(before.detach(), textbook_logits(model, ids)) < BOUND
    with torch.no_grad():
        unseen = next(i for i in range(97) if i not in ids)
        model.model["embed_tokens"].weight[unseen] += 1
        changed = (model(ids) != before).any(1).flatten()
    assert changed.nonzero().flatten().tolist() == [unseen]


def test_mamba_d_head_is_redundant_and_checked():
    auto = make_config(mamba_d_head="auto")
    assert auto.mamba_head_dim == make_config().mamba_head_dim == 16
    with pytest.raises(ConfigError, match="mamba_d_head"):
        make_config(mamba_d_head=8)


@torch.no_grad()
def test_mamba_chunk_size_reaches_the_scan_and_changes_nothing_else():
    sizes = []

    def scan(*arguments, chunk_size, **options):
        sizes.append(chunk_size)
        return TORCH.ssd_scan(*arguments, chunk_size=chunk_size, **options)

    model = make_model(make_config(), ops=TORCH._replace(ssd_scan=scan), dtype=torch.float64)
    ids = random_ids(model.config, 2, 30)
    logits = model(ids)
    for chunk_size in (1, 7, 29, 30, 31, 256):
        sizes.clear()
        changed = same_weights(model, mamba_chunk_size=chunk_size)
        assert relative_error(changed(ids), logits) < BOUND
        assert sizes == [chunk_size] * 3


@torch.no_grad()
def test_max_position_embeddings_limits_a_row_and_nothing_else():
    """Rotary angles need no table: a config that admits more positions computes the same."""
    model = make_model(make_config(max_position_embeddings=4), dtype=torch.float64)
    ids = random_ids(model.config, 1, 5)
    more = same_weights(model, max_position_embeddings=512)
    assert torch.equal(model(ids[:, :4]), more(ids[:, :4])) and more(ids).shape[1] == 5
    with pytest.raises(ValueError, match="5 tokens, more than max_position_embeddings 4"):
        model(ids)


@torch.no_grad()
def test_special_tokens_do_not_enter_the_forward():
    """The pad token's embedding is an ordinary row, also where it is a real token."""
    model = make_model(make_config(), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 11, 28, 5, 0]])
    other = same_weights(model, bos_token_id=None, pad_token_id=5, eos_token_id=None)
    assert torch.equal(model(ids), other(ids))
    assert make_config(eos_token_id=7).eos_token_ids == (7,)
    assert make_config(eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert make_config(eos_token_id=None).eos_token_ids == ()


def test_initializer_range():
    for scale in (0.02, 0.5):
        model = FalconH1ForCausalLM(make_config(initializer_range=scale))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                # The deviation of n draws is within 5 / sqrt(2 n) of the true one.
                bound = 5 * scale / (2 * parameter.numel()) ** 0.5
                assert abs(float(parameter.detach().std()) - scale) < bound, name


def test_fresh_weights_follow_the_generator():
    config = make_config("all_biases")
    models = [FalconH1ForCausalLM(config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        model.init_weights(torch.Generator().manual_seed(seed))
    first, again, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(not torch.equal(a, b) for a, b in zip(first, other))
    for name, parameter in models[0].named_parameters():
        if name.endswith("bias") and not name.endswith("dt_bias"):
            assert not parameter.any(), name
        if name.endswith("dt_bias"):
            dt = torch.nn.functional.softplus(parameter)
            assert (dt > 0.00099).all() and (dt < 0.101).all()

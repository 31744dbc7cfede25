"""Adapters: the maths, what learns, merging, and peft's files both ways."""

import json

import peft
import pytest
import torch
from models import make_config, make_model, random_ids, relative_error
from witness import make_witness

from falcon_h1r.checkpoint.fold import fold_multipliers
from falcon_h1r.cpu import use_int8
from falcon_h1r.training import (
    add_lora,
    load_lora,
    merge_lora,
    next_token_loss,
    remove_lora,
    save_lora,
    trainable,
)

LINEAR = ["q_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "down_proj"]
ALL = [*LINEAR, "k_proj", "up_proj", "mamba.out_proj", "conv1d", "lm_head"]


def adapted(targets=ALL, seed=3, dtype=torch.float32, **options):
    """A model whose adapters matter."""
    model = make_model(make_config("all_biases"), dtype=dtype)
    torch.manual_seed(seed)
    add_lora(model, targets, rank=3, alpha=7.0, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
    return model


def plain(model):
    return {n: p for n, p in model.named_parameters() if "lora_" not in n}


def by_hand(model):
    """Weights with the adapters added, in a model that never had any."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in [n for n in state if n.endswith("lora_A")]:
        base = name.removesuffix("lora_A")
        delta = 7.0 / 3 * state[base + "lora_B"] @ state[name]
        state[base + "weight"] += delta.view(state[base + "weight"].shape)
    other = make_model(model.config, dtype=model.dtype)
    other.load_state_dict({n: p for n, p in state.items() if "lora_" not in n})
    return other


def test_an_adapted_model_is_the_model_with_other_weights():
    model = adapted(dtype=torch.float64)
    ids = random_ids(model.config, 2, 21)
    other = by_hand(model)
    assert relative_error(model(ids).detach(), other(ids).detach()) < 1e-12
    assert (
        relative_error(model(ids).detach(), make_model(model.config, dtype=torch.float64)(ids))
        > 0.1
    )
    cache, alone = model.new_cache(2, 22), other.new_cache(2, 22)
    for part in (ids[:, :20], ids[:, 20:]):
        assert relative_error(model(part, cache=cache), other(part, cache=alone)) < 1e-12


def test_adapters_alone_learn_and_their_gradients_are_those_of_the_weights():
    model = adapted(dtype=torch.float64)
    other, ids = by_hand(model), random_ids(model.config, 2, 21)
    for network in (model, other):
        next_token_loss(network, ids, ids.roll(-1, 1), recompute=network is model).backward()
    weights = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
        if name.endswith("lora_B"):
            base = name.removesuffix("lora_B")
            gradient = weights[base + "weight"].grad.reshape(len(parameter), -1)
            A = dict(model.named_parameters())[base + "lora_A"]
            assert relative_error(parameter.grad, 7.0 / 3 * gradient @ A.T) < 1e-11, name
            assert relative_error(A.grad, 7.0 / 3 * parameter.T @ gradient) < 1e-11, name


def test_a_new_adapter_changes_nothing_and_says_what_learns():
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 9)
    expected = model(ids)
    report = add_lora(model, ["layers.1.mamba.out_proj", "q_proj"], rank=2)
    assert torch.equal(model(ids), expected)
    # 48 wide: out_proj 64 -> 48 once, q_proj 48 -> 64 in three layers
    assert report.kinds == {
        "model.layers.N.self_attn.q_proj.lora_A": (3, 3 * 2 * 48),
        "model.layers.N.self_attn.q_proj.lora_B": (3, 3 * 64 * 2),
        "model.layers.N.mamba.out_proj.lora_A": (1, 2 * 64),
        "model.layers.N.mamba.out_proj.lora_B": (1, 48 * 2),
    }
    assert "896 of" in str(report) and "q_proj.lora_A" in str(report)
    remove_lora(model)
    assert torch.equal(model(ids), expected)
    assert trainable(model).total == sum(n for _, n in trainable(model).kinds.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_one_rounding(dtype):
    model = adapted()
    exact = {n: p.detach().double() for n, p in by_hand(same(model)).named_parameters()}
    if dtype is torch.bfloat16:
        model = model.to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        exact = {n: p.detach().double() for n, p in by_hand(same(model)).named_parameters()}
    merge_lora(model)
    assert not [n for n, _ in model.named_parameters() if "lora_" in n]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.dtype in (dtype, torch.float32)
        eps = torch.finfo(parameter.dtype).eps
        assert ((parameter.double() - exact[name]).abs() <= eps * exact[name].abs() + 1e-12).all()


def same(model):
    """The adapted model in float64."""
    wide = adapted(dtype=torch.float64)
    wide.load_state_dict(model.state_dict())
    return wide


def test_peft_reads_what_we_write_and_we_read_what_peft_writes(tmp_path):
    model = adapted(LINEAR)
    ids = random_ids(model.config, 2, 13)
    save_lora(model, tmp_path / "ours")
    base = make_model(model.config)
    theirs = peft.PeftModel.from_pretrained(make_witness(base), tmp_path / "ours")
    with torch.no_grad():
        assert relative_error(model(ids), theirs(ids, use_cache=False).logits) < 1e-5
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        theirs.save_pretrained(tmp_path / "theirs")
        report = load_lora(base, tmp_path / "theirs")
        assert relative_error(base(ids), theirs(ids, use_cache=False).logits) < 1e-5
    assert len(report.kinds) == 2 * len(LINEAR)


def test_ours_go_out_and_in_with_the_convolution(tmp_path):
    model = adapted()
    save_lora(model, tmp_path / "a")
    save_lora(model, tmp_path / "a")  # replaces itself
    other = make_model(model.config)
    load_lora(other, tmp_path / "a")
    ids = random_ids(model.config, 2, 13)
    assert torch.equal(other(ids), model(ids))


def test_an_adapter_of_released_multipliers_fits_a_folded_model(tmp_path):
    model = adapted(dtype=torch.float64)
    save_lora(model, tmp_path / "a")
    folded = fold_multipliers(make_model(model.config, dtype=torch.float64))
    load_lora(folded, tmp_path / "a")
    ids = random_ids(model.config, 2, 13)
    assert relative_error(folded(ids).detach(), model(ids).detach()) < 1e-6  # stored in float64
    with pytest.raises(ValueError, match="adapter"):
        fold_multipliers(model)


def test_int8_layers_carry_adapters_and_keep_them(tmp_path):
    model = make_model(make_config())
    use_int8(model)
    ids = random_ids(model.config, 2, 9)
    expected = model(ids)
    add_lora(model, ["out_proj"], rank=2)
    assert torch.equal(model(ids), expected)
    with pytest.raises(ValueError, match="no weights to add to"):
        merge_lora(model)


def test_refusals(tmp_path):
    model = make_model(make_config())
    for targets, message in (
        (["qproj"], "names no module; there are: .*q_proj"),
        (["q_proj", "norm"], "is a GatedRMSNorm"),
        (["proj"], "names no module"),
        ([], "found none"),
        ("q_proj", "several names"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(model, targets)
    for options in ({"rank": 0}, {"dropout": 1.0}, {"alpha": float("nan")}):
        with pytest.raises(ValueError):
            add_lora(model, ["q_proj"], **options)
    assert all(p.requires_grad for p in model.parameters())  # a refusal changes nothing
    with pytest.raises(ValueError, match="0 adapters"):
        save_lora(model, tmp_path / "none")
    add_lora(model, ["q_proj"])
    with pytest.raises(ValueError, match="already"):
        add_lora(model, ["k_proj"])
    with pytest.raises(ValueError, match="adapter"):
        model.save_pretrained(tmp_path / "whole")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("x")
    with pytest.raises(ValueError, match=r"diary\.txt"):
        save_lora(model, tmp_path / "full")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("peft_type", "IA3", "not LORA"),
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern"),
        ("r", 5, "expected"),
        ("r", 0, "r is 0"),
        ("lora_alpha", "x", "lora_alpha"),
        ("falcon_h1_multipliers", {"key_multiplier": 2.0}, "multipliers"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, key, value, message):
    save_lora(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = make_model(make_config("all_biases"))
    with pytest.raises(ValueError, match=message):
        load_lora(model, tmp_path / "a")
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_model(tmp_path):
    save_lora(adapted(), tmp_path / "a")
    for config in (make_config("all_biases", num_hidden_layers=2), make_config("h1r_like")):
        with pytest.raises(ValueError, match=r"has no layer|expected"):
            load_lora(make_model(config), tmp_path / "a")
    with pytest.raises(OSError):
        load_lora(make_model(make_config()), tmp_path / "nothing")

"""The cost sheet's formulas against the model's own tensors and torch's own FLOP counter."""

import pytest
import torch
from models import VARIANTS, make_config, make_model, random_ids
from torch.utils.flop_counter import FlopCounterMode

from falcon_h1r import FalconH1Config, FalconH1ForCausalLM, cost
from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.presets import PRESETS


@pytest.mark.parametrize("name", list(PRESETS))
def test_parameter_counts_of_presets(name):
    config = FalconH1Config.preset(name)
    model = FalconH1ForCausalLM(config, device="meta")
    assert cost.parameter_counts(config)["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_bytes_equal_those_of_the_tensors(variant, dtype):
    config = make_config(variant)
    model = FalconH1ForCausalLM(config, dtype=dtype)
    assert cost.weight_bytes(config, dtype) == sum(p.nbytes for p in model.parameters())
    counts = cost.parameter_counts(config)
    groups = {"embedding": "embed_tokens", "head": "lm_head", "attention": "self_attn"}
    for part, key in (groups | {"mamba": ".mamba.", "mlp": "feed_forward"}).items():
        assert counts[part] == sum(p.numel() for n, p in model.named_parameters() if key in n), part
    cache = model.new_cache(3, 21)
    states = cost.state_bytes(config, dtype)
    assert states == {"ssm": cache.states.nbytes // 3, "conv": cache.windows.nbytes // 3}
    kv = cost.kv_bytes(config, 21, dtype)
    assert kv == (cache.keys.nbytes + cache.values.nbytes) // 3
    assert cache.nbytes == 3 * (kv + sum(states.values()))


@pytest.mark.parametrize("variant", ["h1r_like", "two_groups", "tied", "multi_query_odd_chunk"])
def test_decode_flops_against_a_counted_step(variant):
    """Torch counts matrix products: linears, head, attention and the product of the state with C.

    The state's update (2 of the 3 multiply-adds) and the convolution are elementwise there.
    """
    config, context = make_config(variant), 30
    model = make_model(config, ops=TORCH._replace(decode_attention=REFERENCE.decode_attention))
    cache = model.new_cache(1, context)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_ids(config, 1, context - 1), cache=cache)
        before = counter.get_total_flops()
        model(random_ids(config, 1, 1), cache=cache)
    counted = counter.get_total_flops() - before
    parts = cost.decode_flops(config, context)
    conv = 2 * config.num_hidden_layers * config.conv_dim * config.mamba_d_conv
    biases = 2 * config.num_hidden_layers * config.conv_dim * config.mamba_conv_bias
    expected = parts["total"] - 2 * parts["ssm"] // 3 - conv - biases
    assert counted == expected, parts


@pytest.mark.parametrize("variant", ["two_groups", "tied"])
def test_decode_bytes_count_tensors(variant):
    """Weights once, but of an embedding that is not the head only the looked-up rows; keys and
    values once; states and windows twice, read and written."""
    config, traces, context = make_config(variant), 3, 20
    model = FalconH1ForCausalLM(config, dtype=torch.bfloat16)
    cache = model.new_cache(traces, context)
    weights = sum(p.nbytes for p in model.parameters())
    table = model.model["embed_tokens"].weight
    if not config.tie_word_embeddings:
        weights += table[:traces].nbytes - table.nbytes
    parts = {
        "weights": weights,
        "kv": cache.keys.nbytes + cache.values.nbytes,
        "state": 2 * (cache.states.nbytes + cache.windows.nbytes),
    }
    found = cost.decode_bytes(config, context, traces, torch.bfloat16)
    assert found == parts | {"total": sum(parts.values()), "bound": max(parts, key=parts.get)}
    (row,) = cost.sheet(config, torch.bfloat16, (context,), (traces,))["decode"]
    assert row["cache_bytes"] == cache.nbytes
    assert row["memory_bytes"] == cache.nbytes + sum(p.nbytes for p in model.parameters())
    assert row["flops"] == traces * cost.decode_flops(config, context)["total"]


def test_known_figures_of_h1r():
    """Falcon-H1R-7B: 44 KiB of KV a token, 132 MiB of float32 state, 15,171 MB of bf16 weights."""
    config = FalconH1Config.preset("falcon-h1r-7b")
    assert cost.kv_bytes(config, 1, torch.bfloat16) == 44 * 1024
    assert cost.state_bytes(config, torch.bfloat16)["ssm"] == 132 * 2**20
    extra = 2 * 3 * 24 * 44  # A_log, D and dt_bias are loaded in float32
    assert cost.weight_bytes(config, torch.bfloat16) == 15_171_297_472 + extra


def test_bound_moves_from_weights_to_state_to_kv():
    config = FalconH1Config.preset("falcon-h1r-7b")

    def bound(context, traces):
        return cost.decode_bytes(config, context, traces, torch.bfloat16)["bound"]

    assert bound(2048, 1) == "weights"
    assert bound(1024, 512) == "state"
    assert bound(262144, 64) == "kv"


def test_sheet_is_refused_without_sizes():
    config = make_config()
    with pytest.raises(ValueError, match=r"contexts is \[\]"):
        cost.sheet(config, contexts=())
    with pytest.raises(ValueError, match=r"traces is \[0\]"):
        cost.sheet(config, traces=(0,))


def test_rendered_sheet_names_every_row():
    config = FalconH1Config.preset("falcon-h1r-7b")
    values = cost.sheet(config, contexts=(4096,), traces=(1, 64), bandwidth=1e12)
    text = cost.render("falcon-h1r-7b", values)
    assert "7,585,648,736" in text and "44 KiB" in text and "132 MiB" in text
    moved = cost.decode_bytes(config, 4096, 64, torch.bfloat16)["total"]
    assert float(text.split()[-1]) == pytest.approx(1e12 / moved, abs=0.01)
    assert [line.split()[:2] for line in text.splitlines()[-2:]] == [
        ["4,096", "1"],
        ["4,096", "64"],
    ]

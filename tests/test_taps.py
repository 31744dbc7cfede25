"""Taps: what they record, under every table, in pieces and in steps; that nothing else changes."""

import linecache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import VARIANTS, make_config, make_model, random_ids, relative_error, same_weights

from falcon_h1r import ops as operators
from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.ssd import ssd_dual
from falcon_h1r.taps import MODEL_TAPS, TAPS, attached, full_names, record, tap_of

ROOT = Path(__file__).resolve().parents[1]
BOUND = 1e-13  # about 500 roundoffs of float64
CACHE_ONLY = {"mamba.scan.state_in", "mamba.conv.window_in"}


def module_tables(model):
    return {name: module.ops for name, module in model.named_modules() if hasattr(module, "ops")}


def untouched(model, names, tables):
    same = all(module_tables(model)[name] is table for name, table in tables.items())
    return same and [name for name, _ in model.named_modules()] == names


@torch.no_grad()
def recorded(model, *args, names=None, layers=None, **kwargs):
    with record(model, names, layers) as recording:
        model(*args, **kwargs)
    return recording


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_recording_changes_nothing_and_leaves_nothing(variant):
    model = make_model(make_config(variant))
    ids, names, tables = (
        random_ids(model.config, 2, 9),
        [name for name, _ in model.named_modules()],
        module_tables(model),
    )
    expected, keys = model(ids), list(model.state_dict())
    with record(model) as recording:
        assert torch.equal(model(ids), expected)
        assert list(model.state_dict()) == keys
    assert untouched(model, names, tables)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(recording["logits"], expected)
    absent = {name.split(".", 2)[2] for name in set(full_names(model.config)) - set(recording)}
    assert absent == CACHE_ONLY


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_axis_has_the_size_that_its_letter_means(variant):
    model = make_model(make_config(variant))
    c, l = model.config, 9
    heads = c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    sizes = {"b": 2, "l": l, "s": l, "d": c.hidden_size, "i": c.intermediate_size, "w": 97}
    sizes |= {"k": c.d_in_proj, "j": c.num_key_value_heads, "e": c.head_dim, "p": c.mamba_head_dim}
    sizes |= {"g": c.mamba_n_groups, "n": c.mamba_d_state, "c": c.conv_dim, "v": c.mamba_d_conv - 1}
    sizes |= {"hp": c.d_ssm, "he": heads, "je": keys}
    for name, tensor in recorded(model, random_ids(c, 2, l)).items():
        query = "self_attn" in name
        own = sizes | {"h": c.num_attention_heads if query else c.mamba_n_heads}
        assert tuple(tensor.shape) == tuple(own[a] for a in tap_of(name).axes.split()), name


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize(
    "variant", ["two_groups", "norm_before_gate", "all_biases", "finite_dt_limit"]
)
def test_each_tensor_follows_from_those_before_it(variant, ops):
    """Float64: the whole forward once more, from the recorded tensors and the config, with torch's
    own operators."""
    model = make_model(make_config(variant), ops=ops, dtype=torch.float64)
    c, recording = model.config, recorded(model, random_ids(model.config, 2, 9))

    def same(found, expected):
        assert relative_error(found, expected) < BOUND

    same(recording["embedding"], recording["embed_tokens"] * c.embedding_multiplier)
    before = recording["embedding"]
    for n, block in enumerate(model.model["layers"]):
        r = {tap.name: recording.get(f"layers.{n}.{tap.name}") for tap in TAPS}
        mamba, mixer = block.mamba, r
        same(r["residual.in"], before)
        norm = F.rms_norm(before, (c.hidden_size,), block.input_layernorm.weight, c.rms_norm_eps)
        same(r["input_layernorm"], norm)
        same(mixer["mamba.in_proj.in"], norm * c.ssm_in_multiplier)
        same(mixer["mamba.in_proj"], mamba.in_proj(mixer["mamba.in_proj.in"]))
        bc = c.mamba_n_groups * c.mamba_d_state
        z, x, B, C, dt = mixer["mamba.in_proj"].split([c.d_ssm, c.d_ssm, bc, bc, 4], dim=-1)
        m = c.ssm_multipliers
        same(mixer["mamba.conv.x"], torch.cat([x * m[1], B * m[2], C * m[3]], dim=-1))
        padded = F.pad(mixer["mamba.conv.x"].mT, (c.mamba_d_conv - 1, 0))
        same(mixer["mamba.conv.window"], padded.mT[:, -(c.mamba_d_conv - 1) :])
        same(mixer["mamba.conv.out"], F.silu(mamba.conv1d(padded)).mT)
        x, B, C = mixer["mamba.conv.out"].split([c.d_ssm, bc, bc], dim=-1)
        same(mixer["mamba.scan.x"].flatten(2), x)
        same(mixer["mamba.scan.B"].flatten(2), B)
        same(mixer["mamba.scan.C"].flatten(2), C)
        step = F.softplus(dt * m[4] + mamba.dt_bias).clamp(*c.time_step_limit)
        same(mixer["mamba.scan.dt"], step)
        same(mixer["mamba.scan.A"], -mamba.A_log.exp())
        same(mixer["mamba.scan.D"], mamba.D)
        y, state = ssd_dual(*(mixer[f"mamba.scan.{k}"] for k in ("x", "dt", "A", "B", "C", "D")))
        same(mixer["mamba.scan.y"], y)
        same(mixer["mamba.scan.state"], state)
        same(mixer["mamba.gate.y"], y.flatten(2))
        same(mixer["mamba.gate.z"], z * m[0])
        gated, gate = y.flatten(2), F.silu(z * m[0])
        gated = gated if c.mamba_norm_before_gate else gated * gate
        grouped = gated.unflatten(-1, (c.mamba_n_groups, -1))
        grouped = F.rms_norm(grouped, (grouped.shape[-1],), None, c.rms_norm_eps)
        gated = grouped.flatten(-2) * mamba.norm.weight
        same(mixer["mamba.gate.out"], gated * gate if c.mamba_norm_before_gate else gated)
        same(mixer["mamba.out_proj"], mamba.out_proj(mixer["mamba.gate.out"]))
        same(r["contribution.ssm"], mixer["mamba.out_proj"] * c.ssm_out_multiplier)

        same(r["self_attn.in"], norm * c.attention_in_multiplier)
        for letter in "qkv":
            linear = getattr(block.self_attn, f"{letter}_proj")
            same(r[f"self_attn.{letter}_proj"], linear(r["self_attn.in"]))
        for letter in "qk":
            flat = r[f"self_attn.rope.{letter}_in"].transpose(1, 2).flatten(2)
            same(flat, r[f"self_attn.{letter}_proj"])
            same(r[f"self_attn.attention.{letter}"], r[f"self_attn.rope.{letter}"])
        # A rotation keeps lengths, and leaves position 0 alone.
        q, k = r["self_attn.rope.q_in"], r["self_attn.rope.k_in"] * c.key_multiplier
        same(r["self_attn.rope.q"].norm(dim=-1), q.norm(dim=-1))
        same(r["self_attn.rope.k"].norm(dim=-1), k.norm(dim=-1))
        same(r["self_attn.rope.k"][:, :, 0], k[:, :, 0])
        same(r["self_attn.attention.v"].transpose(1, 2).flatten(2), r["self_attn.v_proj"])
        q, k, v = (r[f"self_attn.attention.{letter}"] for letter in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        same(r["self_attn.attention.o"], o)
        same(r["self_attn.o_proj"], block.self_attn.o_proj(o.transpose(1, 2).flatten(2)))
        same(r["contribution.attention"], r["self_attn.o_proj"] * c.attention_out_multiplier)

        middle = before + r["contribution.ssm"] + r["contribution.attention"]
        same(r["residual.mid"], middle)
        mlp, eps = block.feed_forward, c.rms_norm_eps
        normed = F.rms_norm(middle, (c.hidden_size,), block.pre_ff_layernorm.weight, eps)
        same(r["pre_ff_layernorm"], normed)
        for half in ("gate", "up"):
            same(r[f"feed_forward.{half}_proj"], getattr(mlp, f"{half}_proj")(normed))
            same(r[f"feed_forward.swiglu.{half}"], r[f"feed_forward.{half}_proj"])
        gate = F.silu(r["feed_forward.gate_proj"] * c.mlp_multipliers[0])
        same(r["feed_forward.swiglu.out"], r["feed_forward.up_proj"] * gate)
        same(r["feed_forward.down_proj"], mlp.down_proj(r["feed_forward.swiglu.out"]))
        same(r["contribution.mlp"], r["feed_forward.down_proj"] * c.mlp_multipliers[1])
        before = middle + r["contribution.mlp"]
        same(r["residual.out"], before)
    same(recording["final_layernorm.in"], before)
    final = model.model["final_layernorm"].weight
    normed = F.rms_norm(before, (c.hidden_size,), final, c.rms_norm_eps)
    same(recording["final_layernorm"], normed)
    same(recording["lm_head"], model.lm_head(normed))
    same(recording["logits"], recording["lm_head"] * c.lm_head_multiplier)


@pytest.mark.parametrize("variant", ["two_groups", "no_gated_norm", "finite_dt_limit"])
@torch.no_grad()
def test_pieces_and_steps_join_to_the_whole(variant):
    model = make_model(make_config(variant), dtype=torch.float64)
    ids, cache = random_ids(model.config, 2, 9), model.new_cache(2, 9)
    whole = recorded(model, ids)
    with record(model) as pieces:
        for part in ids.split([4, 3, 1, 1], dim=1):
            model(part, cache=cache)
    assert set(pieces) - set(whole) == {n for n in pieces if n.split(".", 2)[-1] in CACHE_ONLY}
    for name, tensor in whole.items():
        assert relative_error(pieces[name], tensor) < 10 * BOUND, name
    assert len(pieces.calls("layers.0.mamba.scan.y")) == 4
    # States are copies: what a later step wrote does not show in an earlier one.
    before, after = (pieces.calls(f"layers.1.mamba.scan.state{end}") for end in ("_in", ""))
    assert len(before) == len(after) == 4 and not before[0].any()
    for earlier, later in zip(after[:-1], before[1:]):
        assert torch.equal(earlier, later)
    assert not torch.equal(before[-1], after[-1])
    windows = (
        pieces.calls("layers.1.mamba.conv.window_in"),
        pieces.calls("layers.1.mamba.conv.window"),
    )
    for later, earlier in zip(windows[0][1:], windows[1][:-1]):
        assert torch.equal(later, earlier)
    pieces.clear()
    assert not pieces


@torch.no_grad()
def test_padding_is_on_the_right_inside():
    model = make_model(make_config(), dtype=torch.float64)
    ids, mask = random_ids(model.config, 2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    both, alone = recorded(model, ids, mask), recorded(model, ids[1:, 4:])
    assert not both["layers.1.mamba.scan.dt"][1, 5:].any()
    for name in ("mamba.scan.y", "mamba.conv.out", "residual.out", "self_attn.attention.o"):
        axis = tap_of(name).axes.split().index("l") - 1
        row = both[f"layers.2.{name}"][1].narrow(axis, 0, 5)
        assert relative_error(row, alone[f"layers.2.{name}"][0]) < 10 * BOUND
    assert both["logits"][1, :4].eq(0).all()  # the caller's layout


@pytest.mark.parametrize(
    ("dtype", "table"),
    [
        (torch.float32, "REFERENCE"),
        (torch.bfloat16, "REFERENCE"),
        (torch.float32, "TRITON"),  # bfloat16: Triton's own interpreter computes it wrongly
    ],
)
def test_tables_agree(dtype, table):
    """REFERENCE and the kernels record what TORCH records, to rounding."""
    model = make_model(make_config(num_hidden_layers=2), dtype=dtype)
    ids = random_ids(model.config, 1, 9)
    expected = recorded(model, ids)
    found = recorded(same_weights(model, ops=getattr(operators, table)), ids)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert relative_error(found[name], tensor) < (1e-5 if dtype == torch.float32 else 0.1)
    kind = {name: tensor.dtype for name, tensor in expected.items()}
    assert kind["layers.0.mamba.scan.dt"] == kind["layers.0.mamba.scan.state"] == torch.float32
    assert kind["layers.0.mamba.scan.y"] == kind["layers.0.contribution.ssm"] == dtype


@torch.no_grad()
def test_a_plain_hook_sees_and_replaces_an_operator():
    model = make_model(make_config())
    ids = random_ids(model.config, 1, 7)
    expected, seen = model(ids), []
    with attached(model):
        scan = model.get_submodule("model.layers.1.mamba.ssd_scan")
        scan.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        silent = scan.register_forward_hook(lambda m, a, output: (output[0] * 0, output[1]))
        assert not torch.equal(model(ids), expected)
        silent.remove()
        assert torch.equal(model(ids), expected)
        with attached(model):
            assert model.get_submodule("model.layers.1.mamba.ssd_scan") is scan
        assert model.get_submodule("model.layers.1.mamba.ssd_scan") is scan
    assert seen == [(1, 7, 4, 16)] * 2


@torch.no_grad()
def test_a_planted_operator_is_the_one_that_runs():
    model = make_model(make_config())
    ids, block = random_ids(model.config, 1, 7), model.model["layers"][1]

    def no_rope(x, cos, sin, multiplier=1.0):
        return x * multiplier

    block.self_attn.ops = planted = block.self_attn.ops._replace(rope=no_rope)
    block.mamba.norm.ops = block.mamba.norm.ops._replace(gated_rms_norm=lambda y, *rest: y)
    found = recorded(model, ids)
    assert torch.equal(found["layers.1.self_attn.rope.q"], found["layers.1.self_attn.rope.q_in"])
    assert torch.equal(found["layers.1.mamba.gate.out"], found["layers.1.mamba.gate.y"])
    assert block.self_attn.ops is planted


def test_an_exception_restores_everything():
    model = make_model(make_config())
    names, tables = [name for name, _ in model.named_modules()], module_tables(model)
    with pytest.raises(RuntimeError, match="stop"), record(model):
        model(random_ids(model.config, 1, 3))
        raise RuntimeError("stop")
    assert untouched(model, names, tables)
    with pytest.raises(ValueError, match="outside the vocabulary"), attached(model):
        model(torch.tensor([[9999]]))
    assert untouched(model, names, tables)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_names_and_layers_are_chosen():
    config = make_config()
    every = full_names(config)
    assert len(every) == len(set(every)) == 3 * len(TAPS) + len(MODEL_TAPS)
    assert every[:3] == ["embed_tokens", "embedding", "layers.0.residual.in"]
    assert every[-2:] == ["lm_head", "logits"]
    assert full_names(config, ["mamba.scan.y", "logits"], [-1]) == [
        "layers.2.mamba.scan.y",
        "logits",
    ]
    assert full_names(config, ["layers.1.residual.*"]) == [
        f"layers.1.residual.{point}" for point in ("in", "mid", "out")
    ]
    assert full_names(config, ["contribution.*"], [1, 0, 1]) == [
        f"layers.{n}.contribution.{branch}"
        for n in (0, 1)
        for branch in ("ssm", "attention", "mlp")
    ]
    model = make_model(config)
    found = recorded(model, random_ids(config, 1, 3), names=["mamba.scan.y"], layers=[1])
    assert list(found) == ["layers.1.mamba.scan.y"]


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        (["mamba.scan.z"], None, "no tap 'mamba.scan.z'; did you mean 'mamba.scan.y'"),
        (["layers.7.mamba.scan.y"], None, "no tap 'layers.7.mamba.scan.y' in this model"),
        (["nothing.*"], None, "no tap 'nothing.*'"),
        ("logits", None, "names is the string 'logits'"),
        (None, [3], "layer 3: the model has layers 0 to 2"),
        (None, [-4], "layer -4"),
    ],
)
def test_refusals(names, layers, message):
    with pytest.raises(ValueError) as error:
        full_names(make_config(), names, layers)
    assert message in str(error.value)


def test_tied_models_have_no_head_of_their_own():
    config = make_config("tied")
    assert "lm_head" not in full_names(config)
    with pytest.raises(ValueError, match="lm_head"):
        full_names(config, ["lm_head"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.mamba.scan.z", "no tap 'mamba.scan.z'; did you mean 'mamba.scan.y'"),
        ("layers.0.mamba.scan.yy", "the closest recorded names are layers.0.mamba.scan.y"),
        ("mamba.scan.y", "needs its layer in front; recorded: layers.0.mamba.scan.y to layers.1."),
        ("layers.2.mamba.scan.y", "'layers.2.mamba.scan.y' was not asked for; recorded: layers.0"),
        ("logits", "record(model, names=['logits', ...]); recorded: mamba.scan.y"),
        ("layers.0.mamba.scan.states", "names=['mamba.scan.states', ...]"),
        ("layers.0.mamba.scan.state_in", "a forward without a cache does not pass it"),
        (3, "no tap '3'"),
    ],
)
def test_a_missing_tensor_says_why(name, message):
    model = make_model(make_config())
    asked = ["mamba.scan.y", "mamba.scan.state_in"]
    found = recorded(model, random_ids(model.config, 1, 3), names=asked, layers=[0, 1])
    for read in (found.__getitem__, found.calls):
        with pytest.raises(KeyError) as error:
            read(name)
        assert message in str(error.value)
    assert name not in found and found.get(name) is None


def test_an_empty_recording_says_that_no_forward_ran():
    with record(make_model(make_config()), ["logits"]) as recording:
        assert "0 tensors" in repr(recording)
    with pytest.raises(KeyError, match="no forward ran yet"):
        recording["logits"]


@torch.no_grad()
def test_a_recording_shows_what_it_holds():
    model = make_model(make_config())
    with record(model, ["mamba.scan.y", "logits", "layers.1.residual.in"]) as recording:
        model(random_ids(model.config, 2, 3))
    assert repr(recording).splitlines() == [
        "Recording of 5 tensors, 8,088 bytes:",
        "  mamba.scan.y  layers 0-2   b=2 l=3 h=4 p=16 float32, 4,608 bytes",
        "  residual.in   layer 1      b=2 l=3 d=48 float32, 1,152 bytes",
        "  logits                     b=2 l=3 w=97 float32, 2,328 bytes",
    ]


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_the_named_lines_are_those_that_make_the_tensors(ops):
    model = make_model(make_config(), ops=ops)
    recording = recorded(model, random_ids(model.config, 1, 5))
    text = {}
    for name, where in recording.where.items():
        file, _, line = where.partition(":")
        if name.split(".")[-1] not in ("y", "z") or "gate" not in name:  # pass through norm.py
            made_in = tap_of(name).file
            if ops is REFERENCE and made_in == "scan.py":
                made_in = "ssd.py"
            assert Path(file).name == made_in, name
        text[name] = linecache.getline(str(ROOT / file), int(line))
    assert "self.in_proj(" in text["layers.1.mamba.in_proj"]
    assert "self.mamba(" in text["layers.1.contribution.ssm"]
    assert "self.q_proj(" in text["layers.1.self_attn.q_proj"]
    assert "self.feed_forward(" in text["layers.1.residual.mid"]
    assert "ops.ssd_scan(" in text["layers.1.mamba.scan.dt"]
    assert f"def {ops.ssd_scan.__name__}(" in text["layers.1.mamba.scan.y"]
    assert f"def {ops.swiglu.__name__}(" in text["layers.1.feed_forward.swiglu.out"]

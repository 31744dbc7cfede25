"""Each planted fault computes what a port with it computes."""

import dataclasses
import math

import pytest
import textbook
import torch
from models import (
    make_config,
    make_model,
    random_ids,
    relative_error,
    rms_error,
    same_weights,
    textbook_logits,
)

from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.study.adversarial import ADVERSARIAL
from falcon_h1r.study.doctor_evidence import probes
from falcon_h1r.study.faults import Patient
from falcon_h1r.study.faults_list import FAULTS, find

BOUND = 1e-12


@pytest.fixture(scope="module")
def model():
    return make_model(ADVERSARIAL, ops=TORCH, dtype=torch.float64)


def run(model, name, inputs):
    return Patient(model, [find(name)] if name else [])(*inputs)


def test_names_are_unique_and_found():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    assert {fault.needs for fault in FAULTS} == {"prefill", "chunked", "decode", "padded"}
    with pytest.raises(ValueError, match="did you mean 'D skip missing'"):
        find("D skip mising")


def test_without_a_fault_the_patient_is_the_model(model):
    for inputs in probes(model.config).values():
        expected = model(inputs.ids, attention_mask=inputs.mask)
        assert relative_error(run(model, "", inputs), expected.detach()) < BOUND


def test_every_fault_shows_where_it_should_and_leaves_the_model_alone(model):
    """On the inputs it needs; a fault of the cache or of padding nowhere without them."""
    inputs = probes(model.config)
    right = {path: run(model, "", given) for path, given in inputs.items()}
    for fault in FAULTS:
        assert fault.hidden(model.config) == ""
        moved = {p: rms_error(run(model, fault.name, g), right[p]) for p, g in inputs.items()}
        # A float32 port is off by 3e-7: what moves less than 5e-6 nobody can see.
        assert moved[fault.needs] > 5e-6, (fault.name, moved)
        if fault.needs != "prefill":
            assert moved["prefill"] < BOUND, (fault.name, moved)
        if fault.needs in ("chunked", "decode"):
            assert moved["padded"] < BOUND, (fault.name, moved)
    for path, given in inputs.items():
        assert torch.equal(run(model, "", given), right[path])


def test_what_a_configuration_hides_changes_nothing():
    config = make_config(
        "no_gated_norm",
        mamba_n_groups=1,
        tie_word_embeddings=True,
        mamba_conv_bias=False,
        num_key_value_heads=1,
        head_dim=12,
        key_multiplier=1.0,
        ssm_multipliers=(0.5, 0.5, 1.0, 0.5, 0.3),
        mlp_multipliers=(1.0, 0.58),
        ssm_in_multiplier=1.0,
    )
    model = make_model(config, ops=TORCH, dtype=torch.float64)
    inputs = probes(config)
    right = {path: run(model, "", given) for path, given in inputs.items()}
    hidden = [fault for fault in FAULTS if fault.hidden(config)]
    assert len(hidden) >= 16
    for fault in hidden:
        for path, given in inputs.items():
            error = relative_error(run(model, fault.name, given), right[path])
            assert error < BOUND, (fault.name, fault.hidden(config), path)


def test_all_multipliers_one_hide_the_folding():
    from falcon_h1r.checkpoint.fold import ONES

    assert find("multipliers folded and applied again").hidden(make_config(**ONES))


# --- against the plain-Python forward -------------------------------------------------------------

CHANGES = {
    "embedding_multiplier dropped": {"embedding_multiplier": 1.0},
    "key_multiplier dropped": {"key_multiplier": 1.0},
    "key_multiplier applied twice": {"key_multiplier": 0.4**2},
    "ssm_multipliers[z] dropped": {"ssm_multipliers": (1.0, 0.8, 0.55, 0.5, 0.3)},
    "ssm_multipliers[x] dropped": {"ssm_multipliers": (0.35, 1.0, 0.55, 0.5, 0.3)},
    "ssm_multipliers[B] dropped": {"ssm_multipliers": (0.35, 0.8, 1.0, 0.5, 0.3)},
    "ssm_multipliers[C] dropped": {"ssm_multipliers": (0.35, 0.8, 0.55, 1.0, 0.3)},
    "ssm_multipliers[dt] dropped": {"ssm_multipliers": (0.35, 0.8, 0.55, 0.5, 1.0)},
    "mlp_multipliers[gate] dropped": {"mlp_multipliers": (1.0, 0.58)},
    "mlp_multipliers[down] dropped": {"mlp_multipliers": (0.9, 1.0)},
    "ssm_multipliers of z and x exchanged": {"ssm_multipliers": (0.8, 0.35, 0.55, 0.5, 0.3)},
    "clamp of dt missing": {"time_step_limit": (0.0, math.inf)},
    "rope_theta 1e4": {"rope_theta": 1e4},
    "gate and norm in the other order": {"mamba_norm_before_gate": True},
    "gated norm missing": {"mamba_rms_norm": False},
}


def textbook_with(model, weights=None, **changes):
    """The plain-Python forward with other weights or another configuration."""
    ids = random_ids(model.config, 1, 10)
    values = dataclasses.asdict(model.config) | changes
    tensors = model.state_dict() | (weights or {})
    lists = {name: tensor.tolist() for name, tensor in tensors.items()}
    logits = textbook.logits(values, lists, ids[0].tolist())
    return ids, torch.tensor([logits], dtype=torch.float64)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_configuration(model, name):
    ids, expected = textbook_with(model, **CHANGES[name])
    assert relative_error(run(model, name, (ids,)), expected) < BOUND


def weights_of(model, suffix, change):
    return {n: change(t) for n, t in model.state_dict().items() if n.endswith(suffix)}


WEIGHTS = {
    "D skip missing": (".D", lambda t: t * 0),
    "dt_bias missing": (".dt_bias", lambda t: t * 0),
    "A converted twice": (".A_log", lambda t: -t.exp()),
    "convolution taps reversed": (".conv1d.weight", lambda t: t.flip(-1)),
    "convolution bias missing": (".conv1d.bias", lambda t: t * 0),
    "softmax scale missing": (".q_proj.weight", lambda t: t * 16**0.5),
    "softmax scale of hidden_size / heads": (".q_proj.weight", lambda t: t * (16 / 12) ** 0.5),
    "attention_in_multiplier missing on the values": (".v_proj.weight", lambda t: t / 1.3),
    "norm weight plus one": ("layernorm.weight", lambda t: t + 1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_change_that_other_weights_make(model, name):
    suffix, change = WEIGHTS[name]
    ids, expected = textbook_with(model, weights_of(model, suffix, change))
    assert relative_error(run(model, name, (ids,)), expected) < BOUND


def interleaved(x, position, theta):
    out = [0.0] * len(x)
    for i in range(len(x) // 2):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def centred_norm(norm):
    def changed(x, weight, eps):
        mean = math.fsum(x) / len(x)
        # The gated norm takes one group, 32 wide: it is not the norm in question.
        return norm(x if len(x) == 32 else [v - mean for v in x], weight, eps)

    return changed


FUNCTIONS = {
    "rope interleaved": ("_rotate", lambda f: interleaved),
    "rope missing": ("_rotate", lambda f: lambda x, position, theta: x),
    "softplus missing": ("_softplus", lambda f: lambda x: x),
    "mean subtracted in the norm": ("_norm", centred_norm),
    "clamp of dt missing in decode": ("_norm", lambda f: f),  # nothing, in a prefill
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_changed_function(model, monkeypatch, name):
    function, change = FUNCTIONS[name]
    monkeypatch.setattr(textbook, function, change(getattr(textbook, function)))
    ids, expected = textbook_with(model)
    assert relative_error(run(model, name, (ids,)), expected) < BOUND


# --- against other ways to compute the same -------------------------------------------------------


def scan_inputs(seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, B, C = draw(2, 13, 4, 3), draw(2, 13, 2, 5), draw(2, 13, 2, 5)
    return x, draw(2, 13, 4).abs(), -draw(4).abs(), B, C, draw(4)


def test_groups_in_turn_by_einsum(model):
    """Head i reads group i % g: the quadratic form, written out."""
    x, dt, A, B, C, D = scan_inputs()
    scan = Patient(model, [find("groups of B and C repeated in turn")]).parts.ops.ssd_scan
    heads = torch.arange(4) % 2
    total = (dt * A).cumsum(1)
    expected = torch.zeros_like(x)
    for t in range(13):
        for s in range(t + 1):
            decay = (total[:, t] - total[:, s]).exp()
            overlap = (C[:, t][:, heads] * B[:, s][:, heads]).sum(-1)
            expected[:, t] += (decay * overlap * dt[:, s])[..., None] * x[:, s]
    expected += D[:, None] * x
    assert relative_error(scan(x, dt, A, B, C, D, chunk_size=4)[0], expected) < BOUND


def test_key_value_heads_in_turn():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 6, 4, generator=g).double() for h in (4, 2, 2))
    model = make_model(ADVERSARIAL, ops=TORCH)
    attention = Patient(model, [find("key/value heads repeated in turn")]).parts.ops.attention
    for head in range(4):
        own = REFERENCE.attention(q[:, head : head + 1], k[:, head % 2, None], v[:, head % 2, None])
        assert relative_error(attention(q, k, v)[:, head : head + 1], own) < BOUND


def test_what_is_lost_between_calls_is_a_fresh_start(model):
    """All three losses, and positions that restart: each piece is what it is alone."""
    ids = random_ids(model.config, 2, 21)
    names = ("state lost between calls", "convolution window lost between calls")
    names += ("keys of earlier chunks lost", "positions restart in every call")
    found = Patient(model, [find(name) for name in names])(ids, pieces=(9, 12))
    alone = torch.cat([model(ids[:, :9]), model(ids[:, 9:])], 1).detach()
    assert relative_error(found, alone) < BOUND


def test_padding_that_nobody_masks_is_tokens(model):
    """Both faults of padding together: the forward without a mask."""
    ids = random_ids(model.config, 2, 14)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 11:] = 0, 0
    expected = model(ids).detach() * mask[..., None]
    patient = Patient(model)
    patient.parts.keep_padding = True
    assert relative_error(patient(ids, mask), expected) < BOUND
    # Each alone, in a model without the other branch, is that too.
    quiet = {"ssm_out_multiplier": 0.0}, {"attention_out_multiplier": 0.0}
    for name, changes in zip(("padding seen by attention", "padding enters the mixer"), quiet):
        other = same_weights(model, **changes)
        expected = other(ids).detach() * mask[..., None]
        assert relative_error(run(other, name, (ids, mask)), expected) < BOUND
    for name, changes in zip(("padding enters the mixer", "padding seen by attention"), quiet):
        other = same_weights(model, **changes)
        expected = other(ids, attention_mask=mask).detach()
        found = run(other, name, (ids, mask))
        assert relative_error(found * mask[..., None], expected) < BOUND


def test_bidirectional_attention_sees_the_last_key(model):
    ids = random_ids(model.config, 1, 9)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % model.config.vocab_size
    first = [
        run(model, name, (i,))[0, 0] for name in ("attention not causal", "") for i in (ids, other)
    ]
    assert relative_error(first[0], first[1]) > 1e-4 and torch.equal(first[2], first[3])


def test_a_shifted_convolution_is_a_shifted_input(model):
    """Late: token t reads what t - 1 should; ahead: what t + 1 should, behind the end nothing."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 6, generator=g).double()
    weight, bias = torch.randn(6, 4, generator=g).double(), torch.randn(6, generator=g).double()
    right, _ = REFERENCE.causal_conv1d(torch.nn.functional.pad(x, (0, 0, 0, 1)), weight, bias)
    for name, moved in (("late", right[:, :-2]), ("ahead", right[:, 1:])):
        fault = find(f"convolution one token {name}")
        found, window = Patient(model, [fault]).parts.ops.causal_conv1d(x, weight, bias)
        found = found[:, 1:] if name == "late" else found
        assert relative_error(found, moved) < BOUND and torch.equal(window, x[:, -3:])


def test_bfloat16_of_state_and_softplus(model):
    x, dt, A, B, C, D = scan_inputs()
    scan = Patient(model, [find("state in bfloat16")]).parts.ops.ssd_scan
    (y, state), (right, exact) = (
        op(x, dt, A, B, C, D, chunk_size=4) for op in (scan, REFERENCE.ssd_scan)
    )
    assert torch.equal(state, state.bfloat16().double()) and relative_error(y, right) < BOUND
    assert relative_error(state, exact) < 2**-8
    patient = Patient(model, [find("softplus in bfloat16")])
    raw = torch.linspace(-6, 3, 40, dtype=torch.float64).view(1, 10, 4)
    (change,) = patient.parts.ssd_inputs
    found = change(x, torch.nn.functional.softplus(raw), A, B, C, D)[1]
    expected = torch.nn.functional.softplus(raw.bfloat16()).double().clamp(0.02, 0.15)
    assert torch.equal(found, expected)


def test_state_lost_inside_is_each_chunk_alone(model):
    x, dt, A, B, C, D = scan_inputs()
    scan = Patient(model, [find("state lost between the scan's chunks")]).parts.ops.ssd_scan
    y, _ = scan(x, dt, A, B, C, D, chunk_size=5)
    alone = [
        REFERENCE.ssd_scan(x[:, s], dt[:, s], A, B[:, s], C[:, s], D)[0]
        for s in (slice(0, 5), slice(5, 10), slice(10, 13))
    ]
    assert relative_error(y, torch.cat(alone, 1)) < BOUND


def test_no_silu_and_a_gate_without_silu(model):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(1, 7, 6, generator=g).double()
    weight = torch.randn(6, 4, generator=g).double()
    conv = Patient(model, [find("SiLU missing after the convolution")]).parts.ops
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], groups=6).mT
    found, window = conv.causal_conv1d(x, weight)
    assert relative_error(found, expected) < BOUND
    step = conv.causal_conv1d_step(x[:, -1], x[:, -4:-1].clone(), weight)
    assert relative_error(step, expected[:, -1]) < BOUND and torch.equal(window, x[:, -3:])
    gate = Patient(model, [find("SiLU missing in the gate")]).parts.ops.gated_rms_norm
    y, z = torch.randn(2, 1, 5, 8, generator=g).double()
    w = torch.randn(8, generator=g).double()
    norm = torch.nn.functional.rms_norm
    parts = [norm(part, (4,), eps=1e-5) for part in (y * z).split(4, -1)]
    assert relative_error(gate(y, z, w, 1e-5, 2, False), torch.cat(parts, -1) * w) < BOUND
    parts = [norm(part, (4,), eps=1e-5) for part in y.split(4, -1)]
    assert relative_error(gate(y, z, w, 1e-5, 2, True), torch.cat(parts, -1) * w * z) < BOUND
    assert relative_error(gate(y, z, None, 1e-5), y * z) < BOUND


def test_folded_and_kept_is_every_multiplier_twice(model):
    ids = random_ids(model.config, 1, 10)
    c = model.config
    squares = {
        key: tuple(v * v for v in value) if isinstance(value, tuple) else value * value
        for key in dataclasses.asdict(c)
        if "multiplier" in key
        for value in [getattr(c, key)]
    }
    expected = textbook_logits(same_weights(model, **squares), ids)
    assert (
        relative_error(run(model, "multipliers folded and applied again", (ids,)), expected) < BOUND
    )

"""The float64 truth, transformers' tensors beside it, and the first operator that is off."""

import pytest
import torch
from models import VARIANTS, make_config, make_model, random_ids, relative_error, textbook_logits

from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.study.budget import rounded, truth_of
from falcon_h1r.study.dump import Inputs, compared_names, real_values, take_dump
from falcon_h1r.study.faults_list import find
from falcon_h1r.study.parity import PATHS, make_inputs
from falcon_h1r.study.parity_local import Truth, first_divergence, forced_inputs, ours
from falcon_h1r.study.peers import TransformersPeer

FLOAT64_BOUND = 1e-12


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


# --- the truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["two_groups", "norm_before_gate", "finite_dt_limit"])
def test_the_truth_is_the_plain_python_forward_on_every_path(variant):
    model = make_model(make_config(variant), ops=TORCH)
    ids = random_ids(model.config, 2, 11)
    wide = rounded(model, torch.bfloat16)
    expected = textbook_logits(wide, ids)
    for path in PATHS:
        given = make_inputs(model.config, path, ids)
        found = truth_of(wide)(*given)
        if path == "padded":
            left = textbook_logits(wide, ids[:1, 1:])[0]
            right = textbook_logits(wide, ids[1:, :9])[0]
            found, right_found = found[0, 1:], found[1, :9]
            assert relative_error(right_found, right) < FLOAT64_BOUND
            assert relative_error(found, left) < FLOAT64_BOUND
        else:
            assert relative_error(found, expected) < FLOAT64_BOUND, path


def test_paths_are_what_they_are_called():
    config = make_config()
    shapes = {path: make_inputs(config, path) for path in PATHS}
    l = shapes["prefill"].ids.shape[1]
    assert l > 2 * config.mamba_chunk_size
    assert all(torch.equal(given.ids, shapes["prefill"].ids) for given in shapes.values())
    assert min(shapes["chunked"].pieces) > 1 and len(shapes["chunked"].pieces) == 3
    assert set(shapes["decode"].pieces[1:]) == {1} and sum(shapes["decode"].pieces) == l
    mask = shapes["padded"].mask
    assert not mask[0, 0] and mask[0, -1] and not mask[1, -1] and mask[1, 0] and mask[2].all()
    for short in ("chunked", "decode", "padded"):
        with pytest.raises(ValueError, match="at least 8 tokens"):
            make_inputs(config, short, torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="no path 'sideways'"):
        make_inputs(config, "sideways")


# --- transformers ---------------------------------------------------------------------------------


def peer_errors(model, path):
    given = make_inputs(model.config, path)
    truth = take_dump(truth_of(model), model, given).tensors
    found = TransformersPeer(model).trace(given)
    assert set(found) <= set(truth)
    errors = {
        name: relative_error(*(real_values(name, t[name], given.mask) for t in (found, truth)))
        for name in found
    }
    return given, found, errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_tensors_are_ours_by_name(variant):
    """A name marks the same point in both, in a prefill: else a float32 error would be of order
    1."""
    model = make_model(make_config(variant), ops=TORCH)
    _, found, errors = peer_errors(model, "prefill")
    for name, error in errors.items():
        assert error < 1e-5, name
    missing = {name.split(".", 2)[-1] for name in set(compared_names(model.config)) - set(found)}
    allowed = {"mamba.conv.window", "contribution.ssm", "contribution.attention"}
    assert missing == allowed | ({"mamba.gate.z"} if variant == "no_gated_norm" else set())


@pytest.mark.parametrize("path", ["chunked", "decode", "padded"])
@pytest.mark.parametrize("variant", ["two_groups", "no_gated_norm"])
def test_its_tensors_are_ours_on_other_paths(variant, path):
    model = make_model(make_config(variant), ops=TORCH)
    given, found, errors = peer_errors(model, path)
    for name, error in errors.items():
        if path == "padded" and name.endswith("scan.state"):
            continue  # known: its state decays over right padding
        assert error < 1e-5, name
    assert {"layers.2.mamba.scan.dt", "layers.1.self_attn.attention.o", "logits"} <= set(found)
    assert torch.equal(found["logits"], TransformersPeer(model)(given))


def test_nothing_is_left_replaced():
    import transformers.models.falcon_h1.modeling_falcon_h1 as falcon

    names = ("causal_conv1d_fn", "mamba2_chunk_scan", "ALL_ATTENTION_FUNCTIONS")
    before = [getattr(falcon, name) for name in names]
    model = make_model(make_config(), ops=TORCH)
    peer = TransformersPeer(model)
    ids = random_ids(model.config, 1, 9)
    alone = peer(Inputs(ids))
    peer.trace(Inputs(ids))
    with pytest.raises(IndexError):
        peer.trace(Inputs(ids + 1000))
    assert [getattr(falcon, name) for name in names] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in peer.model.modules())
    assert torch.equal(peer(Inputs(ids)), alone)


# --- the first divergence -------------------------------------------------------------------------

OPERATORS = {
    "rms_norm": "layers.0.input_layernorm: output",
    "causal_conv1d": "layers.0.mamba.causal_conv1d: y",
    "ssd_scan": "layers.0.mamba.ssd_scan: y",
    "gated_rms_norm": "layers.0.mamba.gated_rms_norm: out",
    "rope": "layers.0.self_attn.rope: q",
    "attention": "layers.0.self_attn.attention: o",
    "swiglu": "layers.0.feed_forward.swiglu: out",
}


def off_by(operator, factor):
    def changed(*inputs, **options):
        out = operator(*inputs, **options)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return changed


@pytest.fixture(scope="module")
def truth():
    model = make_model(make_config(), ops=TORCH)
    return Truth(model, make_inputs(model.config, "prefill"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_that_is_off_is_named(truth, operator):
    """By 3e-6, ten times what a free run of three layers loses."""
    table = TORCH._replace(**{operator: off_by(getattr(TORCH, operator), 1 + 3e-6)})
    found = first_divergence(truth, truth.errors_of(ours(truth, table)))
    assert found.operator == OPERATORS[operator] and 2e-6 < found.error < 4e-6
    assert first_divergence(truth, truth.errors_of(ours(truth, TORCH))) is None


def test_an_operator_that_is_off_in_one_layer_is_named_there(truth):
    calls = []

    def scan(*inputs, **options):
        calls.append(1)
        factor = 1 + 1e-4 * (len(calls) == 3)
        y, state = TORCH.ssd_scan(*inputs, **options)
        return y, state * factor

    found = first_divergence(truth, truth.errors_of(ours(truth, TORCH._replace(ssd_scan=scan))))
    assert found.operator == "layers.2.mamba.ssd_scan: state"
    assert found.tensor == "layers.2.mamba.scan.state" and found.error == pytest.approx(1e-4, 0.01)


FAULTY = {
    "key_multiplier dropped": "layers.0.self_attn.rope: k",
    "ssm_multipliers[dt] dropped": "layers.0.mamba: dt_bias, softplus and clamp",
    "ssm_multipliers[B] dropped": "layers.0.mamba: "
    "ssm_multipliers[1], ssm_multipliers[2], ssm_multipliers[3]",
    "attention_out_multiplier dropped": "layers.0.block: attention_out_multiplier",
    "final norm missing": "final_layernorm: output",
    "lm_head_multiplier dropped": "model: lm_head_multiplier",
    "D skip missing": "layers.0.mamba: D",
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_of_the_model_is_named(truth, name):
    found = first_divergence(truth, truth.errors_of(ours(truth, TORCH, [find(name)])))
    assert found.operator == FAULTY[name]


def test_faults_of_the_cache_are_named_on_its_paths():
    model = make_model(make_config(), ops=TORCH)
    for name, path, operator in (
        ("state lost between calls", "chunked", "layers.0.mamba.ssd_scan: y"),
        ("convolution window lost between calls", "chunked", "layers.0.mamba.causal_conv1d: y"),
        ("keys of earlier chunks lost", "chunked", "layers.0.self_attn.attention: o"),
        ("positions restart in every call", "decode", "layers.0.self_attn.rope: q"),
        ("state in bfloat16", "decode", "layers.0.mamba.ssd_scan: state"),
    ):
        truth = Truth(model, make_inputs(model.config, path))
        yardstick = truth.errors_of(ours(truth, REFERENCE))
        assert first_divergence(truth, truth.errors_of(ours(truth, TORCH)), yardstick) is None
        errors = truth.errors_of(ours(truth, TORCH, [find(name)]))
        assert first_divergence(truth, errors, yardstick).operator == operator


@pytest.mark.parametrize("path", ["chunked", "decode"])
def test_transformers_is_fed_piece_by_piece(path):
    model = make_model(make_config(), ops=TORCH)
    truth = Truth(model, make_inputs(model.config, path))
    found = TransformersPeer(model).trace(truth.inputs, forced_inputs(truth))
    assert first_divergence(truth, truth.errors_of(found)) is None


def test_a_fault_in_transformers_is_named(truth):
    """Planted there, and fed the truth there; without it nothing diverges."""

    def plant(witness):
        mixer = witness.model.layers[1].mamba
        mixer.D = torch.nn.Parameter(torch.zeros_like(mixer.D))

    inputs, forced = truth.inputs, forced_inputs(truth)
    right = truth.errors_of(TransformersPeer(truth.model).trace(inputs, forced))
    assert first_divergence(truth, right) is None
    peer = TransformersPeer(truth.model, plant)
    found = first_divergence(truth, truth.errors_of(peer.trace(inputs, forced)))
    assert found.operator == "layers.1.mamba: D"

"""torch.autocast: linear layers alone multiply in its dtype, whatever table computes the rest."""

import pytest
import torch
from compiler import needs_compiler
from models import make_config, make_model, random_ids, rms_error, same_weights
from torch.nn.functional import cross_entropy
from witness import make_witness

from falcon_h1r import attention, scan, ssd
from falcon_h1r.cpu import CompiledPrefill, CompiledStep, use_int8, use_onednn
from falcon_h1r.ops import INDUCTOR, REFERENCE, TORCH

NARROW = torch.bfloat16, torch.float16


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


def operator_inputs():
    torch.manual_seed(0)
    b, l, h, p, g, n, c, e = 2, 21, 4, 6, 2, 5, 12, 8
    x, dt, A = torch.randn(b, l, h, p), torch.rand(b, l, h), -torch.rand(h)
    B, C, D = torch.randn(b, l, g, n), torch.randn(b, l, g, n), torch.randn(h)
    q, k, v = torch.randn(b, 4, l, e), torch.randn(b, 2, l, e), torch.randn(b, 2, l, e)
    samples, window, taps = torch.randn(b, l, c), torch.randn(b, 3, c), torch.randn(c, 4)
    state = torch.randn(b, h, p, n)
    lengths = torch.tensor([7, 21])
    rows, half = torch.randn(b, l, c), torch.rand(1, l, e // 2)
    return {
        "rms_norm": lambda f: f(rows, taps[:, 0], 1e-5),
        "gated_rms_norm": lambda f: f(rows, samples, taps[:, 0], 1e-5, 2),
        "rope": lambda f: f(q, half, half, multiplier=0.3),
        "causal_conv1d": lambda f: f(samples, taps, initial_window_bvc=window),
        "causal_conv1d_step": lambda f: f(samples[:, 0], window.clone(), taps),
        "ssd_scan": lambda f: f(x, dt, A, B, C, D, chunk_size=8, initial_state_bhpn=state),
        "ssd_step": lambda f: f(state.clone(), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D),
        "attention": lambda f: f(q, k, v),
        "decode_attention": lambda f: f(q[:, :, -1], k, v, lengths),
        "swiglu": lambda f: f(rows, samples, 0.9),
    }


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", operator_inputs())
@pytest.mark.parametrize("table", [REFERENCE, TORCH, INDUCTOR], ids=repr)
def test_operators_compute_as_without_autocast(table, name, dtype):
    call, function = operator_inputs()[name], getattr(table, name)
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            expected = call(function)
            with autocast(dtype):
                found = call(function)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", [ssd.ssd_dual, ssd.ssd_chunked, scan.ssd_scan])
def test_other_forms_of_the_scan(form):
    call = operator_inputs()["ssd_scan"]
    with autocast():
        found = call(form)
    torch.testing.assert_close(found, call(form), rtol=0, atol=0)


def test_decode_attention_reference():
    call = operator_inputs()["decode_attention"]
    expected = call(attention.decode_attention_reference)
    with autocast():
        found = call(attention.decode_attention_reference)
    assert torch.equal(found, expected)


def loss_and_gradients(model, logits, ids):
    loss = cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("variant", ["h1r_like", "no_gated_norm", "tied", "finite_dt_limit"])
def test_errors_and_gradients_are_at_most_those_of_transformers(variant, dtype):
    """Over several seeds and chunks; the same float64 forward and backward are the truth."""
    logits, gradients = {"ours": [], "witness": [], "truth": []}, {}
    for seed in range(4):
        model = make_model(make_config(variant), seed=seed)
        ids = random_ids(model.config, 2, 37, seed=seed + 1)
        truth = same_weights(model, ops=REFERENCE, dtype=torch.float64)
        witness = make_witness(model)
        with autocast(dtype):
            ours_logits, witness_logits = model(ids), witness(ids, use_cache=False).logits
        assert ours_logits.dtype == torch.float32
        models = {"ours": model, "witness": witness, "truth": truth}
        results = {"ours": ours_logits, "witness": witness_logits, "truth": truth(ids)}
        for who in models:
            logits[who].append(results[who].detach())
            found = loss_and_gradients(models[who], results[who], ids)
            for name, gradient in found.items():
                gradients.setdefault(who, {}).setdefault(name, []).append(gradient.double())
    errors = {who: rms_error(torch.cat(v), torch.cat(logits["truth"])) for who, v in logits.items()}
    assert errors["ours"] <= errors["witness"], errors
    total = {}
    for who in ("ours", "witness"):
        parts = [
            (torch.cat(g) - torch.cat(gradients["truth"][name])).square().sum()
            / torch.cat(gradients["truth"][name]).square().sum()
            for name, g in gradients[who].items()
        ]
        assert len(parts) == len(gradients["truth"])
        total[who] = float(torch.stack(parts).mean().sqrt())
    assert total["ours"] <= total["witness"], total


@pytest.mark.parametrize("table", [REFERENCE, TORCH, INDUCTOR], ids=repr)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@torch.no_grad()
def test_cache_padding_and_packing(table, dtype):
    model = make_model(make_config(), ops=table)
    ids = random_ids(model.config, 2, 23)
    exact = model(ids)
    with autocast(dtype):
        whole = model(ids)
        bound = 2 * rms_error(whole, exact)
        cache = model.new_cache(2, 23)
        pieces = [model(ids[:, :17], cache=cache), model(ids[:, 17:20], cache=cache)]
        pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(20, 23)]
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        padded = model(ids, attention_mask=mask)
    pieces = torch.cat(pieces, 1)
    assert 0 < bound < 0.2 and pieces.dtype == torch.float32
    assert rms_error(pieces, exact) < bound
    assert rms_error(padded, model(ids, attention_mask=mask)) < bound
    if table is not INDUCTOR:
        documents = torch.arange(23).expand(2, -1) // 10
        with autocast(dtype):
            packed = model(ids, seq_idx=documents)
        assert rms_error(packed, model(ids, seq_idx=documents)) < bound


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_narrow_model(dtype):
    model = make_model(make_config(), dtype=dtype)
    ids = random_ids(model.config, 2, 23)
    with autocast(dtype):
        model(ids).sum().backward()
        cache = model.new_cache(2, 24)
        with torch.no_grad():
            model(ids, cache=cache)
            found = model(ids[:, :1], cache=cache)
    assert found.isfinite().all() and model.model["layers"][0].mamba.conv1d.weight.grad is not None


@torch.no_grad()
def test_a_float64_model_is_left_alone():
    model = make_model(make_config(), dtype=torch.float64)
    ids = random_ids(model.config, 2, 23)
    expected = model(ids)
    with autocast():
        assert torch.equal(model(ids), expected)


@needs_compiler
@torch.no_grad()
def test_compiled_forms_refuse_autocast():
    model = make_model(make_config())
    cache = model.new_cache(1, 64)
    step, prefill = CompiledStep(model, cache), CompiledPrefill(model)
    with autocast():
        with pytest.raises(ValueError, match=r"CompiledStep: torch\.autocast is on"):
            step(torch.tensor([3]))
        with pytest.raises(ValueError, match=r"CompiledPrefill: torch\.autocast is on"):
            prefill(random_ids(model.config, 1, 5), cache=cache)
    assert int(cache.lengths[0]) == 0


@pytest.mark.parametrize("own, other", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_a_narrow_model_is_not_cast_to_the_other_narrow_dtype(own, other):
    model = make_model(make_config(), dtype=getattr(torch, own))
    ids = random_ids(model.config, 1, 5)
    refused = pytest.raises(ValueError, match=f"autocast to torch.{other}: the model is in")
    with torch.autocast("cpu", dtype=getattr(torch, other)), refused:
        model(ids)


@pytest.mark.parametrize("use", [use_int8, use_onednn])
def test_layers_of_libraries_keep_their_dtype_and_refuse_a_gradient(use):
    """Their gradient was a warning of torch's, and zeros."""
    model = make_model(make_config("h1r_like"))
    ids = random_ids(model.config, 2, 9)
    use(model)
    expected = model(ids)
    with autocast():
        assert torch.equal(model(ids), expected)
    with torch.no_grad():
        assert torch.equal(model(ids), expected)
    with pytest.raises(RuntimeError, match="Linear has no gradient"):
        expected.sum().backward()

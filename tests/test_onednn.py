"""Linear layers through oneDNN: the same products, for prefill, steps and tied heads."""

import pytest
import torch
from measure import rounded_model
from models import VARIANTS, make_config, make_model, random_ids, rms_error, same_weights
from witness import make_witness, witness_logits

from falcon_h1r import Cache
from falcon_h1r.cpu import onednn
from falcon_h1r.cpu.onednn import OneDNNLinear, unusable, use_onednn
from falcon_h1r.ops import REFERENCE

DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(bool(reason), reason=reason))
    for dtype in (torch.float32, torch.bfloat16)
    for reason in [unusable(make_model(make_config("h1r_like"), dtype=dtype))]
]
needs_float32, needs_bfloat16 = (parameter.marks[0] for parameter in DTYPES)


def logits(model, ids):
    """Of a prefill of all but two tokens and two steps."""
    cache = model.new_cache(len(ids), ids.shape[1])
    parts = [model(ids[:, :-2], cache=cache)]
    parts += [model(ids[:, i : i + 1], cache=cache) for i in (-2, -1 + ids.shape[1])]
    return torch.cat(parts, dim=1)


@needs_float32
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float32_is_as_near_the_truth_as_torch(variant, rows):
    model = make_model(make_config(variant))
    ids = random_ids(model.config, rows, 19)
    exact = logits(same_weights(model, ops=REFERENCE, dtype=torch.float64), ids)
    expected = logits(model, ids)
    found = logits(use_onednn(same_weights(model)), ids)
    assert rms_error(found, exact) <= 2 * rms_error(expected, exact)


@needs_bfloat16
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bfloat16_is_no_worse_than_transformers(variant):
    model = rounded_model(variant, torch.bfloat16, seed=3)
    ids = random_ids(model.config, 2, 40)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)(ids)
    witness = witness_logits(make_witness(model), ids)
    assert rms_error(use_onednn(model)(ids), exact) <= rms_error(witness, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_layer(bias, dtype):
    """Odd sizes, any number of rows and axes, rows that are not contiguous; nothing overwritten."""
    plain = torch.nn.Linear(50, 33, bias=bias, dtype=dtype)
    layer, exact = OneDNNLinear(plain), torch.nn.Linear(50, 33, bias=bias, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    for shape in ((50,), (1, 50), (1, 1, 50), (2, 50), (3, 5, 50), (0, 50)):
        wide = torch.randn(*shape[:-1], 100).to(dtype)
        for x in (wide[..., ::2], wide[..., 20:70], wide[..., :50].contiguous()):
            before = x.clone()
            y, expected = layer(x), exact(x.double())
            assert y.shape == expected.shape and y.dtype == dtype and torch.equal(x, before)
            if len(y):
                floor = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
                assert rms_error(y, expected) <= max(2 * rms_error(plain(x), expected), floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_layer_is_replaced(dtype):
    for variant in ("tied", "all_biases"):
        model = use_onednn(make_model(make_config(variant), dtype=dtype))
        kinds = {type(module) for module in model.modules()}
        assert OneDNNLinear in kinds and torch.nn.Linear not in kinds
        assert model.dtype == dtype
        assert isinstance(model.lm_head, OneDNNLinear)


@needs_bfloat16
def test_packed_weights_are_not_saved(tmp_path):
    model = use_onednn(make_model(make_config("h1r_like"), dtype=torch.bfloat16))
    for call in (
        lambda: model.save_pretrained(tmp_path / "checkpoint"),
        lambda: model.new_cache(1, 4).save(tmp_path / "cache", model),
        model.state_dict,
    ):
        with pytest.raises(ValueError, match=r"weight is packed for oneDNN.* before use_onednn"):
            call()
    assert not list(tmp_path.iterdir())
    model = use_onednn(make_model(make_config("h1r_like")))
    model.save_pretrained(tmp_path / "float32")
    cache = model.new_cache(1, 4)
    cache.save(tmp_path / "cache", model)
    assert Cache.load(tmp_path / "cache", model).lengths.tolist() == [0]


def test_refusals(monkeypatch):
    for model, words in (
        (make_model(make_config("h1r_like"), dtype=torch.float64), "the model is torch.float64"),
        (make_model(make_config("h1r_like")).to("meta"), "on a CPU, the model is on meta"),
    ):
        with pytest.raises(ValueError, match=f"use_onednn: .*{words}"):
            use_onednn(model)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN" in onednn.unusable(make_model(make_config("h1r_like")))

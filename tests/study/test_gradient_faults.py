"""`doctor --gradients`: each planted fault of a backward is named, and right ones are called so."""

import json

import pytest
import torch
from models import make_config, make_model, random_ids, relative_error
from safetensors.torch import save_file
from tiny_cli import run
from torch.nn.functional import cross_entropy
from witness import make_witness

from falcon_h1r import FalconH1ForCausalLM, ops
from falcon_h1r.study.gradient_faults import FAULTS, diagnose_gradients


def gradients(model, ids):
    out = model(ids)
    logits = getattr(out, "logits", out)[:, :-1]
    cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["all_biases"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_each_fault_is_named(fault, variant):
    model = make_model(make_config(variant))
    ids = random_ids(model.config, 2, 21)
    own = ops.TORCH if fault is None else ops.REFERENCE._replace(ssd_scan=FAULTS[fault])
    found = diagnose_gradients(model, ids, gradients(model.under(own), ids))
    assert found.fault == fault, str(found)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_leaves_the_forward_alone(fault):
    model = make_model(make_config(), dtype=torch.float64)
    ids = random_ids(model.config, 2, 21)
    with torch.no_grad():
        expected = model(ids)
        assert (
            relative_error(model.under(ops.REFERENCE._replace(ssd_scan=fault))(ids), expected)
            < 1e-12
        )


def test_what_no_fault_explains_is_called_so():
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 21)
    made = gradients(model, ids)
    made["model.layers.1.mamba.conv1d.weight"].normal_()
    assert diagnose_gradients(model, ids, made).fault == ""


def test_transformers_is_right_and_some_gradients_are_enough():
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 21).clamp(min=1)
    made = gradients(make_witness(model).train(), ids)
    some = {n: g for n, g in made.items() if "mamba" in n}
    assert diagnose_gradients(model, ids, some).fault is None


def test_the_command(capsys, tmp_path):
    model = FalconH1ForCausalLM.from_pretrained("h1r-pico")
    ids = random_ids(model.config, 1, 40)
    name = "the decay's gradient is dropped"
    own = model.under(ops.REFERENCE._replace(ssd_scan=FAULTS[name]))
    for table, expected in ((own, name), (model, None)):
        model.zero_grad()
        save_file(gradients(table, ids) | {"input_ids": ids}, tmp_path / "g.safetensors")
        status, out, _ = run(capsys, "doctor", "--gradients", tmp_path / "g.safetensors", "--json")
        assert json.loads(out)["fault"] == expected and status == (expected is not None)
    status, out, _ = run(capsys, "doctor", "--gradients", tmp_path / "g.safetensors")
    assert status == 0 and out.startswith("the gradients are right")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None}, "no tensor 'input_ids'"),
        ({"input_ids": torch.tensor([[1]])}, "l > 1"),
        ({"input_ids": torch.tensor([[1, 999]])}, "vocab"),
        ({"model.nothing": torch.zeros(3)}, "no parameter"),
        ({"model.final_layernorm.weight": torch.zeros(3)}, "expected"),
    ],
)
def test_refusals(capsys, tmp_path, change, message):
    tensors = {"input_ids": torch.tensor([[1, 2, 3]]), "lm_head.weight": torch.zeros(304, 128)}
    tensors = {n: t for n, t in (tensors | change).items() if t is not None}
    save_file(tensors, tmp_path / "g.safetensors")
    status, _, err = run(capsys, "doctor", "--gradients", tmp_path / "g.safetensors")
    assert status == 2 and message in err and len(err.splitlines()) == 1

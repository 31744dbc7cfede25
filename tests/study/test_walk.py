"""`study.walk` and `falcon-h1r walk`."""

import json

import pytest
import torch
from models import make_config, make_model, random_ids, stream_modules
from tiny_cli import run, write_checkpoint

from falcon_h1r.study.walk import render, walk
from falcon_h1r.taps import full_names, record


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("walk") / "tiny")


def test_a_walk_lists_every_tensor_in_the_order_of_the_forward():
    model = make_model(make_config())
    ids = random_ids(model.config, 9)
    steps = walk(model, ids.tolist())
    absent = ("state_in", "window_in")  # only with a cache
    assert [s.name for s in steps] == [
        name for name in full_names(model.config) if not name.endswith(absent)
    ]
    with torch.no_grad(), record(model) as recording:
        model(ids[None])
    for step in steps:
        tensor = recording[step.name]
        assert step.shape == tuple(tensor.shape) and len(step.axes) == tensor.dim()
        assert step.nbytes == tensor.numel() * 4 and step.dtype == "float32"
        assert (step.min, step.max) == (float(tensor.min()), float(tensor.max()))
        assert abs(step.rms**2 - float(tensor.double().square().mean())) < 1e-9 * step.rms**2
        assert step.where == recording.where[step.name] != ""
    by_name = {step.name: step for step in steps}
    assert by_name["layers.1.contribution.ssm"].multipliers == {"ssm_out_multiplier": 0.45}
    assert by_name["embedding"].multipliers == {"embedding_multiplier": 5.6}
    assert by_name["layers.0.mamba.scan.y"].multipliers == {}


def test_a_walk_of_a_streamed_checkpoint(tmp_path):
    model = make_model(make_config("tied"))
    model.save_pretrained(tmp_path)
    assert walk(stream_modules(tmp_path), [3, 1, 4], layers=[2]) == walk(
        model, [3, 1, 4], layers=[2]
    )


def test_the_table(capsys, checkpoint):
    status, out, err = run(capsys, "walk", "hello", "--model", checkpoint)
    lines = out.splitlines()
    assert status == 0 and lines[0].split()[:3] == ["tensor", "shape", "dtype"]
    assert err == f"[{checkpoint} on cpu: float32, torch operators]\n"
    names = [line.split()[0] for line in lines[1:]]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0"}
    row = next(line for line in lines if line.startswith("layers.0.mamba.scan.x "))
    assert "h=4 p=16" in row and "falcon_h1r/mamba2.py:" in row
    assert len({line.index("float32") for line in lines[1:]}) == 1  # columns stand under each other
    _, again, _ = run(capsys, "walk", "hello", "--model", checkpoint, "--layer", "2")
    assert "layers.2.residual.out" in again and "layers.0" not in again


def test_the_document(capsys, checkpoint):
    argv = ["walk", "hello", "--model", checkpoint, "--layers", "all", "--json"]
    status, out, _ = run(capsys, *argv, "--dtype", "bfloat16", "--ops", "reference")
    document = json.loads(out)
    assert status == 0 and document["prompt"].count("hello") == 1
    source = stream_modules(checkpoint, dtype=torch.bfloat16)
    expected = walk(source, document["ids"])
    assert [step["name"] for step in document["walk"]] == [step.name for step in expected]
    assert {s["dtype"] for s in document["walk"]} == {"bfloat16", "float32"}
    limit = next(s for s in document["walk"] if s["name"] == "layers.0.mamba.scan.dt")
    assert limit["multipliers"]["time_step_limit"] == [0.0, None]
    raw = run(capsys, *argv, "--raw")[1]
    assert json.loads(raw)["prompt"] == "hello"


def test_render_right_aligns_numbers():
    model = make_model(make_config())
    lines = render(walk(model, [1, 2, 3], ["mamba.scan.A", "logits"], [0])).splitlines()
    assert len(lines) == 3
    assert lines[0].index("bytes") + 5 == lines[1].index("16") + 2 == lines[2].index("1,164") + 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["walk", "x", "--layer", "3"], "layer 3: the model has layers 0 to 2"),
        (["walk", "x", "--layers", "0", "y"], 'quote the text: falcon-h1r walk "x y"'),
        (["walk", "x", "--layers", "0,y"], "--layers/--layer: 'y': expected the number of a layer"),
        (["walk", " "], "the prompt is empty"),
        (["walk", "x", "--device", "nowhere"], "nowhere"),
        (["dissect", "x", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["dissect", "x", "--max-new-tokens", "256"], "more than 256"),
        (["dissect", ""], "the prompt is empty"),
        (["dissect", "x", "--out", "/nowhere/at/all.html"], "/nowhere/at is no folder"),
    ],
)
def test_refusals(capsys, checkpoint, argv, message):
    status, out, err = run(capsys, *argv, "--model", checkpoint)
    assert (status, out) == (2, "")
    assert err.startswith("falcon-h1r: error: ") and message in err and err.count("\n") == 1

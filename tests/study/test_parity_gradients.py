"""`falcon-h1r parity --gradients`: right gradients are within the budget, wrong ones are named."""

import json

import pytest
import torch
from models import make_config, make_model, random_ids
from tiny_cli import run

from falcon_h1r import ops
from falcon_h1r.study.parity_gradients import compare_gradients


@pytest.mark.parametrize("variant", ["all_biases", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_is_within_the_budget(variant, dtype):
    model = make_model(make_config(variant))
    found = compare_gradients(model, random_ids(model.config, 4, 20), dtype, {"torch": ops.TORCH})
    assert not found.beyond, str(found)
    assert set(found.loss) == {"torch", "transformers"}
    assert all(set(row) == {"torch", "transformers"} for row in found.errors.values())


class _Cut(torch.autograd.Function):
    """Itself, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def broken(which):
    """TORCH's scan with a wrong backward and a right forward."""

    def scan(x, dt, A, B, C, D=None, **options):
        if which == "decay":  # the gradient of A is dropped
            A = A.detach()
        elif which == "groups":  # B gets one head's share
            B = _Cut.apply(B, lambda g: g / x.shape[2] * B.shape[2])
        elif which == "step":  # as if softplus had the derivative 1
            dt = _Cut.apply(dt, lambda g: 1.3 * g)
        return ops.TORCH.ssd_scan(x, dt, A, B, C, D, **options)

    return ops.TORCH._replace(ssd_scan=scan)


@pytest.mark.parametrize(
    "which, kind",
    [
        ("decay", "layers.N.mamba.A_log"),
        ("groups", "layers.N.mamba.conv1d.weight"),
        ("step", "layers.N.mamba.dt_bias"),
    ],
)
def test_a_wrong_backward_is_named(which, kind):
    model = make_model(make_config())
    tables = {"torch": ops.TORCH, "own": broken(which)}
    found = compare_gradients(model, random_ids(model.config, 4, 20), torch.float32, tables)
    assert (kind, "own") in found.beyond
    assert {name for _, name in found.beyond} == {"own"}


def test_the_command(capsys):
    status, out, _ = run(capsys, "parity", "--gradients", "--dtype", "float32", "--json")
    report = json.loads(out)
    (found,) = report["gradients"]
    assert status == 0 and report["input_ids"][0] > 1 and not found["beyond"]
    assert max(errors["torch"] for errors in found["errors"].values()) < 1e-4
    status, out, _ = run(
        capsys, "parity", "--gradients", "--dtype", "float32", "--prompt", "What is 47+25-8?"
    )
    assert status in (0, 1) and "layers.N.mamba.A_log" in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--paths", "decode"], "--paths: not with --gradients"),
        (["--out", "x.html"], "--out: not with --gradients"),
        (["--against", "llama.cpp"], "compared with transformers'"),
        (["--prompt", "5"], "two tokens"),
    ],
)
def test_refusals(capsys, options, message):
    status, _, err = run(capsys, "parity", "--gradients", *options)
    assert status == 2 and message in err and len(err.splitlines()) == 1

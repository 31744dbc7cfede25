"""The written backwards of norms, SwiGLU and convolution beside autograd through REFERENCE."""

import itertools

import pytest
import torch
from models import relative_error

from falcon_h1r import operator_gradients
from falcon_h1r.ops import REFERENCE, TORCH

f64 = torch.float64


def normal(*shape, seed=0, dtype=f64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=f64).to(dtype)


def cases(dtype=f64):
    """Name -> (operator, tensors that learn, the rest)."""
    x, z, w = (
        normal(2, 9, 12, dtype=dtype),
        normal(2, 9, 12, seed=1, dtype=dtype),
        normal(12, seed=2, dtype=dtype),
    )
    found = {"rms_norm": ("rms_norm", (x, w), {"eps": 0.1})}
    for groups, before in itertools.product((1, 3), (False, True)):
        options = {"eps": 0.1, "n_groups": groups, "norm_before_gate": before}
        found[f"gated, {groups} groups, {before}"] = ("gated_rms_norm", (x, z, w), options)
    found["gate alone"] = ("gated_rms_norm", (x, z), {"weight_d": None, "eps": 0.1})
    found["swiglu"] = ("swiglu", (x, z), {"gate_multiplier": 0.7})
    taps, bias, window = (
        normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(12, 4), (12,), (2, 3, 12)], start=3)
    )
    found["conv"] = ("causal_conv1d", (x, taps), {})
    found["conv, bias"] = ("causal_conv1d", (x, taps, bias), {})
    found["conv, one tap"] = ("causal_conv1d", (x, taps[:, :1], bias), {})
    found["conv, window"] = ("causal_conv1d", (x, taps, bias, window), {})
    lengths = torch.tensor([9, 4])
    found["conv, lengths"] = ("causal_conv1d", (x, taps, bias), {"lengths_b": lengths})
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    found["conv, packed"] = ("causal_conv1d", (x, taps, bias), {"seq_idx_bl": documents})
    return found


def gradients(table, operator, tensors, options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    arguments = list(leaves)
    if operator == "causal_conv1d" and len(leaves) == 4:
        options = {**options, "initial_window_bvc": arguments.pop()}
    if operator == "gated_rms_norm" and len(leaves) == 2:
        arguments.append(None)
        options = {k: v for k, v in options.items() if k != "weight_d"}
    out = getattr(table, operator)(*arguments, **options)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = [normal(*o.shape, seed=7 + i, dtype=o.dtype) for i, o in enumerate(outs)]
    return [o.detach() for o in outs], torch.autograd.grad(outs, leaves, seeds)


@pytest.mark.parametrize("name", cases())
def test_they_are_those_of_autograd(name):
    operator, tensors, options = cases()[name]
    out, found = gradients(TORCH, operator, tensors, options)
    expected_out, expected = gradients(REFERENCE, operator, tensors, options)
    for one, other in zip((*out, *found), (*expected_out, *expected), strict=True):
        assert one.numel() == 0 or relative_error(one, other) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases())
def test_rounding_is_at_most_twice_that_of_autograd(name, dtype):
    operator, tensors, options = cases(dtype)[name]
    _, found = gradients(TORCH, operator, tensors, options)
    _, plain = gradients(REFERENCE, operator, tensors, options)
    _, exact = gradients(REFERENCE, operator, [t.double() for t in tensors], options)
    for one, other, truth in zip(found, plain, exact):
        assert one.dtype == dtype
        error, yardstick = ((t.double() - truth).norm() for t in (one, other))
        assert error <= 2 * yardstick + 2 * torch.finfo(dtype).eps * truth.norm(), name


@pytest.mark.parametrize("name", [n for n in cases() if "packed" not in n and "window" not in n])
def test_only_inputs_survive_the_forward(name):
    operator, tensors, options = cases()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    known, kept = {t.data_ptr() for t in leaves}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        if operator == "gated_rms_norm" and len(leaves) == 2:
            TORCH.gated_rms_norm(*leaves, None, 0.1)
        else:
            getattr(TORCH, operator)(*leaves, **options)
    others = [t for t in kept if t.data_ptr() not in known and t.is_floating_point()]
    others = [t for t in others if t.numel() > 24]  # not scales and weights
    # The convolution's history begins with zeros, so it is a copy of x: one tensor.
    assert len({t.data_ptr() for t in others}) <= (1 if operator == "causal_conv1d" else 0), others


@pytest.mark.parametrize("name", ["rms_norm", "gated, 3 groups, True", "swiglu", "conv, bias"])
def test_a_second_derivative_is_refused(name):
    operator, tensors, options = cases()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = getattr(operator_gradients, operator)(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), leaves, create_graph=True)


def test_inputs_without_a_gradient_get_none():
    x, w = normal(2, 9, 12), normal(12).requires_grad_()
    TORCH.rms_norm(x, w, 0.1).sum().backward()
    assert x.grad is None and w.grad is not None

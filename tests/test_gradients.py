"""The scan's backward against autograd through the recurrence, in float64."""

import itertools

import pytest
import torch
from transformers.models.falcon_h1.modeling_falcon_h1 import mamba2_chunk_scan

from falcon_h1r import scan
from falcon_h1r.ssd import ssd_recurrent

NAMES = ("x", "dt", "A", "B", "C", "D", "initial state")
# b, l, h, p, g, n, chunk: one token, borders of a chunk and of a segment, groups, one head.
SHAPES = [
    (2, 1, 4, 3, 2, 5, 8),
    (1, 7, 2, 3, 1, 4, 8),
    (2, 8, 6, 4, 2, 5, 8),
    (1, 9, 4, 3, 4, 6, 8),
    (1, 127, 2, 3, 1, 2, 8),
    (2, 128, 2, 3, 2, 2, 8),
    (1, 129, 4, 2, 2, 3, 8),
    (2, 270, 4, 2, 2, 3, 8),
    (1, 70, 1, 3, 1, 4, 128),
]


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(b, l, h, p, g, n, *, with_D=True, with_state=True, packed=False, seed=0):
    """Inputs with graphs, documents, and the gradients of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    dt = torch.nn.functional.softplus(draw(generator, b, l, h) * 2 - 1)
    dt[:, l // 2 : l // 2 + 3] = 0  # holds the state, as padding does
    inputs = [
        draw(generator, b, l, h, p),
        dt,
        -draw(generator, h).abs() - 0.1,
        draw(generator, b, l, g, n),
        draw(generator, b, l, g, n),
        draw(generator, h) if with_D else None,
        draw(generator, b, h, p, n) if with_state else None,
    ]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    seq_idx = None
    if packed:
        seq_idx = (torch.rand(b, l, generator=generator) < 0.1).cumsum(1)
    return inputs, seq_idx, (draw(generator, b, l, h, p), draw(generator, b, h, p, n))


def gradients_of(form, inputs, seq_idx, given, chunk=8):
    found = form(*inputs[:6], chunk_size=chunk, initial_state_bhpn=inputs[6], seq_idx_bl=seq_idx)
    own = [t for t in inputs if t is not None]
    pairs = [(t, g.to(t.dtype)) for t, g in zip(found, given) if g is not None]
    outputs, given = zip(*pairs)
    return torch.autograd.grad(outputs, own, given, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("with_D, with_state, packed", itertools.product([True, False], repeat=3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_gradient_is_that_of_the_recurrence(shape, with_D, with_state, packed):
    *sizes, chunk = shape
    made = make(*sizes, with_D=with_D, with_state=with_state, packed=packed)
    found = gradients_of(scan.ssd_scan, *made, chunk)
    for one, other in zip(found, gradients_of(ssd_recurrent, *made), strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize("which", [0, 1], ids=["y alone", "state alone"])
def test_an_output_without_a_gradient_counts_for_nothing(which):
    inputs, seq_idx, given = make(1, 20, 2, 3, 1, 4)
    given = (given[0], None) if which == 0 else (None, given[1])
    found = gradients_of(scan.ssd_scan, inputs, seq_idx, given)
    for one, other in zip(found, gradients_of(ssd_recurrent, inputs, seq_idx, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_only_inputs_with_a_graph_get_a_gradient_and_outputs_are_the_scans():
    inputs, _, (dy, _) = make(2, 140, 4, 3, 2, 5)
    for needed in range(7):
        own = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs)]
        y, state = scan.ssd_scan(*own[:6], chunk_size=8, initial_state_bhpn=own[6])
        with torch.no_grad():
            plain = scan.ssd_scan(*own[:6], chunk_size=8, initial_state_bhpn=own[6])
        assert torch.equal(y, plain[0]) and torch.equal(state, plain[1])
        y.backward(dy)
        assert [t.grad is not None for t in own] == [i == needed for i in range(7)]


def test_inputs_of_any_layout():
    inputs, seq_idx, given = make(2, 21, 4, 3, 2, 5, packed=True)
    expected = gradients_of(scan.ssd_scan, inputs, seq_idx, given)
    turned = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    turned = [t.requires_grad_() for t in turned]
    given = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in given]
    assert not turned[0].is_contiguous()
    for one, other in zip(gradients_of(scan.ssd_scan, turned, seq_idx, given), expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_one_document_holds_reaches_no_other():
    inputs, _, given = make(1, 40, 2, 3, 1, 4, with_state=False)
    seq_idx = (torch.arange(40) // 12)[None]
    expected = gradients_of(scan.ssd_scan, inputs, seq_idx, given)
    wild = [t if t is None else t.detach().clone() for t in inputs]
    for i in (0, 3, 4):
        wild[i][:, 12:24] *= 1e30
    wild = [None if t is None else t.requires_grad_() for t in wild]
    found = gradients_of(scan.ssd_scan, wild, seq_idx, given)
    for i in (0, 1, 3, 4):
        for part in (slice(0, 12), slice(24, 40)):
            torch.testing.assert_close(
                found[i][:, part], expected[i][:, part], rtol=1e-11, atol=1e-11
            )


@pytest.mark.parametrize("dt_scale", [1e-6, 1.0, 1e3, 1e6])
def test_strong_and_weak_decays_give_finite_gradients(dt_scale):
    inputs, seq_idx, given = make(1, 40, 2, 3, 1, 4)
    inputs[1] = (inputs[1].detach() * dt_scale).requires_grad_()
    narrow = [t.detach().float().requires_grad_() for t in inputs]
    expected = gradients_of(ssd_recurrent, inputs, seq_idx, given)
    for one, other in zip(gradients_of(scan.ssd_scan, narrow, seq_idx, given), expected):
        assert one.isfinite().all() and (one - other).norm() <= 1e-5 * other.norm() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_at_most_twice_that_of_transformers(dtype):
    """Its torch scan under autograd, on the same rounded inputs, against float64."""
    inputs, _, (dy, _) = make(2, 150, 4, 8, 2, 6, with_state=False, seed=5)
    x, dt, A, B, C, D = (t.detach() for t in inputs[:6])
    own = [x.to(dtype), dt.float(), A.float(), B.to(dtype), C.to(dtype), D.float()]
    own, dy = [t.requires_grad_() for t in own], dy.to(dtype)
    wide = [t.detach().double().requires_grad_() for t in own]
    truth = gradients_of(ssd_recurrent, [*wide, None], None, (dy.double(), None))
    ours = gradients_of(scan.ssd_scan, [*own, None], None, (dy, None), chunk=32)
    y = mamba2_chunk_scan(own[0], own[1], own[2], own[3], own[4], chunk_size=32, D=own[5])
    theirs = torch.autograd.grad(y[0] if isinstance(y, tuple) else y, own, dy.to(y[0].dtype))
    for name, exact, one, other in zip(NAMES, truth, ours, theirs):
        assert (one - exact).norm() <= 2 * (other - exact).norm() + 1e-7 * exact.norm(), name


def test_gradcheck():
    inputs, seq_idx, _ = make(1, 5, 2, 2, 1, 2, packed=True)

    def call(*t):
        return scan.ssd_scan(*t[:6], chunk_size=2, initial_state_bhpn=t[6], seq_idx_bl=seq_idx)

    own = [t.detach().requires_grad_() for t in inputs]
    own[1] = (own[1].detach() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(call, own)


def test_a_second_derivative_is_refused():
    inputs, _, _ = make(1, 5, 2, 2, 1, 2)
    y, _ = scan.ssd_scan(*inputs[:6], initial_state_bhpn=inputs[6])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


def test_what_survives_the_forward_is_linear_in_the_length():
    """Inputs, and a state for each segment: nothing of a chunk."""
    (b, l, h, p, g, n), kept = (1, 1024, 4, 8, 1, 8), []
    inputs, _, _ = make(b, l, h, p, g, n)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scan.ssd_scan(*inputs[:6], chunk_size=64, initial_state_bhpn=inputs[6])
    own = {t.data_ptr() for t in inputs}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= b * h * p * n * (l // 1024)

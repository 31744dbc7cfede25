"""TORCH's operators work in place: never on a caller's tensor, never on what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F
from models import relative_error
from test_ops import DTYPES, TABLES
from test_ssd import FLOAT64_BOUND, FORMS, make_inputs, make_seq_idx, normal

from falcon_h1r import ssd
from falcon_h1r.cpu.step import ssd_step
from falcon_h1r.scan import ssd_scan
from falcon_h1r.ssd import ssd_recurrent


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_across_chunks_are_those_of_the_recurrence(groups, packed):
    """Several chunks, several heads per group; some dt are 0, as under right padding."""
    inputs = [*make_inputs(l=23, g=groups), normal(2, 4, 3, 5, seed=9)]
    inputs[1][1, 15:] = 0
    seq_idx = make_seq_idx(2, 23) if packed else None
    grad_y, grad_state = normal(2, 23, 4, 3, seed=10), normal(2, 4, 3, 5, seed=11)

    def gradients(scan):
        *leaves, start = [t.clone().requires_grad_() for t in inputs]
        y, state = scan(*leaves, chunk_size=8, initial_state_bhpn=start, seq_idx_bl=seq_idx)
        return torch.autograd.grad([y, state], [*leaves, start], [grad_y, grad_state])

    for found, expected in zip(gradients(ssd_scan), gradients(ssd_recurrent)):
        assert relative_error(found, expected) < FLOAT64_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [63, 64, 65, 129, 300])
def test_recording_gradients_changes_no_bit(length, dtype):
    """Nor does it matter that the state is overwritten in place where none are recorded."""
    inputs = make_inputs(l=length, dtype=dtype)
    options = {"initial_state_bhpn": normal(2, 4, 3, 5, seed=9, dtype=torch.float32)}
    recorded = ssd_scan(*inputs, **options)
    with torch.no_grad():
        found = ssd_scan(*inputs, **options)
        again = ssd_scan(*inputs, **options)
    for a, b, c in zip(found, recorded, again):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_left_alone_without_gradients(form):
    """Where the state is moved on in place, it is not the caller's; nor are two results one."""
    inputs, start = make_inputs(), normal(2, 4, 3, 5, seed=9)
    copies = [t.clone() for t in (*inputs, start)]
    with torch.no_grad():
        _, first = FORMS[form](*inputs, chunk_size=8, initial_state_bhpn=start)
        held = first.clone()
        FORMS[form](*inputs, chunk_size=8, initial_state_bhpn=first)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, start, first), (*copies, held)))


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("storage", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_step_of_many_rows_is_each_row_alone(monkeypatch, rows, storage, no_grad):
    """Rows are taken in pieces that fit a cache: here two of them, so that five make three."""
    x, dt, A, B, C, D = make_inputs(b=rows, l=1)
    start = normal(rows, 4, 3, 5, seed=9, dtype=storage)
    monkeypatch.setattr("falcon_h1r.cpu.step.STEP_BYTES", 2 * 8 * 4 * 3 * 5)
    state, expected_state = start.clone(), start.clone()
    arguments = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D
    with torch.set_grad_enabled(not no_grad):
        y = ssd_step(state, *arguments)
    expected = ssd.ssd_step(expected_state, *arguments)
    assert relative_error(y, expected) < FLOAT64_BOUND
    assert relative_error(state, expected_state) < (FLOAT64_BOUND if storage == x.dtype else 1e-7)


@pytest.mark.parametrize("rows", [1, 3])
def test_step_has_gradients_and_keeps_no_graph_in_the_state(monkeypatch, rows):
    x, dt, A, B, C, D = make_inputs(b=rows, l=1)
    start = normal(rows, 4, 3, 5, seed=9)
    monkeypatch.setattr("falcon_h1r.cpu.step.STEP_BYTES", 2 * 8 * 4 * 3 * 5)
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D)]
    expected_y, _ = ssd_recurrent(*leaves, initial_state_bhpn=start)
    expected = torch.autograd.grad(expected_y.square().sum(), leaves)
    state = start.clone()
    y = ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    assert not state.requires_grad
    for found, gradient in zip(torch.autograd.grad(y.square().sum(), leaves), expected):
        assert relative_error(found, gradient) < FLOAT64_BOUND


@TABLES
@DTYPES
@pytest.mark.parametrize("no_grad", [False, True])
def test_inputs_are_left_alone(ops, dtype, no_grad):
    """In-place operators inside touch no argument, in whatever dtype it is already."""
    x, z, weight = (normal(2, 5, 8, seed=s, dtype=dtype) for s in range(3))
    weight, kernel, window = weight[0, 0], x[0, :4].mT.clone(), z[:, :3].clone()
    arguments = (x, z, weight, kernel, window)
    copies = [t.clone() for t in arguments]
    with torch.set_grad_enabled(not no_grad):
        ops.rms_norm(x, weight, 1e-5)
        for norm_before_gate in (False, True):
            ops.gated_rms_norm(x, z, weight, 1e-5, 2, norm_before_gate)
        ops.gated_rms_norm(x, z, None, 1e-5)
        ops.swiglu(x, z)
        ops.swiglu(x, z, 0.4)
        ops.causal_conv1d(x, kernel, weight, initial_window_bvc=window)
        ops.causal_conv1d(x, kernel, None)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))


@TABLES
def test_gradients_of_norms_of_zeros(ops):
    """Padding may be zero throughout; its gradients are 0 / sqrt(eps), never 0 / 0."""
    x, z, weight = torch.zeros(1, 2, 8), normal(1, 2, 8, seed=1).float(), torch.ones(8)
    leaves = [t.requires_grad_() for t in (x, z, weight)]
    (ops.rms_norm(x, weight, 1e-5) + ops.gated_rms_norm(x, z, weight, 1e-5)).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    expected = (1 + F.silu(z.detach())) * 1e-5**-0.5
    assert relative_error(x.grad, expected) < 1e-6

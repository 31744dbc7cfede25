"""Inputs whose elements lie further apart than int32 counts: by one stride, or by several.

The memory between the elements is only reserved.
"""

import pytest
import torch
from checks import normal
from falcon_h1r_kernels.attention import attention
from falcon_h1r_kernels.conv1d import causal_conv1d, causal_conv1d_step
from falcon_h1r_kernels.decode_attention import decode_attention
from falcon_h1r_kernels.gated_rms_norm import gated_rms_norm
from falcon_h1r_kernels.logprob import logprob
from falcon_h1r_kernels.rms_norm import rms_norm
from falcon_h1r_kernels.rope import rope
from falcon_h1r_kernels.ssd_fused import launch_ssd_fused
from falcon_h1r_kernels.ssd_scan import ssd_scan
from falcon_h1r_kernels.swiglu import swiglu
from layouts import far_apart

BF16 = torch.bfloat16


def draw(*shape, seed=0, dtype=BF16):
    return normal(*shape, seed=seed, dtype=dtype)


def _gated(y, z):
    return gated_rms_norm(y, z, draw(32, seed=9), 1e-5)


def _rope(x):
    return rope(x, normal(1, 3, 16, seed=8), normal(1, 3, 16, seed=9))


def _conv(x, window):
    return causal_conv1d(x, draw(32, 4, seed=9), initial_window_bvc=window)


def _conv_step(x, window):
    before = window.clone()
    y, after = causal_conv1d_step(x, window, draw(32, 4, seed=9)), window.clone()
    window.copy_(before)
    return y, after


# Functions of tensors and the tensors' shapes.
CALLS = {
    "rms_norm": (lambda x, r: rms_norm(x, draw(32, seed=9), 1e-5, residual=r), [(3, 32)] * 2),
    "gated_rms_norm": (_gated, [(3, 3, 32)] * 2),
    "swiglu": (swiglu, [(3, 32)] * 2),
    "rope": (_rope, [(3, 4, 3, 32)]),
    "causal_conv1d": (_conv, [(3, 5, 32), (3, 3, 32)]),
    "causal_conv1d_step": (_conv_step, [(3, 32), (3, 3, 32)]),
    "attention": (attention, [(3, 3, 66, 16), (3, 3, 66, 16), (3, 3, 66, 16)]),
    "decode_attention": (decode_attention, [(3, 3, 16), (3, 3, 66, 16), (3, 3, 66, 16)]),
    "logprob": (lambda x: logprob(x, torch.tensor([3, 4, 5]), k=5), [(3, 99)]),
}


def assert_equal(found, expected):
    pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(one, other) for one, other in pairs)


def stretched(t, axis):
    """A copy of t whose last element along `axis` lies 2^31 elements or more from the first.

    The stride is odd, so that no unit but 1 divides it, and fits int32.
    """
    stride = 2**31 // (t.shape[axis] - 1) + 1 | 1
    return far_apart(t.transpose(0, axis), stride).transpose(0, axis)


@pytest.mark.parametrize("name", CALLS)
def test_every_axis_but_channels(name):
    call, shapes = CALLS[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = call(*inputs)
    for index, tensor in enumerate(inputs):
        # Samples of a window lie in a row.
        for axis in range(1 if name == "causal_conv1d_step" else tensor.ndim - 1):
            changed = [*inputs[:index], stretched(tensor, axis), *inputs[index + 1 :]]
            assert_equal(call(*changed), expected)


@pytest.mark.parametrize("name", CALLS)
def test_rows_with_a_stride_beyond_2_to_the_31(name):
    call, shapes = CALLS[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert_equal(call(*(far_apart(t, 2**31 + 16) for t in inputs)), call(*inputs))


FORMS = {
    "fused": ("fused", "p64q32"),
    "walk": ("staged", "walk_p64n64"),
    "parallel": ("staged", "p128n128,block1024"),
}
SCANNED = ["x", "dt", "B", "C", "state", "documents"]


def scan_inputs(b, l, h, g, p, n):
    """What the scan takes, in the order of SCANNED."""
    dt, state = torch.rand(b, l, h), draw(b, h, p, n, seed=3, dtype=torch.float32)
    B, C = draw(b, l, g, n, seed=1), draw(b, l, g, n, seed=2)
    documents = (torch.arange(l) // 30).expand(b, l).contiguous()
    return [draw(b, l, h, p), dt, B, C, state, documents]


def scan(form, x, dt, B, C, state, documents):
    """The scan with documents and, if fused, two segments."""
    form, config = FORMS[form]
    A, D = torch.linspace(-1, -0.1, x.shape[2]), torch.linspace(0.5, 1, x.shape[2])
    inputs = (x, dt, A, B, C, D)
    if form == "fused":
        rest = (documents, None, False, (0.0, float("inf")))
        return launch_ssd_fused(*inputs, 2, state, *rest, config)
    options = {"initial_state_bhpn": state, "seq_idx_bl": documents}
    return ssd_scan(*inputs, chunk_size=32, form=form, config=config, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCANNED)
def test_every_axis_of_a_scan(name, form):
    inputs = scan_inputs(3, 40, 3, 3, 16, 16)
    expected, index = scan(form, *inputs), SCANNED.index(name)
    tensor = inputs[index]
    # In C B^T the step between blocks of n is int32: they may lie 2^25 elements apart, no more.
    for axis in range(3 if name in "BC" else tensor.ndim):
        inputs[index] = stretched(tensor, axis)
        assert_equal(scan(form, *inputs), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_scan_with_a_stride_beyond_2_to_the_31(form):
    inputs = scan_inputs(2, 40, 2, 1, 16, 16)
    expected = scan(form, *inputs)
    assert_equal(scan(form, *(far_apart(t, 2**31 + 16) for t in inputs)), expected)


def test_a_vocabulary_that_is_spread_out():
    logits, chosen = draw(3, 99), torch.tensor([98, 50, 3], dtype=torch.int32)
    logits[:, -1] = 9
    assert_equal(logprob(stretched(logits, 1), chosen, k=5), logprob(logits, chosen, k=5))

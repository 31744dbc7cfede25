"""What the kernels refuse before a launch: offsets beyond int32, shapes, memory, limits."""

import pytest
import torch

from falcon_h1r.ops import TRITON

b, l, h, p, g, n = 2, 8, 4, 8, 2, 8
FAR = r"channels x stride < 2\^31"


def far(shape, axis, step=2**23):
    """Without memory; elements of one axis stand `step` apart."""
    strides = [1] * len(shape)
    strides[axis] = step
    return torch.empty_strided(shape, strides, device="meta")


def meta(*shape):
    return torch.empty(*shape, device="meta")


def step(state, x=None, dt=None, B=None, C=None, **options):
    x = meta(b, 300, p) if x is None else x
    dt = meta(b, 300) if dt is None else dt
    B, C = (meta(b, g, n) if t is None else t for t in (B, C))
    return TRITON.ssd_step(state, x, dt, meta(300), B, C, **options)


WEIGHT = meta(300, 4)
CALLS = {
    "rms_norm": lambda k: TRITON.rms_norm(far((1, 4, 300), 2, k), WEIGHT[:, 0], 1e-5),
    "gated": lambda k: TRITON.gated_rms_norm(
        meta(1, 4, 300), far((1, 4, 300), 2, k), WEIGHT[:, 0], 1e-5
    ),
    "conv": lambda k: TRITON.causal_conv1d(far((1, 4, 300), 2, k), WEIGHT),
    "conv step": lambda k: TRITON.causal_conv1d_step(far((1, 300), 1, k), meta(1, 3, 300), WEIGHT),
    "window": lambda k: TRITON.causal_conv1d_step(
        meta(1, 300), far((1, 3, 300), 1, 100 * k), WEIGHT
    ),
    "rope": lambda k: TRITON.rope(
        far((1, 2, 3, 300), 3, k), torch.empty(1, 3, 150, device="meta"), meta(1, 3, 150)
    ),
    "x of a step": lambda k: step(meta(b, 300, p, n), x=far((b, 300, p), 1, k)),
    "dt of a step": lambda k: step(meta(b, 300, p, n), dt=far((b, 300), 1, k)),
    "B of a step": lambda k: step(meta(b, 300, p, n), B=far((b, g, n), 2, 100 * k)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_offsets_beyond_int32(call):
    with pytest.raises(ValueError, match=FAR):
        call(2**23)
    call(2**10)


def test_a_far_batch_is_served():
    TRITON.rms_norm(far((300, 4, 300), 0), WEIGHT[:, 0], 1e-5)
    TRITON.causal_conv1d(far((300, 4, 300), 0), WEIGHT)
    TRITON.causal_conv1d(far((1, 300, 300), 1), WEIGHT)


def normal(*shape):
    return torch.randn(*shape)


def near_step(state, **options):
    x, dt, A = normal(b, h, p), normal(b, h).abs(), -normal(h).abs()
    return TRITON.ssd_step(state, x, dt, A, normal(b, g, n), normal(b, g, n), **options)


def scan(**options):
    x, dt, A = normal(b, l, h, p), normal(b, l, h).abs(), -normal(h).abs()
    return TRITON.ssd_scan(x, dt, A, normal(b, l, g, n), normal(b, l, g, n), **options)


REFUSED = {
    "three axes": (lambda: near_step(normal(h, p, n)), "expected \\(b, h, p, n\\)"),
    "a scalar": (lambda: near_step(torch.tensor(1.0)), "expected \\(b, h, p, n\\)"),
    "a state in pieces": (
        lambda: near_step(normal(1000).as_strided((b, h, p, n), (1, 8, 8, 1))),
        "overlaps itself",
    ),
    "an expanded state": (lambda: near_step(normal(1, h, p, n).expand(b, -1, -1, -1)), "expanded"),
    "a window in pieces": (
        lambda: TRITON.causal_conv1d_step(
            normal(2, 4), normal(100).as_strided((2, 3, 4), (1, 4, 1)), normal(4, 4)
        ),
        "overlaps itself",
    ),
    "a sample of no axis": (
        lambda: TRITON.causal_conv1d_step(torch.tensor(1.0), normal(1, 3, 1), normal(1, 4)),
        "expected \\(b, c\\)",
    ),
    "a reversed limit": (lambda: near_step(normal(b, h, p, n), dt_limit=(2.0, 1.0)), "dt_limit"),
    "a limit of NaN": (lambda: scan(dt_limit=(float("nan"), 1.0)), "dt_limit"),
    "a reversed limit of a scan": (lambda: scan(dt_limit=(2.0, 1.0)), "dt_limit"),
    "a norm of a scalar": (
        lambda: TRITON.rms_norm(torch.tensor(1.0), normal(1), 1e-5), "expected \\(..., d\\)"
    ),
    "a norm of nothing": (
        lambda: TRITON.rms_norm(normal(3, 0), normal(0), 1e-5), "expected \\(..., d\\)"
    ),
    "rope of three axes": (
        lambda: TRITON.rope(normal(2, 3, 4), normal(1, 3, 2), normal(1, 3, 2)),
        "expected \\(b, h, l, e\\)",
    ),
    "no key head": (
        lambda: TRITON.attention(normal(2, 4, 8, 8), normal(2, 0, 8, 8), normal(2, 0, 8, 8)),
        "attention: keys",
    ),
    "a list": (lambda: TRITON.rms_norm([1.0], normal(1), 1e-5), "list is no tensor"),
    "nothing": (lambda: TRITON.swiglu(None, normal(1)), "NoneType is no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_what_a_kernel_cannot_serve_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_states_in_any_order_of_memory_are_updated():
    for state in (
        normal(p, b, n, h).permute(1, 3, 0, 2),
        normal(b, 2 * h, p, n)[:, ::2],
        normal(3, b, h, p, n)[1],
    ):
        before = state.clone()
        near_step(state)
        assert not torch.equal(state, before)

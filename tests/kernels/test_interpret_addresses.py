"""Addresses past 2^31 elements: the last programs of launches whose tensors are that large.

Memory that is not touched is only reserved. Inputs repeat along the axis that is long, and results
are those of the small problem that is left without it.
"""

import resource
from itertools import product

import falcon_h1r_kernels.decode_attention
import interpret
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
from falcon_h1r_kernels.ssd_step import ssd_step
from falcon_h1r_kernels.swiglu import swiglu
from layouts import far_apart, reserved, reserved_outputs

MOST = 500 * 1024  # KB of memory that a test may take
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with reserved_outputs():
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST


def last(parts):
    """Programs of the last of `parts` equal parts of the first axis of every grid."""

    def programs(kernel, grid):
        few = grid[0] // parts
        return product(range(grid[0] - few, grid[0]), range(grid[1]), range(grid[2]))

    return interpret.only(programs)


def draw(*shape, seed=0, dtype=BF16):
    return normal(*shape, seed=seed, dtype=dtype)


def check(found, expected):
    assert (expected != 0).float().mean() > 0.99  # untouched memory is 0
    assert torch.equal(found, expected)


def test_rms_norm():
    rows, d = 2**21 + 1, 1024
    x, residual, weight = draw(1, d), draw(1, d, seed=1), draw(d, seed=2)
    expected = rms_norm(x, weight, 1e-5, residual=residual)
    with last(rows):
        found = rms_norm(x.expand(rows, d), weight, 1e-5, residual=residual.expand(rows, d))
    for one, other in zip(found, expected):
        check(one[-1:], other)


@pytest.mark.parametrize("shape", [(2**20 + 1, 2, 1024), (1, 2**21 + 1, 1024)])
@pytest.mark.parametrize("options", [(1,), (2, True), None])
def test_gated_rms_norm(shape, options):
    y, z, weight = draw(1, 1, 1024), draw(1, 1, 1024, seed=1), draw(1024, seed=2)
    weight, options = (None, ()) if options is None else (weight, options)
    expected = gated_rms_norm(y, z, weight, 1e-5, *options)
    with last(shape[0] * shape[1]):
        found = gated_rms_norm(y.expand(shape), z.expand(shape), weight, 1e-5, *options)
    check(found[-1:, -1:], expected)


def test_swiglu():
    gate, up = draw(1, 1024), draw(1, 1024, seed=1)
    expected, rows = swiglu(gate, up), 2**21 + 1
    with last(rows):
        check(swiglu(gate.expand(rows, 1024), up.expand(rows, 1024))[-1:], expected)


def test_swiglu_of_one_long_row():
    gate, up = draw(1, 1024), draw(1, 1024, seed=1)
    expected = swiglu(gate, up)
    long = [reserved(2**31 + 2048, dtype=BF16) for _ in range(2)]
    for whole, end in zip(long, (gate, up)):
        whole[-1024:] = end[0]
    with last(2**20 + 1):
        check(swiglu(*long)[-1024:], expected[0])


@pytest.mark.parametrize(
    "b, h, l, tables",
    [
        (2**23 + 1, 1, 4, 1),
        (2**23 + 1, 1, 4, 2**23 + 1),
        (1, 1, 2**25 + 16, 1),
        (1, 2**17 + 4, 128, 1),
    ],
)
def test_rope(b, h, l, tables):
    x, cos, sin = draw(1, 1, 1, 128), *(torch.randn(1, 4, 64) for _ in range(2))
    expected = rope(x.expand(1, 1, 4, 128), cos, sin, 0.5)
    tables = [reserved(tables, l, 64, dtype=torch.float32) for _ in range(2)]
    for table, end in zip(tables, (cos, sin)):
        table[-1, -4:] = end[0]
    with interpret.only(lambda kernel, grid: [(grid[0] - 1, grid[1] - 1, 0)]):
        found = rope(x.expand(b, h, l, 128), *tables, 0.5)
    check(found[-1:, -1:, -4:], expected)


def test_causal_conv1d_of_many_rows():
    b, l, c = 2**31 // 1536 + 1, 3, 512
    x, window = draw(1, l, c), draw(1, 3, c, seed=1)
    weight, bias = draw(c, 4, seed=2), draw(c, seed=3)
    expected = causal_conv1d(x, weight, bias, initial_window_bvc=window, config="segment32")
    with last(b):
        found = causal_conv1d(
            x.expand(b, l, c), weight, bias, initial_window_bvc=window.expand(b, 3, c)
        )
    for one, other in zip(found, expected):
        check(one[-1:], other)


@pytest.mark.parametrize("l, c", [(2**22 + 40, 512), (1064, 2**21)])
@pytest.mark.parametrize("documents", [False, True])
def test_causal_conv1d_of_a_long_row(l, c, documents):
    x = draw(l + 512, dtype=BF16).as_strided((1, l, c), (0, 1, 0 if c > 512 else 1))
    weight, bias = draw(4)[None].expand(c, 4), draw(1).expand(c)
    seq_idx = torch.zeros(1, 1, dtype=torch.int64).expand(1, l) if documents else None
    expected, window = causal_conv1d(x[:, -40:, -512:], weight[-512:], bias[-512:])
    blocks = c // 512

    def programs(kernel, grid):
        return [(grid[0] - 1 - blocks, 0, 0), (grid[0] - 1, 0, 0)]

    with interpret.only(programs):
        found, final = causal_conv1d(x, weight, bias, seq_idx_bl=seq_idx)
    check(found[:, -8:, -512:], expected[:, -8:])
    check(final[..., -512:], window)


def test_causal_conv1d_step():
    b, c = 2**23 + 1, 256
    x, window, weight = draw(1, c), draw(1, 3, c, seed=1), draw(c, 4, seed=2)
    many = reserved(b, 3, c, dtype=BF16)
    many[-1:] = window
    expected = causal_conv1d_step(x, window, weight)
    with last(b):
        check(causal_conv1d_step(x.expand(b, c), many, weight)[-1:], expected)
    check(many[-1:], window)


@pytest.mark.parametrize("b, l", [(2**22 + 1, 4), (1, 2**24 + 4)])
def test_attention_outputs(b, l):
    q, (k, v) = draw(1, 2, 1, 64), (draw(1, 1, 8, 64, seed=s) for s in (1, 2))
    offset = torch.full((1,), 8)
    expected = attention(q, k, v, query_offset_b=offset)
    q = q.expand(b, 2, l, 64)
    k, v, offset = (t.expand(b, *t.shape[1:]) for t in (k, v, offset))
    # Tiles begin with the last queries.
    with interpret.only(lambda kernel, grid: [(b - 1, 0, 0)]):
        found = attention(q, k, v, query_offset_b=offset)
    check(found[-1:, :, -1:], expected)


def test_attention_keys():
    q, (k, v) = draw(1, 2, 4, 64), (draw(1, 1, 10, 64, seed=s) for s in (1, 2))
    expected = attention(q, k, v, query_offset_b=torch.tensor([6]))
    s = 2**25 + 10
    keys = [reserved(1, 1, s, 64, dtype=BF16) for _ in range(2)]
    for whole, end in zip(keys, (k, v)):
        whole[:, :, -10:] = end
    found = attention(
        q, *keys, query_offset_b=torch.tensor([s - 4]), key_start_b=torch.tensor([s - 10])
    )
    assert torch.allclose(found, expected, rtol=2**-6)  # the block's first key differs


@pytest.mark.parametrize("parts", [1, 2])
def test_decode_attention_outputs(parts, monkeypatch):
    b, s = 2**24 + 1, 256 * parts
    monkeypatch.setattr(falcon_h1r_kernels.decode_attention, "parts_of", lambda *_: parts)
    q, k, v = draw(1, 2, 64), draw(1, 1, s, 64, seed=1), draw(1, 1, s, 64, seed=2)
    expected = decode_attention(q, k, v)
    with last(b):
        found = decode_attention(*(t.expand(b, *t.shape[1:]) for t in (q, k, v)))
    check(found[-1:], expected)


def test_decode_attention_keys():
    q, (k, v) = draw(1, 2, 64), (draw(1, 1, 130, 64, seed=s) for s in (1, 2))
    along = [far_apart(t.permute(2, 0, 1, 3), 2**24 + 8).permute(1, 2, 0, 3) for t in (k, v)]
    check(decode_attention(q, *along), decode_attention(q, k, v))


def test_logprob():
    v = 130048
    logits, chosen, m = draw(1, v), torch.tensor([v - 1]), 2**31 // (v // 64) + 2
    expected = logprob(logits, chosen, config="tile8192")
    with last(m):
        found = logprob(logits.expand(m, v), chosen.expand(m))
    for one, other in zip(found, expected):
        check(one[-1:], other)


FORMS = [
    ("fused", "p64q64"),
    ("fused", "p64q32"),
    ("staged", "walk_p64n64"),
    ("staged", "p128n128,block1024"),
]


def scan_inputs(l, p, n):
    """x, dt, A, B, C, D of one row and one head."""
    x, B, C = draw(1, l, 1, p), draw(1, l, 1, n, seed=1), draw(1, l, 1, n, seed=2)
    dt = torch.rand(1, l, 1)
    return x, dt, torch.full((1,), -0.5), B, C, torch.full((1,), 0.75)


def wide(inputs, b, h, g):
    """The same for b rows, h heads and g groups, which are all alike."""
    x, dt, A, B, C, D = inputs
    sizes = [(b, -1, h, -1), (b, -1, h), (h,), (b, -1, g, -1), (b, -1, g, -1), (h,)]
    return [t.expand(size) for t, size in zip((x, dt, A, B, C, D), sizes)]


def scan(inputs, form, config, segments, **options):
    """ssd_scan with so many segments, chunks of 16 in the staged form."""
    if form == "staged":
        return ssd_scan(*inputs, chunk_size=16, form=form, config=config, **options)
    rest = (options.get("initial_state_bhpn"), None, None, False, (0.0, float("inf")))
    return launch_ssd_fused(*inputs, segments, *rest, config)


@pytest.mark.parametrize("form, config", FORMS)
def test_ssd_scan_of_many_rows(form, config):
    b, l = 2**24 + 1, 130
    inputs, state = scan_inputs(l, 16, 16), draw(1, 1, 16, 16, seed=3, dtype=torch.float32)
    expected = scan(inputs, form, config, 3, initial_state_bhpn=state)
    with last(b):
        found = scan(
            wide(inputs, b, 2, 1), form, config, 3, initial_state_bhpn=state.expand(b, 2, -1, -1)
        )
    check(found[0][-1:, :, -1:], expected[0])
    check(found[1][-1:, -1:], expected[1])


@pytest.mark.parametrize("form, config", FORMS)
def test_ssd_scan_of_a_long_row_and_many_heads(form, config):
    l, heads, p, n = 2080, 2**14, 64, 16
    inputs = scan_inputs(l, p, n)
    expected = scan(inputs, form, config, 2)

    def of_last_head(kernel, grid):
        if kernel in ("_chunk_cumsum_kernel", "_chunk_bmm_kernel"):
            return product(range(grid[0]), [grid[1] - 1], range(grid[2]))
        return ((program, 0, 0) for program in range(heads - 1, grid[0], heads))

    groups = heads if form == "fused" else 1
    with interpret.only(of_last_head):
        found = scan(wide(inputs, 1, heads, groups), form, config, 2)
    check(found[0][:, :, -1:], expected[0])
    check(found[1][:, -1:], expected[1])


def test_ssd_step():
    b = 2**26 + 1
    inputs = scan_inputs(1, 16, 16)
    state = draw(1, 1, 16, 16, seed=3, dtype=torch.float32)
    many = reserved(b, 2, 16, 16, dtype=torch.float32)
    many[-1:] = state

    def step(state, x, dt, A, B, C, D):
        return ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)

    expected = step(state, *inputs)
    with last(b):
        check(step(many, *wide(inputs, b, 2, 1))[-1:, -1:], expected)
    check(many[-1:, -1:], state)

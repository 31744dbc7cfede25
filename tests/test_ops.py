"""The operators beside the scan: norms, rotation, attention, convolution, SwiGLU.

Float64 against loops written from the definition; float32 and bfloat16 by their distance to
float64, at most twice that of transformers' operator on the same inputs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from models import relative_error, rms_error
from transformers.models.falcon_h1 import modeling_falcon_h1 as witness

from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.rope import rotary_table

TABLES = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
FLOAT64_BOUND = 1e-13  # about 500 roundoffs


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def assert_no_worse(found, witnessed, exact):
    assert found.dtype == witnessed.dtype
    assert rms_error(found, exact) <= 2 * rms_error(witnessed, exact)


@TABLES
def test_rms_norm_by_hand(ops):
    x, weight, eps = normal(2, 3, 8), normal(8, seed=1), 0.3
    y = ops.rms_norm(x, weight, eps)
    for b in range(2):
        for t in range(3):
            mean = sum(value**2 for value in x[b, t].tolist()) / 8
            for found, value, w in zip(y[b, t].tolist(), x[b, t].tolist(), weight.tolist()):
                expected = value / math.sqrt(mean + eps) * w
                assert math.isclose(found, expected, rel_tol=FLOAT64_BOUND)


@TABLES
@DTYPES
def test_rms_norm_rounding(ops, dtype):
    x, weight = normal(4, 9, 64, dtype=dtype) * 3, normal(64, seed=1, dtype=dtype)
    module = witness.FalconH1RMSNorm(64, eps=1e-5).to(dtype)
    module.weight.data = weight
    exact = REFERENCE.rms_norm(x.double(), weight.double(), 1e-5)
    assert_no_worse(ops.rms_norm(x, weight, 1e-5), module(x).detach(), exact)


@TABLES
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_rms_norm_by_hand(ops, groups, norm_before_gate):
    y, z, weight, eps = normal(1, 2, 8), normal(1, 2, 8, seed=1), normal(8, seed=2), 0.2
    found = ops.gated_rms_norm(y, z, weight, eps, groups, norm_before_gate)
    size = 8 // groups
    for t in range(2):
        values = [float(v) for v in y[0, t]]
        gates = [silu(float(v)) for v in z[0, t]]
        if not norm_before_gate:
            values = [v * gate for v, gate in zip(values, gates)]
        for channel in range(8):
            group = values[channel // size * size : channel // size * size + size]
            scale = 1 / math.sqrt(sum(v * v for v in group) / size + eps)
            expected = values[channel] * scale * float(weight[channel])
            expected *= gates[channel] if norm_before_gate else 1
            assert math.isclose(float(found[0, t, channel]), expected, rel_tol=FLOAT64_BOUND)
    gate_only = ops.gated_rms_norm(y, z, None, eps, groups, norm_before_gate)
    assert relative_error(gate_only, y * z / (1 + torch.exp(-z))) < FLOAT64_BOUND


@TABLES
@DTYPES
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_rms_norm_rounding(ops, dtype, norm_before_gate):
    y, z = normal(4, 9, 64, dtype=dtype), normal(4, 9, 64, seed=1, dtype=dtype)
    weight = normal(64, seed=2, dtype=dtype)
    module = witness.FalconH1RMSNormGated(64, 1e-5, 2, norm_before_gate).to(dtype)
    module.weight.data = weight
    exact = REFERENCE.gated_rms_norm(
        y.double(), z.double(), weight.double(), 1e-5, 2, norm_before_gate
    )
    found = ops.gated_rms_norm(y, z, weight, 1e-5, 2, norm_before_gate)
    assert_no_worse(found, module(y, z).detach(), exact)
    exact = REFERENCE.gated_rms_norm(y.double(), z.double(), None, 1e-5)
    assert_no_worse(ops.gated_rms_norm(y, z, None, 1e-5), y * F.silu(z), exact)


@TABLES
def test_norms_survive_extremes(ops):
    """Squares of bfloat16's largest values leave float32's range in neither direction unnoticed."""
    weight = torch.ones(8, dtype=torch.bfloat16)
    for scale in (1e-30, 1e-18, 1.0, 1e18):
        x = torch.full((1, 1, 8), scale, dtype=torch.bfloat16)
        assert ops.rms_norm(x, weight, 1e-5).isfinite().all()
        assert ops.gated_rms_norm(x, torch.ones_like(x), weight, 1e-5).isfinite().all()
    zero = torch.zeros(1, 1, 8)
    assert torch.equal(ops.rms_norm(zero, torch.ones(8), 1e-5), zero)


@pytest.mark.parametrize("theta", [1e4, 1e11])
@pytest.mark.parametrize("position", [0, 1, 17, 4095, 2**18 - 1])
def test_rotary_table_at_long_positions(theta, position):
    """Against Python's cos and sin; an angle of 2^18 has 3e-11 of roundoff in float64."""
    cos, sin = rotary_table(torch.tensor([[position]]), 128, theta, torch.float64)
    for i in range(64):
        angle = position * theta ** (-2 * i / 128)
        assert abs(float(cos[0, 0, i]) - math.cos(angle)) < 1e-10
        assert abs(float(sin[0, 0, i]) - math.sin(angle)) < 1e-10


@TABLES
def test_rope_by_hand(ops):
    x = normal(2, 3, 4, 6)
    position = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    cos, sin = rotary_table(position, 6, 100.0, torch.float64)
    found = ops.rope(x, cos, sin, multiplier=0.7)
    for b in range(2):
        for t in range(4):
            for i in range(3):
                angle = int(position[b, t]) * 100.0 ** (-i / 3)
                first, second = 0.7 * x[b, :, t, i], 0.7 * x[b, :, t, i + 3]
                a = first * math.cos(angle) - second * math.sin(angle)
                c = second * math.cos(angle) + first * math.sin(angle)
                assert relative_error(found[b, :, t, i], a) < FLOAT64_BOUND
                assert relative_error(found[b, :, t, i + 3], c) < FLOAT64_BOUND


@TABLES
@DTYPES
def test_rope_rounding(ops, dtype):
    x = normal(2, 3, 50, 32, dtype=dtype)
    position = torch.arange(50)[None]
    exact = REFERENCE.rope(x.double(), *rotary_table(position, 32, 1e4, torch.float64), 0.3)
    angle = position[..., None].float() * 1e4 ** (-torch.arange(0, 32, 2).float() / 32)
    angle = torch.cat([angle, angle], -1)
    witnessed, _ = witness.apply_rotary_pos_emb(
        x * 0.3, x * 0.3, angle.cos().to(dtype), angle.sin().to(dtype)
    )
    found = ops.rope(x, *rotary_table(position, 32, 1e4, torch.float32), 0.3)
    assert_no_worse(found, witnessed, exact)


def attention_by_hand(q, k, v, offsets=None, seq_idx=None):
    """One query and one key at a time. offsets: keys before each row's first query."""
    b, h, l, e = q.shape
    j, s = k.shape[1:3]
    out = torch.zeros_like(q)
    for row in range(b):
        offset = 0 if offsets is None else int(offsets[row])
        for head in range(h):
            source = head // (h // j)
            for t in range(l):
                keys = [
                    i
                    for i in range(s)
                    if i <= t + offset and (seq_idx is None or seq_idx[row, i] == seq_idx[row, t])
                ]
                scores = [float(q[row, head, t] @ k[row, source, i]) / math.sqrt(e) for i in keys]
                shares = [math.exp(score - max(scores)) for score in scores]
                for share, i in zip(shares, keys):
                    out[row, head, t] += share / sum(shares) * v[row, source, i]
    return out


@TABLES
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
def test_attention_by_hand(ops, heads):
    h, j = heads
    q, k, v = normal(2, h, 7, 6), normal(2, j, 7, 6, seed=1), normal(2, j, 7, 6, seed=2)
    assert relative_error(ops.attention(q, k, v), attention_by_hand(q, k, v)) < FLOAT64_BOUND
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 5, 5, 5, 5, 5, 9]])
    found = ops.attention(q, k, v, seq_idx_bl=seq_idx)
    expected = attention_by_hand(q, k, v, seq_idx=seq_idx)
    assert relative_error(found, expected) < FLOAT64_BOUND


@TABLES
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 1)], ids=str)
def test_attention_behind_a_cache_by_hand(ops, heads):
    """Rows that already hold different numbers of keys, in a buffer with room to spare."""
    h, j = heads
    q, k, v = normal(3, h, 4, 6), normal(3, j, 12, 6, seed=1), normal(3, j, 12, 6, seed=2)
    offsets = torch.tensor([0, 3, 8])
    found = ops.attention(q, k, v, query_offset_b=offsets)
    assert relative_error(found, attention_by_hand(q, k, v, offsets)) < FLOAT64_BOUND


@TABLES
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
def test_decode_attention_is_the_last_row_of_prefill(ops, heads):
    h, j = heads
    q, k, v = normal(3, h, 9, 6), normal(3, j, 9, 6, seed=1), normal(3, j, 9, 6, seed=2)
    prefill = ops.attention(q, k, v)
    last = ops.decode_attention(q[:, :, -1], k, v)
    assert relative_error(last, prefill[:, :, -1]) < FLOAT64_BOUND
    lengths = torch.tensor([1, 4, 9])
    last = torch.stack([q[row, :, n - 1] for row, n in enumerate(lengths.tolist())])
    found = ops.decode_attention(last, k, v, lengths)
    for row, n in enumerate(lengths.tolist()):
        assert relative_error(found[row], prefill[row, :, n - 1]) < FLOAT64_BOUND


@TABLES
def test_keys_beyond_a_row_have_weight_zero(ops):
    """Exactly zero: whatever finite values stand there, the result is the same to the last bit."""
    q, k, v = normal(2, 4, 6), normal(2, 2, 9, 6, seed=1), normal(2, 2, 9, 6, seed=2)
    lengths = torch.tensor([3, 7])
    expected = ops.decode_attention(q, k, v, lengths)
    for row, n in enumerate(lengths.tolist()):
        k[row, :, n:], v[row, :, n:] = 1e30, -1e30
    assert torch.equal(ops.decode_attention(q, k, v, lengths), expected)
    found = ops.attention(q[:, :, None], k, v, query_offset_b=lengths - 1)
    assert relative_error(found[:, :, 0], expected) < FLOAT64_BOUND


@TABLES
@DTYPES
def test_attention_rounding(ops, dtype):
    q, k, v = (normal(2, h, 40, 16, seed=h, dtype=dtype) for h in (4, 2, 2))
    v = normal(2, 2, 40, 16, seed=5, dtype=dtype)
    exact = REFERENCE.attention(q.double(), k.double(), v.double())
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    mask = torch.full((40, 40), -torch.inf).triu(1).to(dtype)
    witnessed, _ = witness.eager_attention_forward(module, q, k, v, mask, 16**-0.5)
    assert_no_worse(ops.attention(q, k, v), witnessed.transpose(1, 2), exact)
    decoded = ops.decode_attention(q[:, :, -1], k, v)
    assert_no_worse(decoded, witnessed[:, -1], exact[:, :, -1])


def conv_by_hand(x, weight, bias, window, seq_idx=None):
    """Tap by tap and sample by sample; returns y of one row (l, c)."""
    l, c = x.shape
    w = weight.shape[1]
    out = torch.zeros_like(x)
    for t in range(l):
        for channel in range(c):
            total = 0.0 if bias is None else float(bias[channel])
            for tap in range(w):
                source = t - (w - 1) + tap
                document = 0 if seq_idx is None else max(source, 0)
                if seq_idx is not None and seq_idx[document] != seq_idx[t]:
                    continue
                sample = x[source, channel] if source >= 0 else window[source + w - 1, channel]
                total += float(weight[channel, tap]) * float(sample)
            out[t, channel] = silu(total)
    return out


@TABLES
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_conv_by_hand(ops, taps, length):
    """With a history, and rows whose real samples end early: also rows shorter than the window."""
    x, weight = normal(3, length, 5), normal(5, taps, seed=1)
    window = normal(3, taps - 1, 5, seed=2)
    lengths = torch.tensor([length, max(length - 2, 0), min(1, length)])
    for bias in (normal(5, seed=3), None):
        y, last = ops.causal_conv1d(x, weight, bias, initial_window_bvc=window, lengths_b=lengths)
        assert last.shape == (3, taps - 1, 5)
        for row, n in enumerate(lengths.tolist()):
            expected = conv_by_hand(x[row], weight, bias, window[row])
            assert relative_error(y[row], expected) < FLOAT64_BOUND
            samples = torch.cat([window[row], x[row, :n]])
            assert torch.equal(last[row], samples[len(samples) - (taps - 1) :])
    y, last = ops.causal_conv1d(x, weight, None)
    zeros = torch.zeros(taps - 1, 5, dtype=x.dtype)
    assert relative_error(y[0], conv_by_hand(x[0], weight, None, zeros)) < FLOAT64_BOUND
    assert torch.equal(last[0], torch.cat([zeros, x[0]])[length:])


@TABLES
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_conv_of_packed_documents(ops, taps):
    x, weight, bias = normal(2, 9, 5), normal(5, taps, seed=1), normal(5, seed=3)
    window = normal(2, taps - 1, 5, seed=2)
    seq_idx = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 3], [4, 4, 6, 6, 6, 6, 6, 6, 6]])
    y, last = ops.causal_conv1d(x, weight, bias, initial_window_bvc=window, seq_idx_bl=seq_idx)
    for row in range(2):
        expected = conv_by_hand(x[row], weight, bias, window[row], seq_idx[row])
        assert relative_error(y[row], expected) < FLOAT64_BOUND
        final_document = x[row, seq_idx[row] == seq_idx[row, -1]]
        zeros = torch.zeros(taps - 1, 5, dtype=x.dtype)
        expected = torch.cat([zeros, final_document])[len(final_document) :]
        assert torch.equal(last[row], expected)


@TABLES
def test_conv_is_torchs_conv(ops):
    x, weight, bias = normal(2, 30, 6), normal(6, 4, seed=1), normal(6, seed=2)
    expected = F.silu(F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :30]).mT
    assert relative_error(ops.causal_conv1d(x, weight, bias)[0], expected) < FLOAT64_BOUND


@TABLES
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_conv_steps_equal_the_whole(ops, taps):
    x, weight, bias = normal(2, 9, 5), normal(5, taps, seed=1), normal(5, seed=3)
    window = normal(2, taps - 1, 5, seed=2)
    expected, last = ops.causal_conv1d(x, weight, bias, initial_window_bvc=window)
    moving, address = window.clone(), None
    for t in range(9):
        y = ops.causal_conv1d_step(x[:, t], moving, weight, bias)
        assert relative_error(y, expected[:, t]) < FLOAT64_BOUND
        assert address in (None, moving.data_ptr())
        address = moving.data_ptr()
    assert torch.equal(moving, last)


@TABLES
def test_conv_takes_slices(ops):
    """x as the model passes it, a strided view; NaN beside it must not be read."""
    bigger = torch.full((2, 11, 9), torch.nan, dtype=torch.float64)
    x, weight = normal(2, 9, 5), normal(5, 4, seed=1)
    bigger[:, 1:10, 2:7] = x
    expected, last = ops.causal_conv1d(x, weight)
    found, found_last = ops.causal_conv1d(bigger[:, 1:10, 2:7], weight)
    assert relative_error(found, expected) < FLOAT64_BOUND
    assert torch.equal(found_last, last)
    window = torch.full((2, 5, 5), torch.nan, dtype=torch.float64)[:, 1:4]
    window.zero_()
    step = ops.causal_conv1d_step(bigger[:, 1, 2:7], window, weight)
    assert relative_error(step, expected[:, 0]) < FLOAT64_BOUND


@TABLES
@DTYPES
def test_conv_rounding(ops, dtype):
    x, weight = normal(2, 40, 16, dtype=dtype), normal(16, 4, seed=1, dtype=dtype)
    bias = normal(16, seed=2, dtype=dtype)
    exact, _ = REFERENCE.causal_conv1d(x.double(), weight.double(), bias.double())
    witnessed = witness.causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT
    found, window = ops.causal_conv1d(x, weight, bias)
    assert_no_worse(found, witnessed, exact)
    assert torch.equal(window, x[:, -3:])
    step = ops.causal_conv1d_step(x[:, -1], x[:, -4:-1].clone(), weight, bias)
    assert_no_worse(step, witnessed[:, -1], exact[:, -1])


@TABLES
@DTYPES
def test_swiglu(ops, dtype):
    gate, up = normal(3, 5, 64), normal(3, 5, 64, seed=1)
    found = ops.swiglu(gate, up, 0.4)
    expected = up * (0.4 * gate) / (1 + torch.exp(-0.4 * gate))
    assert relative_error(found, expected) < FLOAT64_BOUND
    gate, up = gate.to(dtype), up.to(dtype)
    exact = ops.swiglu(gate.double(), up.double(), 0.4)
    assert_no_worse(ops.swiglu(gate, up, 0.4), up * F.silu(gate * 0.4), exact)


@TABLES
def test_gradients_in_float64(ops):
    x, z, weight = normal(1, 3, 4), normal(1, 3, 4, seed=1), normal(4, seed=2)
    kernel, window = normal(4, 3, seed=3), normal(1, 2, 4, seed=4)
    q, k = normal(1, 2, 3, 4, seed=5), normal(1, 1, 3, 4, seed=6)
    table = rotary_table(torch.arange(3)[None], 4, 100.0, torch.float64)
    seq_idx = torch.tensor([[0, 0, 1]])
    cases = [
        (lambda x, w: ops.rms_norm(x, w, 1e-3), x, weight),
        (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-3, 2), x, z, weight),
        (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-3, 2, True), x, z, weight),
        (lambda x: ops.rope(x, *table, 0.4), q),
        (lambda x, k, w: ops.causal_conv1d(x, k, initial_window_bvc=w), x, kernel, window),
        (lambda x, k, b: ops.causal_conv1d(x, k, b, seq_idx_bl=seq_idx), x, kernel, weight),
        (lambda q, k, v: ops.attention(q, k, v), q, k, k + 1),
        (lambda q, k, v: ops.attention(q, k, v, seq_idx_bl=seq_idx), q, k, k + 1),
        (lambda x, z: ops.swiglu(x, z, 0.4), x, z),
    ]
    for function, *inputs in cases:
        leaves = [t.clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(function, leaves)

"""The fused SSD scan against the recurrence in float64.

The error may be twice that of an independent form: in float32 the chunked torch one, in 16 bits a
torch form that rounds the operands of its matrix products where the kernel does.
"""

import math

import pytest
import torch
from checks import assert_no_worse, normal, strided
from falcon_h1r_kernels.ssd_fused import CONFIGS, launch_ssd_fused, segment_lengths, tiling

from falcon_h1r.ops import REFERENCE, TORCH

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make_inputs(b, l, h, p, g, n, dtype=FP32, seed=0):
    """x, dt, A, B, C, D: decays of a step between 1e-3 and almost 1, steps of 0 among them."""
    dt = torch.nn.functional.softplus(normal(b, l, h, seed=seed + 1) * 2 - 1)
    dt[:, 3::11] = 0
    A, D = -normal(h, seed=seed + 2).abs() - 0.05, normal(h, seed=seed + 3)
    x = normal(b, l, h, p, seed=seed, dtype=dtype)
    B, C = (normal(b, l, g, n, seed=seed + i, dtype=dtype) for i in (4, 5))
    return x, dt, A, B, C, D


def documents(b, l, seed=0, density=0.15):
    """Numbers that neither start at 0 nor are dense; documents of one token and of many."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, l, generator=generator) < density
    return 5 + 3 * starts.cumsum(1)


def scan(x, dt, A, B, C, D=None, *, segments=1, initial=None, seq_idx=None, config="", **steps):
    return launch_ssd_fused(
        *(x, dt, A, B, C, D, segments, initial, seq_idx, steps.get("bias")),
        *(steps.get("softplus", False), steps.get("limit", (0.0, math.inf)), config),
    )


def exact(x, dt, A, B, C, D=None, *, initial=None, seq_idx=None):
    wide = (None if t is None else t.double() for t in (x, dt, A, B, C, D))
    initial = None if initial is None else initial.double()
    return REFERENCE.ssd_scan(*wide, initial_state_bhpn=initial, seq_idx_bl=seq_idx)


def rounding_scan(x, dt, A, B, C, D=None, *, block, initial=None, seq_idx=None):
    """Blocks of positions in float32, every left or right side of a product rounded to x's dtype.

    Heads are a leading axis and a block's decays one (q, s) matrix, masked by document and order.
    """
    dtype, (b, l, h, p), n = x.dtype, x.shape, B.shape[-1]

    def product(left, right):
        return left.to(dtype).float() @ right.to(dtype).float()

    heads = torch.arange(h) // (h // B.shape[2])
    x_bhlp = x.float().transpose(1, 2)
    B_bhln, C_bhln = (t.float()[:, :, heads].transpose(1, 2) for t in (B, C))
    dt_bhl = dt.float().transpose(1, 2)
    ids = torch.zeros(b, l, dtype=torch.long) if seq_idx is None else seq_idx.long()
    state = torch.zeros(b, h, p, n) if initial is None else initial.float()
    entering = ids[:, 0]
    y = torch.empty(b, h, l, p)
    for cut in torch.arange(l).split(block):
        xs, Bs, Cs, step = x_bhlp[:, :, cut], B_bhln[:, :, cut], C_bhln[:, :, cut], dt_bhl[..., cut]
        sums = (step * A.float()[:, None]).cumsum(-1)
        own = ids[:, cut]
        leaving = own[:, -1]
        allowed = (own[:, :, None] == own[:, None, :]).tril()[:, None]
        decay = torch.where(allowed, sums[..., :, None] - sums[..., None, :], -math.inf).exp()
        mixing = product(Cs, Bs.mT) * decay * step[..., None, :]
        carried = sums.exp() * (own == entering[:, None])[:, None]
        y[:, :, cut] = product(mixing, xs) + carried[..., None] * product(Cs, state.mT)
        if D is not None:
            y[:, :, cut] += D.float()[:, None, None] * xs
        left = (sums[..., -1:] - sums).exp() * step * (own == leaving[:, None])[:, None]
        kept = sums[..., -1].exp() * (leaving == entering)[:, None]
        state = kept[..., None, None] * state + product((xs * left[..., None]).mT, Bs)
        entering = leaving
    return y.transpose(1, 2).to(dtype), state


def check(inputs, *, segments=1, initial=None, seq_idx=None, config=""):
    x = inputs[0]
    options = {"initial": initial, "seq_idx": seq_idx}
    found = scan(*inputs, segments=segments, config=config, **options)
    block = tiling(x.dtype, x.shape[3], config)[1]
    if x.dtype is FP32:
        peer = TORCH.ssd_scan(
            *inputs, chunk_size=block, initial_state_bhpn=initial, seq_idx_bl=seq_idx
        )
    else:
        peer = rounding_scan(*inputs, block=block, **options)
    for one, other, truth in zip(found, peer, exact(*inputs, **options)):
        assert_no_worse(one, other, truth)
    return found


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected):
        assert torch.isfinite(one).all()
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "groups, packed, started, skip",
    [
        (1, True, True, True),
        (2, False, True, True),
        (2, True, False, False),
        (4, False, False, True),
    ],
)
def test_scan(groups, packed, started, skip, dtype, segments):
    """Head and state sizes that are no powers of two; several chunks, and a shorter last one."""
    l, config = (37, "p32q16") if dtype is FP32 else (75, "p64q32")
    inputs = make_inputs(2, l, 4, 20, groups, 24, dtype)
    check(
        inputs if skip else (*inputs[:5], None),
        segments=segments,
        initial=normal(2, 4, 20, 24, seed=9) if started else None,
        seq_idx=documents(2, l) if packed else None,
        config=config,
    )


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("l", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49])
def test_lengths_around_chunks(l, segments):
    inputs, initial = make_inputs(1, l, 1, 16, 1, 24, seed=l), normal(1, 1, 16, 24, seed=9)
    check(inputs, segments=segments, initial=initial, seq_idx=documents(1, l, seed=l))


@pytest.mark.parametrize("dtype, config, block", [(BF16, "p64q32", 32), (FP16, "p64q64", 64)])
@pytest.mark.parametrize("chunks, extra", [(0, 1), (1, -1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_lengths_around_chunks_of_16_bits(chunks, extra, dtype, config, block):
    l = chunks * block + extra
    inputs, initial = make_inputs(1, l, 1, 16, 1, 16, dtype, seed=l), normal(1, 1, 16, 16, seed=9)
    check(inputs, segments=2, initial=initial, seq_idx=documents(1, l, seed=l), config=config)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("segments", [2, 3, 4, 7, 1000])
def test_segments(segments, packed):
    """Ten chunks in segments of equal and unequal length: only rounding may differ."""
    l, initial = 149, normal(1, 2, 16, 16, seed=9)
    inputs = make_inputs(1, l, 2, 16, 2, 16)
    seq_idx = documents(1, l, density=0.02) if packed else None
    cut = check(inputs, segments=segments, initial=initial, seq_idx=seq_idx)
    whole = scan(*inputs, segments=1, initial=initial, seq_idx=seq_idx)
    assert_close(cut, whole, 2e-6)


def test_the_state_passes_through_many_segments():
    """Decays near 1: what the first position left must reach the last of ten segments."""
    x, dt, A, B, C, D = make_inputs(1, 160, 2, 16, 1, 16)
    dt, initial = dt * 1e-3, normal(1, 2, 16, 16, seed=9) * 10
    for segments in (1, 10):
        check((x, dt, A, B, C, D), segments=segments, initial=initial)


def test_segment_lengths():
    assert segment_lengths(1, 64, 1) == (1, 1, 1)
    assert segment_lengths(1, 64, 9) == (1, 1, 1)
    assert segment_lengths(640, 64, 4) == (10, 3, 4)
    assert segment_lengths(641, 64, 4) == (11, 3, 4)
    assert segment_lengths(640, 64, 6) == (10, 2, 5)  # never an empty segment
    for chunks in range(1, 40):
        for asked in range(1, 45):
            total, per_segment, segments = segment_lengths(chunks * 16, 16, asked)
            assert total == chunks and segments <= asked
            assert (segments - 1) * per_segment < chunks <= segments * per_segment


BORDERS = {
    "at every chunk": [16, 32, 48, 64, 80],
    "around chunks": [15, 17, 47, 65],
    "at segments": [32, 64],
    "single tokens": [1, 2, 3, 40, 41, 95],
    "several in one chunk": [33, 37, 38, 46],
    "one in five chunks": [85],
}


@pytest.mark.parametrize("dtype, segments", [(FP32, 1), (FP32, 3), (BF16, 3)])
@pytest.mark.parametrize("where", BORDERS)
def test_documents(where, segments, dtype):
    """Six chunks of 16 (float32) or three of 32 positions; the second row is one document."""
    l, ids = 96, torch.full((2, 96), -7, dtype=torch.int32)
    for border in BORDERS[where]:
        ids[0, border:] += 1 + border
    ids[1] = 4
    inputs, initial = make_inputs(2, l, 2, 16, 2, 16, dtype), normal(2, 2, 16, 16, seed=9)
    config = "p32q16" if dtype is FP32 else "p64q32"
    check(inputs, segments=segments, initial=initial, seq_idx=ids, config=config)


def test_documents_are_separate_sequences():
    """Packed and alone: y of each document, the first one's initial, the last one's final state."""
    inputs, initial = make_inputs(1, 90, 2, 16, 1, 16), normal(1, 2, 16, 16, seed=9)
    x, dt, A, B, C, D = inputs
    ids = torch.tensor([2] * 21 + [3] * 40 + [9] * 29)[None]
    y, final = scan(*inputs, segments=2, initial=initial, seq_idx=ids)
    for cut, start in ((slice(0, 21), initial), (slice(21, 61), None), (slice(61, 90), None)):
        part = x[:, cut], dt[:, cut], A, B[:, cut], C[:, cut], D
        alone_y, alone_final = scan(*part, initial=start)
        assert_close([y[:, cut]], [alone_y], 2e-6)
    assert_close([final], [alone_final], 2e-6)


@pytest.mark.parametrize("dtype, p", [(FP32, 33), (FP32, 64), (BF16, 65), (FP16, 128)])
def test_heads_of_several_tiles(dtype, p):
    l = 20 if dtype is FP32 else 70
    inputs, initial = make_inputs(1, l, 2, p, 1, 16, dtype), normal(1, 2, p, 16, seed=9)
    check(inputs, segments=2, initial=initial)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 200])
def test_state_sizes(n):
    check(make_inputs(1, 40, 2, 24, 2, n), segments=2, initial=normal(1, 2, 24, n, seed=9))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration_at_real_sizes(config):
    """A head of H1R-7B, and two of the 0.5B model that share B and C."""
    dtype = config.dtypes[0]
    for sizes in ((1, 200, 1, 128, 1, 256), (1, 130, 2, 64, 1, 128)):
        inputs = make_inputs(*sizes, dtype)
        initial = normal(sizes[0], sizes[2], sizes[3], sizes[5], seed=9)
        check(inputs, segments=2, initial=initial, config=config.name)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strides(dtype):
    """What the values are decides, not where they lie: results are equal, bit for bit."""
    x, dt, A, B, C, D = make_inputs(2, 40, 2, 24, 2, 16, dtype)
    initial, ids = normal(2, 2, 24, 16, seed=9), documents(2, 40)
    expected = scan(x, dt, A, B, C, D, segments=2, initial=initial, seq_idx=ids)
    makers = strided(x)
    for first in range(len(makers)):  # no two neighbours lie alike
        tensors = (x, dt, A, B, C, D, initial)
        moved = [makers[(first + i) % len(makers)](t) for i, t in enumerate(tensors)]
        turned = ids.T.contiguous().T
        found = scan(*moved[:-1], segments=2, initial=moved[-1], seq_idx=turned)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    # As in the model: cut from one projection, which is longer than the sequence.
    wide = torch.full((2, 47, 2 * 24 + 4 * 16 + 5), torch.nan, dtype=dtype)
    wide[:, :40, : 48 + 64] = torch.cat([t.flatten(2) for t in (x, B, C)], dim=-1)
    xs, Bs, Cs = wide[:, :40, :112].split([48, 32, 32], dim=-1)
    cut = xs.unflatten(-1, (2, 24)), dt, A, Bs.unflatten(-1, (2, 16)), Cs.unflatten(-1, (2, 16))
    found = scan(*cut, D, segments=2, initial=initial, seq_idx=ids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_strides_beyond_32_bits():
    """Offsets of masked positions too: one that wraps could point anywhere."""
    x, dt, A, B, C, D = make_inputs(1, 1, 1, 16, 1, 16)
    far = [t.as_strided(t.shape, (2**40, 2**34, 2**35, 1)) for t in (x, B, C)]
    found = scan(far[0], dt, A, far[1], far[2], D)
    assert all(torch.equal(a, b) for a, b in zip(found, scan(x, dt, A, B, C, D)))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strong_and_weak_decays(dtype):
    """Within a chunk the state is wiped out, then kept: weak decays follow strong ones."""
    x, dt, A, B, C, D = make_inputs(1, 96, 2, 16, 1, 16, dtype)
    dt = torch.full_like(dt, 1e-3)
    dt[:, 20::25] = 300.0
    A = torch.tensor([-1.0, -50.0])
    for segments in (1, 3):
        check((x, dt, A, B, C, D), segments=segments, initial=normal(1, 2, 16, 16, seed=9))


def test_exponentials_above_the_diagonal_do_not_reach_y():
    """There the difference of sums is positive, here beyond what exp can take."""
    x, dt, A, B, C, D = make_inputs(1, 40, 1, 16, 1, 16)
    check((x, dt * 100, A - 5, B, C, D), initial=normal(1, 1, 16, 16, seed=9))


def test_steps_of_zero_hold_the_state():
    x, dt, A, B, C, D = make_inputs(1, 50, 2, 16, 1, 16)
    initial = normal(1, 2, 16, 16, seed=9)
    y, final = scan(x, torch.zeros_like(dt), A, B, C, D, segments=2, initial=initial)
    assert torch.equal(final, initial)


def test_step_sizes_are_prepared_here():
    """Bias, softplus and clamp inside the call, or before it."""
    x, dt, A, B, C, D = make_inputs(2, 40, 2, 16, 1, 16)
    raw, bias = normal(2, 40, 2, seed=7), normal(2, seed=8)
    ready = torch.nn.functional.softplus(raw + bias).clamp(0.1, 1.2)
    inside = scan(x, raw, A, B, C, D, bias=bias, softplus=True, limit=(0.1, 1.2), segments=2)
    assert_close(inside, scan(x, ready, A, B, C, D, segments=2), 1e-5)


def test_refusals():
    inputs = make_inputs(1, 20, 1, 16, 1, 16)
    for changes, words in (
        ({"config": "p64q64"}, "there are: p32q16"),
        ({"segments": 0}, "0 segments"),
    ):
        with pytest.raises(ValueError, match=words):
            scan(*inputs, **changes)
    with pytest.raises(ValueError, match="state size 257"):
        scan(*make_inputs(1, 4, 1, 16, 1, 257))

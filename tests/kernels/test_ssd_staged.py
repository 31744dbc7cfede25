"""The staged SSD scan against the recurrence in float64, by both ways to the states.

The error may be twice that of an independent form: in float32 the chunked torch one, in 16 bits a
torch form that rounds the operands of its matrix products where the kernels do.
"""

import math

import interpret
import pytest
import torch
from checks import assert_no_worse, normal, strided
from falcon_h1r_kernels.ssd_staged import TABLES, launch_ssd_staged, pick_each

from falcon_h1r.ops import REFERENCE, TORCH

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WALK = {BF16: "walk_p64n64", FP16: "walk_p64n64", FP32: "walk_p32n32"}
PARALLEL = {BF16: "p128n128", FP16: "p128n128", FP32: "p32n32"}
WAYS = {"walk": WALK, "parallel": PARALLEL}


def make_inputs(b, l, h, p, g, n, dtype=FP32, seed=0):
    """x, dt, A, B, C, D with every value different and decays between almost 0 and almost 1."""
    dt = torch.nn.functional.softplus(normal(b, l, h, seed=seed + 1) * 2 - 1)
    A, D = -normal(h, seed=seed + 2).abs() - 0.1, normal(h, seed=seed + 3)
    x = normal(b, l, h, p, seed=seed, dtype=dtype)
    B, C = (normal(b, l, g, n, seed=seed + i, dtype=dtype) for i in (4, 5))
    return x, dt, A, B, C, D


def documents(b, l, seed=0):
    """Numbers that neither start at 0 nor are dense: short documents in row 0, long in row 1."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, l, generator=generator) < torch.tensor([[0.2], [0.03]])[:b]
    return 5 + 3 * starts.cumsum(1)


def scan(x, dt, A, B, C, D=None, *, chunk=128, initial=None, seq_idx=None, config=""):
    options = (chunk, initial, seq_idx, None, False, (0.0, math.inf), config)
    return launch_ssd_staged(x, dt, A, B, C, D, *options)


def exact(x, dt, A, B, C, D=None, *, initial=None, seq_idx=None):
    wide = (None if t is None else t.double() for t in (x, dt, A, B, C, D))
    initial = None if initial is None else initial.double()
    return REFERENCE.ssd_scan(*wide, initial_state_bhpn=initial, seq_idx_bl=seq_idx)


def rounding_scan(x, dt, A, B, C, D, *, chunk, initial, seq_idx, keep_contributions):
    """Chunk by chunk in float32; operands of matrix products, and what is stored, in x's dtype.

    keep_contributions: what each chunk adds to the state stays float32, as in the walk.
    """

    def rounded(t):
        return t.to(x.dtype).float()

    b, l, h, p = x.shape
    g, n = B.shape[2:]
    B, C = (t.float().repeat_interleave(h // g, dim=2) for t in (B, C))
    ids = torch.zeros(b, l) if seq_idx is None else seq_idx
    state = torch.zeros(b, h, p, n) if initial is None else initial.float()
    outputs = []
    for start in range(0, l, chunk):
        part = slice(start, min(start + chunk, l))
        idx, before = ids[:, part], ids[:, max(start - 1, 0), None]
        xs, Bs, Cs = (t[:, part].float() for t in (x, B, C))
        sums = (dt[:, part] * A).cumsum(1)
        decay = (sums[:, :, None] - sums[:, None]).clamp(max=0).exp()
        decay = decay * (idx[:, :, None] == idx[:, None]).tril()[..., None]
        from_start = sums.exp() * (idx == before)[..., None]
        to_end = (sums[:, -1:] - sums).exp() * (idx == idx[:, -1:])[..., None]
        weight = torch.einsum("bqhn,bshn->bqsh", Cs, Bs) * decay * dt[:, None, part]
        y = torch.einsum("bqsh,bshp->bqhp", rounded(weight), xs)
        y += torch.einsum("bqhn,bhpn->bqhp", Cs, rounded(state)) * from_start[..., None]
        outputs.append(y if D is None else y + D[:, None] * xs)
        update = rounded(xs * (to_end * dt[:, part])[..., None])
        update = torch.einsum("bshp,bshn->bhpn", update, Bs)
        update = update if keep_contributions else rounded(update)
        state = state * from_start[:, -1, :, None, None] + update
    return torch.cat(outputs, 1).to(x.dtype), state


def check(way, inputs, *, chunk=128, initial=None, seq_idx=None):
    x = inputs[0]
    options = {"initial": initial, "seq_idx": seq_idx}
    found = scan(*inputs, chunk=chunk, config=WAYS[way][x.dtype], **options)
    if x.dtype is FP32:
        peer = TORCH.ssd_scan(*inputs, initial_state_bhpn=initial, seq_idx_bl=seq_idx)
    else:
        peer = rounding_scan(*inputs, chunk=chunk, keep_contributions=way == "walk", **options)
    for one, other, truth in zip(found, peer, exact(*inputs, **options)):
        assert_no_worse(one, other, truth)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    "groups, packed, started, skip",
    [
        (1, True, True, True),
        (2, False, True, True),
        (2, True, False, True),
        (4, False, False, False),
    ],
)
def test_scan(groups, packed, started, skip, dtype, way):
    l = 37
    inputs = make_inputs(2, l, 4, 20, groups, 40, dtype)
    check(
        way,
        inputs if skip else (*inputs[:5], None),
        chunk=16,
        initial=normal(2, 4, 20, 40, seed=9) if started else None,
        seq_idx=documents(2, l) if packed else None,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("l", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49])
def test_lengths_around_chunks(l, dtype, way):
    inputs = make_inputs(2, l, 1, 32, 1, 32, dtype, seed=l)
    initial = normal(2, 1, 32, 32, seed=9)
    check(way, inputs, chunk=16, initial=initial, seq_idx=documents(2, l, seed=l))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunk_sizes(dtype, chunk, way):
    check(way, make_inputs(1, 150, 1, 16, 1, 32, dtype), chunk=chunk)


def test_other_chunk_sizes_are_rounded_up():
    """To a power of two between 16 and 256, as the size of C B^T shows."""
    l = 140
    inputs = make_inputs(1, l, 1, 16, 1, 16)
    for asked, taken in ((1, 16), (17, 32), (100, 128), (1000, 256)):
        with interpret.counted() as launches:
            found = scan(*inputs, chunk=asked)
        stored = {launch.kernel: launch.unique_store_bytes for launch in launches}
        assert stored["_chunk_bmm_kernel"] == 4 * -(-l // taken) * taken**2
        for one, other in zip(found, scan(*inputs, chunk=taken)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "l, heads, dtype",
    [
        (129, 2, BF16),
        pytest.param(127, 1, FP32, marks=pytest.mark.slow),
        pytest.param(257, 2, FP32, marks=pytest.mark.slow),
        pytest.param(257, 2, BF16, marks=pytest.mark.slow),
    ],
)
def test_real_head_sizes(l, heads, dtype, way):
    check(way, make_inputs(1, l, heads, 128, 1, 256, dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p, n", [(32, 64), (64, 128)])
def test_other_head_sizes(p, n, way):
    check(way, make_inputs(1, 70, 2, p, 2, n, BF16), chunk=64, initial=normal(1, 2, p, n, seed=9))


DECAYS = {
    "wide": lambda noise: torch.exp(2 * noise - 2),
    "strong_then_weak": lambda noise: torch.where(
        (torch.arange(noise.shape[1]) % 128 < 100)[:, None], 20.0, 0.005 * noise.exp()
    ),
    "overflowing": lambda noise: 1e4 * noise.abs() + 1.0,
}


def test_the_walk_by_the_number_of_programs():
    """One sequence of H1R-7B, five, six; a single head; float32, which has one walk."""
    for dtype, sizes, names in (
        (BF16, (1, 24, 128, 256), ["walk_p64n64"]),
        (BF16, (5, 24, 128, 256), ["walk_p64n64"]),
        (BF16, (6, 24, 128, 256), ["walk_p128n128"]),
        (BF16, (1, 1, 128, 256), ["p128n128", "block1024"]),
        (FP32, (6, 24, 128, 256), ["walk_p32n32"]),
    ):
        assert [config.name for config in pick_each(dtype, "", sizes)[2]] == names
    assert pick_each(BF16, "walk_p64n64", (6, 24, 128, 256))[2][0].name == "walk_p64n64"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay, dtype, way):
    """Weak ones behind strong ones, where sums cancel, and ones whose inverse overflows."""
    x, _, A, B, C, D = make_inputs(1, 300, 2, 16, 2, 24, dtype)
    dt = DECAYS[decay](normal(1, 300, 2, seed=8))
    if decay == "overflowing":
        x = x / 2**14
    check(way, (x, dt, A, B, C, D), initial=normal(1, 2, 16, 24, seed=9))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "lengths",
    [[16, 16, 8], [1, 7, 1, 8, 3, 20], [40], [1] * 40, [15, 1, 1, 23], [17, 23], [3, 13, 24]],
)
def test_packed_documents_equal_documents_alone(lengths, way):
    inputs = make_inputs(1, 40, 1, 32, 1, 32)
    x, dt, A, B, C, D = inputs
    numbers = torch.arange(len(lengths)) * 2 - 3
    seq_idx = torch.repeat_interleave(numbers, torch.tensor(lengths))[None].to(torch.int32)
    initial = normal(1, 1, 32, 32, seed=9)
    y, state = check(way, inputs, chunk=16, initial=initial, seq_idx=seq_idx)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = (x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        one, last = exact(*alone, initial=initial if start == 0 else None)
        torch.testing.assert_close(y[:, part].double(), one, rtol=1e-5, atol=1e-5)
        start += length
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_two_parts_joined_by_the_state(dtype, way):
    x, dt, A, B, C, D = make_inputs(1, 50, 2, 8, 1, 16, dtype)
    config = WAYS[way][dtype]
    y, state = scan(x, dt, A, B, C, D, chunk=16, config=config)
    for cut in (1, 16, 35):
        first, rest = slice(None, cut), slice(cut, None)
        y1, carried = scan(
            x[:, first], dt[:, first], A, B[:, first], C[:, first], D, chunk=16, config=config
        )
        y2, last = scan(
            *(x[:, rest], dt[:, rest], A, B[:, rest], C[:, rest], D),
            chunk=16,
            initial=carried,
            config=config,
        )
        bound = 1e-5 if dtype is FP32 else 2e-2
        torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=bound, atol=8 * bound)
        torch.testing.assert_close(last, state, rtol=bound, atol=8 * bound)


@pytest.mark.parametrize("way", WAYS)
def test_dt_zero_holds_the_state(way):
    """Right padding: whatever x, B and C hold there, the state is bit for bit the shorter one's."""
    x, dt, A, B, C, D = make_inputs(2, 60, 2, 8, 1, 16)
    dt[0, 37:] = 0
    dt[1, 16:] = 0
    initial = normal(2, 2, 8, 16, seed=9)
    config = WAYS[way][FP32]
    _, held = scan(x, dt, A, B, C, D, chunk=16, initial=initial, config=config)
    for row, length in ((0, 37), (1, 16)):
        part = (slice(row, row + 1), slice(None, length))
        arguments = (x[part], dt[part], A, B[part], C[part], D)
        start = initial[row : row + 1]
        _, state = scan(*arguments, chunk=16, initial=start, config=config)
        assert torch.equal(state[0], held[row])


@pytest.mark.parametrize("way", WAYS)
def test_any_strides(way):
    x, dt, A, B, C, D = make_inputs(2, 20, 4, 8, 2, 16)
    initial, seq_idx = normal(2, 4, 8, 16, seed=9), documents(2, 20)
    config = WAYS[way][FP32]
    arguments = {"chunk": 16, "config": config}
    expected = scan(x, dt, A, B, C, D, initial=initial, seq_idx=seq_idx, **arguments)
    for make in strided(x):
        moved = [make(t) for t in (x, dt, A, B, C, D)]
        arguments["seq_idx"] = seq_idx.T.contiguous().T
        found = scan(*moved, initial=make(initial), **arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_views_of_one_projection():
    """x, B and C as slices of the convolution's output, as in the model; inputs are left alone."""
    b, l, h, p, g, n = 2, 40, 2, 16, 1, 32
    xBC = normal(b, l, h * p + 2 * g * n, dtype=BF16)
    x, B, C = xBC.split([h * p, g * n, g * n], dim=-1)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    _, dt, A, _, _, D = make_inputs(b, l, h, p, g, n)
    initial, seq_idx = normal(b, h, p, n, seed=9, dtype=BF16), documents(b, l)
    held = [xBC, dt, A, D, initial, seq_idx]
    copies = [t.clone() for t in held]
    check("walk", (x, dt, A, B, C, D), chunk=32, initial=initial, seq_idx=seq_idx)
    assert all(torch.equal(a, b) for a, b in zip(held, copies))


def test_step_sizes_are_prepared():
    x, _, A, B, C, D = make_inputs(1, 20, 2, 8, 1, 16)
    raw, bias = normal(1, 20, 2, seed=6), normal(2, seed=7)
    found = launch_ssd_staged(x, raw, A, B, C, D, 16, None, None, bias, True, (0.3, 0.9), "")
    dt = torch.nn.functional.softplus(raw + bias).clamp(0.3, 0.9)
    peer = TORCH.ssd_scan(x, dt, A, B, C, D)
    wide = torch.nn.functional.softplus(raw.double() + bias.double()).clamp(0.3, 0.9)
    for one, other, truth in zip(found, peer, exact(x, wide, A, B, C, D)):
        assert_no_worse(one, other, truth)


@pytest.mark.parametrize(
    "config", [config for table in TABLES[2:] for config in table], ids=lambda c: c.name
)
def test_every_configuration(config):
    """At sizes that fill its blocks, with the last chunk and the last block of n cut."""
    dtype = config.dtypes[0]
    p, n = (40, 40) if dtype is FP32 else (128, 136)
    inputs = make_inputs(1, 200, 1, p, 1, n, dtype)
    found = scan(*inputs, config=config.name)
    if dtype is FP32:
        peer = TORCH.ssd_scan(*inputs)
    else:
        peer = rounding_scan(
            *inputs,
            chunk=128,
            initial=None,
            seq_idx=None,
            keep_contributions=config.name.startswith("walk"),
        )
    for one, other, truth in zip(found, peer, exact(*inputs)):
        assert_no_worse(one, other, truth)


def traffic(way, b, l, h, p, g, n, chunk):
    """{kernel: unique bytes} and {kernel: FLOPs of dots} of a scan in bfloat16."""
    with interpret.counted() as launches:
        scan(*make_inputs(b, l, h, p, g, n, BF16), chunk=chunk, config=WAYS[way][BF16])
    unique = {a.kernel: a.unique_load_bytes + a.unique_store_bytes for a in launches}
    return unique, {a.kernel: a.dot_flops for a in launches}


@pytest.mark.parametrize("way", WAYS)
def test_bytes_and_products_are_the_formulas(way):
    """Each tensor moves once per launch that needs it; no product of blocks above the diagonal."""
    b, l, h, p, g, n, chunk = 1, 256, 2, 64, 1, 128, 128
    unique, flops = traffic(way, b, l, h, p, g, n, chunk)
    x, BC, dt = 2 * b * l * h * p, 2 * b * l * g * n, 4 * b * l * h
    states, final = 2 * b * (l // chunk) * h * p * n, 4 * b * h * p * n
    CB = 4 * b * (l // chunk) * g * chunk * chunk
    lower = CB * 3 // 4  # 64 x 64 blocks on and below the diagonal
    expected = {
        "_chunk_cumsum_kernel": 3 * dt + 4 * h,
        "_chunk_bmm_kernel": 2 * BC + CB,
        "_chunk_scan_kernel": 2 * x + BC + lower + 2 * dt + states + 4 * h,
    }
    ends = 4 * b * h * (l // chunk)
    if way == "walk":
        expected["_state_walk_kernel"] = x + BC + 2 * dt + states + final
    else:
        expected["_chunk_state_kernel"] = x + BC + 2 * dt + states
        expected["_state_passing_kernel"] = 2 * states + ends + final
    assert unique == expected
    block_products = 3 * (l // chunk) * 64 * 64
    assert flops["_chunk_bmm_kernel"] == 2 * g * block_products * n
    assert flops["_chunk_scan_kernel"] == 2 * h * p * (l * n + block_products)
    state_kernel = "_state_walk_kernel" if way == "walk" else "_chunk_state_kernel"
    assert flops[state_kernel] == 2 * h * p * n * l


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_walk_is_taken_where_it_fills_a_machine(dtype):
    """And either way can be asked for."""
    large, small = (1, 24, 128, 256), (1, 2, 64, 128)
    for sizes, names, launches in (
        (large, "", 1),
        (small, "", 2),
        (large, PARALLEL[dtype], 2),
        (large, "block512", 2),
        (small, WALK[dtype], 1),
    ):
        states = pick_each(dtype, names, sizes)[2]
        assert len(states) == launches
        assert all(dtype in config.dtypes for config in states)
        assert not names or names in [config.name for config in states]


def test_no_rows():
    x, dt, A, B, C, D = make_inputs(0, 20, 2, 8, 1, 16)
    y, state = scan(x, dt, A, B, C, D)
    assert y.shape == (0, 20, 2, 8) and state.shape == (0, 2, 8, 16)


def test_refusals():
    x, dt, A, B, C, D = make_inputs(1, 20, 4, 8, 2, 16)
    for call, words in (
        (lambda: scan(x.double(), dt, A, B, C), "float64 is not served"),
        (lambda: scan(x, dt[:, 1:], A, B, C), "dt_blh \\(1, 19, 4\\)"),
        (lambda: scan(x, dt, A[1:], B, C), "A_h"),
        (lambda: scan(x, dt, A, B[..., 1:], C), "C_blgn"),
        (lambda: scan(x, dt, A, B, C, D[1:]), "D_h"),
        (lambda: scan(x[:, :, :3], dt[:, :, :3], A[:3], B, C), "3 heads a multiple of 2"),
        (lambda: scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0]), "length 0"),
        (lambda: scan(x, dt, A, B.half(), C), "B torch.float16"),
        (lambda: scan(x, dt, A, B, C, initial=normal(1, 4, 16, 8)), "initial_state_bhpn"),
        (lambda: scan(x, dt, A, B, C, seq_idx=torch.zeros(1, 19)), "seq_idx_bl"),
        (lambda: scan(x, dt, A, B, C, config="fast"), "'fast'.*there are: heads8"),
        (lambda: scan(x, dt, A, B, C, config="walk_p32n32,block512"), "exclude"),
        (lambda: scan(x, dt, A, B, C, config="walk_p64n64"), "float32; there are"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

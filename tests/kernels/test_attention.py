"""The prefill attention kernel against float64, beside the same maths in torch."""

import interpret
import pytest
import torch
from checks import DTYPES, FACTOR, ON_GPU, assert_no_worse, normal, strided
from falcon_h1r_kernels.attention import CONFIGS, _attention_op, _configuration, attention
from layouts import far_apart

from falcon_h1r.ops import REFERENCE

HALVES = [torch.bfloat16, torch.float16]
NAMES = [(config.name, dtype) for config in CONFIGS for dtype in config.dtypes]


def draw(b, h, j, l, s=None, e=16, dtype=torch.float32):
    s = l if s is None else s
    q = normal(b, h, l, e, dtype=dtype)
    k, v = (normal(b, j, s, e, seed=i, dtype=dtype) for i in (1, 2))
    return q, k, v


def visible(q, k, offset=None, seq_idx=None, start=None, lengths=None):
    """Which key each query sees, (b, 1, l, s), written down option by option."""
    (b, _, l, _), s = q.shape, k.shape[2]
    row, query, key = torch.meshgrid(*map(torch.arange, (b, l, s)), indexing="ij")
    seen = key <= query + (0 if offset is None else offset[row])
    if seq_idx is not None:
        seen &= seq_idx[row, query] == seq_idx[row, key]
    if start is not None:
        seen &= key >= start[row]
    if lengths is not None:
        seen &= key < lengths[row]
    return seen[:, None]


def softmax_attention(q, k, v, seen, dtype):
    """The formula with sums in `dtype`; softmax's values in v's dtype before they meet v."""
    group, result = q.shape[1] // k.shape[1], q.dtype
    any_row = seen.any(1).any(1)[:, None, :, None]
    k, v = (t.where(any_row, 0).repeat_interleave(group, 1) for t in (k, v))
    scores = (q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5).where(seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    weights = weights.where(seen, 0)
    total = weights.sum(-1, keepdim=True)
    if dtype is not torch.float64:
        weights = weights.to(result).to(dtype)
    o = weights @ v.to(dtype) / total.where(total > 0, 1)
    return o if dtype is torch.float64 else o.to(result)


def check(q, k, v, *, config="", factor=FACTOR, **options):
    names = {"offset": "query_offset_b", "seq_idx": "seq_idx_bl", "start": "key_start_b"}
    given = {names.get(name, "key_lengths_b"): value for name, value in options.items()}
    found = attention(q, k, v, **given, config=config)
    seen = visible(q, k, **options)
    exact = softmax_attention(q, k, v, seen, torch.float64)
    assert_no_worse(found, softmax_attention(q, k, v, seen, torch.float32), exact, factor)
    return found, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", [1, 31, 32, 33, 63, 64, 65, 129, 200])
def test_lengths(l, dtype):
    q, k, v = draw(2, 2, 1, l, dtype=dtype)
    _, exact = check(q, k, v)
    torch.testing.assert_close(REFERENCE.attention(q.double(), k.double(), v.double()), exact)


@pytest.mark.parametrize("h, j", [(1, 1), (3, 3), (4, 2), (6, 1), (12, 2), (5, 1)])
def test_groups(h, j):
    for l in (7, 70):
        q, k, v = draw(2, h, j, l)
        _, exact = check(q, k, v)
        torch.testing.assert_close(REFERENCE.attention(q.double(), k.double(), v.double()), exact)


@pytest.mark.parametrize("e", [1, 5, 24, 64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(e, dtype):
    check(*draw(1, 2, 1, 67, e=e, dtype=dtype))


@pytest.mark.parametrize("name, dtype", NAMES)
def test_every_configuration(name, dtype):
    q, k, v = draw(2, 6, 1, 40, 190, dtype=dtype)
    check(q, k, v, offset=torch.tensor([149, 90]), start=torch.tensor([70, 0]), config=name)


@pytest.mark.parametrize("dtype", HALVES)
def test_wide_heads_take_their_configuration(dtype):
    check(*draw(1, 2, 1, 40, e=160, dtype=dtype))


def test_rule():
    def name(b, l, e=128, dtype=torch.bfloat16):
        return _configuration(torch.empty(b, 12, l, e, dtype=dtype, device="meta"), 6, "").name

    assert [name(1, l) for l in (1, 1386, 1387, 4096)] == ["rows64"] * 2 + ["rows128"] * 2
    assert name(66, 20) == "rows128" and name(65, 20) == "rows64"
    assert name(1, 4096, e=160) == "heads256" and name(1, 9, dtype=torch.float32) == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_heads(dtype):
    q, k, v = draw(1, 12, 2, 90, 160, e=128, dtype=dtype)
    check(q, k, v, offset=torch.tensor([70]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", [(0, 0, 0), (1, 31, 100), (63, 64, 65), (40, 127, 0)])
def test_past_of_each_row_and_a_cache_that_is_not_initialised(past, dtype):
    q, k, v = draw(3, 4, 2, 33, 170, dtype=dtype)
    offset = torch.tensor(past)
    for row, keys in enumerate(past):
        k[row, :, keys + 33 :], v[row, :, keys + 33 :] = torch.nan, torch.nan
    check(q, k, v, offset=offset)
    check(q, k[:, :, : max(past) + 33], v[:, :, : max(past) + 33], offset=offset.int())


@pytest.mark.parametrize("lengths", [(0, 1, 40), (31, 32, 33), (63, 64, 65), (99, 100, 500)])
def test_key_lengths(lengths):
    q, k, v = draw(3, 2, 1, 100)
    lengths = torch.tensor(lengths)
    for row, keys in enumerate(lengths):
        k[row, :, keys:], v[row, :, keys:] = torch.nan, torch.nan
    found, _ = check(q, k, v, lengths=lengths)
    assert lengths[0] > 0 or torch.equal(found[0], torch.zeros_like(found[0]))
    q, k, v = draw(3, 2, 1, 9, 60)
    check(q, k, v, lengths=torch.tensor([60, 3, 55]), offset=torch.tensor([51, 50, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(0, 1, 99), (31, 32, 33), (63, 64, 65), (5, 100, 7)])
def test_left_padding(start, dtype):
    q, k, v = draw(3, 2, 1, 100, dtype=dtype)
    start = torch.tensor(start)
    for row, keys in enumerate(start):
        k[row, :, :keys], v[row, :, :keys] = torch.nan, torch.nan
        q[row, :, :keys] = torch.nan
    found = attention(q, k, v, key_start_b=start)
    q = q.nan_to_num(nan=1.0)
    found, _ = check(q, k, v, start=start)
    for row, keys in enumerate(start):
        assert torch.equal(found[row, :, :keys], torch.zeros_like(found[row, :, :keys]))


def test_left_padding_with_past_and_lengths():
    q, k, v = draw(2, 6, 2, 50, 200)
    start, lengths = torch.tensor([70, 140]), torch.tensor([180, 131])
    for row in range(2):
        outside = torch.ones(200, dtype=torch.bool)
        outside[start[row] : lengths[row]] = False
        k[row, :, outside], v[row, :, outside] = torch.nan, torch.nan
    found, _ = check(q, k, v, offset=torch.tensor([150, 20]), start=start, lengths=lengths)
    assert not found[1].any()


DOCUMENTS = [[100], [1] * 100, [32, 32, 36], [31, 2, 30, 37], [99, 1], [1, 99], [64, 1, 35]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_documents(lengths, dtype):
    q, k, v = draw(2, 3, 1, 100, dtype=dtype)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seq_idx = torch.stack([document * 3 + 5, torch.zeros_like(document)])
    _, exact = check(q, k, v, seq_idx=seq_idx)
    reference = REFERENCE.attention(q.double(), k.double(), v.double(), seq_idx_bl=seq_idx)
    torch.testing.assert_close(reference, exact)
    start = torch.tensor([40, 3])
    k[0, :, :40], v[0, :, :40] = torch.nan, torch.nan
    check(q, k, v, seq_idx=seq_idx.int(), start=start)


def test_tokens_do_not_see_the_future():
    q, k, v = draw(1, 6, 1, 150)
    before = attention(q, k, v)
    k[:, :, 97], v[:, :, 97] = 9.0, -9.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :, :97], after[:, :, :97])
    assert (before[:, :, 97:] != after[:, :, 97:]).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(dtype):
    """The rounding of such scores, in their exponentials, is a GPU's tensor cores' own."""
    q, k, v = draw(1, 2, 1, 70, dtype=dtype)
    for sign in (1, -1):
        large = (q.abs() + 1) * 100, (k.abs() + 1) * 100 * sign
        check(large[0].to(dtype), large[1].to(dtype), v, factor=2 * FACTOR if ON_GPU else FACTOR)


def test_scores_rise_and_fall_over_blocks():
    """The running maximum changes in every block, or in none after the first."""
    q, k, v = draw(1, 1, 1, 140)
    for ramp in (torch.linspace(0, 10, 140), torch.linspace(10, 0, 140)):
        check(torch.ones_like(q), k + ramp[:, None], v)


def test_strided_and_offset_inputs():
    q, k, v = draw(2, 4, 2, 60, 70)
    options = {
        "query_offset_b": torch.tensor([10, 4]),
        "key_lengths_b": torch.tensor([70, 41]),
        "key_start_b": torch.tensor([3, 0]),
    }
    expected = attention(q, k, v, **options)
    for make in strided(q):
        assert torch.equal(attention(make(q), make(k), make(v), **options), expected)
        assert torch.equal(attention(q, make(k), v, **options), expected)
    wide = {name: torch.stack([t, t + 1], 1)[:, 0] for name, t in options.items()}
    model = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention(*model, **wide), expected)


def test_result_lies_as_the_next_projection_reads_it():
    assert attention(*draw(2, 4, 2, 5)).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype, l", [(torch.float32, 40), (torch.float16, 70)])
def test_offsets_beyond_32_bits(dtype, l):
    q, k, v = draw(3, 2, 1, 9, dtype=dtype)
    expected = attention(q, k, v)
    assert torch.equal(attention(*map(far_apart, (q, k, v))), expected)
    # Between the keys of a block, and at the beginning of the second block.
    for length, stride in ((3, 2**30), (l, 2**26)):
        q, k, v = draw(1, 2, 1, length, dtype=dtype)
        expected = attention(q, k, v)
        along = [far_apart(t.permute(2, 0, 1, 3), stride).permute(1, 2, 0, 3) for t in (q, k, v)]
        assert torch.equal(attention(*along), expected)


def loads(*args, **options):
    with interpret.counted() as launches:
        attention(*args, **options)
    return launches[0]


def test_blocks_that_no_query_sees_are_skipped():
    q, k, v = draw(1, 1, 1, 512)
    tiles = 512 // 32
    causal = tiles * (tiles + 1) // 2
    for options, blocks in (
        ({}, causal),
        ({"seq_idx_bl": torch.arange(512)[None] // 64}, 3 * tiles // 2),
        ({"key_start_b": torch.tensor([480])}, 1),
        ({"key_lengths_b": torch.tensor([64])}, 2 * tiles - 1),
        ({"query_offset_b": torch.tensor([0])}, causal),
    ):
        launch = loads(q, k, v, **options)
        assert launch.dot_flops == blocks * 2 * (2 * 32 * 32 * 16)
        numbers = launch.issued_load_bytes - q.nbytes - blocks * 2 * (32 * 16 * 4)
        assert 0 <= numbers <= tiles * 34 * 8
        assert launch.issued_store_bytes == launch.unique_store_bytes == q.nbytes


def test_heads_of_a_group_share_what_is_read():
    q, k, v = draw(1, 6, 1, 64)
    assert loads(q, k, v).issued_load_bytes < 6 * loads(q[:, :1], k, v).issued_load_bytes
    one, six = loads(q[:, :1, :10], k[:, :, :10], v[:, :, :10]), loads(*draw(1, 6, 1, 5))
    assert six.programs == one.programs == 1


def test_operator_registration():
    q, k, v = draw(2, 2, 1, 5)
    numbers = torch.tensor([0, 2])
    torch.library.opcheck(_attention_op, (q, k, v, None, None, None, None, ""))
    documents = torch.tensor([[0, 0, 1, 1, 2]] * 2)
    torch.library.opcheck(_attention_op, (q, k, v, None, documents, numbers, numbers + 1, ""))
    torch.library.opcheck(_attention_op, (q[:, :, :3], k, v, numbers, None, None, None, ""))


def test_no_queries():
    q, k, v = draw(2, 2, 1, 0, 5)
    assert attention(q, k, v, query_offset_b=torch.tensor([5, 5])).shape == (2, 2, 0, 16)


def test_refusals():
    q, k, v = draw(2, 4, 2, 5)
    two = torch.tensor([0, 0])
    documents = torch.zeros(2, 5, dtype=torch.int64)
    for call, words in (
        (lambda: attention(q.double(), k.double(), v.double()), "float64"),
        (lambda: attention(q[0], k, v), "expected \\(b, h, l, e\\)"),
        (lambda: attention(q, k, v[:, :1]), "expected one shape"),
        (lambda: attention(q, k[..., :8], v[..., :8]), "head size must agree"),
        (lambda: attention(q[:1], k, v), "batch and head"),
        (lambda: attention(q[:, :3], k, v), "divide the query heads"),
        (lambda: attention(q, k.half(), v), "expected one dtype"),
        (lambda: attention(*draw(1, 1, 1, 2, e=257)), "head size 257"),
        (lambda: attention(*draw(1, 1, 1, 2, e=129)), "up to 128, not 129"),
        (lambda: attention(q[:, :, :3], k, v), "5 keys for 3 queries"),
        (lambda: attention(q, k, v, query_offset_b=two[:1]), "query_offset_b is \\(1,\\)"),
        (
            lambda: attention(q, k, v, key_start_b=two.float()),
            "key_start_b is \\(2,\\) torch.float32",
        ),
        (lambda: attention(q, k, v, key_lengths_b=two[:, None]), "key_lengths_b"),
        (lambda: attention(q, k, v, seq_idx_bl=documents[:, :4]), "seq_idx_bl"),
        (lambda: attention(q, k, v, seq_idx_bl=documents, query_offset_b=two), "exclude"),
        (lambda: attention(q, k, v, config="rows128"), "there are: float32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

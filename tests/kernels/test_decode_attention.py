"""The decode attention kernels against float64, beside the same maths in torch."""

import importlib

import interpret
import pytest
import torch
from checks import DTYPES, FACTOR, ON_GPU, assert_no_worse, normal, strided
from falcon_h1r_kernels.decode_attention import (
    CONFIGS,
    MAX_PARTS,
    PROGRAMS,
    _decode_attention_op,
    decode_attention,
    parts_of,
)
from layouts import far_apart

from falcon_h1r.ops import REFERENCE

HALVES = [torch.bfloat16, torch.float16]
NAMES = [(config.name, dtype) for config in CONFIGS for dtype in config.dtypes]


def draw(b, h, j, s, e=16, dtype=torch.float32):
    q = normal(b, h, e, dtype=dtype)
    k, v = (normal(b, j, s, e, seed=i, dtype=dtype) for i in (1, 2))
    return q, k, v


def independent(q, k, v, lengths):
    """Row by row in float32, with softmax's values in v's dtype before they meet v."""
    rows = []
    for row, keys in enumerate([k.shape[2]] * len(q) if lengths is None else lengths):
        group = q.shape[1] // k.shape[1]
        kr, vr = (t[row, :, :keys].float().repeat_interleave(group, 0) for t in (k, v))
        score = torch.einsum("he,hse->hs", q[row].float(), kr) * q.shape[-1] ** -0.5
        p = (score - score.amax(1, keepdim=True)).exp()
        o = torch.einsum("hs,hse->he", p.to(q.dtype).float(), vr) / p.sum(1, keepdim=True)
        rows.append(o.to(q.dtype))
    return torch.stack(rows)


def check(q, k, v, lengths=None, config="", factor=FACTOR):
    found = decode_attention(q, k, v, lengths, config=config)
    k, v = k.clone(), v.clone()
    for row, keys in enumerate([] if lengths is None else lengths):
        k[row, :, keys:], v[row, :, keys:] = 0, 0
    exact = REFERENCE.decode_attention(q.double(), k.double(), v.double(), lengths)
    assert_no_worse(found, independent(q, k, v, lengths), exact, factor)


def spoil(k, v, lengths):
    """NaN behind each row's keys, as in a cache that was never written there."""
    for row, keys in enumerate(lengths):
        k[row, :, keys:], v[row, :, keys:] = torch.nan, torch.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 1100])
def test_lengths(s, dtype):
    check(*draw(2, 4, 2, s, dtype=dtype))


@pytest.mark.parametrize("h, j", [(1, 1), (3, 3), (6, 1), (12, 2), (5, 1), (16, 1), (20, 1)])
def test_groups(h, j):
    for s in (40, 300):
        check(*draw(2, h, j, s))


@pytest.mark.parametrize("e", [1, 5, 24, 64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(e, dtype):
    for s in (70, 600):
        check(*draw(1, 2, 1, s, e=e, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_wide_heads_take_their_configuration(dtype):
    check(*draw(1, 2, 1, 600, e=160, dtype=dtype))


@pytest.mark.parametrize("name, dtype", NAMES)
def test_every_configuration(name, dtype):
    q, k, v = draw(2, 6, 1, 1200, dtype=dtype)
    lengths = torch.tensor([1200, 321])
    spoil(k, v, lengths)
    check(q, k, v, lengths, config=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [(1, 2, 3, 4), (31, 32, 33, 64), (65, 129, 255, 256), (1, 257, 700, 900)]
)
def test_ragged_rows_of_a_cache_that_is_not_initialised(lengths, dtype):
    q, k, v = draw(4, 4, 2, 901, dtype=dtype)
    lengths = torch.tensor(lengths)
    spoil(k, v, lengths)
    check(q, k, v, lengths)
    s = int(lengths.max())
    check(q, k[:, :, :s], v[:, :, :s], lengths.int())


def test_rows_without_keys_and_lengths_beyond_the_keys():
    for s in (40, 700):
        q, k, v = draw(3, 2, 1, s)
        spoil(k, v, [0, s, 9])
        found = decode_attention(q, k, v, torch.tensor([0, s + 5, 9]))
        assert not found[0].any()
        expected = decode_attention(q[1:], k[1:], v[1:], torch.tensor([s, 9]))
        assert torch.equal(found[1:], expected)
    assert not decode_attention(*draw(1, 2, 1, 0)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_heads(dtype):
    q, k, v = draw(2, 12, 2, 600, e=128, dtype=dtype)
    lengths = torch.tensor([600, 77])
    spoil(k, v, lengths)
    check(q, k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(dtype):
    """The rounding of such scores, in their exponentials, is a GPU's tensor cores' own."""
    q, k, v = draw(1, 2, 1, 600, dtype=dtype)
    for sign in (1, -1):
        factor = 2 * FACTOR if ON_GPU else FACTOR
        check((q.abs() + 1) * 100, (k.abs() + 1) * 100 * sign, v, factor=factor)


def test_parts_of_very_different_weight():
    """The largest score in the first part, in the last, or rising through all of them."""
    q, k, v = draw(1, 2, 1, 700)
    q = torch.ones_like(q)
    for ramp in (torch.linspace(0, 10, 700), torch.linspace(10, 0, 700)):
        check(q, k + ramp[:, None], v)
    k[:, :, 3] += 12
    check(q, k, v)


def test_strided_and_offset_inputs():
    q, k, v = draw(2, 4, 2, 600)
    lengths = torch.tensor([600, 41])
    expected = decode_attention(q, k, v, lengths)
    for make in strided(q):
        assert torch.equal(decode_attention(make(q), make(k), make(v), lengths), expected)
        assert torch.equal(decode_attention(q, make(k), v, lengths), expected)
    wide = torch.stack([lengths, lengths + 1], 1)[:, 0]
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    assert torch.equal(decode_attention(q, *apart, wide), expected)


@pytest.mark.parametrize("dtype, s", [(torch.float32, 40), (torch.float16, 70)])
def test_offsets_beyond_32_bits(dtype, s):
    q, k, v = draw(3, 2, 1, 9, dtype=dtype)
    expected = decode_attention(q, k, v)
    assert torch.equal(decode_attention(*map(far_apart, (q, k, v))), expected)
    # Between the keys of a block, and at the beginning of the second block.
    for length, stride in ((3, 2**30), (s, 2**26)):
        q, k, v = draw(1, 2, 1, length, dtype=dtype)
        expected = decode_attention(q, k, v)
        along = [far_apart(t.permute(2, 0, 1, 3), stride).permute(1, 2, 0, 3) for t in (k, v)]
        assert torch.equal(decode_attention(q, *along), expected)


def test_merging_a_few_channels_at_a_time(monkeypatch):
    q, k, v = draw(1, 2, 1, 600, e=40)
    expected = decode_attention(q, k, v)
    # As for 256 parts, of which one program holds 32 channels.
    monkeypatch.setattr(importlib.import_module(decode_attention.__module__), "MERGE_TILE", 64)
    torch.testing.assert_close(decode_attention(q, k, v), expected)


def test_how_many_parts():
    assert parts_of(128, 4096, 64, 132) == -(-PROGRAMS * 132 // 128)
    assert parts_of(2, 4096, 64, 132) == 16  # four blocks of 64 keys each
    assert parts_of(2, 262144, 64, 132) == MAX_PARTS
    assert parts_of(2, 262144, 64, 24) == 48
    assert parts_of(1024, 262144, 64, 132) == 1
    assert parts_of(2, 300, 64, 132) == 1
    assert parts_of(2, 0, 64, 132) == 1


def launches(*args):
    with interpret.counted() as found:
        decode_attention(*args)
    return found


def test_each_key_is_read_once():
    q, k, v = draw(2, 6, 1, 640)
    first, second = launches(q, k, v)
    parts = 640 // (4 * 32)
    assert first.programs == 2 * parts and second.programs == 12
    keys = 2 * k.nbytes
    assert first.issued_load_bytes == keys + parts * q.nbytes
    assert first.issued_store_bytes == first.unique_store_bytes == parts * (q.nbytes + 2 * 12 * 4)
    assert second.issued_load_bytes == first.issued_store_bytes
    assert second.issued_store_bytes == q.nbytes
    ragged = torch.tensor([640, 64])
    first, _ = launches(q, k, v, ragged)
    assert first.issued_load_bytes == keys * 704 // 1280 + parts * (q.nbytes + 2 * 8)
    # Two parts of the short row have keys; the others leave only their peaks and sums.
    assert first.issued_store_bytes == (5 + 2) * q.nbytes // 2 + parts * 2 * 12 * 4
    assert len(launches(q, k[:, :, :255], v[:, :, :255])) == 1


def test_rows_share_their_own_keys_evenly():
    """A short row's keys go to as many parts as they have blocks, not to the first part alone."""
    q, k, v = draw(1, 1, 1, 1280)
    length = torch.tensor([320])
    with interpret.counted() as found:
        decode_attention(q, k, v, length)
    parts = 1280 // (4 * 32)
    assert found[0].issued_store_bytes == parts * (16 * 4 + 8)


def test_operator_registration():
    q, k, v = draw(2, 2, 1, 300)
    torch.library.opcheck(_decode_attention_op, (q, k, v, None, ""))
    torch.library.opcheck(_decode_attention_op, (q, k, v, torch.tensor([3, 300]), ""))


def test_refusals():
    q, k, v = draw(2, 4, 2, 5)
    for call, words in (
        (lambda: decode_attention(q.double(), k.double(), v.double()), "float64"),
        (lambda: decode_attention(q[:, :, None], k, v), "expected \\(b, h, e\\)"),
        (lambda: decode_attention(q, k, v[:, :1]), "expected one shape"),
        (lambda: decode_attention(q[:, :3], k, v), "divide the query heads"),
        (lambda: decode_attention(q, k.half(), v), "expected one dtype"),
        (lambda: decode_attention(q, k, v, torch.tensor([1.0, 2.0])), "lengths_b is"),
        (lambda: decode_attention(q, k, v, torch.tensor([1])), "lengths_b is \\(1,\\)"),
        (lambda: decode_attention(*draw(1, 1, 1, 2, e=129)), "up to 128, not 129"),
        (lambda: decode_attention(q, k, v, config="keys64"), "there are: float32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

"""Step sizes, their cumulative sums and C B^T within chunks, against float64."""

import itertools
import math

import pytest
import torch
from checks import assert_no_worse, normal, strided
from falcon_h1r_kernels.ssd_prepare import BMM_CONFIGS, CUMSUM_CONFIGS, chunk_bmm, chunk_cumsum


def torch_cumsum(dt, A, chunk, *, wide, work, bias=None, softplus=False, limit=(0.0, math.inf)):
    """dt_bhcq and sum_bhcq in torch: dt in `work`, sums one after another in `wide`.

    (torch.cumsum would add float32 in float64 and round at the end.)
    """
    dt = dt.to(work)
    if bias is not None:
        dt = dt + bias.to(work)
    if softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(*limit)
    b, l, h = dt.shape
    chunks = -(-l // chunk)
    padded = torch.zeros(b, chunks * chunk, h, dtype=work)
    padded[:, :l] = dt
    dt = padded.view(b, chunks, chunk, h).permute(0, 3, 1, 2)
    log_decay = dt.to(wide) * A.to(work).to(wide)[:, None, None]
    return dt, torch.stack(list(itertools.accumulate(log_decay.unbind(-1))), dim=-1)


def torch_bmm(C, B, chunk, seq_idx, work):
    b, l, g, n = C.shape
    chunks = -(-l // chunk)
    size = chunks * chunk
    full = torch.zeros(b, size, g, n, dtype=work), torch.zeros(b, size, g, n, dtype=work)
    full[0][:, :l], full[1][:, :l] = C.to(work), B.to(work)
    C, B = (t.view(b, chunks, chunk, g, n).transpose(2, 3) for t in full)
    CB = (C @ B.mT).tril()
    if seq_idx is not None:
        ids = torch.full((b, size), -1)
        ids[:, :l] = seq_idx
        ids = ids.view(b, chunks, chunk)
        CB = CB * (ids[..., :, None] == ids[..., None, :])[:, :, None]
    return CB


def documents(b, l, seed=0):
    """Numbers that never decrease, with documents of one token and starts that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, l, generator=generator) < 0.1
    return (7 + 3 * starts.cumsum(1)).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("extra", [-1, 0, 1, 37])
def test_cumsum(chunk, extra, dtype):
    l = 2 * chunk + extra
    dt, A = normal(2, l, 5).abs(), -normal(5, seed=1).abs()
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    found_dt, found_sum = chunk_cumsum(dt, A, chunk, dtype=dtype)
    exact_dt, exact_sum = torch_cumsum(dt, A, chunk, wide=torch.float64, work=torch.float64)
    torchs_dt, torchs_sum = torch_cumsum(dt, A, chunk, wide=wide, work=torch.float32)
    assert torch.equal(found_dt, torchs_dt)
    assert found_sum.dtype == wide
    if wide is torch.float64:
        assert float((found_sum - exact_sum).abs().max()) < 1e-13 * float(exact_sum.abs().max())
    else:
        assert_no_worse(found_sum, torchs_sum, exact_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.7)])
def test_step_sizes(limit, with_bias, softplus, dtype):
    raw = (normal(2, 50, 3) * 4).to(dtype)
    raw = raw if softplus else raw.abs()
    A, bias = -normal(3, seed=1).abs(), normal(3, seed=2).abs() if with_bias else None
    options = {"bias": bias, "softplus": softplus, "limit": limit}
    found, found_sum = chunk_cumsum(
        raw, A, 32, dtype=dtype, dt_bias_h=bias, dt_softplus=softplus, dt_limit=limit
    )
    exact, exact_sum = torch_cumsum(raw, A, 32, wide=torch.float64, work=torch.float64, **options)
    torchs, torchs_sum = torch_cumsum(
        raw, A, 32, wide=found_sum.dtype, work=torch.float32, **options
    )
    assert (found[..., -1, 18:] == 0).all()  # padding, also where softplus of nothing is 0.7
    assert_no_worse(found, torchs, exact)
    assert_no_worse(found_sum.float(), torchs_sum.float(), exact_sum)
    assert found_sum.dtype == (torch.float64 if dtype is torch.float32 else torch.float32)


def test_softplus_keeps_its_digits_at_both_ends():
    """Relative to each value, not to the largest: small steps are the ones that models learn."""
    raw = torch.linspace(-80, 80, 4096).view(1, -1, 1)
    found, _ = chunk_cumsum(raw, -torch.ones(1), 128, dtype=torch.float32, dt_softplus=True)
    exact = torch.nn.functional.softplus(raw.double(), threshold=200.0)
    error = (found.flatten().double() - exact.flatten()).abs() / exact.flatten()
    assert float(error.max()) < 1e-5
    assert float(error[2048 - 256 : 2048 + 256].max()) < 1e-6  # between -10 and 10
    assert torch.equal(found.flatten()[raw.flatten() > 20], raw[raw > 20])


def test_NaN_is_not_clamped_away():
    dt = torch.ones(1, 20, 2)
    dt[0, 3, 1] = torch.nan
    for softplus in (False, True):
        found, sums = chunk_cumsum(
            dt, -torch.ones(2), 16, dtype=torch.float32, dt_softplus=softplus, dt_limit=(0.1, 3.0)
        )
        assert found[0, 1, 0, 3].isnan() and found.isnan().sum() == 1
        assert sums[0, 1, 0, 3:].isnan().all() and sums.isnan().sum() == 13


@pytest.mark.parametrize("config", [config.name for config in CUMSUM_CONFIGS])
def test_every_cumsum_configuration_with_strides(config):
    dt, A, bias = normal(2, 70, 9), -normal(9, seed=1).abs(), normal(9, seed=2)
    options = {"dtype": torch.float32, "dt_softplus": True, "config": config}
    expected = chunk_cumsum(dt, A, 64, dt_bias_h=bias, **options)
    for make in strided(dt):
        found = chunk_cumsum(make(dt), make(A), 64, dt_bias_h=make(bias), **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk, groups", [(16, 4), (32, 2), (64, 1), (128, 1)])
def test_bmm(chunk, groups, packed, dtype):
    l, n = chunk + 5, 40
    C, B = normal(2, l, groups, n, dtype=dtype), normal(2, l, groups, n, seed=1, dtype=dtype)
    seq_idx = documents(2, l) if packed else None
    found = chunk_bmm(C, B, chunk, seq_idx)
    exact = torch_bmm(C, B, chunk, seq_idx, torch.float64)
    assert_no_worse(found, torch_bmm(C, B, chunk, seq_idx, torch.float32), exact)
    assert (found[exact == 0] == 0).all()


@pytest.mark.parametrize("l", [1, 127, 128, 129])
@pytest.mark.parametrize("config", [config.name for config in BMM_CONFIGS])
def test_every_bmm_configuration_at_real_size(config, l):
    """Four rows: the error of one product, which a row of one token is, is a matter of luck."""
    dtype = next(c for c in BMM_CONFIGS if c.name == config).dtypes[0]
    C, B = normal(4, l, 1, 256, dtype=dtype), normal(4, l, 1, 256, seed=1, dtype=dtype)
    found = chunk_bmm(C, B, 128, config=config)
    exact = torch_bmm(C, B, 128, None, torch.float64)
    assert_no_worse(found, torch_bmm(C, B, 128, None, torch.float32), exact)


def test_bmm_takes_any_strides():
    C, B, seq_idx = normal(2, 40, 2, 24), normal(2, 40, 2, 24, seed=1), documents(2, 40)
    expected = chunk_bmm(C, B, 32, seq_idx)
    for make in strided(C):
        found = chunk_bmm(make(C), make(B), 32, seq_idx.T.contiguous().T)
        assert torch.equal(found, expected)


def test_refusals():
    dt, A, C = normal(1, 8, 4), normal(4), normal(1, 8, 2, 8)
    for call, words in (
        (lambda: chunk_cumsum(dt, A, 24, dtype=torch.float32), "chunk 24"),
        (lambda: chunk_cumsum(dt, A, 512, dtype=torch.float32), "chunk 512"),
        (lambda: chunk_cumsum(dt, A[1:], 16, dtype=torch.float32), "A_h \\(3,\\)"),
        (lambda: chunk_cumsum(dt, A, 16, dtype=torch.float32, dt_bias_h=A[1:]), "dt_bias_h"),
        (lambda: chunk_cumsum(dt.double(), A, 16, dtype=torch.float32), "float64"),
        (lambda: chunk_bmm(C, C[:, 1:], 16), "B_blgn"),
        (lambda: chunk_bmm(C, C.half(), 16), "float16"),
        (lambda: chunk_bmm(C, C, 8), "chunk 8"),
        (lambda: chunk_bmm(C, C, 16, torch.zeros(1, 9)), "seq_idx_bl"),
        (lambda: chunk_bmm(C, C, 16, config="fast"), "there are: q32s32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

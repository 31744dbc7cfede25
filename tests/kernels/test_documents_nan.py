"""What is not finite in one packed document reaches no other through a kernel."""

import pytest
import torch
from falcon_h1r_kernels.attention import attention
from falcon_h1r_kernels.conv1d import causal_conv1d
from falcon_h1r_kernels.ssd_scan import ssd_scan
from models import relative_error

b, l, h, p, g, n = 2, 70, 2, 16, 2, 16
STARTS = torch.tensor([0, 17, 32, 50, 64])  # two of them begin a chunk
NAN, INF = torch.nan, torch.inf
SEQ_IDX = (torch.arange(l)[:, None] >= STARTS).sum(1).expand(b, l)


def parts():
    torch.manual_seed(0)
    made = {"x": torch.randn(b, l, h, p), "dt": torch.rand(b, l, h), "A": -torch.rand(h)}
    made |= {"B": torch.randn(b, l, g, n), "C": torch.randn(b, l, g, n), "D": torch.randn(h)}
    return made, torch.randn(b, h, p, n)


@pytest.mark.parametrize(
    "which, document, bad",
    [("x", 1, INF), ("dt", 2, NAN), ("B", 3, INF), ("C", 5, NAN), ("x", 5, NAN), ("dt", 3, INF)],
)
@pytest.mark.parametrize("form", ["staged", "fused"])
def test_the_scan(form, document, which, bad):
    made, state = parts()
    options = {"initial_state_bhpn": state, "seq_idx_bl": SEQ_IDX, "form": form, "chunk_size": 32}
    expected, end = ssd_scan(*made.values(), **options)
    place = int(STARTS[document - 1]) + 4
    made[which][0, place] = bad
    found, new_end = ssd_scan(*made.values(), **options)
    kept = document != SEQ_IDX
    kept[:, :place] = kept[1] = True
    assert torch.equal(found[kept], expected[kept])
    assert not found[0, place].isfinite().any()
    assert torch.equal(new_end[1], end[1])
    if document < 5:
        assert torch.equal(new_end, end)


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_a_state_that_overflows(form):
    """In float16 the products of the state are infinite long before its inputs are."""
    made, state = parts()
    made = {name: t.half() for name, t in made.items()}
    expected, end = ssd_scan(*made.values(), seq_idx_bl=SEQ_IDX, form=form, chunk_size=32)
    assert expected.isfinite().all()
    made["x"][0, 20:30] = 6e4
    made["dt"][0, 20:30] = 60
    found, new_end = ssd_scan(*made.values(), seq_idx_bl=SEQ_IDX, form=form, chunk_size=32)
    assert not found[0, 20:32].isfinite().all()
    kept = SEQ_IDX != 2
    assert relative_error(found[kept], expected[kept]) < 1e-3  # sums of dt A
    assert torch.equal(new_end, end)


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_an_initial_state_belongs_to_the_first_document(form):
    made, state = parts()
    options = {"seq_idx_bl": SEQ_IDX, "form": form, "chunk_size": 32}
    expected, end = ssd_scan(*made.values(), initial_state_bhpn=state, **options)
    state[0, 1, 2, 3] = torch.nan
    found, new_end = ssd_scan(*made.values(), initial_state_bhpn=state, **options)
    kept = SEQ_IDX != 1
    assert torch.equal(found[kept], expected[kept]) and torch.equal(new_end, end)
    assert not found[0, :17].isfinite().any() and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_steps_that_softplus_and_the_limit_make_finite_are_used(form):
    made, _ = parts()
    made["dt"][0, 5], made["dt"][0, 40] = torch.inf, -torch.inf
    options = {"dt_softplus": True, "dt_limit": (0.0, 2.0), "form": form}
    found, _ = ssd_scan(*made.values(), seq_idx_bl=SEQ_IDX, **options)
    made["dt"][0, 5], made["dt"][0, 40] = 1e4, -1e4
    expected, _ = ssd_scan(*made.values(), seq_idx_bl=SEQ_IDX, **options)
    assert found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize(
    "which, document, bad", [(0, 1, INF), (1, 3, NAN), (2, 5, INF), (2, 1, NAN), (1, 2, INF)]
)
def test_attention(document, which, bad):
    torch.manual_seed(0)
    qkv = [torch.randn(b, heads, l, 16) for heads in (4, 2, 2)]
    start = torch.tensor([3, 0])  # what lies in the padding is not looked at
    for tensor in qkv[1:]:
        tensor[0, :, :3] = torch.nan
    options = {"seq_idx_bl": SEQ_IDX, "key_start_b": start}
    expected = attention(*qkv, **options)
    assert expected.isfinite().all()
    place = int(STARTS[document - 1]) + 4
    qkv[which][0, :, place] = bad
    found = attention(*qkv, **options)
    kept = document != SEQ_IDX
    kept[:, :place] = kept[1] = True
    assert torch.equal(found.transpose(1, 2)[kept], expected.transpose(1, 2)[kept])
    assert not found[0, :, place].isfinite().any()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_convolution(bad):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(b, l, 24), torch.randn(24, 4), torch.randn(24)
    expected, window = causal_conv1d(x, weight, bias, seq_idx_bl=SEQ_IDX)
    x[0, 62:64] = bad
    found, new_window = causal_conv1d(x, weight, bias, seq_idx_bl=SEQ_IDX)
    kept = torch.ones(b, l, dtype=torch.bool)
    kept[0, 62:64] = False
    assert torch.equal(found[kept], expected[kept]) and torch.equal(new_window, window)

"""Compiled attention of one query per row: loops of sums over the keys, in pieces.

Truth is float64; expected errors are those of torch's two attentions in the same dtype: the fused
one scales scores, the other one scales q, as the loops do.
"""

import pytest
import torch
from compiler import needs_compiler
from models import rms_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from falcon_h1r.attention import decode_attention_reference
from falcon_h1r.cpu import inductor as forms
from falcon_h1r.cpu.inductor import PIECE, decode_attention

pytestmark = needs_compiler
FUSED = torch.nn.functional.scaled_dot_product_attention
LENGTHS = (PIECE + 2, 2, 3, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE - 1)


def inputs(b, r, j, e, s, dtype, seed=0):
    """Keys and values are the beginning of a longer cache that holds NaN behind them."""
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(b, r * j, e, generator=generator)
    q[0, 0] *= 100  # exp of its scores overflows
    k, v = (torch.full((b, j, 3 * PIECE + 40, e), torch.nan, dtype=dtype) for _ in range(2))
    for part in (k, v):
        part[:, :, :s] = torch.randn(b, j, s, e, generator=generator)
        torch._dynamo.mark_dynamic(part, 2)
    return q.to(dtype), k, v


@pytest.fixture
def compiled_attention(monkeypatch):
    """Of the first s keys, s a symbol; it must attend in its own loops."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def forbidden(*_, **__):
        raise AssertionError("not in loops")

    def call(q, k, v, reach, lengths):
        s = len(reach)
        return decode_attention(q, k[:, :, :s], v[:, :, :s], lengths)

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(forms.F, "scaled_dot_product_attention", forbidden)
        yield torch.compile(call, fullgraph=True, dynamic=False)


def check(call, shape, dtype, lengths_of=lambda s, b: None):
    """At most twice the others' error in the mean of all lengths: where two scores of hundreds lie
    close, one length's ratio is a matter of luck."""
    b, r, j, e = shape
    errors = []
    for seed, s in enumerate(LENGTHS):
        q, k, v = inputs(b, r, j, e, s, dtype, seed)
        reach = torch.empty(s, dtype=torch.bool)
        torch._dynamo.mark_dynamic(reach, 0)
        lengths = lengths_of(s, b)
        found = call(q, k, v, reach, lengths)
        k, v = k[:, :, :s], v[:, :, :s]
        truth = decode_attention_reference(q.double(), k.double(), v.double(), lengths)
        mask = None
        if lengths is not None:
            mask = (torch.arange(s) < lengths[:, None])[:, None, None]
        assert found.dtype == dtype and found.shape == truth.shape
        others = []
        for form in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(form):
                o = FUSED(q.view(b, j, r, e), k, v, attn_mask=mask)
            others.append(o.reshape(b, r * j, e))
        errors.append([rms_error(out, truth) for out in (found, *others)])
        assert errors[-1][0] <= 8 * max(errors[-1][1:]), s
    ours, *theirs = torch.tensor(errors, dtype=torch.float64).log().mean(0).exp().tolist()
    assert ours <= 2 * max(theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


SHAPES = {
    "90m": (1, 4, 2, 64),
    "channels of the 7b": (1, 2, 2, 128),
    "a vector and a half": (2, 3, 2, 24),
    "less than a vector": (3, 1, 2, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_any_number_of_keys_in_one_graph(compiled_attention, name, dtype):
    check(compiled_attention, SHAPES[name], dtype)


def test_keys_of_ragged_rows(compiled_attention):
    def lengths(s, b):
        return torch.tensor([max(1, s - 100 * row) for row in range(b)])

    check(compiled_attention, SHAPES["a vector and a half"], torch.float32, lengths)


def test_many_rows_in_bfloat16(compiled_attention):
    """More sums than few rows would do in loops."""
    check(compiled_attention, (17, 13, 1, 64), torch.bfloat16)

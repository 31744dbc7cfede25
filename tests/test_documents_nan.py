"""What is not finite in one packed document does not reach another; nor does a huge A_log."""

import pytest
import torch
from models import make_config, make_model, random_ids, relative_error, same_weights

from falcon_h1r.derived import states_ssd_scan
from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.ssd import ssd_chunked, ssd_dual

SCANS = (REFERENCE.ssd_scan, TORCH.ssd_scan, ssd_dual, ssd_chunked)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["x", "dt", "B", "C"])
@pytest.mark.parametrize("document", [0, 1, 2])
@pytest.mark.parametrize("scan", SCANS, ids=["recurrent", "tuned", "dual", "chunked"])
def test_the_scan(scan, document, which, bad):
    b, l, h, p, g, n = 1, 30, 4, 6, 2, 5
    parts = {"x": torch.randn(b, l, h, p), "dt": torch.rand(b, l, h), "A": -torch.rand(h)}
    parts |= {"B": torch.randn(b, l, g, n), "C": torch.randn(b, l, g, n), "D": torch.randn(h)}
    seq_idx = (torch.arange(l) // 10)[None]

    def run():
        found = {name: part.clone().requires_grad_() for name, part in parts.items()}
        y, state = scan(*found.values(), chunk_size=8, seq_idx_bl=seq_idx)
        y[:, seq_idx[0] != document].sum().backward()
        return y.detach(), state.detach(), found["x"].grad[:, seq_idx[0] != document]

    expected = run()
    parts[which][:, 10 * document + 4] = bad
    y, state, gradient = run()
    kept = seq_idx[0] != document
    assert relative_error(y[:, kept], expected[0][:, kept]) < 1e-5
    assert not y[:, ~kept].isfinite().all()
    if document != 2:
        assert relative_error(state, expected[1]) < 1e-5
    assert relative_error(gradient, expected[2]) < 1e-5


@pytest.mark.parametrize("scan", SCANS, ids=["recurrent", "tuned", "dual", "chunked"])
def test_an_initial_state_belongs_to_the_first_document(scan):
    b, l, h, p, g, n = 2, 30, 4, 6, 2, 5
    parts = [torch.randn(b, l, h, p), torch.rand(b, l, h), -torch.rand(h)]
    parts += [torch.randn(b, l, g, n), torch.randn(b, l, g, n)]
    state, seq_idx = torch.randn(b, h, p, n), (torch.arange(l) // 10).expand(b, l)
    options = {"initial_state_bhpn": state, "seq_idx_bl": seq_idx, "chunk_size": 8}
    expected, end = scan(*parts, **options)
    state[0, 1, 2, 3] = torch.nan
    found, new_end = scan(*parts, **options)
    assert torch.equal(found[:, 10:], expected[:, 10:]) and torch.equal(new_end, end)
    assert torch.equal(found[1], expected[1]) and not found[0, :10].isfinite().all()


def test_the_states_of_the_tap():
    b, l, h, p, g, n = 1, 12, 2, 3, 1, 4
    parts = [torch.randn(b, l, h, p), torch.rand(b, l, h), -torch.rand(h), torch.randn(b, l, g, n)]
    seq_idx = (torch.arange(l) // 6)[None]
    expected = states_ssd_scan(*parts, seq_idx_bl=seq_idx)
    parts[0][0, 3] = torch.nan
    assert torch.equal(states_ssd_scan(*parts, seq_idx_bl=seq_idx)[:, 6:], expected[:, 6:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("document", [0, 1, 2])
@pytest.mark.parametrize("table", [REFERENCE, TORCH], ids=repr)
def test_attention(table, document, which, bad):
    parts = [torch.randn(2, heads, 30, 8) for heads in (4, 2, 2)]
    seq_idx = (torch.arange(30) // 10).expand(2, 30)
    kept = seq_idx != document
    kept[1] = True

    def run():
        found = [part.clone().requires_grad_() for part in parts]
        o = table.attention(*found, seq_idx_bl=seq_idx).transpose(1, 2)
        o[kept].sum().backward()
        return o[kept].detach(), *(t.grad.transpose(1, 2)[kept] for t in found), o

    expected = run()
    parts[which][0, 1, 10 * document + 4] = bad
    found = run()
    for one, other in zip(found[:4], expected):
        assert relative_error(one, other) < 1e-5
    # For a query of NaN torch's fused attention gives 0 on a CPU, in plain rows too.
    if which > 0 or table is REFERENCE:
        assert not found[4][0, 10 * document + 4].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("table", [REFERENCE, TORCH], ids=repr)
def test_the_convolution(table, bad):
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    seq_idx = torch.tensor([0] * 7 + [1] * 2).expand(2, -1)
    expected, window = table.causal_conv1d(x, weight, bias, seq_idx_bl=seq_idx)
    x[:, 6] = bad
    found, new_window = table.causal_conv1d(x, weight, bias, seq_idx_bl=seq_idx)
    assert torch.equal(found[:, 7:], expected[:, 7:]) and torch.equal(new_window, window)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("document", [0, 1, 2])
@pytest.mark.parametrize("table", [REFERENCE, TORCH], ids=repr)
def test_a_whole_model(table, document, bad):
    """Logits of other documents, of this one before the place, and what blocks learn of them."""
    model = make_model(make_config("two_groups"), ops=table)
    seq_idx = (torch.arange(30) // 10)[None]
    embeds, place = model.embed(random_ids(model.config, 1, 30)).detach(), 10 * document + 4
    kept = (seq_idx[0] != document) | (torch.arange(30) < place)
    found = []
    for value in (embeds[0, place, 7].item(), bad):
        embeds[0, place, 7] = value
        model.zero_grad()
        logits = model(inputs_embeds=embeds, seq_idx=seq_idx)
        logits[:, kept].logsumexp(-1).sum().backward()
        own = [p.grad.flatten() for p in model.model["layers"].parameters()]
        found.append((logits[:, kept].detach(), torch.cat(own)))
    assert relative_error(found[1][0], found[0][0]) < 1e-5
    assert relative_error(found[1][1], found[0][1]) < 1e-5
    assert not logits[:, ~kept].isfinite().any()


@pytest.mark.parametrize("table", [REFERENCE, TORCH], ids=repr)
@torch.no_grad()
def test_a_huge_A_log_is_finite_as_in_float64(table):
    model = make_model(make_config(time_step_limit=(0.0, 0.5)), ops=table)
    for block in model.model["layers"]:
        block.mamba.A_log[:2] = torch.tensor([200.0, 95.0])
        block.mamba.dt_bias[0] = -200  # dt is 0 in float32
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)
    ids, mask = random_ids(model.config, 2, 21), torch.ones(2, 21, dtype=torch.int64)
    mask[0, :5] = 0
    found = []
    for each in (model, exact):
        cache = each.new_cache(2, 30)
        pieces = each(ids, attention_mask=mask, cache=cache), each(ids[:, :1], cache=cache)
        found.append(torch.cat(pieces, 1))
    assert relative_error(*found) < 1e-4

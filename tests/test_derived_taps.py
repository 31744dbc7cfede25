"""Attention's probabilities and the SSM state after every token, beside independent forms of both.

Probabilities: a softmax over each query's own keys, one query at a time, from queries and keys of
the row (or document) run alone, and transformers' eager attention. States: the cache's own state
after each of the tokens has been fed alone.
"""

import pytest
import torch
from models import VARIANTS, make_config, make_model, random_ids, relative_error

from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.study.peers import TransformersPeer
from falcon_h1r.taps import DERIVED_TAPS, full_names, record

STATES, PROBABILITIES = "mamba.scan.states", "self_attn.attention.probabilities"
DERIVED = [STATES, PROBABILITIES]
# Float64: some hundred roundoffs. Float32: of a forward in another order of evaluation.
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=["float64", "float32"])


@torch.no_grad()
def derived(model, *args, **kwargs):
    with record(model, DERIVED) as recording:
        model(*args, **kwargs)
    return recording


@torch.no_grad()
def row_alone(model, ids_l):
    """(layers, l, h, p, n) states and (layers, h, l, l) probabilities of one row, by themselves."""
    cache, states = model.new_cache(1, len(ids_l)), []
    names = ["self_attn.rope.q", "self_attn.rope.k"]
    with record(model, names) as recording:
        for token in ids_l:
            model(token.view(1, 1), cache=cache)
            states.append(cache.states[:, 0].clone())
    probabilities = []
    for n in range(model.config.num_hidden_layers):
        q_hle, k_jle = (recording[f"layers.{n}.{name}"][0] for name in names)
        h, l, e = q_hle.shape
        out = torch.zeros(h, l, l, dtype=torch.float64)
        for head in range(h):
            key_le = k_jle[head * len(k_jle) // h]
            for i in range(l):
                weights = [
                    float(key_le[s].double() @ q_hle[head, i].double()) for s in range(i + 1)
                ]
                shares = (torch.tensor(weights, dtype=torch.float64) / e**0.5).exp()
                out[head, i, : i + 1] = shares / shares.sum()
        probabilities.append(out.to(torch.float64))
    return torch.stack(states, dim=1), torch.stack(probabilities)


def compare(model, recording, row, ids_l, tokens=slice(None), dtype=torch.float64):
    """The recorded `tokens` of a row are those of `ids_l` run alone, and read no others."""
    states, probabilities = row_alone(model, ids_l)
    for n in range(model.config.num_hidden_layers):
        found = recording[f"layers.{n}.{STATES}"][row, tokens]
        assert relative_error(found, states[n]) < BOUND[dtype]
        found = recording[f"layers.{n}.{PROBABILITIES}"][row, :, tokens]
        assert relative_error(found[..., tokens], probabilities[n]) < BOUND[dtype]
        assert float(found.sum()) == pytest.approx(float(found[..., tokens].sum()), rel=1e-6)


@DTYPES
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize("variant", ["two_groups", "multi_query_odd_chunk", "finite_dt_limit"])
def test_a_prefill(variant, ops, dtype):
    model = make_model(make_config(variant), ops=ops, dtype=dtype)
    ids = random_ids(model.config, 2, 9)
    recording = derived(model, ids)
    assert {tensor.dtype for tensor in recording.values()} == {dtype}
    for row in range(2):
        compare(model, recording, row, ids[row], dtype=dtype)


@DTYPES
def test_padding(dtype):
    """Inside the model rows are right-padded: padding holds the state and asks for nothing."""
    model = make_model(make_config(), dtype=dtype)
    ids, mask = random_ids(model.config, 3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, 8:] = 0, 0
    recording = derived(model, ids, mask)
    for row, (start, end) in enumerate([(4, 11), (0, 8), (0, 11)]):
        compare(model, recording, row, ids[row, start:end], slice(0, end - start), dtype)
    for n in range(3):
        assert not recording[f"layers.{n}.{PROBABILITIES}"][0, :, 7:].any()
        held = recording[f"layers.{n}.{STATES}"][0, 6:]
        assert torch.equal(held, held[:1].expand_as(held))


@DTYPES
@torch.no_grad()
def test_pieces_and_steps_behind_a_ragged_cache(dtype):
    """Rows of 3 and 6 tokens, then a padded piece of 2 and 4, then two steps."""
    model = make_model(make_config(), dtype=dtype)
    ids, cache = random_ids(model.config, 2, 12), model.new_cache(2, 12)
    first, second = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)
    first[0, 3:], second[0, :2] = 0, 0
    model(ids[:, :6], first, cache=cache)
    rows = [torch.cat([ids[0, :3], ids[0, 8:12]]), ids[1]]
    with record(model, DERIVED) as recording:
        model(ids[:, 6:10], second, cache=cache)
        model(ids[:, 10:11], cache=cache)
        model(ids[:, 11:], cache=cache)
    assert recording["layers.0." + PROBABILITIES].shape == (2, 4, 6, 12)
    for row, (past, new) in enumerate([(3, 2), (6, 4)]):
        states, probabilities = row_alone(model, rows[row])
        at = [*range(new), 4, 5]
        for n in range(3):
            found = recording[f"layers.{n}.{STATES}"][row, at]
            assert relative_error(found, states[n, past:]) < BOUND[dtype]
            found = recording[f"layers.{n}.{PROBABILITIES}"][row, :, at]
            width = probabilities.shape[-1]
            assert relative_error(found[..., :width], probabilities[n, :, past:]) < BOUND[dtype]
            assert not found[..., width:].any()
            assert not recording[f"layers.{n}.{PROBABILITIES}"][row, :, new:4].any()


@DTYPES
def test_packed_documents(dtype):
    model = make_model(make_config(), dtype=dtype)
    ids = random_ids(model.config, 1, 12)
    documents = torch.tensor([[3] * 4 + [5] * 1 + [9] * 7])
    recording = derived(model, ids, seq_idx=documents)
    for start, end in [(0, 4), (4, 5), (5, 12)]:
        compare(model, recording, 0, ids[0, start:end], slice(start, end), dtype)


@DTYPES
@torch.no_grad()
def test_probabilities_are_those_of_transformers(dtype):
    """Eager attention with output_attentions, in float32, which is all that it computes in;
    grouped-query heads, a row padded on the left."""
    model = make_model(make_config(), dtype=dtype)
    peer = TransformersPeer(make_model(make_config())).model
    peer.set_attn_implementation("eager")
    ids, mask = random_ids(model.config, 2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    recording = derived(model, ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = peer(ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    for n, expected in enumerate(theirs.attentions):
        found = recording[f"layers.{n}.{PROBABILITIES}"]
        assert relative_error(found[0], expected[0]) < BOUND[torch.float32]
        assert relative_error(found[1, :, :7, :7], expected[1, :, 3:, 3:]) < BOUND[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_forward_keeps_its_bits_and_nothing_stays(variant):
    model = make_model(make_config(variant))
    ids = random_ids(model.config, 2, 9)
    expected = model(ids)
    with record(model, DERIVED) as recording:
        assert torch.equal(model(ids), expected)
    assert len(recording) == 2 * 3
    for n in range(3):
        with record(model) as plain:
            model(ids)
        last = plain[f"layers.{n}.mamba.scan.state"]
        assert relative_error(recording[f"layers.{n}.{STATES}"][:, -1], last) < 2e-6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_derived_taps_are_recorded_only_when_named():
    config = make_config()
    names = [tap.name for tap in DERIVED_TAPS]
    assert set(names) == set(DERIVED)
    for asked in (None, ["*"], ["mamba.scan.*"], ["layers.1.*"], ["*.states"]):
        try:
            assert not any(name.endswith(tuple(names)) for name in full_names(config, asked))
        except ValueError:
            assert asked == ["*.states"]
    assert full_names(config, [STATES], [1]) == [f"layers.1.{STATES}"]
    assert full_names(config, [f"layers.*.{PROBABILITIES}"]) == [
        f"layers.{n}.{PROBABILITIES}" for n in range(3)
    ]
    order = full_names(config, ["mamba.scan.state", STATES, "mamba.gate.y"], [0])
    assert order == [f"layers.0.{name}" for name in ("mamba.scan.state", STATES, "mamba.gate.y")]


def test_the_named_line_is_the_function_that_computes_it():
    model = make_model(make_config())
    recording = derived(model, random_ids(model.config, 1, 3))
    for name in recording:
        assert recording.where[name].startswith("falcon_h1r/derived.py:")

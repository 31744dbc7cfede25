"""The model's promises about rows: padding, packing, splitting, causality, bad input.

Runs in float64 with a bound of 1e-12, a few thousand roundoffs, so that a difference is a mistake
and not rounding; a token that leaks shows at a part in a hundred.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VARIANTS, make_config, make_model, random_ids, relative_error
from witness import make_witness

from falcon_h1r.ops import REFERENCE, TORCH

BOUND = 1e-12
MODELS = {
    "torch": ("two_groups", TORCH),
    "reference": ("two_groups", REFERENCE),
    "all_biases": ("all_biases", TORCH),
    "finite_dt_limit": ("finite_dt_limit", TORCH),
    "no_gated_norm": ("no_gated_norm", TORCH),
    "multi_query_odd_chunk": ("multi_query_odd_chunk", TORCH),
}
ANY_MODEL = pytest.mark.parametrize("name", MODELS)
# One row: padding before, real tokens, padding after. Lengths reach over two chunks.
ROW = st.tuples(st.integers(0, 5), st.integers(0, 19), st.integers(0, 5))
ROWS = st.lists(ROW, min_size=1, max_size=4).filter(lambda rows: any(real for _, real, _ in rows))


@functools.cache
def get_model(name: str):
    variant, ops = MODELS[name]
    return make_model(make_config(variant), ops=ops, dtype=torch.float64)


def lay_out(rows, seed=1):
    """ids and mask (b, longest) for rows of (before, real, after); padding is random tokens."""
    length = max(sum(row) for row in rows)
    ids = random_ids(make_config(), len(rows), length, seed=seed)
    mask = torch.zeros_like(ids)
    for row, (before, real, _) in enumerate(rows):
        mask[row, before : before + real] = 1
    return ids, mask


@ANY_MODEL
@torch.no_grad()
@given(rows=ROWS)
def test_a_padded_row_gives_what_it_gives_alone(name, rows):
    model = get_model(name)
    ids, mask = lay_out(rows)
    cache = model.new_cache(len(rows), ids.shape[1])
    logits, cached = model(ids, attention_mask=mask), model(ids, attention_mask=mask, cache=cache)
    assert relative_error(cached, logits) < BOUND
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    assert cache.lengths.tolist() == [real for _, real, _ in rows]
    for row, (before, real, _) in enumerate(rows):
        window = slice(before, before + real)
        if real:
            alone = model(ids[row : row + 1, window])
            assert relative_error(logits[row, window], alone[0]) < BOUND
        assert (logits[row, :before] == 0).all() and (logits[row, before + real :] == 0).all()


@ANY_MODEL
@torch.no_grad()
@given(first=ROWS, data=st.data())
def test_ragged_batches_go_on_from_the_cache(name, first, data):
    """Padded prefill, then a padded stretch (rows may pause), then steps: each row as if alone."""
    model = get_model(name)
    second = data.draw(
        st.lists(ROW, min_size=len(first), max_size=len(first)).filter(
            lambda rows: any(real for _, real, _ in rows)
        )
    )
    steps = 2
    cache = model.new_cache(len(first), 19 + 19 + steps)
    streams = [[] for _ in first]
    last = [None for _ in first]
    for seed, rows in enumerate((first, second)):
        ids, mask = lay_out(rows, seed=seed)
        logits = model(ids, attention_mask=mask, cache=cache)
        for row, (before, real, _) in enumerate(rows):
            streams[row] += ids[row, before : before + real].tolist()
            last[row] = logits[row, before + real - 1] if real else last[row]
    for seed in range(steps):
        ids = random_ids(model.config, len(first), 1, seed=seed)
        logits = model(ids, cache=cache)
        for row in range(len(first)):
            streams[row] += ids[row].tolist()
            last[row] = logits[row, 0]
    assert cache.lengths.tolist() == [len(stream) for stream in streams]
    for stream, found in zip(streams, last):
        assert relative_error(found, model(torch.tensor([stream]))[0, -1]) < BOUND


@torch.no_grad()
@given(rows=ROWS, keep=st.integers(1, 25), masked=st.booleans())
def test_logits_to_keep_counts_real_tokens(rows, keep, masked):
    model = get_model("torch")
    ids, mask = lay_out(rows)
    if not masked:
        rows, mask = [(0, ids.shape[1], 0)] * len(rows), None
    logits = model(ids, attention_mask=mask)
    kept = model(ids, attention_mask=mask, logits_to_keep=keep)
    assert kept.shape == (len(rows), keep, model.config.vocab_size)
    for row, (before, real, _) in enumerate(rows):
        some = min(keep, real)
        expected = logits[row, before + real - some : before + real]
        assert (kept[row, : keep - some] == 0).all()
        if some:
            assert relative_error(kept[row, keep - some :], expected) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float64])
def test_masks_of_any_dtype(dtype):
    model = get_model("torch")
    ids, mask = lay_out([(2, 5, 0), (0, 7, 0)])
    expected = model(ids, attention_mask=mask)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)), expected)


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask():
    model = get_model("torch")
    ids = random_ids(model.config, 2, 11)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)), model(ids))


@ANY_MODEL
@torch.no_grad()
@given(lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6), data=st.data())
def test_packed_documents_give_what_they_give_alone(name, lengths, data):
    """Numbers only have to differ from one document to the next: 7, 2, 7 are three documents."""
    model = get_model(name)
    numbers = [data.draw(st.integers(-3, 9)) for _ in lengths]
    for i in range(1, len(numbers)):
        numbers[i] += numbers[i] == numbers[i - 1]
    ids = random_ids(model.config, 2, sum(lengths))
    seq_idx = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))
    other = torch.zeros_like(seq_idx)  # the second row is one document
    logits = model(ids, seq_idx=torch.stack([seq_idx, other]))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        assert relative_error(logits[0, part], model(ids[:1, part])[0]) < BOUND
        start += length
    assert relative_error(logits[1], model(ids[1:])[0]) < BOUND


@ANY_MODEL
@torch.no_grad()
@given(pieces=st.lists(st.integers(1, 12), min_size=2, max_size=8))
def test_prefill_in_any_pieces_is_one_prefill(name, pieces):
    """Pieces of one token are decode steps: also prefill followed by steps is the full forward."""
    model = get_model(name)
    total = sum(pieces)
    ids = random_ids(model.config, 2, total)
    whole, parts = model.new_cache(2, total), model.new_cache(2, total)
    expected = model(ids, cache=whole)
    found = torch.cat([model(piece, cache=parts) for piece in ids.split(pieces, dim=1)], dim=1)
    assert relative_error(found, expected) < BOUND
    assert relative_error(expected, model(ids)) < BOUND
    for tensor in ("keys", "values", "windows", "states"):
        assert relative_error(getattr(parts, tensor), getattr(whole, tensor)) < BOUND, tensor
    assert torch.equal(parts.lengths, whole.lengths)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_point_and_steps_behind_it(variant):
    """For every k: prefill of k tokens, then steps, is the full forward (k = 0: steps only)."""
    model = make_model(make_config(variant), dtype=torch.float64)
    length = 11
    ids = random_ids(model.config, 2, length)
    expected = model(ids)
    for k in range(length):
        cache = model.new_cache(2, length)
        found = [model(ids[:, :k], cache=cache)] if k else []
        found += [model(ids[:, t : t + 1], cache=cache) for t in range(k, length)]
        assert relative_error(torch.cat(found, dim=1), expected) < BOUND, k
        cache = model.new_cache(2, length)
        if k:
            model(ids[:, :k], cache=cache)
        assert relative_error(model(ids[:, k:], cache=cache), expected[:, k:]) < BOUND, k


def silence(model, module: str):
    """Make one branch of every block contribute nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{module}." in name:
                parameter.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize(
    "silent", [None, "mamba.out_proj", "self_attn.o_proj"], ids=["both", "attention", "mamba"]
)
def test_causality(silent, ops, dtype):
    """Another token at t changes no bit before t, and all from t on, through either branch."""
    model = make_model(make_config("all_biases"), ops=ops, dtype=dtype)
    if silent:
        silence(model, silent)
    ids = random_ids(model.config, 1, 21)
    before = model(ids)
    for t in (0, 1, 6, 7, 8, 13, 20):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[0, t:] != before[0, t:]).any(-1).all()


@torch.no_grad()
def test_without_both_branches_positions_are_independent():
    model = make_model(make_config(), dtype=torch.float64)
    silence(silence(model, "mamba.out_proj"), "self_attn.o_proj")
    ids = random_ids(model.config, 1, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert relative_error(model(ids[:, order]), model(ids)[:, order]) < BOUND


def test_gradients_stay_in_their_rows_and_documents():
    """The loss of one document gives the other tokens of its row, and padding, no gradient."""
    model = make_model(make_config(), dtype=torch.float64)
    table = model.model["embed_tokens"].weight
    ids = torch.arange(1, 16)[None]

    def touched(logits):
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        per_token = table.grad.abs().sum(-1)
        return (per_token > 1e-15 * per_token.max()).nonzero().flatten().tolist()

    seq_idx = torch.tensor([[0] * 4 + [1] * 6 + [2] * 5])
    assert touched(model(ids, seq_idx=seq_idx)[0, 4:10]) == list(range(5, 11))
    mask = torch.tensor([[0] * 5 + [1] * 10])
    assert touched(model(ids, attention_mask=mask)) == list(range(6, 16))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids.*\(3,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"input_ids.*\(1, 0\)"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids.*float32"),
        ({"input_ids": torch.tensor([[3, 97]])}, "id 97 .*97"),
        ({"input_ids": torch.tensor([[3, -1]])}, "id -1 "),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask.*\(2, 5\).*\(2, 4\)"),
        ({"attention_mask": torch.zeros(2, 5)}, "attention_mask.*no row"),
        ({"attention_mask": torch.tensor([[1] * 5, [1, 0, 1, 1, 1]])}, "attention_mask.*row 1"),
        ({"seq_idx": torch.zeros(2, 4)}, r"seq_idx.*\(2, 4\)"),
        ({"seq_idx": torch.zeros(2, 5), "attention_mask": torch.ones(2, 5)}, "seq_idx"),
        ({"seq_idx": torch.zeros(2, 5), "cache": "rows 2"}, "seq_idx"),
        ({"cache": "rows 3"}, "cache.*3.*2"),
        ({"logits_to_keep": -1}, "logits_to_keep.*-1"),
        ({"logits_to_keep": 1.5}, r"logits_to_keep.*1\.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_happens(arguments, words):
    model = get_model("torch")
    arguments = {"input_ids": random_ids(model.config, 2, 5), **arguments}
    if "cache" in arguments:
        arguments["cache"] = model.new_cache(int(arguments["cache"][-1]), 8)
    with pytest.raises(ValueError, match=words) as caught:
        model(**arguments)
    assert "\n" not in str(caught.value)
    if "cache" in arguments:
        assert not arguments["cache"].lengths.any()


def test_a_cache_of_another_dtype_or_model_is_refused():
    """Writing float64 keys into a bfloat16 cache would round in silence."""
    model = get_model("torch")
    ids = random_ids(model.config, 1, 3)
    narrow = make_model(make_config(), dtype=torch.bfloat16).new_cache(1, 8)
    other = make_model(make_config(num_hidden_layers=2), dtype=torch.float64).new_cache(1, 8)
    for cache in (narrow, other):
        with pytest.raises(ValueError, match="cache"):
            model(ids, cache=cache)


def test_parameters_are_the_checkpoints():
    """Names as in transformers, lm_head absent when tied, no buffers; fresh weights are finite."""
    for variant in VARIANTS:
        model = make_model(make_config(variant))
        names = set(model.state_dict())
        expected = set(make_witness(model).state_dict())
        if model.config.tie_word_embeddings:
            expected.discard("lm_head.weight")
        assert names == expected and not list(model.buffers())
        fresh = type(model)(model.config)
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())

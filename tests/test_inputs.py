"""What callers hand to a model instead of (batch, length) ids, masks and documents."""

import functools

import numpy
import pytest
import torch
from models import make_config, make_model, random_ids

from falcon_h1r import generate

IDS = torch.tensor([[1, 2, 3]])


@functools.cache
def model():
    return make_model(make_config("two_groups"))


@pytest.mark.parametrize("name", "int8 int16 int32 uint8 uint16 uint32 uint64".split())
def test_ids_of_every_integer_dtype_are_ids(name):
    ids = IDS.to(getattr(torch, name))
    with torch.no_grad():
        assert torch.equal(model()(ids), model()(IDS))
    assert torch.equal(generate(model(), ids).sequences[0], generate(model(), IDS).sequences[0])


@pytest.mark.parametrize(
    "ids",
    [
        IDS.bool(),
        IDS.double(),
        IDS.to(torch.complex64),
        numpy.array([[1, 2]]),
        None,
        "text",
        5,
        IDS[0],
        IDS[None],
        IDS[:, :0],
        torch.tensor(3),
        torch.tensor([[2**63 - 1]]),
        torch.tensor([[2**64 - 1]], dtype=torch.uint64),
    ],
    ids=repr,
)
def test_what_is_no_batch_of_ids_is_refused(ids):
    for read in (model(), functools.partial(generate, model())):
        with pytest.raises(ValueError, match="input_ids") as error:
            read(ids)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1]],
        5,
        IDS,
        torch.full((1, 3), 0.5),
        torch.tensor([[0.0, -torch.inf, 0.0]]),
        torch.full((1, 3), torch.nan),
        torch.ones(1, 2),
        torch.ones(1, 1, 3),
    ],
    ids=repr,
)
def test_what_is_no_mask_is_refused(mask):
    for read in (model(), functools.partial(generate, model())):
        with pytest.raises(ValueError, match="attention_mask: expected"):
            read(IDS, attention_mask=mask)


@pytest.mark.parametrize("seq_idx", [[[0, 0, 1]], IDS.float(), IDS.bool(), IDS[:, :2], 5], ids=repr)
def test_what_are_no_documents_is_refused(seq_idx):
    with pytest.raises(ValueError, match="seq_idx: expected"):
        model()(IDS, seq_idx=seq_idx)


@pytest.mark.parametrize("embeds", [[[1.0]], 5, IDS, torch.zeros(1, 3, 7)], ids=repr)
def test_what_are_no_embeddings_is_refused(embeds):
    with pytest.raises(ValueError, match="inputs_embeds: expected torch"):
        model()(inputs_embeds=embeds)


def test_a_row_ends_at_max_position_embeddings():
    """A packed row may be longer: a document may not."""
    limit = model().config.max_position_embeddings
    column = torch.arange(limit + 2)[None]
    long, cache = torch.ones_like(column), model().new_cache(1, 2 * limit)
    with torch.no_grad():
        model()(long[:, :limit], cache=cache)
        model()(long, seq_idx=column // limit)
        match = f"a row of {limit + 1} tokens, more than max_position_embeddings {limit}"
        for arguments in (
            {"input_ids": long[:, :-1]},
            {"input_ids": long[:, :1], "cache": cache},
            {"inputs_embeds": model().embed(long[:, :-1])},
            {"input_ids": long, "seq_idx": column // (limit + 1)},
        ):
            with pytest.raises(ValueError, match=match):
                model()(**arguments)
    assert int(cache.lengths) == limit


@pytest.mark.parametrize("size", [(1, 10**12), (1, 10**30), (10**9, 10**9)])
def test_a_cache_beyond_all_memory_is_refused(size):
    with pytest.raises(ValueError, match=r"a cache of \d+ x \d+ tokens: cpu has no"):
        model().new_cache(*size)


@pytest.mark.parametrize("table", ["reference", "torch"])
def test_logits_behind_a_cache_have_no_gradient_under_any_table(table):
    one = model().under(table)
    cache = one.new_cache(1, 9)
    for ids in (IDS, IDS[:, :1]):
        logits = one(ids, cache=cache)
        assert not logits.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            logits.sum().backward()
    assert one(IDS).requires_grad


@pytest.mark.parametrize("kind", ["sparse", "meta", "quantised"])
def test_tensors_that_are_not_plain_are_refused(kind):
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 7)
    make = {
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "quantised": lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8),
    }[kind]
    with pytest.raises(ValueError, match="input_ids: expected"):
        model(make(ids))
    with pytest.raises(ValueError, match="attention_mask: expected a plain tensor"):
        model(ids, attention_mask=make(torch.ones_like(ids)))
    with pytest.raises(ValueError, match="seq_idx: expected"):
        model(ids, seq_idx=make(torch.zeros_like(ids)))

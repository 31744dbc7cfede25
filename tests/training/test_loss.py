"""A model's losses and all its gradients: plain, padded, packed, recomputed, under autocast."""

import math
import re
from collections import defaultdict

import pytest
import torch
from models import VARIANTS, make_config, make_model, random_ids, rms_error, same_weights
from torch.nn.functional import cross_entropy
from witness import make_witness

from falcon_h1r.ops import REFERENCE
from falcon_h1r.training import next_token_logprobs, next_token_loss

LENGTHS = (17, 9, 4)  # the chunk is 8


def documents(config, seed=1):
    """Token 0 is transformers' padding_idx, whose embedding it gives no gradient."""
    return [
        random_ids(config, length, seed=seed + i).clamp(min=1) for i, length in enumerate(LENGTHS)
    ]


def padded(rows, side="left"):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    targets = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        place = slice(start, start + len(row))
        ids[i, place], mask[i, place] = row, 1
        targets[i, start : start + len(row) - 1] = row[1:]
    return ids, mask, targets


def packed(rows):
    ids = torch.cat(rows)[None]
    seq_idx = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])[None]
    ends = torch.tensor([-100])
    return ids, seq_idx, torch.cat([torch.cat([row[1:], ends]) for row in rows])[None]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def separately(model, rows, **options):
    """The sum of the documents' losses, each alone, with torch's own cross-entropy."""

    def logits(row):
        found = model(row[None], **options)
        return (found.logits if options else found)[0, :-1]

    return sum(cross_entropy(logits(row), row[1:], reduction="sum") for row in rows)


LAYOUTS = {
    "left": lambda model, rows, **options: next_token_loss(
        model, *padded(rows)[::2], attention_mask=padded(rows)[1], **options
    ),
    "right": lambda model, rows, **options: next_token_loss(
        model, *padded(rows, "right")[::2], attention_mask=padded(rows, "right")[1], **options
    ),
    "packed": lambda model, rows, **options: next_token_loss(
        model, *packed(rows)[::2], seq_idx=packed(rows)[1], **options
    ),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_packed_and_separate_documents_have_one_gradient(variant, layout, recompute):
    model = make_model(make_config(variant), dtype=torch.float64)
    rows = documents(model.config)
    expected_loss = separately(model, rows)
    expected = gradients(model, expected_loss)
    loss = LAYOUTS[layout](model, rows, recompute=recompute)
    assert math.isclose(loss.item(), expected_loss.item(), rel_tol=1e-12)
    for name, gradient in gradients(model, loss).items():
        assert rms_error(gradient, expected[name]) < 1e-11, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_gradients_are_no_farther_from_float64_than_those_of_transformers(variant, layout):
    """Judged per kind of parameter; transformers takes each document alone."""
    found = [defaultdict(list) for _ in range(3)]
    for seed in range(3):
        model = make_model(make_config(variant), seed=seed)
        witness = make_witness(model).train()
        truth = same_weights(model, ops=REFERENCE, dtype=torch.float64)
        rows = documents(model.config, seed=10 * seed + 1)
        witness_loss = separately(witness, rows, use_cache=False)
        losses = LAYOUTS[layout](model, rows), witness_loss, separately(truth, rows)
        for network, loss, kinds in zip((model, witness, truth), losses, found):
            for name, gradient in gradients(network, loss).items():
                kinds[re.sub(r"\d+", "N", name)].append(gradient.flatten())
    ours, theirs, exact = ({kind: torch.cat(g) for kind, g in d.items()} for d in found)
    for kind, gradient in ours.items():
        distance = (gradient - theirs[kind]).norm() / theirs[kind].norm()
        assert distance < 1e-4, (kind, distance)
        error, witness_error = (rms_error(g[kind], exact[kind]) for g in (ours, theirs))
        assert error <= 2 * witness_error, (kind, error, witness_error)


@pytest.mark.parametrize("variant", ["two_groups", "all_biases", "norm_before_gate"])
def test_twenty_steps_of_adamw_beside_transformers(variant):
    model = make_model(make_config(variant))
    witness = make_witness(model).train()
    rows = documents(model.config)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3, eps=1e-5) for m in (model, witness)]
    losses = []
    for _ in range(20):
        own = LAYOUTS["packed"](model, rows)
        their = separately(witness, rows, use_cache=False)
        for optimizer, loss in zip(optimizers, (own, their)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((own.item(), their.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    for own, their in losses:
        assert math.isclose(own, their, rel_tol=1e-3), losses


def test_weights_count_and_logprobs_are_those_of_the_logits():
    model = make_model(make_config(), dtype=torch.float64)
    ids = random_ids(model.config, 2, 12)
    targets, weights = random_ids(model.config, 2, 12, seed=5), torch.rand(2, 12).double()
    logprobs = (model(ids) / 0.7).log_softmax(-1)
    chosen, entropy = next_token_logprobs(model, ids, targets, temperature=0.7)
    torch.testing.assert_close(chosen, logprobs.gather(2, targets[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum(-1))
    plain = model(ids).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    loss = next_token_loss(model, ids, targets, weights_bl=weights)
    torch.testing.assert_close(loss, -(weights * plain).sum())


def test_recomputing_keeps_the_input_of_each_block_alone():
    model, kept = make_model(make_config(num_hidden_layers=6)), {}
    ids = random_ids(model.config, 2, 64)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for recompute in (False, True):
        storages = {}

        def hold(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t  # held, so that no other takes its place
            return t

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            model(ids, recompute=recompute, head=lambda x: x.sum())
        sizes = (t.untyped_storage().nbytes() for at, t in storages.items() if at not in known)
        kept[recompute] = sum(sizes)
    x = ids.numel() * model.config.hidden_size * 4
    assert kept[True] <= 12 * x < 60 * x < kept[False], (kept, x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["two_groups", "tied"])
def test_under_autocast_a_loss_is_no_farther_than_transformers(variant, recompute):
    """float32 weights, linear layers in bfloat16: loss and gradients against float64."""
    model = make_model(make_config(variant))
    witness, truth = make_witness(model).train(), same_weights(model, dtype=torch.float64)
    ids = random_ids(model.config, 4, 40).clamp(min=1)
    targets = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = next_token_loss(model, ids, targets, recompute=recompute)
        logits = witness(ids, use_cache=False).logits[:, :-1].float()
        their = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    exact = next_token_loss(truth, ids, targets)
    pairs = zip((model, witness, truth), (own, their, exact))
    found = [gradients(network, loss) for network, loss in pairs]
    whole = [torch.cat([g[name].flatten() for name in found[0]]) for g in found]
    assert all(g.dtype is torch.float32 for g in found[0].values())
    assert rms_error(whole[0], whole[2]) <= 2 * rms_error(whole[1], whole[2])


def test_refusals():
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 12)
    for call in (
        lambda: next_token_loss(model, ids, ids[:, 1:]),
        lambda: next_token_loss(model, ids, ids.float()),
        lambda: next_token_loss(model, ids, ids + 97),
        lambda: next_token_loss(model, ids, ids, weights_bl=torch.ones(2, 11)),
        lambda: next_token_loss(model, ids, None),
        lambda: next_token_logprobs(model, ids, torch.full_like(ids, -1)),
    ):
        with pytest.raises(ValueError):
            call()

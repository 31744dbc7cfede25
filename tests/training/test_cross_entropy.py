"""The fused head and cross-entropy against torch's own on whole logits, and its memory."""

import pytest
import torch
import torch.nn.functional as F

from falcon_h1r.training import cross_entropy as fused
from falcon_h1r.training.cross_entropy import linear_cross_entropy, linear_logprobs

T, V, DIM = 13, 11, 5


@pytest.fixture(autouse=True)
def pieces_of_three_tokens(monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 3 * V)


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(dtype=torch.float64):
    x, head = draw(T, DIM, dtype=dtype), draw(V, DIM, dtype=dtype, seed=1)
    targets = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2))
    return x.requires_grad_(), head.requires_grad_(), targets


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [[], [0, 5, 12], list(range(T))], ids=len)
def test_loss_and_gradients_are_those_of_whole_logits(weighted, ignored):
    x, head, targets = arguments()
    targets[ignored] = -100
    weights = draw(T, seed=3).requires_grad_() if weighted else None
    own = [x, head, *([weights] if weighted else [])]
    found = linear_cross_entropy(x, head, targets, multiplier=0.3, weights_t=weights)
    each = F.cross_entropy(0.3 * x @ head.T, targets, reduction="none")
    expected = (each * weights).sum() if weighted else each.sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(found * 2.5, own), torch.autograd.grad(expected * 2.5, own))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for_is_made(needs):
    x, head, targets = arguments()
    x.requires_grad_(needs[0])
    head.requires_grad_(needs[1])
    linear_cross_entropy(x, head, targets).backward()
    assert [t.grad is not None for t in (x, head)] == list(needs)
    expected = torch.autograd.grad(
        F.cross_entropy(x @ head.T, targets, reduction="sum"), x if needs[0] else head
    )[0]
    torch.testing.assert_close((x if needs[0] else head).grad, expected, rtol=1e-12, atol=1e-12)


def test_logprobs_and_entropy_have_their_gradients():
    x, head, targets = arguments()

    def own(x, head):
        return linear_logprobs(x, head, targets, multiplier=0.3, temperature=0.7)

    logprobs = (0.3 / 0.7 * x @ head.T).log_softmax(1)
    chosen, entropy = own(x, head)
    torch.testing.assert_close(chosen, logprobs.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum(1))
    assert torch.autograd.gradcheck(own, (x, head))


def test_low_precision_is_at_most_twice_as_far_off_as_whole_logits():
    """Both against float64; the head's gradient is summed in float32 over all pieces."""
    x, head, targets = arguments(torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, head)]
    exact = F.cross_entropy(0.3 * wide[0] @ wide[1].T, targets, reduction="sum")
    plain = F.cross_entropy((0.3 * (x @ head.T).float()), targets, reduction="sum")
    ours = linear_cross_entropy(x, head, targets, multiplier=0.3).detach()
    truth = torch.autograd.grad(exact, wide)
    for i, own in enumerate((x, head)):
        off = [
            (torch.autograd.grad(loss, own, retain_graph=loss is plain)[0] - truth[i]).norm()
            for loss in (plain, linear_cross_entropy(x, head, targets, multiplier=0.3))
        ]
        assert off[1] <= 2 * off[0]
    assert abs(ours - exact) <= 2 * abs(plain - exact) + 1e-5


def test_a_second_backward_is_refused():
    x, head, targets = arguments()
    loss = linear_cross_entropy(x, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()
    logprob, _ = linear_logprobs(x, head, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logprob.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, h, t: (x, h, t + V), "targets: id 1[0-9]|targets: id 2[0-9]"),
        (lambda x, h, t: (x, h, t - 5), "outside the vocabulary of 11"),
        (lambda x, h, t: (x, h, t[:-1]), "targets: expected shape"),
        (lambda x, h, t: (x, h, t.double()), "targets: expected integers"),
        (lambda x, h, t: (x, h[:, 1:], t), "one dtype and one width"),
        (lambda x, h, t: (x.float(), h, t), "one dtype and one width"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    for call in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(ValueError, match=words):
            call(*change(*arguments()))
    with pytest.raises(ValueError, match="weights: shape"):
        linear_cross_entropy(*arguments(), weights_t=torch.ones(2))

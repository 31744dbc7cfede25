"""The head and the cross-entropy as one operator, in pieces of tokens.

The logits of 4,096 tokens and 130,048 words are 2 GiB, and their gradient as much again. Here no
more of them exists at a time than PIECE numbers: a piece's logits become its probabilities in
place, and those its gradient, which is used up before the next piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_integers
from ..gradients import once
from ..precision import autocasts, compute_dtype

PIECE = 2**24  # logits at a time, 64 MiB of float32


def linear_cross_entropy(
    x_td: Tensor,
    head_vd: Tensor,
    targets_t: Tensor,
    *,
    multiplier: float = 1.0,
    weights_t: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum over tokens of weight times -log p(target), p = softmax(multiplier x head^T).

    x_td: (t, d) hidden states; head_vd: (v, d), in x's dtype; targets_t: (t,) integers, of which
    `ignore_index` counts for nothing; weights_t: (t,), None: 1. Gradients of x and head are made in
    the forward, in one pass over the head: a second backward raises. Divide by the sum of weights
    for a mean. Returns a scalar in `compute_dtype`.
    Raises ValueError for targets outside the vocabulary and shapes that do not fit.
    """
    rows = _rows(x_td, head_vd, targets_t, ignore_index)
    targets = targets_t[rows].long()
    weights = x_td.new_ones(len(rows), dtype=compute_dtype(x_td))
    if weights_t is not None:
        if weights_t.shape != targets_t.shape:
            raise ValueError(
                f"weights: shape {tuple(weights_t.shape)}, expected {tuple(targets_t.shape)}"
            )
        weights = weights_t[rows].to(weights)
    x_td, head_vd = _as_linear(x_td[rows], head_vd)
    with torch.autocast(x_td.device.type, enabled=False):
        return _Loss.apply(x_td, head_vd, targets, weights, multiplier)


def linear_logprobs(
    x_td: Tensor,
    head_vd: Tensor,
    targets_t: Tensor,
    *,
    multiplier: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log p(target) of each token, and the entropy of its distribution, both (t,) in
    `compute_dtype`.

    Arguments as in `linear_cross_entropy`; p = softmax(multiplier x head^T / temperature). The
    backward makes the logits again: what a token's log-probability is worth may depend on it.
    """
    _rows(x_td, head_vd, targets_t, None)
    x_td, head_vd = _as_linear(x_td, head_vd)
    with torch.autocast(x_td.device.type, enabled=False):
        return _Logprobs.apply(x_td, head_vd, targets_t.long(), multiplier / temperature)


def _as_linear(x_td: Tensor, head_vd: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as the inputs of every linear layer."""
    if not autocasts(x_td):
        return x_td, head_vd
    dtype = torch.get_autocast_dtype(x_td.device.type)
    return x_td.to(dtype), head_vd.to(dtype)


def _rows(x_td: Tensor, head_vd: Tensor, targets_t, ignore_index: int | None) -> Tensor:
    """Which tokens count."""
    (t, d), (vocab, width) = x_td.shape, head_vd.shape
    if d != width or x_td.dtype != head_vd.dtype:
        raise ValueError(
            f"x is {tuple(x_td.shape)} {x_td.dtype}, head {tuple(head_vd.shape)} {head_vd.dtype}: "
            "expected one dtype and one width"
        )
    targets = as_integers("targets", targets_t, (t,))
    rows = torch.arange(t, device=x_td.device)
    if ignore_index is not None:
        rows = rows[targets != ignore_index]
    if len(rows):
        low, high = targets[rows].aminmax()
        if low < 0 or high >= vocab:
            bad = int(low if low < 0 else high)
            raise ValueError(f"targets: id {bad} is outside the vocabulary of {vocab}")
    return rows


def _pieces(t: int, vocab: int):
    size = max(1, PIECE // vocab)
    return [slice(start, start + size) for start in range(0, t, size)]


def _normalised(x_td: Tensor, head_vd: Tensor, multiplier: float):
    """Logits minus their log-sum-exp, (t, v)."""
    logits = (x_td @ head_vd.T).to(compute_dtype(x_td)).mul_(multiplier)
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def _gradients(grad_tv: Tensor, x_td: Tensor, head_vd: Tensor, dx, dhead, piece) -> None:
    """Add what the gradient of a piece's logits, multiplier included, means for x and head."""
    grad_tv = grad_tv.to(x_td.dtype)
    if dx is not None:
        torch.mm(grad_tv, head_vd, out=dx[piece])
    if dhead is not None and dhead.dtype == x_td.dtype:
        dhead.addmm_(grad_tv.T, x_td)
    elif dhead is not None:
        dhead += grad_tv.T @ x_td


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head, targets, weights, multiplier):
        needs_x, needs_head = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dhead = torch.zeros_like(head, dtype=compute_dtype(head)) if needs_head else None
        dweights = torch.empty_like(weights)
        for piece in _pieces(len(x), len(head)):
            logprobs = _normalised(x[piece], head, multiplier)
            index = targets[piece, None]
            dweights[piece] = -logprobs.gather(1, index)[:, 0]
            if dx is None and dhead is None:
                continue
            scale = multiplier * weights[piece, None]
            grad = logprobs.exp_().mul_(scale)
            grad.scatter_add_(1, index, -scale)
            _gradients(grad, x[piece], head, dx, dhead, piece)
        if dhead is not None:
            dhead = dhead.to(head.dtype)
        ctx.gradients = dx, dhead, None, dweights
        return (weights * dweights).sum()

    @staticmethod
    @once
    def backward(ctx, gradient):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward; its gradients are gone")
        made, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(gradient) for g in made), None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head, targets, multiplier):
        chosen = x.new_empty(len(x), dtype=compute_dtype(x))
        entropy = torch.empty_like(chosen)
        for piece in _pieces(len(x), len(head)):
            logprobs = _normalised(x[piece], head, multiplier)
            chosen[piece] = logprobs.gather(1, targets[piece, None])[:, 0]
            entropy[piece] = -(logprobs.exp().mul_(logprobs)).sum(1)
        ctx.save_for_backward(x, head, targets, entropy)
        ctx.multiplier = multiplier
        return chosen, entropy

    @staticmethod
    @once
    def backward(ctx, dchosen, dentropy):
        x, head, targets, entropy = ctx.saved_tensors
        needs_x, needs_head = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dhead = torch.zeros_like(head, dtype=compute_dtype(head)) if needs_head else None
        for piece in _pieces(len(x), len(head)):
            logprobs = _normalised(x[piece], head, ctx.multiplier)
            # Of log p: 1 at the target, minus p. Of the entropy: -p (log p + entropy).
            grad = logprobs.add(entropy[piece, None]).mul_(-dentropy[piece, None])
            grad.sub_(dchosen[piece, None]).mul_(logprobs.exp_())
            grad.scatter_add_(1, targets[piece, None], dchosen[piece, None])
            _gradients(grad.mul_(ctx.multiplier), x[piece], head, dx, dhead, piece)
        return dx, None if dhead is None else dhead.to(head.dtype), None, None

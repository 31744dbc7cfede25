"""From logits to a token: penalties, filters, and a draw fixed by a seed and a position.

Axes: r rows, v vocabulary. Every function is pure and works on all rows at once; parameters are
(r,) tensors, so rows may differ in all of them.

The order is transformers': penalties on the raw logits, then temperature, top-k, top-p, min-p. So
top-p and min-p see the distribution that temperature has shaped, and top-p's sum is over what top-k
left. What follows temperature is computed in float64.

What holds, in bits: a row's token is a function of its logits, its parameters, its own history, its
seed and its position; neighbours, the row's place in the batch and the order of prompts do not
enter. The sum over the distribution is taken in integers, so it does not depend on how a device
adds up either. Up to rounding only: the logits themselves, whose last bits may differ with the
batch's size, and exp, whose last bit may differ between devices. Such a bit can move a draw that
lies on the border of two tokens, and an argmax between two equal ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .params import SamplingParams

# splitmix64 (Steele, Lea, Flood 2014): the step between states, and two multipliers of the
# finaliser.
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Probabilities become integers of this scale; a vocabulary's worth of them stays exact in float64.
_SCALE = 2**52
# Stands for temperature 0: a difference between two float32 logits, divided by it, leaves the lower
# one a probability of 0.
_COLDEST = 1e-290
# So many of the likeliest tokens are sorted before the whole vocabulary is.
_HEADS = (64, 1024)
# Numbers that a draw works on at a time on a CPU: float64 that its caches hold.
_PART = 2**18


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of 64-bit integers; int64 products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def uniform(seed_r: Tensor, position: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64: number `position` of each seed's own sequence.

    seed_r: (r,) int64; position: an int, or a tensor that broadcasts with seed_r. The seed is mixed
    first, so that neighbouring seeds have unrelated sequences; 53 of 64 mixed bits are kept.
    """
    position = torch.as_tensor(position, dtype=torch.int64, device=seed_r.device)
    state = _mix(seed_r + _signed(_STEP)) + (position + 1) * _signed(_STEP)
    return _shift_right(_mix(state), 11).double() * 2.0**-53


def apply_repetition_penalty(logits_rv: Tensor, seen_rv: Tensor, penalty_r: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of the tokens marked in `seen_rv` (bool)."""
    factor = penalty_r.to(logits_rv.dtype)[:, None]
    penalised = torch.where(logits_rv < 0, logits_rv * factor, logits_rv / factor)
    return torch.where(seen_rv, penalised, logits_rv)


def apply_count_penalties(
    logits_rv: Tensor, counts_rv: Tensor, presence_r: Tensor, frequency_r: Tensor
) -> Tensor:
    """Subtract presence * (count > 0) + frequency * count; counts_rv: occurrences in the output."""
    dtype = logits_rv.dtype
    counts = counts_rv.to(dtype)
    presence, frequency = presence_r.to(dtype)[:, None], frequency_r.to(dtype)[:, None]
    return logits_rv - presence * (counts > 0) - frequency * counts


def apply_temperature(logits_rv: Tensor, temperature_r: Tensor) -> Tensor:
    """(logits - row maximum) / temperature in float64; at 0 all but the maximum have probability 0.

    Subtracting the maximum first changes no probability, and no temperature can overflow it.
    """
    logits = logits_rv.double()
    scaled = logits - logits.amax(1, keepdim=True)
    return scaled.div_(temperature_r.double().clamp(min=_COLDEST)[:, None])


def filter_top_k(logits_rv: Tensor, top_k_r: Tensor, largest: int | None = None) -> Tensor:
    """-inf below the k-th largest logit of each row; ties with it are kept; k = 0 keeps all.

    largest: the largest entry of top_k_r, where the caller knows it (saves waiting for a device).
    """
    vocab = logits_rv.shape[1]
    largest = int(top_k_r.max()) if largest is None else largest
    if largest == 0:
        return logits_rv
    top = logits_rv.topk(min(largest, vocab), dim=1).values
    index = top_k_r.clamp(1, top.shape[1]) - 1
    threshold = top.gather(1, index[:, None]).where(top_k_r[:, None] > 0, -torch.inf)
    return logits_rv.where(logits_rv >= threshold, -torch.inf)


def filter_top_p(logits_rv: Tensor, top_p_r: Tensor) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities reach top_p.

    A token stays if those more likely than it sum to less than top_p: the one that crosses is kept,
    and so are ties with the last one kept. top_p = 1 keeps all.
    """
    weights = _weights(logits_rv)
    goal_r = top_p_r.double() * weights.sum(1)
    threshold_r = torch.zeros_like(weights[:, 0])
    # Sorting a large vocabulary is the dear part, and its head nearly always reaches top_p; sums
    # are exact, so the answer is the same.
    open_r = top_p_r < 1
    for size in (*_HEADS, weights.shape[1]):
        rows = open_r.nonzero()[:, 0]
        if len(rows) == 0:
            break
        searched = weights if len(rows) == len(weights) else weights[rows]
        head = searched.topk(min(size, weights.shape[1]), dim=1).values
        threshold_r[rows] = _crossing(head, goal_r[rows])
        open_r[rows] = head.sum(1) < goal_r[rows]
    return logits_rv.where(weights >= threshold_r[:, None], -torch.inf)


def _crossing(ordered_rk: Tensor, goal_r: Tensor) -> Tensor:
    """The weight with which the sum of descending weights reaches the goal."""
    before = ordered_rk.cumsum(1) - ordered_rk
    last = (before < goal_r[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
    return ordered_rk.gather(1, last)[:, 0]


def filter_min_p(logits_rv: Tensor, min_p_r: Tensor) -> Tensor:
    """-inf for tokens less than min_p times as likely as their row's likeliest; 0 keeps all."""
    top = logits_rv.amax(1, keepdim=True)
    return logits_rv.where(
        logits_rv >= top + min_p_r.to(logits_rv.dtype).log()[:, None], -torch.inf
    )


def draw(logits_rv: Tensor, uniform_r: Tensor) -> Tensor:
    """Token ids (r,) by inverting the cumulative distribution over ids in ascending order.

    Probabilities are float64, rounded to integers of scale 2**52 and summed exactly: token t is
    drawn if the sum up to t-1 is <= u * total < the sum up to t. A token of weight zero is never
    drawn.
    """
    cumulative = _weights(logits_rv).cumsum(1)
    target = (uniform_r[:, None] * cumulative[:, -1:]).floor().long()
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _weights(logits_rv: Tensor) -> Tensor:
    """Probabilities in units of 2**-52, rounded."""
    return logits_rv.double().softmax(1).mul_(_SCALE).round_().long()


class Choice(NamedTuple):
    """What one step chose, on the CPU."""

    tokens: Tensor  # (r,) int64
    logprobs: Tensor | None  # (r,) in the logits' dtype
    top_ids: Tensor | None  # (r, k) int64
    top_logprobs: Tensor | None  # (r, k)


class Sampler:
    """Chooses one token per row and step, and keeps what penalties need to know.

    params, seeds: one per row; prompts: the rows' prompt ids, 1-D; device: where the logits are.
    """

    def __init__(self, params: list[SamplingParams], seeds: list[int], prompts, vocab: int, device):
        self._vocab, self._device = vocab, device
        self._params: list[SamplingParams] = []
        self._rows: dict[str, Tensor] = {}
        self.append(params, seeds, prompts)

    def append(self, params: list[SamplingParams], seeds: list[int], prompts) -> None:
        """More rows behind the others; their sequences begin."""

        def column(name: str, dtype=torch.float64) -> Tensor:
            values = [getattr(p, name) for p in params]
            return torch.tensor(values, dtype=dtype, device=self._device)

        rows = {
            "temperature": column("temperature"),
            "top_k": column("top_k", torch.int64),
            "top_p": column("top_p"),
            "min_p": column("min_p"),
            "repetition": column("repetition_penalty"),
            "presence": column("presence_penalty"),
            "frequency": column("frequency_penalty"),
            "seed": torch.tensor(seeds, dtype=torch.int64, device=self._device),
        }
        held = len(self._params)
        self._params += params
        self._survey()
        shape = (len(params), self._vocab)
        if self._repetition:
            seen = torch.zeros(shape, dtype=torch.bool)
            for row, ids in zip(seen, prompts):
                row[ids] = True
            rows["seen"] = seen.to(self._device)
        if self._counting:
            rows["counts"] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        if held:
            # Rows to which a table did not apply so far: they have no penalty.
            for name in rows.keys() - self._rows.keys():
                self._rows[name] = rows[name].new_zeros(held, self._vocab)
            rows = {k: torch.cat([self._rows[k], rows[k]]) for k in rows}
        self._rows = rows

    def _survey(self) -> None:
        """What any row asks for; the rest is not computed."""
        params = self._params
        self._any_sampled = any(p.temperature > 0 for p in params)
        self._largest_k = max((p.top_k for p in params), default=0)
        self._any_top_p = any(p.top_p < 1 for p in params)
        self._any_min_p = any(p.min_p > 0 for p in params)
        self._repetition = any(p.repetition_penalty != 1 for p in params)
        self._counting = any(p.presence_penalty or p.frequency_penalty for p in params)
        self._wants_logprobs = any(p.wants_logprobs for p in params)
        most = max((p.alternatives for p in params), default=0)
        self._alternatives = min(most, self._vocab)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in their order."""
        self._rows = {k: v.index_select(0, rows.to(v.device)) for k, v in self._rows.items()}
        self._params = [self._params[i] for i in rows.tolist()]
        self._survey()
        for name, wanted in (("seen", self._repetition), ("counts", self._counting)):
            if not wanted:
                self._rows.pop(name, None)

    def choose(
        self, logits_rv: Tensor, position: int | Tensor, forced_r: Tensor | None = None
    ) -> tuple[Tensor, Choice]:
        """Returns (token ids (r,) on the logits' device, `Choice` on the CPU: one transfer).

        position: index of the token in its sequence, of all rows or (r,); forced_r: (r,) ids that
        replace the choice where they are >= 0. Raises ValueError when a row's logits have no finite
        maximum.
        """
        rows, logits = self._rows, logits_rv
        if self._repetition:
            logits = apply_repetition_penalty(logits, rows["seen"], rows["repetition"])
        if self._counting:
            logits = apply_count_penalties(
                logits, rows["counts"], rows["presence"], rows["frequency"]
            )
        top, tokens = logits.max(dim=1)
        if self._any_sampled:
            tokens = self._draw(logits, position)
        # A NaN or no candidate at all; told by an id, so that nothing waits for the device here.
        tokens = tokens.where(top.isfinite(), -1)
        if forced_r is not None:
            tokens = tokens.where(forced_r < 0, forced_r)
        choice = self._report(logits_rv, tokens)
        if bool((choice.tokens < 0).any()):
            row = int((choice.tokens < 0).int().argmax())
            at = int(torch.as_tensor(position).expand(len(choice.tokens))[row])
            raise ValueError(f"row {row}, new token {at}: the model's logits are not finite")
        if self._repetition:
            rows["seen"].scatter_(1, tokens[:, None], True)
        if self._counting:
            rows["counts"].scatter_add_(1, tokens[:, None], rows["counts"].new_ones(len(tokens), 1))
        return tokens, choice

    def _draw(self, logits: Tensor, position: int | Tensor) -> Tensor:
        rows = self._rows
        # Greedy rows draw at 0: the lowest id among equals, as argmax.
        uniform_r = uniform(rows["seed"], position).where(rows["temperature"] > 0, 0)
        size = max(1, _PART // self._vocab) if logits.device.type == "cpu" else len(logits)
        tokens = []
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            x = apply_temperature(logits[part], rows["temperature"][part])
            if self._largest_k:
                x = filter_top_k(x, rows["top_k"][part], self._largest_k)
            if self._any_top_p:
                x = filter_top_p(x, rows["top_p"][part])
            if self._any_min_p:
                x = filter_min_p(x, rows["min_p"][part])
            tokens.append(draw(x, uniform_r[part]))
        return torch.cat(tokens)

    def _report(self, logits_rv: Tensor, tokens: Tensor) -> Choice:
        if not self._wants_logprobs:
            return Choice(tokens.cpu(), None, None, None)
        logprobs = logits_rv.log_softmax(1)
        chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])
        k = self._alternatives
        top = logprobs.topk(k, dim=1) if k else (logprobs[:, :0], tokens[:, None][:, :0])
        # Ids and float32 values are exact in float64, so that everything travels in one tensor.
        packed = torch.cat(
            [part.double() for part in (tokens[:, None], chosen, top[1], top[0])], dim=1
        ).cpu()
        tokens, chosen, ids, values = packed.split([1, 1, k, k], dim=1)
        dtype = logits_rv.dtype
        return Choice(
            tokens[:, 0].long(),
            chosen[:, 0].to(dtype),
            ids.long() if k else None,
            values.to(dtype) if k else None,
        )

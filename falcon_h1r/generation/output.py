"""What generation hands back: a step at a time, and all of it at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .params import SamplingParams

_SHOWN, _WIDTH = 8, 160  # sequences in a repr, and characters of what each says


class Step(NamedTuple):
    """One new token in every sequence that was still running. Tensors are on the CPU.

    position: index of these tokens in their sequences. sequences: (r,) int64, which sequence each
    entry belongs to. tokens: (r,) int64. logprobs: (r,), or None if no prompt asked; top_ids,
    top_logprobs: (r, k), likeliest first, or None. finished: sequence -> finish reason, of those
        that end here.
    text: sequence -> text that became certain with this token; empty without a tokenizer.
    """

    position: int
    sequences: Tensor
    tokens: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    finished: dict[int, str]
    text: dict[int, str]


class EngineStep(NamedTuple):
    """One new token in every running trace; r may be 0 in a step that only read a prompt's piece.

    number: of the step. traces, positions, tokens: (r,) int64, positions within the trace.
    logprobs: (r,), or None if no running trace asked; top_ids, top_logprobs: (r, k), likeliest
    first, for the largest k asked for, or None. finished: trace -> `stop`, `stop_string` or
    `length`, of those that end here. text: trace -> text that became certain; empty without a
    tokenizer. Tensors are on the CPU.
    """

    number: int
    traces: Tensor
    positions: Tensor
    tokens: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    finished: dict[int, str]
    text: dict[int, str]


class TraceOutput(NamedTuple):
    """What is known of a trace. tokens: (n,) int64; logprobs: (n,), None if it did not ask (the
    likeliest tokens go by in the steps and are not kept). reason: `stop`, `stop_string`, `length`,
    that given to `Engine.end`, or `waiting` or `running`. text: None without a tokenizer."""

    tokens: Tensor
    logprobs: Tensor | None
    reason: str
    text: str | None
    seed: int
    prompt_tokens: int


@dataclass(frozen=True)
class GenerateOutput:
    """The sequences of a batch: prompt i's sample j at index i*n + j of every list.

    sequences: 1-D int64 tensors, prompt excluded, stop token included.
    finish_reasons: "stop" (a stop token), "stop_string", "length", "interrupted" (iteration was
        left early), or the reason given to `Stream.end`.
    logprobs: 1-D tensors, one number per token, None for prompts that did not ask; top_logprobs:
        (ids, values) of shape (tokens, k) each. None altogether if no prompt asked.
    texts: decoded without the stop token and before the stop string; None without a tokenizer.
    seeds: of each sequence; prompt_lengths: tokens of each sequence's prompt.
    """

    sequences: list[Tensor]
    finish_reasons: list[str]
    logprobs: list[Tensor | None] | None
    top_logprobs: list[tuple[Tensor, Tensor] | None] | None
    texts: list[str] | None
    seeds: list[int]
    prompt_lengths: list[int]

    def __repr__(self) -> str:
        """A line for each sequence: its length, why it ended, and what it says."""
        lines = [
            f"  {i}: {len(ids)} tokens, {reason}: "
            + _cut(ids.tolist() if self.texts is None else self.texts[i])
            for i, (ids, reason) in enumerate(zip(self.sequences, self.finish_reasons))
        ]
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} more"]
        count = len(self.sequences)
        return "\n".join([f"GenerateOutput of {count} sequence{'' if count == 1 else 's'}", *lines])

    @property
    def new_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(len(sequence) for sequence in self.sequences)


def _cut(value) -> str:
    """`repr`, without the middle of a long one."""
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH // 2]} ... {text[-_WIDTH // 2 :]}"


def _columns(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() > 1 else 0


def collect(
    steps: list[Step],
    params: Sequence[SamplingParams],
    seeds: list[int],
    prompt_lengths: list[int],
    ended: dict[int, str],
    tokenizer,
) -> GenerateOutput:
    """Put the steps so far together; params, seeds and prompt_lengths: one per sequence."""
    count = len(seeds)
    owners = torch.cat([step.sequences for step in steps]) if steps else torch.zeros(0).long()
    order = owners.argsort(stable=True)
    sizes = owners.bincount(minlength=count).tolist()

    def per_sequence(name: str) -> list[Tensor]:
        """Values of all steps by sequence. Where a step lacks them, or has fewer columns, no row
        of the step asked for more, and zeros stand in their place."""
        parts = [getattr(step, name) for step in steps]
        like = max((part for part in parts if part is not None), key=_columns, default=None)
        if like is None:
            return [torch.zeros(0)] * count
        full = like.new_zeros(len(owners), *like.shape[1:])
        for part, whole in zip(parts, full.split([len(step.sequences) for step in steps])):
            if part is not None:
                whole[(slice(None), *map(slice, part.shape[1:]))] = part
        return list(full[order].split(sizes))

    def wanted(values: list, want) -> list | None:
        if not any(want(p) for p in params):
            return None
        return [value if want(p) else None for value, p in zip(values, params)]

    reasons = {sequence: why for step in steps for sequence, why in step.finished.items()}
    sequences = [ids.long() for ids in per_sequence("tokens")]
    tops = [
        (ids[..., : p.alternatives], values[..., : p.alternatives])
        for p, ids, values in zip(params, per_sequence("top_ids"), per_sequence("top_logprobs"))
    ]
    texts = None
    if tokenizer is not None:
        pieces: list[list[str]] = [[] for _ in range(count)]
        for step in steps:
            for sequence, piece in step.text.items():
                pieces[sequence].append(piece)
        # An unfinished sequence may have text held back: what its tokens say is the whole of it.
        texts = [
            "".join(pieces[i]) if i in reasons else tokenizer.decode(sequences[i].tolist())
            for i in range(count)
        ]
    reasons = {**ended, **reasons}
    return GenerateOutput(
        sequences=sequences,
        finish_reasons=[reasons.get(i, "interrupted") for i in range(count)],
        logprobs=wanted(per_sequence("logprobs"), lambda p: p.wants_logprobs),
        top_logprobs=wanted(tops, lambda p: p.alternatives),
        texts=texts,
        seeds=list(seeds),
        prompt_lengths=list(prompt_lengths),
    )

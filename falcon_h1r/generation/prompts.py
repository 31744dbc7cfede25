"""Prompts in the forms callers have them, checked, as a list of rows; the chunks of a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def read_prompts(input_ids, attention_mask: Tensor | None, vocab_size: int) -> list[Tensor]:
    """One 1-D int64 CPU tensor of real tokens per prompt.

    input_ids: a (b, l) integer tensor, or a sequence with one 1-D integer tensor or list of ints
        per prompt, of any lengths.
    attention_mask: (b, l) beside a tensor only, 1 at real tokens and 0 at padding, which may stand
        before or after a row's tokens, not between them.

    Raises ValueError for other shapes, a prompt without tokens, and ids outside the vocabulary.
    """
    if isinstance(input_ids, Tensor):
        rows = _from_tensor(input_ids, attention_mask)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: only beside a tensor of input_ids, not beside a list")
        rows = _from_sequence(input_ids)
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"input_ids: prompt {number} has no tokens")
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"input_ids: prompt {number} has id {bad}, outside the vocabulary of {vocab_size}"
            )
    return rows


def _from_tensor(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if input_ids.dim() != 2 or len(input_ids) == 0 or not _is_integer(input_ids):
        raise ValueError(
            "input_ids: expected integers of shape (batch, length), "
            f"found {tuple(input_ids.shape)} {input_ids.dtype}"
        )
    ids = input_ids.detach().to("cpu", torch.int64)
    if attention_mask is None:
        return list(ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        found = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: expected a tensor of shape {tuple(input_ids.shape)}, found {found}"
        )
    mask = attention_mask.detach().cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask: expected 1 at real tokens and 0 at padding")
    mask = mask.bool()
    starts = (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).sum(1)
    if int(starts.max()) > 1:
        row = int(starts.argmax())
        raise ValueError(f"attention_mask: row {row} has padding between its real tokens")
    return [row[kept] for row, kept in zip(ids, mask)]


def _from_sequence(input_ids) -> list[Tensor]:
    if not isinstance(input_ids, Sequence) or isinstance(input_ids, str) or len(input_ids) == 0:
        raise ValueError(
            "input_ids: expected a (batch, length) tensor or a list with the ids of each prompt"
        )
    rows = []
    for number, row in enumerate(input_ids):
        try:
            ids = torch.as_tensor(row).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"input_ids: prompt {number} is not a list of ids: {error}") from error
        if ids.dim() != 1 or (len(ids) and not _is_integer(ids)):
            raise ValueError(f"input_ids: prompt {number} is not a list of ids: {row!r:.60}")
        rows.append(ids.long())
    return rows


def _is_integer(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def prefill_chunks(
    rows: list[Tensor], chunk: int | None, device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pieces of a batch of prompts, in order, at most `chunk` columns each.

    Each piece is ids (b, longest), padded on the right, and lengths (b,) on the CPU, or None where
    all rows are equally long: the layout of `Span.plan`. The prompts end together, in the last
    piece; early pieces may hold nothing of a short one.
    """
    longest = max(len(row) for row in rows)
    # Cut from the end, so that the last piece is a full one and the first takes the remainder.
    step = longest if chunk is None else min(chunk, longest)
    ends = range(longest, 0, -step)
    for start, end in [(max(end - step, 0), end) for end in reversed(ends)]:
        before = [longest - len(row) for row in rows]
        parts = [row[max(start - n, 0) : max(end - n, 0)] for row, n in zip(rows, before)]
        lengths = torch.tensor([len(part) for part in parts])
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        yield ids, None if int(lengths.min()) == end - start else lengths


def last_of(x_bld: Tensor, lengths: Tensor | None) -> Tensor:
    """(b, 1, d): what stands at each row's last token."""
    if lengths is None:
        return x_bld[:, -1:]
    rows = torch.arange(len(x_bld), device=x_bld.device)
    return x_bld[rows, lengths.to(x_bld.device) - 1][:, None]

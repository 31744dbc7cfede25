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
    """(input_ids, attention_mask) pieces of a batch, in order, at most `chunk` columns each.

    Rows are padded on the left, so that all of them end in the last piece; early pieces of a short
    row may be nothing but padding. The mask is None where a piece has no padding.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    # Cut from the end, so that the last piece is a full one and the first takes the remainder.
    step = longest if chunk is None else min(chunk, longest)
    ends = range(longest, 0, -step)
    for start, end in [(max(end - step, 0), end) for end in reversed(ends)]:
        piece = mask[:, start:end]
        yield ids[:, start:end].to(device), None if bool(piece.all()) else piece.to(device)

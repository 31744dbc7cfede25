"""Prompts in the forms callers have them, checked, as a list of rows; the chunks of a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks import as_ids, as_mask


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
        rows[number] = as_ids(f"input_ids: prompt {number}", row, vocab_size)
    return rows


def _from_tensor(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if input_ids.dim() != 2 or len(input_ids) == 0:
        raise ValueError(
            f"input_ids: expected the shape (batch, length), found {tuple(input_ids.shape)}"
        )
    ids = input_ids.detach().cpu()
    if attention_mask is None:
        return list(ids)
    mask = as_mask("attention_mask", attention_mask, input_ids.shape).cpu()
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
        if ids.dim() != 1:
            raise ValueError(f"input_ids: prompt {number} is not a list of ids: {row!r:.60}")
        rows.append(ids)
    return rows


def prefill_chunks(
    rows: list[Tensor], chunk: int | None, device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pieces of a batch of prompts, in order, at most `chunk` columns each.

    Each piece is ids (b, longest), padded on the right, and their mask, None where all rows are
    equally long. The prompts end together, in the last piece; early pieces may hold nothing of a
    short one.
    """
    longest = max(len(row) for row in rows)
    # Cut from the end, so that the last piece is a full one and the first takes the remainder.
    step = longest if chunk is None else min(chunk, longest)
    ends = range(longest, 0, -step)
    for start, end in [(max(end - step, 0), end) for end in reversed(ends)]:
        before = [longest - len(row) for row in rows]
        parts = [row[max(start - n, 0) : max(end - n, 0)] for row, n in zip(rows, before)]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        lengths = torch.tensor([len(part) for part in parts], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        yield ids, None if min(map(len, parts)) == ids.shape[1] else mask

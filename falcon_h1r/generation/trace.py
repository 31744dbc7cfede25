"""What an engine knows of a prompt and of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from .params import SamplingParams
from .prompts import prefill_chunks
from .rows import RowText


@dataclass(eq=False)
class Prompt:
    """waiting: traces that are to be forked from it; held: how often it is kept without them.
    pieces: what is still to be read, once it has a row; logits_1v: of its first new token, once all
    of it is read."""

    ids: Tensor
    waiting: int = 0
    held: int = 0
    pieces: Iterator | None = None
    logits_1v: Tensor | None = None

    def begin(self, chunk: int | None, device) -> None:
        """It has an empty row: all of it is to be read."""
        self.pieces, self.logits_1v = prefill_chunks([self.ids], chunk, device), None


@dataclass(eq=False)
class Trace:
    """reason: `waiting`, `running`, or why it ended; pieces: its text, as it became certain."""

    number: int
    prompt: Prompt
    params: SamplingParams
    seed: int
    stops: frozenset[int]
    text: RowText | None
    reason: str = "waiting"
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def need(self) -> int:
        """Tokens it may come to hold, its prompt included."""
        return len(self.prompt.ids) + self.params.max_new_tokens

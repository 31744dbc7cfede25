"""One sequence: where it stops; its text side, what it says and when its thinking is closed."""

from __future__ import annotations

from ..text.stream import IncrementalDecoder, StopMatcher
from ..text.think import CLOSE, OPEN, ThinkSplitter
from .params import SamplingParams

FORCED_TEXT = CLOSE + "\n\n"
# Enough tokens to hold `<think>` and blank space behind it, however the tokenizer cuts them.
_TAIL = 16


class RowText:
    """Follows one sequence's tokens; made for every sequence when there is a tokenizer.

    tokenizer: has `decode(ids)` and `encode(text, add_special_tokens=False)`. prompt: its token
        ids.
    """

    def __init__(self, params: SamplingParams, tokenizer, prompt: list[int]):
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(params.stop)
        self._budget = params.thinking_budget
        self._forced: list[int] = []
        self._taken = 0
        if self._budget is not None:
            ends_open = tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(OPEN)
            self._thinking = ThinkSplitter(opened=ends_open)
            self._closing = tokenizer.encode(FORCED_TEXT, add_special_tokens=False)

    def forced(self) -> int:
        """The id that must come next, -1 if the model is free to choose."""
        if self._budget is None:
            return -1
        if not self._forced and self._taken >= self._budget and self._thinking.inside:
            self._forced = list(self._closing)
        return self._forced[0] if self._forced else -1

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; returns the text that became certain, and whether a stop string came up."""
        self._taken += 1
        if self._forced:
            self._forced.pop(0)
        raw = self._decoder.push(token)
        if self._budget is not None:
            self._thinking.push(raw)
        return self._matcher.push(raw), self._matcher.matched is not None

    def flush(self) -> str:
        """The text held back so far, when no more tokens will come."""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()


def settle(
    token: int, position: int, stops: frozenset[int], params: SamplingParams, text: RowText | None
) -> tuple[str, str | None]:
    """A sequence's new token: (text that became certain, why the sequence ends here or None)."""
    piece, reason = "", None
    if token in stops:
        reason = "stop"
    elif text is not None:
        piece, matched = text.push(token)
        if matched:
            reason = "stop_string"
    if reason is None and position + 1 == params.max_new_tokens:
        reason = "length"
    if reason is not None and text is not None:
        piece += text.flush()
    return piece, reason


def stops_of(params: SamplingParams, default: tuple[int, ...]) -> frozenset[int]:
    """The tokens that end a sequence; default: the model's."""
    return frozenset(default if params.stop_token_ids is None else params.stop_token_ids)


def need_tokenizer(params: SamplingParams, tokenizer) -> None:
    """Raise ValueError if text is needed and there is no tokenizer."""
    if params.needs_tokenizer and tokenizer is None:
        name = "stop" if params.stop else "thinking_budget"
        raise ValueError(f"{name}: needs a tokenizer, and none was given")

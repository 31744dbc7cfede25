"""The reasoning block: telling what a model thought from what it answered."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .stream import overlap

OPEN, CLOSE = "<think>", "</think>"
_BETWEEN = "\n\n"


class Piece(NamedTuple):
    """A run of text of one kind."""

    kind: Literal["thinking", "answer"]
    text: str


def split_thinking(text: str, opened: bool | None = None) -> tuple[str | None, str]:
    """Split generated text into (thinking, answer).

    Text inside `<think> ... </think>` is thinking, text outside is answer; the tags, and the
    newlines that touch them, belong to neither. Several blocks are joined by a blank line, and so
    are several parts of the answer. A block that is never closed takes the rest: the answer is then
    empty or what came before. Inside a block `<think>` is plain text, outside one `</think>` is.

    opened: whether the text begins inside a block, because the prompt ended with `<think>`. None
    finds out: yes if `</think>` comes before any `<think>`.
    thinking is None if there was no block, "" if it was empty.
    """
    if opened is None:
        close, open_ = text.find(CLOSE), text.find(OPEN)
        opened = close >= 0 and (open_ < 0 or close < open_)
    splitter = ThinkSplitter(opened)
    pieces = splitter.push(text) + splitter.flush()
    thinking = "".join(piece.text for piece in pieces if piece.kind == "thinking")
    answer = "".join(piece.text for piece in pieces if piece.kind == "answer")
    return (thinking if splitter.seen else None), answer


class ThinkSplitter:
    """`split_thinking` for text that comes in pieces; the same result however the text is cut.

    A piece is held back while it may be part of a tag, and newlines while a tag may follow them.

    inside: whether the text so far ends inside a block. seen: whether there was a block.
    """

    def __init__(self, opened: bool = False):
        self.inside = self.seen = opened
        self._held = ""
        self._after_tag = opened
        self._wrote = {"thinking": False, "answer": False}
        self._fresh = True  # nothing written since the last tag

    def push(self, text: str) -> list[Piece]:
        """Add text; returns the pieces that are certain, in order, none of them empty."""
        self._held += text
        out: list[Piece] = []
        while True:
            tag = CLOSE if self.inside else OPEN
            at = self._held.find(tag)
            if at >= 0:
                self._write(out, self._held[:at].rstrip("\n"))
                self._held = self._held[at + len(tag) :]
                self.inside = not self.inside
                self.seen = self._after_tag = self._fresh = True
                continue
            # Held back: a beginning of the tag, and the newlines before it.
            settled = self._held[: len(self._held) - overlap(self._held, (tag,))].rstrip("\n")
            self._held = self._held[len(settled) :]
            if self._after_tag:
                self._held = self._held.lstrip("\n") if not settled else self._held
            self._write(out, settled)
            return out

    def flush(self) -> list[Piece]:
        """What was held back, once no more text will come."""
        out: list[Piece] = []
        self._write(out, self._held)
        self._held = ""
        return out

    def _write(self, out: list[Piece], text: str) -> None:
        if self._after_tag:
            text = text.lstrip("\n")
        if not text:
            return
        kind = "thinking" if self.inside else "answer"
        if self._fresh and self._wrote[kind]:
            text = _BETWEEN + text
        self._wrote[kind] = True
        self._fresh = self._after_tag = False
        out.append(Piece(kind, text))

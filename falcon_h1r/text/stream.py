"""Text out of tokens as they come: whole characters only, and the search for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character has at most 3 bytes, and a decoder shows each as at most one mark.
_MOST_PENDING_MARKS = 3


class Decodes(Protocol):
    """What is needed of a tokenizer here; `Tokenizer` and transformers' fast tokenizers have it."""

    def decode(self, ids: list[int]) -> str: ...


class IncrementalDecoder:
    """Turns ids into text one by one, never showing half a character.

    The pieces `push` returns, joined, and `flush` make up the decoding of all ids at once: exactly
    for byte-level tokenizers such as Falcon-H1's, whose decoding is a concatenation of bytes. A
    character whose bytes are spread over several tokens appears with the last of them; bytes that
    can no longer become a character appear as U+FFFD, at the latest in `flush`.
    """

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        # Only a window is decoded again: the ids since the last clean border but one. The ids
        # before that border are kept as context because some decoders treat the first token
        # specially.
        self._window: list[int] = []
        self._border = 0  # ids of the window before the last clean border
        self._shown = 0  # characters of the window's text already given out

    def push(self, token: int) -> str:
        """Add one id; returns the text that became certain, often one word, sometimes nothing."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        bare = text.rstrip(REPLACEMENT)
        settled = max(len(bare), len(text) - _MOST_PENDING_MARKS)
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if bare == text:
            del self._window[: self._border]
            self._border = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """The rest, with U+FFFD for an unfinished character. Call it once, at the end."""
        text = self._tokenizer.decode(self._window) if self._window else ""
        piece = text[self._shown :]
        self._shown = len(text)
        return piece


def overlap(text: str, tags: Sequence[str]) -> int:
    """Length of the longest ending of `text` that is a proper beginning of one of `tags`."""
    longest = min(len(text), max((len(tag) for tag in tags), default=1) - 1)
    for size in range(longest, 0, -1):
        ending = text[-size:]
        if any(len(tag) > size and tag.startswith(ending) for tag in tags):
            return size
    return 0


class StopMatcher:
    """Cuts text before the first stop string, holding back what may turn out to be its beginning.

    The first match is the one that is complete first, and the longest of those complete with the
    same character; so it does not depend on how the text is cut into pieces. After a match the
    matcher is done: `matched` is set and nothing more comes out.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what is certain to lie before any stop string."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [
            (at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0
        ]
        if found:
            _, at, self.matched = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = overlap(self._held, self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        out, self._held = self._held, ""
        return out

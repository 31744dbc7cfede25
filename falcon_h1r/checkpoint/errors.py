"""The one exception of this room."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, trusted or written.

    The message is one line naming the file, the tensor where there is one, what was found and what
    was expected.
    """

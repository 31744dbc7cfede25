"""What a sequence remembers: keys and values, the convolution's window, the SSM state.

Axes: N layers, b rows, j key/value heads, s positions, e head size, v conv history, c conv
channels, h SSM heads, p channels per head, n state size.

A cache is a value: named tensors and a length per row. Padding never enters it, so rows may have
any lengths, and forking (`expand`), dropping or reordering (`select`) rows is indexing. An SSM
state cannot be cropped to fewer tokens: `snapshot` before, `restore` after.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_file import read_tensors, write_tensors
from .checks import check_integer
from .precision import compute_dtype
from .rope import rotary_table

TENSORS = ("keys", "values", "windows", "states")


class Cache:
    """The memory of a batch of sequences.

    keys, values: (N, b, j, max_length, e), windows: (N, b, v, c), in the model's dtype; states:
    (N, b, h, p, n) float32 (float64 in a float64 model); lengths: (b,) int64 on the CPU, tokens
    seen per row, ~tokens within a forward. Made by `model.new_cache`, advanced by `model(...)`.
    """

    def __init__(self, keys, values, windows, states, lengths):
        self.keys, self.values, self.windows, self.states = keys, values, windows, states
        self.lengths, self._layers = lengths, None

    @classmethod
    def alloc(cls, config, batch_size: int, max_length: int, dtype, device) -> Cache:
        """Zeros for `batch_size` rows of up to `max_length` tokens each."""
        check_integer("batch_size", batch_size, 1)
        check_integer("max_length", max_length, 1)
        layout = _layout(config, batch_size, max_length, dtype)
        tensors = (torch.zeros(shape, dtype=kind, device=device) for shape, kind in layout.values())
        return cls(*tensors, torch.zeros(batch_size, dtype=torch.int64, device="cpu"))

    def check(self, config, batch_size: int, dtype, device) -> None:
        """Raise ValueError unless the cache is one that `alloc` makes for these arguments."""
        if self.batch_size != batch_size:
            raise ValueError(f"cache has {self.batch_size} rows, input_ids {batch_size}")
        layout = _layout(config, batch_size, self.max_length, dtype)
        for name, (shape, kind) in layout.items():
            tensor = getattr(self, name)
            found = (tuple(tensor.shape), tensor.dtype, tensor.device)
            if found != (shape, kind, device):
                raise ValueError(
                    f"cache: {name} is {list(found[0])} {found[1]} on {found[2]}, this "
                    f"model expects {list(shape)} {kind} on {device}"
                )

    def require_room(self, ends: Tensor) -> None:
        """Raise ValueError where a row cannot hold ends (b,) tokens; on the CPU."""
        if int(self.lengths.min()) < 0:
            raise ValueError("cache: a forward was interrupted in it; restore a snapshot")
        if int(ends.max()) > self.max_length:
            past = int(self.lengths[row := int(ends.argmax())])
            raise ValueError(
                f"cache full: row {row} holds {past} of {self.max_length} positions and "
                f"{int(ends[row]) - past} more were given"
            )

    batch_size = property(lambda self: self.keys.shape[1])
    max_length = property(lambda self: self.keys.shape[3], doc="Tokens a row can hold.")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, filled or not."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def layers(self) -> list[LayerCache]:
        """Views of each layer's tensors, made once and together: else they are many operators."""
        if self._layers is None:
            views = (getattr(self, name).unbind() for name in TENSORS)
            self._layers = [LayerCache(*layer) for layer in zip(*views)]
        return self._layers

    def expand(self, n: int) -> Cache:
        """A new cache with every row n times: row i becomes rows i*n to i*n + n - 1."""
        check_integer("n", n, 1)
        return self.select(torch.arange(self.batch_size).repeat_interleave(n))

    def select(self, rows) -> Cache:
        """A new cache of the given rows (integers), in their order; a row may be given twice."""
        rows = torch.as_tensor(rows, device="cpu").flatten()
        whole = not rows.is_floating_point() and rows.dtype is not torch.bool
        if not (whole and len(rows) and 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size):
            raise ValueError(f"rows: {rows.tolist()}, expected some of 0 .. {self.batch_size - 1}")
        rows = rows.long()  # bytes would index as a mask
        on_device = rows.to(self.keys.device)
        tensors = (getattr(self, name).index_select(1, on_device) for name in TENSORS)
        return Cache(*tensors, self.lengths[rows])

    def snapshot(self) -> Cache:
        """A copy of the present content; its max_length is the longest row."""
        tensors = self._first(max(int(self.lengths.max()), 1))
        return Cache(*(tensor.clone() for tensor in tensors), self.lengths.clone())

    def restore(self, snapshot: Cache) -> None:
        """Go back to a snapshot of this cache, in place."""
        filled = snapshot.max_length
        pairs = list(zip(self._first(filled), snapshot._first(filled)))
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            raise ValueError(
                f"snapshot of {snapshot.batch_size} rows and {filled} positions does not fit"
            )
        for target, source in pairs:
            target.copy_(source)
        self.lengths.copy_(snapshot.lengths)

    def _first(self, filled: int) -> tuple[Tensor, ...]:
        """TENSORS, of keys and values the first `filled` positions."""
        return self.keys[..., :filled, :], self.values[..., :filled, :], self.windows, self.states

    def save(self, path: str | Path, model) -> None:
        """Write the content as one safetensors file, with the fingerprint of `model`."""
        content = self.snapshot()
        write_tensors(path, {name: getattr(content, name) for name in (*TENSORS, "lengths")}, model)

    @classmethod
    def load(cls, path: str | Path, model, max_length: int | None = None) -> Cache:
        """Read a file of `save`, with room for max_length tokens, at least the stored ones.

        Raises ValueError for another file, and for one that another config or weights made.
        """
        content = cls(**read_tensors(path, _layout, model))
        check_integer("max_length", max_length, content.max_length, none=True)
        cache = model.new_cache(content.batch_size, max_length or content.max_length)
        cache.restore(content)
        return cache


def _layout(config, batch_size: int, max_length: int, dtype) -> dict[str, tuple]:
    """Shape and dtype of each tensor of a cache, in the order of TENSORS."""
    c, rows = config, (config.num_hidden_layers, batch_size)
    kv = (*rows, c.num_key_value_heads, max_length, c.head_dim)
    window = (*rows, c.mamba_d_conv - 1, c.conv_dim)
    state = (*rows, c.mamba_n_heads, c.mamba_head_dim, c.mamba_d_state)
    kinds = (kv, dtype), (kv, dtype), (window, dtype), (state, compute_dtype(dtype))
    return dict(zip(TENSORS, kinds))


class LayerCache(NamedTuple):
    """Views of one layer's part of a `Cache`; written by the layer, values only, never a graph."""

    keys_bjse: Tensor
    values_bjse: Tensor
    window_bvc: Tensor
    state_bhpn: Tensor

    def write_keys(self, k_bjle: Tensor, v_bjle: Tensor, span: Span) -> None:
        """Put the new keys and values behind what each row already holds."""
        for target, new in ((self.keys_bjse, k_bjle.detach()), (self.values_bjse, v_bjle.detach())):
            if span.past_b is None or span.key_lengths_b is None:
                target[:, :, span.total - new.shape[2] : span.total] = new
            elif span.is_step:
                target[torch.arange(len(new), device=new.device), :, span.past_b] = new[:, :, 0]
            else:
                rows, columns = (~span.padding_bl).nonzero(as_tuple=True)
                target[rows, :, span.past_b[rows] + columns] = new[rows, :, columns]

    def write_mixer(self, window_bvc: Tensor, state_bhpn: Tensor) -> None:
        self.window_bvc.copy_(window_bvc.detach())
        self.state_bhpn.copy_(state_bhpn.detach())


class Span(NamedTuple):
    """Where the tokens of one forward stand: the same for all layers.

    Inside the model a batch is always right-padded: `lengths_b[r]` real tokens, then padding.
    """

    cos_bli: Tensor  # rotary table, (b or 1, l, e/2)
    sin_bli: Tensor
    lengths_b: Tensor | None  # real new tokens per row; None: all are real
    padding_bl: Tensor | None  # True at padding; None: rows are level and without padding
    seq_idx_bl: Tensor | None  # packed documents, numbered along the row
    past_b: Tensor | None  # tokens each row already holds; None: none in any row
    key_lengths_b: Tensor | None  # keys each row holds afterwards; None: `total` in all rows
    total: int  # longest row after this forward, padding included where rows started level
    is_step: bool  # one real token per row, with a cache

    @classmethod
    def plan(cls, config, cache: Cache | None, tokens, lengths, seq_idx_bl, dtype) -> Span:
        """Lay out new tokens (b, l, ...) behind `cache`; lengths: (b,) on the CPU or None.

        Raises ValueError when a row would outgrow the cache.
        """
        (b, l), device = tokens.shape[:2], tokens.device
        past = torch.zeros(b, dtype=torch.int64) if cache is None else cache.lengths
        ends = past + (l if lengths is None else lengths)
        if cache is not None:
            cache.require_room(ends)
        level = bool((past == past[0]).all())
        column_l = torch.arange(l, device=device)
        past_on_device = past.to(device)
        if seq_idx_bl is not None:
            starts = torch.nn.functional.pad(seq_idx_bl[:, 1:] != seq_idx_bl[:, :-1], (1, 0))
            position_bl = column_l - (column_l * starts).cummax(dim=1).values
        elif level:
            position_bl = (column_l + int(past[0]))[None]
        else:
            position_bl = past_on_device[:, None] + column_l
        lengths_b = None if lengths is None else lengths.to(device)
        padding_bl = None
        if lengths_b is not None or not level:
            real = torch.full((b,), l, device=device) if lengths_b is None else lengths_b
            padding_bl = column_l >= real[:, None]
        return cls(
            *rotary_table(position_bl, config.head_dim, config.rope_theta, dtype),
            lengths_b=lengths_b,
            padding_bl=padding_bl,
            seq_idx_bl=seq_idx_bl,
            past_b=past_on_device if cache is not None and int(past.max()) > 0 else None,
            key_lengths_b=None if level else ends.to(device),
            total=int(past[0]) + l if level else int(ends.max()),
            is_step=cache is not None and l == 1 and lengths is None,
        )

    @classmethod
    def step(cls, config, past_b: Tensor, max_length: int, dtype) -> Span:
        """One new token in every row behind past_b (b,) others, known to the device alone.

        So a step can be captured once and replayed. Layers get all `max_length` positions of the
        cache, of which key_lengths_b count.
        """
        return cls(
            *rotary_table(past_b[:, None], config.head_dim, config.rope_theta, dtype),
            lengths_b=None,
            padding_bl=None,
            seq_idx_bl=None,
            past_b=past_b,
            key_lengths_b=past_b + 1,
            total=max_length,
            is_step=True,
        )

"""A row of our cache as the state of a sequence in llama.cpp.

So a benchmark stands behind any depth without reading so many tokens, and behind the same keys,
values and states as everybody. The layout is that of `llama_state_seq_get_data` in llama-cpp-python
0.3.36 and xllamacpp 2026.10.11549; `LlamaPeer.stand` compares its size before it is used. Integers
are little-endian: a header, then the attention's cells and the recurrent cell.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache

GAPS = (0, 8)  # bytes before the first layer's keys: in llama-cpp-python, in xllamacpp
_TYPES = {torch.float32: 0, torch.float16: 1}  # of ggml
_FLOAT32 = 0


def row_state(
    cache: Cache,
    row: int,
    depth: int,
    kv_dtype: torch.dtype,
    flash: bool,
    streams: int,
    head: bytes,
    gap: int,
) -> bytearray:
    """The first `depth` tokens of a row.

    kv_dtype: of llama.cpp's keys and values; flash: without flash attention its values lie
    transposed; streams: its number of sequences; head: the first eight bytes of any state; gap: one
    of `GAPS`.
    """
    layers, kind = len(cache.keys), _TYPES[kv_dtype]
    out = bytearray(head)
    # Position, number of sequences, the sequence.
    cells = np.stack([np.arange(depth), np.ones(depth), np.zeros(depth)], 1).astype("<i4")
    out += struct.pack("<2I", streams, depth) + cells.tobytes()
    out += struct.pack("<2I", not flash, layers) + bytes(gap)
    for tensor, transposed in ((cache.keys, False), (cache.values, not flash)):
        for layer in range(layers):
            rows = tensor[layer, row, :, :depth].to(kv_dtype).transpose(0, 1).flatten(1)
            width, item = rows.shape[1], kv_dtype.itemsize
            if transposed:
                out += struct.pack("<i2I", kind, item, width)
            else:
                out += struct.pack("<iQ", kind, width * item)
            out += _raw(rows.T if transposed else rows)
    out += bytes(4 * (streams - 1))  # the others have no cells here
    out += struct.pack("<5I", 1, depth - 1, 0, 0, layers)
    for tensor in (cache.windows[:, row].mT, cache.states[:, row]):
        for value in tensor:
            out += struct.pack("<iQ", _FLOAT32, 4 * value.numel()) + _raw(value.float())
    return out


def _raw(tensor: Tensor) -> memoryview | bytes:
    # A window of no tokens is none: memoryview refuses it.
    return memoryview(tensor.contiguous().numpy()).cast("B") if tensor.numel() else b""

"""llama.cpp beside ours: logits of a prefill or of decode steps."""

from __future__ import annotations

import numpy as np
import torch

from ..bench.llama_library import library, why_not
from ..bench.llama_peer import LlamaPeer
from .dump import Inputs
from .parity import Peer


def llama_peer() -> Peer:
    """Raises ValueError where no package serves it."""
    if reason := why_not():
        raise ValueError(f"--against llama.cpp: {reason}")
    return Peer("llama.cpp", f"({library().source})", _trace)


def _trace(model, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Row by row, with a float32 cache and without flash attention."""
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"--against llama.cpp: float32 and bfloat16, not {model.dtype}")
    b, l = inputs.ids.shape
    peer = LlamaPeer(model, dtype=model.dtype, kv_dtype=torch.float32, max_length=l + 1)
    try:
        rows = [_row(peer, ids, inputs.pieces) for ids in inputs.ids.tolist()]
    finally:
        peer.close()
    return {"logits": torch.from_numpy(np.stack(rows))}


def _row(peer: LlamaPeer, ids: list[int], pieces) -> np.ndarray:
    if pieces is None:
        return peer.read(ids, every=True)
    first = pieces[0]
    rows = [peer.read(ids[:first], every=True)]
    rows += [peer.step([ids[i]], i) for i in range(first, len(ids))]
    return np.concatenate(rows)

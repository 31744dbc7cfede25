"""Decode steps as a captured CUDA graph: launched as one, not kernel by kernel from Python.

A step of Falcon-H1R-7B launches about a thousand kernels. In small batches each takes a few
microseconds, and Python many more to launch it; a graph is launched at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import Cache, Span
from ..precision import compute_dtype


class DecodeStep:
    """`model(tokens[:, None], cache=cache)` for one token after another, logits (b, vocab).

    The first call runs kernel by kernel, so that everything is compiled and loaded; the second is
    captured, which needs tensors that stay where they are: the cache's, the last tokens, and
    past_b (b,), how many tokens each row holds, which the graph counts on itself. The cache's
    lengths on the CPU follow. Nothing but these steps may advance the cache meanwhile; rows may
    hold different numbers of tokens. What is returned is overwritten by the next call.
    """

    def __init__(self, model, cache: Cache):
        self._model, self._cache = model, cache
        self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
        self.past_b = cache.lengths.to(model.device, copy=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, tokens_b: Tensor) -> Tensor:
        """tokens_b: (b,) integers. Raises ValueError when a row is full."""
        cache = self._cache
        if int(cache.lengths.max()) >= cache.max_length:
            row = int(cache.lengths.argmax())
            raise ValueError(f"cache full: row {row} holds all {cache.max_length} positions")
        self._tokens.copy_(tokens_b[:, None])
        if self._logits is None:
            self._logits = self._on_a_side_stream()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
        cache.lengths += 1
        return self._logits

    @torch.no_grad()
    def _step(self) -> Tensor:
        model, cache = self._model, self._cache
        dtype = compute_dtype(model.dtype)
        span = Span.step(model.config, self.past_b, cache.max_length, dtype)
        logits = model.logits(model.run(model.embed(self._tokens), span, cache))[:, -1]
        self.past_b += 1
        return logits

    def _on_a_side_stream(self) -> Tensor:
        """As capturing asks of the work before it."""
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            logits = self._step()
        torch.cuda.current_stream(self._model.device).wait_stream(stream)
        return logits

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._model.device), torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph

"""llama.cpp as a peer: our weights in a GGUF file, through its C functions.

Token ids go in and logits come out; its sampling, tokenizer and server stay out. What its settings
do not change: the recurrent state and the convolution's window are float32. With flash attention
its graph casts keys and values to float16 even where the cache holds float32, so as a float32 peer
it runs without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..cache import Cache
from ..checkpoint.gguf import save_gguf
from ..model import FalconH1ForCausalLM
from .llama_library import library
from .llama_state import GAPS, row_state


class LlamaPeer:
    """`model` in llama.cpp, on the CPU, until `close()`.

    dtype: of the matrices, float32 or bfloat16. kv_dtype: of keys and values, float16 (its default)
    or float32. threads: None for torch's number. max_length: tokens per sequence; max_sequences:
    rows decoded at once. batch, micro_batch: tokens per call and per pass, n_batch and n_ubatch.
    file: a GGUF file that `save_gguf` wrote of this model in this dtype; None: written, and removed
    by `close()`. observer: a ggml_backend_sched_eval_callback that sees every tensor of the graph;
    the caller keeps it alive.
    Raises `CheckpointError` for a model that GGUF cannot carry, RuntimeError with what llama.cpp
    logged where it refuses the file, the settings or, later, tokens beyond max_length.
    """

    def __init__(
        self,
        model: FalconH1ForCausalLM,
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype = torch.float16,
        flash_attention: bool = False,
        threads: int | None = None,
        max_length: int = 4096,
        max_sequences: int = 1,
        batch: int = 2048,
        micro_batch: int = 512,
        file: str | None = None,
        observer: Any = None,
    ):
        self._lib, _, self._messages, _ = library()
        lib, self.vocab_size = self._lib, model.config.vocab_size
        self._kv_dtype, self._flash, self._rows = kv_dtype, flash_attention, max_sequences
        self._held: list[ctypes.Array] = []
        with contextlib.ExitStack() as stack:
            path = file
            if file is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())  # the file is mapped
                path = os.path.join(folder, "model.gguf")
                save_gguf(model, path, dtype=dtype)
            settings = lib.llama_model_default_params()
            settings.n_gpu_layers = 0
            loaded = lib.llama_model_load_from_file(os.fsencode(path), settings)
            self._need(loaded, "load the file")
            stack.callback(lib.llama_model_free, loaded)
            kinds = {torch.float32: lib.GGML_TYPE_F32, torch.float16: lib.GGML_TYPE_F16}
            settings = lib.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = max_length * max_sequences, max_sequences
            settings.n_batch, settings.n_ubatch = batch, micro_batch
            settings.n_threads = settings.n_threads_batch = threads or torch.get_num_threads()
            settings.type_k = settings.type_v = kinds[kv_dtype]
            settings.flash_attn_type = int(flash_attention)  # 0 disabled, 1 enabled, -1 either
            if observer is not None:
                kind = dict(settings._fields_)["cb_eval"]
                settings.cb_eval = ctypes.cast(observer, kind)
            self._context = lib.llama_init_from_model(loaded, settings)
            self._need(self._context, "make a context")
            stack.callback(lib.llama_free, self._context)
            self._memory = lib.llama_get_memory(self._context)
            self._batch, self._capacity = lib.llama_batch_init(batch, 0, 1), batch
            stack.callback(lib.llama_batch_free, self._batch)
            self.close = stack.pop_all().close

    def read(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """Read a prompt into the emptied memory; its last (or `every`) logits, (1 or l, vocab)."""
        self._lib.llama_memory_clear(self._memory, False)
        out = []
        for start in range(0, len(ids), self._capacity):
            piece = range(start, min(start + self._capacity, len(ids)))
            out += self._decode([(ids[i], i, 0, every or i == len(ids) - 1) for i in piece])
        return np.stack(out)

    def spread(self, batch: int) -> None:
        """Copy the sequence that was read: rows 0 .. batch - 1 of `step` go on behind it."""
        for sequence in range(1, batch):
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def step(self, tokens: Sequence[int], position: int) -> np.ndarray:
        """One token for each row; logits (batch, vocab)."""
        return np.stack(self._decode([(t, position, row, True) for row, t in enumerate(tokens)]))

    def stand(self, cache: Cache, depth: int) -> None:
        """Replace all rows by the first `depth` tokens of our cache's, and `hold` them.

        Raises RuntimeError where this version lays its state out otherwise.
        """
        lib, context = self._lib, self._context
        lib.llama_memory_clear(self._memory, True)
        self._decode([(0, 0, 0, True)])
        own = bytes(self._state(0, 0))
        options = (self._kv_dtype, self._flash, self._rows, own[:8])
        gap = len(own) - len(row_state(cache, 0, 1, *options, gap=0))
        self._need(gap in GAPS, "keep its state in a layout known here")
        lib.llama_memory_clear(self._memory, True)
        for row in range(cache.batch_size):
            state = row_state(cache, row, depth, *options, gap)
            raw = (ctypes.c_uint8 * len(state)).from_buffer(state)
            taken = lib.llama_state_seq_set_data(context, raw, len(state), row)
            self._need(taken == len(state), f"take a state of {depth} tokens")
        self.hold(cache.batch_size)

    def hold(self, batch: int) -> None:
        """Remember the recurrent states of rows 0 .. batch - 1, for `set_back`."""
        part = self._lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        self._held = [self._state(row, part) for row in range(batch)]

    def set_back(self, depth: int) -> None:
        """Return to the `depth` tokens at which `hold` was called."""
        lib, part = self._lib, self._lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        for row, raw in enumerate(self._held):
            taken = lib.llama_state_seq_set_data_ext(self._context, raw, len(raw), row, part)
            done = taken and lib.llama_memory_seq_rm(self._memory, row, depth, -1)
            self._need(done, f"go back to {depth} tokens")

    def _state(self, row: int, flags: int) -> ctypes.Array:
        size = self._lib.llama_state_seq_get_size_ext(self._context, row, flags)
        raw = (ctypes.c_uint8 * size)()
        taken = self._lib.llama_state_seq_get_data_ext(self._context, raw, size, row, flags)
        self._need(taken == size, "give its state")
        return raw

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        # rows: token, position, sequence, whether its logits are wanted
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        self._need(self._lib.llama_decode(self._context, batch) == 0, f"decode {len(rows)} tokens")
        self._lib.llama_synchronize(self._context)
        get, shape = self._lib.llama_get_logits_ith, (self.vocab_size,)
        pointers = [get(self._context, i) for i, row in enumerate(rows) if row[3]]
        return [np.ctypeslib.as_array(pointer, shape).copy() for pointer in pointers]

    def _need(self, result, what: str) -> None:
        if not result:
            raise RuntimeError(f"llama.cpp does not {what}: {' '.join(self._messages[-2:])}")

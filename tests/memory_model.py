"""A model that says what its cache remembers, and NaN where the cache's parts disagree.

Its next token is a function of all tokens of a row, read back from keys, values, window and state,
so that whatever an engine does to rows shows in what it says. `said` is the same in plain Python.
"""

import torch
from models import make_config
from torch.multiprocessing.reductions import StorageWeakRef

from falcon_h1r.cache import TENSORS, Cache
from falcon_h1r.generation import Engine

VOCAB = 89
_PRIME = 99991
CONFIG = make_config(
    vocab_size=VOCAB,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    mamba_d_ssm=4,
    mamba_n_heads=1,
    mamba_d_head=4,
    mamba_n_groups=1,
    mamba_d_state=2,
    max_position_embeddings=4096,
)


def _fold(state: int, token: int) -> int:
    return (31 * state + token + 1) % _PRIME


def _next(state: int, length: int) -> int:
    return (state // 7 + 3 * length) % VOCAB


def said(prompt, new: int, stops=()) -> list[int]:
    """What the model says behind a prompt, up to `new` tokens or a stop."""
    state, length, out = 0, 0, []
    for token in prompt:
        state, length = _fold(state, token), length + 1
    while len(out) < new and not (out and out[-1] in stops):
        out.append(_next(state, length))
        state, length = _fold(state, out[-1]), length + 1
    return out


class MemoryModel:
    """Calls are recorded: `read` counts prompt tokens, `reads` lists (first id, tokens) of pieces,
    `widths` the rows of each decode step; `most_held`: bytes of the caches alive at one time."""

    device, dtype, eos_token_ids = torch.device("cpu"), torch.float32, ()

    def __init__(self, config=CONFIG):
        self.config = config
        self.reads: list[tuple[int, int]] = []
        self.widths: list[int] = []
        self._storages: list[tuple[StorageWeakRef, int]] = []
        self.most_held = 0

    @property
    def read(self) -> int:
        return sum(count for _, count in self.reads)

    def held(self) -> int:
        """Bytes of caches whose memory is not freed, whoever holds it."""
        return sum(size for ref, size in self._storages if not ref.expired())

    def new_cache(self, rows: int, length: int) -> Cache:
        cache = Cache.alloc(self.config, rows, length, self.dtype, self.device)
        tensors = [getattr(cache, name) for name in TENSORS]
        self._storages += [(StorageWeakRef(t.untyped_storage()), t.nbytes) for t in tensors]
        self.most_held = max(self.most_held, self.held())
        return cache

    def __call__(self, ids, attention_mask=None, cache=None, logits_to_keep=0):
        assert attention_mask is None and logits_to_keep == 1
        past = cache.lengths.tolist()
        self.reads.append((past[0], ids.shape[1]))
        logits = self._read(ids, past, cache)
        cache.lengths += ids.shape[1]
        return logits

    def embed(self, ids):
        return ids

    def run(self, ids, span, cache):
        self.widths.append(len(ids))
        assert span.total <= cache.max_length
        return self._read(ids, span.past_b.tolist(), cache)

    def logits(self, logits):
        return logits

    def _read(self, ids, past: list[int], cache):
        logits = torch.full((len(ids), 1, self.config.vocab_size), -9.0)
        for row, tokens in enumerate(ids.tolist()):
            held = self._write(cache, row, past[row], tokens)
            if held is None:
                logits[row] = torch.nan
            else:
                logits[row, 0, _next(*held)] = 9.0
        return logits

    def _write(self, cache, row: int, past: int, tokens: list[int]):
        """Add tokens to a row; (state, length), or None where its parts disagree."""
        for layer in range(self.config.num_hidden_layers):
            for at, token in enumerate(tokens, past):
                cache.keys[layer, row, 0, at, 0] = token
                cache.values[layer, row, 0, at, 0] = token + 0.5
                window = cache.windows[layer, row]
                window[:-1] = window[1:].clone()
                window[-1, 0] = token + 1
                state = cache.states[layer, row, 0, 0]
                old = float(state[0])
                state[0] = _fold(int(old), token) if old == old else old
        length = past + len(tokens)
        expected = cache.keys[0, row, 0, :length, 0].tolist()
        state = 0
        for token in expected:
            state = _fold(state, int(token)) if token == token else -1
        taps = self.config.mamba_d_conv - 1
        window = [token + 1 for token in [-1] * taps + expected][-taps:]
        for layer in range(self.config.num_hidden_layers):
            agrees = (
                cache.keys[layer, row, 0, :length, 0].tolist() == expected
                and cache.values[layer, row, 0, :length, 0].tolist() == [t + 0.5 for t in expected]
                and cache.windows[layer, row, :, 0].tolist() == window
                and float(cache.states[layer, row, 0, 0, 0]) == state
            )
            if not agrees:
                return None
        return state, length


def garble_free_rows(engine: Engine) -> None:
    """What no one may read: NaN in the states of rows where nobody is, finite rubbish, as a mask
    multiplies it by zero, behind the keys of the others."""
    slots = engine._slots
    if slots.cache is None:
        return
    cache, taken = slots.cache, {*range(slots.count), *slots.prompts.values()}
    for row in range(slots.rows):
        filled = int(cache.lengths[row]) if row in taken else 0
        for tensor in (cache.keys, cache.values):
            tensor[:, row, :, filled:] = 77.0
        if row not in taken:
            cache.windows[:, row] = torch.nan
            cache.states[:, row] = torch.nan
            cache.lengths[row] = 13

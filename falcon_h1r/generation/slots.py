"""The memory of an engine: one cache whose rows are traces, prompts, or free.

Running traces lie in the first rows, side by side, so that a step computes a view of the cache;
prompts that others are forked from lie at the other end. A row costs the same whoever is in it, so
that a memory budget is a number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

from ..cache import TENSORS, Cache
from ..cost import in_units, kv_bytes, state_bytes
from ..cpu.compiled import ROOM


class Plan(NamedTuple):
    """How many rows of how many bytes a budget allows; `str` says it in words.

    rows: of the cache, prompts included; tokens: room of each; row_bytes = state_bytes + kv_bytes,
    by the formulas of `cost`; budget: bytes, or None; limit: what bounds the rows, `max_rows` or
    `memory_budget`.
    """

    rows: int
    tokens: int
    row_bytes: int
    state_bytes: int
    kv_bytes: int
    budget: int | None
    limit: str

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"memory budget {in_units(self.budget)}: "
        return (
            f"{budget}{self.rows} row{'' if self.rows == 1 else 's'} of "
            f"{in_units(self.row_bytes)} ({in_units(self.state_bytes)} of state, "
            f"{in_units(self.kv_bytes)} of keys and values for {self.tokens:,} tokens), "
            f"limited by {self.limit}"
        )


def plan(config, dtype, tokens: int, most_rows: int, budget: int | None) -> Plan:
    """Rows for traces of up to `tokens` tokens, prompt included; 0 where not one fits."""
    tokens = -(-(tokens - 1) // ROOM) * ROOM + 1
    state, kv = sum(state_bytes(config, dtype).values()), kv_bytes(config, tokens, dtype)
    rows, limit = most_rows, "max_rows"
    if budget is not None and budget // (state + kv) < most_rows:
        rows, limit = budget // (state + kv), "memory_budget"
    return Plan(rows, tokens, state + kv, state, kv, budget, limit)


class Slots:
    """Rows 0 .. count-1 of `cache` are running traces, the last len(prompts) rows are prompts.

    prompts: key -> row. forms: what a step's owner made for views of `cache`, by their width; gone
    when the cache is.
    """

    def __init__(self, model):
        self._model = model
        self.cache: Cache | None = None
        self.count = 0
        self.prompts: dict[object, int] = {}
        self.forms: dict[int, object] = {}

    @property
    def rows(self) -> int:
        return 0 if self.cache is None else self.cache.batch_size

    @property
    def length(self) -> int:
        """Tokens a row can hold."""
        return 0 if self.cache is None else self.cache.max_length

    @property
    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    @property
    def free(self) -> int:
        return self.rows - self.count - len(self.prompts)

    def resize(self, rows: int, length: int) -> None:
        """Another cache with the same content. Holds both for a moment, unless nobody is in it."""
        assert rows >= self.count + len(self.prompts), (rows, self.count, self.prompts)
        old, self.cache = self.cache, None
        self.forms.clear()  # they hold the old cache's memory
        if self.count == len(self.prompts) == 0:
            old = None  # freed before the new one is made
        new = self._model.new_cache(rows, length)
        shift = 0 if old is None else rows - old.batch_size
        for row in range(self.count):
            _copy_row(new, row, old, row)
        for key, row in self.prompts.items():
            self.prompts[key] = row + shift
            _copy_row(new, row + shift, old, row)
        self.cache = new

    def view(self, rows: int, start: int = 0) -> Cache:
        """Rows start .. start + rows - 1 as a cache of their own, over the same memory."""
        cache, part = self.cache, slice(start, start + rows)
        return Cache(*(getattr(cache, name)[:, part] for name in TENSORS), cache.lengths[part])

    def take_prompt(self, key) -> None:
        """Give an empty row to a prompt, for it to be read into."""
        assert self.free
        row = self.prompts[key] = self.rows - len(self.prompts) - 1
        # Keys of an earlier tenant lie behind `lengths` and are not read; its state would be.
        self.cache.lengths[row] = 0
        self.cache.windows[:, row].zero_()
        self.cache.states[:, row].zero_()

    def drop_prompt(self, key) -> None:
        lowest = self.rows - len(self.prompts)
        hole = self.prompts.pop(key)
        for other, row in self.prompts.items():
            if row == lowest:
                _copy_row(self.cache, hole, self.cache, row)
                self.prompts[other] = hole

    def fork(self, key) -> None:
        """Add a running trace that has read a prompt, in a free row."""
        assert self.free
        _copy_row(self.cache, self.count, self.cache, self.prompts[key])
        self.count += 1

    def become(self, key) -> None:
        """Make the prompt itself a running trace: it needs no further row."""
        if self.free:
            self.fork(key)
            self.drop_prompt(key)
            return
        row = self.prompts.pop(key)
        for other, place in self.prompts.items():
            if place == self.count:  # change places with the prompt that lies behind the traces
                content = self.cache.select([row])
                _copy_row(self.cache, row, self.cache, place)
                _copy_row(self.cache, place, content, 0)
                self.prompts[other] = row
        self.count += 1

    def keep(self, rows: list[int]) -> list[int]:
        """Leave only these running traces (ascending); returns which old row is in each row now.

        Holes are filled from the end, so that few rows move.
        """
        count = len(rows)
        holes = sorted(set(range(count)) - set(rows))
        order = list(range(count))
        for hole, row in zip(holes, [row for row in rows if row >= count]):
            _copy_row(self.cache, hole, self.cache, row)
            order[hole] = row
        self.count = count
        return order


def _copy_row(target: Cache, to: int, source: Cache, row: int) -> None:
    filled = int(source.lengths[row])
    for name in ("keys", "values"):
        getattr(target, name)[:, to, :, :filled] = getattr(source, name)[:, row, :, :filled]
    for name in ("windows", "states"):
        getattr(target, name)[:, to] = getattr(source, name)[:, row]
    target.lengths[to] = source.lengths[row]

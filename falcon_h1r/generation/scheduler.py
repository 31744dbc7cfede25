"""Who gets a row of the engine's cache, and when: prompts, the queue of traces, the budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from ..cost import in_units
from .prompts import read_prompts
from .slots import Plan, Slots, plan
from .trace import Prompt, Trace


class Scheduler:
    """Lets waiting traces in, first come first served, as rows become free.

    A prompt is read into a row of its own, and its traces are copies of that row; the last one to
    wait for it takes the row itself. Numbers as in `Engine`.
    """

    def __init__(
        self,
        model,
        max_rows: int,
        budget: int | None,
        chunk: int | None,
        fixed: bool,
        prefill: Callable,
    ):
        self._model, self._max_rows, self._budget, self._prefill = model, max_rows, budget, prefill
        self._chunk, self._fixed = chunk, fixed
        self.slots = Slots(model)
        self.queue: deque[Trace] = deque()
        self._prompts: dict[tuple[int, ...], Prompt] = {}

    def prompt(self, ids, new_tokens: int | None = None) -> Prompt:
        """The prompt of these ids, not yet read; new_tokens: of a trace that must fit behind it."""
        ids = read_prompts([ids], None, self._model.config.vocab_size)[0]
        if new_tokens is not None:
            self._check_need(len(ids), new_tokens)
        return self._prompts.setdefault(tuple(ids.tolist()), Prompt(ids))

    def add(self, trace: Trace) -> None:
        self.queue.append(trace)
        trace.prompt.waiting += 1

    def withdraw(self, trace: Trace) -> None:
        if trace not in self.queue:
            return  # a step was interrupted while it was let in
        self.queue.remove(trace)
        trace.prompt.waiting -= 1
        self.let_go(trace.prompt)

    def let_go(self, prompt: Prompt) -> None:
        """Free what a prompt takes, if nobody needs it any more."""
        if prompt.waiting or prompt.held:
            return
        if prompt in self.slots.prompts:
            self.slots.drop_prompt(prompt)
        self._prompts.pop(tuple(prompt.ids.tolist()), None)

    def plan(self, tokens: int | None = None) -> Plan:
        if tokens is None:
            tokens = max([self.slots.length, *(trace.need for trace in self.queue)])
        return self._plan(tokens, 1)

    def most_running(self) -> int:
        slots, prompts = self.slots, max(1, len(self.slots.prompts))
        made = self._plan(self.plan().tokens, prompts)
        rows = made.rows if self._fits_beside(made.rows * made.row_bytes) else slots.rows
        return min(self._max_rows, max(1, rows - prompts))

    def _plan(self, tokens: int, prompts: int) -> Plan:
        """Rows for max_rows traces, and so many prompts from which traces take the others."""
        most = self._max_rows + (1 if self._fixed else prompts)
        return plan(self._model.config, self._model.dtype, tokens, most, self._budget)

    def admit(self, running: int) -> Iterator[tuple[Trace, Tensor]]:
        """Traces that run from now on, each in the next row, and the logits of their first token.

        running: how many do already. Prompts are read up to a chunk of tokens in all.
        """
        slots, read = self.slots, 0
        while self.queue and running < self._max_rows:
            trace = self.queue[0]
            prompt, need = trace.prompt, trace.need
            if prompt not in slots.prompts:
                if not self._room(need, True):
                    if running:
                        return
                    self._evict(need)
                slots.take_prompt(prompt)
                prompt.begin(self._chunk, self._model.device)
            if prompt.logits_1v is None:
                left = len(prompt.ids) - int(slots.cache.lengths[slots.prompts[prompt]])
                # As `prefill_chunks` cuts: the first piece takes what is over.
                piece = left if self._chunk is None else (left - 1) % self._chunk + 1
                if read and (self._chunk is None or read + piece > self._chunk):
                    return
                read += piece
                self._read_piece(prompt)
                if prompt.logits_1v is None:
                    return
            last = prompt.waiting == 1 and not prompt.held
            if last and slots.length >= need:
                slots.become(prompt)
            elif self._room(need):
                slots.fork(prompt)
            elif running:
                return
            elif slots.length >= need:
                # Nobody will make room: whoever comes next reads the prompt again.
                slots.become(prompt)
            else:
                self._evict(need)
                continue
            self.queue.popleft()
            prompt.waiting -= 1
            logits_1v = prompt.logits_1v
            self.let_go(prompt)
            running += 1
            yield trace, logits_1v

    def _check_need(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise ValueError for a trace that could never run."""
        need, limit = prompt_tokens + new_tokens, self._model.config.max_position_embeddings
        asked = f"{prompt_tokens} tokens + max_new_tokens {new_tokens} = {need}"
        if need > limit:
            raise ValueError(f"prompt: {asked}, more than max_position_embeddings {limit}")
        made = self.plan(need)
        least = self._max_rows + 1 if self._fixed else 1
        if made.rows < least:
            rows = f" for each of {least} rows" if self._fixed else ""
            raise ValueError(
                f"memory_budget is {in_units(self._budget)}: a trace of {asked} takes "
                f"{in_units(made.row_bytes)}{rows} ({in_units(made.state_bytes)} of state, "
                f"{in_units(made.kv_bytes)} of keys and values)"
            )

    def _read_piece(self, prompt: Prompt) -> None:
        view = self.slots.view(1, self.slots.prompts[prompt])
        ids, _ = next(prompt.pieces)
        logits_1v = self._prefill(ids, cache=view, logits_to_keep=1)[:, -1]
        if int(view.lengths[0]) == len(prompt.ids):
            prompt.logits_1v = logits_1v

    def _room(self, need: int, for_prompt: bool = False) -> bool:
        """Whether there is a free row for `need` tokens; the cache grows where it may."""
        slots = self.slots
        used = slots.count + len(slots.prompts)
        if for_prompt and self._fixed and slots.prompts:
            return False  # it would take a row of the fixed width
        longest = max(need, slots.length)
        if used == 0:
            # Others like it, so that the cache need not grow for them.
            like = (t.need for t in islice(self.queue, self._max_rows) if t.need <= 2 * need)
            longest = max(need, *like)
        prompts = max(1, len(slots.prompts) + for_prompt)
        made = self._plan(longest, prompts)
        rows = made.rows
        if self._budget is None and not self._fixed:
            expected = min(self._max_rows, slots.count + len(self.queue)) + prompts
            rows = max(slots.rows, expected)
        enough = slots.rows >= rows or used > 0
        if slots.free and slots.length >= need and enough:
            return True
        if rows <= used:
            return False
        if not self._fits_beside(rows * made.row_bytes):
            return False
        slots.resize(rows, made.tokens)
        return True

    def _fits_beside(self, size: int) -> bool:
        """Whether a cache of so many bytes may be made: beside this one, unless it is empty."""
        slots = self.slots
        held = slots.nbytes if slots.count or slots.prompts else 0
        return self._budget is None or held + size <= self._budget

    def _evict(self, need: int) -> None:
        """Forget what was read of prompts, for a row of `need` tokens; only when no trace runs."""
        for prompt in list(self.slots.prompts):
            self.slots.drop_prompt(prompt)
        made = self._room(need)
        assert made, "a trace that does not fit alone is refused before it waits"

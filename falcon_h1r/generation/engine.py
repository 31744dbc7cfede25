"""The batched decode engine: many traces of many prompts, one token per running trace and step.

A prompt is read once, in pieces, between decode steps. The traces of the prompt start from copies
of its row. Traces run side by side. When a trace ends, by itself or by the caller, its row goes to
the next trace that waits. `Engine` decides who runs in a step; a trace's tokens depend on its own
seed and positions.

The text of a trace does not depend on its neighbours, on its row, or on when it was admitted:
- The choice of a token from logits is the same in every bit (`sampling`).
- The logits of a row are the same in every bit in all steps of the same number of rows, if the
  library's sums depend on nothing but the shape of a product.
- Between steps of different numbers of rows, and between different rows, logits agree up to
  rounding. A trace changes its row when others end.
With `fixed_width` every step has the same number of rows. In float32 the row then matters only
where the rows that `ssd_step` takes at a time leave one to three over.
tests/generation/test_engine_bits.py says on which machine this was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..cache import Span
from ..checks import check_integer
from ..cpu import CompiledStep, require_compiler
from ..cpu.compiled import ROOM
from ..precision import compute_dtype
from .graph import DecodeStep
from .output import EngineStep, TraceOutput
from .params import SamplingParams, derive_seeds
from .rows import RowText, need_tokenizer, settle, stops_of
from .sampling import Sampler
from .scheduler import Scheduler
from .slots import Plan
from .trace import Trace


class Engine:
    """Decodes traces as they are added; iterate over it, or call `step`, for it to go on.

    tokenizer: as in `stream`, for text, stop strings and thinking budgets. max_rows: most traces in
    a step. memory_budget: bytes that the cache may take; None: no limit. A row takes
    `plan().row_bytes`; the state alone is 132 MiB for Falcon-H1R-7B. A prompt takes a row while it
    waits or is held. The budget leaves out weights, logits, the tensors of a forward, and one row
    for the moment in which two prompts change places. Without a budget the cache may grow, and the
    old and the new cache exist together for a moment.
    prefill_chunk: most tokens of prompts read between two steps. graph, prefill: as in `stream`. A
    step as one graph computes some rows more than run, so that few graphs are made.
    fixed_width: compute max_rows rows in every step, however few run.

    Raises ValueError for numbers below 1, and a graph the model cannot have.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_rows: int = 64,
        memory_budget: int | None = None,
        prefill_chunk: int | None = 512,
        graph: bool | None = None,
        prefill: Callable | None = None,
        fixed_width: bool = False,
    ):
        check_integer("max_rows", max_rows, 1)
        check_integer("memory_budget", memory_budget, 1, none=True)
        check_integer("prefill_chunk", prefill_chunk, 1, none=True)
        self._model, self._tokenizer = model, tokenizer
        self.max_rows, self._fixed_width = max_rows, fixed_width
        on_gpu = model.device.type == "cuda"
        self._form = None
        if graph or (graph is None and on_gpu):
            self._form = DecodeStep if on_gpu else CompiledStep
        if self._form is CompiledStep:
            require_compiler()
        self._scheduler = Scheduler(
            model,
            max_rows,
            memory_budget,
            prefill_chunk,
            fixed_width,
            model if prefill is None else prefill,
        )
        self._slots = self._scheduler.slots
        self._traces: dict[int, Trace] = {}
        self._rows: list[Trace] = []  # who is in each row of the last step
        self._sampler: Sampler | None = None
        self._tokens_r: Tensor | None = None
        self._next, self._steps = 0, 0
        self._inside = False

    def add(
        self,
        prompt,
        params: SamplingParams | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[int]:
        """Queue `params.n` traces of a prompt; returns their numbers. First in, first served.

        prompt: ids, a 1-D tensor or a list. seeds: one per trace; None: those of `derive_seeds`.
        Prompts that are equal are read once, as long as one of their traces waits (or see `hold`).
        Raises ValueError for a prompt that is empty, has ids outside the vocabulary, is too long
        for the model or for the memory budget, and as `SamplingParams` and `stream` do.
        """
        params = SamplingParams() if params is None else params
        need_tokenizer(params, self._tokenizer)
        seeds = derive_seeds(params, 1) if seeds is None else list(seeds)
        if len(seeds) != params.n:
            raise ValueError(f"seeds: {len(seeds)} given for {params.n} traces")
        for seed in seeds:
            if seed is None:
                raise ValueError("seeds: expected integers, found None")
            SamplingParams(seed=seed)  # raises what is wrong with it
        prompt = self._scheduler.prompt(prompt, params.max_new_tokens)
        stops = stops_of(params, self._model.eos_token_ids)
        numbers = list(range(self._next, self._next + params.n))
        self._next += params.n
        for number, seed in zip(numbers, seeds):
            text = None
            if self._tokenizer is not None:
                text = RowText(params, self._tokenizer, prompt.ids.tolist())
            trace = self._traces[number] = Trace(number, prompt, params, seed, stops, text)
            self._scheduler.add(trace)
        return numbers

    def hold(self, prompt) -> None:
        """Keep what was read of a prompt, also while no trace of it waits, until `release`."""
        self._scheduler.prompt(prompt).held += 1

    def release(self, prompt) -> None:
        """Undo one `hold`. Raises ValueError for a prompt that is not held."""
        found = self._scheduler.prompt(prompt)
        held = found.held
        found.held = max(0, held - 1)
        self._scheduler.let_go(found)
        if not held:
            raise ValueError("prompt: is not held")

    @property
    def free(self) -> int:
        """How many more traces, no longer than those so far, would not have to wait for a row."""
        running = sum(trace.reason == "running" for trace in self._rows)
        waiting = len(self._scheduler.queue)
        return max(0, self._scheduler.most_running() - running - waiting)

    def plan(self, tokens: int | None = None) -> Plan:
        """The rows of a cache for traces of up to `tokens` tokens, prompt included.

        None: for those that are here.
        """
        return self._scheduler.plan(tokens)

    def end(self, traces: Iterable[int], reason: str) -> None:
        """Let traces that wait or run end now.

        Raises ValueError, and ends none, for an unknown number or a reason that is no end.
        """
        if reason in ("waiting", "running"):
            raise ValueError(f"reason is {reason!r}, which is not how a trace ends")
        numbers = list(traces)
        for number in numbers:
            self._known(number)
        for number in numbers:
            trace = self._traces[number]
            if trace.reason == "waiting":
                self._scheduler.withdraw(trace)
            if trace.reason in ("waiting", "running"):
                trace.reason = reason

    def output(self, trace: int) -> TraceOutput:
        """What a trace has said so far. Raises ValueError for an unknown number."""
        t = self._known(trace)
        text = None
        if self._tokenizer is not None:
            # What is held back while it runs is the end of what its tokens say.
            ended = t.reason in ("stop", "stop_string", "length")
            text = "".join(t.pieces) if ended else self._tokenizer.decode(t.tokens)
        logprobs = None
        if t.params.wants_logprobs:
            # An interrupted step may have left one more of them than tokens.
            logprobs = torch.tensor(
                t.logprobs[: len(t.tokens)], dtype=compute_dtype(self._model.dtype)
            )
        tokens = torch.tensor(t.tokens, dtype=torch.int64)
        return TraceOutput(tokens, logprobs, t.reason, text, t.seed, len(t.prompt.ids))

    def pop(self, trace: int) -> TraceOutput:
        """`output`, and forget the trace, which must have ended."""
        out = self.output(trace)
        if out.reason in ("waiting", "running"):
            raise ValueError(f"trace {trace} is {out.reason}: end it first")
        del self._traces[trace]
        return out

    def __iter__(self) -> Iterator[EngineStep]:
        return iter(self.step, None)

    # Not inference_mode, whose tensors a later training step could not save for backward.
    @torch.no_grad()
    def step(self) -> EngineStep | None:
        """One token in every running trace; None if none runs or waits.

        An exception from inside, such as KeyboardInterrupt, leaves each output as it was before the
        step or as it is after it, and the engine unable to go on: a step after it raises
        RuntimeError.
        """
        if self._inside:
            raise RuntimeError("the engine was interrupted within a step and cannot go on")
        self._inside = True
        self._drop_ended()
        logits_rv = self._decode() if self._rows else None
        logits_rv = self._admit(logits_rv)
        step = None
        if self._rows:
            step = self._choose(logits_rv)
        elif self._scheduler.queue:
            step = self._nothing()
        self._steps += step is not None
        self._inside = False
        return step

    def _known(self, number: int) -> Trace:
        if number not in self._traces:
            raise ValueError(f"trace {number} is not known to the engine")
        return self._traces[number]

    def _drop_ended(self) -> None:
        kept = [row for row, trace in enumerate(self._rows) if trace.reason == "running"]
        if len(kept) == len(self._rows):
            return
        order = torch.tensor(self._slots.keep(kept), dtype=torch.int64)
        self._rows = [self._rows[row] for row in order.tolist()]
        self._sampler.select(order)
        self._tokens_r = self._tokens_r[order.to(self._tokens_r.device)]

    def _decode(self) -> Tensor:
        """(running traces, vocab): the model's word on the last tokens."""
        model, lengths, count = self._model, self._slots.cache.lengths, len(self._rows)
        width = self._width(count)
        tokens = torch.nn.functional.pad(self._tokens_r, (0, width - count))
        lengths[count:width] = 1  # rows where nobody is are computed along
        forms, view = self._slots.forms, self._slots.view(width)
        form = forms.get(width)
        if form is None and self._form is not None:
            form = forms[width] = self._form(model, view)
        if isinstance(form, DecodeStep):
            form.past_b.copy_(view.lengths)
            return form(tokens)[:count]
        # As if rows were of different lengths, also where they are not: a trace takes one way
        # through the model, whoever its neighbours are.
        past_b, longest = view.lengths.to(model.device), int(lengths[:count].max()) + 1
        # In full blocks, since a library adds up the last few keys of a row otherwise.
        total = -(-longest // ROOM) * ROOM
        span = Span.step(model.config, past_b, total, compute_dtype(model.dtype))
        if form is not None:
            return form(tokens, span)[:count]
        logits = model.logits(model.run(model.embed(tokens[:, None]), span, view))[:, -1]
        view.lengths += 1
        return logits[:count]

    def _width(self, count: int) -> int:
        """How many rows a step computes for so many traces."""
        if self._fixed_width:
            return self.max_rows
        if self._form is None:
            return count
        # Compiling takes seconds, capturing a fraction of one.
        step, width = (4 if self._form is CompiledStep else 2), 1
        while width < count:
            width *= step
        return min(width, self.max_rows, self._slots.rows - len(self._slots.prompts))

    def _admit(self, logits_rv: Tensor | None) -> Tensor | None:
        """Seat new traces; logits_rv: of those that run, returned with the new ones' behind."""
        came = list(self._scheduler.admit(len(self._rows)))
        if not came:
            return logits_rv
        new = [trace for trace, _ in came]
        parts = [] if logits_rv is None else [logits_rv]
        logits_rv = torch.cat([*parts, *(logits_1v for _, logits_1v in came)])
        params, seeds = [t.params for t in new], [t.seed for t in new]
        prompts = [t.prompt.ids for t in new]
        if self._sampler is None:
            device = self._model.device
            self._sampler = Sampler(params, seeds, prompts, logits_rv.shape[1], device)
        else:
            self._sampler.append(params, seeds, prompts)
        for trace in new:
            trace.reason = "running"
        self._rows += new
        return logits_rv

    def _choose(self, logits_rv: Tensor) -> EngineStep:
        positions = torch.tensor([len(trace.tokens) for trace in self._rows])
        tokens_r, choice = self._sampler.choose(
            logits_rv, positions.to(logits_rv.device), self._forced()
        )
        self._tokens_r = tokens_r
        finished: dict[int, str] = {}
        texts: dict[int, str] = {}
        logprobs = None if choice.logprobs is None else choice.logprobs.tolist()
        for row, (trace, token) in enumerate(zip(self._rows, choice.tokens.tolist())):
            piece, reason = settle(token, len(trace.tokens), trace.stops, trace.params, trace.text)
            if trace.params.wants_logprobs:
                trace.logprobs.append(logprobs[row])
            trace.tokens.append(token)
            if piece:
                texts[trace.number] = piece
                trace.pieces.append(piece)
            if reason is not None:
                finished[trace.number] = trace.reason = reason
        numbers = torch.tensor([trace.number for trace in self._rows])
        return EngineStep(self._steps, numbers, positions, *choice, finished, texts)

    def _forced(self) -> Tensor | None:
        budgets = [trace.params.thinking_budget is not None for trace in self._rows]
        if not any(budgets):
            return None
        forced = [t.text.forced() if budget else -1 for t, budget in zip(self._rows, budgets)]
        return None if max(forced) < 0 else torch.tensor(forced, device=self._model.device)

    def _nothing(self) -> EngineStep:
        """A step in which no trace runs yet."""
        none = torch.zeros(0, dtype=torch.int64)
        return EngineStep(self._steps, none, none, none, None, None, None, {}, {})

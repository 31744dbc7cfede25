"""generate() and stream(): one prefill of a ragged batch, then one token per running row and step.

`Stream` is the engine; `generate` runs it to the end. Both need a model and token ids only; a
tokenizer is needed for text, stop strings and thinking budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..cache import Cache
from ..checks import check_integer
from ..cpu import CompiledStep
from .graph import DecodeStep
from .output import GenerateOutput, Step, collect
from .params import SamplingParams, derive_seeds, per_prompt
from .prompts import prefill_chunks, read_prompts
from .rows import RowText, need_tokenizer, settle, stops_of
from .sampling import Choice, Sampler


def generate(
    model,
    input_ids,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    attention_mask: Tensor | None = None,
    *,
    tokenizer=None,
    on_step: Callable[[Step], None] | None = None,
    prefill_chunk: int | None = None,
    cache: Cache | None = None,
    graph: bool | None = None,
    prefill: Callable | None = None,
) -> GenerateOutput:
    """Generate `params.n` sequences for every prompt. Arguments and errors are those of `stream`.

    params: None means `SamplingParams()`. on_step: called with each `Step` as it is made.
    """
    run = stream(
        model,
        input_ids,
        SamplingParams() if params is None else params,
        attention_mask=attention_mask,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
        cache=cache,
        graph=graph,
        prefill=prefill,
    )
    for step in run:
        if on_step is not None:
            on_step(step)
    return run.result()


def stream(
    model,
    input_ids,
    params: SamplingParams | Sequence[SamplingParams],
    attention_mask: Tensor | None = None,
    *,
    tokenizer=None,
    prefill_chunk: int | None = None,
    cache: Cache | None = None,
    graph: bool | None = None,
    prefill: Callable | None = None,
) -> Stream:
    """Check a request and return it as a `Stream`: iterate over it for the steps.

    input_ids: (b, l) integers, with attention_mask (b, l; 0 at padding, on either side) for ragged
        prompts; or a list of 1-D tensors or lists of ints of any lengths.
    params: for all prompts, or one per prompt (with the same n).
    tokenizer: has `decode(ids)` and `encode(text, add_special_tokens=False)`.
    prefill_chunk: most prompt columns per forward; None: the whole prompt at once.
    cache: holds the first tokens of every prompt, at least one fewer than the prompt has: only the
        rest is computed. It is advanced in place over the prompt, and with n = 1 over the new
        tokens too, all but the last, as long as no row leaves the batch; meant for going on with
        one conversation.
    graph: run a decode step as one graph: captured on a GPU (`graph.DecodeStep`), through
        torch.compile on a CPU (`cpu.CompiledStep`, with a model of `use_onednn(model,
        stream=True)`); None: on a GPU. False is for models with operators or hooks that read
        values back to the CPU.
    prefill: reads prompts in place of the model, called as the model is, such as a
        `cpu.CompiledPrefill`, whose compilation pays where many or long prompts are read.

    Raises ValueError for a request that cannot be served: see `read_prompts`, `SamplingParams`, and
    prompt + max_new_tokens beyond `max_position_embeddings`.
    """
    return Stream(
        model, input_ids, params, attention_mask, tokenizer, prefill_chunk, cache, graph, prefill
    )


class Stream:
    """A running generation. `for step in run` makes it go on; leave the loop whenever you like.

    `result()` gives what there is at any time, also after an exception such as KeyboardInterrupt: a
    step is recorded whole or not at all. Iterating again goes on with the next step (not after an
    exception).
    """

    def __init__(
        self,
        model,
        input_ids,
        params,
        attention_mask,
        tokenizer,
        prefill_chunk,
        cache,
        graph,
        prefill=None,
    ):
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._prefill = model if prefill is None else prefill
        if not callable(self._prefill):
            raise ValueError(f"prefill: {prefill!r:.60} cannot be called as a model is")
        on_gpu = model.device.type == "cuda"
        self._step_form = None  # the class of a decode step as one graph
        if graph or (graph is None and on_gpu):
            self._step_form = DecodeStep if on_gpu else CompiledStep
        self._prompts = read_prompts(input_ids, attention_mask, model.config.vocab_size)
        by_prompt = per_prompt(params, len(self._prompts))
        check_integer("prefill_chunk", prefill_chunk, 1, none=True)
        self._prefill_chunk = prefill_chunk
        self._n = by_prompt[0].n
        self.params = [p for p in by_prompt for _ in range(self._n)]
        self.seeds = derive_seeds(params, len(self._prompts))
        self._check_lengths()
        for p in by_prompt:
            need_tokenizer(p, tokenizer)
        self._stops = [stops_of(p, model.eos_token_ids) for p in self.params]
        self._texts: list[RowText] | None = None
        if tokenizer is not None:
            self._texts = [
                RowText(p, tokenizer, self._prompts[i // self._n].tolist())
                for i, p in enumerate(self.params)
            ]
        self._record: list[Step] = []
        self._ended: dict[int, str] = {}
        self._generator = self._steps()

    def __iter__(self) -> Iterator[Step]:
        return self._generator

    def end(self, sequences: Iterable[int], reason: str) -> None:
        """Let sequences end with the step handed out last; `reason` is their finish reason."""
        for sequence in sequences:
            if not 0 <= sequence < len(self.seeds):
                raise ValueError(f"sequence {sequence} must be in 0 .. {len(self.seeds) - 1}")
            self._ended.setdefault(sequence, reason)

    def result(self) -> GenerateOutput:
        """Everything generated so far; sequences that could go on are "interrupted"."""
        lengths = [len(self._prompts[i // self._n]) for i in range(len(self.seeds))]
        return collect(self._record, self.params, self.seeds, lengths, self._ended, self._tokenizer)

    def _check_lengths(self) -> None:
        limit = self._model.config.max_position_embeddings
        for i, row in enumerate(self._prompts):
            new = self.params[i * self._n].max_new_tokens
            if len(row) + new > limit:
                raise ValueError(
                    f"prompt {i}: {len(row)} tokens + max_new_tokens {new} = {len(row) + new}, "
                    f"more than max_position_embeddings {limit}"
                )
        if self._cache is None:
            return
        held = self._cache.lengths.tolist()
        needed = max(map(len, self._prompts)) + max(p.max_new_tokens for p in self.params) - 1
        if needed > self._cache.max_length:
            raise ValueError(
                f"cache: prompt and new tokens need {needed} positions, "
                f"it has {self._cache.max_length}"
            )
        if len(held) != len(self._prompts):
            raise ValueError(f"cache: {len(held)} rows for {len(self._prompts)} prompts")
        for i, (row, past) in enumerate(zip(self._prompts, held)):
            if past >= len(row):
                raise ValueError(
                    f"cache: row {i} holds {past} tokens, but must hold fewer than its prompt's "
                    f"{len(row)}"
                )

    # A generator, so that a step's frames are generate, _steps, and the model's; not
    # inference_mode, whose tensors a later training step could not save for backward.
    @torch.no_grad()
    def _steps(self) -> Iterator[Step]:
        model, cache, rows = self._model, self._cache, self._prompts
        longest = max(p.max_new_tokens for p in self.params)
        if cache is None:
            cache = model.new_cache(len(rows), max(map(len, rows)) + longest)
        rest = [row[past:] for row, past in zip(rows, cache.lengths.tolist())]
        for ids, mask in prefill_chunks(rest, self._prefill_chunk, model.device):
            logits_rv = self._prefill(ids, mask, cache=cache, logits_to_keep=1)[:, -1]
        if self._n > 1:
            cache = cache.expand(self._n)
            logits_rv = logits_rv.repeat_interleave(self._n, dim=0)
        prompts = [rows[i // self._n] for i in range(len(self.seeds))]
        vocab = logits_rv.shape[1]
        sampler = Sampler(self.params, self.seeds, prompts, vocab, logits_rv.device)
        slots = torch.arange(len(self.seeds))  # which sequence sits in each row of the batch
        running = torch.ones(len(self.seeds), dtype=torch.bool)  # by sequence
        form = self._step_form
        decode = None if form is None else form(model, cache)
        for position in range(longest):
            tokens_r, choice = sampler.choose(logits_rv, position, self._forced(slots, running))
            step = self._settle(position, choice, slots, running)
            self._record.append(step)
            yield step
            running[[*step.finished, *self._ended]] = False
            kept = running[slots].nonzero()[:, 0]
            if len(kept) == 0:
                return
            # Finished rows are computed along until half of the batch is idle: every copy of the
            # cache costs about as much as a step. A compiled step keeps its batch size: another
            # would be compiled anew.
            if 2 * len(kept) <= len(slots) and form is not CompiledStep:
                cache = cache.select(kept)
                sampler.select(kept)
                slots, tokens_r = slots[kept], tokens_r[kept.to(tokens_r.device)]
                decode = None if form is None else form(model, cache)
            if decode is None:
                logits_rv = model(tokens_r[:, None], cache=cache, logits_to_keep=1)[:, -1]
            else:
                logits_rv = decode(tokens_r)

    def _forced(self, slots: Tensor, running: Tensor) -> Tensor | None:
        if all(p.thinking_budget is None for p in self.params):
            return None
        forced = [
            self._texts[i].forced() if running[i] else -1  # a finished row's text is settled
            for i in slots.tolist()
        ]
        if max(forced) < 0:
            return None
        return torch.tensor(forced, device=self._model.device)

    def _settle(self, position: int, choice: Choice, slots: Tensor, running: Tensor) -> Step:
        """Read one step's tokens on the CPU: who ends and why, and what text became certain."""
        live = running[slots]
        sequences, tokens = slots[live], choice.tokens[live]
        finished: dict[int, str] = {}
        texts: dict[int, str] = {}
        for i, token in zip(sequences.tolist(), tokens.tolist()):
            text = None if self._texts is None else self._texts[i]
            piece, reason = settle(token, position, self._stops[i], self.params[i], text)
            if reason is not None:
                finished[i] = reason
            if piece:
                texts[i] = piece
        logprobs, top_ids, top_logprobs = (
            None if values is None else values[live] for values in choice[1:]
        )
        return Step(position, sequences, tokens, logprobs, top_ids, top_logprobs, finished, texts)

"""SamplingParams: everything a caller may ask of generation, checked on construction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_integer, check_number, is_integer, refuse

SEED_LIMIT = 2**63
MOST = 2**31 - 1  # of a count
MOST_SEQUENCES = 2**16  # of one prompt: each has a state of its own
STRONGEST = 1e6  # penalty, so that no logit of a finite model overflows


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. The default is greedy.

    max_new_tokens: most tokens of one sequence, the stop token and forced tokens included.
    temperature: 0 takes the likeliest token (the lowest id among equals); else logits are divided
        by it.
    top_k: keep the k likeliest tokens and all that tie with the last of them; 0 is off.
    top_p: keep the likeliest tokens up to and including the one with which their sum reaches top_p,
        and all that tie with it; 1 is off.
    min_p: keep tokens at least min_p times as likely as the likeliest one; 0 is off.
    repetition_penalty: logits of tokens in the prompt or the output are divided by it where
        positive and multiplied where negative (transformers' definition); 1 is off.
    presence_penalty: subtracted from the logits of tokens in the output; frequency_penalty: the
        same, times how often they occur there (OpenAI's definitions, the prompt does not count); 0
        is off.
    stop_token_ids: a sequence ends with any of these, which is kept in it; None: the model's
        `eos_token_ids`; (): no token ends it.
    stop: a sequence ends when its text contains one of these strings; its text is cut before it,
        its tokens are kept. Needs a tokenizer.
    seed: 0 <= seed < 2**63; None draws a fresh one, which the result reports.
    n: sequences per prompt, from one prefill.
    logprobs: False: none; True or 0: the log-probability of each token; k > 0: also those of the k
        likeliest tokens. Always of the model's own distribution, before penalties and filters.
    thinking_budget: new tokens after which an open `<think>` block is closed: `</think>` and a
        blank line are put in token by token, and the model goes on from there. None: never. Needs a
        tokenizer.

    Raises ValueError, naming the parameter, for a value outside its range: counts end at MOST, n at
    MOST_SEQUENCES, penalties at STRONGEST (a repetition_penalty begins at its inverse).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: bool | int = False
    thinking_budget: int | None = None

    def __post_init__(self):
        self._normalise()
        check_integer("max_new_tokens", self.max_new_tokens, 1, MOST)
        check_integer("n", self.n, 1, MOST_SEQUENCES)
        check_integer("top_k", self.top_k, 0, MOST)
        check_number("temperature", self.temperature, 0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, 1 / STRONGEST, STRONGEST)
        check_number("presence_penalty", self.presence_penalty, -STRONGEST, STRONGEST)
        check_number("frequency_penalty", self.frequency_penalty, -STRONGEST, STRONGEST)
        check_integer("seed", self.seed, 0, SEED_LIMIT - 1, none=True)
        check_integer("thinking_budget", self.thinking_budget, 0, MOST, none=True)
        if not isinstance(self.logprobs, bool):
            check_integer("logprobs", self.logprobs, 0, MOST)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            refuse("stop", self.stop, "non-empty strings")
        stops = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(stops, tuple) or not all(is_integer(token, 0, MOST) for token in stops):
            refuse("stop_token_ids", stops, "None or token ids >= 0")

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if isinstance(value, (list, set, frozenset)):
                value = tuple(value)
            object.__setattr__(self, name, value)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not False

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens to report at each position."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs

    @property
    def needs_tokenizer(self) -> bool:
        return bool(self.stop) or self.thinking_budget is not None


def per_prompt(
    params: SamplingParams | Sequence[SamplingParams], prompts: int
) -> list[SamplingParams]:
    """One SamplingParams per prompt; `n` must be the same in all."""
    rows = [params] * prompts if isinstance(params, SamplingParams) else list(params)
    if not all(isinstance(row, SamplingParams) for row in rows):
        raise ValueError("params: expected a SamplingParams, or a sequence with one per prompt")
    if len(rows) != prompts:
        raise ValueError(f"params: {len(rows)} given for {prompts} prompts")
    if len({row.n for row in rows}) > 1:
        raise ValueError(f"n: must be the same for all prompts, found {[row.n for row in rows]}")
    return rows


def derive_seeds(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[int]:
    """One seed per sequence; prompt i's sample j is sequence i*n + j.

    One SamplingParams for the whole batch: seed + i*n + j. One per prompt: params[i].seed + j.
    Modulo 2**63. So any sequence can be made again alone, with the seed the result reports for it.
    A seed of None stands for a fresh one below 2**53 (a whole number in every JSON reader).
    """
    if isinstance(params, SamplingParams):
        runs = [(params, prompts * params.n)]
    else:
        runs = [(row, row.n) for row in per_prompt(params, prompts)]
    seeds: list[int] = []
    for row, length in runs:
        start = _fresh_seed() if row.seed is None else row.seed
        seeds += [(start + k) % SEED_LIMIT for k in range(length)]
    return seeds


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(8), "little") >> 11

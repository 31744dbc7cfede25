"""SamplingParams: everything a caller may ask of generation, checked on construction."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

SEED_LIMIT = 2**63


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

    Raises ValueError, naming the parameter, for a value outside its range.
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
        counts = {"max_new_tokens": 1, "n": 1, "top_k": 0}
        for name, least in counts.items():
            self._need(name, _is_int(getattr(self, name), least), f"an integer >= {least}")
        self._need("temperature", _is_number(self.temperature, 0), "a finite number >= 0")
        self._need("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "0 < top_p <= 1")
        self._need("min_p", _is_number(self.min_p, 0, 1), "0 <= min_p <= 1")
        positive = _is_number(self.repetition_penalty, 0) and self.repetition_penalty > 0
        self._need("repetition_penalty", positive, "a finite number > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._need(name, _is_number(getattr(self, name)), "a finite number")
        stops = self.stop_token_ids
        valid = stops is None or (isinstance(stops, tuple) and all(_is_int(i, 0) for i in stops))
        self._need("stop_token_ids", valid, "None or token ids >= 0")
        valid = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._need("stop", valid, "non-empty strings")
        seeded = self.seed is None or (_is_int(self.seed, 0) and self.seed < SEED_LIMIT)
        self._need("seed", seeded, "None or an integer in 0 .. 2**63 - 1")
        self._need(
            "logprobs",
            isinstance(self.logprobs, bool) or _is_int(self.logprobs, 0),
            "True, False or the number of alternatives",
        )
        budget = self.thinking_budget
        self._need(
            "thinking_budget", budget is None or _is_int(budget, 0), "None or an integer >= 0"
        )

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if isinstance(value, (list, set, frozenset)):
                value = tuple(value)
            object.__setattr__(self, name, value)

    def _need(self, name: str, condition: bool, accepted: str) -> None:
        if not condition:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {accepted}")

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


def _is_int(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value, least: float = -math.inf, most: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and least <= value <= most

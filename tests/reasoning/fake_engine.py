"""A second, deterministic engine behind the interface of `generation.Engine`: no model, traces that
are known beforehand, rows given out one after the other."""

from dataclasses import replace
from typing import NamedTuple

import torch

from falcon_h1r.generation import SamplingParams


class Step(NamedTuple):
    number: int
    traces: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    finished: dict
    text: dict


class Output(NamedTuple):
    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    reason: str
    text: str | None
    seed: int
    prompt_tokens: int


class Plan(NamedTuple):
    rows: int
    row_bytes: int
    state_bytes: int
    kv_bytes: int
    prompt_bytes: int
    budget: int | None
    limit: str

    def __str__(self):
        return f"{self.limit}: {self.rows} rows"


class FakeEngine:
    """make(prompt, seed): the `synthetic.Whole` that this prompt and this seed give.

    slow: steps that the prefill of a prompt takes; nothing else runs meanwhile if nothing can.
    interrupt_at: Ctrl-C in these steps, before anything of them was kept. most_rows: the widest
    batch there was.
    """

    def __init__(self, make, max_rows=64, slow=0, interrupt_at=(), with_text=True):
        self.make, self.max_rows, self.slow = make, max_rows, slow
        self.interrupt_at, self.with_text = interrupt_at, with_text
        self.queue, self.rows, self.traces, self.held = [], [], {}, []
        self.steps = self.next = self.most_rows = 0
        self.ready = {}  # prompt -> steps of its prefill that are left

    @property
    def free(self):
        return max(0, self.max_rows - len(self.rows) - len(self.queue))

    def hold(self, prompt):
        self.held.append(prompt.tolist())

    def release(self, prompt):
        self.held.remove(prompt.tolist())

    def add(self, prompt, params=None, *, seeds=None):
        prompt = torch.as_tensor(prompt)
        params = params or SamplingParams()
        assert len(seeds) == params.n
        numbers = list(range(self.next, self.next + params.n))
        self.next += params.n
        for number, seed in zip(numbers, seeds):
            self.traces[number] = {
                "whole": None,  # made when it runs
                "params": replace(params, n=1),
                "seed": seed,
                "prompt": tuple(prompt.tolist()),
                "at": 0,
                "reason": "waiting",
            }
        self.queue += numbers
        return numbers

    def step(self):
        if not self.queue and not self.rows:
            return None
        if self.steps in self.interrupt_at:
            self.interrupt_at = [step for step in self.interrupt_at if step != self.steps]
            raise KeyboardInterrupt
        while self.queue and len(self.rows) < self.max_rows:
            prompt = self.traces[self.queue[0]]["prompt"]
            if self.ready.setdefault(prompt, self.slow) > 0:
                self.ready[prompt] -= 1
                break
            number = self.queue.pop(0)
            self.rows.append(number)
            entry = self.traces[number]
            entry.update(reason="running", whole=self.make(prompt, entry["seed"]))
        self.most_rows = max(self.most_rows, len(self.rows))
        # By another order than that of admission: a policy must not care.
        rows = sorted(self.rows, key=lambda number: (number * 7919) % 101)
        here = [self.traces[number] for number in rows]
        k = max([entry["params"].alternatives for entry in here], default=0)
        tops = [entry["whole"].top_logprobs[entry["at"], :k] for entry in here]
        finished = {}
        for number, entry in zip(rows, here):
            entry["at"] += 1
            if entry["at"] == len(entry["whole"].tokens):
                finished[number] = entry["reason"] = entry["whole"].reason
        self.rows = [number for number in self.rows if number not in finished]
        self.steps += 1
        return Step(
            number=self.steps - 1,
            traces=torch.tensor(rows, dtype=torch.int64),
            positions=torch.tensor([entry["at"] - 1 for entry in here], dtype=torch.int64),
            tokens=torch.tensor([int(e["whole"].tokens[e["at"] - 1]) for e in here]).long(),
            logprobs=None,
            top_ids=torch.arange(k, dtype=torch.int64).expand(len(rows), -1),
            top_logprobs=torch.stack(tops) if tops else torch.zeros(0, k),
            finished=finished,
            text={},
        )

    def end(self, traces, reason):
        for number in traces:
            entry = self.traces[number]
            if entry["reason"] in ("running", "waiting"):
                entry["reason"] = reason
            for place in (self.queue, self.rows):
                if number in place:
                    place.remove(number)

    def output(self, trace):
        entry = self.traces[trace]
        whole = entry["whole"]
        tokens = torch.zeros(0).long() if whole is None else whole.tokens[: entry["at"]]
        text = whole.text if self.with_text and whole is not None else None
        return Output(tokens, None, entry["reason"], text, entry["seed"], len(entry["prompt"]))

    def pop(self, trace):
        output = self.output(trace)
        assert output.reason not in ("running", "waiting"), "a trace that runs was popped"
        del self.traces[trace]
        return output

    def plan(self):
        return Plan(self.max_rows, 100, 60, 40, 100, None, "max_rows")


def from_pools(pools, base=7, spread=1000):
    """`make` of a pool per prompt: prompt (p,) with seed base + p * spread + i gives pool p's i."""
    return lambda prompt, seed: pools[prompt[0]][seed - base - prompt[0] * spread]

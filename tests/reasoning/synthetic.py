"""Traces without a model, and an engine that runs a policy over them and records what it does."""

import random
from dataclasses import dataclass

import torch

from falcon_h1r.reasoning import (
    DeepConf,
    Ended,
    Equality,
    Manifest,
    OnlinePolicy,
    TraceRecorder,
)
from falcon_h1r.reasoning.confidence import token_confidence

STOP_TOKENS = (11, 228)


@dataclass(frozen=True)
class Whole:
    """A trace as it would run to its end."""

    top_logprobs: torch.Tensor  # (n, k) float32
    tokens: torch.Tensor
    reason: str
    text: str

    @property
    def confidence(self):
        return token_confidence(self.top_logprobs, self.top_logprobs.shape[1])


def make_trace(
    rng: random.Random, k: int, longest: int = 60, answers=("5", "5", "5", "6", "7")
) -> Whole:
    n = rng.randint(1, longest)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    level, drift = rng.uniform(0.5, 3), rng.uniform(-1.5, 1.5)
    peaked = level + drift * torch.linspace(0, 1, n)[:, None]
    logits = torch.randn(n, 3 * k, generator=generator) * peaked
    top = logits.log_softmax(-1).topk(k).values
    reason = rng.choice(["stop", "stop", "stop", "length", "stop_string"])
    tokens = torch.randint(20, 200, (n,), generator=generator)
    if reason == "stop":
        tokens[-1] = rng.choice(STOP_TOKENS)
    answer = rng.choice([*answers, None])
    text = "no answer" if answer is None else f"so \\boxed{{{answer}}}."
    return Whole(top, tokens, reason, text)


def make_pool(seed: int, count: int, k: int = 4, longest: int = 60) -> list[Whole]:
    rng = random.Random(seed)
    return [make_trace(rng, k, longest) for _ in range(count)]


def pool_of(confidences, answers, reason="stop") -> list[Whole]:
    """Traces with given confidences (k = 1: one log-probability per token) and boxed answers."""
    pool = []
    for values, answer in zip(confidences, answers):
        tokens = torch.full((len(values),), 50)
        if reason == "stop":
            tokens[-1] = STOP_TOKENS[1]
        text = "" if answer is None else f"\\boxed{{{answer}}}"
        pool.append(Whole(-torch.tensor(values)[:, None].float(), tokens, reason, text))
    return pool


def run_live(
    pool: list[Whole],
    params: DeepConf,
    folder=None,
    *,
    slots: int | None = None,
    chaos: int = 0,
    interrupt_at: int | None = None,
    reference: str | None = None,
    seed: int = 7,
    top: int | None = None,
):
    """Run a policy over a pool as an engine would; the finished policy.

    chaos: seed of admission delays and of the order of rows in a step; 0: none, rows by number.
    """
    equality = Equality("exact")
    policy = OnlinePolicy(params, seed=seed, equality=equality, stop_token_ids=STOP_TOKENS)
    manifest = Manifest(
        k=params.k,
        seed=seed,
        policy=params.to_dict(),
        stop_token_ids=list(STOP_TOKENS),
        rule=equality.rule,
        reference=reference,
    )
    recorder = None if folder is None else TraceRecorder(folder, manifest, top)
    rng = random.Random(chaos)
    at, delay = {}, {}
    while not policy.done:
        if policy.steps == interrupt_at:
            for trace in policy.interrupt():
                if recorder:
                    recorder.end(trace, "interrupted")
            break
        new = policy.start(None if slots is None else slots - len(at))
        if recorder:
            recorder.start(new, [policy.seeds[i] for i in new])
        for trace in new:
            at[trace], delay[trace] = 0, rng.randint(0, 3) if chaos else 0
        assert at, "nothing runs, and the policy is not done"
        rows = []
        for trace in list(at):
            if delay[trace]:
                delay[trace] -= 1
            else:
                rows.append(trace)
        if chaos:
            rng.shuffle(rows)
        here = [(pool[i], at[i]) for i in rows]
        tokens = torch.tensor([int(trace.tokens[p]) for trace, p in here])
        tops = [trace.top_logprobs[p] for trace, p in here]
        tops = torch.stack(tops) if tops else torch.zeros(0, params.k)
        confidence = token_confidence(tops, params.k) if len(rows) else torch.zeros(0)
        finished = {
            i: Ended(trace.reason, trace.text)
            for i, (trace, p) in zip(rows, here)
            if p + 1 == len(trace.tokens)
        }
        numbers = torch.tensor(rows, dtype=torch.int64)
        stops = policy.step(numbers, tokens, confidence, finished)
        if recorder:
            recorder.step(
                numbers, tokens, confidence, torch.arange(params.k).expand(len(rows), -1), tops
            )
        for i in rows:
            at[i] += 1
        for trace, reason in {**{i: e.reason for i, e in finished.items()}, **stops}.items():
            text = pool[trace].text if trace in finished else ""
            if recorder:
                answer = policy.result().traces[trace].answer
                recorder.end(trace, reason, text, answer)
            del at[trace]
    if recorder:
        recorder.close({"done": policy.done, "answer": policy.result().answer})
    return policy


def record_pool(pool: list[Whole], folder, *, reference=None, k: int = 4, **options):
    """A record of all traces side by side, each run to its end."""
    params = DeepConf(
        k=k, window=1, warmup=len(pool), budget=len(pool), tau=None, filter=False, weight="majority"
    )
    policy = run_live(pool, params, folder, reference=reference, **options)
    drop_policy(folder)
    return policy


def drop_policy(folder) -> None:
    """Make a record one of plain sampling."""
    edit_manifest(folder, policy=None)


def edit_manifest(folder, **changes) -> None:
    import json

    from falcon_h1r.reasoning.traces import check_of

    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values.update(changes)
    del values["check"]
    body = {name: value for name, value in values.items() if name not in ("format", "version")}
    path.write_text(json.dumps({**values, "check": check_of(body)}))

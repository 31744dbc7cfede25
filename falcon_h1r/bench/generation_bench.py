"""`bench generate`: prefill and decode of a whole model, each phase apart.

Prefill is one forward that fills an empty cache and gives the last position's logits. Decode is one
forward per token behind a given depth, and the choice of the likeliest token; the cache holds
random keys, values and states of that depth, which cost what true ones cost, and is set back after
each step so that the depth stays. Times are wall-clock, as a user waits. On a CPU, reading an array
that fits no cache takes its turns with the steps: what memory gives may change from one minute to
the next, and a step is held against what it gave meanwhile.

The gate: a prompt read whole by TORCH, against the same prompt read by each contestant as a prefill
of all but one token and a step of one; logits of the last position. Two computations in one dtype
differ by both their errors, which grow as the root of the number of layers: allowed are
SLACK x sqrt(layers) roundoffs. Who takes part: `contestants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import cost as sheet
from .. import ops
from ..cache import Cache
from ..config import FalconH1Config
from ..model import FalconH1ForCausalLM
from . import contest, contestants, layer, machine, timing
from .contestants import Contestant
from .operators import CACHE_ROOM, OPERATORS, Cost, Size
from .registry import Workload
from .session import Session, Subject
from .weights import excite

GATE_TOKENS = 48
BURST_SECONDS = 0.1  # of steps in one sample on a CPU: after another contestant the first is slower
READING = "reading memory"
MEMORY_SHARE = 0.9  # of what is free; activations take the rest


def step_cost(config: FalconH1Config, workload: Workload, dtype: torch.dtype) -> Cost:
    """Bytes and FLOPs of one forward of the whole model at the least, by `cost.py`.

    Decode: `cost.decode_bytes` and `decode_flops` at the depth. Prefill: weights once, keys and
    values written (and read, behind a past), states written; the head for one position per row.
    """
    w, c = workload, config
    state = w.batch * sum(sheet.state_bytes(c, dtype).values())
    moved = sheet.decode_bytes(c, w.past + w.length, w.batch, dtype)
    new = w.batch * sheet.kv_bytes(c, w.length, dtype)
    if w.phase == "decode":
        flops = w.batch * sheet.decode_flops(c, w.past + 1)["total"]
        return Cost(moved["weights"] + moved["kv"] + state, state + new, flops)
    size = Size(c, dtype, w.batch, w.length, w.past)
    read = moved["weights"] + w.batch * sheet.kv_bytes(c, w.past, dtype) + state
    parts = sheet.decode_flops(c, 0)
    flops = w.batch * (w.length * parts["linear_and_conv"] + parts["head"])
    per_layer = sum(OPERATORS[name].cost(size).flops for name in ("attention", "ssd_scan"))
    return Cost(read, new + state, flops + c.num_hidden_layers * per_layer)


def memory_bytes(config: FalconH1Config, workloads: list[Workload], dtype: torch.dtype) -> int:
    """Weights and the largest cache: what must fit, activations aside."""
    caches = [
        w.batch
        * (
            sheet.kv_bytes(config, w.past + w.length + CACHE_ROOM, dtype)
            + sum(sheet.state_bytes(config, dtype).values())
        )
        for w in workloads
    ]
    return sheet.weight_bytes(config, dtype) + max(caches)


def random_model(config: FalconH1Config, dtype, device, seed: int) -> FalconH1ForCausalLM:
    """A model of random weights under which the gate sees faults."""
    torch.manual_seed(seed)
    model = FalconH1ForCausalLM(config, ops=ops.TORCH, dtype=dtype, device=device)
    ids = torch.arange(GATE_TOKENS, device=device)[None] % config.vocab_size
    excite(model, seed, lambda: model(ids, logits_to_keep=1))
    return model


def filled_cache(model: FalconH1ForCausalLM, workload: Workload, seed: int) -> Cache:
    """A cache of `past` random tokens per row, with room for the workload's own."""
    w = workload
    cache = model.new_cache(w.batch, w.past + w.length + CACHE_ROOM)
    if w.past:
        generator = torch.Generator(model.device).manual_seed(seed)
        for tensor in (cache.keys, cache.values, cache.windows, cache.states):
            tensor.normal_(0, 1, generator=generator)
    cache.lengths.fill_(w.past)
    return cache


@torch.no_grad()
def run(
    name: str,
    model: FalconH1ForCausalLM,
    workloads: list[Workload],
    session: Session,
    names: Sequence[str] = contestants.OURS,
) -> int:
    """Measure `model` in the ways of these names; returns how many of ours were wrong or failed.

    name: the model's, in records. names: from `contestants.select`.
    """
    device, dtype, config, seed = model.device, model.dtype, model.config, session.seed
    budget = session.budget
    if device.type == "cpu":
        budget = budget._replace(burst=BURST_SECONDS)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(b: int, l: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (b, l), device=device, generator=generator)

    ids = draw(2, min(GATE_TOKENS, config.max_position_embeddings))
    exact = layer.under(model, ops.TORCH)(ids, logits_to_keep=1)[:, -1]
    people, away = contestants.gather(model, names)
    session.results.absent(away)
    gates = {one.name: _admit(one, exact, ids) for one in people.values()}
    wrong = set()
    for w in workloads:
        cost = step_cost(config, w, dtype)
        subject = Subject("generate", w.phase, name, w, dtype, cost)
        parts = {n: dict(part) for n, part in gates.items() if w.phase in people[n].phases}
        kept = memory_bytes(config, [w], dtype) - sheet.weight_bytes(config, dtype)
        for one, reason in _unserved(w, people, machine.free_bytes(device) * MEMORY_SHARE - kept):
            if parts.get(one, {}).get("status") == "timed":
                parts[one] = {"status": "absent", "reason": reason}
        calls = {}
        try:
            tokens, cache = draw(w.batch, w.length), filled_cache(model, w, seed)
            for one, part in parts.items():
                if part["status"] == "timed" and (
                    call := _bind(people[one], part, w, tokens, cache)
                ):
                    calls[one] = call
            if w.phase == "decode" and device.type == "cpu" and calls:
                calls[READING] = torch.ones(machine.CPU_SIZES[-1] // 4).sum
            taken = timing.measure(calls, session.clock, budget)
            for one, call in calls.items():
                if settings := getattr(call, "settings", ""):
                    parts[one]["settings"] = settings
        except Exception as error:
            if not contest.out_of_memory(error):
                raise
            session.skip(subject)
            continue
        finally:
            for call in calls.values():
                getattr(call, "close", int)()
            calls = call = cache = None
        _add_times(parts, taken, subject)
        session.publish(subject, parts)
        wrong |= contest.faulty(gates | parts, contestants.PEERS)
    return len(wrong)


def _add_times(
    parts: dict[str, dict[str, Any]], taken: dict[str, timing.Timing], subject: Subject
) -> None:
    """Fill the parts of those who were timed: tokens/s, and ratios to the peers and to memory."""
    w, reading = subject.workload, taken.pop(READING, None)
    for one, measured in taken.items():
        parts[one] |= contest.times(measured)
        parts[one]["tokens_per_second"] = w.batch * w.length / measured.p50
        if reading is not None:
            share = subject.cost.bytes / machine.CPU_SIZES[-1]
            parts[one]["percent_of_reading"] = {
                point: 100 * share * times
                for point, times in timing.ratio(reading, measured).items()
            }
        if one not in contestants.PEERS:
            parts[one]["speed_over"] = {
                peer: timing.ratio(taken[peer], measured)
                for peer in contestants.PEERS
                if peer in taken
            }


def _admit(one: Contestant, exact: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """Put a contestant through the gate."""
    try:
        return contest.verdict_part(one.judge(exact, ids))
    except Exception as error:  # as in `contest.run`
        return {"status": "failed", "reason": contest.describe(error)}


def _bind(one: Contestant, part: dict[str, Any], *arguments):
    """The contestant's call; None after an error, which is a result unless memory is short."""
    try:
        return one.bind(*arguments)
    except Exception as error:
        if contest.out_of_memory(error):
            raise
        part |= {"status": "failed", "reason": contest.describe(error)}
        return None


def _unserved(
    workload: Workload, people: dict[str, Contestant], free: float
) -> Iterator[tuple[str, str]]:
    """Who does not take part in a workload, and why.

    free: bytes beside the models and the shared cache, given in the contestants' order.
    """
    for name, one in people.items():
        if reason := one.refuses(workload):
            yield name, reason
        elif (extra := one.extra(workload)) > max(free, 0):
            left = f"{max(free, 0) / 1e9:.1f} GB are left beside the others"
            yield name, f"takes {extra / 1e9:.1f} GB, {left}"
        else:
            free -= extra

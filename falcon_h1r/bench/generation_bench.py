"""`bench generate`: prefill and decode of a whole model, each phase apart.

Prefill is one forward that fills an empty cache and gives the last position's logits. Decode is one
forward per token behind a given depth, and the choice of the likeliest token; the cache holds
random keys, values and states of that depth, which cost what true ones cost, and is set back after
each step so that the depth stays. Times are wall-clock, as a user waits.

The gate: a prompt read whole by TORCH, against the same prompt read by each table as a prefill of
all but one token and a step of one; logits of the last position. Two computations in one dtype
differ by both their errors, which grow as the root of the number of layers: allowed are
SLACK x sqrt(layers) roundoffs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import cost as sheet
from .. import ops
from ..cache import Cache
from ..config import FalconH1Config
from ..generation.graph import DecodeStep
from ..model import FalconH1ForCausalLM
from ..onednn import unusable, use_onednn
from . import contest, gate, layer, peer_model, timing
from .machine import Ceilings
from .operators import CACHE_ROOM, OPERATORS, Cost, Size
from .registry import Workload
from .report import Report, summary
from .weights import excite

GRAPH = ", graph"  # steps captured as a CUDA graph
ONEDNN = "torch, onednn"
SLACK = 10.0  # factor on gate.SLACK: 0.26 in bfloat16 over 44 layers
GATE_TOKENS = 48


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


def tables(device: torch.device, dtype: torch.dtype) -> dict[str, ops.Ops | str]:
    """The operator tables by name, or why one is not run."""
    if device.type != "cuda":
        triton: ops.Ops | str = "needs a GPU (its interpreter is no benchmark)"
    elif dtype == torch.float64:
        triton = "the kernels do not serve float64"
    else:
        try:
            triton = ops.table("triton")
        except ImportError as error:
            triton = f"cannot be imported: {error}"
    return {"reference": ops.REFERENCE, "torch": ops.TORCH, "triton": triton}


def random_model(config: FalconH1Config, dtype, device, seed: int) -> FalconH1ForCausalLM:
    """A model of random weights under which the gate sees faults."""
    torch.manual_seed(seed)
    model = FalconH1ForCausalLM(config, ops=ops.TORCH, dtype=dtype, device=device)
    ids = torch.arange(GATE_TOKENS, device=device)[None] % config.vocab_size
    excite(model, seed, lambda: model(ids, logits_to_keep=1))
    return model


def check(model: FalconH1ForCausalLM, exact: torch.Tensor, ids: torch.Tensor) -> gate.Verdict:
    """The gate for one table: prefill and step against `exact`, (b, vocab) of the whole prompt."""
    cache = model.new_cache(*ids.shape)
    model(ids[:, :-1], cache=cache, logits_to_keep=1)
    return _verdict(model, model(ids[:, -1:], cache=cache)[:, -1], exact)


def check_graph(model: FalconH1ForCausalLM, exact: torch.Tensor, ids: torch.Tensor) -> gate.Verdict:
    """As `check`, with the last two tokens as steps of a graph: what is compiled, and a replay."""
    cache = model.new_cache(*ids.shape)
    model(ids[:, :-2], cache=cache, logits_to_keep=1)
    step = DecodeStep(model, cache)
    step(ids[:, -2])
    return _verdict(model, step(ids[:, -1]), exact)


def _verdict(model, found: torch.Tensor, exact: torch.Tensor, slack: float = 1) -> gate.Verdict:
    layers = model.config.num_hidden_layers
    roundoffs = slack * gate.SLACK[model.dtype] * SLACK * math.sqrt(layers)
    allowed = roundoffs * gate.ROUNDOFF[model.dtype]
    return gate.judge([found], gate.Truth((exact.double(),), ((allowed, allowed),)))


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


def make_step(model: FalconH1ForCausalLM, workload: Workload, ids: torch.Tensor, cache: Cache):
    """The timed call: one forward behind `past` tokens, always from the same depth.

    cache: from `filled_cache`; contestants share it, since it may take most of the memory.
    """
    held = {"ids": ids}

    def prefill():
        cache.lengths.fill_(workload.past)
        model(ids, cache=cache, logits_to_keep=1)

    def decode():
        cache.lengths.fill_(workload.past)
        held["ids"] = model(held["ids"], cache=cache, logits_to_keep=1)[:, -1:].argmax(-1)

    return decode if workload.phase == "decode" else prefill


def make_graph_step(
    model: FalconH1ForCausalLM, workload: Workload, ids: torch.Tensor, cache: Cache
):
    """`make_step` of a decode workload with a captured graph, as `generate` runs it on a GPU."""
    step, held = DecodeStep(model, cache), {"ids": ids[:, -1]}

    def decode():
        cache.lengths.fill_(workload.past)
        step.past_b.fill_(workload.past)
        held["ids"] = step(held["ids"]).argmax(-1)

    return decode


@torch.no_grad()
def run(
    name: str,
    model: FalconH1ForCausalLM,
    workloads: list[Workload],
    ceilings: Ceilings,
    budget: timing.Budget,
    report: Report,
    seed: int = 0,
    peers: bool = False,
) -> int:
    """Measure `model` under every table into `report`; returns how many of ours were wrong.

    peers: also transformers' model of the same weights, which rounds more often and is allowed
    twice as much.
    """
    device, dtype, config = model.device, model.dtype, model.config
    clock = timing.WallClock(device)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(b: int, l: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (b, l), device=device, generator=generator)

    people, gates = {}, {}
    ids = draw(2, min(GATE_TOKENS, config.max_position_embeddings))
    exact = layer.under(model, ops.TORCH)(ids, logits_to_keep=1)[:, -1]
    ways = {"": (check, make_step)}
    if device.type == "cuda":
        ways[GRAPH] = (check_graph, make_graph_step)

    def admit(name: str, candidate, maker, judged_by) -> None:
        """Put a contestant through the gate; a string is the reason why there is none."""
        if isinstance(candidate, str):
            gates[name] = {"status": "absent", "reason": candidate}
            return
        try:
            checked = judged_by(candidate, exact, ids)._asdict()
        except Exception as error:  # as in `contest.run`
            gates[name] = {"status": "failed", "reason": contest.describe(error)}
            return
        passed, reason = checked.pop("passed"), checked.pop("reason")
        gates[name] = {"status": "timed" if passed else "wrong", "reason": reason}
        gates[name]["gate"] = {k: v for k, v in checked.items() if v < math.inf}
        if passed:
            people[name] = (candidate, maker)

    for table, found in tables(device, dtype).items():
        candidate = found if isinstance(found, str) else layer.under(model, found)
        for way, (judged_by, maker) in ways.items():
            if way != GRAPH or not (table == "reference" or isinstance(found, str)):
                admit(table + way, candidate, maker, judged_by)
    reason = unusable(model)
    admit(ONEDNN, reason or use_onednn(layer.under(model, ops.TORCH)), make_step, check)
    if peers:

        def judged(peer, exact, ids):
            return _verdict(model, peer_model.last_logits(peer, ids), exact, slack=2)

        admit("transformers", peer_model.transformers_model(model), peer_model.make_step, judged)
    for w in workloads:
        cost = step_cost(config, w, dtype)
        shared = _describe(name, w, dtype, cost, ceilings)
        title = summary(f"generate {name} {w} {shared['dtype']}", cost, shared["bound"])
        served = {n for n in gates if w.phase == "decode" or not n.endswith(GRAPH)}
        parts = {name: dict(part) for name, part in gates.items() if name in served}
        if w.length > gate.LOOP_TOKENS and "reference" in parts:
            served.discard("reference")
            parts["reference"] = {"status": "absent", "reason": "a Python loop over tokens"}
        try:
            tokens = draw(w.batch, w.length)
            cache = filled_cache(model, w, seed)
            calls = {
                name: maker(one, w, tokens, cache)
                for name, (one, maker) in people.items()
                if name in served
            }
            taken = timing.measure(calls, clock, budget)
        except Exception as error:
            if not contest.out_of_memory(error):
                raise
            report.skipped(title, shared, "out of memory")
            continue
        finally:
            calls = cache = None
        for table, found in taken.items():
            parts[table] |= contest.times(found)
            contest.rates(parts[table], cost, dtype, ceilings)
            parts[table]["tokens_per_second"] = w.batch * w.length / found.p50
        report.results(title, shared, parts)
    ours = [part for name, part in gates.items() if name != "transformers"]
    return sum(part["status"] in ("wrong", "failed") for part in ours)


def _describe(name, w: Workload, dtype, cost: Cost, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "bench": "generate",
        "op": w.phase,
        "model": name,
        "phase": w.phase,
        "batch": w.batch,
        "length": w.length,
        "past": w.past,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_read": cost.read,
        "bytes_written": cost.written,
        "bytes": cost.bytes,
        "bytes_per_token": cost.bytes / (w.batch * w.length),
        "flops": cost.flops,
        "bound": contest.bound_by(cost, dtype, ceilings),
    }

"""`bench layer`: one hybrid block, cache included, under each operator table and in transformers.

All have the same weights and start from the same cache. The gate compares the block's output and
the SSM state it leaves with the float64 block, under weights that let faults show (`weights.py`).
Everyone is allowed LAYER_SLACK times the roundoffs of a single operator (bfloat16 3.1e-2, float16
4e-3), transformers, which rounds more often, twice that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import cost as sheet
from .. import ops
from ..cache import Cache, Span
from ..config import FalconH1Config
from ..model import FalconH1ForCausalLM
from . import contest, gate, peer_layer
from .implementations import Bound, Implementation
from .machine import Ceilings
from .operators import CACHE_ROOM, OPERATORS, Cost, Draw, Size
from .registry import Workload
from .report import Report, summary
from .timing import Budget
from .weights import excite

LAYER_SLACK = 8.0


def block_config(config: FalconH1Config) -> FalconH1Config:
    """The same model with one layer, and no vocabulary to speak of."""
    return replace(config, num_hidden_layers=1, vocab_size=16, tie_word_embeddings=True)


def layer_cost(config: FalconH1Config, workload: Workload, dtype: torch.dtype) -> Cost:
    """Weights once; x in and out; keys and values read and appended; window and state both ways."""
    one, w = block_config(config), workload
    size = Size(one, dtype, w.batch, w.length, w.past)
    outside = (one.vocab_size + 1) * one.hidden_size * dtype.itemsize  # embedding, final norm
    weights = sheet.weight_bytes(one, dtype) - outside
    stream = w.batch * w.length * one.hidden_size * dtype.itemsize
    states = w.batch * sum(sheet.state_bytes(one, dtype).values())
    past = w.batch * sheet.kv_bytes(one, w.past, dtype)
    new = w.batch * sheet.kv_bytes(one, w.length, dtype)
    names = ("decode_attention", "ssd_step") if w.phase == "decode" else ("attention", "ssd_scan")
    flops = w.batch * w.length * sheet.decode_flops(one, 0)["linear_and_conv"]
    flops += sum(OPERATORS[name].cost(size).flops for name in names)
    return Cost(weights + stream + past + states, stream + new + states, flops)


def under(model: FalconH1ForCausalLM, table: ops.Ops, dtype=None) -> FalconH1ForCausalLM:
    """A model of the same weights, shared unless `dtype` differs, under another operator table."""
    dtype = model.dtype if dtype is None else dtype
    other = FalconH1ForCausalLM(model.config, ops=table, dtype=dtype, device="meta")
    kinds = {name: parameter.dtype for name, parameter in other.named_parameters()}
    weights = {name: p.to(kinds[name]) for name, p in model.named_parameters()}
    other.load_state_dict(weights, strict=False, assign=True)
    return other


def make_inputs(
    model: FalconH1ForCausalLM, workload: Workload, device: torch.device, seed: int
) -> dict[str, Any]:
    """x_bld, and a cache that holds `past` random tokens."""
    w, draw, config = workload, Draw(seed, device), model.config
    cache = model.new_cache(w.batch, w.past + w.length + CACHE_ROOM)
    if w.past:
        for tensor in (cache.keys, cache.values, cache.windows, cache.states):
            tensor.normal_(0, 1, generator=draw.generator)
        cache.lengths.fill_(w.past)
    x = draw.normal(w.batch, w.length, config.hidden_size, dtype=model.dtype)
    return {"x_bld": x, "cache": cache, "workload": w}


def copy_of(cache: Cache, dtype: torch.dtype | None = None) -> Cache:
    """A private copy; dtype: of keys, values and windows, the states at least as wide as now."""
    tensors = []
    for tensor in (cache.keys, cache.values, cache.windows, cache.states):
        kind = tensor.dtype if dtype is None else torch.promote_types(tensor.dtype, dtype)
        tensors.append(tensor.to(kind, copy=True))
    return Cache(*tensors, cache.lengths.clone())


def bind(model: FalconH1ForCausalLM, inputs: dict[str, Any], compiled: bool = False) -> Bound:
    """The block's forward over a private cache."""
    block = model.model["layers"][0]
    cache = copy_of(inputs["cache"], model.dtype)
    layer, x = cache.layer(0), inputs["x_bld"].to(model.dtype)
    wide = torch.promote_types(model.dtype, torch.float32)
    span = Span.plan(model.config, cache, x, None, None, wide)
    forward = block
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(block, dynamic=False)
    return Bound(lambda: forward(x, span, layer), lambda out: (out, layer.state_bhpn))


def contestants(
    model: FalconH1ForCausalLM, workload: Workload, device: torch.device, compiled: bool
) -> list[Implementation]:
    """The block under each table, torch.compile where asked for, and transformers' layer."""

    def ours(name: str, table: ops.Ops, compiled: bool = False) -> Implementation:
        other = under(model, table)
        return Implementation(name, lambda inputs: bind(other, inputs, compiled), slack=LAYER_SLACK)

    people = [ours("torch", ops.TORCH)]
    if workload.phase != "decode" and workload.length > gate.LOOP_TOKENS:
        people.insert(0, Implementation("reference", None, "a Python loop over tokens"))
    else:
        people.insert(0, ours("reference", ops.REFERENCE))
    if compiled:
        people.append(ours("torch.compile", ops.TORCH, compiled=True))
    if device.type != "cuda":
        reason = "needs a GPU (its interpreter is no benchmark)"
        people.append(Implementation("triton", None, reason))
    elif model.dtype == torch.float64:
        people.append(Implementation("triton", None, "the kernels do not serve float64"))
    else:
        try:
            people.append(ours("triton", ops.table("triton")))
        except ImportError as error:
            people.append(Implementation("triton", None, f"cannot be imported: {error}"))
    return [*people, peer_layer.transformers_layer(model, LAYER_SLACK)]


def find_truth(model: FalconH1ForCausalLM, inputs: dict[str, Any]) -> gate.Truth:
    """The float64 block's output and state; allowed: what one operator may err, before slack."""
    exact = _run(bind(under(model, ops.TORCH, torch.float64), inputs))
    floor = gate.SLACK[model.dtype] * gate.ROUNDOFF[model.dtype]
    return gate.Truth(exact, ((floor, floor),) * len(exact))


def _run(bound: Bound) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone() for tensor in bound.outputs(bound.call()))


@torch.no_grad()
def run(
    name: str,
    config: FalconH1Config,
    workloads: list[Workload],
    dtype: torch.dtype,
    device: torch.device,
    clock,
    ceilings: Ceilings,
    budget: Budget,
    report: Report,
    compiled: bool = False,
    seed: int = 0,
) -> int:
    """Measure one block of `config` into `report`; returns how many of our own were wrong."""
    torch.manual_seed(seed)
    wrong = 0
    model = FalconH1ForCausalLM(block_config(config), ops=ops.TORCH, dtype=dtype, device=device)
    for w in workloads:
        cost = layer_cost(config, w, dtype)
        shared = {
            "bench": "layer",
            "op": "layer",
            "model": name,
            "phase": w.phase,
            "batch": w.batch,
            "length": w.length,
            "past": w.past,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes_read": cost.read,
            "bytes_written": cost.written,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "bound": contest.bound_by(cost, dtype, ceilings),
        }
        title = summary(f"layer {name} {w} {shared['dtype']}", cost, shared["bound"])
        try:
            inputs = make_inputs(model, w, device, seed)
            excite(model, seed, bind(model, inputs).call)
            truth = find_truth(model, inputs)
            people = contestants(model, w, device, compiled)
            parts = contest.run(people, inputs, truth, clock, budget)
        except Exception as error:
            if not contest.out_of_memory(error):
                raise
            report.skipped(title, shared, "out of memory")
            continue
        finally:
            inputs = truth = people = None
        for implementation, part in parts.items():
            contest.rates(part, cost, dtype, ceilings)
            ours = implementation != "transformers"
            wrong += ours and part["status"] in ("wrong", "failed")
        report.results(title, shared, parts)
    return wrong

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
from . import gate, peer_layer
from .contest import Bound, Implementation
from .implementations import COMPILED, NO_FLOAT64, kernels_away
from .operators import CACHE_ROOM, OPERATORS, Cost, Draw, Size
from .peers import TRANSFORMERS, import_error
from .registry import Workload
from .session import Session, Subject
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
    layer, x = cache.layers()[0], inputs["x_bld"].to(model.dtype)
    wide = torch.promote_types(model.dtype, torch.float32)
    span = Span.plan(model.config, cache, x, None, None, wide)
    forward = block
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(block, dynamic=False)
    return Bound(lambda: forward(x, span, layer), lambda out: (out, layer.state_bhpn))


def contestants(
    model: FalconH1ForCausalLM, workload: Workload, session: Session
) -> list[Implementation]:
    """The block under each table, torch.compile where asked for, and transformers' layer."""

    def ours(name: str, table: ops.Ops, compiled: bool = False) -> Implementation:
        other = under(model, table)
        return Implementation(name, lambda inputs: bind(other, inputs, compiled), slack=LAYER_SLACK)

    if workload.phase != "decode" and workload.length > gate.LOOP_TOKENS:
        people = [Implementation("reference", None, "a Python loop over tokens")]
    else:
        people = [ours("reference", ops.REFERENCE)]
    people.append(ours("torch", ops.TORCH))
    if session.compiled:
        people.append(ours("torch.compile", COMPILED, compiled=True))
    if not kernels_away(session.device):
        served = model.dtype != torch.float64
        triton = ours("triton", ops.table("triton")) if served else None
        people.append(triton or Implementation("triton", None, NO_FLOAT64))
    if not import_error(TRANSFORMERS):
        people.append(peer_layer.transformers_layer(model, LAYER_SLACK))
    return people


def find_expected(model: FalconH1ForCausalLM, inputs: dict[str, Any]) -> gate.Expected:
    """The float64 block's output and state; allowed: what one operator may err, before slack."""
    exact = _run(bind(under(model, ops.TORCH, torch.float64), inputs))
    floor = gate.SLACK[model.dtype] * gate.ROUNDOFF[model.dtype]
    return gate.Expected(exact, ((floor, floor),) * len(exact))


def _run(bound: Bound) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone() for tensor in bound.outputs(bound.call()))


@torch.no_grad()
def run(
    name: str,
    config: FalconH1Config,
    workloads: list[Workload],
    dtype: torch.dtype,
    session: Session,
) -> int:
    """Measure one block of `config`; returns how many of our own forms were wrong or failed."""
    torch.manual_seed(session.seed)
    device, reasons = session.device, {"triton": kernels_away(session.device)}
    reasons["transformers"] = import_error(TRANSFORMERS)
    session.results.absent({name: reason for name, reason in reasons.items() if reason})
    model = FalconH1ForCausalLM(block_config(config), ops=ops.TORCH, dtype=dtype, device=device)
    wrong = 0
    for w in workloads:

        def prepare(w=w):
            inputs = make_inputs(model, w, device, session.seed)
            excite(model, session.seed, bind(model, inputs).call)
            return contestants(model, w, session), inputs, find_expected(model, inputs)

        cost = layer_cost(config, w, dtype)
        wrong += session.measure(Subject("layer", "layer", name, w, dtype, cost), prepare)
    return wrong

"""Who takes part in `bench generate`: our ways to run a model, and the peers, each with its gate.

One more way is one more name in `OURS` and one more `Contestant` in `ours`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cost as sheet
from .. import ops
from ..cache import Cache
from ..cpu import CompiledPrefill, CompiledStep, int8, require_compiler
from ..cpu.onednn import unusable, use_onednn
from ..generation.graph import DecodeStep
from ..model import FalconH1ForCausalLM
from . import gate, layer, llama_model, peer_model
from .implementations import NO_FLOAT64, kernels_away
from .registry import Workload

GRAPH = ", graph"  # steps captured as a CUDA graph
ONEDNN = "torch, onednn"
COMPILED = "torch, compiled"  # prefill and steps through torch.compile
OURS = ("reference", "torch", "torch" + GRAPH, "triton", "triton" + GRAPH, ONEDNN, COMPILED)
INT8 = "torch, int8"  # not what the dtype says, so only where it is asked for
PEERS = ("transformers", "llama.cpp")
INT8_ERROR = 0.02  # of a layer's result; about twice what dynamic int8 loses
SLACK = 10.0  # factor on gate.SLACK: 0.26 in bfloat16 over 44 layers


def _nothing(workload: Workload) -> Any:
    return 0


class Contestant(NamedTuple):
    """One way to run the model.

    judge(exact, ids): whether it gives `exact`, (b, vocab), as the logits behind ids (b, l).
    bind(workload, ids, cache): the call that is timed, with the attributes that it needs of these:
    `prepare`, called before each sample outside the time, `close`, called at the end, and
    `settings`, text for the record. refuses(workload): why it does not take part in this one, or
    anything false. extra(workload): bytes that it takes beyond our weights
    and the one cache.
    """

    name: str
    judge: Callable[[Tensor, Tensor], gate.GateResult] | None = None
    bind: Callable[[Workload, Tensor, Cache], Callable[[], Any]] | None = None
    phases: tuple[str, ...] = ("prefill", "resume", "decode")
    refuses: Callable[[Workload], Any] = _nothing
    extra: Callable[[Workload], int] = _nothing


def select(only: Sequence[str], skip: Sequence[str], peers: bool) -> list[str]:
    """Names of those who take part: `only` these, where any is given, and none of `skip`.

    Raises ValueError for an unknown name, and where nobody is left.
    """
    known = (*OURS, INT8, *PEERS)
    for name in (*only, *skip):
        if name not in known:
            raise ValueError(f"no way to run a model is called {name!r}; there are: {known}")
    able = known if peers else (*OURS, INT8)
    found = [name for name in able if name in (only or set(known) - {INT8})]
    if not (found := [name for name in found if name not in skip]):
        raise ValueError("nobody is left to measure")
    return found


def gather(
    model: FalconH1ForCausalLM, names: Sequence[str]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants of these names, in the order in which they are run; who is away, and why."""
    people, away = {}, {}
    for name, make in (*ours(model), *peers(model)):
        if name in names:
            one = make()
            (away if isinstance(one, str) else people)[name] = one
    return people, away


def ours(model: FalconH1ForCausalLM) -> Iterator[tuple[str, Callable[[], Contestant | str]]]:
    """The model under every operator table, with a graph where there is a GPU, through oneDNN, and
    compiled.

    Names, and functions that make the contestant, or say why there is none.
    """
    for name, found in tables(model.device, model.dtype).items():
        if isinstance(found, str):
            yield name, lambda reason=found: reason
            continue
        refuses = _long_loop if name == "reference" else _nothing
        yield name, partial(_plain, name, partial(layer.under, model, found), refuses)
        if model.device.type == "cuda" and name != "reference":
            yield name + GRAPH, partial(_graph, name + GRAPH, partial(layer.under, model, found))
    through = partial(_plain, ONEDNN, lambda: use_onednn(layer.under(model, ops.TORCH)))
    yield ONEDNN, lambda: unusable(model) or through()
    yield COMPILED, partial(_compiled, model)
    yield INT8, partial(_int8, model)


def peers(model: FalconH1ForCausalLM) -> Iterator[tuple[str, Callable[[], Contestant | str]]]:
    """transformers, which rounds more often and is allowed twice as much, and llama.cpp."""
    yield "transformers", partial(_transformers, model)
    yield "llama.cpp", partial(_llama, model)


def _plain(name: str, make, refuses=_nothing) -> Contestant:
    """Forward after forward, as they come."""
    model = make()
    return Contestant(name, partial(check, model), partial(make_step, model), refuses=refuses)


def _graph(name: str, make) -> Contestant:
    model = make()
    steps = partial(make_graph_step, model)
    return Contestant(name, partial(check_graph, model), steps, phases=("decode",))


def _compiled(model: FalconH1ForCausalLM) -> Contestant | str:
    if reason := unusable(model):
        return reason
    try:
        require_compiler()
    except ValueError as error:
        return str(error)
    streamed = use_onednn(layer.under(model, ops.TORCH), stream=True)
    judge = partial(_judge_compiled, model, streamed)
    return Contestant(COMPILED, judge, partial(_compiled_call, streamed))


def _judge_compiled(model, streamed, exact: Tensor, ids: Tensor) -> gate.GateResult:
    """Steps behind the prompt as others take them, and the prompt twice in one compiled prefill,
    which needs more tokens than a chunk of the scan has."""
    twice = ids.repeat(1, 2)
    expected = model(twice, logits_to_keep=1)[:, -1]
    read = CompiledPrefill(streamed)
    found = read(twice, None, streamed.new_cache(len(ids), twice.shape[1] + 1), 1)[:, -1]
    steps = last_of_two_steps(streamed, ids, CompiledStep)
    return verdict(model, torch.cat([steps, found]), torch.cat([exact, expected]))


def _int8(model: FalconH1ForCausalLM) -> Contestant | str:
    if reason := int8.unusable(model):
        return reason
    other = int8.use_int8(layer.under(model, ops.TORCH))
    judge = partial(_judge_int8, model, other)
    return Contestant(INT8, judge, partial(make_step, other))


def _judge_int8(model, other, exact: Tensor, ids: Tensor) -> gate.GateResult:
    """Layer by layer: through a whole model of random weights one per cent grows to half."""
    found, expected = [], []
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            generator = torch.Generator().manual_seed(len(found))
            x = torch.randn(8, linear.in_features, generator=generator).to(model.dtype)
            y = linear(x).double()
            found.append((other.get_submodule(name)(x).double() / y.norm()).flatten())
            expected.append((y / y.norm()).flatten())
    allowed = (INT8_ERROR, INT8_ERROR)
    return gate.judge([torch.cat(found)], gate.Expected((torch.cat(expected),), (allowed,)))


def _compiled_call(model: FalconH1ForCausalLM, workload: Workload, ids: Tensor, cache: Cache):
    if workload.phase != "decode":
        return _compiled_prefill(model, workload, ids, cache)
    step, held = CompiledStep(model, cache), {"ids": ids[:, -1]}

    def decode():
        cache.lengths.fill_(workload.past)
        held["ids"] = step(held["ids"]).argmax(-1)

    decode()  # compiles
    return decode


def _compiled_prefill(model: FalconH1ForCausalLM, workload: Workload, ids: Tensor, cache: Cache):
    read = CompiledPrefill(model)

    def prefill():
        cache.lengths.fill_(workload.past)
        read(ids, None, cache, 1)

    prefill()  # compiles
    return prefill


def _transformers(model: FalconH1ForCausalLM) -> Contestant | str:
    peer = peer_model.transformers_model(model)
    if isinstance(peer, str):
        return peer
    return Contestant(
        "transformers",
        lambda exact, ids: verdict(model, peer_model.last_logits(peer, ids), exact, slack=2),
        partial(peer_model.make_step, peer),
        extra=lambda w: _kept_bytes(model, w),
    )


def _llama(model: FalconH1ForCausalLM) -> Contestant | str:
    peer = llama_model.llama_model(model)
    if isinstance(peer, str):
        return peer
    return Contestant(
        "llama.cpp",
        lambda exact, ids: peer.judge(
            ids, lambda found, extra: verdict(model, found, exact, slack=2, extra=extra)
        ),
        peer.bind,
        refuses=llama_model.refuses,
        extra=peer.extra_bytes,
    )


def tables(device: torch.device, dtype: torch.dtype) -> dict[str, ops.Ops | str]:
    """The operator tables by name, or why one is not run."""
    reason = kernels_away(device) or (NO_FLOAT64 if dtype == torch.float64 else "")
    triton = reason or ops.table("triton")
    return {"reference": ops.REFERENCE, "torch": ops.TORCH, "triton": triton}


def check(model: FalconH1ForCausalLM, exact: Tensor, ids: Tensor) -> gate.GateResult:
    """The gate for one table: prefill and step against `exact`, (b, vocab) of the whole prompt."""
    cache = model.new_cache(*ids.shape)
    model(ids[:, :-1], cache=cache, logits_to_keep=1)
    return verdict(model, model(ids[:, -1:], cache=cache)[:, -1], exact)


def check_graph(model: FalconH1ForCausalLM, exact: Tensor, ids: Tensor) -> gate.GateResult:
    """As `check`, with the last two tokens as steps of a graph: what is compiled, and a replay."""
    return verdict(model, last_of_two_steps(model, ids, DecodeStep), exact)


def last_of_two_steps(model: FalconH1ForCausalLM, ids: Tensor, form) -> Tensor:
    """Logits (b, vocab) behind ids, the last two of which are steps; form: a class of steps."""
    cache = model.new_cache(ids.shape[0], ids.shape[1] + 1)
    model(ids[:, :-2], cache=cache, logits_to_keep=1)
    step = form(model, cache)
    step(ids[:, -2])
    return step(ids[:, -1])


def verdict(
    model: FalconH1ForCausalLM, found: Tensor, exact: Tensor, slack: float = 1, extra: float = 0
) -> gate.GateResult:
    """The rule for logits; extra: relative error allowed per layer for roundings of another kind.

    Errors of layers add up as the root of their number.
    """
    roundoffs = slack * gate.SLACK[model.dtype] * SLACK
    allowed = roundoffs * gate.ROUNDOFF[model.dtype] + extra
    allowed *= math.sqrt(model.config.num_hidden_layers)
    return gate.judge([found], gate.Expected((exact.double(),), ((allowed, allowed),)))


def make_step(model: FalconH1ForCausalLM, workload: Workload, ids: Tensor, cache: Cache):
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


def make_graph_step(model: FalconH1ForCausalLM, workload: Workload, ids: Tensor, cache: Cache):
    """`make_step` of a decode workload with a captured graph, as `generate` runs it on a GPU."""
    step, held = DecodeStep(model, cache), {"ids": ids[:, -1]}

    def decode():
        cache.lengths.fill_(workload.past)
        step.past_b.fill_(workload.past)
        held["ids"] = step(held["ids"]).argmax(-1)

    return decode


def _long_loop(workload: Workload) -> str:
    return "a Python loop over tokens" if workload.length > gate.LOOP_TOKENS else ""


def _kept_bytes(model: FalconH1ForCausalLM, workload: Workload) -> int:
    """transformers' cache; behind a past also the keys that it gets back, before they grew."""
    w, c = workload, model.config
    keys = w.batch * sheet.kv_bytes(c, w.past + w.length, model.dtype)
    states = w.batch * sum(sheet.state_bytes(c, model.dtype).values())
    return (2 if w.past else 1) * keys + states

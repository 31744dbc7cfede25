"""Decode steps and prefill on a CPU through torch.compile: one graph for all layers.

A step of a small model is some two hundred operators a layer, each a few microseconds of Python
and dispatch for less work than that. Compiled, a block is attention and four or five loops. What
varies from layer to layer - weights and cache - is an input of the graph, so that it is compiled
once; the number of tokens read so far is a symbol in it, so that nothing is compiled again as
sequences grow. In a prefill the loops save passes over memory, and the number of new tokens is a
symbol too.

What stands around the compiled loops, in Python, takes a third of a small model's step. A step's
kernels are therefore recorded, and launched again (`launches.Replay`): what a step attends to is
rounded up and masked, so that nothing but the content of tensors changes for a while.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cache import Cache, Span
from ..chunk import LONGEST_CHUNK
from ..precision import autocasts, compute_dtype
from .launches import Replay, inductor

# Tokens. A step attends to a multiple of ROOM keys, and masks the rest, so that one graph serves. A
# row of an engine has room for a multiple and one more, since no step reads its last token: so a
# compiled step never attends to the whole cache, which would be a graph of its own.
ROOM = 64

# What is compiled is shared by all models of one shape: kept here as torch.compile keeps it, by
# function, up to this many variants (batch sizes, dtypes, configs).
VARIANTS = 64


def _block_step(block, x_bld: Tensor, span: Span, layer, reach: Tensor) -> Tensor:
    # As a number `total` would be a constant of the graph, as a length it is a symbol.
    return block(x_bld, span._replace(total=len(reach)), layer)


def _logits_step(model, x_bld: Tensor) -> Tensor:
    return model.logits(x_bld)


class _Modules:
    """The modules that graphs were made of: graphs run no hook, and follow no replacement."""

    def __init__(self, form: str, model: nn.Module):
        modules = list(model.modules())
        everywhere = nn.modules.module
        self._form = form
        self._hooks = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
        self._hooks += [
            hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self._attributes = [m.__dict__ for m in modules]
        self._parents = [m._modules for m in modules if m._modules]
        self._children = [list(parent.values()) for parent in self._parents]

    def check(self) -> None:
        """Raise ValueError for a hook, a `forward` put on a module, and a replaced module."""
        if any(self._hooks) or any("forward" in attributes for attributes in self._attributes):
            found = (
                "a module has a forward hook or a forward of its own, which a graph does not run"
            )
        elif [list(parent.values()) for parent in self._parents] != self._children:
            found = "a module was replaced after this form was made; make it anew"
        else:
            return
        raise ValueError(f"{self._form}: {found}")


class _Recorded(NamedTuple):
    """A step that can be made again behind any number of keys up to its own."""

    kind: tuple[int, int]  # keys it reads, threads its kernels were made for
    span: Span  # its own tensors, which the kernels read
    replay: Replay

    def play(self, x_bld: Tensor, span: Span) -> Tensor:
        """Logits of other tokens, where `span` says."""
        for own, given in zip(self.span, span):
            if isinstance(own, Tensor):
                own.copy_(given)
        return self.replay.play(x_bld)


class CompiledStep:
    """`model(tokens[:, None], cache=cache)` for one token after another, logits (b, vocab).

    The first call compiles, a few seconds, or less where an earlier process on this machine has
    compiled the same shape; another batch size, dtype or config compiles again, a longer sequence
    or another cache does not. Linear layers of `use_onednn(model, stream=True)` become part of the
    compiled loops; others are called as they are. Other forwards may use the cache in between;
    weights may change in place, but not be replaced by other tensors. A call raises ValueError
    under torch.autocast, and where a module has a forward hook or was replaced. Raises
    ValueError where torch finds no C++ compiler, or the model is not on a CPU.
    """

    def __init__(self, model, cache: Cache):
        if model.device.type != "cpu":
            raise ValueError(f"CompiledStep: serves a CPU, the model is on {model.device}")
        require_compiler()
        self._model, self._cache = model, cache
        self._twin, self._modules = model.under("inductor"), _Modules("CompiledStep", model)
        self._recorded: _Recorded | None = None  # the last step
        self._reach = torch.empty(cache.max_length, dtype=torch.bool)  # only its length counts
        self._layers = cache.layers()
        for layer in self._layers:
            for tensor in (layer.keys_bjse, layer.values_bjse):
                torch._dynamo.mark_dynamic(tensor, 2)
        compile_ = partial(torch.compile, backend=inductor, fullgraph=True, dynamic=False)
        self._block, self._logits = compile_(_block_step), compile_(_logits_step)

    @torch.no_grad()
    def __call__(self, tokens_b: Tensor, span: Span | None = None) -> Tensor:
        """tokens_b: (b,) integers; span: of `Span.step`, else made here.

        Raises ValueError when a row is full, or when there is not one token for each row.
        """
        model, cache = self._model, self._cache
        if tokens_b.shape != (cache.batch_size,):  # a graph would take the first rows of more
            raise ValueError(
                f"tokens_b: {tuple(tokens_b.shape)}, expected ({cache.batch_size},), one a row"
            )
        refuse_autocast("CompiledStep", cache.keys)
        self._modules.check()
        span = self._plan() if span is None else span
        # torch.compile makes graphs of their own for a length of 1, and for a slice of the keys
        # that is all of them. Steps with these lengths run uncompiled.
        compiled = 1 < span.total < cache.max_length
        kind = span.total, torch.get_num_threads()
        recorded, self._recorded = self._recorded, None
        x_bld = model.embed(tokens_b[:, None])
        held, cache.lengths = cache.lengths, ~cache.lengths  # as in the model's forward
        if not compiled:
            recorded = None
            logits = model.logits(model.run(x_bld, span, cache))[:, -1]
        elif recorded is not None and recorded.kind == kind:
            logits = recorded.play(x_bld, span)[:, -1]
        else:
            own = Span(*(p.clone() if isinstance(p, Tensor) else p for p in span))
            recorded = _Recorded(kind, own, Replay())
            logits = self._record(recorded, x_bld)[:, -1]
        cache.lengths = held.add_(1)
        if recorded is None or not recorded.replay.whole:
            return logits
        self._recorded = recorded
        return logits.clone() if recorded.replay.owns(logits) else logits

    def _plan(self) -> Span:
        """Of the next token in every row."""
        model, cache = self._model, self._cache
        ends = cache.lengths + 1
        cache.require_room(ends)
        longest = int(ends.max())
        reach = max(longest, min(-(-longest // ROOM) * ROOM, cache.max_length - 1))
        return Span.step(model.config, cache.lengths, reach, compute_dtype(model.dtype))

    def _record(self, recorded: _Recorded, x_bld: Tensor) -> Tensor:
        """Logits through the compiled blocks, each call of which is recorded."""
        span, replay = recorded.span, recorded.replay
        reach = self._reach[: span.total]
        torch._dynamo.mark_dynamic(reach, 0)
        rest = span._replace(total=0)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            for block, layer in zip(self._twin.model["layers"], self._layers, strict=True):
                x_bld = replay.record(partial(self._block, block), x_bld, rest, layer, reach)
            return replay.record(partial(self._logits, self._twin), x_bld)


def _block_prefill(block, x_bld: Tensor, span: Span, layer, before: Tensor | None) -> Tensor:
    past = 0 if before is None else len(before)
    return block(x_bld, span._replace(total=past + x_bld.shape[1]), layer)


class CompiledPrefill:
    """`model(input_ids, attention_mask, cache, logits_to_keep)` with compiled blocks: same results.

    For prompts and pieces of prompts of one batch size: the first call compiles, some ten seconds,
    the first behind other tokens once more; another length, depth or cache does not. Compiled are
    calls in which all rows hold equally many tokens and get equally many, more than a chunk of the
    scan, and leave room in the cache. Any other - padding, rows of several depths, a few tokens,
    no cache, the last tokens of a full one - runs as `model` does. Raises ValueError where torch
    finds no C++ compiler, or the model is not on a CPU.
    """

    def __init__(self, model):
        if model.device.type != "cpu":
            raise ValueError(f"CompiledPrefill: serves a CPU, the model is on {model.device}")
        require_compiler()
        shortest = min(model.config.mamba_chunk_size, LONGEST_CHUNK) + 1
        compiled = torch.compile(_block_prefill, fullgraph=True, dynamic=False)
        self._twin, self._modules = model.under("inductor"), _Modules("CompiledPrefill", model)
        self._twin.model["layers"] = nn.ModuleList(
            _PrefillBlock(*blocks, compiled, shortest)
            for blocks in zip(model.model["layers"], self._twin.model["layers"])
        )

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """As `FalconH1ForCausalLM.forward`; nothing gets a gradient."""
        refuse_autocast("CompiledPrefill", self._twin.model["embed_tokens"].weight)
        self._modules.check()
        return self._twin(input_ids, attention_mask, cache, logits_to_keep)


class _PrefillBlock(nn.Module):
    """A block that is compiled where that pays, and called as it is elsewhere."""

    def __init__(self, plain, twin, compiled, shortest: int):
        super().__init__()
        self.plain, self.twin = plain, twin
        self._compiled, self._shortest = compiled, shortest

    def forward(self, x_bld: Tensor, span: Span, layer=None) -> Tensor:
        l = x_bld.shape[1]
        past = span.total - l
        level = layer is not None and span.padding_bl is None
        # torch.compile would make graphs of their own for one token before these and for keys up
        # to the end of the cache. A few tokens are not worth a graph.
        few, full = l < self._shortest, level and span.total == layer.keys_bjse.shape[2]
        if not level or few or past == 1 or full:
            return self.plain(x_bld, span, layer)
        before = None
        if span.past_b is not None:
            before = torch.empty(past, dtype=torch.bool)  # only its length counts, as above
            torch._dynamo.mark_dynamic(before, 0)
        for tensor in (x_bld, span.cos_bli, span.sin_bli):
            torch._dynamo.mark_dynamic(tensor, 1)
        for tensor in (layer.keys_bjse, layer.values_bjse):
            torch._dynamo.mark_dynamic(tensor, 2)
        # Lengths that are equal by chance in the first call need not be in the next.
        apart = torch.fx.experimental._config.patch(use_duck_shape=False)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS), apart:
            return self._compiled(self.twin, x_bld, span._replace(total=0), layer, before)


def refuse_autocast(form: str, tensor: Tensor) -> None:
    """Raise ValueError under torch.autocast, for which no graph is made."""
    if autocasts(tensor):
        raise ValueError(
            f"{form}: torch.autocast is on; leave it, or give the model the narrow dtype itself"
        )


def require_compiler() -> None:
    """Raise ValueError where torch.compile cannot make code for this machine's CPU."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(
            "compiling needs a C++ compiler, and torch.compile finds none: install g++, or name "
            "one in $CXX"
        ) from error

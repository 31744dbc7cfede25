"""Decode steps and prefill on a CPU through torch.compile: one graph for all layers.

A step of a small model is some two hundred operators a layer, each a few microseconds of Python
and dispatch for less work than that. Compiled, a block is attention and four or five loops. What
varies from layer to layer - weights and cache - is an input of the graph, so that it is compiled
once; the number of tokens read so far is a symbol in it, so that nothing is compiled again as
sequences grow. In a prefill the loops save passes over memory, and the number of new tokens is a
symbol too.

What torch.compile does around each call of a graph, to find out which one fits and to gather its
inputs, takes a third of a small model's step. A step's calls are therefore recorded, as a CUDA
graph records launches, and made again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cache import Cache, Span
from ..ssd import LONGEST_CHUNK

# What is compiled is shared by all models of one shape: kept here as torch.compile keeps it, by
# function, up to this many variants (batch sizes, level or ragged rows, dtypes, configs).
VARIANTS = 64

_recording = threading.local()


def _block_step(block, x_bld: Tensor, span: Span, layer, reach: Tensor) -> Tensor:
    # As a number `total` would be a constant of the graph, as a length it is a symbol.
    return block(x_bld, span._replace(total=len(reach)), layer)


def _head_step(head, x_bld: Tensor) -> Tensor:
    return head(x_bld)


def _recorded_inductor(graph, examples) -> Callable:
    """torch.compile's own compiler, as a backend whose calls can be recorded.

    One function, not one for each object: torch.compile shares graphs by it.
    """
    from torch._dynamo.backends.registry import lookup_backend

    # Thirty assertions a layer: `_Tape.form` looks at the shapes of what varies, once a step.
    with torch._inductor.config.patch(size_asserts=False):
        compiled = lookup_backend("inductor")(graph, examples)

    def run(*inputs):
        outputs = compiled(*inputs)
        if (calls := getattr(_recording, "calls", None)) is not None:
            calls.append((compiled, inputs, outputs))
        return outputs

    return run


class _Tape:
    """The graphs that one step called, in their order, to be called again with new inputs.

    Graphs get all their inputs as arguments: weights and cache, which are the same tensors in every
    step, and what varies.
    """

    def __init__(self):
        self._calls: list[tuple[Callable, list, list[tuple[int, str]]]] = []
        self.whole = True  # False: something was called that is no graph of ours

    @staticmethod
    def form(span: Span) -> tuple:
        """What decides which graph fits: steps of one cache in which this is equal share a tape."""
        return tuple(
            (part.shape, part.dtype, part.stride()) if isinstance(part, Tensor) else part is None
            for part in span
        )

    def record(self, function: Callable, varying: dict, *arguments) -> Tensor:
        """function(*arguments), which is compiled.

        varying: what the next step gives instead, by name: tensors among the arguments, and
        integers. The graph's other integers have to differ from those.
        """
        _recording.calls = calls = []
        try:
            out = function(*arguments)
        finally:
            del _recording.calls
        match calls:
            case [(graph, inputs, [found])] if found is out:
                places = [
                    (place, name)
                    for place, given in enumerate(inputs)
                    for name, value in varying.items()
                    if given is value or (type(given) is type(value) is int and given == value)
                ]
                self._calls.append((graph, list(inputs), places))
            case _:
                self.whole = False
        return out

    def play(self, varying: dict) -> Callable:
        """What to call in place of the functions, in the recorded order."""
        calls = iter(self._calls)

        def call(module, x_bld: Tensor, *_) -> Tensor:
            varying["x_bld"] = x_bld
            graph, inputs, places = next(calls)
            for place, name in places:
                inputs[place] = varying[name]
            return graph(*inputs)[0]

        return call


class CompiledStep:
    """`model(tokens[:, None], cache=cache)` for one token after another, logits (b, vocab).

    The first call compiles, a few seconds, or less where an earlier process on this machine has
    compiled the same shape; another batch size, dtype or config compiles again, a longer sequence
    or another cache does not. Linear layers of `use_onednn(model, stream=True)` become part of the
    compiled loops; others are called as they are. Other forwards may use the cache in between;
    weights may change in place, but not be replaced by other tensors. Raises ValueError where torch
    finds no C++ compiler, or the model is not on a CPU.
    """

    def __init__(self, model, cache: Cache):
        if model.device.type != "cpu":
            raise ValueError(f"CompiledStep: serves a CPU, the model is on {model.device}")
        require_compiler()
        self._model, self._cache = model, cache
        self._tapes: dict[tuple, _Tape] = {}
        self._reach = torch.empty(cache.max_length, dtype=torch.bool)  # only its length counts
        self._layers = cache.layers()
        for layer in self._layers:
            for tensor in (layer.keys_bjse, layer.values_bjse):
                torch._dynamo.mark_dynamic(tensor, 2)
        compile_ = partial(torch.compile, backend=_recorded_inductor, fullgraph=True, dynamic=False)
        self._block, self._head = compile_(_block_step), compile_(_head_step)

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
        if span is None:
            work = torch.promote_types(model.dtype, torch.float32)
            shape = (cache.batch_size, 1)
            span = Span.plan(model.config, cache, shape, None, None, model.device, work)
        # The first and the last token of a cache are not compiled: torch.compile takes a length of
        # 1, and all keys where else it has a part of them, for cases of their own.
        form = _Tape.form(span) if 1 < span.total < cache.max_length else None
        recorded = None
        if form is None:
            call = None
        elif form in self._tapes:
            call = self._tapes[form].play(span._asdict())
        else:
            call = self._record(recorded := _Tape(), span)
        logits = model(tokens_b[:, None], None, cache, 1, span=span, call=call)
        if recorded is not None and recorded.whole:
            self._tapes[form] = recorded
        cache.lengths += 1
        return logits[:, -1]

    def _record(self, tape: _Tape, span: Span) -> Callable:
        """What to call in place of the blocks and the head."""
        # A block's graph has one number beside `total`, the length of the cache, which differs.
        varying = span._asdict()
        reach = self._reach[: span.total]
        torch._dynamo.mark_dynamic(reach, 0)
        layers = iter(self._layers)

        def call(module, x_bld, span=None, _=None):
            varying["x_bld"] = x_bld
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                if span is None:
                    return tape.record(self._head, varying, module, x_bld)
                part = span._replace(total=0), next(layers), reach
                return tape.record(self._block, varying, module, x_bld, *part)

        return call


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
        self._model = model
        self._chunk = min(model.config.mamba_chunk_size, LONGEST_CHUNK)
        self._block = torch.compile(_block_prefill, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """As `FalconH1ForCausalLM.forward`; nothing gets a gradient."""
        # Lengths that are equal by chance in the first call need not be in the next.
        apart = torch.fx.experimental._config.patch(use_duck_shape=False)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS), apart:
            return self._model(
                input_ids, attention_mask, cache, logits_to_keep, call=self._call_module
            )

    def _call_module(self, module, x_bld: Tensor, span: Span | None = None, layer=None) -> Tensor:
        if span is None:
            return module(x_bld)
        l = x_bld.shape[1]
        past = span.total - l
        level = layer is not None and span.padding_bl is None
        # torch.compile takes one token before these, and keys up to the end of the cache, for
        # cases of their own; a few tokens are not worth one.
        if not level or l <= self._chunk or past == 1 or span.total == layer.keys_bjse.shape[2]:
            return module(x_bld, span, layer)
        before = None
        if span.past_b is not None:
            before = torch.empty(past, dtype=torch.bool)  # only its length counts, as above
            torch._dynamo.mark_dynamic(before, 0)
        for tensor in (x_bld, span.cos_bli, span.sin_bli):
            torch._dynamo.mark_dynamic(tensor, 1)
        for tensor in (layer.keys_bjse, layer.values_bjse):
            torch._dynamo.mark_dynamic(tensor, 2)
        return self._block(module, x_bld, span._replace(total=0), layer, before)


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

"""transformers' FalconH1ForCausalLM beside ours: the same weights, its inner tensors by our names.

Its modules are seen by hooks. Its mixer and attention call functions of their file, which are
replaced while a forward runs (since 5.15 its modules `conv1d` and `act` are never called). dt is
what its own softplus and clamp return. Not to be seen: the branches' contributions by themselves
(`residual.mid` has them), and z in a stretch of tokens where there is no gated norm.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..bench.peer_model import cache_name, transformers_model
from ..taps import tap_of
from .dump import Inputs

_MODULE = "transformers.models.falcon_h1.modeling_falcon_h1"
_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
    "apply_rotary_pos_emb",
    "ALL_ATTENTION_FUNCTIONS",
)
# Modules of a layer: the tap of their input (only where it is replaced), the tap of their output.
_MODULES = {
    "": ("residual.in", "residual.out"),
    "input_layernorm": ("", "input_layernorm"),
    "mamba.in_proj": ("mamba.in_proj.in", "mamba.in_proj"),
    "mamba.out_proj": ("", "mamba.out_proj"),
    "self_attn": ("self_attn.in", ""),
    "self_attn.q_proj": ("", "self_attn.q_proj"),
    "self_attn.k_proj": ("", "self_attn.k_proj"),
    "self_attn.v_proj": ("", "self_attn.v_proj"),
    "self_attn.o_proj": ("", "self_attn.o_proj"),
    "pre_ff_layernorm": ("residual.mid", "pre_ff_layernorm"),
    "feed_forward": ("", "contribution.mlp"),
    "feed_forward.gate_proj": ("", "feed_forward.gate_proj"),
    "feed_forward.up_proj": ("", "feed_forward.up_proj"),
    "feed_forward.down_proj": ("feed_forward.swiglu.out", "feed_forward.down_proj"),
}


def version() -> str:
    """Of the installed transformers; raises ValueError where there is none."""
    try:
        return importlib.import_module("transformers").__version__
    except ImportError as error:
        raise ValueError(f"--against transformers: not installed ({error})") from error


class TransformersPeer:
    """transformers with the weights of `model`, shared; called as `faults.Patient` is.

    change(module): acts on its model once, to plant a fault in it. Raises ValueError where
    transformers is not installed or cannot serve the dtype.
    """

    def __init__(self, model, change: Callable | None = None):
        version()
        self.model = transformers_model(model)
        if isinstance(self.model, str):
            raise ValueError(f"transformers: {self.model}")
        # Its own loader has these in the model's dtype; the values are the same, see `rounded`.
        for layer in self.model.model.layers:
            for name in ("A_log", "D", "dt_bias"):
                parameter = getattr(layer.mamba, name)
                value = parameter.data.to(model.dtype, copy=True)
                setattr(layer.mamba, name, torch.nn.Parameter(value, requires_grad=False))
        if change is not None:
            change(self.model)
        self.config, self.dtype = model.config, model.dtype

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits (b, l, vocab)."""
        return self._forward(inputs)

    @torch.no_grad()
    def trace(self, inputs: Inputs, forced: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors by tap names, in the layout of input_ids.

        forced: tensors that take the place of what enters a module or function, by the taps of
        `FORCED`; the place is still recorded as it was.
        """
        with _Watching(self.model, self.config, forced or {}) as seen:
            seen.put("logits", self._forward(inputs))
        return seen.joined(inputs.ids.shape[1])

    def _forward(self, inputs: Inputs) -> Tensor:
        ids, mask, pieces = inputs
        if pieces is None:
            given = {}
            if mask is not None:  # as its generate() does it
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)
                given = {"attention_mask": mask.long(), "position_ids": positions}
            return self.model(ids, use_cache=False, **given).logits
        name, held, logits = cache_name(self.model), None, []
        for piece in ids.split(list(pieces), 1):
            out = self.model(piece, use_cache=True, **{name: held})
            held = out[name]
            logits.append(out.logits)
        return torch.cat(logits, dim=1)


class _Last(TorchFunctionMode):
    """Remembers what the last softplus or clamp returned."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.softplus, torch.clamp, Tensor.clamp):
            self.value = out
        return out


class _Watching:
    """Hooks and replaced functions for the length of a `with` block."""

    def __init__(self, model, config, forced: dict[str, Tensor]):
        self.model, self.config, self.forced = model, config, forced
        self.calls: dict[str, list[Tensor]] = {}
        self.layer = 0

    def put(self, name: str, tensor: Tensor) -> None:
        self.calls.setdefault(name, []).append(tensor.detach().clone())

    def own(self, name: str) -> str:
        return f"layers.{self.layer}.{name}"

    def entering(self, name: str, tensor: Tensor) -> Tensor:
        """Record what enters a place, and give back what shall enter it; (b, l, ...)."""
        start = sum(call.shape[1] for call in self.calls.get(name, ()))
        self.put(name, tensor)
        if name not in self.forced:
            return tensor
        forced = self.forced[name][:, start : start + tensor.shape[1]]
        return forced.to(tensor.dtype).view(tensor.shape)

    def joined(self, length: int) -> dict[str, Tensor]:
        """Calls joined along l; what was not seen at all of the `length` tokens is left out."""
        out = {}
        for name, calls in self.calls.items():
            axes = tap_of(name).axes.split()
            out[name] = torch.cat(calls, axes.index("l")) if "l" in axes else calls[-1]
            if "l" in axes and out[name].shape[axes.index("l")] != length:
                del out[name]
        return out

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with self.stack:  # undone if anything below fails
            for index, layer in enumerate(self.model.model.layers):
                self._pre(layer, lambda module, args, index=index: setattr(self, "layer", index))
                for path, (before, after) in _MODULES.items():
                    module = layer.get_submodule(path)
                    if before:
                        self._replace_input(module, before)
                    if after:
                        self._record_output(module, after)
                self._pre(layer.mamba.out_proj, self._gate_out)
                if self.config.mamba_rms_norm:
                    self._pre(layer.mamba.norm, self._gate_in)
            body = self.model.model
            self._record_output(body.embed_tokens, "embed_tokens", layered=False)
            self._pre(body.layers[0], self._embedding)
            self._replace_input(body.final_layernorm, "final_layernorm.in", layered=False)
            self._record_output(body.final_layernorm, "final_layernorm", layered=False)
            if not self.config.tie_word_embeddings:
                self._record_output(self.model.lm_head, "lm_head", layered=False)
            self._replace_functions()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.close()

    # --- modules ----------------------------------------------------------------------------------

    def _pre(self, module, hook) -> None:
        self.stack.callback(module.register_forward_pre_hook(hook).remove)

    def _replace_input(self, module, name: str, layered: bool = True) -> None:
        def hook(module, args, kwargs):
            full = self.own(name) if layered else name
            if args:
                return (self.entering(full, args[0]), *args[1:]), kwargs
            changed = self.entering(full, kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": changed}

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self.stack.callback(handle.remove)

    def _record_output(self, module, name: str, layered: bool = True) -> None:
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            self.put(self.own(name) if layered else name, output)

        self.stack.callback(module.register_forward_hook(hook).remove)

    def _embedding(self, module, args) -> None:
        self.put("embedding", args[0])

    def _gate_out(self, module, args) -> None:
        self.put(self.own("mamba.gate.out"), args[0])

    def _gate_in(self, module, args):
        y, z = args
        y_bld = y.view(*z.shape)
        y_bld = self.entering(self.own("mamba.gate.y"), y_bld)
        return y_bld.view(y.shape), self.entering(self.own("mamba.gate.z"), z)

    # --- functions --------------------------------------------------------------------------------

    def _replace_functions(self) -> None:
        falcon = importlib.import_module(_MODULE)
        for name in _FUNCTIONS:
            if not hasattr(falcon, name):  # another version: its tensors are absent
                continue
            function = getattr(falcon, name)
            self.stack.callback(setattr, falcon, name, function)
            setattr(falcon, name, getattr(self, f"_{name.lower()}")(function))

    def _causal_conv1d_fn(self, function):
        def conv(x_bcl, weight, bias=None, **options):
            # Behind a cache it is given the samples before as well, and as many results are cut.
            new = self._new_tokens
            x = self.entering(self.own("mamba.conv.x"), x_bcl[..., -new:].mT).mT
            before = x_bcl[..., : x_bcl.shape[-1] - new]
            y = function(torch.cat([before, x], -1), weight, bias, **options)
            self.put(self.own("mamba.conv.out"), y[..., -new:].mT)
            return y

        for layer in self.model.model.layers:
            self._pre(layer.mamba.in_proj, self._count_tokens)
        return conv

    def _count_tokens(self, module, args) -> None:
        self._new_tokens = args[0].shape[1]

    def _causal_conv1d_update(self, function):
        def conv(x_bcl, *rest, **options):
            x = self.entering(self.own("mamba.conv.x"), x_bcl.mT).mT
            y = function(x, *rest, **options)
            self.put(self.own("mamba.conv.out"), y.mT)
            return y

        return conv

    def _mamba2_chunk_scan(self, function):
        def scan(x, dt, A, B, C, **options):
            names = {name: self.own(f"mamba.scan.{name}") for name in ("x", "B", "C")}
            x, B, C = (self.entering(names[k], t) for k, t in zip(("x", "B", "C"), (x, B, C)))
            self.put(self.own("mamba.scan.A"), A)
            self.put(self.own("mamba.scan.D"), options["D"])
            wanted = options.pop("return_final_states", False)
            with _Last() as last:
                y, state = function(x, dt, A, B, C, return_final_states=True, **options)
            self.put(self.own("mamba.scan.dt"), last.value)
            self.put(self.own("mamba.scan.y"), y)
            self.put(self.own("mamba.scan.state"), state)
            return (y, state) if wanted else y

        return scan

    def _mamba2_selective_state_update(self, function):
        def step(state, x, dt, A, B, C, D=None, **options):
            names = {name: self.own(f"mamba.scan.{name}") for name in ("x", "B", "C")}
            x, B, C = (
                self.entering(names[k], t[:, None])[:, 0]
                for k, t in zip(("x", "B", "C"), (x, B, C))
            )
            self.put(self.own("mamba.scan.A"), A[:, 0, 0])
            self.put(self.own("mamba.scan.D"), D[:, 0])
            with _Last() as last:
                y = function(state, x, dt, A, B, C, D, **options)
            self.put(self.own("mamba.scan.dt"), last.value[:, None, :, 0])
            if options.get("z") is None:  # with z it returns what is gated already
                self.put(self.own("mamba.scan.y"), y[:, None])
            else:
                self.put(self.own("mamba.gate.z"), options["z"].flatten(1)[:, None])
            self.put(self.own("mamba.scan.state"), state)
            return y

        return step

    def _apply_rotary_pos_emb(self, function):
        def rope(*args, **options):
            q, k = function(*args, **options)
            self.put(self.own("self_attn.rope.q"), q)
            self.put(self.own("self_attn.rope.k"), k)
            return q, k

        return rope

    def _all_attention_functions(self, functions):
        watching = self

        class Functions:
            def __getattr__(self, name):
                return getattr(functions, name)

            def get_interface(self, *args):
                function = functions.get_interface(*args)

                def attention(*inputs, **options):
                    out, weights = function(*inputs, **options)
                    watching.put(watching.own("self_attn.attention.o"), out.transpose(1, 2))
                    return out, weights

                return attention

        return Functions()

"""A fault as a change of our model that can be run.

A fault changes a copy of a model's parts before the model is built: its configuration, its weights
(shared where they stay), its operator table. So what a port with that fault computes can be
computed here, for any checkpoint and any input, and compared with what the port gave. The faults
themselves: `faults_list.FAULTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config import FalconH1Config
from ..model import FalconH1ForCausalLM
from ..ops import Ops
from ..taps import attached


@dataclass
class Call:
    """What the running forward was asked, for operators that depend on it."""

    mask_bl: Tensor | None = None  # attention_mask in the caller's layout, or None
    lengths_b: Tensor | None = None  # real tokens per row, in the model's right-padded layout


@dataclass
class ModelParts:
    """What a model is built from; a fault changes some of it."""

    config: FalconH1Config
    ops: Ops
    weights: dict[str, Tensor]
    ssd_inputs: list[Callable] = field(default_factory=list)  # of (x, dt, A, B, C, D), see `ssd`
    finish: list[Callable] = field(default_factory=list)  # act on the built model
    keep_padding: bool = False  # hand padding to the layers as if it were tokens
    call: Call = field(default_factory=Call)

    def set(self, **changes) -> None:
        self.config = replace(self.config, **changes)

    def wrap(self, name: str, make: Callable) -> None:
        """Put make(operator) in the place of an operator."""
        self.ops = self.ops._replace(**{name: make(getattr(self.ops, name))})

    def ssd(self, change: Callable) -> None:
        """Give the scan and the step change(x, dt, A, B, C, D), which observers see too."""
        self.ssd_inputs.append(change)

    def change_weights(self, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
        for name, value in self.weights.items():
            if name.endswith(suffix):
                self.weights[name] = change(value)

    def swap_weights(self, first: str, second: str) -> None:
        """Exchange the tensors of every layer whose names end in `first` and `second`."""
        for name in [name for name in self.weights if name.endswith(first)]:
            other = name.removesuffix(first) + second
            self.weights[name], self.weights[other] = self.weights[other], self.weights[name]


@dataclass(frozen=True)
class Fault:
    """One fault.

    name: unique. site: what it concerns; two faults of one site exclude one another. plant: makes
    it. hint: what to look at in the port. hidden: why a configuration cannot show it, "" if it can.
    needs: the kind of input that shows it: "prefill", "chunked", "decode" or "padded".
    """

    name: str
    site: str
    plant: Callable[[ModelParts], None]
    hint: str
    hidden: Callable[[FalconH1Config], str] = lambda config: ""
    needs: str = "prefill"


def unless(test: Callable[[FalconH1Config], bool], reason: str) -> Callable:
    """`Fault.hidden` for a fault that shows where test(config) holds."""
    return lambda config: "" if test(config) else reason


def is_one(key: str, index: int | None = None) -> Callable:
    """`Fault.hidden` for a multiplier that must differ from 1."""

    def hidden(config) -> str:
        value = getattr(config, key) if index is None else getattr(config, key)[index]
        return f"{key if index is None else f'{key}[{index}]'} is 1" if value == 1.0 else ""

    return hidden


class Patient:
    """A model with faults planted in it (or none), and how to run it.

    model: what they are planted in; its weights are shared where they stay. ops: the table under
    the faults, None for the model's. dtype: to run in, None for the model's.
    """

    def __init__(
        self,
        model: FalconH1ForCausalLM,
        faults: Sequence[Fault] = (),
        ops: Ops | None = None,
        dtype: torch.dtype | None = None,
    ):
        weights = dict(model.state_dict())
        self.parts = ModelParts(model.config, model.ops if ops is None else ops, weights)
        for fault in faults:
            fault.plant(self.parts)
        self.model = _build(self.parts, model.dtype if dtype is None else dtype, model.device)

    def _change_ssd_inputs(self, mixer) -> None:
        scan, step = mixer.ops.ssd_scan, mixer.ops.ssd_step

        def changed_scan(*inputs, **options):
            return scan(*self._ssd(inputs), **options)

        def changed_step(state, *inputs):
            return step(state, *self._ssd(inputs))

        mixer.ops = mixer.ops._replace(ssd_scan=changed_scan, ssd_step=changed_step)

    def _ssd(self, inputs: tuple) -> tuple:
        for change in self.parts.ssd_inputs:
            inputs = change(*inputs)
        return inputs

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        pieces: Sequence[int] | None = None,
        observe: Callable | None = None,
    ) -> Tensor:
        """Logits (b, l, vocab).

        mask: an attention_mask. pieces: lengths into which the rows are cut, each read behind a
        cache of those before it; of 1: a decode step. observe: a context manager made of the model,
        entered around the forwards, such as `taps.record`.
        """
        with nullcontext() if observe is None else attached(self.model):
            mixers = [block.mamba for block in self.model.model["layers"]]
            tables = [mixer.ops for mixer in mixers]
            try:
                for mixer in mixers:
                    self._change_ssd_inputs(mixer)
                with nullcontext() if observe is None else observe(self.model):
                    return _forward(self.parts, self.model, ids, mask, pieces)
            finally:
                for mixer, table in zip(mixers, tables):
                    mixer.ops = table


def _build(parts: ModelParts, dtype: torch.dtype, device) -> FalconH1ForCausalLM:
    model = FalconH1ForCausalLM(parts.config, ops=parts.ops, dtype=dtype, device="meta")
    wanted = model.state_dict()
    weights = {name: parts.weights[name].to(value.dtype) for name, value in wanted.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    for act in parts.finish:
        act(model)
    return model.eval()


def _forward(parts: ModelParts, model, ids, mask, pieces) -> Tensor:
    call = parts.call
    call.mask_bl = call.lengths_b = None
    if mask is not None:
        call.mask_bl = mask != 0
        if parts.keep_padding:
            return model(ids) * call.mask_bl[..., None]
        call.lengths_b = call.mask_bl.sum(1)
        return model(ids, attention_mask=mask)
    if pieces is None:
        return model(ids)
    cache = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model(piece, cache=cache) for piece in ids.split(list(pieces), 1)], dim=1)

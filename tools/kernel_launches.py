"""Which calls of the kernels are compiled and counted: every family at the shapes of the models.

Inputs come from the benchmark registry, with the strides of the model's own calls. For compilation
they are tensors on the meta device: no memory, but true shapes, strides and offsets.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from falcon_h1r.bench.operators import OPERATORS  # noqa: E402
from falcon_h1r.bench.sizes import Cost, Draw, Size  # noqa: E402
from falcon_h1r.config import FalconH1Config  # noqa: E402

MODEL = "falcon-h1r-7b"


class KernelCall(NamedTuple):
    """One call of one public function, to be made under every configuration of its table.

    `calls`: (module, function, table of configurations) below falcon_h1r_kernels, a table of
    another module as "module.TABLE"; `operator`: the registry's name of the inputs; `place`: rows,
    new tokens and past; `adapt(inputs)`: changes the registry's arguments where the function takes
    others; `options`: in words, what they change beside the family's other cases. Such a case is
    compiled under its default configuration alone.
    """

    name: str
    calls: tuple[str, str, str]
    operator: str
    place: tuple[int, int, int] = (1, 4096, 0)
    model: str = MODEL
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    options: str = ""

    @property
    def shape(self) -> str:
        b, l, past = self.place
        rows = f"{self.model.removeprefix('falcon-')} {self.operator} {b}x{l}"
        rows += f"@{past}" if past else ""
        return f"{rows}, {self.options}" if self.options else rows

    @property
    def table(self):
        """The family's configurations; ImportError or AttributeError while it does not exist."""
        module, _, table = self.calls
        other, _, table = table.rpartition(".")
        found = getattr(importlib.import_module(f"falcon_h1r_kernels.{other or module}"), table)
        # Operators of several kernels have a table for each.
        return found if hasattr(found[0], "name") else tuple(entry for t in found for entry in t)

    def size(self, dtype: torch.dtype, config: FalconH1Config | None = None, place=None) -> Size:
        return Size(config or FalconH1Config.preset(self.model), dtype, *(place or self.place))

    def call(self, inputs: dict[str, Any], config: str) -> Any:
        """Call the public function with the registry's inputs and the configuration `config`."""
        module, function, _ = self.calls
        function = getattr(importlib.import_module(f"falcon_h1r_kernels.{module}"), function)
        return function(**(self.adapt(inputs) if self.adapt else inputs), config=config)

    def inputs(self, size: Size, draw: Draw) -> dict[str, Any]:
        return OPERATORS[self.operator].inputs(size, draw)

    def cost(self, dtype: torch.dtype) -> Cost:
        """Bytes and FLOPs of the call at the least."""
        return OPERATORS[self.operator].cost(self.size(dtype))

    def launch(self, dtype: torch.dtype, config: str) -> None:
        """Make the call with tensors that have no memory."""
        self.call(self.inputs(self.size(dtype), Draw(0, "meta")), config)


class Direct(NamedTuple):
    """A call that the registry does not know; `launch(dtype, config)` makes it."""

    name: str
    shape: str
    table: tuple
    launch: Callable[[torch.dtype, str], Any]
    options: str = ""


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _form(name: str):
    return lambda inputs: inputs | {"form": name}


def _integers(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device=like.device)


def _packed_scan(form: str):
    def adapt(inputs):
        x, dt = inputs["x_blhp"], {"dt_softplus": True, "dt_limit": (0.001, 0.1)}
        bias = {"dt_bias_h": torch.empty_like(inputs["A_h"]), "initial_state_bhpn": None}
        return inputs | dt | bias | {"seq_idx_bl": _integers(x, *x.shape[:2]), "form": form}

    return adapt


def _packed_conv(inputs):
    x = inputs["x_blc"]
    integers = {"seq_idx_bl": _integers(x, *x.shape[:2]), "lengths_b": _integers(x, x.shape[0])}
    return inputs | integers | {"initial_window_bvc": None}


def _gated_step(inputs):
    state, x = inputs["state_bhpn"], inputs["x_bhp"]
    dt = {"dt_bias_h": torch.empty_like(inputs["A_h"]), "dt_softplus": True}
    dt["dt_limit"] = (0.001, 0.1)
    return inputs | dt | {"state_bhpn": state.to(x.dtype), "z_bhp": torch.empty_like(x)}


def _past(inputs):
    b = inputs["q_bhle"].shape[0]
    return inputs | {name: _integers(inputs["q_bhle"], b) for name in _PAST}


def _packed_attention(inputs):
    q = inputs["q_bhle"]
    return inputs | {"seq_idx_bl": _integers(q, q.shape[0], q.shape[2])}


_PAST = ("query_offset_b", "key_start_b", "key_lengths_b")


_DECODE = (64, 1, 4095)
_STAGED, _FUSED = ("ssd_scan", "ssd_scan", "ssd_staged.TABLES"), ("ssd_scan", "ssd_scan", "CONFIGS")


def _family(name: str) -> tuple[str, str, str]:
    return name, name, "CONFIGS"


_PACKED = "documents, dt bias, softplus and limits, no initial state"
_CONV, _STEP = ("conv1d", "causal_conv1d"), ("conv1d_step", "causal_conv1d_step")

CASES = [
    KernelCall("rms_norm", _family("rms_norm"), "rms_norm_residual"),
    KernelCall("rms_norm", _family("rms_norm"), "rms_norm", _DECODE, "tiny-90m"),
    KernelCall("gated_rms_norm", _family("gated_rms_norm"), "gated_rms_norm"),
    KernelCall(
        "gated_rms_norm", _family("gated_rms_norm"), "gated_rms_norm", model="falcon-h1-34b"
    ),
    KernelCall(
        "gated_rms_norm",
        _family("gated_rms_norm"),
        "gated_rms_norm",
        adapt=lambda inputs: inputs | {"norm_before_gate": True, "n_groups": 2},
        options="norm before gate, 2 groups",
    ),
    KernelCall(
        "gated_rms_norm",
        _family("gated_rms_norm"),
        "gated_rms_norm",
        adapt=lambda inputs: inputs | {"weight_d": None},
        options="no weight",
    ),
    KernelCall("rope", _family("rope"), "rope"),
    KernelCall("rope", _family("rope"), "rope_key", _DECODE),
    KernelCall("swiglu", _family("swiglu"), "swiglu"),
    KernelCall("swiglu", _family("swiglu"), "swiglu", _DECODE),
    KernelCall("causal_conv1d", (*_CONV, "CONFIGS"), "causal_conv1d"),
    KernelCall(
        "causal_conv1d",
        (*_CONV, "CONFIGS"),
        "causal_conv1d",
        adapt=_packed_conv,
        options="documents, lengths, no initial window",
    ),
    KernelCall("causal_conv1d_step", (*_STEP, "CONFIGS"), "causal_conv1d_step", _DECODE),
    KernelCall("ssd_fused", _FUSED, "ssd_scan", adapt=_form("fused")),
    KernelCall("ssd_fused", _FUSED, "ssd_scan", model="falcon-h1-0.5b", adapt=_form("fused")),
    KernelCall("ssd_fused", _FUSED, "ssd_scan", adapt=_packed_scan("fused"), options=_PACKED),
    KernelCall("ssd_staged", _STAGED, "ssd_scan", adapt=_form("staged")),
    KernelCall("ssd_staged", _STAGED, "ssd_scan", adapt=_packed_scan("staged"), options=_PACKED),
    KernelCall(
        "ssd_staged",
        _STAGED,
        "ssd_scan",
        model="falcon-h1-0.5b",
        adapt=_packed_scan("staged"),
        options=_PACKED,
    ),
    KernelCall("ssd_step", _family("ssd_step"), "ssd_step", _DECODE),
    KernelCall(
        "ssd_step",
        _family("ssd_step"),
        "ssd_step",
        _DECODE,
        adapt=_gated_step,
        options="z, dt bias, softplus and limits, state in x's dtype",
    ),
    KernelCall(
        "conv_ssd_step",
        ("conv_ssd_step", "conv_ssd_step", "ssd_step.CONFIGS"),
        "conv_ssd_step",
        _DECODE,
    ),
    KernelCall("attention", _family("attention"), "attention"),
    KernelCall("attention", _family("attention"), "attention", model="falcon-h1-0.5b"),
    KernelCall(
        "attention",
        _family("attention"),
        "attention",
        (1, 512, 3584),
        adapt=_past,
        options="offset, start and lengths of the keys",
    ),
    KernelCall(
        "attention",
        _family("attention"),
        "attention",
        adapt=_packed_attention,
        options="documents",
    ),
    KernelCall("decode_attention", _family("decode_attention"), "decode_attention_ragged", _DECODE),
    KernelCall(
        "decode_attention",
        _family("decode_attention"),
        "decode_attention",
        _DECODE,
        options="no lengths",
    ),
    KernelCall("logprob", _family("logprob"), "logprob", _DECODE),
]

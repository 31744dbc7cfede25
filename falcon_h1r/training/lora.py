"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers and on the convolution.

    y = W x + (alpha / r) B A x        A (r, in), B (out, r): B starts at 0

An adapted layer is the layer with two more parameters, `lora_A` and `lora_B`; the names of all
others stay. The convolution's taps (c, w) get (alpha / r) B A with A (r, w) and B (c, r). Files are
those of peft, which itself refuses out_proj and conv1d in a Mamba model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.fold import ONES, fold_factors
from ..checks import check_integer
from ..config import FalconH1Config
from ..conv import CausalConv1d
from ..files import whole_folder
from ..json_file import read_json_object
from ..precision import compute_dtype
from ..tables import aligned
from ..tensor_file import read_header, read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MULTIPLIERS = "falcon_h1_multipliers"  # of the model that the adapter was made for
NOT_COMPUTED = {  # options of peft that change the arithmetic, and where they change nothing
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}


class _Lora:
    """What is added to a layer's class; see the module."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_dropout: float

    def lora_delta(self) -> Tensor:
        """(out, in), or (c, w) of a convolution: what merging adds to the weight."""
        return self.lora_scale * (self.lora_B @ self.lora_A)


class _LoraLinear(_Lora):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        h = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        h = F.linear(F.linear(h.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + (self.lora_scale * h).to(y.dtype)


class _LoraConv(_Lora):
    @property
    def weight(self) -> Tensor:
        """(c, 1, w), as the layer reads it; the parameter stays below."""
        weight_c1w = self._parameters["weight"]
        return weight_c1w + self.lora_delta()[:, None].to(weight_c1w.dtype)


@functools.cache
def _adapted(kind: type) -> type:
    part = _LoraConv if issubclass(kind, CausalConv1d) else _LoraLinear
    return type(f"Lora{kind.__name__}", (part, kind), {"plain": kind})


class Trainable(NamedTuple):
    """What learns of a model; `str` is a table by kind of parameter."""

    kinds: dict[str, tuple[int, int]]  # name with N for a layer's number: tensors, numbers
    total: int  # numbers of the model, adapters included

    def __str__(self) -> str:
        rows = [("learns", "tensors", "numbers")]
        rows += [(name, f"{count:,}", f"{size:,}") for name, (count, size) in self.kinds.items()]
        learn = sum(size for _, size in self.kinds.values())
        share = 100 * learn / max(self.total, 1)
        lines = "\n".join(aligned(rows, "lr"))
        return f"{lines}\n{learn:,} of {self.total:,} numbers learn ({share:.3g} %)"


def trainable(model: nn.Module) -> Trainable:
    """Which parameters require a gradient."""
    kinds: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = re.sub(r"\.\d+\.", ".N.", name)
            count, size = kinds.get(kind, (0, 0))
            kinds[kind] = count + 1, size + parameter.numel()
    return Trainable(kinds, sum(p.numel() for p in model.parameters()))


def add_lora(
    model,
    targets: Iterable[str],
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Trainable:
    """Adapt every layer that a target names, in place; all other parameters stop learning.

    targets: ends of module names, whole parts: "q_proj", "mamba.out_proj", "layers.3.mamba.conv1d".
    alpha: the scale times rank; default 2 rank. dropout: share of a linear adapter's inputs that
    training drops. Adapters are at least float32. Compiled forms of the model are refused
    afterwards: make them anew. Raises ValueError for a target that names nothing, or what is no
    linear layer and no convolution, and for a model that has adapters.
    """
    check_integer("rank", rank, 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout!r}, expected at least 0 and less than 1")
    alpha = 2 * rank if alpha is None else alpha
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: {alpha!r}, expected a number")
    if isinstance(targets, str):
        raise ValueError(f"targets: expected several names, found the text {targets!r}")
    _refuse_adapters(model)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = {n: m for n, m in model.named_modules() if f".{n}".endswith(f".{target}")}
        wrong = next((n for n, m in found.items() if not _can_adapt(m)), None)
        if not found or wrong is not None:
            what = f"{wrong} is a {type(found[wrong]).__name__}" if found else "names no module"
            known = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _can_adapt(m)}
            raise ValueError(f"target {target!r} {what}; there are: {', '.join(sorted(known))}")
        chosen |= found
    if not chosen:
        raise ValueError("targets: expected names of modules, found none")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in chosen.items():
        out, width = _shape(module)
        device, dtype = model.device, compute_dtype(model.dtype)
        A = torch.empty(rank, width, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(out, rank, device=device, dtype=dtype)
        _replace(model, name, _with_adapter(module, A, B, alpha / rank, dropout))
    return trainable(model)


def adapters(model) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each adapted layer."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, _Lora))


@torch.no_grad()
def merge_lora(model) -> None:
    """Add every adapter to its weight, once, in float64, and take it off; all parameters learn.

    Raises ValueError, and changes nothing, where a layer holds packed weights (int8, oneDNN).
    """
    found = list(adapters(model))
    for name, module in found:
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"{name}: a {module.plain.__name__} has no weights to add to; merge into the model "
                "that it came from, and pack that"
            )
    for _, module in found:
        weight = module._parameters["weight"].view(_shape(module))
        delta = module.lora_scale * (module.lora_B.double() @ module.lora_A.double())
        weight.copy_((weight.double() + delta).to(weight.dtype))
    remove_lora(model)


def remove_lora(model) -> None:
    """Take every adapter off; all parameters learn."""
    for name, module in list(adapters(model)):
        plain = copy.copy(module)
        plain.__class__ = module.plain
        plain._parameters = {
            key: value for key, value in module._parameters.items() if not key.startswith("lora_")
        }
        for key in ("lora_scale", "lora_dropout"):
            del plain.__dict__[key]
        _replace(model, name, plain)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def save_lora(model, folder: str | Path) -> None:
    """Write the adapters as peft does: adapter_config.json and adapter_model.safetensors.

    `folder` must not exist, be empty or hold an adapter and nothing else, which is replaced. Raises
    ValueError where it holds more, and for a model without adapters, or of several ranks or scales.
    """
    if other := {p.name for p in Path(folder).glob("*")} - {CONFIG, WEIGHTS, "README.md"}:
        raise ValueError(f"{folder}: holds {min(other)} and more, and is no folder of an adapter")
    found = dict(adapters(model))
    kinds = {(len(m.lora_A), m.lora_scale * len(m.lora_A), m.lora_dropout) for m in found.values()}
    if len(kinds) != 1:
        raise ValueError(f"{len(found)} adapters of {len(kinds)} ranks or scales, expected one")
    ((rank, alpha, dropout),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if model.source is None else str(model.source),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in found}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        MULTIPLIERS: _multipliers(model.config),
    }
    tensors = {
        f"{PREFIX}{name}.lora_{half}.weight": getattr(module, f"lora_{half}").detach().cpu()
        for name, module in found.items()
        for half in "AB"
    }
    with whole_folder(folder) as fresh:
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(fresh / WEIGHTS, tensors, {"format": "pt"})


def load_lora(model, folder: str | Path) -> Trainable:
    """Adapt a model by a folder of `save_lora` or of peft, in place.

    Where the adapter was made for other multipliers than the model's, which were folded since, B
    takes the factors that the weights took. Raises ValueError for a config or tensors that do not
    fit, for options of peft that are not computed here, and for a model that has adapters.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r}, not LORA")
    for key, harmless in NOT_COMPUTED.items():
        if key in config and config[key] not in harmless:
            raise ValueError(f"{folder / CONFIG}: {key} {config[key]!r} is not computed here")
    rank, alpha, dropout = (config.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    check_integer("r", rank, 1)
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout or 0.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{folder / CONFIG}: {key} {value!r}, expected a number")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    factors = _refolded(model.config, config.get(MULTIPLIERS), folder / CONFIG)
    _refuse_adapters(model)
    halves = _read_halves(folder / WEIGHTS, model, rank)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, (A, B) in halves.items():
        factor = factors.get(
            f"{name.split('.', 3)[-1] if '.layers.' in name else name}.weight", 1.0
        )
        B = (B.double() * factor).to(model.device, compute_dtype(model.dtype))
        A = A.to(model.device, compute_dtype(model.dtype))
        module = model.get_submodule(name)
        _replace(model, name, _with_adapter(module, A, B, scale, dropout or 0.0))
    return trainable(model)


def _read_halves(path: Path, model, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each module's name, of the shapes that the module has."""
    tensors = read_tensors(read_header(path), path)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if parts is None:
            raise ValueError(f"{path}: {key!r} is no tensor of a LoRA adapter")
        halves.setdefault(parts[1], {})[parts[2]] = tensor
    modules = dict(model.named_modules())
    for name, both in halves.items():
        if name not in modules or not _can_adapt(modules[name]):
            raise ValueError(f"{path}: the model has no layer {name} that can be adapted")
        out, width = _shape(modules[name])
        expected = {"A": (rank, width), "B": (out, rank)}
        found = {half: tuple(tensor.shape) for half, tensor in both.items()}
        if found != expected:
            raise ValueError(f"{path}: {name} has {found}, expected {expected}")
    if not halves:
        raise ValueError(f"{path}: no tensors")
    return {name: (both["A"], both["B"]) for name, both in halves.items()}


def _refolded(config: FalconH1Config, made_for, path: Path) -> dict[str, float | Tensor]:
    """What the weights were multiplied by since the adapter was made, by their names."""
    own = _multipliers(config)
    folded = own == _multipliers_of(ONES)
    if made_for is None and folded:
        raise ValueError(
            f"{path}: does not say for which multipliers it was made, and the model's are folded; "
            "load it into the model as it was released, merge it, and fold then"
        )
    if made_for is None or made_for == own:
        return {}
    if not folded or not isinstance(made_for, dict) or made_for.keys() != own.keys():
        raise ValueError(f"{path}: made for multipliers {made_for}, the model has {own}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in made_for.items()}
    return fold_factors(dataclasses.replace(config, **values))


def _multipliers(config: FalconH1Config) -> dict:
    return _multipliers_of({key: getattr(config, key) for key in ONES})


def _multipliers_of(values: dict) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, CausalConv1d) or hasattr(module, "in_features")


def _shape(module: nn.Module) -> tuple[int, int]:
    """(rows, columns) of what an adapter is added to."""
    if isinstance(module, CausalConv1d):
        return module.out_channels, module.kernel_size[0]
    return module.out_features, module.in_features


def _with_adapter(module: nn.Module, A: Tensor, B: Tensor, scale: float, dropout: float):
    """The layer beside itself, with the same weights and an adapter."""
    adapted = copy.copy(module)
    adapted.__class__ = _adapted(type(module))
    adapted._parameters = dict(module._parameters)
    adapted.lora_A, adapted.lora_B = nn.Parameter(A), nn.Parameter(B)
    adapted.lora_scale, adapted.lora_dropout = scale, dropout
    return adapted


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _refuse_adapters(model) -> None:
    if name := next((name for name, _ in adapters(model)), None):
        raise ValueError(f"{name} has an adapter already: merge_lora or remove_lora first")

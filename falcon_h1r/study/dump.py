"""Named tensors of one forward, ours or another engine's, as a file.

A dump is a safetensors or npz file. Its tensors:

    input_ids        (b, l) integers
    attention_mask   (b, l), 0 at padding; where there is padding
    pieces           (k,) integers whose sum is l; where the rows were read in pieces, each behind a
                     cache of those before it (1: a decode step). Not together with padding
    any others       under the names of the taps ("layers.3.mamba.scan.y", "logits"), in the axes
                     that `tap_table.py` gives them, with b and l as in input_ids. Values at padding
                     do not count. A dump may hold any subset

and its metadata (of a safetensors file; in an npz, arrays of one string): `dtype`, what the forward
computed in ("bfloat16"; without it, that of the values), and `source`, who made it.
"""

from __future__ import annotations

import difflib
import math
import os
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import whole_file
from ..tap_table import inner_name
from ..taps import full_names, record, tap_of

INPUTS = ("input_ids", "attention_mask", "pieces")
METADATA = ("dtype", "source")
# Taps behind the point at which rows go back into the caller's layout.
AFTER_LAYERS = ("final_layernorm.in", "final_layernorm", "lm_head", "logits")
# Windows on tensors that are compared already, and what is all positions so far.
_VIEWS = frozenset(
    "residual.in mamba.conv.window_in mamba.scan.state_in mamba.gate.y self_attn.rope.q_in "
    "self_attn.rope.k_in self_attn.attention.q self_attn.attention.k self_attn.attention.v "
    "feed_forward.swiglu.gate feed_forward.swiglu.up".split()
)


class Inputs(NamedTuple):
    """What a forward is given."""

    ids: Tensor  # (b, l)
    mask: Tensor | None = None  # (b, l) bool, True at real tokens
    pieces: tuple[int, ...] | None = None


class Dump(NamedTuple):
    """The content of a dump."""

    inputs: Inputs
    tensors: dict[str, Tensor]
    dtype: torch.dtype | None = None  # in which the forward computed; None: not said
    source: str = ""


def read_dump(path: str | Path, config) -> Dump:
    """Read a dump of a model with this `config`.

    Raises ValueError for a file that is none, an unknown name (with the nearest known one), a shape
    that the model's tensor does not have, and inputs that contradict each other.
    """
    tensors, metadata = _read(Path(path))
    if "input_ids" not in tensors:
        raise ValueError(f"{path}: no tensor 'input_ids'")
    known = [*INPUTS, *full_names(config)]
    for name in tensors:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{path}: unknown tensor {name!r}; did you mean {close[0]!r}?")
    given = {name: tensors.pop(name) for name in INPUTS if name in tensors}
    inputs = _inputs(path, config, **given)
    for name, tensor in tensors.items():
        expected = shape_of(name, config, inputs.ids.shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected} "
                f"({tap_of(name).axes})"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected floating point")
    order = [name for name in known if name in tensors]
    dtype = metadata.get("dtype")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{path}: metadata dtype is {dtype!r}, expected a name such as 'bfloat16'")
    return Dump(
        inputs,
        {name: tensors[name] for name in order},
        None if dtype is None else getattr(torch, dtype),
        metadata.get("source", ""),
    )


def write_dump(path: str | Path, dump: Dump) -> None:
    """Write a dump; the suffix decides: .safetensors or .npz. Nothing half-written is left.

    numpy has no bfloat16: an npz holds such values as float32, and the metadata say so.
    """
    path = Path(path)
    tensors = {"input_ids": dump.inputs.ids}
    if dump.inputs.mask is not None:
        tensors["attention_mask"] = dump.inputs.mask.long()
    if dump.inputs.pieces is not None:
        tensors["pieces"] = torch.tensor(dump.inputs.pieces)
    tensors |= dump.tensors
    metadata = {"source": dump.source} if dump.source else {}
    if dump.dtype is not None:
        metadata["dtype"] = str(dump.dtype).removeprefix("torch.")
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path}: a dump's name ends in .safetensors or .npz")
    with whole_file(path) as new:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, new, metadata)
        else:
            import numpy as np

            arrays = {
                name: (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy()
                for name, t in tensors.items()
            }
            with open(new, "wb") as file:
                np.savez(file, **arrays, **{k: np.array(v) for k, v in metadata.items()})


@torch.no_grad()
def take_dump(run, model, inputs: Inputs, names=None, source: str = "falcon_h1r") -> Dump:
    """The taps of one forward of ours. run(ids, mask, pieces, observe): a `faults.Patient`.

    names: as in `taps.full_names`, None for all but those that hold all positions so far.
    """
    if names is None:
        names = [name for name in full_names(model.config) if "s" not in tap_of(name).axes.split()]
    seen: dict[str, Tensor] = {}

    @contextmanager
    def observe(model):
        with record(model, names) as recording:
            yield
        seen.update({name: recording[name] for name in names if name in recording})

    run(*inputs, observe=observe)
    mask = None if run.parts.keep_padding else inputs.mask
    tensors = {name: in_layout(name, tensor, mask) for name, tensor in seen.items()}
    return Dump(inputs, tensors, model.dtype, source)


def compared_names(config, layers: Sequence[int] | None = None) -> list[str]:
    """The taps that a comparison shows, in the order of the forward: no tensor twice."""
    return [name for name in full_names(config, None, layers) if inner_name(name) not in _VIEWS]


def in_layout(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """A tensor of the layers, whose rows are right-padded, in the layout of input_ids."""
    axes = tap_of(name).axes.split()
    if mask is None or name in AFTER_LAYERS or "l" not in axes:
        return tensor
    packed = torch.movedim(tensor, (axes.index("b"), axes.index("l")), (0, 1))
    if packed.shape[1] == mask.shape[1] and bool(mask.all()):
        return tensor
    real = torch.arange(packed.shape[1]) < mask.sum(1)[:, None]
    out = packed.new_zeros(*mask.shape, *packed.shape[2:])
    out[mask] = packed[real]
    return torch.movedim(out, (0, 1), (axes.index("b"), axes.index("l")))


def real_values(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The values that count: of a tensor with b and l, (real tokens, all else)."""
    axes = tap_of(name).axes.split()
    if "l" not in axes:
        return tensor
    rows = torch.movedim(tensor, (axes.index("b"), axes.index("l")), (0, 1))
    return rows[mask] if mask is not None else rows.flatten(0, 1)


def shape_of(name: str, config, ids_shape) -> tuple[int, ...]:
    """The shape of a tap's tensor for input_ids of the shape (b, l)."""
    c = config
    b, l = ids_shape
    attention = ".self_attn." in name
    sizes = {
        "b": b,
        "l": l,
        "s": l,
        "d": c.hidden_size,
        "i": c.intermediate_size,
        "k": c.d_in_proj,
        "h": c.num_attention_heads if attention else c.mamba_n_heads,
        "j": c.num_key_value_heads,
        "e": c.head_dim,
        "p": c.mamba_head_dim,
        "g": c.mamba_n_groups,
        "n": c.mamba_d_state,
        "c": c.conv_dim,
        "v": c.mamba_d_conv - 1,
        "w": c.vocab_size,
    }
    return tuple(
        sizes[axis] if axis in sizes else math.prod(sizes[a] for a in axis)
        for axis in tap_of(name).axes.split()
    )


def _inputs(path, config, input_ids, attention_mask=None, pieces=None) -> Inputs:
    def refuse(text: str):
        raise ValueError(f"{path}: {text}")

    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        refuse(f"input_ids is {tuple(input_ids.shape)} {input_ids.dtype}, expected (b, l) integers")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        refuse(f"input_ids goes from {low} to {high}, the vocabulary is {config.vocab_size}")
    if attention_mask is not None and pieces is not None:
        refuse("attention_mask and pieces exclude one another")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            refuse(f"attention_mask has shape {tuple(attention_mask.shape)}, not input_ids'")
        attention_mask = attention_mask != 0
    if pieces is not None:
        pieces = tuple(pieces.flatten().tolist())
        if sum(pieces) != input_ids.shape[1] or min(pieces, default=0) < 1:
            refuse(f"pieces {pieces} do not sum to the {input_ids.shape[1]} columns of input_ids")
    return Inputs(input_ids.long(), attention_mask, pieces)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        return _read_npz(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: neither safetensors nor npz: {error}") from error


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import numpy as np

    tensors, metadata = {}, {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if name in METADATA:
                    metadata[name] = str(array)
                else:
                    tensors[name] = torch.from_numpy(array)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file: {error}") from error
    return tensors, metadata

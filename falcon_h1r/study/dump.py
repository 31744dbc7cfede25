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
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tensor_file
from ..checks import as_dtype, shown
from ..files import open_file, whole_file
from ..tap_table import inner_name
from ..taps import full_names, record, tap_of

INPUTS = ("input_ids", "attention_mask", "pieces")
METADATA = ("dtype", "source")
_FLOATS = tuple(tensor_file.FLOATS.values())
_INTEGERS = tuple(kind for kind in tensor_file.INTEGERS.values() if kind != torch.bool)
_ZIP = b"PK\x03\x04"
# Values of a forward are packed into a third at best: what is more is there to fill the memory.
_SMALL, _MOST_PACKED = 2**26, 50
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
    or dtype that the model's tensor does not have, and inputs that contradict each other; OSError
    for a file that cannot be opened.
    """
    tensors, metadata = _read(Path(path))
    if "input_ids" not in tensors:
        raise ValueError(f"{path}: no tensor 'input_ids'")
    known = [*INPUTS, *full_names(config)]
    for name in tensors:
        if name not in known:
            close = difflib.get_close_matches(name[:99], known, n=1, cutoff=0.0)
            raise ValueError(f"{path}: unknown tensor {shown(name)}; did you mean {close[0]!r}?")
    given = {name: tensors.pop(name) for name in INPUTS if name in tensors}
    inputs = _inputs(path, config, **given)
    for name, tensor in tensors.items():
        expected = shape_of(name, config, inputs.ids.shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected} "
                f"({tap_of(name).axes})"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected floating point")
    order = [name for name in known if name in tensors]
    dtype = metadata.get("dtype")
    if dtype is not None:
        dtype = as_dtype(dtype, f"{path}: metadata dtype")
    return Dump(inputs, {name: tensors[name] for name in order}, dtype, metadata.get("source", ""))


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
    if path.suffix == ".safetensors":
        tensor_file.write_tensors(path, tensors, metadata)
        return
    import numpy as np

    arrays = {
        name: (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy()
        for name, t in tensors.items()
    }
    with whole_file(path) as new, open(new, "wb") as file:
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

    def found(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {tensor.dtype}"

    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in _INTEGERS:
        refuse(f"input_ids is {found(input_ids)}, expected (b, l) integers")
    if (length := input_ids.shape[1]) > (most := config.max_position_embeddings):
        refuse(f"input_ids has {length} columns, the model at most {most} positions")
    input_ids = input_ids.long()
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        refuse(f"input_ids goes from {low} to {high}, the vocabulary is {config.vocab_size}")
    if attention_mask is not None and pieces is not None:
        refuse("attention_mask and pieces exclude one another")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            refuse(f"attention_mask has shape {tuple(attention_mask.shape)}, not input_ids'")
        if attention_mask.dtype not in (*_INTEGERS, *_FLOATS, torch.bool):
            refuse(f"attention_mask is {attention_mask.dtype}, expected 0 and 1")
        attention_mask = attention_mask != 0
        if not bool(attention_mask.any(1).all()):
            refuse("attention_mask has a row of padding alone")
    if pieces is not None:
        if pieces.dim() != 1 or pieces.dtype not in _INTEGERS:
            refuse(f"pieces is {found(pieces)}, expected (k,) integers")
        pieces = tuple(pieces.tolist())
        if sum(pieces) != input_ids.shape[1] or min(pieces, default=0) < 1:
            refuse(
                f"pieces {shown(pieces)} do not sum to the {input_ids.shape[1]} columns of "
                "input_ids"
            )
    return Inputs(input_ids, attention_mask, pieces)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not os.path.lexists(path):
        raise ValueError(f"{path}: no such file")
    with open_file(path) as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    if zipped:
        return _read_npz(path)
    try:
        header = tensor_file.read_header(path)
    except ValueError as error:
        raise ValueError(f"{error} (neither safetensors nor npz)") from error
    return tensor_file.read_tensors(header, path), header.metadata


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import numpy as np

    tensors, metadata = {}, {}
    try:
        with warnings.catch_warnings(), np.load(path, allow_pickle=False) as file:
            warnings.simplefilter("ignore")  # Python's, about the text of a damaged header
            packed = sum(member.compress_size for member in file.zip.infolist())
            size = sum(member.file_size for member in file.zip.infolist())
            if size > _SMALL and size > _MOST_PACKED * packed:
                raise ValueError(f"{size} bytes are packed into {packed}")
            for name in file.files:
                array = file[name]
                if name not in METADATA:
                    tensors[name] = torch.from_numpy(array)
                elif array.ndim == 0 and array.dtype.kind == "U":
                    metadata[name] = str(array)
                else:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, expected a string")
    # numpy and zipfile raise what they meet: zlib.error, BadZipFile, NotImplementedError (a way of
    # packing), RuntimeError (a password), MemoryError (a header that claims too much), and others.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a readable npz file: {reason}") from error
    return tensors, metadata

"""A cache's tensors as one safetensors file, bound to the model that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import tensor_file
from .tensor_file import Header, bytes_of

FORMAT = "falcon_h1r.cache"
LENGTHS = "lengths"


def write_tensors(path: str | Path, tensors: dict[str, Tensor], model) -> None:
    """Write `tensors` with the fingerprint of `model`: the whole file or nothing.

    Raises OSError, naming `path`, where it cannot be written.
    """
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model), "content": _sha256(tensors)}
    tensor_file.write_tensors(path, tensors, metadata)


def read_tensors(path: str | Path, layout: Callable[..., dict], model) -> dict[str, Tensor]:
    """The tensors of a cache that `write_tensors` wrote for `model`, and their lengths.

    layout: (config, rows, positions, dtype) -> {name: (shape, dtype)} of all but the lengths.

    Raises ValueError when the file is no such file, is damaged, was made by another config or other
    weights, or holds tensors of another shape or dtype, or lengths beyond what is stored; OSError
    where it cannot be read.
    """
    header = tensor_file.read_header(path)
    expected_names = {*layout(model.config, 1, 1, model.dtype), LENGTHS}
    found_names = {entry.name for entry in header.tensors}
    if header.metadata.get("format") != FORMAT or found_names != expected_names:
        raise ValueError(f"{path}: not a cache file of falcon_h1r")
    if (found := header.metadata.get("fingerprint")) != (expected := fingerprint(model)):
        raise ValueError(
            f"{path}: made by another model: fingerprint {found}, this model's is {expected}"
        )
    _check_shapes(path, header, layout, model)
    stored = tensor_file.read_tensors(header, path)
    if header.metadata.get("content") != _sha256(stored):
        raise ValueError(f"{path}: damaged: the tensors are not those that were saved")
    lengths, positions = stored[LENGTHS], stored["keys"].shape[3]
    if not bool(((lengths >= 0) & (lengths <= positions)).all()):
        raise ValueError(
            f"{path}: lengths {_listed(lengths)}, expected some of 0 .. {positions}, the positions "
            "that are stored"
        )
    return stored


def _check_shapes(path: str | Path, header: Header, layout: Callable[..., dict], model) -> None:
    """Rows and positions are those of the keys; all else follows from them and the config."""
    stored = {entry.name: entry for entry in header.tensors}
    shape = stored["keys"].shape
    rows, positions = (shape[1], shape[3]) if len(shape) == 5 else (0, 0)
    expected = layout(model.config, max(rows, 1), max(positions, 1), model.dtype)
    for name, (shape, dtype) in (expected | {LENGTHS: ((max(rows, 1),), torch.int64)}).items():
        entry = stored[name]
        if (entry.shape, entry.dtype) != (tuple(shape), dtype):
            raise ValueError(
                f"{path}: {name} is {list(entry.shape)} {entry.dtype}, expected {list(shape)} "
                f"{dtype}"
            )


def _listed(lengths: Tensor) -> str:
    shown = ", ".join(map(str, lengths[:8].tolist()))
    return shown if len(lengths) <= 8 else f"{shown}, ..."


def fingerprint(model) -> str:
    """SHA-256 over the config and every weight's name, shape, dtype and bytes."""
    return _sha256(model.state_dict(), json.dumps(model.config.to_dict(), sort_keys=True))


def _sha256(tensors: dict[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        tensor = tensor.detach().cpu().contiguous()
        digest.update(bytes_of(tensor))
    return digest.hexdigest()

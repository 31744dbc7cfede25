"""A cache's tensors as one safetensors file, bound to the model that made them."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

from torch import Tensor

from .files import whole_file

FORMAT = "falcon_h1r.cache"


def write_tensors(path: str | Path, tensors: dict[str, Tensor], model) -> None:
    """Write `tensors` with the fingerprint of `model`: the whole file or nothing."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model), "content": _sha256(tensors)}
    with whole_file(path) as new:
        save_file(tensors, new, metadata=metadata)


def read_tensors(path: str | Path, names: tuple[str, ...], model) -> dict[str, Tensor]:
    """The tensors that `write_tensors` wrote under these names for `model`.

    Raises ValueError when the file is no such file, is damaged, or was made by another config or
    other weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable cache file: {error}") from error
    if metadata.get("format") != FORMAT or set(stored) != set(names):
        raise ValueError(f"{path}: not a cache file of falcon_h1r")
    if (found := metadata.get("fingerprint")) != (expected := fingerprint(model)):
        raise ValueError(
            f"{path}: made by another model: fingerprint {found}, this model's is {expected}"
        )
    if metadata.get("content") != _sha256(stored):
        raise ValueError(f"{path}: damaged: the tensors are not those that were saved")
    return stored


def fingerprint(model) -> str:
    """SHA-256 over the config and every weight's name, shape, dtype and bytes."""
    return _sha256(model.state_dict(), json.dumps(model.config.to_dict(), sort_keys=True))


def _sha256(tensors: dict[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        tensor = tensor.detach().cpu().contiguous()
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()

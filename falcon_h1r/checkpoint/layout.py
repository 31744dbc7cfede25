"""Which tensor lies where: one safetensors file, or the index and shards of a sharded checkpoint.

The loader reads the bytes itself (see `loader.py`). Nothing in this file reads a weight.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import json_file, tensor_file
from ..checks import shown
from ..tensor_file import FLOATS as DTYPES
from ..tensor_file import StoredTensor
from .errors import CheckpointError
from .hub import CONFIG, resolve

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# At least float32 in every model, whatever its dtype: they enter exponentials.
FLOAT32_PARAMETERS = ("mamba.A_log", "mamba.D", "mamba.dt_bias")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MERGE = "merge it into its base model first (peft's merge_and_unload), and load what that saves"
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHOWN = 8  # names listed in a message before the rest is counted


def refuse_adapters(model: torch.nn.Module) -> None:
    """Raise `CheckpointError` for a model with LoRA adapters, which its layout has no place for."""
    if name := next((n for n, _ in model.named_parameters() if n.endswith(".lora_A")), None):
        raise CheckpointError(
            f"{name}: an adapter; training.merge_lora adds it to its weights, "
            "training.save_lora keeps it apart"
        )


class TensorInfo(NamedTuple):
    """One row of `inspect`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    nbytes: int


def inspect(path_or_repo_id: str | Path, revision: str | None = None) -> list[TensorInfo]:
    """Every stored tensor of a checkpoint, from the headers alone, in stored order.

    Raises `CheckpointError` where `load` would for the files' structure; config.json is not read.
    """
    entries = read_layout(resolve(path_or_repo_id, revision))
    return [TensorInfo(e.name, e.shape, e.dtype, e.file.name, e.nbytes) for e in entries]


def stored_dtype(path_or_repo_id: str | Path, revision: str | None = None) -> torch.dtype:
    """The dtype in which a checkpoint's weights are stored, from the headers alone.

    Rule of `common_dtype`. Raises `CheckpointError` as `inspect`, and where no tensor is stored.
    """
    tensors = inspect(path_or_repo_id, revision)
    if not tensors:
        raise CheckpointError(f"{path_or_repo_id}: the files hold no tensors, so no dtype either")
    return common_dtype((tensor.name, tensor.dtype) for tensor in tensors)


def common_dtype(tensors: Iterable[tuple[str, torch.dtype]]) -> torch.dtype:
    """The one dtype of tensors given as (name, dtype); of several, the one that holds all exactly.

    So bfloat16 beside float32, or beside float16, gives float32. A_log, D and dt_bias do not count
    beside others, for a model holds them in float32 at least.
    """
    found = list(tensors)
    counted = [dtype for name, dtype in found if not name.endswith(FLOAT32_PARAMETERS)]
    return functools.reduce(torch.promote_types, counted or [dtype for _, dtype in found])


def config_values(
    path_or_repo_id: str | Path, revision: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The place and content of a checkpoint's config.json; no weights are fetched."""
    path = resolve(path_or_repo_id, revision, weights=False) / CONFIG
    if not os.path.lexists(path) and (foreign := _foreign(path.parent)):
        raise CheckpointError(f"{path} is missing: {foreign}")
    return path, read_json_object(path, extended=True)


def read_layout(folder: Path) -> list[StoredTensor]:
    """Every stored tensor of a single-file or sharded checkpoint, shard by shard in stored order.

    Raises `CheckpointError` for a folder without safetensors, an index that disagrees with its
    shards and any malformed file.
    """
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}, expected one of them")
    if os.path.lexists(index):
        return _read_shards(folder, index)
    if os.path.lexists(single):
        return read_header(single)
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    if shards:
        raise CheckpointError(f"{index} is missing, but {listed(shards)} need it")
    if foreign := _foreign(folder):
        raise CheckpointError(f"{foreign}; expected {SINGLE} or {INDEX}")
    raise CheckpointError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")


def _foreign(folder: Path) -> str | None:
    """What a folder without a checkpoint of ours holds instead, if that is well known."""
    names = sorted(os.listdir(folder))
    if any(name == ADAPTER or name.startswith("adapter_model.") for name in names):
        base = ""
        with contextlib.suppress(CheckpointError):
            base = read_json_object(folder / ADAPTER).get("base_model_name_or_path")
        of = f" of {shown(base)}" if base else ""
        return f"{folder} holds a LoRA adapter{of}: {MERGE}"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{folder} holds GGUF files ({listed(gguf)}), which llama.cpp reads"
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        return (
            f"{folder} holds only pickled weights ({listed(pickled)}): only safetensors are read, "
            "nothing is ever unpickled"
        )
    return None


def _read_shards(folder: Path, index: Path) -> list[StoredTensor]:
    content = read_json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: expected an object "weight_map" of tensor names to files')
    for name, file in weight_map.items():
        # Judged by its name alone: the hub's cache itself consists of links into another folder.
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: tensor {shown(name)} is in {shown(file)}, expected the plain name of a "
                ".safetensors file in the same folder"
            )
    files = list(dict.fromkeys(weight_map.values()))
    if absent := [file for file in files if not os.path.isfile(folder / file)]:
        raise CheckpointError(f"{index} names files that do not exist: {listed(absent)}")

    entries = [entry for file in files for entry in read_header(folder / file)]
    held: dict[str, str] = {}
    for entry in entries:
        if (first := held.setdefault(entry.name, entry.file.name)) != entry.file.name:
            raise CheckpointError(
                f"{folder}: tensor {shown(entry.name)} is held twice, "
                f"in {first} and {entry.file.name}"
            )
        if (mapped := weight_map.get(entry.name)) != entry.file.name:
            says = "does not list it" if mapped is None else f"says {mapped}"
            raise CheckpointError(
                f"{entry.file} holds tensor {shown(entry.name)}, but {INDEX} {says}"
            )
    for name, file in weight_map.items():
        if name not in held:
            raise CheckpointError(
                f"{index}: tensor {shown(name)} should be in {file}, which lacks it"
            )
    return entries


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file of weights, in the order of their bytes.

    Raises `CheckpointError` where the file cannot be read, and as `tensor_file.read_header`.
    """
    with _as_checkpoint_errors(path):
        return tensor_file.read_header(path, DTYPES, CheckpointError).tensors


def read_json_object(path: Path, extended: bool = False) -> dict[str, Any]:
    """The object in a JSON file; `extended` as in `json_file`. All errors are `CheckpointError`."""
    with _as_checkpoint_errors(path):
        return json_file.read_json_object(path, CheckpointError, extended=extended)


@contextlib.contextmanager
def _as_checkpoint_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def listed(items: list[str]) -> str:
    """The first few items, and how many more there are."""
    head = ", ".join(items[:_SHOWN])
    return head if len(items) <= _SHOWN else f"{head} and {len(items) - _SHOWN} more"

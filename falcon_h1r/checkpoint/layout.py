"""Which tensor lies where: the safetensors header and the index of a sharded checkpoint.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. The header is
parsed here rather than by the safetensors package so that every refusal names the tensor, and
because the loader reads the bytes itself (see `loader.py`). Nothing in this file reads a weight.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import CheckpointError
from .hub import CONFIG, resolve

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# At least float32 in every model, whatever its dtype: they enter exponentials.
FLOAT32_PARAMETERS = ("mamba.A_log", "mamba.D", "mamba.dt_bias")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHOWN = 8  # names listed in a message before the rest is counted


class StoredTensor(NamedTuple):
    """A tensor of a file, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int  # of the first byte, from the start of the file
    nbytes: int


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
    return path, read_json_object(path)


def read_layout(folder: Path) -> list[StoredTensor]:
    """Every stored tensor of a single-file or sharded checkpoint, shard by shard in stored order.

    Raises `CheckpointError` for a folder without safetensors, an index that disagrees with its
    shards and any malformed file.
    """
    single, index = folder / SINGLE, folder / INDEX
    if os.path.isfile(single) and os.path.isfile(index):
        raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}, expected one of them")
    if os.path.isfile(index):
        return _read_shards(folder, index)
    if os.path.isfile(single):
        return read_header(single)
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if shards:
        raise CheckpointError(f"{index} is missing, but {listed(shards)} need it")
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({listed(pickled)}): only safetensors are read, "
            f"nothing is ever unpickled; expected {SINGLE} or {INDEX}"
        )
    raise CheckpointError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")


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
    """The tensors of one safetensors file, in the order of their bytes.

    Raises `CheckpointError` unless the header is well-formed and its tensors fill the rest of the
    file exactly, without gap or overlap.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors header")
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header length is {length}, expected at most "
                    f"{min(size - 8, MAX_HEADER_BYTES)} (the file has {size} bytes)"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error

    header = _parse_json_object(raw, path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    start = 8 + length
    entries = [_entry(path, start, name, value) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for entry in entries:
        if (end := entry.offset + entry.nbytes) > size:
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} ends at byte {end}, but the file has {size} "
                "bytes: it is truncated or its header is damaged"
            )
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} {what}: it starts at byte "
                f"{entry.offset - start} of the data, expected {end - start}"
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{path}: {size} bytes, but its header accounts for {end}")
    return entries


def _entry(path: Path, start: int, name: str, value: Any) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {shown(dtype)} is not supported, expected one of {', '.join(DTYPES)} "
            "(quantised checkpoints cannot be loaded)"
        )
    if not _are_counts(shape):
        raise CheckpointError(f"{where}: shape {shown(shape)} is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)} are no [begin, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shown(shape)} takes {nbytes} bytes, but data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    return StoredTensor(name, tuple(shape), DTYPES[dtype], path, start + offsets[0], nbytes)


def _are_counts(value: Any) -> bool:
    # type() rather than isinstance(): JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` for anything else and repeated keys."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return _parse_json_object(raw, path, "content")


def _parse_json_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {shown(twice)} occurs twice")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: {what} is a JSON {type(value).__name__}, expected an object"
        )
    return value


def shown(value: Any) -> str:
    """`repr`, cut to a length that leaves an error message readable."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def listed(items: list[str]) -> str:
    """The first few items, and how many more there are."""
    head = ", ".join(items[:_SHOWN])
    return head if len(items) <= _SHOWN else f"{head} and {len(items) - _SHOWN} more"

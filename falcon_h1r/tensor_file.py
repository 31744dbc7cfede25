"""Named tensors in a safetensors file: the header is judged first, and only then a byte is read.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. The header is
parsed here rather than by the safetensors package so that every refusal names the tensor.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .checks import shown
from .files import foreign_kind, open_file, whole_file
from .json_file import MAX_JSON_BYTES, parse_json_object

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = FLOATS | INTEGERS
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_RANK = 16
MAX_NAME = 512  # characters
_METADATA = "__metadata__"


class StoredTensor(NamedTuple):
    """A tensor of a file, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int  # of the first byte, from the start of the file
    nbytes: int


class Header(NamedTuple):
    """What the header of a safetensors file says."""

    tensors: list[StoredTensor]  # in the order of their bytes
    metadata: dict[str, str]


def read_header(
    path: str | Path,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    error: type[ValueError] = ValueError,
) -> Header:
    """The header of a safetensors file.

    dtypes: those that are accepted, by their names in the format.
    Raises OSError where the file cannot be read; `error` unless the header is well-formed and its
    tensors fill the rest of the file exactly, without gap or overlap.
    """
    path = Path(path)
    with open_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length, most = int.from_bytes(start[:8], "little"), min(size - 8, MAX_JSON_BYTES)
        if not 0 < length <= most or len(start) < 8:
            kind = None if start[8:9] == b"{" else foreign_kind(start)
            if kind:
                raise error(f"{path} is {kind}, expected a safetensors file")
            if len(start) < 8:
                raise error(f"{path}: {size} bytes, too short for a safetensors header")
            raise error(
                f"{path}: header length is {length}, expected at most {most} "
                f"(the file has {size} bytes)"
            )
        raw = (start[8:] + file.read(max(0, length - len(start) + 8)))[:length]
    header = parse_json_object(raw, f"{path}: header", error)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(f"{path}: {_METADATA} must map strings to strings")
    entries = [_entry(path, 8 + length, *item, dtypes, error) for item in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_places(path, entries, 8 + length, size, error)
    return Header(entries, metadata)


def _check_places(
    path: Path, entries: list[StoredTensor], start: int, size: int, error: type[ValueError]
) -> None:
    """Tensors in the order of their bytes fill the file from `start` to its end."""
    for entry in entries:
        if (end := entry.offset + entry.nbytes) > size:
            raise error(
                f"{path}: tensor {shown(entry.name)} ends at byte {end}, but the file has {size} "
                "bytes: it is truncated or its header is damaged"
            )
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise error(
                f"{path}: tensor {shown(entry.name)} {what}: it starts at byte "
                f"{entry.offset - start} of the data, expected {end - start}"
            )
        end += entry.nbytes
    if end != size:
        raise error(f"{path}: {size} bytes, but its header accounts for {end}")


def _entry(
    path: Path,
    start: int,
    name: str,
    value: Any,
    dtypes: Mapping[str, torch.dtype],
    error: type[ValueError],
) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if len(name) > MAX_NAME:
        raise error(f"{where}: a name of {len(name)} characters, expected at most {MAX_NAME}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        quantised = "" if dtypes.keys() & INTEGERS else " (quantised checkpoints cannot be loaded)"
        raise error(
            f"{where}: dtype {shown(dtype)} is not supported, expected one of {', '.join(dtypes)}"
            + quantised
        )
    if not _are_counts(shape):
        raise error(f"{where}: shape {shown(shape)} is no list of at most {MAX_RANK} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"{where}: data_offsets {shown(offsets)} are no [begin, end]")
    nbytes = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise error(
            f"{where}: {dtype} of shape {shown(shape)} takes {nbytes} bytes, but data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    if math.prod(size or 1 for size in shape) >= 2**60:  # torch multiplies sizes in 64 bits
        raise error(f"{where}: shape {shown(shape)} is beyond what a tensor can have")
    return StoredTensor(name, tuple(shape), dtypes[dtype], path, start + offsets[0], nbytes)


def _are_counts(value: Any) -> bool:
    # type() rather than isinstance(): JSON's true is an int to Python.
    counts = isinstance(value, list) and len(value) <= MAX_RANK
    return counts and all(type(item) is int and item >= 0 for item in value)


def read_tensors(header: Header, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file whose header was read. Raises OSError, or ValueError with the path."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {entry.name: file.get_tensor(entry.name) for entry in header.tensors}
    except SafetensorError as error:  # the file was changed in between
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors as one safetensors file: the whole file or nothing.

    Raises ValueError for a dtype that the format does not have; OSError, naming `path`, where the
    file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{path}: tensor {shown(name)} is {tensor.dtype}: no dtype of a file")
    specs = [Spec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]

    def write(file: BinaryIO, spec: Spec) -> None:
        tensor = tensors[spec.name].detach().cpu().contiguous()
        file.write(bytes_of(tensor))

    with whole_file(path) as new:
        write_safetensors(new, specs, write, metadata)


def write_safetensors(
    path: Path,
    specs: Iterable[Spec],
    write: Callable[[BinaryIO, Spec], None],
    metadata: dict[str, str],
) -> None:
    """Write the file in place: its header, then write(file, spec) for each tensor."""
    # Widest dtypes first keeps every tensor aligned, which readers that map the file rely on.
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {_METADATA: metadata}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for spec in specs:
            write(file, spec)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; it must not outlive the tensor."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")

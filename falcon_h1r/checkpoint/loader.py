"""From a checkpoint folder to a model.

The model is built on the meta device; then each tensor gets its own memory and the file's bytes are
read straight into it. That costs no copy, and the loaded weights are private: they can be trained,
and do not change when the file does. Windows on a mapped file, as transformers hands out, are to be
had faster but depend on the file as long as they live; mapping and then copying was slower than
reading. What makes reading fast is where the bytes go, see `_allocate`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ..config import ConfigError, FalconH1Config
from ..ops import Ops
from .errors import CheckpointError
from .hub import CONFIG, GENERATION_CONFIG, resolve
from .layout import DTYPES, Entry, listed, read_json_object, read_layout, shown

if TYPE_CHECKING:
    from ..model import FalconH1ForCausalLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_PIECE = 1 << 24  # bytes converted or checked at once
_HUGE_PAGE = 1 << 21
_READERS = 4  # threads, which mostly wait for the disk or for fresh pages


def load(
    path_or_repo_id: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    ops: Ops | None = None,
    revision: str | None = None,
    check: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> FalconH1ForCausalLM:
    """The model of a local folder or hub repository, in eval mode; `model.source` is its folder.

    dtype: of the weights (float64, float32, bfloat16 or float16), converted while reading; A_log, D
        and dt_bias stay in float32 where dtype is narrower.
    ops: operator table, None for the default of the device (`ops.default_table`).
    check: also refuse NaN and infinities, stored or made by the conversion.
    progress: called after each tensor with (bytes read, bytes in all, tensor name).

    Reads one `model.safetensors`, or the shards of a `model.safetensors.index.json`. Strict: every
    tensor of the model must be there in its shape, and no other. With tied embeddings a stored
    lm_head.weight is accepted if it is bit-equal to the embedding. Peak memory is that of the
    weights plus at most 16 MiB per reader thread.

    Raises `CheckpointError` for anything wrong with the files, dtype or device, `ConfigError` for
    the content of config.json.
    """
    if dtype not in DTYPES.values():
        raise CheckpointError(f"dtype is {dtype}, expected one of {_names(DTYPES.values())}")
    device = _usable(device)
    folder = resolve(path_or_repo_id, revision)
    config = _config_of(folder)
    entries = read_layout(folder)
    model = _empty_model(folder, config, len(entries), ops, dtype)
    wanted = model.state_dict()
    if config.tie_word_embeddings:
        entries = _without_tied_head(entries)
    _match(folder, entries, wanted)

    weights = _read_all(entries, wanted, device, check, progress)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device)  # moves nothing; a table that nobody chose becomes the device's
    model.source = folder.absolute()
    model.eos_token_ids = end_token_ids(config, read_generation_config(folder))
    return model.eval()


def read_config(path_or_repo_id: str | Path, revision: str | None = None) -> FalconH1Config:
    """The configuration of a local folder or hub repository; no weights are fetched."""
    return _config_of(resolve(path_or_repo_id, revision, weights=False))


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Content of the folder's generation_config.json, {} where there is none.

    Raises `CheckpointError` if the file is not a JSON object.
    """
    path = Path(folder) / GENERATION_CONFIG
    return read_json_object(path) if os.path.lexists(path) else {}


def _config_of(folder: Path) -> FalconH1Config:
    path = folder / CONFIG
    try:
        return FalconH1Config.from_dict(read_json_object(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _empty_model(
    folder: Path, config: FalconH1Config, n_tensors: int, ops: Ops, dtype: torch.dtype
) -> FalconH1ForCausalLM:
    """The model without memory; sizes that no file could fill are refused before they are built."""
    from ..model import FalconH1ForCausalLM

    if config.num_hidden_layers > n_tensors:
        raise CheckpointError(
            f"{folder / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, "
            f"but the files hold {n_tensors} tensors"
        )
    try:
        return FalconH1ForCausalLM(config, ops=ops, dtype=dtype, device="meta")
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, for sizes beyond 2**63
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{folder / CONFIG}: no model of these sizes: {reason}") from error


def end_token_ids(config: FalconH1Config, generation: dict[str, Any]) -> tuple[int, ...]:
    """End tokens of config.json and generation_config.json together, the former first.

    Released checkpoints name `<|im_end|>` in the second file only. Raises `CheckpointError` if its
    eos_token_id is neither a token id nor a list of them.
    """
    stored = generation.get("eos_token_id")
    stored = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int and token >= 0 for token in stored):
        raise CheckpointError(
            f"{GENERATION_CONFIG}: eos_token_id is {shown(generation['eos_token_id'])}, expected a "
            "token id or a list of them"
        )
    return tuple(dict.fromkeys((*config.eos_token_ids, *stored)))


def _usable(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"device {str(device)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise CheckpointError("device 'meta' holds no data, expected one to load weights onto")
    return device


def _without_tied_head(entries: list[Entry]) -> list[Entry]:
    """Drop a stored copy of the embedding under the head's name; refuse anything but a copy."""
    by_name = {entry.name: entry for entry in entries}
    head, embedding = by_name.get(HEAD), by_name.get(EMBEDDING)
    if head is None or embedding is None:
        return entries
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same:
        pieces = zip(_pieces(head), _pieces(embedding), strict=True)
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces)
    if not same:
        raise CheckpointError(
            f"{head.file}: tensor {HEAD!r} differs from {EMBEDDING!r} in {embedding.file.name}, "
            "but config.json has tie_word_embeddings=true, expected no head or a bit-equal one"
        )
    return [entry for entry in entries if entry is not head]


def _match(folder: Path, entries: list[Entry], wanted: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected and misshapen tensors, all in one message."""
    found = {entry.name: entry for entry in entries}
    missing = [
        f"{name} {list(tensor.shape)}" for name, tensor in wanted.items() if name not in found
    ]
    unexpected = [
        f"{shown(entry.name)} {list(entry.shape)} in {entry.file.name}"
        for entry in entries
        if entry.name not in wanted
    ]
    misshapen = [
        f"{name} in {found[name].file.name}: found {list(found[name].shape)}, "
        f"expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [
        f"{len(items)} {kind}: {listed(items)}"
        for kind, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors are not those that {CONFIG} describes: {'; '.join(problems)}"
        )


def _read_all(
    entries: list[Entry],
    wanted: dict[str, Tensor],
    device: torch.device,
    check: bool,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, Tensor]:
    total, done = sum(entry.nbytes for entry in entries), 0
    weights: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        jobs = {
            pool.submit(_read, entry, wanted[entry.name].dtype, device, check): entry
            for entry in entries
        }
        try:
            for job in as_completed(jobs):
                entry = jobs[job]
                weights[entry.name] = job.result()
                done += entry.nbytes
                if progress is not None:
                    progress(done, total, entry.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return weights


def _read(entry: Entry, dtype: torch.dtype, device: torch.device, check: bool) -> Tensor:
    out = _allocate(entry.shape, dtype, device)
    if device.type == "cpu" and dtype == entry.dtype:
        with _opened(entry) as file:
            _read_into(file, out, entry)
    else:
        flat, start = out.view(-1), 0
        for piece in _pieces(entry):
            flat[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
    if check:
        _refuse_non_finite(out, entry)
    return out


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on Linux a large CPU tensor lies in huge pages of its own.

    With 4 KiB pages the kernel spends longer on the page faults of fresh memory than on reading.
    A mapping per tensor, not one for all, so that replacing a weight returns its memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages refuses the advice
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype).view(shape)


def _pieces(entry: Entry):
    """The stored values as 1-D tensors of at most `_PIECE` bytes, each valid until the next."""
    count, step = math.prod(entry.shape), _PIECE // entry.dtype.itemsize
    buffer = torch.empty(min(count, step), dtype=entry.dtype)
    with _opened(entry) as file:
        for start in range(0, count, step):
            piece = buffer[: min(step, count - start)]
            _read_into(file, piece, entry)
            yield piece


@contextlib.contextmanager
def _opened(entry: Entry):
    try:
        # A file object per tensor: the kernel's read-ahead follows each reader's own position.
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{entry.file}: tensor {shown(entry.name)}: {error.strerror or error}"
        ) from error


def _read_into(file: BinaryIO, out: Tensor, entry: Entry) -> None:
    view = bytes_of(out)
    while view:
        count = file.readinto(view[: 1 << 30])  # some systems refuse reads of 2 GiB and more
        if not count:
            raise CheckpointError(
                f"{entry.file}: tensor {shown(entry.name)}: the file ended {len(view)} bytes early"
            )
        view = view[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; it must not outlive the tensor."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _refuse_non_finite(tensor: Tensor, entry: Entry) -> None:
    flat, step = tensor.view(-1), _PIECE // tensor.dtype.itemsize
    for start in range(0, flat.numel(), step):
        finite = torch.isfinite(flat[start : start + step])
        if not finite.all():
            place = start + int((~finite).nonzero()[0])
            raise CheckpointError(
                f"{entry.file}: tensor {shown(entry.name)} holds {float(flat[place])} at element "
                f"{place} (stored as {_names([entry.dtype])}, read as {_names([tensor.dtype])}), "
                "expected finite values"
            )


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

"""From a checkpoint folder to a model.

The model is built on the meta device; then each tensor gets its own memory and the file's bytes are
read straight into it. That costs no copy, and the loaded weights are private: they can be trained,
and do not change when the file does. Windows on a mapped file, as transformers hands out, are to be
had faster but depend on the file as long as they live; mapping and then copying was slower than
reading. What makes reading fast is where the bytes go, see `_allocate`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ..checks import as_dtype, shown
from ..tensor_file import StoredTensor, bytes_of
from .errors import CheckpointError
from .generation_config import end_token_ids, read_generation_config
from .hub import CONFIG, GENERATION_CONFIG, resolve
from .layout import (
    EMBEDDING,
    HEAD,
    MERGE,
    common_dtype,
    listed,
    read_layout,
)

if TYPE_CHECKING:
    from ..model import FalconH1ForCausalLM
    from ..ops import Ops

_PIECE = 1 << 24  # bytes converted or checked at once
_HUGE_PAGE = 1 << 21
_READERS = 4  # threads, which mostly wait for the disk or for fresh pages


def load(
    model_class: type[FalconH1ForCausalLM],
    path_or_repo_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    ops: Ops | None = None,
    revision: str | None = None,
    check: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> FalconH1ForCausalLM:
    """A checkpoint's model, in eval mode; `model.source` is its folder.

    This is `model_class.from_pretrained`; path_or_repo_id and revision: see `resolve`.
    dtype: of the weights, float32, bfloat16, float16 or float64 or such a name, converted while
        reading; A_log, D and dt_bias stay in float32 where dtype is narrower. None: as they are
        stored (`stored_dtype`, which says what is done where dtypes are mixed).
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
    model, entries, device = prepare(model_class, path_or_repo_id, dtype, device, ops, revision)
    weights = read_all(entries, model.state_dict(), device, check, progress)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device)  # moves nothing; a table that nobody chose becomes the device's
    place = model.source / GENERATION_CONFIG
    model.eos_token_ids = end_token_ids(model.config, read_generation_config(model.source), place)
    return model


def prepare(
    model_class: type[FalconH1ForCausalLM],
    path_or_repo_id: str | Path,
    dtype: torch.dtype | str | None,
    device: str | torch.device,
    ops: Ops | None,
    revision: str | None,
) -> tuple[FalconH1ForCausalLM, list[StoredTensor], torch.device]:
    """Check everything that can be checked before a weight is read.

    Returns the model on the meta device, in eval mode, the stored tensors, which are exactly those
    of the model, and the device they are to be loaded onto. Arguments and errors: those of `load`.
    """
    if dtype is not None:
        dtype = as_dtype(dtype, error=CheckpointError)
    device = _usable(device)
    folder = resolve(path_or_repo_id, revision)
    config = model_class.config_class.from_pretrained(folder)
    entries = read_layout(folder)
    if config.num_hidden_layers > len(entries):  # before layers are made that no file could fill
        raise CheckpointError(
            f"{folder / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, "
            f"but the files hold {len(entries)} tensors"
        )
    if dtype is None:
        dtype = common_dtype((entry.name, entry.dtype) for entry in entries)
    try:
        model = model_class(config, ops=ops, dtype=dtype, device="meta").eval()
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, for sizes beyond 2**63
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{folder / CONFIG}: no model of these sizes: {reason}") from error
    model.source = folder.absolute()
    if config.tie_word_embeddings:
        entries = _without_tied_head(entries)
    _match(folder, entries, model.state_dict())
    return model, entries, device


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


def _without_tied_head(entries: list[StoredTensor]) -> list[StoredTensor]:
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


def _match(folder: Path, entries: list[StoredTensor], wanted: dict[str, Tensor]) -> None:
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
        lora = any("lora_" in name or name.startswith("base_model.") for name in found)
        hint = f"; some are of a LoRA adapter: {MERGE}" if lora else ""
        raise CheckpointError(
            f"{folder}: the tensors are not those that {CONFIG} describes: "
            f"{'; '.join(problems)}{hint}"
        )


def read_all(
    entries: list[StoredTensor],
    wanted: dict[str, Tensor],
    device: torch.device,
    check: bool,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, Tensor]:
    """The values of `entries`, each in the dtype of the tensor of that name in `wanted`."""
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


def _read(entry: StoredTensor, dtype: torch.dtype, device: torch.device, check: bool) -> Tensor:
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


def _pieces(entry: StoredTensor):
    """The stored values as 1-D tensors of at most `_PIECE` bytes, each valid until the next."""
    count, step = math.prod(entry.shape), _PIECE // entry.dtype.itemsize
    buffer = torch.empty(min(count, step), dtype=entry.dtype)
    with _opened(entry) as file:
        for start in range(0, count, step):
            piece = buffer[: min(step, count - start)]
            _read_into(file, piece, entry)
            yield piece


@contextlib.contextmanager
def _opened(entry: StoredTensor):
    try:
        # A file object per tensor: the kernel's read-ahead follows each reader's own position.
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{entry.file}: tensor {shown(entry.name)}: {error.strerror or error}"
        ) from error


def _read_into(file: BinaryIO, out: Tensor, entry: StoredTensor) -> None:
    view = bytes_of(out)
    while view:
        count = file.readinto(view[: 1 << 30])  # some systems refuse reads of 2 GiB and more
        if not count:
            raise CheckpointError(
                f"{entry.file}: tensor {shown(entry.name)}: the file ended {len(view)} bytes early"
            )
        view = view[count:]


def _refuse_non_finite(tensor: Tensor, entry: StoredTensor) -> None:
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

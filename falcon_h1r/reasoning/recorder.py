"""Writing trace files while a run goes on (format: `traces`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check_integer
from ..files import write_file
from .lock import FolderLock
from .online import INTERRUPTED
from .traces import LINES, MANIFEST, Manifest, check_of, file_name, manifest_document

_FIRST_ROOM = 256


class TraceRecorder:
    """Collects the tokens of running traces, and writes each trace when it ends.

    folder: made if it is not there; one that holds a record, or that another run writes to, is
        refused with ValueError.
    lock: of the folder, where the caller holds it; None: held from here until `close`.
    top: how many of the likeliest tokens to keep of every position; 0: none, which makes a record
        some 9 times smaller at k = 20.

    Beside a policy: `start` and `step` with what its `start` and `step` were given, each once per
    step, so that both count the same steps; `end` for every trace that ended; `close` at the end.
    A line is written as a whole or not at all: OSError names the file, and cuts off what was
    written of the line.
    As a context manager it closes itself, as an interrupted run if it was not closed before.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        top: int | None = None,
        *,
        lock: FolderLock | None = None,
    ):
        self._top = manifest.k if top is None else top
        check_integer("top", self._top, 0)
        document = json.dumps(manifest_document(manifest), indent=1)
        self.folder = Path(folder)
        self._lock = FolderLock(folder) if lock is None else None
        try:
            if (self.folder / MANIFEST).exists() or (self.folder / LINES).exists():
                raise ValueError(f"{self.folder}: already holds a trace record")
            write_file(self.folder / MANIFEST, document)
        except BaseException:
            self._release()
            raise
        self.steps = 0
        self._written = 0
        self._closed = False
        self._rows: dict[int, int] = {}  # of running traces: their rows in the buffers
        self._begun: dict[int, tuple[int | None, int]] = {}  # seed, step
        self._free: list[int] = []
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._buffers = {
            "tokens": torch.zeros(0, _FIRST_ROOM, dtype=torch.int64),
            "confidence": torch.zeros(0, _FIRST_ROOM),
            "steps": torch.zeros(0, _FIRST_ROOM, dtype=torch.int64),
        }
        if self._top:
            self._buffers["top_ids"] = torch.zeros(0, _FIRST_ROOM, self._top, dtype=torch.int32)
            self._buffers["top_logprobs"] = torch.zeros(0, _FIRST_ROOM, self._top)

    def start(self, traces: Iterable[int], seeds: Iterable[int | None]) -> None:
        """These traces were admitted before the next step."""
        for trace, seed in zip(traces, seeds):
            if trace in self._begun:
                raise ValueError(f"trace {trace} was started before")
            if not self._free:
                self._grow(rows=max(4, len(self._lengths)))
            row = self._rows[trace] = self._free.pop()
            self._lengths[row] = 0
            self._begun[trace] = (seed, self.steps)

    def step(
        self,
        traces: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        top_ids: Tensor | None = None,
        top_logprobs: Tensor | None = None,
    ) -> None:
        """One token in some running traces; top_ids, top_logprobs: (r, at least `top`)."""
        rows = torch.tensor([self._rows[trace] for trace in torch.as_tensor(traces).tolist()])
        if len(rows):
            at = self._lengths[rows]
            if int(at.max()) >= self._buffers["tokens"].shape[1]:
                self._grow(room=self._buffers["tokens"].shape[1])
            values = {"tokens": tokens, "confidence": confidence, "steps": self.steps}
            if self._top:
                if top_ids is None or top_logprobs is None or top_ids.shape[-1] < self._top:
                    raise ValueError(f"top_ids, top_logprobs: {self._top} per token are to be kept")
                values["top_ids"] = top_ids[:, : self._top]
                values["top_logprobs"] = top_logprobs[:, : self._top]
            for name, value in values.items():
                buffer = self._buffers[name]
                buffer[rows, at] = torch.as_tensor(value).detach().cpu().to(buffer.dtype)
            self._lengths[rows] += 1
        self.steps += 1

    def end(self, trace: int, reason: str, text: str = "", answer: str | None = None) -> None:
        """Write a trace. reason: one of `traces.REASONS`."""
        row = self._rows.pop(trace)
        length = int(self._lengths[row])
        tensors = {name: b[row, :length].clone() for name, b in self._buffers.items()}
        self._free.append(row)
        seed, start = self._begun[trace]
        _write_trace(self.folder, trace, tensors, seed, start, reason, text, answer)
        self._written += 1

    def close(self, result: dict | None = None) -> None:
        """Close the record; traces still running are written as interrupted.

        result: kept in the last line as it is, beside how many traces and steps there were; `done`
        in it should be the policy's.
        """
        if self._closed:
            return
        self._closed = True
        try:
            for trace in sorted(self._rows):
                self.end(trace, INTERRUPTED)
            counts = {"traces": self._written, "steps": self.steps}
            _append(self.folder, {"end": {**(result or {}), **counts}})
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close({"done": INTERRUPTED})

    def _grow(self, rows: int = 0, room: int = 0) -> None:
        held = len(self._lengths)
        self._free += range(held + rows - 1, held - 1, -1)
        self._lengths = torch.cat([self._lengths, self._lengths.new_zeros(rows)])
        for name, buffer in self._buffers.items():
            grown = buffer.new_zeros(held + rows, buffer.shape[1] + room, *buffer.shape[2:])
            grown[:held, : buffer.shape[1]] = buffer
            self._buffers[name] = grown


def _write_trace(folder, trace, tensors, seed, start, reason, text, answer) -> None:
    from safetensors.torch import save

    content = save(tensors)
    write_file(folder / file_name(trace), content)
    line = {
        "trace": trace,
        "seed": seed,
        "reason": reason,
        "text": text,
        "answer": answer,
        "tokens": len(tensors["tokens"]),
        "start": start,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    _append(folder, line)


def _append(folder: Path, line: dict) -> None:
    """One line, whole or not at all, unless the process dies in between."""
    line = json.loads(json.dumps(line, allow_nan=False))
    content = memoryview((json.dumps({**line, "check": check_of(line)}) + "\n").encode())
    path = folder / LINES
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while content:  # a write may take a part only, and says so
                written = file.write(content)
                if not written:
                    raise OSError(errno.EIO, "nothing was written")
                content = content[written:]
            os.fsync(file.fileno())
        except BaseException as error:
            with contextlib.suppress(OSError):
                file.truncate(before)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(path)
            raise


def remove_record(folder: Path) -> None:
    """Remove a record's files; the manifest last, by which it is known."""
    for path in [*folder.glob("trace-*.safetensors"), folder / LINES, folder / MANIFEST]:
        path.unlink(missing_ok=True)

"""Trace files: what every trace of a question said and how sure it was, to be replayed.

A record is a folder:

    manifest.json             one object: `format` "falcon_h1r.traces", `version` 1, and the fields
                              of `Manifest`
    traces.jsonl              one object per trace, in the order in which they ended, and a last one
                              that closes the record; each with `check`, the SHA-256 of the rest of
                              it as JSON with sorted keys and no spaces
        {"trace", "seed", "reason", "text", "answer", "tokens", "start", "sha256", "check"}
        {"end": {...}, "check"}
    trace-00000.safetensors   one file per trace, whose SHA-256 its line names:
        tokens (n) int64, -1 where unknown; confidence (n) float32; steps (n) int64, ascending;
        top_ids (n, k) int32 and top_logprobs (n, k) float32, or neither of the two

`start` and `steps` count the steps of the whole run: a trace was admitted before step `start`, and
got its i-th token in step `steps[i]`: the order of arrival. A file is there whole or not at all,
and its line is written after it. A record without its last line is one of a run that was cut short:
it is read, and `complete` says so. A last line that is cut short or damaged is left out:
`notes` say so. Another damaged line is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from ..checks import is_integer, shown
from .confidence import TOP_K, token_confidence
from .online import CONSENSUS, INTERRUPTED, LOW, NATURAL

FORMAT, VERSION = "falcon_h1r.traces", 1
MOST_STEPS = 2**26  # of a run: more than any has
MOST_TRACES = 2**20  # of a record
MOST_LEVELS = 100  # of JSON: lists and objects inside one another
MANIFEST, LINES = "manifest.json", "traces.jsonl"
REASONS = (*NATURAL, LOW, CONSENSUS, INTERRUPTED)
_LINE = {
    "trace": int,
    "seed": (int, type(None)),
    "reason": str,
    "text": str,
    "answer": (str, type(None)),
    "tokens": int,
    "start": int,
    "sha256": str,
}
_TENSORS = {"tokens": torch.int64, "confidence": torch.float32, "steps": torch.int64}
_DTYPES = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32}
_TOP = {"top_ids": torch.int32, "top_logprobs": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a record is of. k: likeliest tokens in a confidence; k_least: fewest that were there,
    below k only in an import that allowed it. reference: the right answer, if it is known. rule: of
    `Equality`, with its version; extractor: of `make_extractor`. policy: `DeepConf.to_dict()` of
    the run, None if all traces ran to their end. source: who made the tokens."""

    k: int = TOP_K
    k_least: int | None = None
    question: str | None = None
    prompt: str | None = None
    prompt_tokens: int | None = None
    reference: str | None = None
    model: str | None = None
    sampling: dict = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    extractor: str = "boxed"
    rule: str = "exact"
    policy: dict | None = None
    source: str = "falcon_h1r"


@dataclass(frozen=True)
class RecordedTrace:
    """One trace of a record; tensors as in the module's description."""

    number: int
    seed: int | None
    reason: str
    text: str
    answer: str | None
    start: int
    tokens: Tensor
    confidence: Tensor
    steps: Tensor
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def whole(self) -> bool:
        """Whether it came to its own end."""
        return self.reason in NATURAL


@dataclass(frozen=True)
class Record:
    """traces: by number. complete: whether the run was closed. end: what it left as its result.
    notes: what was left out, for the user."""

    folder: Path
    manifest: Manifest
    traces: list[RecordedTrace]
    complete: bool
    end: dict
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.traces))


def read_record(folder: str | Path, tensors: bool = True) -> Record:
    """Read a record; tensors: also the likeliest tokens of every position, the bulk of it.

    Raises ValueError, naming the file and what is wrong with it, for a folder that is no record, a
    newer version, and anything damaged; OSError where a file cannot be read.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    traces, end = [], None
    lines, notes = _read_lines(folder / LINES)
    for number, line in enumerate(lines, start=1):
        place = f"{folder / LINES}, line {number}"
        if end is not None:
            raise ValueError(f"{place}: follows the line that closes the record")
        if "end" in line:
            end = line["end"]
            if not isinstance(end, dict) or end.get("traces") != len(traces):
                raise ValueError(f"{place}: closes another number of traces than {len(traces)}")
            steps = end.get("steps")
            if type(steps) is not int or not _steps(traces) <= steps <= MOST_STEPS:
                raise ValueError(
                    f"{place}: closes after {shown(steps)} steps, which are not the traces'"
                )
            continue
        traces.append(_read_trace(folder, line, place, manifest, tensors))
    traces.sort(key=lambda trace: trace.number)
    numbers = [trace.number for trace in traces]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{folder / LINES}: a trace is there twice")
    return Record(folder, manifest, traces, end is not None, end or {}, notes)


def _steps(traces: list[RecordedTrace]) -> int:
    lasts = [int(trace.steps[-1]) + 1 if len(trace) else trace.start for trace in traces]
    return max(lasts, default=0)


def find_records(folder: str | Path) -> list[Path]:
    """The folder itself if it is a record, else the records in it, by name; ValueError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / MANIFEST).exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise ValueError(f"{folder}: neither a trace record nor a folder of them ({MANIFEST})")
    return found


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: not a trace record: it has no {MANIFEST}")
    values = json_object(path.read_bytes(), str(path))
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: not a trace record of falcon_h1r")
    if (version := values.pop("version", None)) != VERSION:
        raise ValueError(
            f"{path}: version {shown(version)} of the format, this code reads {VERSION}"
        )
    _check_sum(values, str(path))
    known = {entry.name for entry in fields(Manifest)}
    if set(values) != known:
        raise ValueError(
            f"{path}: expected the fields {sorted(known)}, found {shown(sorted(values))}"
        )
    counts = [values[name] for name in ("k", "k_least", "prompt_tokens", "seed")]
    texts = [values[name] for name in ("question", "prompt", "reference", "model")]
    good = all(v is None or (type(v) is int and v >= 0) for v in counts) and values["k"]
    good = good and all(v is None or isinstance(v, str) for v in texts)
    good = good and all(isinstance(values[name], str) for name in ("extractor", "rule", "source"))
    good = good and isinstance(values["sampling"], dict)
    good = good and isinstance(values["policy"], (dict, type(None)))
    stops = values["stop_token_ids"]
    ids = stops is None or (isinstance(stops, list) and all(_is_id(v) for v in stops))
    if not good or not ids:
        raise ValueError(f"{path}: a field is of another kind than it should be")
    return Manifest(**values)


def _is_id(value) -> bool:
    return is_integer(value, 0, 2**63 - 1)


def _check_sum(values: dict, place: str) -> None:
    """Take the check out of the values, and raise ValueError where it is not theirs."""
    check = values.pop("check", None)
    try:
        made = check_of(values)
    except ValueError as error:  # NaN and infinities, which no writer of a record leaves
        raise ValueError(f"{place}: damaged: {error}") from error
    if check != made:
        raise ValueError(f"{place}: damaged: its check does not fit")


def _read_lines(path: Path) -> tuple[list[dict], tuple[str, ...]]:
    """The lines up to the last whole one, and what is to be said of a last one that is not."""
    if not path.exists():
        return [], ()
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    content = path.read_bytes()
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    values = []
    for number, raw in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if number == len(lines) and not content.endswith(b"\n"):
            return values, (f"{place}: cut short, left out",)
        try:
            value = json_object(raw, place)
            _check_sum(value, place)
        except ValueError as error:
            if number == len(lines):
                return values, (f"{error}; the line is left out",)
            raise
        values.append(value)
    return values, ()


def _read_trace(
    folder: Path, line: dict, place: str, manifest: Manifest, tensors: bool
) -> RecordedTrace:
    for name, kind in _LINE.items():
        if not isinstance(line.get(name, ...), kind) or isinstance(line[name], bool):
            raise ValueError(f"{place}: field {name!r} is missing or of another kind")
    if not 0 <= line["trace"] < MOST_TRACES or line["reason"] not in REASONS:
        raise ValueError(
            f"{place}: trace {shown(line['trace'])} with reason {shown(line['reason'])}"
        )
    path = folder / file_name(line["trace"])
    stored = _read_tensors(path, line["sha256"])
    for name, dtype in {**_TENSORS, **(_TOP if "top_ids" in stored else {})}.items():
        tensor = stored.get(name)
        good = tensor is not None and tensor.dtype == dtype
        good = good and tensor.dim() == (2 if name in _TOP else 1)
        if not good or len(tensor) != line["tokens"]:
            raise ValueError(f"{path}: tensor {name!r} is missing or of another shape or dtype")
    if set(stored) not in (set(_TENSORS), {*_TENSORS, *_TOP}):
        raise ValueError(f"{path}: holds {shown(sorted(stored))}")
    if not 0 <= line["start"] <= MOST_STEPS:
        raise ValueError(f"{place}: starts before step {line['start']}, expected 0 .. {MOST_STEPS}")
    steps, confidence = stored["steps"], stored["confidence"]
    if bool((steps.diff() <= 0).any()) or (len(steps) and int(steps[0]) < line["start"]):
        raise ValueError(f"{path}: steps do not ascend from {line['start']}")
    if len(steps) and int(steps[-1]) >= MOST_STEPS:
        raise ValueError(f"{path}: step {int(steps[-1])}, more than {MOST_STEPS} are not read")
    if not bool((confidence.isfinite() & (confidence >= 0)).all()):
        raise ValueError(f"{path}: confidences that are negative or not finite")
    if len(steps) == 0 and line["reason"] in (*NATURAL, LOW):
        raise ValueError(f"{place}: a trace without tokens cannot end with {line['reason']!r}")
    _check_top(path, stored, manifest)
    return RecordedTrace(
        number=line["trace"],
        **{name: line[name] for name in ("seed", "reason", "text", "answer", "start")},
        **{name: tensor for name, tensor in stored.items() if tensors or name not in _TOP},
    )


def _check_top(path: Path, stored: dict[str, Tensor], manifest: Manifest) -> None:
    """Confidences must be those of the log-probabilities beside them, but for rounding."""
    top = stored.get("top_logprobs")
    if top is None or len(top) == 0:
        return
    if top.shape != stored["top_ids"].shape:
        raise ValueError(f"{path}: top_ids and top_logprobs differ in shape")
    if top.shape[1] < manifest.k:
        return
    made = token_confidence(top, manifest.k)
    if not torch.allclose(made, stored["confidence"], rtol=1e-4, atol=1e-4):
        raise ValueError(f"{path}: confidences are not those of its top_logprobs, k {manifest.k}")


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, deserialize

    if not path.is_file():
        raise ValueError(f"{path}: missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path}: damaged: not the file that was recorded")
    try:
        stored = deserialize(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {shown(str(error))}") from error
    tensors = {}
    for name, values in stored:
        dtype, shape = _DTYPES.get(values["dtype"]), values["shape"]
        if dtype is None or not 1 <= len(shape) <= 2:
            raise ValueError(
                f"{path}: tensor {shown(name)} is missing or of another shape or dtype"
            )
        data = values["data"]
        empty = torch.empty(shape, dtype=dtype)
        tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else empty
    return tensors


def parse_json(raw: bytes | str, place: str):
    """The value of a JSON text; ValueError, in one line naming `place`, for what is none, and for
    more than `MOST_LEVELS` lists and objects inside one another."""
    try:
        value = json.loads(raw)
        level, levels = [value], 0
        while level:
            levels += 1
            if levels > MOST_LEVELS:
                raise RecursionError
            inner = [v.values() if isinstance(v, dict) else v for v in level if _holds(v)]
            level = [value for values in inner for value in values if _holds(value)]
    except RecursionError:
        reason = f"more than {MOST_LEVELS} lists and objects inside one another"
        raise ValueError(f"{place}: not JSON that is read: {reason}") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"{place}: not JSON: {error}") from error
    return value


def _holds(value) -> bool:
    return isinstance(value, (dict, list))


def json_object(raw: bytes | str, place: str) -> dict:
    value = parse_json(raw, place)
    if not isinstance(value, dict):
        raise ValueError(f"{place}: not a JSON object")
    return value


def file_name(trace: int) -> str:
    return f"trace-{trace:05}.safetensors"


def check_of(values: dict) -> str:
    """SHA-256 of the values as JSON with sorted keys, no spaces and ASCII only."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_document(manifest: Manifest) -> dict:
    """What stands in manifest.json."""
    # Once through JSON, so that the check is of what a reader sees (tuples are lists there).
    values = json.loads(json.dumps(asdict(manifest), allow_nan=False))
    return {"format": FORMAT, "version": VERSION, **values, "check": check_of(values)}


def finite_or_none(value: float | None) -> float | None:
    """For JSON, which has no infinities."""
    return value if value is not None and math.isfinite(value) else None

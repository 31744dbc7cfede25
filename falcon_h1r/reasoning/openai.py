"""Traces that an OpenAI-compatible server made, from its chat/completions responses.

Asked with `"logprobs": true, "top_logprobs": 20`, every choice is one trace. What such a server
leaves out is left out here: token ids (unless it writes tokens as `token_id:N`), seeds, and the
order of arrival, which is taken to be one token of every trace per step. Whether its
log-probabilities are those of the unmodified distribution is the server's affair.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .confidence import MOST_TOKENS, token_confidence
from .extract import make_extractor
from .lock import FolderLock
from .recorder import TraceRecorder, remove_record
from .traces import Manifest, Record, parse_json, read_record

# What servers write where a log-probability is minus infinity.
_NOTHING = -9999.0
_PARTS = ("text", "output_text")
_KINDS = {dict: "an object", list: "a list", str: "a text"}
_REASONS = {"stop": "stop", "length": "length", "eos": "stop", "stop_sequence": "stop_string"}


def read_responses(path: str | Path) -> list[dict]:
    """Response objects from a file: one, a list of them, or one per line; ValueError otherwise."""
    return [response for _, response in _located(path)]


def _located(path: str | Path) -> list[tuple[str, dict]]:
    """The responses of a file, each with its place."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither JSON nor JSON lines: {error}") from error
    # Only these end a line: the other line ends of Unicode may stand inside a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if found is None:
        many = [(f"{path}, line {n}", parse_json(line, f"{path}, line {n}")) for n, line in lines]
    else:
        found = parse_json(text, str(path))
        listed = found if isinstance(found, list) else [found]
        many = [(f"{path}, response {number}", entry) for number, entry in enumerate(listed)]
    for place, response in many:
        if not isinstance(response, dict) or "choices" not in response:
            raise ValueError(f"{place}: expected an object with `choices`, of chat/completions")
    if not many:
        raise ValueError(f"{path}: expected chat/completions responses, objects with `choices`")
    return many


def import_responses(
    responses: str | Path | Iterable[dict],
    folder: str | Path,
    manifest: Manifest,
    *,
    allow_fewer: bool = False,
) -> Record:
    """Write the choices of all responses as a record, numbered in their order, and read it.

    responses: objects, or the path of a file as `read_responses` reads it, whose lines messages
        then name.
    manifest: k, extractor, rule, question and reference are the caller's; `model` and `source` are
        filled in. allow_fewer: where a token has fewer than k log-probabilities (many servers give
        5 at most), take the mean of those there are; such confidences are smaller than they should
        be, and `k_least` of the manifest says by how many entries.

    Raises ValueError, naming response, choice and field, for anything that cannot be used; OSError
    where the record cannot be written. Nothing is left in the folder then.
    """
    if isinstance(responses, (str, Path)):
        places = _located(responses)
    else:
        places = [(f"response {number}", response) for number, response in enumerate(responses)]
    traces = []
    models = set()
    for place, response in places:
        response = _of_kind(response, dict, place)
        models.add(_text(response, "model", place))
        for choice in _of_kind(response.get("choices"), list, f"{place}, choices"):
            where = f"{place}, choice {len(traces)}"
            traces.append(_read_choice(choice, where, manifest.k, allow_fewer))
    if not traces:
        raise ValueError("the responses hold no choices")
    least = min(trace["least"] for trace in traces)
    model = models.pop() if len(models) == 1 else None
    manifest = replace(
        manifest,
        k_least=least if least < manifest.k else None,
        model=manifest.model or model,
        source="openai",
        policy=None,
        stop_token_ids=None,
    )
    extract = make_extractor(manifest.extractor)
    for trace in traces:
        trace["answer"] = extract(trace["text"])
    with FolderLock(folder) as lock:
        recorder = TraceRecorder(folder, manifest, top=0, lock=lock)
        try:
            _write(recorder, traces)
            return read_record(folder)
        except BaseException:
            remove_record(recorder.folder)
            raise


def _write(recorder: TraceRecorder, traces: list[dict]) -> None:
    recorder.start(range(len(traces)), [None] * len(traces))
    for step in range(max(len(trace["confidence"]) for trace in traces)):
        rows = [i for i, trace in enumerate(traces) if step < len(trace["confidence"])]
        recorder.step(
            torch.tensor(rows),
            torch.tensor([traces[i]["tokens"][step] for i in rows]),
            torch.stack([traces[i]["confidence"][step] for i in rows]),
        )
        for i in rows:
            trace = traces[i]
            if step + 1 == len(trace["confidence"]):
                recorder.end(i, trace["reason"], trace["text"], trace["answer"])
    recorder.close({"done": "all"})


def _read_choice(choice, where: str, k: int, allow_fewer: bool) -> dict:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError(f"{where}: has no message")
    content = _content(choice, where)
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _REASONS:
        known = ", ".join(_REASONS)
        raise ValueError(f"{where}: finish_reason is {_shown(reason)}, expected one of {known}")
    stopped_by = choice.get("stop_reason")
    if not isinstance(stopped_by, (str, int, type(None))):
        raise ValueError(f"{where}: stop_reason is {_shown(stopped_by)}, expected a text or an id")
    if reason == "stop" and isinstance(stopped_by, str):
        reason = "stop_sequence"  # vLLM names the string that stopped it
    confidence, least = [], k
    for position, entry in enumerate(content):
        values = _top(entry, f"{where}, token {position}")
        if len(values) < k and not allow_fewer:
            raise ValueError(
                f"{where}, token {position}: {len(values)} top_logprobs, k is {k}; "
                "allow fewer, or take a smaller k"
            )
        least = min(least, len(values))
        confidence.append(token_confidence(values, min(k, len(values))))
    thinking = _text(message, "reasoning_content", where) or _text(message, "reasoning", where)
    text = _said(message, where)
    return {
        "tokens": [_token_id(e, f"{where}, token {i}") for i, e in enumerate(content)],
        "confidence": torch.stack(confidence),
        "reason": _REASONS[reason],
        "text": f"<think>{thinking}</think>\n\n{text}" if thinking else text,
        "least": least,
    }


def _content(choice: dict, where: str) -> list:
    """The entries of a choice's tokens, at least one."""
    logprobs = choice.get("logprobs")
    if logprobs is None:
        logprobs = {}
    content = _of_kind(logprobs, dict, f"{where}, logprobs").get("content")
    if content is None:
        content = []
    if not _of_kind(content, list, f"{where}, logprobs.content"):
        raise ValueError(f"{where}: has no log-probabilities; ask for logprobs and top_logprobs")
    if len(content) > MOST_TOKENS:
        raise ValueError(f"{where}: {len(content)} tokens, more than {MOST_TOKENS} are not read")
    return content


def _said(message: dict, where: str) -> str:
    """The content of a message: a text, none, or a list of parts that are texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return _text(message, "content", where) or ""
    texts = []
    for number, part in enumerate(content):
        place = f"{where}, part {number} of the content"
        kind = _of_kind(part, dict, place).get("type")
        if kind not in _PARTS:
            raise ValueError(f"{place}: type is {_shown(kind)}, expected one of {_PARTS}")
        texts.append(_of_kind(part.get("text"), str, f"{place}, text"))
        _text(part, "text", place)
    return "".join(texts)


def _text(values: dict, name: str, where: str) -> str | None:
    """A field that is a text, or none."""
    text = values.get(name)
    if text is not None:
        try:
            _of_kind(text, str, f"{where}, {name}").encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{where}, {name}: no Unicode text: {half!r} in it") from error
    return text


def _of_kind(value, kind: type, place: str):
    if not isinstance(value, kind):
        raise ValueError(f"{place}: is {_shown(value)}, expected {_KINDS[kind]}")
    return value


def _shown(value) -> str:
    """Any value in a few characters."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer too long to be shown"


def _top(entry, place: str) -> Tensor:
    top = entry.get("top_logprobs") if isinstance(entry, dict) else None
    if not isinstance(top, list) or not top:
        raise ValueError(f"{place}: has no top_logprobs")
    values = [item.get("logprob") if isinstance(item, dict) else None for item in top]
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not _NOTHING < value < 1e-3:
            raise ValueError(f"{place}: a log-probability of {_shown(value)} cannot be used")
    return torch.tensor(values, dtype=torch.float64)


def _token_id(entry: dict, place: str) -> int:
    found = re.fullmatch(r"token_id:([0-9]+)", _text(entry, "token", place) or "")
    if found is None:
        return -1
    if len(found[1]) > 9:
        raise ValueError(f"{place}, token: {found[1][:12]}... is no token's id")
    return int(found[1])

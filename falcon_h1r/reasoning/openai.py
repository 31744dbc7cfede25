"""Traces that an OpenAI-compatible server made, from its chat/completions responses.

Asked with `"logprobs": true, "top_logprobs": 20`, every choice is one trace. What such a server
leaves out is left out here: token ids (unless it writes tokens as `token_id:N`), seeds, and the
order of arrival, which is taken to be one token of every trace per step. Whether its
log-probabilities are those of the unmodified distribution is the server's affair.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .confidence import token_confidence
from .extract import make_extractor
from .recorder import TraceRecorder
from .traces import Manifest, Record, read_record

# What servers write where a log-probability is minus infinity.
_NOTHING = -9999.0
_REASONS = {"stop": "stop", "length": "length", "eos": "stop", "stop_sequence": "stop_string"}


def read_responses(path: str | Path) -> list[dict]:
    """Response objects from a file: one, a list of them, or one per line; ValueError otherwise."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: neither JSON nor JSON lines: {error}") from error
    responses = found if isinstance(found, list) else [found]
    if not responses or not all(isinstance(r, dict) and "choices" in r for r in responses):
        raise ValueError(f"{path}: expected chat/completions responses, objects with `choices`")
    return responses


def import_responses(
    responses: Iterable[dict],
    folder: str | Path,
    manifest: Manifest,
    *,
    allow_fewer: bool = False,
) -> Record:
    """Write the choices of all responses as a record, numbered in their order, and read it.

    manifest: k, extractor, rule, question and reference are the caller's; `model` and `source` are
        filled in. allow_fewer: where a token has fewer than k log-probabilities (many servers give
        5 at most), take the mean of those there are; such confidences are smaller than they should
        be, and `k_least` of the manifest says by how many entries.

    Raises ValueError, naming response, choice and token, for anything that cannot be used; nothing
    is written then.
    """
    traces = []
    models = set()
    for number, response in enumerate(responses):
        models.add(response.get("model"))
        choices = response.get("choices")
        if not isinstance(choices, list):
            raise ValueError(f"response {number}: its choices are not a list")
        for choice in choices:
            where = f"response {number}, choice {len(traces)}"
            traces.append(_read_choice(choice, where, manifest.k, allow_fewer))
    if not traces:
        raise ValueError("the responses hold no choices")
    least = min(trace["least"] for trace in traces)
    model = models.pop() if len(models) == 1 else None
    manifest = replace(
        manifest,
        k_least=least if least < manifest.k else None,
        model=manifest.model or (model if isinstance(model, str) else None),
        source="openai",
        policy=None,
        stop_token_ids=None,
    )
    extract = make_extractor(manifest.extractor)
    with TraceRecorder(folder, manifest, top=0) as recorder:
        recorder.start(range(len(traces)), [None] * len(traces))
        for step in range(max(len(trace["confidence"]) for trace in traces)):
            rows = [i for i, trace in enumerate(traces) if step < len(trace["confidence"])]
            recorder.step(
                torch.tensor(rows),
                torch.tensor([traces[i]["tokens"][step] for i in rows]),
                torch.stack([traces[i]["confidence"][step] for i in rows]),
            )
            for i in rows:
                if step + 1 == len(traces[i]["confidence"]):
                    text = traces[i]["text"]
                    recorder.end(i, traces[i]["reason"], text, extract(text))
        recorder.close({"done": "all"})
    return read_record(folder)


def _read_choice(choice, where: str, k: int, allow_fewer: bool) -> dict:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError(f"{where}: has no message")
    content = (choice.get("logprobs") or {}).get("content")
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}: has no log-probabilities; ask for logprobs and top_logprobs")
    reason = choice.get("finish_reason")
    if reason not in _REASONS:
        known = ", ".join(_REASONS)
        raise ValueError(f"{where}: finish_reason is {reason!r}, expected one of {known}")
    if reason == "stop" and isinstance(choice.get("stop_reason"), str):
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
    thinking = message.get("reasoning_content") or message.get("reasoning")
    text = message.get("content") or ""
    return {
        "tokens": [_token_id(entry) for entry in content],
        "confidence": torch.stack(confidence),
        "reason": _REASONS[reason],
        "text": f"<think>{thinking}</think>\n\n{text}" if thinking else text,
        "least": least,
    }


def _top(entry, place: str) -> Tensor:
    top = entry.get("top_logprobs") if isinstance(entry, dict) else None
    if not isinstance(top, list) or not top:
        raise ValueError(f"{place}: has no top_logprobs")
    values = [item.get("logprob") if isinstance(item, dict) else None for item in top]
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not _NOTHING < value < 1e-3:
            raise ValueError(f"{place}: a log-probability of {value!r} cannot be used")
    return torch.tensor(values, dtype=torch.float64)


def _token_id(entry: dict) -> int:
    found = re.fullmatch(r"token_id:(\d+)", str(entry.get("token")))
    return int(found[1]) if found else -1

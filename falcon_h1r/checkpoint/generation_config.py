"""generation_config.json: the sampling that a checkpoint asks for, and its further end tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import shown
from .errors import CheckpointError
from .hub import GENERATION_CONFIG
from .layout import read_json_object

if TYPE_CHECKING:
    from ..config import FalconH1Config

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_UNSET = -1  # as vLLM and older files write it; null is another way


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Content of the folder's generation_config.json, {} where there is none.

    Raises `CheckpointError` if the file is not a JSON object.
    """
    path = Path(folder) / GENERATION_CONFIG
    return read_json_object(path) if os.path.lexists(path) else {}


def end_token_ids(
    config: FalconH1Config, generation: dict[str, Any], place: str | Path = GENERATION_CONFIG
) -> tuple[int, ...]:
    """End tokens of config.json and generation_config.json together, the former first.

    place: of the latter, for messages. null and -1 mean none there. Released checkpoints name
    `<|im_end|>` in the second file only. Raises `CheckpointError` if its eos_token_id is neither a
    token id nor a list of them.
    """
    given = _value(generation, "eos_token_id")
    stored = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int and token >= 0 for token in stored):
        raise CheckpointError(
            f"{place}: eos_token_id is {shown(given)}, expected a token id or a list of them"
        )
    return tuple(dict.fromkeys((*config.eos_token_ids, *stored)))


def sampling_defaults(
    generation: dict[str, Any], place: str | Path = GENERATION_CONFIG
) -> dict[str, Any]:
    """The fields of `SAMPLING` that a checkpoint sets, as its file has them: not yet judged.

    null and -1 mean unset. `do_sample` decides over the temperature: false is 0; true is 1 where
    the file has no temperature. Raises `CheckpointError` for another `do_sample`; place: for its
    message.
    """
    found = {name: _value(generation, name) for name in SAMPLING}
    found = {name: value for name, value in found.items() if value is not None}
    sample = _value(generation, "do_sample")
    if not (sample is None or isinstance(sample, bool)):
        raise CheckpointError(f"{place}: do_sample is {shown(sample)}, expected true or false")
    if sample is False:
        found["temperature"] = 0.0
    elif sample:
        found.setdefault("temperature", 1.0)
    return found


def _value(generation: dict[str, Any], name: str) -> Any:
    value = generation.get(name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if number and value == _UNSET else value

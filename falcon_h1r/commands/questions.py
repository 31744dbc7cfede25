"""Questions of `falcon-h1r think --questions`: one JSON object a line, as data sets write them."""

from __future__ import annotations

import math
import string
from typing import NamedTuple

from ..checks import check_text, shown

_KEYS = {
    "question": ("question", "problem"),
    "reference": ("reference", "answer"),
    "others": ("solution", "id", "choices", "prompt_suffix"),
}
KEYS = tuple(key for keys in _KEYS.values() for key in keys)


class Entry(NamedTuple):
    """text: what is asked, with its choices and its suffix. id: the data set's, as a text."""

    text: str
    reference: str | None
    id: str | None = None


def read_questions(path: str, suffix: str | None = None) -> dict[int, Entry]:
    """The questions of a file, by line; suffix: for those that have no `prompt_suffix`.

    question or problem: a text. reference or answer: a text or a number; of GSM8K's answers, which
    end in `#### 37`, the part behind the mark. solution: a text; the answer is what is boxed last
    in it, where there is neither of the two. choices: two to 26 texts, asked for under the letters
    A, B, ...; the answer then is a letter, a choice, or its number from 0. Raises ValueError,
    naming the line and the key, for anything else, a key that is unknown, and an id that is there
    twice.
    """
    from ..reasoning.traces import json_object

    entries, ids = {}, set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            entry = _entry(json_object(line, place), place, suffix)
            if entry.id is not None and entry.id in ids:
                raise ValueError(f"{place}: id {shown(entry.id)} is there twice")
            ids.add(entry.id)
            entries[number] = entry
    if not entries:
        raise ValueError(f"{path}: holds no questions")
    return entries


def with_suffix(text: str, suffix: str | None) -> str:
    return f"{text}\n{suffix}" if suffix else text


def _entry(values: dict, place: str, suffix: str | None) -> Entry:
    for key in values:
        if key not in KEYS:
            raise ValueError(
                f"{place}: key {shown(key)} is unknown, expected some of {', '.join(KEYS)}"
            )
    asked = [key for key in _KEYS["question"] if key in values]
    if len(asked) != 1:
        raise ValueError(f'{place}: expected {{"question": text, ...}}, or "problem" instead')
    text = _text(values, asked[0], place)
    if not (text or "").strip():
        raise ValueError(f'{place}: expected {{"{asked[0]}": text, ...}}, found no text')
    choices = values.get("choices")
    if choices is not None:
        letters = _letters(choices, place)
        text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices))
    own = _text(values, "prompt_suffix", place)
    return Entry(
        with_suffix(text, suffix if own is None else own),
        _reference(values, place),
        None if values.get("id") is None else _scalar(values, "id", place),
    )


def _letters(choices, place: str) -> str:
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"{place}: choices are no list of 2 to 26 texts")
    for choice in choices:
        check_text(f"{place}: choices", choice)
    return string.ascii_uppercase[: len(choices)]


def _reference(values: dict, place: str) -> str | None:
    from ..reasoning import last_boxed

    given = [key for key in _KEYS["reference"] if values.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f'{place}: "reference" and "answer": give one of the two')
    solution = _text(values, "solution", place)
    if given:
        reference = _scalar(values, given[0], place)
        if given[0] == "answer" and "####" in reference:
            reference = reference.rpartition("####")[2].strip()
            if not reference:
                raise ValueError(f"{place}: answer has nothing behind ####")
    elif solution is not None:
        reference = last_boxed(solution)
        if reference is None:
            raise ValueError(f"{place}: solution boxes no answer, and there is no other reference")
    else:
        return None
    choices = values.get("choices")
    return reference if choices is None else _letter(values, given, reference, choices, place)


def _letter(values: dict, given: list[str], reference: str, choices: list, place: str) -> str:
    """The letter of the right choice: by its number from 0, its letter, or its text."""
    letters = string.ascii_uppercase[: len(choices)]
    if given and isinstance(number := values[given[0]], int):
        if 0 <= number < len(choices):
            return letters[number]
    elif reference in tuple(letters):
        return reference
    elif choices.count(reference) == 1:
        return letters[choices.index(reference)]
    raise ValueError(
        f"{place}: the answer {reference[:40]!r} is none of the choices: expected one of "
        f"{', '.join(letters)}, of their texts, or 0 .. {len(choices) - 1}"
    )


def _text(values: dict, key: str, place: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key} is no text")
    check_text(f"{place}: {key}", value)
    return value


def _scalar(values: dict, key: str, place: str) -> str:
    """A text, or a number as one."""
    value = values[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, int) or math.isfinite(value):
            return str(value)
    elif isinstance(value, str):
        return _text(values, key, place)
    raise ValueError(f"{place}: {key} is neither a text nor a number")

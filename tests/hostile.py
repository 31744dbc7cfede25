"""Hostile files: bytes and JSON changed at random, and a loop that counts what comes of them.

A case is made from its seed alone, so a failure names all that is needed to see it again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

SECONDS = 10  # after which a case counts as one that hangs
MEMORY = 2 << 30  # bytes that all cases together may take

_NUMBERS = [-(2**63), -1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 2**64, 10**30, 10**299, 0.5, -0.0]
_FLOATS = [1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 1.0, 2.5]
_TEXTS = ["", "x", "F32", "F8_E4M3", "I64", "BF16", "auto", "\n", "\x1b[2J", "\0", "é\U0001f600"]
_TEXTS += ["x" * 5000, "../../etc/passwd", "model.safetensors", "__metadata__", "Infinity"]
# Text that json.dumps does not write: more levels than a reader can take, digits, surrogates.
_RAW = [
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 90 + "]" * 90,
    "9" * 400,
    "9" * 6000,
    "1e999",
    r'"\ud800"',
    r'"\udfff\ud800"',
    '{"a": 1, "a": 2}',
    "[" + "7," * 20_000 + "7]",
    "nul",
    "",
]
_STARTS = [b"version https://git-lfs", b"GGUF\3\0\0\0", b"PK\3\4", b"\x80\x02}q", b"<html>"]


def hostile_value(draw: random.Random):
    """A value of JSON that a reader might trip over; a `_RAW` text as a placeholder."""
    kind = draw.randrange(9)
    if kind < 2:
        return draw.choice(_NUMBERS)
    if kind == 2:
        return draw.choice(_FLOATS)
    if kind == 3:
        return draw.choice(_TEXTS)
    if kind == 4:
        return draw.choice([None, True, False, [], {}, [[]], {"": {}}, {"__float__": "NaN"}])
    if kind < 7:
        return f"@raw{draw.randrange(len(_RAW))}@"
    items = [hostile_value(draw) for _ in range(draw.randrange(4))]
    return items if kind == 7 else {draw.choice(["a", "dtype", "shape", ""]): v for v in items}


def change_json(draw: random.Random, value) -> str:
    """The text of a JSON value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        value = _change_once(draw, value)
    text = json.dumps(value)
    for number, raw in enumerate(_RAW):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


def _change_once(draw: random.Random, value):
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.02:
        return hostile_value(draw)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and draw.random() < 0.7:
        value[key] = _change_once(draw, value[key])
    elif draw.random() < 0.15:
        value.pop(key)
    elif draw.random() < 0.15 and isinstance(value, dict):
        name = draw.choice(_TEXTS) if draw.random() < 0.5 else f"{key}{draw.choice('s_ x')}"
        value[name] = value.pop(key) if draw.random() < 0.5 else hostile_value(draw)
    else:
        value[key] = hostile_value(draw)
    return value


def change_bytes(draw: random.Random, raw: bytes, first: int = 0) -> bytes:
    """Bytes with one to four places changed; most of them within the first `first` bytes."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        end = min(first, len(raw)) if first and draw.random() < 0.7 else len(raw)
        place = draw.randrange(end + 1)
        cut = draw.choice([0, 1, 1, 2, 8, 100])
        kind = draw.randrange(7)
        if kind == 0:
            raw = raw[:place]
        elif kind == 1:
            number = draw.choice([0, 1, len(raw), 2**31, 2**63, 2**64 - 1, draw.getrandbits(64)])
            raw = struct.pack("<Q", number) + raw[8:]
        elif kind == 2:
            raw = draw.choice(_STARTS) + raw[draw.choice([0, 8, len(raw)]) :]
        elif kind == 3:
            raw = raw[:place] + raw[place : place + cut] * 2 + raw[place + cut :]
        elif kind == 4:
            noise = bytes(draw.choice(b'{}[]",:0123456789-.eE\\u \0\xff') for _ in range(cut))
            raw = raw[:place] + noise + raw[place + cut :]
        elif kind == 5:
            raw = raw[:place] + raw[place + cut :]
        else:
            raw = raw[:place] + draw.randbytes(cut) + raw[place + cut :]
    return raw


class Hang(BaseException):
    """A case took too long; no Exception, so nothing takes it for a refusal."""


@contextmanager
def limited(seconds: int):
    def stop(signum, frame):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def count_outcomes(
    name: str, cases: int, case: Callable[[random.Random], object], named: str | os.PathLike = ""
) -> Counter:
    """Run case(draw) for the seeds `name:0` .. `name:{cases - 1}`; how many were read and refused.

    A refusal is a ValueError or OSError, in one line, which holds the text `named`. Anything else
    but a return fails, and so do a hang and memory beyond MEMORY.
    """
    outcomes: Counter = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(cases):
        seed = f"{name}:{number}"
        try:
            with limited(SECONDS):
                case(random.Random(seed))
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message and str(named) in message, (seed, message)
            assert len(message) < 2000, (seed, message)
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"case {seed}: {type(error).__name__}: {error}") from error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MEMORY, f"{name}: {grown} bytes"
    return outcomes

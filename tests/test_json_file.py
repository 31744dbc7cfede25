"""JSON of others: read, or refused in one line within its bounds."""

import json

import pytest

from falcon_h1r.json_file import MAX_DEPTH, parse_json, parse_json_object, read_json


class OwnError(ValueError):
    pass


def nested(depth, start="[", end="]"):
    return start * depth + "0" + end * depth


REFUSED = {
    b'{"a": 1,}': "not valid JSON",
    b"": "not valid JSON",
    b"\xff{}": "utf-8",
    b"\xef\xbb\xbf{}": "BOM",
    b'{"a": NaN}': "NaN",
    b"[-Infinity]": "-Infinity",
    b"1e999": "1e999 is beyond a float",
    b"[-1e999]": "beyond a float",
    str(2**64).encode(): "beyond 64 bits",
    str(-(2**63) - 1).encode(): "beyond 64 bits",
    b"9" * 400: "beyond 64 bits",
    b"9" * 100_000: "beyond 64 bits",
    b'{"a": 1, "b": {"c": 1, "c": 1}}': "'c' occurs twice",
    rb'["\ud800"]': r"surrogate \\ud800",
    rb'{"x\udfff": 1}': r"surrogate \\udfff",
    nested(MAX_DEPTH + 1).encode(): "inside one another",
    nested(100_000).encode(): "inside one another",
    nested(100_000, '{"a":', "}").encode(): "inside one another",
    ("[" * 1_000_000).encode(): "inside one another",
    b"version https://git-lfs.github.com/spec/v1\n": "git-lfs pointer",
    b"<!doctype html>": "HTML",
}


@pytest.mark.parametrize("raw", REFUSED, ids=lambda raw: repr(raw[:20]))
def test_what_is_refused(raw):
    with pytest.raises(OwnError, match=REFUSED[raw]) as caught:
        parse_json(raw, "the place", OwnError)
    message = str(caught.value)
    assert message.startswith("the place ") and "\n" not in message and len(message) < 300


def test_what_is_read():
    values = [0, -1, 2**64 - 1, -(2**63), 1.5, 1e308, True, None, "é\n\U0001f600", {"a": [{}]}, []]
    raw = json.dumps(values)
    assert parse_json(raw, "") == parse_json(raw.encode(), "") == values
    assert parse_json(nested(MAX_DEPTH), "") is not None
    assert parse_json(r'"\ud83d\ude00"', "") == "\U0001f600"


def test_what_python_writes_is_read_where_that_is_asked_for():
    values = {"a": [float("inf"), -float("inf")], "b": 10**299}
    assert parse_json(json.dumps(values), "", extended=True) == values
    for raw in ("9" * 301, '{"a": 1, "a": 1}', nested(MAX_DEPTH + 1)):
        with pytest.raises(ValueError):
            parse_json(raw, "", extended=True)


def test_files_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[1, 2]")
    assert read_json(path) == [1, 2]
    with pytest.raises(OwnError, match="at most"):
        read_json(path, OwnError, most=5)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(OwnError, match="the place is a JSON list, expected an object"):
        parse_json_object("[1, 2]", "the place", OwnError)

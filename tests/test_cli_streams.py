"""What streams and arguments cannot say: bytes that are no UTF-8, characters without a code."""

import io
import json
import sys

import pytest
from tiny_cli import run, write_checkpoint

from falcon_h1r.cli import main
from falcon_h1r.commands import prompt
from falcon_h1r.text import IncrementalDecoder

LATIN = ("ascii", "latin-1", "cp1252", "utf-8", "cp1252:strict")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def stream(content: bytes = b"", encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_is_piped_in_is_utf_8_whatever_the_locale(capsys, checkpoint, monkeypatch, encoding):
    argv = ["generate", "-m", checkpoint, "-n", "2", "--seed", "1", "--json"]
    _, expected, _ = run(capsys, *argv, "-p", "a\né≤")
    monkeypatch.setattr(sys, "stdin", stream("a\r\né≤\n".encode(), encoding))
    status, out, _ = run(capsys, *argv)
    assert status == 0 and json.loads(out)["outputs"] == json.loads(expected)["outputs"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_bytes_that_are_no_utf_8_are_refused_with_their_place(
    capsys, checkpoint, monkeypatch, tmp_path, encoding
):
    content = "a\r\né".encode() + b"\xff What is 2+3?"
    found = "is no UTF-8 text: byte 0xff at offset 5"
    (tmp_path / "p.txt").write_bytes(content)
    for argv in (["generate", "-f", tmp_path / "p.txt"], ["generate"], ["think"], ["walk"]):
        monkeypatch.setattr(sys, "stdin", stream(content, encoding))
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, "") and found in err and err.count("\n") == 1, argv
    for option in ("-p", "--stop", "--system"):
        status, out, err = run(capsys, "generate", *(["x"] * (option != "-p")), option, "é\udcfe")
        assert (status, out) == (2, "") and "byte 0xfe at offset 2" in err, option


def test_chat_goes_on_after_a_line_that_is_no_text(capsys, checkpoint, monkeypatch):
    lines = b"hi \xff\n/system \xfe\nhello\n"
    monkeypatch.setattr(sys, "stdin", stream(lines, "ascii"))
    status, out, err = run(capsys, "chat", "-m", checkpoint, "-n", "2")
    assert status == 0 and out.endswith("\n")
    assert "error: the message is no UTF-8 text: byte 0xff at offset 3" in err
    assert "error: the system message is no UTF-8 text: byte 0xfe at offset 0" in err
    assert err.count("tokens/s") == 1, "the third line is answered"


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("encoding", LATIN)
def test_all_that_was_made_is_printed(checkpoint, monkeypatch, encoding, as_json):
    monkeypatch.setattr(IncrementalDecoder, "push", lambda self, token: "≤é😀")
    encoding, _, errors = encoding.partition(":")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors or None)
    monkeypatch.setattr(sys, "stdout", out)
    argv = ["generate", "x", "-m", str(checkpoint), "-n", "2"]
    assert main([*argv, "--json"] if as_json else argv) == 0
    written = out.buffer.getvalue().decode(encoding)
    if as_json:
        assert json.loads(written)["outputs"][0]["text"].startswith("≤é😀≤é😀")
    else:
        text = "≤é😀≤é😀".encode(encoding, "backslashreplace").decode(encoding)
        assert written.startswith(text)


def test_a_source_without_an_end_is_not_read_for_ever(capsys, monkeypatch):
    monkeypatch.setattr(prompt, "MOST_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", stream(b"y\n" * 50))
    status, out, err = run(capsys, "generate")
    assert (status, out) == (2, "") and "stdin holds more than 10 bytes" in err


def test_an_error_of_the_system_names_the_file_and_no_number(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "-f", tmp_path)
    assert status == 2 and err == f"falcon-h1r: error: {tmp_path}: Is a directory\n"

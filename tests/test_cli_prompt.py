"""Where a prompt is read from, which device is taken, and what a terminal is sent."""

import io
import os
import sys

import pytest
import torch
from tiny_cli import Terminal, run, write_checkpoint

from falcon_h1r.cli import build_parser
from falcon_h1r.commands import common
from falcon_h1r.commands.prompt import read_prompt
from falcon_h1r.commands.terminal import Display, print_json, progress

READERS = {"generate": "prompt", "think": "question", "walk": "prompt", "dissect": "prompt"}
every_reader = pytest.mark.parametrize("command", READERS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def prompt_of(command, *argv, example=None):
    args = build_parser().parse_args([command, *map(str, argv)])
    return read_prompt(args, READERS[command], example)


@every_reader
def test_every_command_reads_a_prompt_in_the_same_ways(command, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("from\na file é\n\n", encoding="utf-8")
    assert prompt_of(command, "an argument") == "an argument"
    assert prompt_of(command, "-p", "an option") == "an option"
    assert prompt_of(command, "--prompt=-1 + 2") == "-1 + 2"
    assert prompt_of(command, "-f", file) == "from\na file é\n"
    for argv in ([], ["-"], ["-p", "-"], ["-f", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("piped\n"))
        assert prompt_of(command, *argv, example="not taken") == "piped"


@every_reader
def test_every_command_refuses_a_missing_prompt_in_the_same_words(
    capsys, command, tmp_path, monkeypatch
):
    name = READERS[command]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused = {
        ("",): f"the {name} is empty",
        ("-p", " "): f"the {name} is empty",
        ("-f", tmp_path / "empty.txt"): "empty.txt is empty",
        ("-f", tmp_path / "binary"): "binary is no UTF-8 text",
        ("-f", tmp_path / "missing"): "missing",
        ("-",): f"stdin is empty: no {name}",
        (): f"stdin is empty: no {name}",
        ("x", "-p", "y"): "not allowed with argument",
    }
    for argv, message in refused.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        status, out, err = run(capsys, command, *argv)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1, argv
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert "stdin is no UTF-8 text: byte 0xff at offset 0" in run(capsys, command)[2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff"))  # of a stream that escapes bytes
    assert "stdin is no UTF-8 text" in run(capsys, command)[2]
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in run(capsys, command, "-")[2]


def test_half_a_character_is_refused_everywhere(capsys, checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "\\ud800"}')
    for argv in (
        ["generate", "x", "--system", "\udcff"],
        ["chat", "--system", "\udcff"],
        ["think", "--questions", file],
    ):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, "") and "is no UTF-8 text" in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff\n"))
    status, _, err = run(capsys, "chat", "--model", checkpoint)
    assert status == 0 and "error: the message is no UTF-8 text" in err


def test_json_is_ascii_where_stdout_has_no_other_codes(monkeypatch):
    for encoding, text in (("ascii", "\\u00e9"), ("cp1252", "\\u00e9"), ("utf-8", "é")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        print_json({"text": "é"})
        stdout.flush()
        assert stdout.buffer.getvalue().decode("utf-8") == f'{{"text": "{text}"}}\n'


@pytest.mark.parametrize("command", ["generate", "think"])
def test_no_prompt_at_a_terminal_is_refused(capsys, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    message = f"no {READERS[command]}: give it as an argument"
    assert message in run(capsys, command)[2]


def test_an_example_is_taken_where_nothing_is_piped_in(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert prompt_of("walk", example="2+3") == "2+3"
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert prompt_of("walk", example="2+3") == "2+3"
        with pytest.raises(ValueError, match="stdin is empty"):
            prompt_of("walk", "-", example="2+3")


@pytest.mark.parametrize(
    ("argv", "device", "reason"),
    [
        ([], "cuda", ""),
        (["--ops", "torch"], "cuda", ""),
        (["--ops", "reference", "--dtype", "float64"], "cuda", ""),
        (["--device", "cpu"], "cpu", ""),
        (["--device", "cuda:1"], "cuda:1", ""),
        (["--int8"], "cpu", "--int8 is for a CPU"),
        (["--compile"], "cpu", "--compile is for a CPU"),
        (["--ops", "inductor"], "cpu", "--ops inductor is for a CPU"),
    ],
)
def test_a_gpu_is_taken_where_it_can_serve(monkeypatch, argv, device, reason):
    monkeypatch.setattr(common, "NAMES", ("reference", "torch", "triton", "inductor"))
    monkeypatch.setattr(common, "CPU_ONLY", ("inductor",))
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        args = build_parser().parse_args(["generate", "x", *argv])
        common.settle_device(args)
        given = "--device" in argv
        assert args.device == (device if available or given else "cpu")
        told = common._bound_to_cpu(args) if available and not given else ""
        assert told == (reason if available else "")


def test_without_triton_the_default_table_cannot_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    for argv, device in (([], "cpu"), (["--ops", "torch"], "cuda"), (["--dtype=float64"], "cuda")):
        args = build_parser().parse_args(["walk", *argv])
        common.settle_device(args)
        assert args.device == device


def test_the_header_says_why_a_gpu_is_not_taken(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    argv = ["generate", "x", "-n", "2", "-m", checkpoint, "--int8"]
    status, _, err = run(capsys, *argv)
    header = f"[{checkpoint} on cpu: float32, torch operators; --int8 is for a CPU]"
    assert status == 0 and err.splitlines()[0] == header
    argv = ["generate", "x", "-n", "2", "-m", checkpoint, "--device", "cpu"]
    assert (
        run(capsys, *argv)[2].splitlines()[0] == f"[{checkpoint} on cpu: float32, torch operators]"
    )


def test_a_long_compile_is_announced_before_it_begins(capsys):
    class Model:
        def new_cache(self, rows, length):
            assert capsys.readouterr().err == f"[{common.COMPILING}]\n"
            raise ValueError("enough")

    args = build_parser().parse_args(["generate", "x", "--compile"])
    with pytest.raises(ValueError, match="enough"):
        common.compile_step(args, Model(), 1)


@pytest.mark.parametrize(
    ("environment", "styled", "rewritten"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, False, False),
        ({}, True, True),  # a console of Windows
    ],
)
def test_no_color_and_a_dumb_terminal_are_heard(monkeypatch, environment, styled, rewritten):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen, text = Terminal(), "<think>why</think>so"
    display = Display(screen, opened=False)
    display.write(text)
    display.close(text)
    assert ("\x1b" in screen.getvalue()) == styled
    if not styled:
        assert screen.getvalue() == text + "\n"
    screen = Terminal()
    progress("reading", screen)
    assert ("\r" in screen.getvalue()) == rewritten == bool(screen.getvalue())


def test_a_line_of_progress_stays_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    screen = Terminal()
    progress("x" * 50, screen)
    progress("", screen)
    assert screen.getvalue() == "\r" + "x" * 19 + "\r" + "\r" + " " * 19 + "\r"
    elsewhere = io.StringIO()
    progress("x", elsewhere)
    assert elsewhere.getvalue() == ""

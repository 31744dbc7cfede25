"""How the command line is parsed: help and typing errors without torch, hints, lists, Ctrl-C."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_cli import run

import falcon_h1r
from falcon_h1r import cli
from falcon_h1r.cli import build_parser
from falcon_h1r.commands import common

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "generate chat info convert bench walk dissect parity doctor replay think".split()
ANSWERED_AT_ONCE = [
    *([name, "--help"] for name in COMMANDS),
    *(["bench", name, "--help"] for name in ("ops", "layer", "generate")),
    ["--help"],
    ["--version"],
    ["generat", "x"],
    ["generate", "x", "--temperatur", "1"],
    ["generate", "What", "is", "2+3?"],
    ["generate", "x", "--ops", "cuda"],
    ["generate", ""],
    ["generate", "x", "-f", "y"],
    ["think", "x", "--preset", "lowest"],
    ["info", "falcon-h1r7b"],
    ["walk", "--layers", "x"],
]


def test_help_and_typing_errors_need_no_torch():
    code = (
        "import contextlib, io, sys\n"
        "from falcon_h1r.cli import main\n"
        f"for argv in {ANSWERED_AT_ONCE!r}:\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try:\n"
        "            status = main(argv)\n"
        "        except SystemExit as end:\n"
        "            status = end.code\n"
        "    wanted = 0 if argv[-1] in ('--help', '--version') else 2\n"
        "    assert status == wanted and (out if wanted == 0 else err).getvalue(), argv\n"
        "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules, argv\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_takes(capsys, name):
    status, out, err = run(capsys, name, "--help")
    assert status == 0 and err == "" and out.startswith(f"usage: falcon-h1r {name}")
    options = {
        "-p TEXT, --prompt TEXT": ("generate", "think", "walk", "dissect", "parity"),
        "-f FILE, --prompt-file FILE": ("generate", "think", "walk", "dissect"),
        "-n N, --max-new-tokens N": ("generate", "chat", "think", "dissect"),
        "-m ": tuple(name for name in COMMANDS if name not in ("bench", "replay")),
    }
    for option, commands in options.items():
        assert (option in out) == (name in commands), option


def test_the_version_is_the_package_s(capsys):
    assert run(capsys, "--version") == (0, f"falcon-h1r {falcon_h1r.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("generat x", "did you mean generate?"),
        ("bench lay", "did you mean layer?"),
        ("generate x --temp 1", "unknown option --temp; did you mean --temperature?"),
        ("generate x --max_new_tokens=4", "unknown option --max_new_tokens; did you mean --max-n"),
        ("generate x --ops tritn", "did you mean triton?"),
        ("generate x -x", "unknown option -x; falcon-h1r generate --help lists the options"),
        ("convert --too gguf", "unknown option --too; did you mean --to?"),
        ("bench ops --quik", "unknown option --quik; did you mean --quick?"),
        ("--versoin", "unknown option --versoin; did you mean --version?"),
        ("--model x generate y", "unknown option --model; options stand behind a command"),
        ("info falcon-h1r7b", "did you mean falcon-h1r-7b? presets: "),
        ("generate What is 2+3?", 'quote the text: falcon-h1r generate "What is 2+3?"'),
        ("generate What is 2+3? -n 4", 'quote the text: falcon-h1r generate "What is 2+3?"'),
        ("walk costs $3", "quote the text: falcon-h1r walk 'costs $3'"),
        ("generate -p What is", "quote a text of several words"),
        ("generate -p -x", "-p/--prompt: expected one argument; a text that begins with"),
        ("info a -m b", "-m/--model: not allowed with argument"),
        ("info --traces x", "argument --traces: 'x' is no whole number"),
        ("walk x --layers 1,", "'': expected the number of a layer"),
        ("walk x --layers 1,-2", "'-2': expected the number of a layer"),
    ],
)
def test_typing_errors_get_a_hint(capsys, argv, message):
    status, out, err = run(capsys, *argv.split())
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("falcon-h1r: error: ") and message in err


def test_a_prompt_without_a_command_is_told_where_it_belongs(capsys):
    status, _, err = run(capsys, "What is 2+3?")
    assert status == 2 and 'behind a command: falcon-h1r generate "What is 2+3?"' in err


@pytest.mark.parametrize(
    ("argv", "layers", "prompt"),
    [
        (["x", "--layers", "0", "2"], [0, 2], "x"),
        (["--layers", "0", "2", "x y"], [0, 2], "x y"),
        (["--layers", "0,2", "x"], [0, 2], "x"),
        (["--layers=0,2", "x"], [0, 2], "x"),
        (["--layers", "all", "x"], ["all"], "x"),
        (["--layers", "2", "--", "3"], [2], "3"),
        (["--layer", "1", "--layers", "2", "x"], [1, 2], "x"),
        (["x"], None, "x"),
    ],
)
def test_a_list_of_layers_leaves_the_prompt_alone(argv, layers, prompt):
    args = build_parser().parse_args(["walk", *argv])
    assert (args.layers, args.prompt) == (layers, prompt)


@pytest.mark.parametrize("traces", ["1 64", "1,64", "1 --traces 64"])
def test_a_list_of_numbers_leaves_the_model_alone(traces):
    argv = ["info", "--traces", *traces.split(), "falcon-h1r-7b", "--context", "4096"]
    args = build_parser().parse_args(argv)
    assert (args.traces, args.context, args.model) == ([1, 64], [4096], "falcon-h1r-7b")


def test_short_options_and_old_spellings():
    args = build_parser().parse_args(
        ["generate", "-p", "x", "-n", "3", "-m", "FOLDER", "--samples", "2"]
    )
    assert (args.prompt_text, args.max_new_tokens, args.model, args.n) == ("x", 3, "FOLDER", 2)
    args = build_parser().parse_args(["generate", "x", "--max-new-tokens", "3", "--n", "2"])
    assert (args.prompt, args.max_new_tokens, args.n) == ("x", 3, 2)
    for argv in (["info", "NAME"], ["info", "-m", "NAME"]):
        assert common.model_argument(build_parser().parse_args(argv)) == "NAME"
    assert common.model_argument(build_parser().parse_args(["info"])) == "h1r-pico"


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path):
    """The stand-in for torch keeps the exception to itself, as packages do."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\n"
        "print('importing', file=sys.stderr, flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    child = subprocess.Popen(
        [sys.executable, "-m", "falcon_h1r", "generate", "x"],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "falcon-h1r: interrupted\n")


def test_ctrl_c_while_weights_are_read_is_one_line(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_model", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert run(capsys, "generate", "x") == (cli.INTERRUPTED, "", "falcon-h1r: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.\nSee there"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 9 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(capsys, monkeypatch, error):
    def load_model(args):
        raise error

    monkeypatch.setattr(common, "load_model", load_model)
    status, out, err = run(capsys, "generate", "x")
    assert (status, out) == (2, "") and err.startswith("falcon-h1r: error: out of memory")
    assert err.count("\n") == 1
    error = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError, match="a fault"):
        run(capsys, "generate", "x")


@pytest.mark.parametrize(
    ("closed", "status", "out", "err"),
    [
        (">&-", 2, "", "falcon-h1r: error: stdout is closed\n"),
        ("2>&-", 2, "", ""),  # not a word in place of the answer
    ],
)
def test_closed_streams(closed, status, out, err):
    command = f"exec {sys.executable} -m falcon_h1r generate '' {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_the_package_imports_its_names_when_they_are_used():
    tree = ast.parse(Path(falcon_h1r.__file__).read_text())
    shown = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert shown == falcon_h1r._MODULES  # what editors see is what there is
    assert set(falcon_h1r.__all__) <= set(dir(falcon_h1r))
    for name in falcon_h1r.__all__:
        assert getattr(falcon_h1r, name).__name__ == name
    assert falcon_h1r.ops.TORCH is not None  # modules too
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = falcon_h1r.nothing

"""The fenced blocks of a page: found, run in order, and their printed output compared.

    ```python    runs in the page's one namespace; a ```text block right behind it is its output
    ```console   lines that begin with "$ " are commands, what follows each is its output
    ```shell     commands, one a line, without an output
    any other    is not run

A comment right before a block says more about it, several ones separated by ";":

    <!-- slow -->                   runs with -m slow
    <!-- numbers vary -->           every printed number stands for any number
    <!-- file: NAME -->             the block is also written to this file
    <!-- not run: REASON -->        is parsed only: it needs a GPU, a network, other weights, hours
    <!-- test command -->           the same; `.ci/run` reads it and runs it

`pip install ... &&` in front of a command is left out.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = "tools benchmarks tests kernels falcon_h1r docs constraints.txt pyproject.toml".split()


class Block(NamedTuple):
    page: str
    line: int  # of the fence
    language: str
    text: str
    notes: dict[str, str]  # of the comment before it: word -> what stands behind its colon
    output: str | None  # what a python block prints

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        parsed_only = {"not run", "test command"} & set(self.notes)
        return self.language in ("python", "console", "shell") and not parsed_only

    @property
    def commands(self) -> list[tuple[str, str]]:
        """(command, its output) of a console or shell block."""
        found: list[list[str]] = []
        for line in self.text.splitlines():
            if self.language == "shell":
                if line.strip():
                    found.append([line, ""])
            elif line.startswith("$ "):
                found.append([line[2:], ""])
            elif found:
                found[-1][1] += line + "\n"
        return [(command, output) for command, output in found]


def blocks_of(path: Path) -> list[Block]:
    blocks, lines, number, last_end = [], path.read_text().splitlines(), 0, 0
    name = str(path.relative_to(ROOT))
    while number < len(lines):
        fence = re.fullmatch(r"```(\w*)", lines[number])
        if not fence:
            number += 1
            continue
        end = lines.index("```", number + 1)
        text = "\n".join(lines[number + 1 : end]) + "\n"
        before = re.fullmatch(r"<!-- (.*) -->", lines[number - 1]) if number else None
        notes = {}
        for note in before[1].split("; ") if before else ():
            word, _, rest = note.partition(": ")
            notes[word] = rest
        follows = bool(blocks) and not "".join(lines[last_end + 1 : number]).strip()
        if fence[1] == "text" and follows and blocks[-1].language == "python":
            blocks[-1] = blocks[-1]._replace(output=text)
        blocks.append(Block(name, number + 1, fence[1], text, notes, None))
        last_end, number = end, end + 1
    return blocks


class Runner:
    """Runs a page's blocks one after another, in the current folder and one namespace."""

    def __init__(self, folder: Path):
        self.names: dict[str, object] = {"__name__": "__main__"}
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)

    def run(self, block: Block) -> None:
        """Raises AssertionError, naming the place, where a block fails or prints something else."""
        if name := block.notes.get("file"):
            Path(name).write_text(block.text)
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, block.place, "exec"), self.names)
            if block.output is not None:
                check(block, block.text, block.output, printed.getvalue())
            return
        for command, output in block.commands:
            status, out, err = run_command(command)
            assert status == 0, f"{block.place}: {command}\nended with {status}\n{out}{err}"
            if output and not same(output, out, "numbers vary" in block.notes):
                check(block, command, output, out + err)


def run_command(command: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr). `falcon-h1r` alone runs in this process, to be quick."""
    command = re.sub(r"^pip install [^&]*&& ", "", command)  # what a test has is what it tests
    words, typed = shlex.split(command, comments=True), ""
    if words[0] == "echo" and words[2:3] == ["|"]:
        typed, words = words[1] + "\n", words[3:]
    if words[0] == "falcon-h1r" and not {"|", "&&", ">", "<"} & set(words):
        return run_here(words[1:], typed)
    python = shlex.quote(sys.executable)
    shims = f'falcon-h1r() {{ {python} -m falcon_h1r "$@"; }}\npython() {{ {python} "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{shims}{command}"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def run_here(arguments: list[str], typed: str) -> tuple[int, str, str]:
    from falcon_h1r.cli import main

    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.stdin = io.StringIO(typed)
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdin = stdin
    return status, out.getvalue(), err.getvalue()


def check(block: Block, what: str, expected: str, printed: str) -> None:
    assert same(expected, printed, "numbers vary" in block.notes), (
        f"{block.place}: {what}\n--- the page says\n{expected}\n--- it prints\n{printed}"
    )


NUMBER = re.compile(r"(?<![\w.])([+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)")
# A number in front of these depends on the machine and the minute.
TIMED = re.compile(r"\s?(s|ms|us|min|minutes|tokens/s|steps/s|GB/s|T?G?FLOP/s)\b")
UNIT = re.compile(r" (?:ns|us|ms|s)\b")
# And one behind these is drawn afresh, or moves with every edit.
DRAWN = ("seed ", ".py:")


def same(expected: str, printed: str, numbers_vary: bool = False) -> bool:
    """Whether a page's output stands for what is printed.

    White space counts as one space. A line `...` stands for any lines, `...` at a line's end for
    its rest. Whole numbers must be equal; numbers of a time or a speed, seeds and line numbers may
    be any; a number below 1e-3 in exponent notation is an error, and may be ten times as large or
    small; other decimal numbers may differ by 2 % or two units of their last digit.
    """
    parts, lines = [[]], [" ".join(line.split()) for line in printed.strip().splitlines()]
    for line in expected.strip().splitlines():
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(" ".join(line.split()))

    def fits(part: list[str], start: int) -> bool:
        found = lines[start : start + len(part)]
        return len(found) == len(part) and all(
            same_line(e, p, numbers_vary) for e, p in zip(part, found)
        )

    if len(parts) == 1:
        return len(parts[0]) == len(lines) and fits(parts[0], 0)
    if not fits(parts[0], 0) or not fits(parts[-1], len(lines) - len(parts[-1])):
        return False
    start = len(parts[0])
    for part in parts[1:-1]:
        starts = [s for s in range(start, len(lines)) if fits(part, s)]
        if not starts:
            return False
        start = starts[0] + len(part)
    return start <= len(lines) - len(parts[-1])


def same_line(expected: str, printed: str, numbers_vary: bool) -> bool:
    if numbers_vary:
        expected, printed = (UNIT.sub(" s", line) for line in (expected, printed))
    open_end = expected.endswith("...")
    mine, theirs = NUMBER.split(expected.removesuffix("...")), NUMBER.split(printed)
    if open_end:
        if len(theirs) < len(mine) or not theirs[len(mine) - 1].startswith(mine[-1].rstrip()):
            return False
        theirs = [*theirs[: len(mine) - 1], mine[-1]]
    words = [[text.strip() for text in parts[::2]] for parts in (mine, theirs)]
    if len(mine) != len(theirs) or words[0] != words[1]:
        return False
    return numbers_vary or all(
        same_number(mine[i], theirs[i], mine[i - 1], mine[i + 1]) for i in range(1, len(mine), 2)
    )


def same_number(expected: str, printed: str, before: str, behind: str) -> bool:
    if expected == printed or before.endswith(DRAWN) or TIMED.match(behind):
        return True
    e, p = (float(text.replace(",", "")) for text in (expected, printed))
    if "." not in expected and "e" not in expected:
        return False
    if "e" in expected and abs(e) < 1e-3:
        return e * p > 0 and 0.1 <= e / p <= 10
    digits = len(expected.partition(".")[2].partition("e")[0])
    scale = 10 ** int(expected.partition("e")[2] or 0)
    return abs(e - p) <= max(0.02 * abs(e), 2 * 10**-digits * scale)

"""math-verify behind a limit: asked in a process of its own, which is ended when it takes long.

The limit holds on every platform and in every thread. No answer that is plainly expensive gets as
far as that process (`too_hard`).
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from importlib import util
from pathlib import Path

from .notation import MOST_CHARACTERS

LIMIT = 2.0  # seconds for one question
START_LIMIT = 60.0  # seconds until the process has loaded math-verify
MEMORY = 2 * 1024**3  # bytes of address space, where the platform can limit it
_POLL = 0.1
_MOST_DEPTH = 8
_BOOT = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)
_TOWER = re.compile(r"\^\{?[^}^]*\d{2,}[^}^]*\^|\^\{?[^}^]*\^\{?\d{2,}|\^[^^]*\^[^^]*\^")
_LARGE = re.compile(
    r"\^\{?-?\d{6,}|\d{4,}\)?!|!!|\)!|\\binom\{?\d{5,}|\\binom\{[^{}]*\}\{\d{5,}|\d{100,}"
    r"|\)\^\{?\d{3,}|\\(?:sum|prod|int)(?![a-zA-Z])"
)


def too_hard(form: str) -> bool:
    """Whether an answer may cost more than any answer is worth, by its looks alone.

    Long texts, deep brackets, towers of powers, large exponents, factorials, binomials and
    literals, sums and integrals.
    """
    if len(form) > MOST_CHARACTERS:
        return True
    depth = 0
    for letter in form:
        depth += (letter in "({[") - (letter in ")}]")
        if depth > _MOST_DEPTH:
            return True
    return bool(_TOWER.search(form) or _LARGE.search(form))


class Verifier:
    """One process, started at the first question, used again, started anew after a kill."""

    def __init__(self, limit: float = LIMIT):
        self.limit = limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue = queue.Queue()
        self._owner = 0
        self._cancelled = False

    def ask(self, *question: str):
        """The reply; None where it gave up or was cut at the limit.

        Raises InterruptedError where `cancel` cut it: nothing was found out.
        """
        with self._lock:
            if self._cancelled:
                raise InterruptedError("the comparison was cancelled")
            try:
                if not self._alive():
                    self._start()
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
                line = self._line(self.limit)
            except OSError as error:
                self.close()
                if isinstance(error, InterruptedError):
                    raise
                return None
            except BaseException:
                self.close()  # a reply to come would be taken for the next question's
                raise
            if not line:
                self.close()
                return None
            return json.loads(line)

    def cancel(self, cancelled: bool = True) -> None:
        """Let questions fail at once, the present one too; False: take them again."""
        self._cancelled = cancelled

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            process.stdin.close()

    def _alive(self) -> bool:
        # A forked child must not read the replies of its parent's process.
        mine = self._process is not None and self._owner == os.getpid()
        return mine and self._process.poll() is None

    def _start(self) -> None:
        self.close()
        script = str(Path(__file__).with_name("verify_worker.py"))
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), script]
        self._process = subprocess.Popen(
            [*command, str(self.limit), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",  # JSON escapes the rest
            start_new_session=os.name == "posix",  # Ctrl-C is the parent's alone
        )
        self._owner = os.getpid()
        self._lines = queue.Queue()
        reader = threading.Thread(
            target=_pass_on, args=(self._process.stdout, self._lines), daemon=True
        )
        reader.start()
        if self._line(START_LIMIT) != "ready\n":
            raise OSError("the process of math-verify did not start")

    def _line(self, limit: float) -> str:
        """The next line; "" where the process ended or the limit passed."""
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0:
            if self._cancelled:
                raise InterruptedError("the comparison was cancelled")
            try:
                return self._lines.get(timeout=min(left, _POLL))
            except queue.Empty:
                pass
        return ""


def _pass_on(stream, lines: queue.Queue) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def installed() -> bool:
    try:
        return util.find_spec("math_verify") is not None
    except ValueError:  # a module put into sys.modules without a specification
        return False


VERIFIER = Verifier()
atexit.register(VERIFIER.close)

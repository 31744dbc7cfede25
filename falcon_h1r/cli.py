"""The command line: `falcon-h1r COMMAND`, the same as `python -m falcon_h1r COMMAND`.

Exit status: 0 done, 2 refused (one line on stderr), 130 ended by Ctrl-C, 141 the reader of stdout
left.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import COMMANDS

INTERRUPTED, BROKEN_PIPE = 130, 141


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, and takes no abbreviated options: scripts break when one is added."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{_error_line(message)}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = _Parser(prog="falcon-h1r", description="Falcon-H1 and Falcon-H1R models in PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for add_to in COMMANDS:
        add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (`--help` and bad options raise SystemExit)."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        print(_error_line(str(error)), file=sys.stderr)
        return 2


def _error_line(message: str) -> str:
    return f"falcon-h1r: error: {' '.join(message.split())}"

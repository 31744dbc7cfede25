"""The command line: `falcon-h1r COMMAND`, the same as `python -m falcon_h1r COMMAND`.

Exit status: 0 done, 2 refused (one line on stderr), 130 ended by Ctrl-C, 141 the reader of stdout
left; `parity`, `doctor` and `bench` have 1 for what they find.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED, BROKEN_PIPE = 130, 141


def build_parser():
    """The parser of all commands; each sets `run`, a function of the parsed arguments."""
    from . import __version__
    from .commands import COMMANDS
    from .commands.grammar import Parser

    parser = Parser(
        prog="falcon-h1r",
        description="Falcon-H1 and Falcon-H1R models in PyTorch.",
        epilog="falcon-h1r COMMAND --help lists a command's options; for example: falcon-h1r "
        'generate "What is 2+3?"',
    )
    parser.add_argument("--version", action="version", version=f"falcon-h1r {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for add_to in COMMANDS:
        add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (`--help` and bad options raise SystemExit)."""
    try:
        args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        # A terminal has shown ^C in the line that is being written.
        print(f"{chr(10) * sys.stderr.isatty()}falcon-h1r: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        from .commands.grammar import error_line

        print(error_line(str(error)), file=sys.stderr)
        return 2

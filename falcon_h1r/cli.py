"""The command line: `falcon-h1r COMMAND`, the same as `python -m falcon_h1r COMMAND`.

Exit status: 0 done, 2 refused (one line on stderr), 130 ended by Ctrl-C, 141 the reader of stdout
left; `parity`, `doctor` and `bench` have 1 for what they find.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys

TYPE_CHECKING = False  # Ctrl-C is heard once `main` runs: nothing slow is imported before
if TYPE_CHECKING:
    from collections.abc import Sequence

REFUSED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# How torch (on a GPU, on Linux, on Windows), C++, oneDNN, threads and the linker say it, in the
# first of many lines.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",
    "can't start new thread",
    "failed to map segment",
)


def build_parser():
    """The parser of all commands; each sets `run`, a function of the parsed arguments."""
    from .commands import COMMANDS
    from .commands.grammar import Parser

    parser = Parser(
        prog="falcon-h1r",
        description="Falcon-H1 and Falcon-H1R models in PyTorch.",
        epilog="falcon-h1r COMMAND --help lists a command's options; for example: falcon-h1r "
        'generate "What is 2+3?"',
    )
    version = sys.modules[__package__].__version__
    parser.add_argument("--version", action="version", version=f"falcon-h1r {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for add_to in COMMANDS:
        add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (`--help` and bad options raise SystemExit)."""
    before = None
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
            before = signal.signal(signal.SIGINT, _interrupt)
        _prepare_streams()
        args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(_interrupted_line(), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        named = error.strerror and error.filename is not None
        return _refuse(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:
        return _refuse(str(error))
    except (MemoryError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, MemoryError) or any(words in reason for words in OUT_OF_MEMORY):
            return _refuse(f"out of memory: {reason or 'Python could not have more'}")
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _refuse(message: str) -> int:
    from .commands.grammar import error_line

    print(error_line(message), file=sys.stderr)
    return REFUSED


def _prepare_streams() -> None:
    """The three streams of every command: closed ones, and what their encodings cannot say.

    What is piped in is UTF-8, whatever the locale. Bytes that are none arrive as lone surrogates,
    which the reader refuses with their place. Characters that stdout or stderr has no code for are
    written as backslash escapes, so that nothing that was computed is lost.
    """
    if sys.stderr is None:
        sys.stderr = io.StringIO()  # print would write to stdout
    if sys.stdout is None:
        raise ValueError("stdout is closed")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        encoding = sys.stdin.encoding if sys.stdin.isatty() else "utf-8"
        with contextlib.suppress(io.UnsupportedOperation):  # a caller has read from it
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _interrupt(signum, frame):
    """Ctrl-C. In an import it ends the program here: packages catch the exception, and go on."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{_interrupted_line()}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupted_line() -> str:
    # A terminal has shown ^C in the line that is being written.
    return ("\n" if sys.stderr.isatty() else "") + "falcon-h1r: interrupted"

"""The prompt of a command: where it is read from, and how it is rendered."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from typing import TYPE_CHECKING

from ..checks import check_text

if TYPE_CHECKING:
    from ..text import Tokenizer


MOST_BYTES = 2**26  # of a prompt that is read: a source without an end is refused


def add_prompt_options(parser, name: str = "prompt", example: bool = False) -> None:
    """The prompt: an argument called `name`, -p, -f, or stdin, which `read_prompt` reads.

    example: the command has a prompt of its own for when there is none.
    """
    parser.prompt = name
    none = "read what is piped in" + (", else take an example" if example else "")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        name,
        nargs="?",
        help=f"the {name}, in quotes; '-': read stdin; none: {none}. One line end is dropped at "
        "the end of what is read",
    )
    group.add_argument(
        "-p", "--prompt", dest="prompt_text", metavar="TEXT", help=f"the same as {name}"
    )
    group.add_argument(
        "-f", "--prompt-file", metavar="FILE", help=f"read the {name} from a file; '-': from stdin"
    )
    parser.add_argument(
        "--raw", action="store_true", help="no chat template: continue the text itself"
    )


def has_prompt(args: argparse.Namespace, name: str = "prompt") -> bool:
    """Whether the command line gives a prompt or says where to read one."""
    return any(getattr(args, key) is not None for key in (name, "prompt_text", "prompt_file"))


def read_prompt(args: argparse.Namespace, name: str = "prompt", example: str | None = None) -> str:
    """The prompt of `add_prompt_options`; ValueError where there is none or it is blank.

    example: taken where none is given and nothing is piped in.
    """
    text = getattr(args, name)
    text = args.prompt_text if text is None else text
    if args.prompt_file not in (None, "-"):
        text, place = _read_file(args.prompt_file), args.prompt_file
    elif text in (None, "-"):
        if not has_prompt(args, name):
            if example is not None and not _is_piped():
                return example
            if sys.stdin is None or sys.stdin.isatty():
                raise ValueError(f"no {name}: give it as an argument, in a file with -f, or piped")
        text, place = _read_stdin(), "stdin"
    else:
        place = f"the {name}"
    if not text.strip():
        raise ValueError(f"{place} is empty" + (f": no {name}" if place == "stdin" else ""))
    check_text(place, text)
    return text


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file: neither a terminal nor a device such as /dev/null."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError):  # a stand-in for a file
        return True


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("stdin is closed")
    return _read_text("stdin", getattr(sys.stdin, "buffer", sys.stdin))


def _read_file(path: str) -> str:
    with open(path, "rb") as file:
        return _read_text(path, file)


def _read_text(place: str, file) -> str:
    """UTF-8 with any line ends, without the last; ValueError names the first byte that is none."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{place} holds more than {MOST_BYTES} bytes, the most that is read")
    # A stand-in for stdin may give text.
    text = content.decode("utf-8", "surrogateescape") if isinstance(content, bytes) else content
    check_text(place, text)
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def check_system(args: argparse.Namespace) -> None:
    if args.system is not None:
        check_text("--system", args.system)
        if args.raw:
            raise ValueError("--system: not with --raw, which has no chat template")


def render(
    tokenizer: Tokenizer, text: str, raw: bool, system: str | None = None
) -> tuple[str, list[int]]:
    """A prompt as the model reads it, and its ids: through the chat template where there is one."""
    if raw or not tokenizer.chat_templates:
        if system is not None:
            raise ValueError("--system: this checkpoint has no chat template")
        return text, tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    rendered = tokenizer.apply_chat_template(messages)
    return rendered, tokenizer.encode(rendered, add_special_tokens=False)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model inside a think block."""
    from ..text.think import OPEN

    return prompt.rstrip().endswith(OPEN)

"""The parser of the command line: refusals in one line with a hint, lists, typing errors."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Sequence

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)$", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated options: scripts break when an option with the same start is added.

    prompt: the attribute of the positional argument that is a text, for the hint to quote it.
    """

    prompt: str | None = None

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self._lists: dict[str, re.Pattern] = {}

    def add_list(self, *names: str, form: str, item: Callable, metavar: str, help: str) -> None:
        """An option with one or several values: `--layers 0,3`, or `--layers 0 3`.

        form: a regular expression of one value. A word of another form is not part of the list,
        so that a prompt can follow it. item: str -> a value; ValueError where it is none.
        """
        self._lists |= dict.fromkeys(names, re.compile(f"(?:{form})(?:,(?:{form}))*"))

        def values(text: str) -> list:
            return [_value(item, part) for part in text.split(",")]

        metavar = f"{metavar}[,{metavar}...]"
        self.add_argument(*names, action="extend", type=values, metavar=metavar, help=help)

    def parse_known_args(self, args=None, namespace=None):
        if args is not None:
            self._refuse_unknown(args)
            args = self._join_lists(args)
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._too_much(namespace, rest))
        return namespace, rest

    def error(self, message: str):
        if found := _CHOICE.search(message):
            message += self._hint_of_choice(*found.groups())
        elif message.endswith("expected one argument"):
            message += '; a text that begins with "-" goes behind "=", as in --prompt="-1"'
        elif self.prompt and f"argument {self.prompt}: not allowed with" in message:
            message += "; quote a text of several words"
        self.exit(2, f"{error_line(message)}\n")

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Unknown options, before argparse asks for options that are missing."""
        known = self._option_string_actions
        before = None
        for word in args:
            before, last = word, before
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # the rest is text, or another parser's
            if not word.startswith("-") or word == "-" or " " in word or _NUMBER.fullmatch(word):
                continue
            if last in known and known[last].nargs is None:
                continue  # in place of the value of an option: argparse says so
            name = word.partition("=")[0]
            if name in known or (not name.startswith("--") and name[:2] in known):
                continue
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"{self.prog} --help lists the options"
            if self._subparsers is not None and not near:
                hint = f"options stand behind a command; {self.prog} --help lists the commands"
            self.error(f"unknown option {name}; {hint}")

    def _join_lists(self, args: Sequence[str]) -> list[str]:
        """`--layers 0 3 TEXT` as `--layers 0,3 TEXT`."""
        joined: list[str] = []
        form = None  # of the list whose words are being read
        for number, word in enumerate(args):
            if word == "--":
                return [*joined, *args[number:]]
            if form is not None and form.fullmatch(word) and joined[-1] not in self._lists:
                joined[-1] += f",{word}"
                continue
            if form is None or not form.fullmatch(word):
                form = self._lists.get(word)
            joined.append(word)
        return joined

    def _too_much(self, namespace: argparse.Namespace, rest: list[str]) -> str:
        words = " ".join(rest)
        if self.prompt is None:
            return f"unrecognized arguments: {words}"
        text = " ".join([getattr(namespace, self.prompt) or "", *rest]).strip()
        return f"unrecognized arguments: {words}; quote the text: {self.prog} {_quoted(text)}"

    def _hint_of_choice(self, word: str, choices: str) -> str:
        if near := nearest(word, [choice.strip("'") for choice in choices.split(", ")]):
            return f"; did you mean {near}?"
        if self._subparsers is not None and " " in word:
            return f"; a prompt stands behind a command: {self.prog} generate {_quoted(word)}"
        return ""


def error_line(message: str) -> str:
    return f"falcon-h1r: error: {' '.join(message.split())}"


def _value(item: Callable, text: str):
    try:
        return item(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant: one that goes on as this one, or a similar one."""
    known = list(known)
    longer = [name for name in known if len(word) > 2 and name.startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def _quoted(text: str) -> str:
    """For a shell, in double quotes where those do."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'

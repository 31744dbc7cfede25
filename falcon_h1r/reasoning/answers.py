"""Answers of traces: read out of a text, compared, put into classes, voted on.

An answer is a string. Two rules say whether two answers are the same:

exact        both have one normal form (`normal_form`): the same notation, nothing computed
math-verify  Hugging Face's package of that name (extra `reasoning`) finds the values equal; asked
             only where `exact` says no and does not know better (numbers, words: `_plain`)

Which of the two decided is returned with every comparison and written into every record.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from ..checks import check_number

_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_RATIO = re.compile(r"[-+]?\d+(?:\.\d+|/\d+)?|[-+]?\.\d+")
# Longer than any answer; int() itself refuses thousands of digits.
_MOST_DIGITS = 200


@lru_cache(maxsize=4096)
def normal_form(answer: str) -> str:
    r"""The notation that stands for an answer under the exact rule.

    Dropped: math delimiters (`$`, `\(`, `\[`), `\left` and `\right`, `\!`, `\displaystyle`, a final
    full stop, `\text{...}` and the like around their content, a backslash before `%`, spaces beside
    operators, brackets and commas (a comma is followed by one space). `\dfrac` and `\tfrac` are
    `\frac`, with braces around single-digit arguments; Unicode's minus is `-`. Runs of space become
    one.
    A whole number, a decimal, `a/b` and `\frac{a}{b}` of whole numbers become a reduced fraction:
    `0.50`, `1/2` and `\frac{2}{4}` are `1/2`, and `1,000` is `1000`, but `1, 000` a list.
    Letters keep their case; `50%` is not `50` and not `1/2`.
    """
    while True:
        form = _normalised(answer)
        if form == answer:
            return form
        answer = form


def _normalised(answer: str) -> str:
    text = answer.replace("\u2212", "-").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[()\[\]!]|(?<!\\)\$", "", text)
    text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = " ".join(_SPACE.sub(" ", text).split()).replace(" %", "%")
    text = text[:-1].rstrip() if text.endswith(".") else text
    number = _as_number(text)
    if number is not None:
        return str(number)
    text = re.sub(r"\s*([-+*/=<>^_(){}\[\]|])\s*", r"\1", text)
    text = re.sub(r"\s*,\s*", ", ", text).strip()
    number = _FRACTION.fullmatch(text) and _as_number(text)
    return text if number is None else str(number)


def _as_number(text: str) -> Fraction | None:
    if len(text) > _MOST_DIGITS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if match := _FRACTION.fullmatch(re.sub(r"\s*([{}])\s*", r"\1", text)):
        sign, top, bottom = match.groups()
        if int(bottom) == 0:
            return None
        return Fraction(int(top), int(bottom)) * (-1 if sign == "-" else 1)
    if not _RATIO.fullmatch(text) or re.search(r"/0+$", text):
        return None
    return Fraction(text)


def _plain(form: str) -> bool:
    """Whether the exact rule knows all there is to know of an answer: numbers and words.

    math-verify reads a word as a product of its letters: `stop` would equal `pots`.
    """
    number = re.fullmatch(r"-?\d+(/\d+)?", form)
    words = re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", form)
    return bool(number or words)


def _unfit(form: str) -> bool:
    """Whether math-verify is never asked about an answer.

    It takes `50%` for both `50` and `0.5`, which would make those two the same; and what is very
    long is no answer.
    """
    return "%" in form or len(form) > _MOST_DIGITS


class Verdict(NamedTuple):
    """equal, and the rule that decided: `exact`, or `math-verify` with its version."""

    equal: bool
    rule: str


class Equality:
    """Whether two answers are the same, by a named rule.

    rule: `exact`; `math-verify`, which must then be installed; `auto`: math-verify where it is
        installed. A rule with a version, as a record holds it, is taken without the version.
    `rule` of the object names what is used, with the version, and never `auto`.

    math-verify may take 5 s for one comparison, then the exact rule's verdict stands (in the main
    thread only: elsewhere Python has no alarm, and it may take as long as it likes).
    """

    def __init__(self, rule: str = "auto"):
        name = rule.split(" ")[0]
        if name not in ("auto", "exact", "math-verify"):
            raise ValueError(f"rule {rule!r}: known are auto, exact and math-verify")
        self._verify = None if name == "exact" else _math_verify()
        if name == "math-verify" and self._verify is None:
            raise ValueError(
                "rule 'math-verify': the package is not installed "
                "(pip install 'falcon-h1r[reasoning]'); 'exact' needs none"
            )
        self.rule = "exact" if self._verify is None else f"math-verify {_math_verify_version()}"
        self._known: dict[tuple[str, str], Verdict] = {}

    def compare(self, a: str, b: str) -> Verdict:
        """Symmetric: math-verify is asked in both directions, one yes is enough."""
        first, second = sorted((normal_form(a), normal_form(b)))
        if first == second:
            return Verdict(True, "exact")
        known = (_plain(first) and _plain(second)) or _unfit(first) or _unfit(second)
        if self._verify is None or known:
            return Verdict(False, "exact")
        if (first, second) not in self._known:
            equal = self._verify(first, second)
            verdict = Verdict(False, "exact") if equal is None else Verdict(equal, self.rule)
            self._known[first, second] = verdict
        return self._known[first, second]

    def same(self, a: str, b: str) -> bool:
        return self.compare(a, b).equal


def _math_verify_version() -> str:
    from importlib.metadata import version

    return version("math-verify")


def _math_verify() -> Callable[[str, str], bool | None] | None:
    """Asks math-verify; None in place of an answer where it gave up. None if not installed."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        return None

    # As LatexExtractionConfig only: the other way of reading evaluates its input as Python.
    reading = {
        "extraction_config": [LatexExtractionConfig()],
        "fallback_mode": "no_fallback",
        "raise_on_error": True,
    }

    def ask(a: str, b: str) -> bool | None:
        main = threading.current_thread() is threading.main_thread()
        limit = 5 if main else None
        try:
            first, second = (
                parse(f"\\boxed{{{text}}}", parsing_timeout=limit, **reading) for text in (a, b)
            )
            options = {"timeout_seconds": limit, "raise_on_error": True}
            return verify(first, second, **options) or verify(second, first, **options)
        except Exception:  # sympy raises whatever it likes on what a model may write
            return None

    return ask


class Classes:
    """Answers put into classes as they come: the same classes in whatever order they come.

    A class is all that is linked by equal pairs: math-verify's relation is not transitive (`5 cm`
    is `5` and so is `5 m`), and its closure is the one partition that does not depend on the order.
    """

    def __init__(self, equality: Equality):
        self.equality = equality
        self.rules: set[str] = set()  # that decided a pair to be equal
        self._parent: dict[str, str] = {}

    def add(self, answer: str) -> None:
        form = normal_form(answer)
        if form in self._parent:
            return
        self._parent[form] = form
        for other in list(self._parent):
            if self.find(other) != self.find(form):
                verdict = self.equality.compare(form, other)
                if verdict.equal:
                    self._parent[self.find(form)] = self.find(other)
                    self.rules.add(verdict.rule)

    def find(self, answer: str) -> str:
        """The form that stands for the class of an answer that was added."""
        form = normal_form(answer)
        while self._parent[form] != form:
            form = self._parent[form]
        return form


def group(answers: Sequence[str | None], equality: Equality | None = None) -> list[int | None]:
    """The class of every answer, numbered by first appearance; None for no answer."""
    classes = Classes(equality or Equality())
    for answer in answers:
        if answer is not None:
            classes.add(answer)
    numbers: dict[str, int] = {}
    return [
        None if a is None else numbers.setdefault(classes.find(a), len(numbers)) for a in answers
    ]


class Candidate(NamedTuple):
    """One class of answers in a vote. traces: numbers of its voters, ascending."""

    answer: str  # as the first of its voters wrote it
    weight: float
    traces: tuple[int, ...]


class Vote(NamedTuple):
    """candidates: best first. share: the winner's part of all weight. rule: of `Equality`."""

    answer: str | None
    share: float
    candidates: tuple[Candidate, ...]
    rule: str


def vote(
    ballots: Iterable[tuple[int, str | None, float]],
    equality: Equality | None = None,
    classes: Classes | None = None,
) -> Vote:
    """Weighted vote over (trace number, answer, weight); an answer of None is no ballot.

    The class with the largest sum of weights wins; among equal sums the one with more voters; then
    the one with the trace of the lowest number. Sums are rounded once, so nothing depends on the
    order. classes: to reuse comparisons between votes over a growing set.

    Raises ValueError for a weight that is negative or not finite. No ballots: answer None, share 0.
    """
    classes = Classes(equality or Equality()) if classes is None else classes
    cast = sorted((number, a, weight) for number, a, weight in ballots if a is not None)
    members: dict[str, list[tuple[int, str, float]]] = {}
    for number, answer, weight in cast:
        check_number(f"trace {number}: weight", weight, 0)
        classes.add(answer)
    for ballot in cast:
        members.setdefault(classes.find(ballot[1]), []).append(ballot)
    candidates = [
        Candidate(own[0][1], math.fsum(w for _, _, w in own), tuple(n for n, _, _ in own))
        for own in members.values()
    ]
    candidates.sort(key=lambda c: (-c.weight, -len(c.traces), c.traces[0]))
    total = math.fsum(weight for _, _, weight in cast)
    if not candidates:
        return Vote(None, 0.0, (), classes.equality.rule)
    share = candidates[0].weight / total if total > 0 else 0.0
    return Vote(candidates[0].answer, share, tuple(candidates), classes.equality.rule)

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
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..checks import check_number, shown
from .notation import normal_form
from .verifier import VERIFIER, installed, too_hard

# Letters with which math-verify does nothing right: it drops units, so `5 cm` were `5 m`.
_MEASURE = re.compile(r"\d (?:[A-Za-z\u00b5\u03bc\u00b0]|[^\x00-\x7f])")
_NOT_MATHS = re.compile(r"[%:]|\d_|\d+[-/.]\d+[-/.]\d+|[^\x00-\x7f]|\u00b0")
_NAMED = re.compile(r"([a-zA-Z](?:_[a-zA-Z0-9])?)=([^=<>]+)")


def _plain(form: str) -> bool:
    """Whether the exact rule knows all there is to know of an answer: numbers and words.

    math-verify reads a word as a product of its letters: `stop` would equal `pots`.
    """
    number = re.fullmatch(r"-?\d+(/\d+)?", form)
    words = re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", form)
    return bool(number or words)


@lru_cache(maxsize=4096)
def _unfit(form: str) -> bool:
    """Whether math-verify is never asked about an answer: the exact rule's verdict stands.

    It takes `50%` for both `50` and `0.5`, drops units and the bases of numbers, and reads times,
    ratios and dates as quotients and differences.
    """
    return bool(_NOT_MATHS.search(form) or _MEASURE.search(form)) or too_hard(form)


def _differ(a: str, b: str) -> bool:
    """Whether two forms differ in a way that math-verify does not see.

    A list in brackets is ordered, and one without is not; a letter is not its capital.
    """
    lists = ["," in form and form[0] in "([" for form in (a, b)]
    sets = ["," in re.sub(r"[(\[][^()\[\]]*[)\]]", "", form) for form in (a, b)]
    if (lists[0] and sets[1]) or (lists[1] and sets[0]):
        return True
    first, second = (set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", f))) for f in (a, b))
    return first != second and {x.lower() for x in first} == {x.lower() for x in second}


class Verdict(NamedTuple):
    """equal, and the rule that decided: `exact`, or `math-verify` with its version."""

    equal: bool
    rule: str


class Equality:
    """Whether two answers are the same, by a named rule.

    rule: `exact`; `math-verify`, which must then be installed; `auto`: math-verify where it is
        installed. A rule with a version, as a record holds it, is taken without the version.
    `rule` of the object names what is used, with the version, and never `auto`.

    math-verify may take `verifier.LIMIT` seconds for one question, in whatever thread and on every
    platform; then the exact rule's verdict stands, and is remembered.
    """

    def __init__(self, rule: str = "auto"):
        name = rule.split(" ")[0]
        if name not in ("auto", "exact", "math-verify"):
            raise ValueError(f"rule {shown(rule)}: known are auto, exact and math-verify")
        self._verifies = name != "exact" and installed()
        if name == "math-verify" and not self._verifies:
            raise ValueError(
                "rule 'math-verify': the package is not installed "
                "(pip install 'falcon-h1r[reasoning]'); 'exact' needs none"
            )
        self.rule = f"math-verify {_math_verify_version()}" if self._verifies else "exact"
        self._known: dict[tuple[str, str], Verdict] = {}
        self._prints: dict[str, list | None] = {}
        self._failures: Counter[str] = Counter()

    def compare(self, a: str, b: str) -> Verdict:
        """Symmetric: math-verify is asked in both directions, one yes is enough."""
        first, second = sorted((normal_form(a), normal_form(b)))
        if first == second:
            return Verdict(True, "exact")
        names = [_NAMED.fullmatch(form) for form in (first, second)]
        if all(names) and names[0][1] != names[1][1]:
            return Verdict(False, "exact")
        if any(names):  # `x=5` is `5`, and `x=5` is `x=10/2`
            first, second = (
                normal_form(name[2]) if name else form for name, form in zip(names, (first, second))
            )
            if first == second:
                return Verdict(True, "exact")
            first, second = sorted((first, second))
        plain = _plain(first) and _plain(second)
        if not self._verifies or plain or _unfit(first) or _unfit(second):
            return Verdict(False, "exact")
        if (first, second) not in self._known:
            try:
                verdict = self._asked(first, second)
            except InterruptedError:
                return Verdict(False, "exact")
            self._known[first, second] = verdict
        return self._known[first, second]

    def same(self, a: str, b: str) -> bool:
        return self.compare(a, b).equal

    def _asked(self, first: str, second: str) -> Verdict:
        if _differ(first, second):
            return Verdict(False, "exact")
        one, other = self._print(first), self._print(second)
        gave_up = Verdict(False, "exact")
        if (
            one is None
            or other is None
            or _SAME_FAILURES
            in (
                self._failures[first],
                self._failures[second],
            )
        ):
            return gave_up
        kinds = {one[0], other[0]}
        if kinds == {"number"}:
            return Verdict(one == other, self.rule)
        if "other" not in kinds and one != other:
            return Verdict(False, self.rule)
        equal = VERIFIER.ask("equal", first, second)
        if equal is None:
            self._failures.update((first, second))
            return gave_up
        return Verdict(bool(equal), self.rule)

    def _print(self, form: str) -> list | None:
        """Kind and value to 30 digits (of an expression: at one point); None: cannot be read."""
        if form not in self._prints:
            self._prints[form] = VERIFIER.ask("print", form)
        return self._prints[form]


# So many questions about one answer may fail; none is asked after.
_SAME_FAILURES = 3


def _math_verify_version() -> str:
    from importlib.metadata import version

    return version("math-verify")


class Classes:
    """Answers put into classes as they come: the same classes in whatever order they come.

    Every class has a representative, and holds only what equals it. Answers are taken shortest
    first, then by the alphabet, each into the first class whose representative it equals. So two
    answers that equal no common third are never in one class, though equality is not transitive.
    """

    def __init__(self, equality: Equality):
        self.equality = equality
        self.rules: set[str] = set()  # that decided a pair to be equal
        self._heads: dict[str, str] = {}

    def add(self, answer: str) -> None:
        form = normal_form(answer)
        if form in self._heads:
            return
        linked = any(self.equality.compare(form, other).equal for other in self._heads)
        self._heads[form] = form
        if linked:
            self._assign()

    def _assign(self) -> None:
        self.rules.clear()
        heads: list[str] = []
        for form in sorted(self._heads, key=lambda form: (len(form), form)):
            self._heads[form] = form
            for head in heads:
                verdict = self.equality.compare(form, head)
                if verdict.equal:
                    self._heads[form] = head
                    self.rules.add(verdict.rule)
                    break
            else:
                heads.append(form)

    def find(self, answer: str) -> str:
        """The form that stands for the class of an answer that was added."""
        return self._heads[normal_form(answer)]


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

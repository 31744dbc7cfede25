"""The arithmetic task of h1r-pico: problems by level, worked traces, the held-out split, a grader.

A problem is a line of whole-number arithmetic whose running total stays at 0 or above, asked in a
chat:

    What is 47+25-8*3?

The trace is a running tally, one term a line. Its numbers are written units first, the order in
which one adds by hand, so that a carry always goes to the digit that comes next; the answer is
written the usual way round:

    <think>
    74              47
    +52=27          47 + 25 = 72
    -8*3:42=84      8 * 3 = 24, 72 - 24 = 48
    </think>

    \\boxed{48}

Everything is a pure function of the `random.Random` that it is given. Whether a problem is held out
is decided by a hash of its text, so the two sides can never meet, whatever the seed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from hashlib import blake2b

HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Level:
    """Ranges (both ends included) that the problems of one level are drawn from."""

    terms: tuple[int, int]
    digits: tuple[int, int]
    product_share: float = 0.0  # chance that a term is a product with a one-digit factor, 2..9
    factor_digits: tuple[int, int] = (1, 1)  # digits of that product's other factor
    long_products: int = 0  # exactly as many terms are products with a factor 11..99
    long_factor_digits: tuple[int, int] = (2, 2)  # digits of that product's other factor


LEVELS: dict[str, Level] = {
    "easy": Level(terms=(2, 3), digits=(1, 2)),
    "medium": Level(terms=(4, 5), digits=(1, 2)),
    "product": Level(terms=(2, 4), digits=(1, 2), product_share=0.4, factor_digits=(1, 2)),
    "large": Level(terms=(2, 4), digits=(2, 3)),
    "long": Level(terms=(6, 8), digits=(1, 2), product_share=0.15),
    "hard": Level(terms=(5, 8), digits=(1, 3), product_share=0.3, factor_digits=(1, 3)),
    "cross": Level(terms=(2, 3), digits=(1, 2), long_products=1),
    "deep": Level(terms=(4, 6), digits=(1, 3), long_products=2),
    "far": Level(terms=(2, 3), digits=(2, 3), long_products=1, long_factor_digits=(3, 3)),
}


@dataclass(frozen=True)
class Problem:
    """One problem and its worked solution."""

    prompt: str  # the user's message
    answer: int
    trace: str  # what stands between the lines <think> and </think>
    level: str
    expression: str  # the canonical text, for instance 47+25-8*3: what the held-out split hashes

    @property
    def completion(self) -> str:
        """What a perfect assistant writes, up to and including the end of its turn."""
        return f"<think>\n{self.trace}\n</think>\n\n\\boxed{{{self.answer}}}<|im_end|>"


def _number(rng: random.Random, digits: tuple[int, int]) -> int:
    n = rng.randint(*digits)
    return rng.randint(10 ** (n - 1), 10**n - 1)


def _term(rng: random.Random, level: Level, long_product: bool) -> tuple[int, int | None]:
    """(factor, other factor) of a product, or (number, None)."""
    if long_product:
        return _number(rng, level.long_factor_digits), rng.randint(11, 99)
    if rng.random() < level.product_share:
        return _number(rng, level.factor_digits), rng.randint(2, 9)
    return _number(rng, level.digits), None


def units_first(number: int) -> str:
    """The digits of a non-negative number from the units up: 472 -> "274"."""
    return str(number)[::-1]


def make_problem(rng: random.Random, level: str) -> Problem:
    """Draw a problem of a level, from either side of the split.

    A minus is chosen half of the time where it keeps the running total at 0 or above. Raises
    ValueError for a level that is not in `LEVELS`.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; accepted: {', '.join(LEVELS)}")
    spec = LEVELS[level]
    expression, lines, total = "", [], 0
    terms = rng.randint(*spec.terms)
    long_products = rng.sample(range(terms), spec.long_products)
    for index in range(terms):
        factor, other = _term(rng, spec, index in long_products)
        value = factor if other is None else factor * other
        sign = "" if index == 0 else "-" if value <= total and rng.random() < 0.5 else "+"
        total += -value if sign == "-" else value
        written, line = str(factor), sign + units_first(factor)
        if other is not None:
            written += f"*{other}"
            line += f"*{units_first(other)}:{units_first(value)}"
        expression += sign + written
        lines.append(line if index == 0 else f"{line}={units_first(total)}")
    return Problem(f"What is {expression}?", total, "\n".join(lines), level, expression)


def is_held_out(problem: Problem) -> bool:
    """Whether the problem is for evaluation only: a fixed one in `HELD_OUT_ONE_IN` of all."""
    digest = blake2b(problem.expression.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def make_split_problem(rng: random.Random, level: str, held_out: bool) -> Problem:
    """Draw until a problem falls on the wanted side of the split."""
    while True:
        problem = make_problem(rng, level)
        if is_held_out(problem) == held_out:
            return problem


def held_out_problems(level: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` different held-out problems of a level, the same ones for the same seed."""
    rng = random.Random(f"h1r-pico {level} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_split_problem(rng, level, held_out=True)
        problems.setdefault(problem.expression, problem)
    return list(problems.values())


_BOXED = re.compile(r"\\boxed\{(-?[0-9]+)\}")


def grade(text: str, problem: Problem) -> bool:
    """Whether a completion answers the problem.

    The thinking must have been closed, and the last `\\boxed{...}` after it must hold the answer as
    a whole number in ordinary digits. The trace itself is not judged.
    """
    _, closed, answer = text.rpartition("</think>")
    found = _BOXED.findall(answer)
    return bool(closed and found) and int(found[-1]) == problem.answer

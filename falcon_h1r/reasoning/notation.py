r"""The exact rule: one notation for each answer, with nothing computed but numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

# Longer than any answer; int() itself refuses thousands of digits.
MOST_CHARACTERS = 200
_MOST_EXPONENT = 200

_WRAPPER = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|boxed|fbox|"
    r"boldsymbol|bm)(?![a-zA-Z])\s*\{|\\.|[{}]",
    re.DOTALL,
)
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s")
_THIN = re.compile(r"(?<=\d)(?:\\,|\u2009|\u202f|\u00a0|')(?=\d{3}(?!\d))")
_SIGNS = {0x2212: "-", 0xFE63: "-", 0x2013: "-", 0x3000: " ", 0x3002: ".", 0x03C0: r"\pi "}
_SIGNS |= {0x00D7: r"\times ", 0x22C5: r"\cdot ", 0x00B7: r"\cdot ", 0x2264: r"\le "}
_SIGNS |= {0x2265: r"\ge ", 0x221E: r"\infty ", 0x00B2: "^2", 0x00B3: "^3", 0x00BD: r"\frac{1}{2}"}
_SIGNS |= {0x00BC: r"\frac{1}{4}", 0x00BE: r"\frac{3}{4}"}
_SIGNS |= {0x03B8: r"\theta ", 0x03B1: r"\alpha ", 0x03B2: r"\beta ", 0x03BB: r"\lambda "}
_SIGNS |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_ARGUMENT = r"(?:\{([^{}]*)\}|\s*([0-9a-zA-Z]))"
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d+))?")
_RATIO = re.compile(r"[-+]?\d+/\d+")
_MIXED = re.compile(r"([-+]?)(\d+) ?(?:(?<= )(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})")
_THOUSANDS = re.compile(r"([-+]?\d{1,3})((?:,\d{3})+|(?: \d{3})+)(\.\d+)?")
_CONTINENTAL = re.compile(r"[-+]?\d{1,3}(?:\.\d{3})+,\d+")
_REPEATING = re.compile(
    r"([-+]?)(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\\overline(\d)|\\dot\{(\d)\}|\((\d+)\))"
)
_POWER_OF_TEN = re.compile(
    r"([-+]?\d+(?:\.\d+)?) ?(?:\\times|\\cdot|\*) ?10\^(?:\{([-+]?\d+)\}|(\d))"
)
_MEASURE = re.compile(r"([-+]?[\d.,:/ ]*\d) ?([A-Za-z\u00b5\u03bc\u00b0].*)")
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
_ANY_CASE = {"yes", "no", "true", "false", "none"}
_UNITS = frozenset(
    "cm mm km nm kg mg ml dl cl kl ft in yd mi lb lbs oz hz kw mw kj ev pa kpa mol am pm "
    "min sec hr hrs hours minutes seconds days weeks months years meters metres miles feet inches "
    "dollars cents degrees grams liters litres square cubic units mph kph usd eur rad deg".split()
)


@lru_cache(maxsize=4096)
def normal_form(answer: str) -> str:
    r"""The notation that stands for an answer under the exact rule.

    Dropped: math delimiters (`$`, `\(`, `\[`), `\left` and `\right`, `\!`, `\displaystyle`, a final
    full stop, `\text{...}`, `\boxed{...}` and the like around their content, braces, `**` or
    a pair of parentheses around a whole letter or number, a backslash before `%` and `$`, degrees
    (`30°` is `30`), spaces beside operators, brackets and commas (a comma is followed by one
    space). `\dfrac`, `\tfrac` and `\cfrac` are `\frac`; `\frac` and `\sqrt` have braces, `^` and
    `_` none around a single character. Unicode's signs and wide characters are TeX's and ASCII's.
    Runs of space become one.
    A whole number, a decimal, `1e5`, `3\times10^2`, `0.\overline{3}`, `1 1/2`, `a/b` and
    `\frac{a}{b}` of whole numbers become a reduced fraction, also before a unit: `0.50`, `1/2` and
    `\frac{2}{4}` are `1/2`; `1,000`, `1 000`, `1\,000` are `1000`, but `1, 000` a list.
    Letters keep their case, but for words (`Yes` is `yes`, `AM` behind a number `am`). `50%` is not
    `50` and not `1/2`. An answer of more than 2,000 characters keeps its notation inside.
    """
    answer = _unwrapped(answer.translate(_SIGNS)).strip()
    if len(answer) > 10 * MOST_CHARACTERS:
        return answer
    for _ in range(12):  # far more than notations nest; the bound is against what is no answer
        form = _normalised(answer)
        if form == answer:
            return form
        answer = form
    return answer


def _unwrapped(text: str) -> str:
    r"""Without `\text{` and its `}`: one pass, however deep they nest."""
    parts, opened, end = [], [], 0
    drop: list[tuple[int, int]] = []
    for match in _WRAPPER.finditer(text):
        token = match[0]
        if token == "}":
            if opened and (start := opened.pop()) is not None:
                drop += [start, match.span()]
        elif token == "{":
            opened.append(None)
        elif token[-1] == "{" and len(token) > 2:
            opened.append(match.span())
    for start, stop in sorted(drop):
        parts.append(text[end:start])
        end = stop
    return "".join([*parts, text[end:]])


def _normalised(answer: str) -> str:
    text = answer.translate(_SIGNS).replace("\\%", "%").replace("\\$", "").replace("{,}", ",")
    text = _unwrapped(_THIN.sub(",", text))
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[()\[\]!]|\$", "", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}", _fraction, text)
    text = re.sub(r"\\sqrt(\[\d+\])?\s*([0-9a-zA-Z])(?!\])", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\u221a\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_])\{([0-9a-zA-Z])\}", r"\1\2", text)
    text = re.sub(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", "°", text)
    text = " ".join(_SPACE.sub(" ", text).split()).replace(" %", "%").rstrip(" .")
    text = re.sub(r"^\*\*([^*]+)\*\*$", r"\1", text)
    text = re.sub(r"^\(([A-Za-z]|\d+)\)$|^([A-Z])\)$", r"\1\2", text)
    if re.fullmatch(r"\{[^{},]*\}", text):
        text = text[1:-1].strip()
    text = re.sub(r"(?<=\d) ?°$", "", text)
    text = re.sub(r"^0(?=\d:\d\d)", "", text)
    if (number := _as_number(text)) is not None:
        return str(number)
    match = _MEASURE.fullmatch(text)
    if match and (measure := _measure(match)):
        return measure
    text = re.sub(r"\s*([-+*/=<>^_(){}\[\]|])\s*", r"\1", text)
    text = re.sub(r"\s*,\s*", ", ", text).strip()
    if (number := _as_number(text)) is not None:
        return str(number)
    return " ".join(map(_word, text.split())) if _WORDS.fullmatch(text) else text


def _fraction(match: re.Match) -> str:
    top, bottom = (match[1] or match[2] or ""), (match[3] or match[4] or "")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _word(word: str) -> str:
    name = len(word) > 2 and word[0].isupper() and word[1:].islower()
    return word.lower() if name or word.lower() in _ANY_CASE else word


def _measure(match: re.Match) -> str | None:
    """A number and its unit: the number reduced, one space between. None for anything else."""
    before, unit = match.groups()
    day = re.fullmatch(r"([aApP])\.?[mM]\.?", unit)
    number = _as_number(before.strip())
    if number is None and not day:
        return None
    value = before.strip() if number is None else str(number)
    if day:
        return f"{value} {day[1].lower()}m"
    # `3ab` is a product; `3 ab` and `3kg` are measures.
    apart = match.string[match.end(1)] == " "
    if not re.fullmatch(r"[\w\u00b0\u00b5/^ .]+", unit) or not (apart or _is_unit(unit)):
        return None
    return f"{value} {unit}"


def _is_unit(text: str) -> bool:
    word = re.match(r"[A-Za-z]*", text)[0].lower()
    return word in _UNITS or text[:1] in "°µμ"


def _as_number(text: str) -> Fraction | None:
    if not text or len(text) > MOST_CHARACTERS:
        return None
    if _CONTINENTAL.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    if match := _THOUSANDS.fullmatch(text):
        text = match[1] + re.sub("[, ]", "", match[2]) + (match[3] or "")
    if match := _FRACTION.fullmatch(re.sub(r"\s*([{}])\s*", r"\1", text)):
        sign, top, bottom = match.groups()
        return _over(sign, int(top), int(bottom))
    if match := _MIXED.fullmatch(text):
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        return _over(match[1], int(match[2]) * bottom + top, bottom) if top < bottom else None
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, *repeated = match.groups()
        period = next(part for part in repeated if part)
        nines, scale = 10 ** len(period) - 1, 10 ** len(fixed)
        return _over(sign, int(whole + fixed or 0) * nines + int(period), nines * scale)
    if match := _POWER_OF_TEN.fullmatch(text):
        power = match[2] or match[3]
        return None if len(power) > 4 else _scaled(match[1], int(power))
    if _RATIO.fullmatch(text):
        return None if re.search(r"/0+$", text) else Fraction(text)
    match = _DECIMAL.fullmatch(text)
    if not match or (match[1] and len(match[1]) > 4):
        return None
    return _scaled(re.split("[eE]", text)[0], int(match[1] or 0))


def _over(sign: str, top: int, bottom: int) -> Fraction | None:
    return None if bottom == 0 else Fraction(-top if sign == "-" else top, bottom)


def _scaled(decimal: str, power: int) -> Fraction | None:
    if abs(power) > _MOST_EXPONENT:
        return None
    return Fraction(decimal.rstrip(".")) * Fraction(10) ** power

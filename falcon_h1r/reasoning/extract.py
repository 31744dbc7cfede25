r"""Answers read out of a text: the last box, number, choice or line.

An extractor takes a text and returns the answer as the text writes it, or None. One rule holds for
all: what is found is a whole answer, never a part of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..checks import shown

Extractor = Callable[[str], "str | None"]

_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_OF_ONE = re.compile(
    r"(?<!\\)\\boxed(?:\s+|(?=\d))([-+]?\d+(?:[.,]\d+)*|[A-Za-z](?![A-Za-z]))(?!\s*\{)"
)
_BOX_ALONE = re.compile(r"\\(?:boxed|fbox)\s*\{")

# Letters that belong to a word: `x2` and `1st` hold no number, `是12。` and `12个` do.
_LETTER = r"A-Za-z_\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u04ff"
_UNIT = r"(?:[A-Za-z\u00b5\u03bc\u00b0]{2,}|[mgslhtLKVWNJCF\u00b0])(?![A-Za-z0-9_])"
_ORDINAL = r"(?:st|nd|rd|th)(?![A-Za-z])"
_NUMBER = re.compile(
    rf"(?<![{_LETTER}\d.])(?<!\d/)[-+\u2212\u2013\uff0d]?"
    r"(?:[1-9]\d{0,2}(?:[ \u00a0\u2009\u202f]\d{3})+(?:[.,]\d+)?(?!\d)"
    r"|\d{1,3}(?:\.\d{3})+,\d+"
    r"|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+\u2212]?\d+)?(?:/\d+)?"
    rf"(?![\d/]|\.\d|,\d{{3}}(?!\d))(?!{_ORDINAL})(?=[^{_LETTER}\d]|$|{_UNIT})"
)
# Signs and digits of the full width of a Chinese character, one for one.
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# `:` and spaces of that width are in this table too, so the patterns below write them plainly.
_WIDE[0x3000] = 0x20

# Every repeat below has a limit, so that a text of nothing but spaces costs no more than another.
_OPENS = (
    r"(?:[(\[{*$_`\"'\u300c\u3010\u201c\s]"
    r"|\\(?:boxed|text|textbf|mathbf|mathrm|fbox)\s{0,3}\{|\\\(){0,9}"
)
_ENDS = r"(?![A-Za-z0-9_'\u2019])"
# `A` before a word is an article, and `I` a pronoun, unless the word gives a reason.
_REASON = r"because|since|as|and|or|which|with|by|for|due|is|was|but|so|from|given"
_NO_WORD = rf"(?!(?<=[AIa]) +(?!(?:{_REASON})\b)[a-z])(?!(?<=A) +[A-Z][a-z]+ +[a-z])"
_BARE = rf"([A-J]){_ENDS}{_NO_WORD}"
_SMALL = rf"([A-Ja-j]){_ENDS}(?!(?<=[a-j])[ \t]+[A-Za-z0-9]){_NO_WORD}"
_STATED = re.compile(
    r"(?:(?i:\banswer|\bcorrect (?:option|choice)|\bfinal (?:option|choice))"
    r"(?i:\s{1,3}(?:choice|option))?[*_]{0,3}\s{0,3}"
    r"(?:(?i:is|was|would be|must be|should be)\b|[:=])?[*_]{0,3}\s{0,3}:?"
    r"(?i:\s{0,3}(?:option|choice)\b)?"
    r"|\u7b54\u6848\s{0,3}(?:\u5e94\u4e3a|\u5e94\u8be5\u662f|\u662f|\u4e3a|\u9009)?\s{0,3}:?"
    r"|(?:\u6545|\u56e0\u6b64|\u6240\u4ee5|\u5e94|\u6b63\u786e)?\u9009(?:\u9879|\u62e9)?"
    r"\s{0,3}(?:\u662f|\u4e3a)?\s{0,3}:?"
    rf"|\\boxed\s{{0,3}}(?=\{{)){_OPENS}{_SMALL}"
)
_MARKED = [
    re.compile(rf"(?i:\b(?:option|choice)):?{_OPENS}{_SMALL}"),
    re.compile(r"[(\[]\s*([A-J])\s*[)\]]"),
    re.compile(r"\*\*\s*\(?([A-J])\)?[.:]?\s*\*\*"),
    re.compile(r"\\text(?:bf)?\{\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"^[ \t]*([A-J])[ \t]*[.)]?[ \t]*$", re.MULTILINE),
]
_ALONE = re.compile(rf"(?<![A-Za-z0-9_\\'\u2019]){_BARE}")
_SMALL_IN_BRACKETS = re.compile(r"\(\s*([a-j])\s*\)|^\s*([a-j])\s*[.)]?\s*$")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last whole `\boxed{...}` or `\fbox{...}`; None without one.

    Braces are matched; `\{` and `\}` are characters. A box inside another belongs to the outer one,
    whose whole content is returned; where the content is nothing but a box, that box's content. A
    box whose braces stay open does not count. `\boxed 5` holds a number or letter without braces.
    Blank content counts as no answer.
    """
    opened: list[int | None] = []  # of every open brace: where its box's content begins, or None
    best: tuple[int, int] | None = None
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token.endswith("{") and len(token) > 2:
            opened.append(match.end())
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened and (start := opened.pop()) is not None:
            # Boxes close inner first: one that closes later is either behind or around.
            best = (start, match.start())
    found = None if best is None else text[best[0] : best[1]].strip()
    for match in _BOX_OF_ONE.finditer(text):
        if best is None or match.start() > best[1]:
            found = match[1]
    while found and (inner := _BOX_ALONE.match(found)) and _closes_at_end(found, inner.end()):
        found = found[inner.end() : -1].strip()
    return found or None


def _closes_at_end(text: str, start: int) -> bool:
    depth = 1
    for match in _TOKENS.finditer(text, start):
        depth += match[0].endswith("{") and match[0] != "\\{"
        depth -= match[0] == "}"
        if depth == 0:
            return match.end() == len(text)
    return False


def last_number(text: str) -> str | None:
    r"""The last whole number, decimal, fraction or power of ten written with digits, as written.

    A sign, commas, points or spaces between groups of three digits, and an exponent (`1e5`) belong
    to the number. A unit behind the number does not; ordinals (`3rd`) and digits within a name
    (`x2`, `1x`) are no numbers.
    """
    found = [match.span() for match in _NUMBER.finditer(text.translate(_WIDE))]
    return text[found[-1][0] : found[-1][1]] if found else None


def last_choice(text: str) -> str | None:
    r"""The letter A to J that a text settles on, as a capital.

    The last of the strongest kind that occurs: a letter called the answer (`The answer is (C)`,
    `\boxed{C}`, `答案是C`); a letter called an option, in brackets, bold or alone on a line; a
    capital standing alone that is neither article nor pronoun; a small letter in parentheses.
    """
    plain = text.translate(_WIDE)
    for patterns in ([_STATED], _MARKED, [_ALONE], [_SMALL_IN_BRACKETS]):
        found = [(m.end(), m[m.lastindex]) for p in patterns for m in p.finditer(plain)]
        if found:
            return max(found)[1].upper()
    return None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


EXTRACTORS: dict[str, Extractor] = {
    "boxed": last_boxed,
    "number": last_number,
    "choice": last_choice,
    "line": last_line,
}


def make_extractor(spec: str) -> Extractor:
    """An extractor from its description.

    spec: names of `EXTRACTORS` with commas between, tried in that order until one finds something;
        or `re:PATTERN`: the last match of a regular expression, its first group where it has one.

    Raises ValueError for anything else.
    """
    if spec.startswith("re:"):
        try:
            pattern = re.compile(spec[3:], re.DOTALL)
        except re.error as error:
            raise ValueError(f"extractor {shown(spec)}: {error}") from error

        def by_pattern(text: str) -> str | None:
            found = [m[1] if pattern.groups else m[0] for m in pattern.finditer(text)]
            return (found[-1] or "").strip() or None if found else None

        return by_pattern
    names = spec.split(",")
    unknown = [name for name in names if name not in EXTRACTORS]
    if unknown:
        known = ", ".join(EXTRACTORS)
        raise ValueError(f"extractor {shown(unknown[0])}: known are {known} and re:PATTERN")

    def by_names(text: str) -> str | None:
        answers = (EXTRACTORS[name](text) for name in names)
        return next((answer for answer in answers if answer is not None), None)

    return by_names

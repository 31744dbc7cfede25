"""The process that runs math-verify: one question a line on its input, one reply a line.

A script without imports from the package: it starts in the time that math-verify takes to load.
Questions: `["print", form]` and `["equal", form, form]`; both may be replied to with null.
"""

import faulthandler
import json
import os
import signal
import sys
from functools import lru_cache

DIGITS = 30


def main(limit: float, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what math-verify prints is no reply
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):  # not on this platform
        pass
    import logging

    logging.disable(logging.CRITICAL)
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    # As LatexExtractionConfig only: the other way of reading evaluates its input as Python.
    reading = {
        "extraction_config": [LatexExtractionConfig()],
        "fallback_mode": "no_fallback",
        "raise_on_error": True,
        "parsing_timeout": None,
    }

    @lru_cache(maxsize=1024)
    def read(form: str):
        return parse(f"\\boxed{{{form}}}", **reading)

    def equal(a: str, b: str) -> bool:
        first, second = read(a), read(b)
        options = {"timeout_seconds": None, "raise_on_error": True}
        return verify(first, second, **options) or verify(second, first, **options)

    def fingerprint(form: str):
        found = read(form)
        value = found[0] if found else None
        if not isinstance(value, sympy.Expr):
            return ["other", None]
        # A decimal is exactly what it says.
        value = value.xreplace({f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)})
        names = sorted(value.free_symbols, key=str)
        points = {s: sympy.Rational(sum(map(ord, str(s))) + 7, 97) + i for i, s in enumerate(names)}
        number = value.subs(points).evalf(2 * DIGITS)
        parts = []
        for part in number.as_real_imag():
            if not part.is_number or part.has(sympy.nan, sympy.zoo):
                return ["other", None]
            tiny = part.is_finite and abs(part) < 10**-DIGITS
            parts.append("0" if tiny else str(part.evalf(DIGITS)))
        return ["expression" if names else "number", parts]

    questions = {"equal": equal, "print": fingerprint}
    equal("x+1", "1+x")  # the first question loads more than the limit of a question allows
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Should nobody be left to end this process, it ends itself.
        faulthandler.dump_traceback_later(2 * limit + 1, exit=True)
        name, *forms = json.loads(line)
        try:
            reply = questions[name](*forms)
        except BaseException:  # sympy raises whatever it likes on what a model may write
            reply = None
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[-2]), int(sys.argv[-1]))

r"""Which answers are the same, which are not, and what a hard answer costs."""

import itertools
import signal
import threading

import pytest

from falcon_h1r.reasoning import Equality, group, normal_form
from falcon_h1r.reasoning import verifier as verifier_module
from falcon_h1r.reasoning.answers import Classes
from falcon_h1r.reasoning.verifier import VERIFIER, Verifier, too_hard

EXACT = Equality("exact")
BOTH = Equality()

SAME = [
    ("Yes", "yes"),
    ("YES", "yes"),
    ("True", "true"),
    ("No", r"\text{no}"),
    ("New York", "new york"),
    (r"1\,000", "1000"),
    ("1 000", "1,000"),
    ("1\u202f000", "1000"),
    ("1'000", "1000"),
    ("1.234,56", "1234.56"),
    ("1e5", "100000"),
    ("1.5e-3", "0.0015"),
    (r"3\times10^{5}", "300000"),
    (r"3 \cdot 10^2", "300"),
    ("30°", "30"),
    (r"30^\circ", "30°"),
    (r"30^{\circ}", "30"),
    (r"\$18", "18"),
    (r"\$18.00", "$18$"),
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", r"\frac16"),
    ("1 1/2", "3/2"),
    (r"1\frac12", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    (r"-1\frac12", "-1.5"),
    (r"\frac ab", r"\frac{a}{b}"),
    (r"\frac{a}b", r"\dfrac{a}{b}"),
    (r"\tfrac12", "0.5"),
    ("{5}", "5"),
    ("(A)", "A"),
    (r"\text{(A)}", "A"),
    ("**C**", "C"),
    (r"\textbf{C}", "C"),
    ("A.", "A"),
    (r"\sqrt2", r"\sqrt{2}"),
    ("√2", r"\sqrt{2}"),
    ("x=5", "5"),
    ("x = 0.5", r"\frac12"),
    ("x=10/2", "x=5"),
    ("x^{2}", "x^2"),
    ("x²", "x^2"),
    ("\uff11\uff12", "12"),
    ("\u20135", "-5"),
    ("12。", "12"),
    (r"\boxed{7}", "7"),
    ("5 cm", r"5\text{ cm}"),
    ("5cm", "5.0 cm"),
    ("1,000 kg", "1000kg"),
    ("10 AM", "10 a.m."),
    ("10:30 AM", "10:30 am"),
    ("09:30", "9:30"),
    ("θ", r"\theta"),
    (r"\sqrt[3]8", r"\sqrt[3]{8}"),
    ("50%", r"50\%"),
    ("a≤b", r"a\leq b"),
]
DIFFERENT = [
    ("10 am", "10 pm"),
    ("k", "K"),
    ("2k", "2K"),
    ("12:30", "12/30"),
    ("12:30", "12.5"),
    ("2024-01-02", "2021"),
    ("01/02/2024", "2024"),
    ("777_8", "777"),
    ("10_2", "10"),
    (r"10_{2}", "2"),
    ("5 cm", "5 m"),
    ("5cm", "5m"),
    ("5 kg", "5 g"),
    ("5 m", "5 s"),
    ("5 cm", "500"),
    ("5°C", "5°F"),
    ("3:2", "1.5"),
    ("3:2", "3/2"),
    ("3:2", "2:3"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"),
    ("x=1", "y=1"),
    ("x=1", "x=2"),
    ("x=5", "6"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("AB", "ab"),
    ("5 6", "56"),
    ("12,34", "1234"),
    ("1e5", "5"),
    ("1 apple", "1 pear"),
    (r"\sqrt{2}", "1.414214"),
    ("\\$18", "€18"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same_by_notation_alone(a, b):
    assert EXACT.same(a, b) and EXACT.same(b, a)
    assert BOTH.compare(a, b).equal


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_not_the_same(a, b):
    assert not EXACT.same(a, b)
    assert not BOTH.same(a, b) and not BOTH.same(b, a)


@pytest.mark.parametrize("answers", list(itertools.permutations(["(1,2)", "(2,1)", "1,2"])))
def test_a_class_holds_what_equals_its_representative(answers):
    found = dict(zip(answers, group(answers, BOTH)))
    assert found["(1,2)"] != found["(2,1)"]
    assert len(set(group(["x=1", "y=1"], BOTH))) == 2


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"x \in (1,2)", "(1,2)", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("1,2", r"\{1,2\}", True),
        ("x=1,y=2", "y=2,x=1", True),
        ("y=2x+1", "1+2x", True),
        (r"\frac{\sqrt2}{2}", r"\frac1{\sqrt2}", True),
        ("2π", r"2\pi", True),
        (r"\pi r^2", r"\pi R^2", False),
        (r"(\{1,2\},3)", r"\{1,2\},3", False),
        ("[1,2]", "(1,2)", False),
    ],
)
def test_by_value(a, b, same):
    pytest.importorskip("math_verify")
    assert BOTH.same(a, b) is same and BOTH.same(b, a) is same


HARD = [
    "2^{2^{100000}}",
    "10^{10^{10}}",
    "10^10^10",
    "9^{9^{9^9}}",
    "(10^9)!",
    "1000000!",
    "((5!)!)!",
    "(x+1)^{1000}",
    r"\binom{1000000}{500000}",
    "(" * 20 + "1" + ")" * 20,
    "2^{10000000}",
    r"\sum_{n=1}^{1000000} n",
]


@pytest.mark.parametrize("answer", HARD)
def test_what_is_plainly_hard_never_starts(answer, monkeypatch):
    monkeypatch.setattr(VERIFIER, "ask", None)
    assert too_hard(answer)
    assert Equality().compare(answer, "x+1") == (False, "exact")
    assert group([answer, "5", answer], Equality()) == [0, 1, 0]


@pytest.mark.parametrize("answer", [r"\frac{1}{2^{10}}", "x^{2023}", r"2^{100}", "10!", "e^{x^2}"])
def test_what_is_usual_is_not_hard(answer):
    assert not too_hard(answer)


HANGS = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    name, *forms = json.loads(line)
    time.sleep(60 * ("h" in forms))
    print(json.dumps(["expression", "1"] if name == "print" else True), flush=True)
"""


def test_the_limit_holds_in_threads_and_is_asked_once(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(verifier_module, "_BOOT", HANGS)
    short = Verifier(0.5)
    asked = []

    class Spy:
        def ask(self, *question):
            asked.append(question)
            return short.ask(*question)

    monkeypatch.setattr("falcon_h1r.reasoning.answers.VERIFIER", Spy())
    equality, found = Equality(), []

    def compare():
        for other in ("x+1", "x+2", "x+1"):
            found.append(equality.compare("h", other))
        found.append(equality.compare("1+x", "x+1"))  # a new process answers

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    short.close()
    assert found == [(False, "exact")] * 3 + [(True, equality.rule)]
    assert asked.count(("print", "h")) == 1 and len(set(asked)) == len(asked)


def test_a_cancelled_question_is_not_remembered():
    pytest.importorskip("math_verify")
    equality = Equality()
    VERIFIER.cancel()
    try:
        assert equality.compare("x+3", "3+x") == (False, "exact")
    finally:
        VERIFIER.cancel(False)
    assert equality.same("x+3", "3+x")


def test_ctrl_c_cuts_a_comparison_inside_a_step(monkeypatch):
    from falcon_h1r.reasoning.live import _unbroken

    pytest.importorskip("math_verify")
    monkeypatch.setattr(verifier_module, "_BOOT", HANGS)
    long = Verifier(500.0)
    monkeypatch.setattr("falcon_h1r.reasoning.answers.VERIFIER", long)
    monkeypatch.setattr("falcon_h1r.reasoning.live.VERIFIER", long)
    found = []
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), _unbroken():
        timer.start()
        found.append(Equality().compare("h", "x+1"))
    long.close()
    assert found == [(False, "exact")]
    assert not long._cancelled


def test_a_process_that_died_is_replaced():
    pytest.importorskip("math_verify")
    own = Verifier()
    assert own.ask("equal", "x+1", "1+x") is True
    own._process.kill()
    own._process.wait()
    assert own.ask("equal", "x+1", "1+x") is True
    assert own.ask("equal", "no", "such") in (False, None)
    own.close()
    own.close()


def test_a_process_that_does_not_start_leaves_the_exact_rule(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(verifier_module, "_BOOT", "raise SystemExit")
    assert Verifier().ask("print", "5") is None


def test_many_surds_are_parsed_once_and_never_compared_in_pairs(monkeypatch):
    pytest.importorskip("math_verify")
    asked, real = [], VERIFIER.ask
    monkeypatch.setattr(VERIFIER, "ask", lambda *q: asked.append(q) or real(*q))
    surds = [rf"\sqrt{{{n}}}+{n}" for n in range(1000, 1200)]
    assert group(surds, Equality()) == list(range(200))
    assert sorted(asked) == sorted(("print", normal_form(surd)) for surd in surds)
    assert group([r"\sqrt{8}", r"2\sqrt2", r"\sqrt{9}", "3"], Equality()) == [0, 0, 1, 1]


def test_deeply_nested_text_is_unwrapped_in_one_pass():
    assert normal_form(r"\text{" * 1000 + "a" + "}" * 1000) == "a"
    assert normal_form("{" * 1000 + "a" + "}" * 1000)


def test_classes_of_many_numbers():
    classes = Classes(EXACT)
    for number in range(300):
        classes.add(str(number))
    assert len({classes.find(str(number)) for number in range(300)}) == 300

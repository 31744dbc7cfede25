r"""`reasoning.answers`: reading `\boxed{}`, normal forms, equality, classes and votes."""

import math
import random
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_h1r.reasoning import Equality, group, last_boxed, make_extractor, normal_form, vote
from falcon_h1r.reasoning.answers import Classes

EXACT = Equality("exact")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("42", None),
        (r"\boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed {2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b} c}", r"a\}b"),
        (r"\boxed{1} and \boxed{\frac{1}{2}", "1"),  # the last one stays open
        (r"\boxed{1 is what I thought, \boxed{5}", "5"),  # an earlier one stays open
        (r"\boxed{a + \boxed{b}}", r"a + \boxed{b}"),
        (r"\boxed{\boxed{b} + a} x", r"\boxed{b} + a"),
        (r"\boxed{1} \boxed{}", None),
        (r"\boxed{  }", None),
        (r"set {1, \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed5", "5"),
        (r"\boxedx{5}", None),
        (r"\\boxed{5}", None),  # a line break and the word boxed
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{5\\}", r"5\\"),  # a line break before the closing brace, not an escaped brace
    ],
)
def test_the_last_box(text, answer):
    assert last_boxed(text) == answer


def test_a_long_text_of_boxes_takes_linear_time():
    assert last_boxed("\\boxed{" * 200_000) is None
    assert last_boxed("\\boxed{1}" * 100_000 + r"\boxed{2}") == "2"


@given(st.data())
def test_a_balanced_content_comes_back_whole(data):
    def balanced(depth):
        parts = data.draw(
            st.lists(st.sampled_from(["x", "1", r"\{", r"\}", " + ", "{"]), max_size=5)
        )
        return "".join(
            "{" + (balanced(depth - 1) if depth else "") + "}" if part == "{" else part
            for part in parts
        )

    content = "q" + balanced(2) + "q"
    before = data.draw(st.sampled_from(["", "} ", "{ ", r"\boxed{9} ", r"\{ "]))
    assert last_boxed(before + "\\boxed{" + content + "} and so on") == content


def test_extractors():
    text = "Answer: (B)\n so 1,234.5 or -3/4 \n\n"
    assert make_extractor("number")(text) == "-3/4"
    assert make_extractor("choice")(text) == "B"
    assert make_extractor("line")(text) == "so 1,234.5 or -3/4"
    assert make_extractor("boxed,choice")(text) == "B"
    assert make_extractor("boxed,choice")(text + r"\boxed{7}") == "7"
    assert make_extractor("number")("no 1x x2 digit") is None
    assert make_extractor("number")("it is 1,234.5.") == "1,234.5"
    assert make_extractor(r"re:so (\S+)")(text + "so 9") == "9"
    assert make_extractor("re:[0-9]+")("1 22 333 x") == "333"
    assert make_extractor("re:x")("none") is None
    assert make_extractor("line")(" \n") is None
    for spec in ("box", "boxed,", "re:("):
        with pytest.raises(ValueError, match="extractor"):
            make_extractor(spec)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("42", "42"),
        (" +42 ", "42"),
        ("042", "42"),
        ("-0", "0"),
        ("\u22125", "-5"),
        ("0.50", "1/2"),
        (".5", "1/2"),
        ("2/4", "1/2"),
        (r"\frac{2}{4}", "1/2"),
        (r"\dfrac 2 4", "1/2"),
        (r"-\tfrac12", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"-\frac{-1}{2}", "1/2"),
        ("1/0", "1/0"),
        (r"\frac{1}{0}", r"\frac{1}{0}"),
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        ("1,234.50", "2469/2"),
        ("12,34", "12, 34"),
        ("1, 234", "1, 234"),
        ("$42$.", "42"),
        (r"\(42\)", "42"),
        (r"\text{ yes }", "yes"),
        ("Yes", "yes"),
        (r"\left( 1 ,2 \right)", "(1, 2)"),
        (r"x \, = \; 5", "x=5"),
        ("5 6", "5 6"),
        (r"50\%", "50%"),
        ("50 %", "50%"),
        (r"\sqrt{ 2 }", r"\sqrt{2}"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\mathrm{A}", "A"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_normal_forms(answer, form):
    assert normal_form(answer) == form


PIECES = st.sampled_from(
    [
        *r"1 2 34 0 , / . - \frac \dfrac { } ( ) \left $ \text{ x \, ~ % \% = {,}".split(),
        " ",
        "\u2212",
    ]
)
ANSWERS = st.lists(PIECES, max_size=8).map("".join)


@given(ANSWERS)
def test_a_normal_form_is_its_own(answer):
    assert normal_form(normal_form(answer)) == normal_form(answer)


@given(st.integers(-999, 999), st.integers(1, 99), st.integers(1, 9))
def test_equal_fractions_have_one_form(top, bottom, by):
    forms = {
        normal_form(f"{top}/{bottom}"),
        normal_form(f"\\frac{{{top * by}}}{{{bottom * by}}}"),
        normal_form(f" {top * by} / {bottom * by} ".replace(" / ", "/")),
    }
    assert len(forms) == 1
    assert (normal_form(f"{top}/{bottom}") == normal_form(f"{top + 1}/{bottom}")) is False


def test_what_decided_is_said():
    assert EXACT.compare("1/2", "0.5") == (True, "exact")
    assert EXACT.compare("0.50", r"\frac{2}{4}") == (True, "exact")
    assert EXACT.compare(r"\sqrt{8}", r"2\sqrt{2}") == (False, "exact")
    assert EXACT.rule == "exact" and not EXACT.same("50", "50%")


def test_a_rule_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert Equality("auto").rule == "exact"
    with pytest.raises(ValueError, match="not installed"):
        Equality("math-verify 0.9.0")
    with pytest.raises(ValueError, match="known are"):
        Equality("mathematical")


def test_math_verify_decides_where_it_is_installed():
    pytest.importorskip("math_verify")
    equality = Equality()
    assert equality.rule.startswith("math-verify 0.")
    assert equality.compare(r"\sqrt{8}", r"2\sqrt{2}") == (True, equality.rule)
    assert equality.compare("x+1", "1+x") == (True, equality.rule)
    assert equality.compare("x+1", "x+2") == (False, equality.rule)
    assert equality.compare("0.5", "1/2") == (True, "exact")
    assert equality.compare("41", "42") == (False, "exact")
    # Asked in both directions: alone, one of them says no.
    assert equality.same("x<1", r"(-\infty,1)") and equality.same(r"(-\infty,1)", "x<1")
    # A word is no product of letters, a percentage neither 50 nor a half.
    for a, b in (("stop", "pots"), ("50%", "50"), ("50%", "0.5"), ("0.5", "50")):
        assert equality.compare(a, b) == (False, "exact")
    # A decimal is exactly what it says.
    assert equality.compare("0.333333", "1/3") == (False, "exact")
    assert equality.same("x=5", "5") and not equality.same("(1,2)", "(2,1)")
    # Code is not run: what a model wrote is read as LaTeX only.
    assert not equality.same("__import__('os').getpid()", "5")
    assert equality.compare(r"\frac{", "5").equal is False
    found = []
    thread = threading.Thread(target=lambda: found.append(Equality().same("x+1", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]


class Near:
    """A relation that is not transitive: numbers at most 1 apart."""

    rule = "near"

    def compare(self, a, b):
        from falcon_h1r.reasoning import Verdict

        return Verdict(abs(int(a) - int(b)) <= 1, "near")


@given(st.lists(st.integers(0, 30), max_size=12), st.randoms(use_true_random=False))
def test_classes_do_not_depend_on_the_order(numbers, rng):
    def partition(order):
        classes = Classes(Near())
        for number in order:
            classes.add(str(number))
        members = {}
        for number in order:
            members.setdefault(classes.find(str(number)), set()).add(number)
        return {frozenset(own) for own in members.values()}

    shuffled = rng.sample(numbers, len(numbers))
    assert partition(numbers) == partition(shuffled)
    # By hand: two-digit numbers come behind one-digit ones, each run is cut behind its first pair.
    heads = {}
    for number in sorted(set(numbers)):
        heads[number] = number - 1 if heads.get(number - 1) == number - 1 else number
    expected = {}
    for number, head in heads.items():
        expected.setdefault(head, set()).add(number)
    assert partition(numbers) == {frozenset(own) for own in expected.values()}


def test_groups():
    assert group(["1/2", None, "3", "0.5", "3.0"], EXACT) == [0, None, 1, 0, 1]


def test_a_vote_by_hand():
    ballots = [(0, "1/2", 1.0), (1, "3", 1.5), (2, "0.5", 1.0), (3, None, 99.0), (4, "4", 0.5)]
    tally = vote(ballots, EXACT)
    assert (tally.answer, tally.share, tally.rule) == ("1/2", 0.5, "exact")
    assert tally.candidates == (("1/2", 2.0, (0, 2)), ("3", 1.5, (1,)), ("4", 0.5, (4,)))
    assert vote([(0, None, 1.0)], EXACT) == (None, 0.0, (), "exact")
    assert vote([(0, "3", 0.0)], EXACT)[:2] == ("3", 0.0)


def test_ties():
    # Equal weight: more voters; then the lowest number.
    assert vote([(0, "a", 2.0), (1, "b", 1.0), (2, "b", 1.0)], EXACT).answer == "b"
    assert vote([(3, "a", 1.0), (1, "b", 1.0)], EXACT).answer == "b"
    assert vote([(1, "a", 1.0), (3, "b", 1.0)], EXACT).answer == "a"
    # Ten times 0.1 is 1 when rounded once, and 0.9999... when summed one by one.
    tenths = [(i, "a", 0.1) for i in range(10, 20)]
    assert vote([(0, "b", 1.0), *tenths], EXACT).answer == "a"


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="trace 3: weight"):
        vote([(3, "a", weight)], EXACT)


@given(
    st.lists(
        st.tuples(st.sampled_from("a b 1/2 0.5 3 3.0".split()), st.floats(0, 10)), max_size=12
    ),
    st.integers(0, 99),
)
def test_a_vote_does_not_depend_on_the_order_of_arrival(cast, seed):
    ballots = [(number, answer, weight) for number, (answer, weight) in enumerate(cast)]
    shuffled = random.Random(seed).sample(ballots, len(ballots))
    assert vote(ballots, EXACT) == vote(shuffled, EXACT)
    growing = Classes(EXACT)
    for end in range(len(shuffled) + 1):
        last = vote(shuffled[:end], classes=growing)
    assert last == vote(ballots, EXACT)

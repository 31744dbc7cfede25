r"""`reasoning.extract`: the last box, number and choice of texts as models write them."""

import pytest

from falcon_h1r.reasoning.extract import last_boxed, last_choice, last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed 5", "5"),
        (r"so \boxed5.", "5"),
        (r"so \boxed 12.5 km", "12.5"),
        (r"so $\boxed x$", "x"),
        (r"\boxed{4} or \boxed 5", "5"),
        (r"\boxed 4 or \boxed{5}", "5"),
        (r"\boxed word", None),
        (r"\\boxed 5", None),
        (r"\fbox{7}", "7"),
        (r"\boxed{6} \fbox {7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{ \boxed{ \fbox{7} } }", "7"),
        (r"\boxed{\boxed{7}+\boxed{8}}", r"\boxed{7}+\boxed{8}"),
        (r"\boxed{1} and \boxed{\frac{1}{2}", "1"),
        (r"\boxed{1}, \boxed{2} and \boxed{", "2"),
        (r"\boxed{1}, then {\boxed{2", "1"),
        (r"\boxed{\{1\}} \boxed{\{", r"\{1\}"),
    ],
)
def test_boxes(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12.5km", "12.5"),
        ("3.14kg", "3.14"),
        ("1,234kg", "1,234"),
        ("0.75g", "0.75"),
        ("5m", "5"),
        ("90°", "90"),
        ("25°C", "25"),
        ("1.5e3", "1.5e3"),
        ("2E-4 m", "2E-4"),
        (".5", ".5"),
        ("-.5", "-.5"),
        ("1e5", "1e5"),
        ("1 000", "1 000"),
        ("12\u202f345\u202f678 people", "12\u202f345\u202f678"),
        ("1.234,56 EUR", "1.234,56"),
        ("it is \u22125", "\u22125"),
        ("it is \u20135.", "\u20135"),
        ("pages 3\u20135", "5"),
        ("答案是12。", "12"),
        ("共有12个", "12"),
        ("答案是\uff11\uff12。", "\uff11\uff12"),
        ("$18.00", "18.00"),
        ("18%", "18"),
        ("3/4cup", "3/4"),
        ("it is 1,234.5.", "1,234.5"),
        ("4, then the 3rd", "4"),
        ("no 1x x2 digit 0x1F", None),
        ("H2O", None),
        ("3.5x", None),
        ("1,234x", None),
        ("(1,2)", "2"),
        ("2×10", "10"),
        ("at 12:30", "30"),
        ("答案为-3.5米", "-3.5"),
        ("1/2/3", None),
    ],
)
def test_numbers(text, answer):
    assert last_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (C). I hope this helps.", "C"),
        ("The answer is C. A quick check confirms it.", "C"),
        ("Answer: B\n\nI am confident.", "B"),
        ("**Answer:** B", "B"),
        ("**Answer: (B)** because I said so", "B"),
        ("The correct option is D, and A is wrong.", "D"),
        ("The answer is **C**. Option A fails.", "C"),
        ("the answer is c.", "C"),
        ("answer: (d)", "D"),
        ("The answer is a prime, so option (C).", "C"),
        ("option (C)", "C"),
        ("Option B is right. I am sure.", "B"),
        ("option b", "B"),
        ("**C**", "C"),
        (r"$\boxed{\text{(C)}}$ I hope so", "C"),
        (r"\boxed{C}. A check", "C"),
        ("答案是C。", "C"),
        ("答案：（C）", "C"),
        ("故选：B。", "B"),
        ("正确答案为Ｄ。", "D"),
        ("因此选A", "A"),
        ("A and B fail, hence C", "C"),
        ("The answer is A because B is odd", "A"),
        ("It must be E. I'm sure.", "E"),
        ("C\n\nA proof follows.", "C"),
        ("(c)", "C"),
        ("c", "C"),
        ("I know a thing.", None),
        ("A proof I like.", None),
        ("", None),
    ],
)
def test_choices(text, answer):
    assert last_choice(text) == answer


def test_long_texts_are_read_in_linear_time():
    for text in (
        "answer is" + " " * 50_000,
        "1" * 50_000,
        "1,234" * 20_000,
        "answer " * 20_000,
        "(" * 50_000,
        " " * 50_000,
    ):
        last_number(text), last_choice(text), last_boxed(text)

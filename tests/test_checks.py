"""The one check of numbers and dtypes."""

import math

import pytest
import torch

from falcon_h1r.checks import DTYPES, as_dtype, check_integer, check_number, check_text, shown


class OwnError(ValueError):
    pass


@pytest.mark.parametrize(
    ("value", "options", "accepted"),
    [
        (0, {"least": 1}, "an integer >= 1"),
        (True, {"least": 1}, "an integer >= 1"),
        (1.0, {"least": 1}, "an integer >= 1"),
        ("1", {}, "an integer"),
        (None, {"least": 1}, "an integer >= 1"),
        (0, {"least": 1, "none": True}, "None or an integer >= 1"),
        (False, {"none": True}, "None or an integer"),
        (5, {"least": 1, "most": 4}, "an integer in 1 .. 4"),
        (5, {"most": 4}, "an integer <= 4"),
    ],
)
def test_integers_that_are_refused(value, options, accepted):
    with pytest.raises(OwnError) as error:
        check_integer("rows", value, error=OwnError, **options)
    assert str(error.value) == f"rows is {value!r}, expected {accepted}"


def test_integers_that_are_accepted():
    for value, options in [(1, {"least": 1}), (4, {"least": 1, "most": 4}), (-3, {})]:
        check_integer("rows", value, **options)
    check_integer("rows", None, 1, none=True)


@pytest.mark.parametrize(
    ("value", "options", "accepted"),
    [
        (math.inf, {}, "a finite number"),
        (math.nan, {"least": 0}, "a finite number >= 0"),
        (True, {"least": 0}, "a finite number >= 0"),
        (-0.1, {"least": 0}, "a finite number >= 0"),
        (0, {"above": 0}, "a finite number > 0"),
        ("1", {}, "a finite number"),
        (0.0, {"above": 0, "most": 1}, "0 < share <= 1"),
        (1.5, {"least": 0, "most": 1}, "0 <= share <= 1"),
        (-1, {"least": 0, "most": 1, "none": True}, "None or 0 <= share <= 1"),
    ],
)
def test_numbers_that_are_refused(value, options, accepted):
    with pytest.raises(OwnError) as error:
        check_number("share", value, error=OwnError, **options)
    assert str(error.value) == f"share is {value!r}, expected {accepted}"


def test_numbers_that_are_accepted():
    for value, options in [(1, {"above": 0}), (0, {"least": 0}), (1.0, {"most": 1})]:
        check_number("share", value, **options)
    check_number("share", None, 0, 1, none=True)


def test_dtypes_by_name_and_as_they_are():
    for name in DTYPES:
        assert as_dtype(name) is as_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("value", ["float", "torch.float32", "int8", torch.int8, None, 16, []])
def test_dtypes_that_are_refused(value):
    with pytest.raises(OwnError, match=r"dtype is .*, expected one of float32, bfloat16, float16"):
        as_dtype(value, error=OwnError)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\ud800", r"the lone surrogate U\+D800 at character 0"),
        ("é😀\udc00", r"the lone surrogate U\+DC00 at character 2"),
        ("é😀\udcff", r"byte 0xff at offset 6 \(U\+DCFF\)"),
        (b"x", "expected a string"),
        (None, "expected a string"),
    ],
)
def test_what_utf_8_cannot_write_is_refused_with_its_place(text, found):
    with pytest.raises(OwnError, match=f"^thing is .*{found}"):
        check_text("thing", text, OwnError)
    check_text("thing", "é😀\ufffd\x00")


def test_integers_beyond_a_float_are_refused_as_numbers():
    for value in (10**400, -(10**400), 10**5000):
        with pytest.raises(OwnError, match=r"share is .*, expected a finite number"):
            check_number("share", value, error=OwnError)


def test_any_value_is_shown_in_one_short_line():
    endless = []
    for _ in range(10_000):
        endless = [endless]
    for value in (10**5000, endless, "x\n" * 999, torch.zeros(9, 9), object()):
        assert "\n" not in shown(value) and len(shown(value)) <= 120
    assert shown("a") == "'a'" and shown(10**5000) == "int: too much to be shown"

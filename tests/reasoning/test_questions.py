"""`commands.questions`: what data sets write is read, and nothing is ignored."""

import json

import pytest

from falcon_h1r.commands.questions import Entry, read_questions


def read(tmp_path, *lines, suffix=None):
    path = tmp_path / "q.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return list(read_questions(str(path), suffix).values())


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ({"question": "q"}, Entry("q", None)),
        ({"question": "q", "reference": 7}, Entry("q", "7")),
        ({"question": "q", "reference": None}, Entry("q", None)),
        ({"question": "q", "answer": "48+24 = <<48+24=72>>72\n#### 72"}, Entry("q", "72")),
        (
            {"problem": "q", "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}"},
            Entry("q", r"\frac{1}{2}"),
        ),
        ({"problem": "q", "solution": "long", "answer": "3"}, Entry("q", "3")),
        ({"question": "q", "id": 5}, Entry("q", None, "5")),
        ({"question": "q", "id": "a/1"}, Entry("q", None, "a/1")),
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, Entry("q\nA. x\nB. y", "B")),
        ({"question": "q", "choices": ["x", "y"], "answer": "A"}, Entry("q\nA. x\nB. y", "A")),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, Entry("q\nA. x\nB. y", "B")),
        ({"question": "q", "prompt_suffix": "think"}, Entry("q\nthink", None)),
    ],
)
def test_forms(tmp_path, line, entry):
    assert read(tmp_path, line) == [entry]


def test_a_suffix_for_all(tmp_path):
    lines = {"question": "q"}, {"question": "r", "prompt_suffix": ""}
    assert [e.text for e in read(tmp_path, *lines, suffix="Box it.")] == ["q\nBox it.", "r"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "q", "level": 3}, "key 'level' is unknown"),
        ({"question": "q", "problem": "p"}, 'or "problem" instead'),
        ({"reference": "q"}, 'or "problem" instead'),
        ({"question": " "}, "found no text"),
        ({"question": 3}, "question is no text"),
        ({"question": "\ud800"}, "no UTF-8 text"),
        ({"question": "q", "reference": "1", "answer": "1"}, "one of the two"),
        ({"question": "q", "reference": [1]}, "neither a text nor a number"),
        ({"question": "q", "reference": True}, "neither a text nor a number"),
        ('{"question": "q", "reference": NaN}', "neither a text nor a number"),
        ({"question": "q", "answer": "so ####"}, "nothing behind ####"),
        ({"problem": "q", "solution": "none"}, "boxes no answer"),
        ({"question": "q", "id": {}}, "id is neither"),
        ({"question": "q", "choices": ["x"]}, "choices are no list"),
        ({"question": "q", "choices": "xy"}, "choices are no list"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "none of the choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "C"}, "none of the choices"),
        ('{"question": ' + "[" * 100_000, "not JSON that is read"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_refusals_name_the_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"line 2: .*{message}") as caught:
        read(tmp_path, {"question": "q"}, line)
    assert "\n" not in str(caught.value)


def test_an_id_is_there_once(tmp_path):
    with pytest.raises(ValueError, match="line 2: id '1' is there twice"):
        read(tmp_path, {"question": "q", "id": 1}, {"question": "r", "id": "1"})

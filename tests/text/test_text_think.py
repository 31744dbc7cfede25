import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_h1r.text import ThinkSplitter, split_thinking

CASES = {
    "closed": ("<think>\nwhy\n</think>\n\nanswer", ("why", "answer")),
    "no_newlines": ("<think>why</think>answer", ("why", "answer")),
    "inner_newlines_stay": ("<think>\na\n\nb\n</think>\n\nc\n\nd\n", ("a\n\nb", "c\n\nd\n")),
    "unclosed": ("<think>\nwhy", ("why", "")),
    "unclosed_end": ("<think>\nwhy\n</thin", ("why\n</thin", "")),
    "no_tag": ("\nanswer\n", (None, "\nanswer\n")),
    "empty_text": ("", (None, "")),
    "empty_block": ("<think>\n\n</think>\n\nanswer", ("", "answer")),
    "opened_by_the_prompt": ("why\n</think>\n\nanswer", ("why", "answer")),
    "text_before": ("so <think>why</think> then", ("why", "so \n\n then")),
    "several": ("<think>a</think>b<think>c</think>d", ("a\n\nc", "b\n\nd")),
    "nested_open_is_text": ("<think>a<think>b</think>c", ("a<think>b", "c")),
    "stray_close_is_text": ("<think>a</think>b</think>c", ("a", "b</think>c")),
    "only_a_close": ("</think>c", ("", "c")),
    "beginnings_of_tags": ("<thin <think>a</thin </think><", ("a</thin ", "<thin \n\n<")),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    text, expected = CASES[case]
    assert split_thinking(text) == expected


def test_a_prompt_that_opened_the_block_can_be_told():
    assert split_thinking("still thinking", opened=True) == ("still thinking", "")
    assert split_thinking("why</think>a", opened=False) == (None, "why</think>a")
    assert split_thinking("<think>a</think>b", opened=True) == ("<think>a", "b")


PARTS = ["<think>", "</think>", "\n", "\n\n", "a", "<", "</", "think>", "<thi"]
PIECES = st.lists(st.sampled_from(PARTS), max_size=12)


@given(PIECES, st.booleans(), st.data())
def test_streaming_gives_the_same_however_the_text_is_cut(parts, opened, data):
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    splitter = ThinkSplitter(opened)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        pieces += splitter.push(text[start:end])
    pieces += splitter.flush()
    assert all(piece.text for piece in pieces)
    thinking = "".join(piece.text for piece in pieces if piece.kind == "thinking")
    answer = "".join(piece.text for piece in pieces if piece.kind == "answer")
    assert ((thinking if splitter.seen else None), answer) == split_thinking(text, opened)


@given(PIECES)
def test_nothing_but_tags_and_newlines_is_lost(parts):
    text = "".join(parts)
    thinking, answer = split_thinking(text, opened=False)
    kept = (thinking or "") + answer

    def letters(string):
        return sorted(string.replace("\n", ""))

    gone = len(letters(text)) - len(letters(kept))
    tags = sorted("<think>") * text.count("<think>") + sorted("</think>") * text.count("</think>")
    assert 0 <= gone <= len(tags)


def test_text_is_shown_as_soon_as_it_is_certain():
    splitter = ThinkSplitter()
    assert splitter.push("<think>") == []
    assert splitter.inside and splitter.seen
    assert splitter.push("\nwhy") == [("thinking", "why")]
    assert splitter.push("\n") == []
    assert splitter.push("not\n</th") == [("thinking", "\nnot")]
    assert splitter.push("ink>\n\nA") == [("answer", "A")]
    assert not splitter.inside

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_text import VOCAB_SIZE, build_backend

from falcon_h1r.text import IncrementalDecoder, StopMatcher, Tokenizer
from falcon_h1r.text.stream import overlap

TOKENIZER = Tokenizer(build_backend())
IDS = st.lists(st.integers(0, VOCAB_SIZE + 2), max_size=40)


def pieces_of(ids):
    decoder = IncrementalDecoder(TOKENIZER)
    return [decoder.push(token) for token in ids], decoder.flush()


@given(IDS)
@example(TOKENIZER.encode("é€😀")[:-1])
@example(TOKENIZER.encode("\ufffd\ufffd\ufffd\ufffda"))
@example(TOKENIZER.encode("é€")[1:-1] * 3)
def test_pieces_join_to_the_decoding_of_any_ids(ids):
    pieces, rest = pieces_of(ids)
    assert "".join(pieces) + rest == TOKENIZER.decode(ids)


@given(st.text(alphabet="aé€😀\n 12hello"))
def test_no_piece_of_valid_text_holds_half_a_character(text):
    pieces, rest = pieces_of(TOKENIZER.encode(text))
    assert rest == ""
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    ids = TOKENIZER.encode("a😀b")
    assert len(ids) == 6
    assert pieces_of(ids) == (["a", "", "", "", "😀", "b"], "")
    assert pieces_of(ids[:3]) == (["a", "", ""], "\ufffd")


def test_the_window_stays_short():
    decoder = IncrementalDecoder(TOKENIZER)
    for token in TOKENIZER.encode("hello 😀 " * 50):
        decoder.push(token)
        assert len(decoder._window) <= 8


TEXT = st.text(alphabet="abS", max_size=30)
STOPS = st.lists(st.text(alphabet="abS", min_size=1, max_size=4), max_size=3)


@given(st.lists(TEXT, max_size=6), STOPS)
def test_the_text_is_cut_before_the_first_stop_to_be_complete_however_it_comes(parts, stops):
    matcher = StopMatcher(stops)
    out = "".join([matcher.push(part) for part in parts]) + matcher.flush()
    text = "".join(parts)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not found:
        assert out == text and matcher.matched is None
    else:
        end, start = min(found)
        assert out == text[:start] and matcher.matched == text[start:end]


def test_what_may_be_a_stops_beginning_is_held_back_and_no_more():
    matcher = StopMatcher(["</s>", "END"])
    assert matcher.push("one <") == "one "
    assert matcher.push("/s") == ""
    assert matcher.push("x E") == "</sx "
    assert matcher.push("N") == ""
    assert matcher.flush() == "EN"
    assert StopMatcher([]).push("all") == "all"


def test_nothing_comes_out_after_a_match():
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a" and matcher.matched == "x"
    assert matcher.push("more") == "" and matcher.flush() == ""


@pytest.mark.parametrize(
    ("text", "tags", "size"),
    [
        ("ab<", ["<t>"], 1),
        ("ab<t", ["<t>"], 2),
        ("<t>", ["<t>"], 0),
        ("x", [], 0),
        ("aa", ["aab"], 2),
    ],
)
def test_overlap_is_the_longest_open_beginning(text, tags, size):
    assert overlap(text, tags) == size

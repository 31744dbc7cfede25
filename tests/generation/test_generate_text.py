"""Text, stop strings and thinking budgets, on a model that follows a script."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_config, make_model
from tiny_text import VOCAB_SIZE, ScriptedModel, build_backend
from transformers import PreTrainedTokenizerFast

from falcon_h1r.generation import SamplingParams, generate, stream
from falcon_h1r.text import Tokenizer, split_thinking

TOKENIZER = Tokenizer(build_backend())
SPELLED = Tokenizer(build_backend(tags=False))  # think tags take several tokens
END = 3


def script(text: str, tokenizer=TOKENIZER) -> list[int]:
    return tokenizer.encode(text)


def run(*texts: str, tokenizer=TOKENIZER, prompts=None, end=True, on_step=None, **changes):
    """Generate from scripts: prompt [k] gives text k and then the end token."""
    scripts = [script(text, tokenizer) + [END] * end for text in texts]
    model = ScriptedModel(scripts)
    prompts = [[k] for k in range(len(texts))] if prompts is None else prompts
    model.prompt_lengths = {k: len(prompts[k]) for k in range(len(texts))}
    params = SamplingParams(**{"max_new_tokens": 100, **changes})
    return generate(model, prompts, params, tokenizer=tokenizer, on_step=on_step)


def test_text_leaves_out_the_stop_token_which_the_sequence_keeps():
    out = run("hello 😀", "é")
    assert out.texts == ["hello 😀", "é"] and out.finish_reasons == ["stop", "stop"]
    assert [row[-1].item() for row in out.sequences] == [END, END]


def test_text_of_a_sequence_cut_inside_a_character_says_so():
    ids = script("a😀")
    out = run("a😀", max_new_tokens=len(ids) - 1)
    assert out.texts == ["a\ufffd"] and out.finish_reasons == ["length"]


@pytest.mark.parametrize(
    ("text", "stop", "cut"),
    [
        ("one STOP two", "STOP", "one "),
        ("one S two STO STOP", "STOP", "one S two STO "),
        ("hello", "ello", "h"),  # inside one token
        ("hello hello", "lo h", "hel"),  # across the border of merged tokens
        ("a😀b", "😀", "a"),  # across the tokens of one character
        ("ab", "a", ""),
        ("line\n\nline", "\n\n", "line"),
    ],
)
def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(text, stop, cut):
    out = run(text, stop=stop)
    assert out.texts == [cut] and out.finish_reasons == ["stop_string"]
    kept = out.sequences[0].tolist()
    assert kept == script(text)[: len(kept)]
    decoded = TOKENIZER.decode(kept)
    assert stop in decoded and stop not in TOKENIZER.decode(kept[:-1])


def test_each_row_has_its_own_stop_strings():
    model = ScriptedModel([[*script("a.b;c"), END]] * 3)
    rows = [SamplingParams(stop=s) for s in (".", (";", "x"), ())]
    out = generate(model, [[0], [1], [2]], rows, tokenizer=TOKENIZER)
    assert out.texts == ["a", "a.b", "a.b;c"]
    assert out.finish_reasons == ["stop_string", "stop_string", "stop"]


def test_a_stop_token_comes_before_a_stop_string_and_both_before_the_length():
    out = run("ab", stop="b", max_new_tokens=2)
    assert out.finish_reasons == ["stop_string"]
    out = run("ab", stop_token_ids=(script("b")[0],), stop="b", max_new_tokens=2)
    assert out.finish_reasons == ["stop"] and out.texts == ["a"]


def test_a_beginning_of_a_stop_string_that_leads_nowhere_is_part_of_the_text():
    assert run("one STO", stop="STOP").texts == ["one STO"]
    assert run("one STO", stop="STOP", end=False, max_new_tokens=7).texts == ["one STO"]


def test_streamed_text_is_whole_characters_and_never_part_of_a_stop_string():
    pieces: list[str] = []
    out = run("x😀 é STO STOP y", stop="STOP", on_step=lambda s: pieces.append(s.text.get(0, "")))
    assert "".join(pieces) == out.texts[0] == "x😀 é STO "
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[:6] == ["x", "", "", "", "😀", " "]
    # "S" of "STO " is held until it cannot be "STOP" any more.
    assert "S" not in pieces and "STO " in pieces


@settings(max_examples=30)
@given(st.lists(st.text(alphabet="ab. é", max_size=12), min_size=1, max_size=4))
def test_streaming_and_batch_agree_on_any_text(texts):
    pieces = [[] for _ in texts]

    def on_step(step):
        for sequence, piece in step.text.items():
            pieces[sequence].append(piece)

    out = run(*texts, stop=("b.", "."), on_step=on_step)
    assert ["".join(p) for p in pieces] == out.texts
    for text, found, reason in zip(texts, out.texts, out.finish_reasons):
        cut = min((at for s in ("b.", ".") if (at := text.find(s)) >= 0), default=len(text))
        assert found == text[:cut] and reason == ("stop_string" if "." in text else "stop")


def test_an_interrupted_text_has_everything_its_tokens_say():
    model = ScriptedModel([script("one STOP")])
    going = stream(model, [[0]], SamplingParams(stop="STOP"), tokenizer=TOKENIZER)
    held_back = None
    for step in going:
        held_back = step.text == {}
        if TOKENIZER.decode(going.result().sequences[0]) == "one ST":
            break
    assert held_back and going.result().texts == ["one ST"]


FORCED = "</think>\n\n"


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SPELLED], ids=["one_token", "spelled"])
@pytest.mark.parametrize("budget", [12, 15, 20])
def test_an_open_think_block_is_closed_token_by_token(tokenizer, budget):
    text = "<think>" + "z" * 60
    out = run(text, tokenizer=tokenizer, thinking_budget=budget, max_new_tokens=50, logprobs=2)
    ids, closing = script(text, tokenizer), tokenizer.encode(FORCED)
    expected = ids[:budget] + closing + ids[budget + len(closing) :]
    assert out.sequences[0].tolist() == expected[:50]
    thinking, answer = split_thinking(out.texts[0])
    assert thinking == "z" * (budget - len(tokenizer.encode("<think>"))) and set(answer) == {"z"}
    # Forced tokens have the model's own log-probability: these were not its choice.
    logprobs = out.logprobs[0]
    assert len(logprobs) == 50 and out.top_logprobs[0][0].shape == (50, 2)
    forced = logprobs[budget : budget + len(closing)]
    assert (forced < -5).all() and (logprobs[:budget] > -5).all()
    assert (logprobs[budget + len(closing) :] > -5).all()


@pytest.mark.parametrize("text", ["<think>ab</think>cccccccccccccccc", "ccccccccccccccccccccccc"])
def test_nothing_is_forced_where_no_block_is_open(text):
    assert run(text, thinking_budget=10).texts == [text]


def test_a_budget_that_is_not_reached_changes_nothing():
    text = "<think>abc</think>\n\nanswer"
    assert run(text, thinking_budget=6).texts == [text]
    assert run(text, thinking_budget=3).texts != [text]


def test_a_block_that_the_prompt_opened_counts():
    prompt = [0, *script("x<think>\n")]
    out = run("zzzzzzzzzzzz", prompts=[prompt], thinking_budget=3)
    assert out.texts[0].startswith("zzz" + FORCED)
    closed = [0, *script("<think></think>\n")]
    assert run("zzzzzzzzzzzz", prompts=[closed], thinking_budget=3).texts == ["z" * 12]


def test_a_budget_of_nothing_closes_at_once_and_late_blocks_too():
    out = run("zz<think>zzzzzzzzzz", thinking_budget=0)
    assert out.texts[0].startswith("zz<think>" + FORCED)
    out = run("z" * 10 + "<think>" + "z" * 10, thinking_budget=5)
    assert out.texts[0].startswith("z" * 10 + "<think>" + FORCED)


def test_the_length_limit_holds_inside_the_forced_tokens():
    out = run("<think>zzzzzzzzz", thinking_budget=4, max_new_tokens=5)
    assert out.texts == ["<think>zzz</think>"] and out.finish_reasons == ["length"]


def test_rows_have_their_own_budgets_and_batches_do_not_matter():
    texts = ["<think>" + "z" * 30, "<think>" + "y" * 30, "plain" * 6]
    rows = [SamplingParams(max_new_tokens=25, thinking_budget=b) for b in (3, None, 3)]
    scripts = [script(text) for text in texts]
    together = generate(ScriptedModel(scripts), [[0], [1], [2]], rows, tokenizer=TOKENIZER)
    for i in range(3):
        alone = generate(ScriptedModel(scripts), [[i]], [rows[i]], tokenizer=TOKENIZER)
        assert torch.equal(alone.sequences[0], together.sequences[i])
    assert FORCED in together.texts[0]
    assert FORCED not in together.texts[1] and FORCED not in together.texts[2]


def test_a_budget_leaves_the_tokens_before_it_as_they_were():
    """A real model: sampling goes on at its own positions of the random sequence."""
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    prompt = script("1+1<think>\n")
    how = {"temperature": 1.0, "seed": 5, "max_new_tokens": 20, "stop_token_ids": ()}
    free = generate(model, [prompt], SamplingParams(**how), tokenizer=TOKENIZER)
    forced = generate(
        model, [prompt], SamplingParams(thinking_budget=8, **how), tokenizer=TOKENIZER
    )
    closing = TOKENIZER.encode(FORCED)
    ids = forced.sequences[0].tolist()
    assert ids[:8] == free.sequences[0].tolist()[:8]
    assert ids[8 : 8 + len(closing)] == closing and len(ids) == 20


def test_samples_of_one_prompt_have_their_own_text():
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    how = SamplingParams(temperature=1.0, seed=1, n=3, max_new_tokens=15, stop=("e", "1"))
    out = generate(model, [script("hello")], how, tokenizer=TOKENIZER)
    for i in range(3):
        one = SamplingParams(temperature=1.0, seed=1 + i, max_new_tokens=15, stop=("e", "1"))
        alone = generate(model, [script("hello")], one, tokenizer=TOKENIZER)
        assert alone.texts[0] == out.texts[i]
        assert alone.finish_reasons[0] == out.finish_reasons[i]


def test_transformers_tokenizers_serve_as_well():
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_backend())
    text = "<think>" + "z" * 20 + "STOP"
    model = ScriptedModel([script(text)])
    params = SamplingParams(max_new_tokens=40, stop="STOP", thinking_budget=5)
    ours = generate(model, [[0]], params, tokenizer=TOKENIZER)
    model = ScriptedModel([script(text)])
    assert generate(model, [[0]], params, tokenizer=theirs).texts == ours.texts


def test_finished_rows_leave_the_batch_when_half_of_it_is_idle():
    scripts = [[*script("a" * n), END] for n in (2, 30, 5, 8)]
    model = ScriptedModel(scripts)
    out = generate(model, [[0], [1], [2], [3]], SamplingParams(max_new_tokens=50))
    assert [len(row) for row in out.sequences] == [3, 31, 6, 9]
    rows = [rows for rows, _ in model.calls]
    assert rows == [4] + [4] * 5 + [2] * 3 + [1] * 22

"""The chat command: turns, what is kept between them, and the session around them."""

import copy
import io
import sys

import pytest
import torch
from tiny_cli import Terminal, interrupting, run, tiny_model, write_checkpoint

from falcon_h1r.commands.chat import Conversation
from falcon_h1r.generation import SamplingParams, generate
from falcon_h1r.text import load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def conversation(checkpoint, **changes):
    tokenizer = load_tokenizer(checkpoint)
    params = SamplingParams(**{"max_new_tokens": 8, "stop_token_ids": (3, 4), **changes})
    return Conversation(tiny_model(), tokenizer, params, True, None)


def talk(chat, text):
    answer = chat.ask(text)
    for _ in answer.run:
        pass
    return chat.keep(answer), answer


def answered_afresh(checkpoint, messages, params=None):
    tokenizer = load_tokenizer(checkpoint)
    params = params or SamplingParams(max_new_tokens=8, stop_token_ids=(3, 4))
    ids = tokenizer.encode_chat(messages)
    return generate(tiny_model(), [ids], params, tokenizer=tokenizer), ids


def test_turns_are_what_a_fresh_prompt_would_give(checkpoint):
    chat, messages = conversation(checkpoint), []
    for text in ("hello", "12", "ab"):
        out, answer = talk(chat, text)
        messages.append({"role": "user", "content": text})
        fresh, ids = answered_afresh(checkpoint, messages)
        assert answer.ids == ids and out.texts == fresh.texts
        messages.append({"role": "assistant", "content": fresh.texts[0].lstrip("\n")})
    assert answer.reused > 0


class Scripted(Conversation):
    """Keeps a given text as the answer, so that templates can be made to change earlier turns."""

    said = "<think>\nhm\n</think>\n\nyes"

    def keep(self, answer):
        out = answer.run.result()
        tokens = torch.tensor([*self._tokenizer.encode(self.said), 3])
        answer.run.result = lambda: type(out)(
            **{**vars(out), "sequences": [tokens], "texts": [self.said], "finish_reasons": ["stop"]}
        )
        return super().keep(answer)


def padding_speaker():
    """A head of zeros always says `<|pad|>`, which comes back from its text as it was."""
    model = copy.deepcopy(tiny_model())
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def test_a_turn_that_is_rendered_as_it_was_generated_is_not_read_again(checkpoint):
    chat = conversation(checkpoint)
    chat._model = padding_speaker()
    _, first = talk(chat, "hello")
    assert (first.reused, first.comparable) == (0, 0)
    _, second = talk(chat, "more")
    # All but the last token of the answer, which was not read when it was made.
    assert second.reused == second.comparable == len(first.ids) + 7


def test_a_state_broken_off_inside_a_step_is_not_gone_on_with(checkpoint, monkeypatch):
    chat = conversation(checkpoint)
    chat._model = padding_speaker()
    answer = chat.ask("hello")
    interrupting(monkeypatch, after=4)
    with pytest.raises(KeyboardInterrupt):
        for _ in answer.run:
            pass
    out = chat.keep(answer)
    assert out.new_tokens == 3 and out.texts == ["<|pad|>" * 3]
    assert chat.ask("more").reused == len(answer.ids) - 1


def test_a_turn_whose_reasoning_is_dropped_goes_on_from_its_prompt(checkpoint):
    chat = conversation(checkpoint)
    chat.__class__ = Scripted
    _, first = talk(chat, "hello")
    _, second = talk(chat, "more")
    assert second.reused == len(first.ids) - 1 < second.comparable
    chat.reset()
    _, third = talk(chat, "hello")
    assert third.reused == 0 and third.ids == first.ids


def test_long_prompts_are_read_in_pieces(checkpoint, monkeypatch):
    whole, first = talk(conversation(checkpoint), "hello hello")
    monkeypatch.setattr("falcon_h1r.commands.common.PREFILL_CHUNK", 7)
    pieces, second = talk(conversation(checkpoint), "hello hello")
    assert len(first.ids) > 14 and first.ids == second.ids and whole.texts == pieces.texts


def test_an_interrupted_answer_stays_and_the_next_turn_is_right(checkpoint):
    chat = conversation(checkpoint)
    answer = chat.ask("hello")
    for step in answer.run:
        if step.position == 3:
            break
    out = chat.keep(answer)
    assert out.finish_reasons == ["interrupted"] and out.new_tokens == 4
    partial = out.texts[0]
    out, second = talk(chat, "12")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": partial.lstrip("\n")},
        {"role": "user", "content": "12"},
    ]
    fresh, ids = answered_afresh(checkpoint, messages)
    assert second.ids == ids and out.texts == fresh.texts


def test_an_interrupt_before_the_first_token_takes_the_question_back(checkpoint):
    chat = conversation(checkpoint)
    answer = chat.ask("hello")
    chat.keep(answer)
    assert chat._messages == []
    _, again = talk(chat, "hello")
    assert again.ids == answer.ids


def test_each_turn_of_a_seeded_conversation_has_its_own_seed(checkpoint):
    chat = conversation(checkpoint, temperature=1.0, seed=5)
    assert talk(chat, "hello")[0].seeds == [5]
    assert talk(chat, "hello")[0].seeds == [6]
    chat.reset()
    assert talk(chat, "hello")[0].seeds == [5]


def test_a_conversation_that_is_too_long_is_refused_and_unchanged(checkpoint):
    chat = conversation(checkpoint)
    with pytest.raises(ValueError, match=r"conversation has \d+ tokens.*/reset"):
        chat.ask("x" * 150)
    assert chat._messages == []


def chat_session(capsys, monkeypatch, checkpoint, lines, *argv, terminal=False):
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(lines))
    return run(capsys, "chat", "--model", checkpoint, "--max-new-tokens", "8", *argv)


def test_chat_answers_line_by_line_until_the_input_ends(capsys, checkpoint, monkeypatch):
    status, out, err = chat_session(capsys, monkeypatch, checkpoint, "hello\n\n12\n")
    first, _ = answered_afresh(checkpoint, [{"role": "user", "content": "hello"}])
    assert status == 0 and out.startswith(first.texts[0] + "\n")
    assert err.count("tokens/s") == 2 and "from the cache" in err


def test_chat_commands(capsys, checkpoint, monkeypatch):
    lines = "hello\n/reset\nhello\n/system Be\nhello\n/reset\nhello\n/system\nhello\n/dance\n"
    lines += "/exit\nnever\n"
    status, out, err = chat_session(capsys, monkeypatch, checkpoint, lines)
    turns = [line for line in err.splitlines() if "from the cache" in line]
    assert status == 0 and len(turns) == 5
    prompts = [int(line.split("prompt ")[1].split()[0]) for line in turns]
    assert prompts[0] == prompts[1] == prompts[4] < prompts[2] == prompts[3]
    assert "unknown command /dance" in err
    with_option = chat_session(capsys, monkeypatch, checkpoint, "hello\n", "--system", "Be")[2]
    assert f"prompt {prompts[2]} tokens" in with_option


def test_chat_says_when_it_reads_earlier_turns_again(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr("falcon_h1r.commands.chat.Conversation", Scripted)
    _, _, err = chat_session(capsys, monkeypatch, checkpoint, "hello\nmore\n")
    first, second = [line for line in err.splitlines() if "from the cache" in line]
    assert "again" not in first and "renders earlier turns differently" in second


def test_chat_survives_an_error_and_ctrl_c(capsys, checkpoint, monkeypatch):
    status, _, err = chat_session(capsys, monkeypatch, checkpoint, "x" * 150 + "\nhello\n")
    assert status == 0 and "error: the conversation has" in err and err.count("tokens/s") == 1
    interrupting(monkeypatch, after=5)
    status, _, err = chat_session(capsys, monkeypatch, checkpoint, "hello\nhello\n")
    assert status == 0 and err.count("interrupted") == 1 and err.count("; length]") == 1

"""The embedded checkpoint h1r-pico: its task, its tokenizer, and what it was trained to do."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from models import load
from tokenizers import Tokenizer

from falcon_h1r.generation import SamplingParams, generate
from tools import pico_task, pico_tokenizer
from tools.pico_task import LEVELS, Problem, grade, make_problem

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "falcon_h1r" / "assets" / "h1r-pico"


def problems(level: str, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [make_problem(rng, level) for _ in range(count)]


# The task


@pytest.mark.parametrize("level", LEVELS)
def test_traces_are_right_arithmetic(level):
    for problem in problems(level, 200):
        terms = problem.expression.replace("-", "+-").split("+")
        lines = problem.trace.split("\n")
        assert problem.prompt == f"What is {problem.expression}?"
        assert problem.answer == eval(problem.expression)
        assert len(lines) == len(terms) and LEVELS[level].terms[0] <= len(terms)
        assert len(terms) <= LEVELS[level].terms[1]
        total = 0
        for index, (line, term) in enumerate(zip(lines, terms)):
            total += eval(term)
            assert total >= 0
            left, _, right = line.partition("=")
            written, _, product = left.lstrip("+-").partition(":")
            factor, *other = written.split("*")
            assert "*".join(number[::-1] for number in [factor, *other]) == term.lstrip("-")
            assert (left[0] == "-") == (term[0] == "-")
            assert product[::-1] == (str(abs(eval(term))) if other else "")
            assert right[::-1] == ("" if index == 0 else str(total))


def test_problems_are_a_function_of_the_seed_alone():
    code = (
        "import random; from tools.pico_task import make_problem, is_held_out;"
        "rng = random.Random(7); made = [make_problem(rng, 'hard') for _ in range(40)];"
        "print([(p.expression, is_held_out(p)) for p in made])"
    )
    # A fresh process has another seed of Python's own hash().
    runs = {subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)}
    here = [(p.expression, pico_task.is_held_out(p)) for p in problems("hard", 40, seed=7)]
    assert runs == {f"{here}\n".encode()}


@pytest.mark.parametrize("level", LEVELS)
def test_the_split_is_disjoint_and_has_its_size(level):
    rng = random.Random(3)
    train = {pico_task.make_split_problem(rng, level, False).expression for _ in range(500)}
    held_out = pico_task.held_out_problems(level, 100)
    assert len({problem.expression for problem in held_out}) == 100
    assert held_out == pico_task.held_out_problems(level, 100)
    assert not train & {problem.expression for problem in held_out}
    share = sum(map(pico_task.is_held_out, problems(level, 4000))) / 4000
    assert share == pytest.approx(1 / pico_task.HELD_OUT_ONE_IN, abs=0.02)


def test_the_split_never_moves():
    """Moving it would put training problems of the shipped checkpoint among the held-out ones."""
    first = {level: pico_task.held_out_problems(level, 1)[0].expression for level in LEVELS}
    assert first == {
        "easy": "8+7+10",
        "medium": "8+46+84-1",
        "product": "1*2+32*6",
        "large": "99-70+17",
        "long": "2+26+85-6-24-56+77",
        "hard": "4+885+2+106+549*3",
        "cross": "69+13*25",
        "deep": "8-8+35+46*97+36*28+38",
        "far": "158+344*69",
    }


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level is 'trivial'; accepted: easy"):
        make_problem(random.Random(0), "trivial")


def test_grade():
    problem = Problem("What is 40+2?", 42, "04\n+2=24", "easy", "40+2")
    assert grade(problem.completion, problem)
    assert grade("<think>\nno trace\n</think>\n\n\\boxed{41} or rather \\boxed{42}", problem)
    assert grade("</think>\\boxed{042}", problem)
    for wrong in (
        "",
        "\\boxed{42}",  # thinking never closed
        "<think>\n\\boxed{42}\n</think>\n\n42",  # boxed in the trace only
        "<think>\n</think>\n\n\\boxed{24}",
        "<think>\n</think>\n\n\\boxed{42} no, \\boxed{43}",
        "<think>\n</think>\n\n\\boxed{}",
        "<think>\n</think>\n\n\\boxed{42",
    ):
        assert not grade(wrong, problem), wrong
    negative = Problem("What is 1-3?", -2, "", "easy", "1-3")
    assert grade("</think>\\boxed{-2}", negative) and not grade("</think>\\boxed{2}", negative)


# The tokenizer and the chat template


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_shipped_text_files_are_the_ones_of_the_tool(tmp_path):
    pico_tokenizer.write_text_files(tmp_path)
    for file in tmp_path.iterdir():
        shipped = (FOLDER / file.name).read_text(encoding="utf-8")
        if file.suffix == ".json":
            assert json.loads(shipped) == json.loads(file.read_text(encoding="utf-8")), file.name
        else:
            assert shipped == file.read_text(encoding="utf-8"), file.name


@given(text=st.text())
def test_any_text_round_trips(text):
    tokenizer = pico_tokenizer.build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokens_of_a_document(tokenizer):
    problem = Problem("What is 47+8*3?", 71, "74\n+8*3:42=17", "product", "47+8*3")
    text = pico_tokenizer.chat_prompt(problem.prompt) + problem.completion
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert encoded.tokens[:9] == "<|im_start|> user Ċ WhatĠisĠ 4 7 + 8 *".split()
    assert encoded.tokens[-6:] == "</think> ĊĊ \\boxed{ 7 1 } <|im_end|>".split()[-6:]
    assert [tokenizer.token_to_id(t) for t in ("<|pad|>", "<|end_of_text|>", "<|im_end|>")] == [
        0,
        11,
        228,
    ]
    kept = tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert "<think>" in kept and "</think>" in kept and "<|im_end|>" not in kept


def render(messages, add_generation_prompt):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message):
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string((FOLDER / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def test_chat_template():
    [problem] = problems("easy", 1)
    user = {"role": "user", "content": problem.prompt}
    assistant = {"role": "assistant", "content": problem.completion.removesuffix("<|im_end|>")}
    prompt = pico_tokenizer.chat_prompt(problem.prompt)
    assert render([user], True) == prompt
    assert render([user, assistant], False) == prompt + problem.completion
    boxed = f"\\boxed{{{problem.answer}}}"
    split = {"role": "assistant", "content": boxed, "reasoning_content": problem.trace}
    assert render([user, split], False) == prompt + problem.completion
    system = {"role": "system", "content": "Be brief."}
    assert render([system, user, assistant, user], True) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{prompt}{boxed}<|im_end|>\n{prompt}"
    )
    for refused in ([{"role": "tool", "content": ""}], [user, system]):
        with pytest.raises(TemplateError, match=r"role is tool|must be the first"):
            render(refused, True)


# The checkpoint


@pytest.fixture(scope="module")
def model():
    return load(FOLDER, dtype=torch.float32)


def test_the_checkpoint_is_small_and_uses_every_part_of_the_family(model):
    config = model.config
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12e6
    assert config.eos_token_ids == (11, 228)
    assert config.mamba_rms_norm and not config.mamba_norm_before_gate
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    names = [name for name in vars(config) if name.endswith(("_multiplier", "_multipliers"))]
    for name in names:
        value = getattr(config, name)
        assert 1 not in (value if isinstance(value, tuple) else (value,)), name


def test_it_solves_held_out_problems(model, tokenizer):
    asked = pico_task.held_out_problems("easy", 20)
    prompts = [
        tokenizer.encode(pico_tokenizer.chat_prompt(problem.prompt)).ids for problem in asked
    ]
    output = generate(model, prompts, SamplingParams(max_new_tokens=64))
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in output.sequences]
    assert sum(map(grade, texts, asked)) >= 16

"""What an engine refuses, what an interrupted step leaves, what a step reads from the device."""

import functools
from types import SimpleNamespace

import pytest
import torch
from memory_model import MemoryModel, said
from models import make_config, make_model, random_ids
from tiny_text import build_backend
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_h1r import FalconH1Config
from falcon_h1r.cpu import require_compiler
from falcon_h1r.generation import Engine, SamplingParams, generate
from falcon_h1r.generation import engine as engine_module
from falcon_h1r.text import Tokenizer

PROMPT = random_ids(make_config(), 6).tolist()
TOKENIZER = Tokenizer(build_backend())


@functools.cache
def tiny_model():
    return make_model(make_config("two_groups"), dtype=torch.float64)


def params(**changes):
    return SamplingParams(**{"max_new_tokens": 8, "stop_token_ids": (), **changes})


def engine(**options):
    return Engine(tiny_model(), **options)


@pytest.mark.parametrize("name", ["max_rows", "memory_budget", "prefill_chunk"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_numbers_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected "):
        engine(**{name: value})
    if name == "max_rows":
        with pytest.raises(ValueError, match="max_rows is None"):
            engine(max_rows=None)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "has no tokens"),
        ([5, 97], "id 97 is outside the vocabulary of 97"),
        ([-1], "id -1 is outside"),
        ([0.5], "not a list of ids|expected integers"),
        ([[1, 2]], "not a list of ids|expected integers"),
        ("text", "not a list of ids|expected integers"),
        ([1] * 505, r"505 tokens \+ max_new_tokens 8 = 513, more than max_position_embeddings 512"),
    ],
)
def test_prompts_that_cannot_be_read(prompt, words):
    one = engine()
    with pytest.raises(ValueError, match=words):
        one.add(prompt, params())
    assert one.step() is None and one.free == 64
    if len(prompt) < 505:
        with pytest.raises(ValueError, match=words):
            one.hold(prompt)
    one.add([1] * 504, params(max_new_tokens=8))  # exactly the limit


@pytest.mark.parametrize(
    "seeds, words",
    [
        ([1], "seeds: 1 given for 2 traces"),
        ([], "seeds: 0 given"),
        ([1, 2, 3], "seeds: 3 given"),
        ([1, -1], "seed is -1, expected"),
        ([1, 2**63], f"seed is {2**63}"),
        ([1, None], "seeds: expected integers, found None"),
        ([1, True], "seed is True"),
    ],
)
def test_seeds_of_wrong_number_or_value(seeds, words):
    one = engine()
    with pytest.raises(ValueError, match=words):
        one.add(PROMPT, params(n=2, temperature=1.0), seeds=seeds)
    assert one.step() is None
    assert one.add(PROMPT, params(n=2), seeds=(0, 2**63 - 1)) == [0, 1]


def test_seeds_that_are_given_take_the_place_of_derived_ones():
    one = engine()
    numbers = one.add(PROMPT, params(n=3, temperature=1.0, seed=1), seeds=[40, 7, 40])
    list(one)
    outs = [one.output(number) for number in numbers]
    assert [out.seed for out in outs] == [40, 7, 40]
    for out in outs:
        alone = generate(tiny_model(), [PROMPT], params(temperature=1.0, seed=out.seed))
        assert out.tokens.equal(alone.sequences[0])


@pytest.mark.parametrize("way", [{"stop": "x"}, {"thinking_budget": 3}])
def test_text_needs_a_tokenizer(way):
    one = engine()
    with pytest.raises(ValueError, match=f"{next(iter(way))}: needs a tokenizer"):
        one.add(PROMPT, params(**way))
    assert one.step() is None


def test_unknown_traces_and_prompts():
    one = engine()
    known, other = one.add(PROMPT, params(n=2))
    for call in (one.output, one.pop, lambda number: one.end([known, number], "x")):
        with pytest.raises(ValueError, match="trace 7 is not known to the engine"):
            call(7)
    assert one.output(known).reason == "waiting", "none is ended when one is unknown"
    with pytest.raises(ValueError, match="prompt: is not held"):
        one.release(PROMPT)
    with pytest.raises(ValueError, match="prompt: is not held"):
        one.release([1, 2, 3])
    for reason in ("waiting", "running"):
        with pytest.raises(ValueError, match=f"reason is {reason!r}"):
            one.end([known], reason)
    with pytest.raises(ValueError, match=f"trace {known} is waiting: end it first"):
        one.pop(known)
    one.step()
    with pytest.raises(ValueError, match=f"trace {known} is running: end it first"):
        one.pop(known)
    one.end(iter([known]), "enough")
    assert one.pop(known).reason == "enough" and len(one.output(other).tokens) == 1
    with pytest.raises(ValueError, match="not known"):
        one.pop(known)
    list(one)
    one.end([other], "late")
    assert one.pop(other).reason == "length"


def test_a_budget_too_small_says_what_a_trace_takes():
    config = FalconH1Config.preset("falcon-h1r-7b")
    model = SimpleNamespace(
        config=config,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        eos_token_ids=config.eos_token_id,
    )
    small = Engine(model, memory_budget=100 * 2**20)
    with pytest.raises(ValueError) as caught:
        small.add([1] * 100, params(max_new_tokens=1000))
    text = str(caught.value)
    assert text.startswith("memory_budget is 100 MiB: a trace of 100 tokens + max_new_tokens 1000")
    assert "of state" in text and "of keys and values" in text and "132" in text
    assert small.step() is None
    fixed = Engine(model, max_rows=4, memory_budget=600 * 2**20, fixed_width=True)
    with pytest.raises(ValueError, match=r"MiB for each of 5 rows \(132"):
        fixed.add([1] * 100, params(max_new_tokens=1000))
    plan = Engine(model, memory_budget=2**30).plan(1100)
    assert plan.limit == "memory_budget" and f"{plan.state_bytes / 2**20:.4g}".startswith("132")
    assert plan.rows == 2**30 // plan.row_bytes > 3


def test_a_graph_that_cannot_be_made_is_refused_at_once(monkeypatch):
    def none():
        raise ValueError("compiling needs a C++ compiler")

    monkeypatch.setattr(engine_module, "require_compiler", none)
    with pytest.raises(ValueError, match="needs a C"):
        engine(graph=True)
    engine()
    engine(graph=False)
    assert callable(require_compiler)


# Interruption


class Interrupting(MemoryModel):
    """Raises at one of its calls."""

    def __init__(self, at: int, error: BaseException):
        super().__init__()
        self.at, self.error = at, error

    def _read(self, *args):
        self.at -= 1
        if self.at == 0:
            raise self.error
        return super()._read(*args)


@pytest.mark.parametrize("at", range(1, 12))
def test_an_interrupted_step_leaves_the_outputs(at):
    """In a prefill or a decode; every trace can still be ended and taken."""
    one = Engine(Interrupting(at, KeyboardInterrupt()), max_rows=2, prefill_chunk=4)
    asked = {}
    for length in (3, 6, 2):
        prompt = list(range(length))
        for number in one.add(prompt, params(n=3, max_new_tokens=3)):
            asked[number] = (prompt, 3)
    told = {number: [] for number in asked}
    with pytest.raises(KeyboardInterrupt):
        for step in one:
            for number, token in zip(step.traces.tolist(), step.tokens.tolist()):
                told[number].append(token)
    for number, (prompt, new) in asked.items():
        assert one.output(number).tokens.tolist() == told[number]
        assert told[number] == said(prompt, new)[: len(told[number])]
    with pytest.raises(RuntimeError, match="interrupted within a step"):
        one.step()
    one.end(list(asked), "interrupted")
    for number in asked:
        out = one.pop(number)
        assert out.reason == ("length" if len(told[number]) == 3 else "interrupted")


def test_a_real_model_interrupted_from_a_hook():
    model = make_model(make_config("two_groups"))
    one = Engine(model, TOKENIZER.__class__(build_backend()), max_rows=3)
    numbers = one.add(PROMPT, params(n=4, logprobs=True))
    for _ in range(3):
        one.step()
    before = [one.output(number) for number in numbers]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model["layers"][1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.step()
    hook.remove()
    for number, out in zip(numbers, before):
        after = one.output(number)
        assert after.tokens.equal(out.tokens) and after.logprobs.equal(out.logprobs)
        assert after.text == out.text and after.reason == out.reason
    with pytest.raises(RuntimeError, match="cannot go on"):
        one.step()


@pytest.mark.parametrize("count", range(1, 12))
def test_an_interruption_among_the_new_tokens(monkeypatch, count):
    """Each output is that before the step or that after it."""
    from falcon_h1r.generation import engine as module

    one = engine(max_rows=4)
    numbers = one.add(PROMPT, params(n=4, logprobs=True, temperature=1.0, seed=1))
    whole = generate(tiny_model(), [PROMPT], params(n=4, logprobs=True, temperature=1.0, seed=1))
    real, calls = module.settle, []

    def settle(*args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "settle", settle)
    with pytest.raises(KeyboardInterrupt):
        list(one)
    lengths = []
    for number, sequence in zip(numbers, whole.sequences):
        out = one.output(number)
        lengths.append(len(out.tokens))
        assert out.tokens.equal(sequence[: len(out.tokens)])
        assert len(out.logprobs) == len(out.tokens)
    assert max(lengths) - min(lengths) <= 1


def test_logits_that_are_not_finite():
    """The step raises, naming the row and the token; what was said before stays."""

    class Broken(MemoryModel):
        def _read(self, ids, *args):
            logits = super()._read(ids, *args)
            if len(ids) > 1 and len(self.widths) == 3:
                logits[1] = torch.nan
            return logits

    one = Engine(Broken(), max_rows=3)
    numbers = one.add([1, 2], params(n=3))
    for _ in range(3):
        one.step()
    with pytest.raises(ValueError, match="row 1, new token 3: the model's logits are not finite"):
        one.step()
    for number in numbers:
        assert one.output(number).tokens.tolist() == said([1, 2], 3)
    with pytest.raises(RuntimeError):
        one.step()


# What a step reads back


class Reads(TorchDispatchMode):
    """Counts single numbers read from tensors, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [{}, {"top_p": 0.9, "logprobs": 4, "frequency_penalty": 0.5}])
def test_what_a_step_reads_back_does_not_grow_with_rows(way, monkeypatch):
    counts = []
    for rows in (2, 9, 40):
        one = engine(max_rows=rows)
        one.add(PROMPT, params(n=rows, temperature=1.0, seed=1, **way))
        one.step()
        reads = 0
        for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "numpy"):
            real = getattr(torch.Tensor, name)

            def counted(tensor, *args, real=real):
                nonlocal reads
                reads += 1
                return real(tensor, *args)

            monkeypatch.setattr(torch.Tensor, name, counted)
        with Reads() as mode:
            step = one.step()
        monkeypatch.undo()
        assert len(step.traces) == rows
        counts.append((reads, mode.count))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] < 12

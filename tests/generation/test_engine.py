"""What a trace of a crowd says is what it says alone, by `generate`, on models where it matters.

Tokens are compared where rounding cannot reach them: in float64, where two ways to sum differ by
1e-15 of a logit and a draw lies that near to the border of two tokens about once in 1e13 times. In
narrower dtypes a draw may fall to the other side; there log-probabilities are compared with float64
ones of the same tokens, and tokens with what the sampler chooses from the engine's own logits.
"""

import functools
from pathlib import Path

import pytest
import torch
from models import load, make_config, make_model, random_ids, rms_error, same_weights
from tiny_text import VOCAB_SIZE, build_backend

from falcon_h1r.generation import Engine, SamplingParams, generate
from falcon_h1r.generation.sampling import Sampler
from falcon_h1r.ops import REFERENCE
from falcon_h1r.text import Tokenizer

TOKENIZER = Tokenizer(build_backend())
PICO = Path(__file__).resolve().parent.parent.parent / "falcon_h1r" / "assets" / "h1r-pico"
VARIANTS = ("two_groups", "all_biases", "finite_dt_limit", "norm_before_gate", "h1r_like")
OPEN = TOKENIZER.encode("a <think>")
LENGTHS = (5, 1, 17, 9, 30, 4, 12)


@functools.cache
def exact(variant: str):
    config = make_config(variant, vocab_size=VOCAB_SIZE)
    return make_model(config, dtype=torch.float64)


def prompt(length: int) -> list[int]:
    """Random ids; no two alike."""
    return random_ids(make_config(vocab_size=VOCAB_SIZE), length, seed=length).tolist()


def crowd() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, each with another way to choose and to stop."""
    hot = {"temperature": 1.0, "n": 3}
    ways = [
        {"max_new_tokens": 18, "logprobs": True},
        {**hot, "top_k": 12, "seed": 3, "max_new_tokens": 31, "logprobs": 4},
        {**hot, "top_p": 0.9, "seed": 2**63 - 2, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 17))},
        {**hot, "temperature": 1.7, "min_p": 0.02, "seed": 11, "max_new_tokens": 1},
        {"repetition_penalty": 1.4, "presence_penalty": 0.6, "n": 2, "logprobs": 0},
        {**hot, "frequency_penalty": 0.7, "seed": 5, "stop": ("a", "e", "1")},
        {**hot, "thinking_budget": 4, "seed": 6, "max_new_tokens": 20, "logprobs": 2},
        {**hot, "n": 1, "repetition_penalty": 0.8, "top_p": 0.5, "seed": 9, "stop": ("zz",)},
    ]
    defaults = {"max_new_tokens": 24, "stop_token_ids": ()}
    prompts = [*map(prompt, LENGTHS[:6]), [*prompt(7), *OPEN], prompt(12)]
    return [(ids, SamplingParams(**{**defaults, **way})) for ids, way in zip(prompts, ways)]


@functools.cache
def alone(variant: str) -> list:
    """For each prompt of the crowd, each of its traces by itself."""
    out = []
    for ids, how in crowd():
        outs = []
        for k in range(how.n):
            seed = None if how.seed is None else (how.seed + k) % 2**63
            single = SamplingParams(**{**vars(how), "n": 1, "seed": seed})
            outs.append(generate(exact(variant), [ids], single, tokenizer=TOKENIZER))
        out.append(outs)
    return out


def collected(steps, number: int):
    """A trace's (tokens, log-probabilities, top ids, top log-probabilities, text) by the steps."""
    parts = []
    for step in steps:
        for row in (step.traces == number).nonzero()[:, 0].tolist():
            values = (step.tokens, step.logprobs, step.top_ids, step.top_logprobs)
            values = [None if v is None else v[row] for v in values]
            parts.append((*values, step.text.get(number, "")))
    return parts


def check(variant: str, engine: Engine, order=None):
    numbers = {}
    asked = crowd()
    for i in range(len(asked)) if order is None else order:
        ids, how = asked[i]
        numbers[i] = engine.add(ids, how)
    steps = list(engine)
    reasons = set()
    for i, (ids, how) in enumerate(asked):
        for number, expected in zip(numbers[i], alone(variant)[i]):
            out = engine.output(number)
            assert out.tokens.tolist() == expected.sequences[0].tolist(), (i, number)
            assert out.reason == expected.finish_reasons[0] and out.text == expected.texts[0]
            assert out.prompt_tokens == len(ids) and out.tokens.dtype == torch.int64
            assert how.seed is None or out.seed == expected.seeds[0]
            reasons.add(out.reason)
            parts = collected(steps, number)
            assert [int(part[0]) for part in parts] == out.tokens.tolist()
            assert "".join(part[4] for part in parts) == out.text
            if not how.wants_logprobs:
                assert out.logprobs is None
                continue
            close = {"rtol": 0, "atol": 1e-12}
            torch.testing.assert_close(out.logprobs, expected.logprobs[0], **close)
            found = torch.stack([part[1] for part in parts])
            assert torch.equal(found, out.logprobs)
            if how.alternatives:
                ids_tk, values_tk = expected.top_logprobs[0]
                k = how.alternatives
                assert torch.stack([part[2][:k] for part in parts]).equal(ids_tk)
                found = torch.stack([part[3][:k] for part in parts])
                torch.testing.assert_close(found, values_tk, **close)
    return steps, reasons


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trace_of_a_crowd_is_what_it_is_alone(variant):
    steps, reasons = check(variant, Engine(exact(variant), TOKENIZER, prefill_chunk=None))
    assert max(len(step.traces) for step in steps) >= 14
    assert reasons >= {"stop_string", "length"} | ({"stop"} if variant == "two_groups" else set())


FORMS = [
    {"max_rows": 1},
    {"max_rows": 5, "prefill_chunk": 3},
    {"max_rows": 7, "prefill_chunk": 1, "fixed_width": True},
    {"max_rows": 20, "memory_budget": 900_000, "prefill_chunk": 4},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_also_in_few_rows_and_in_any_order_of_admission(options):
    order = torch.randperm(len(crowd())).tolist()
    check("two_groups", Engine(exact("two_groups"), TOKENIZER, **options), order)


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_also_in_few_rows_for_every_variant(variant, options):
    check(variant, Engine(exact(variant), TOKENIZER, **options))


def test_traces_come_and_go_between_steps():
    """Added, ended, held and forgotten while others run."""
    engine = Engine(exact("two_groups"), TOKENIZER, max_rows=6)
    asked, numbers, ended = crowd(), {}, {}
    engine.hold(asked[2][0])
    for turn in range(200):
        if turn % 3 == 0 and turn // 3 < len(asked):
            numbers[turn // 3] = engine.add(*asked[turn // 3])
        step = engine.step()
        if step is not None and len(step.traces) > 2 and turn % 4 == 0:
            number = int(step.traces[1])
            engine.end([number], "cut")
            engine.end([number], "again")  # has ended: as before
            if number not in step.finished:
                ended[number] = engine.pop(number)
                assert ended[number].reason == "cut"
    assert engine.step() is None and len(ended) > 3
    for i in range(len(asked)):
        for number, expected in zip(numbers[i], alone("two_groups")[i]):
            whole, cut = expected.sequences[0].tolist(), ended.get(number)
            if cut is None:
                assert engine.pop(number).tokens.tolist() == whole
            else:
                said = cut.tokens.tolist()
                assert said == whole[: len(said)]
                # All of what its tokens say, also what was held back for a stop string.
                assert cut.text == TOKENIZER.decode(said)
    assert not engine._traces


@functools.cache
def pico():
    from falcon_h1r.text import load_tokenizer

    tokenizer = load_tokenizer(PICO)
    questions = ("What is 47+25-8?", "What is 9-3?", "What is 123+45-67+8?")
    prompts = []
    for question in questions:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        prompts.append(tokenizer.encode(text))
    return load(PICO, dtype=torch.float64), tokenizer, prompts


ASK = SamplingParams(max_new_tokens=48, temperature=0.8, top_p=0.95, seed=5, n=4, logprobs=20)


def test_h1r_pico_in_float64_says_the_same():
    model, tokenizer, prompts = pico()
    engine = Engine(model, tokenizer, max_rows=7)
    numbers = [engine.add(ids, ASK) for ids in prompts]
    list(engine)
    for ids, found in zip(prompts, numbers):
        expected = generate(model, [ids], ASK, tokenizer=tokenizer)
        outs = [engine.output(number) for number in found]
        assert [out.tokens.tolist() for out in outs] == [s.tolist() for s in expected.sequences]
        assert [out.text for out in outs] == expected.texts
        assert [out.reason for out in outs] == expected.finish_reasons


class Recorder(Engine):
    """Keeps the logits that tokens were chosen from, by trace."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logits = {}

    def _choose(self, logits_rv):
        rows = [trace.number for trace in self._rows]
        for number, row in zip(rows, logits_rv.clone()):
            self.logits.setdefault(number, []).append(row)
        return super()._choose(logits_rv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"max_rows": 12}, {"max_rows": 5, "fixed_width": True}], ids=str
)
def test_h1r_pico_in_narrow_dtypes(dtype, options):
    """Choices in bits, log-probabilities as near to float64 as those of `generate` for one trace.

    The rule: at most twice the error of the same maths in that dtype, here of generate() over
    its own tokens.
    """
    truth, tokenizer, prompts = pico()
    model = same_weights(truth, dtype=dtype)
    engine = Recorder(model, tokenizer, **options)
    numbers = [engine.add(ids, ASK) for ids in prompts]
    list(engine)
    found, expected, own, own_expected = [], [], [], []
    for ids, traces in zip(prompts, numbers):
        for k, number in enumerate(traces):
            out = engine.output(number)
            assert out.logprobs.dtype == torch.float32
            single = SamplingParams(**{**vars(ASK), "n": 1})
            sampler = Sampler(
                [single], [5 + k], [torch.tensor(ids)], model.config.vocab_size, "cpu"
            )
            for at, (logits, token) in enumerate(zip(engine.logits[number], out.tokens.tolist())):
                choice = sampler.choose(logits[None], at)[1]
                assert int(choice.tokens[0]) == token
                assert torch.equal(choice.logprobs[0], out.logprobs[at])
            found.append(out.logprobs)
            expected.append(forced(truth, ids, out.tokens))
        run = generate(model, [ids], SamplingParams(**{**vars(ASK), "n": 1}), tokenizer=tokenizer)
        own.append(run.logprobs[0])
        own_expected.append(forced(truth, ids, run.sequences[0]))
    allowed = 2 * (torch.cat(own).double() - torch.cat(own_expected)).square().mean().sqrt()
    error = (torch.cat(found).double() - torch.cat(expected)).square().mean().sqrt()
    assert 0 < error <= allowed


@torch.no_grad()
def forced(model, ids, tokens):
    """Log-probabilities of tokens behind a prompt, by one whole forward."""
    whole = torch.cat([torch.tensor(ids), tokens])[None]
    logits = model(whole[:, :-1])[0, len(ids) - 1 :]
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_full_forwards(variant):
    """Another truth than generate(): no cache, the reference operators, float64."""
    model = exact(variant)
    reference = same_weights(model, ops=REFERENCE)
    engine = Engine(model, prefill_chunk=3, max_rows=4)
    numbers = [
        engine.add(prompt(n), SamplingParams(temperature=1.0, seed=n, n=2, logprobs=5))
        for n in LENGTHS[:3]
    ]
    for step in engine:
        if len(step.traces) and int(step.positions.min()) > 12:
            break
    for n, traces in zip(LENGTHS, numbers):
        for number in traces:
            out = engine.output(number)
            if len(out.tokens):
                expected = forced(reference, prompt(n), out.tokens)
                assert rms_error(out.logprobs, expected) < 1e-12
                assert (out.logprobs - expected).abs().max() < 1e-11


def test_a_step_reports_what_those_who_run_asked_for():
    engine = Engine(exact("two_groups"), max_rows=3)
    for new, logprobs in ((6, False), (4, 3), (2, 9)):
        how = SamplingParams(max_new_tokens=new, logprobs=logprobs, stop_token_ids=())
        engine.add(prompt(5), how)
    shapes = [None if s.logprobs is None else tuple(s.top_ids.shape) for s in engine]
    assert shapes == [(3, 9), (3, 9), (2, 3), (2, 3), None, None]


@pytest.mark.parametrize("part", [1, 3 * VOCAB_SIZE])
def test_draws_in_parts_are_the_draws(part, monkeypatch):
    """A CPU draws some rows at a time; here few are enough for several parts."""
    alone("two_groups")
    monkeypatch.setattr("falcon_h1r.generation.sampling._PART", part)
    check("two_groups", Engine(exact("two_groups"), TOKENIZER))

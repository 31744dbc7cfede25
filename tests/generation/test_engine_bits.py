"""What of a step holds in bits, what to rounding, and that nobody reads another's rows.

In bits on every machine, by construction: the choice of a token from its logits (`test_sampling_*`,
`test_engine.py`). In bits where a library sums a row by the shapes of a product and not by what
stands in other rows: logits of one width and row, whoever the neighbours are, whatever they hold,
however long they are (seen on AMD EPYC, two cores, torch 2.13, MKL and oneDNN). Between rows and
widths sums may be split otherwise: float64 shows that nothing else differs.
"""

import pytest
import torch
from compiler import needs_compiler
from memory_model import garble_free_rows
from models import make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r.cache import Span
from falcon_h1r.cpu import CompiledStep
from falcon_h1r.cpu.compiled import ROOM
from falcon_h1r.cpu.onednn import unusable, use_onednn
from falcon_h1r.generation import Engine, SamplingParams
from falcon_h1r.generation import engine as engine_module
from falcon_h1r.generation.graph import DecodeStep
from falcon_h1r.ops import REFERENCE, TORCH

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(make_config(), length, seed=100 * seed + length).tolist()


class Recorder(Engine):
    """Keeps the logits of each trace's tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logits = {}

    def _choose(self, logits_rv):
        for trace, row in zip(self._rows, logits_rv.clone()):
            self.logits.setdefault(trace.number, []).append(row)
        return super()._choose(logits_rv)


def followed(model, ask, before=(), behind=(), garble=False, **options):
    """The logits (tokens, vocab) of one trace among others, and all it said."""
    engine = Recorder(model, **{"max_rows": 4, **options})
    for ids, how in before:
        engine.add(ids, how)
    (number,) = engine.add(*ask)
    for ids, how in behind:
        engine.add(ids, how)
    for _ in engine:
        if garble:
            garble_free_rows(engine)
    return torch.stack(engine.logits[number]), engine.output(number)


def others(new: int, length: int, seed: int, temperature=1.0):
    how = SamplingParams(
        max_new_tokens=new, temperature=temperature, seed=seed, stop_token_ids=(), n=1
    )
    return prompt(length, seed), how


ONE = (prompt(9), SamplingParams(max_new_tokens=14, temperature=0.8, seed=3, stop_token_ids=()))


@pytest.mark.parametrize(
    ("dtype", "prepared"),  # oneDNN has no float64
    [(torch.float64, False)]
    + [
        (dtype, prepared) for dtype in (torch.float32, torch.bfloat16) for prepared in (False, True)
    ],
)
@pytest.mark.parametrize("table", [TORCH, REFERENCE])
def test_neighbours_do_not_reach_a_row_of_one_width(table, dtype, prepared):
    """Bits: other prompts, seeds, ways to choose, and lengths, in the same number of rows."""
    model = make_model(make_config("all_biases"), ops=table, dtype=dtype)
    if prepared:
        if reason := unusable(model):
            pytest.skip(reason)
        use_onednn(model)
    crowds = [  # one is there before, two come after; all stay longer
        ([others(20, 4, 1)], [others(20, 9, 2), others(20, 5, 3)]),
        ([others(20, 60, 4)], [others(20, 1, 5), others(20, 33, 6, temperature=0.0)]),
        ([others(80, 100, 7)], [others(80, 290, 8), others(20, 110, 9)]),
    ]
    runs = [followed(model, ONE, *crowd) for crowd in crowds]
    for logits, out in runs[1:]:
        assert torch.equal(logits, runs[0][0])
        assert out.tokens.equal(runs[0][1].tokens)


@pytest.mark.parametrize("table", [TORCH, REFERENCE])
@pytest.mark.parametrize("variant", ["two_groups", "finite_dt_limit", "norm_before_gate"])
def test_rows_and_widths_matter_by_rounding_only(variant, table):
    model = make_model(make_config(variant), ops=table, dtype=torch.float64)
    runs = [followed(model, ONE, max_rows=1)[0]]
    for before in range(6):
        crowd = [others(4 + 5 * i, 3 + 7 * i, i) for i in range(before)]
        runs.append(followed(model, ONE, crowd, crowd, max_rows=7)[0])
        runs.append(followed(model, ONE, crowd, max_rows=6, fixed_width=True)[0])
    runs.append(followed(model, ONE, prefill_chunk=2)[0])
    for logits in runs[1:]:
        assert rms_error(logits, runs[0]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_narrow_dtypes_other_rows_and_widths_are_as_near_the_truth(dtype):
    """Over the same tokens: at most twice the error of the trace alone."""
    exact = make_model(make_config("two_groups"), dtype=torch.float64)
    model = same_weights(exact, dtype=dtype)
    ids, tokens = torch.tensor(prompt(9)), random_ids(model.config, 14, seed=8)

    def forced(model, width, row):
        """Logits of a row that is fed these tokens, among rows fed others."""
        cache = model.new_cache(width, 64)
        fed = random_ids(model.config, width, 14, seed=width)
        fed[row] = tokens
        work, out = torch.promote_types(model.dtype, torch.float32), []
        with torch.no_grad():
            model(ids.expand(width, -1), cache=cache, logits_to_keep=1)
            for column in fed.T:
                total = int(cache.lengths.max()) + 1
                span = Span.step(model.config, cache.lengths.clone(), total, work)
                x_bld = model.run(model.embed(column[:, None]), span, cache)
                out.append(model.logits(x_bld)[row, -1])
                cache.lengths += 1
        return torch.stack(out)

    truth = forced(exact, 1, 0)
    allowed = 2 * rms_error(forced(model, 1, 0), truth)
    for width, row in ((2, 1), (5, 0), (5, 4), (33, 32), (64, 0)):
        assert rms_error(forced(model, width, row), truth) <= allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fixed_width_gives_the_same_bits_in_the_same_row(dtype):
    """Whoever else runs, also if nobody does, and whatever an empty row holds."""
    model = make_model(make_config("two_groups"), dtype=dtype)
    options = {"max_rows": 5, "fixed_width": True}
    alone = followed(model, ONE, **options)[0]
    crowds = [[others(3, 9, 1)], [others(30, 2, 1), others(2, 50, 2), others(9, 8, 3)]]
    for crowd in crowds:
        for garble in (False, True):
            logits = followed(model, ONE, (), crowd, garble, **options)[0]
            assert torch.equal(logits, alone)


@pytest.mark.parametrize("options", [{}, {"fixed_width": True}], ids=str)
@pytest.mark.parametrize("variant", ["two_groups", "h1r_like"])
def test_what_stands_in_free_rows_and_behind_keys_is_not_read(variant, options):
    """NaN in states and windows where nobody is; finite rubbish behind the keys of the others."""
    model = make_model(make_config(variant), dtype=torch.float64)
    asked = [others(3 + 4 * (i % 3), 5 + 6 * i, i) for i in range(6)]
    said = []
    for garble in (False, True):
        engine = Engine(model, max_rows=3, prefill_chunk=4, **options)
        numbers = [engine.add(*ask)[0] for ask in asked]
        for _ in engine:
            if garble:
                garble_free_rows(engine)
        said.append([engine.output(number).tokens.tolist() for number in numbers])
    assert said[0] == said[1]


# As one graph


class Replayed:
    def __init__(self, step):
        self.replay = lambda: step._logits.copy_(step._step())


@pytest.fixture
def no_gpu(monkeypatch):
    """A captured step without a GPU: what was captured is called again."""
    monkeypatch.setattr(DecodeStep, "_on_a_side_stream", DecodeStep._step)
    monkeypatch.setattr(
        DecodeStep, "_capture", lambda step: setattr(step, "_graph", Replayed(step))
    )


def mixed(engine):
    """Traces that leave, wait, and need a larger cache."""
    numbers = []
    for i, (new, length) in enumerate([(3, 5), (20, 9), (7, 40), (60, 30), (2, 3), (9, 1), (9, 1)]):
        how = SamplingParams(
            max_new_tokens=new, temperature=1.0, seed=i, n=1 + i % 3, stop_token_ids=(), logprobs=2
        )
        numbers += engine.add(prompt(length), how)
    list(engine)
    return [engine.pop(number) for number in numbers]


def agree(found, expected, tolerance):
    for out, other in zip(found, expected):
        assert out.tokens.tolist() == other.tokens.tolist() and out.reason == other.reason
        torch.testing.assert_close(out.logprobs, other.logprobs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"fixed_width": True}, {"max_rows": 3}], ids=str)
def test_captured_steps_say_the_same(no_gpu, options):
    model = make_model(make_config("all_biases"), dtype=torch.float64)
    options = {"max_rows": 6, "prefill_chunk": 7, **options}
    engine = Engine(model, **options)
    engine._form = DecodeStep  # as on a GPU
    agree(mixed(engine), mixed(Engine(model, max_rows=1)), 1e-11)
    assert all(isinstance(form, DecodeStep) for form in engine._slots.forms.values())
    widths = set(engine._slots.forms)
    assert widths <= ({6} if "fixed_width" in options else {1, 2, 3, 4, 6})


class Uncompiled:
    """In place of CompiledStep: its calls, and what it needs of them to compile one graph."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache

    @torch.no_grad()
    def __call__(self, tokens_b, span):
        assert span.total % ROOM == 0 and span.total < self.cache.max_length
        assert span.past_b.tolist() == self.cache.lengths.tolist()
        model = self.model
        logits = model.logits(model.run(model.embed(tokens_b[:, None]), span, self.cache))[:, -1]
        self.cache.lengths += 1
        return logits


@pytest.mark.parametrize("options", [{}, {"fixed_width": True}, {"max_rows": 3}], ids=str)
def test_what_a_compiled_step_is_called_with(monkeypatch, options):
    monkeypatch.setattr(engine_module, "CompiledStep", Uncompiled)
    monkeypatch.setattr(engine_module, "require_compiler", lambda: None)
    model = make_model(make_config("all_biases"), dtype=torch.float64)
    options = {"max_rows": 6, "prefill_chunk": 7, **options}
    engine = Engine(model, graph=True, **options)
    agree(mixed(engine), mixed(Engine(model, max_rows=1)), 1e-11)
    widths = set(engine._slots.forms)
    assert widths <= ({6} if "fixed_width" in options else {1, 3, 4, 6})


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True])
def test_compiled_steps_say_the_same(prepared):
    torch._dynamo.reset()
    dtype = torch.float32 if prepared else torch.float64
    model = make_model(make_config("two_groups"), dtype=dtype)
    if prepared and (reason := unusable(model)):
        pytest.skip(reason)
    expected = mixed(Engine(make_model(make_config("two_groups"), dtype=torch.float64)))
    if prepared:
        use_onednn(model, stream=True)
    engine = Engine(model, max_rows=4, graph=True)
    found = mixed(engine)
    assert all(isinstance(form, CompiledStep) for form in engine._slots.forms.values())
    assert set(engine._slots.forms) <= {1, 2, 3, 4}
    if not prepared:
        agree(found, expected, 1e-11)
        return
    # In float32 a draw may fall to the other side of a border; what it said until then agrees.
    pairs = [(out, other) for out, other in zip(found, expected) if out.tokens.equal(other.tokens)]
    assert len(pairs) > len(found) - 2
    for out, other in pairs:
        assert (out.logprobs - other.logprobs).abs().max() < 1e-4


@needs_gpu
def test_on_a_gpu_steps_are_captured_and_say_the_same():
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    expected = mixed(Engine(model, max_rows=1))
    engine = Engine(model.to("cuda"), max_rows=6)
    found = mixed(engine)
    assert all(isinstance(form, DecodeStep) for form in engine._slots.forms.values())
    agree(found, expected, 1e-8)

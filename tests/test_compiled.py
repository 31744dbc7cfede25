"""Compiled decode steps and prefill: the model's own, one graph for all layers and lengths.

Truth is the float64 forward. Expected errors are those of the same model, not compiled.
"""

import itertools

import pytest
import torch
from compiler import needs_compiler
from models import VARIANTS, make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r import SamplingParams, generate
from falcon_h1r.cache import Span
from falcon_h1r.cpu import CompiledPrefill, CompiledStep
from falcon_h1r.cpu.onednn import streamed_linear, unusable, use_onednn
from falcon_h1r.ops import REFERENCE

STEPS = 5
LENGTHS = {1: (6,), 2: (6, 6), 3: (7, 4, 1), 9: (3,) * 9, 17: (5, 3) + (2,) * 15}  # by rows
pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def skip_without_onednn(model):
    if reason := unusable(model):
        pytest.skip(reason)


def streamed(variant="two_groups"):
    """A model, and the same prepared for compiled steps."""
    model = make_model(make_config(variant))
    skip_without_onednn(model)
    return model, use_onednn(same_weights(model), stream=True)


def filled(model, lengths):
    """A cache behind prompts of these lengths, with room for the steps."""
    ids = random_ids(model.config, len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache = model.new_cache(len(lengths), max(lengths) + STEPS + 1)
    model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)
    return cache


def steps(model, lengths, form=None):
    """Logits of STEPS tokens for each row, and the cache; form: a class of steps."""
    cache = filled(model, lengths)
    step = None if form is None else form(model, cache)
    out = []
    for i in range(STEPS):
        tokens = random_ids(model.config, len(lengths), seed=i)
        if step is None:
            out.append(model(tokens[:, None], cache=cache)[:, -1])
        else:
            out.append(step(tokens))
    return torch.stack(out), cache


def check(variant, dtype, rows):
    model = make_model(make_config(variant), dtype=dtype)
    skip_without_onednn(model)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)
    truth, true_cache = steps(exact, LENGTHS[rows])
    plain, plain_cache = steps(model, LENGTHS[rows])
    found, cache = steps(use_onednn(same_weights(model), stream=True), LENGTHS[rows], CompiledStep)
    assert found.dtype == torch.float32 and graphs() == 2
    assert rms_error(found, truth) <= 2 * rms_error(plain, truth)
    assert cache.lengths.tolist() == true_cache.lengths.tolist()
    for name in ("keys", "values", "windows", "states"):
        true, there = (getattr(one, name) for one in (true_cache, plain_cache))
        assert rms_error(getattr(cache, name), true) <= 2 * rms_error(there, true), name


@pytest.mark.parametrize(
    "variant, dtype, rows",
    [
        ("h1r_like", torch.float32, 1),
        ("two_groups", torch.float32, 17),
        ("all_biases", torch.bfloat16, 3),
    ],
)
@torch.no_grad()
def test_steps_are_as_near_the_truth_as_uncompiled_ones(variant, dtype, rows):
    """One row streams its weights; others are products of a library."""
    check(variant, dtype, rows)


CASES = list(
    zip(VARIANTS, itertools.cycle((torch.bfloat16, torch.float32)), itertools.cycle((3, 9, 1, 17)))
)


@pytest.mark.slow
@pytest.mark.parametrize("variant, dtype, rows", CASES)
@torch.no_grad()
def test_steps_of_every_variant(variant, dtype, rows):
    check(variant, dtype, rows)


PIECES = (19, 24, 17, 5, 33)  # of a prompt: whole chunks and others, and too few to compile


def pieces_read(model, read, rows=1, room=1):
    """Logits at every position of a prompt read in pieces, and the cache."""
    cache = model.new_cache(rows, sum(PIECES) + room)
    ids = random_ids(model.config, rows, sum(PIECES)).split(PIECES, dim=1)
    return torch.cat([read(piece, None, cache) for piece in ids], dim=1), cache


def check_prefill(variant, dtype, rows=1):
    model = make_model(make_config(variant), dtype=dtype)
    skip_without_onednn(model)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)
    truth, true_cache = pieces_read(exact, exact, rows)
    plain, plain_cache = pieces_read(model, model, rows)
    fast = use_onednn(same_weights(model), stream=True)
    found, cache = pieces_read(fast, CompiledPrefill(fast), rows)
    assert graphs() == 2  # an empty cache, and behind other tokens
    assert found.dtype == torch.float32 and rms_error(found, truth) <= 2 * rms_error(plain, truth)
    assert cache.lengths.tolist() == true_cache.lengths.tolist()
    for name in ("keys", "values", "windows", "states"):
        true, there = (getattr(one, name) for one in (true_cache, plain_cache))
        assert rms_error(getattr(cache, name), true) <= 2 * rms_error(there, true), name


@torch.no_grad()
def test_prefill_is_as_near_the_truth_as_uncompiled():
    """A prompt in pieces of several lengths, behind none and some: no length compiles again."""
    check_prefill("two_groups", torch.float32, rows=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, dtype",  # in turns: each compiles for ten seconds
    list(zip(VARIANTS, itertools.cycle([torch.float32, torch.bfloat16]))),
    ids=str,
)
@torch.no_grad()
def test_prefill_of_every_variant(variant, dtype):
    check_prefill(variant, dtype)


@torch.no_grad()
def test_prefill_that_is_not_compiled():
    """Padding, rows of several depths, few tokens, one token before, a full cache, none: as is."""
    model = make_model(make_config("two_groups"))
    read = CompiledPrefill(model)
    ids, mask = random_ids(model.config, 2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, 15:] = 0
    for lengths, given, size in (
        ((0, 0), mask, 40),
        ((3, 5), None, 40),
        ((1, 1), None, 40),
        ((2, 2), None, 22),
        ((0, 0), None, 20),
    ):
        caches = [model.new_cache(2, size) for _ in range(2)]
        for cache in caches:
            cache.lengths += torch.tensor(lengths)
        assert torch.equal(read(ids, given, caches[0]), model(ids, given, caches[1])), lengths
        assert torch.equal(caches[0].states, caches[1].states)
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert torch.equal(read(ids, None, None, 1), model(ids, logits_to_keep=1))
    assert torch.equal(read(ids[:, :8], None, model.new_cache(2, 40)), model(ids[:, :8]))
    assert graphs() == 0
    with pytest.raises(ValueError, match="cache full"):
        read(ids, None, model.new_cache(2, 19))


@torch.no_grad()
def test_float64_without_onednn():
    """Linear layers that are not prepared stay calls; in float64 only the order of sums differs."""
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    expected, plain = steps(model, LENGTHS[3])
    found, cache = steps(model, LENGTHS[3], CompiledStep)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(cache.states, plain.states, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_one_graph_for_all_layers_lengths_and_caches():
    """From the first token of all until a cache is full, then the same in a larger one."""
    model, fast = streamed("no_gated_norm")
    for size in (9, 30):
        caches = model.new_cache(1, size), fast.new_cache(1, size)
        step = CompiledStep(fast, caches[1])
        for i in range(size):
            tokens = random_ids(model.config, 1, seed=i)
            expected = model(tokens[:, None], cache=caches[0])[:, -1]
            assert rms_error(step(tokens), expected) < 1e-5
        assert graphs() == 2  # a block and the head
        with pytest.raises(ValueError, match=f"cache full: row 0 holds {size} of {size}"):
            step(tokens)
        assert torch.equal(caches[1].lengths, caches[0].lengths)


@torch.no_grad()
def test_steps_of_several_models_do_not_mix():
    """After its first step an object checks nothing but which of several graphs is its own: models
    that differ in numbers alone, level and ragged rows, step by step in turns."""
    models = [make_model(make_config("two_groups"))]
    changed = models[0].config.ssm_out_multiplier * 1.5
    models.append(same_weights(models[0], ssm_out_multiplier=changed))
    skip_without_onednn(models[0])
    pairs = [(model, LENGTHS[rows]) for model in models for rows in (2, 3)]
    expected = [steps(*pair)[0] for pair in pairs]
    forms = []
    for model, lengths in pairs:
        fast = use_onednn(same_weights(model), stream=True)
        forms.append(CompiledStep(fast, filled(fast, lengths)))
    for i in range(STEPS):
        for form, logits, (model, lengths) in zip(forms, expected, pairs):
            tokens = random_ids(model.config, len(lengths), seed=i)
            assert rms_error(form(tokens), logits[i]) < 1e-5


def step_and_truth(step, model, cache):
    """Logits of a compiled step, and what `model` makes of a copy of its cache."""
    copy = cache.select(range(cache.batch_size))
    tokens = random_ids(model.config, cache.batch_size)
    expected = model(tokens[:, None], cache=copy)[:, -1]
    found = step(tokens)
    assert rms_error(cache.states, copy.states) < 1e-5 and rms_error(cache.keys, copy.keys) < 1e-5
    return found, expected


@torch.no_grad()
def test_later_steps_are_played_without_torch_compile(monkeypatch):
    """Level rows, ragged ones, and level ones again in one object; deeper and shallower."""
    model, fast = streamed()
    level, ragged = (filled(fast, lengths).snapshot() for lengths in ((6, 6, 6), (7, 4, 1)))
    cache = fast.new_cache(3, 12)
    step = CompiledStep(fast, cache)
    for round_ in range(3):
        for content in (level, ragged):
            cache.restore(content)
            for _ in range(3):
                assert rms_error(*step_and_truth(step, model, cache)) < 1e-5
        if round_ == 0:
            monkeypatch.setattr(step, "_block", None)
            monkeypatch.setattr(step, "_logits", None)
    assert graphs() == 2  # a block and the head


@torch.no_grad()
def test_played_steps_at_every_depth():
    """Keys are read in pieces, up to a rounded number; what lies behind a row's own is random."""
    model, fast = streamed()
    cache = fast.new_cache(2, 400)
    for part in (cache.keys, cache.values, cache.states):
        part.normal_(generator=torch.Generator().manual_seed(0))
    step = CompiledStep(fast, cache)
    for length in (300, 126, 127, 128, 255, 256, 397, 5, 0):
        cache.lengths.copy_(torch.tensor([length, length // 2]))
        for _ in range(2):
            assert rms_error(*step_and_truth(step, model, cache)) < 1e-5
    assert graphs() == 2


@torch.no_grad()
def test_steps_with_other_numbers_of_threads():
    """A kernel holds an array with a place for each thread it was compiled for."""
    model, fast = streamed()
    cache = filled(fast, (6,))
    step, before = CompiledStep(fast, cache), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            cache.lengths.fill_(6)
            for _ in range(2):
                assert rms_error(*step_and_truth(step, model, cache)) < 1e-5
    finally:
        torch.set_num_threads(before)
    assert graphs() == 4  # a block and the head, for one thread and for two


@torch.no_grad()
def test_a_span_and_logits_stay_their_owners():
    """A span's tensors may be the cache's own; the next step writes neither."""
    model, fast = streamed()
    cache = filled(fast, (7, 4, 1))
    step, spans, kept = CompiledStep(fast, cache), [], []
    for i in range(4):
        span = Span.step(fast.config, cache.lengths.clone(), 11, torch.float32)
        logits = step(random_ids(fast.config, 3, seed=i), span)
        spans.append((span, span._replace(past_b=span.past_b.clone())))
        kept.append((logits, logits.clone()))
        assert all(torch.equal(*pair) for pair in kept)
        assert all(torch.equal(one.past_b, copy.past_b) for one, copy in spans)
    assert cache.lengths.tolist() == [11, 8, 5]


@torch.no_grad()
def test_a_played_step_refuses_other_numbers_of_tokens():
    """A graph of two rows would compute two of three."""
    model, fast = streamed()
    cache = filled(fast, (6, 6))
    step = CompiledStep(fast, cache)
    for _ in range(2):
        step_and_truth(step, model, cache)
    lengths = cache.lengths.tolist()
    for tokens in (torch.zeros(3), torch.zeros(1), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match=r"tokens_b: \(.*\), expected \(2,\), one a row"):
            step(tokens.long())
    assert cache.lengths.tolist() == lengths
    assert rms_error(*step_and_truth(step, model, cache)) < 1e-5


@torch.no_grad()
def test_a_step_follows_weights_that_change_in_place():
    model, fast = streamed()
    cache = filled(fast, (6,))
    step = CompiledStep(fast, cache)
    before = [step_and_truth(step, model, cache)[0] for _ in range(2)]
    for one in (model, fast):
        for name, parameter in one.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    found, expected = step_and_truth(step, model, cache)
    assert rms_error(found, expected) < 1e-5 < 1e-2 < rms_error(before[1], expected)


@torch.no_grad()
def test_an_interrupted_first_step_is_not_played(monkeypatch):
    model, fast = streamed()
    cache = filled(fast, (6,))
    content = cache.snapshot()
    step, calls = CompiledStep(fast, cache), []
    block = step._block

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return block(*args)

    monkeypatch.setattr(step, "_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(random_ids(model.config, 1))
    cache.restore(content)
    for _ in range(2):
        assert rms_error(*step_and_truth(step, model, cache)) < 1e-5


@torch.no_grad()
def test_steps_where_nothing_is_compiled():
    """With torch.compile told to leave everything as it is, there is nothing to play."""
    model, fast = streamed()
    cache = filled(fast, (6, 6))
    step = CompiledStep(fast, cache)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            assert rms_error(*step_and_truth(step, model, cache)) < 1e-5
    assert graphs() == 0
    for _ in range(2):
        assert rms_error(*step_and_truth(step, model, cache)) < 1e-5
    assert graphs() == 2


def test_generate_gives_the_same_tokens():
    """Rows that end are computed along: no other batch size is compiled."""
    model, fast = streamed("tied")
    prompts = [random_ids(model.config, n, seed=n) for n in (9, 3, 5)]
    params = [
        SamplingParams(max_new_tokens=n, stop_token_ids=(), temperature=1.0, seed=7)
        for n in (12, 4, 6)
    ]
    expected = generate(model, prompts, params).sequences
    found = generate(fast, prompts, params, graph=True).sequences
    assert [s.tolist() for s in found] == [s.tolist() for s in expected]
    assert graphs() == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_streamed_products(dtype, rows):
    """Odd numbers of outputs, strided inputs, both ranks, a bias; one rounding at the end."""
    weight, bias = torch.randn(33, 50).to(dtype), torch.randn(33).to(dtype)
    x = torch.randn(rows, 1, 100).to(dtype)[..., ::2]
    exact = x.double() @ weight.double().T + bias.double()
    found = streamed_linear(x, weight, bias)
    plain = torch.nn.functional.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (rows, 1, 33)
    floor = torch.finfo(dtype).eps  # a few dozen sums may be lucky
    assert rms_error(found, exact) <= max(2 * rms_error(plain, exact), floor)
    assert torch.equal(streamed_linear(x[:, 0], weight, bias), found[:, 0])
    assert rms_error(streamed_linear(x, weight), exact - bias.double()) <= 2 * floor


def test_a_tied_model_still_saves(tmp_path):
    """The head that streams the embedding's weights is no weight of its own."""
    model, fast = streamed("tied")
    assert set(fast.state_dict()) == set(model.state_dict())
    fast.save_pretrained(tmp_path / "saved")
    assert fast.lm_head.weight.data_ptr() == fast.model["embed_tokens"].weight.data_ptr()


def test_refusals(monkeypatch):
    model = make_model(make_config("h1r_like"))
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="CompiledStep: serves a CPU, the model is on meta"):
        CompiledStep(model.to("meta"), cache)
    with pytest.raises(ValueError, match="CompiledPrefill: serves a CPU, the model is on meta"):
        CompiledPrefill(model)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        for make in (lambda model: CompiledStep(model, cache), CompiledPrefill):
            with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
                make(make_model(make_config("h1r_like")))

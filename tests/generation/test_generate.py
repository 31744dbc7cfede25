"""generate() on tiny random models: what a sequence may depend on, and what it may not."""

import functools
import sys

import pytest
import torch
from models import make_config, make_model, random_ids

from falcon_h1r.generation import SamplingParams, generate, stream

NEW = 12


@functools.cache
def tiny_model():
    return make_model(make_config("two_groups"))


def params(**changes):
    return SamplingParams(**{"max_new_tokens": NEW, "stop_token_ids": (), **changes})


def prompt(length: int, seed: int = 1) -> list[int]:
    return random_ids(tiny_model().config, length, seed=seed).tolist()


PROMPTS = [prompt(5), prompt(1, 2), prompt(17, 3), prompt(9, 4)]
SAMPLED = params(temperature=1.0, top_p=0.95, seed=7)


def tokens(out):
    return [sequence.tolist() for sequence in out.sequences]


@torch.no_grad()
def greedy_by_full_forwards(model, ids: list[int], new: int) -> list[int]:
    ids = list(ids)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("variant", ["two_groups", "finite_dt_limit", "multi_query_odd_chunk"])
def test_greedy_is_the_argmax_of_full_forwards(variant):
    model = make_model(make_config(variant))
    out = generate(model, [PROMPTS[0]], params())
    assert tokens(out) == [greedy_by_full_forwards(model, PROMPTS[0], NEW)]
    assert out.finish_reasons == ["length"] and out.prompt_lengths == [5] and out.new_tokens == NEW
    assert out.sequences[0].dtype == torch.int64
    assert out.logprobs is None and out.top_logprobs is None and out.texts is None


def test_without_params_generation_is_greedy():
    out = generate(tiny_model(), [PROMPTS[0]])
    assert tokens(out)[0][:NEW] == tokens(generate(tiny_model(), [PROMPTS[0]], params()))[0]


@pytest.mark.parametrize("how", [params(), SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_what_it_is_alone(how):
    """Ragged prompts as a list, and as a tensor padded on either side."""
    model = tiny_model()
    alone = []
    for i, row in enumerate(PROMPTS):
        seed = None if how.seed is None else how.seed + i
        single = params(temperature=how.temperature, top_p=how.top_p, seed=seed)
        alone += tokens(generate(model, [row], single))
    assert tokens(generate(model, PROMPTS, how)) == alone
    assert tokens(generate(model, [torch.tensor(row) for row in PROMPTS], how)) == alone
    longest = max(map(len, PROMPTS))
    for side in ("left", "right"):
        ids = torch.full((len(PROMPTS), longest), 50)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(PROMPTS):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        assert tokens(generate(model, ids, how, attention_mask=mask)) == alone, side
        assert tokens(generate(model, ids, how, attention_mask=mask.bool())) == alone, side


def test_neighbours_and_slots_do_not_matter():
    model = tiny_model()
    rows = [params(temperature=1.0, seed=100 + i) for i in range(4)]
    together = tokens(generate(model, PROMPTS, rows))
    order = [2, 0, 3, 1]
    shuffled = generate(model, [PROMPTS[i] for i in order], [rows[i] for i in order])
    assert tokens(shuffled) == [together[i] for i in order]
    others = generate(
        model, [PROMPTS[2], prompt(30, 9)], [rows[2], params(temperature=2.0, seed=0)]
    )
    assert tokens(others)[0] == together[2]


def test_samples_are_separate_runs_with_derived_seeds():
    model, n = tiny_model(), 3
    out = generate(model, PROMPTS[:2], params(temperature=1.0, seed=40, n=n))
    assert out.seeds == [40, 41, 42, 43, 44, 45]
    assert out.prompt_lengths == [5, 5, 5, 1, 1, 1]
    for i, sequence in enumerate(tokens(out)):
        single = generate(model, [PROMPTS[i // n]], params(temperature=1.0, seed=out.seeds[i]))
        assert tokens(single) == [sequence]
    assert len({tuple(sequence) for sequence in tokens(out)}) == 6


def test_a_fresh_seed_is_reported_and_gives_the_same_again():
    model = tiny_model()
    first, second = (generate(model, [PROMPTS[0]], params(temperature=1.0)) for _ in range(2))
    assert first.seeds != second.seeds and tokens(first) != tokens(second)
    again = generate(model, [PROMPTS[0]], params(temperature=1.0, seed=first.seeds[0]))
    assert tokens(again) == tokens(first)


CHANGES = {
    "max_new_tokens": 5,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.2,
    "min_p": 0.7,
    "repetition_penalty": 3.0,
    "presence_penalty": 5.0,
    "frequency_penalty": 5.0,
    "seed": 8,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_parameter_changes_the_output(name):
    model, base = tiny_model(), {"temperature": 1.5, "seed": 7, "max_new_tokens": 40}
    before = generate(model, [PROMPTS[0]], params(**base))
    after = generate(model, [PROMPTS[0]], params(**{**base, name: CHANGES[name]}))
    assert tokens(before) != tokens(after)


def test_rows_may_differ_in_every_parameter():
    model = tiny_model()
    rows = [
        params(),
        params(temperature=1.0, seed=3, top_k=5, logprobs=2, max_new_tokens=4),
        params(temperature=0.7, seed=4, min_p=0.05, repetition_penalty=1.3),
        params(presence_penalty=2.0, frequency_penalty=0.5, logprobs=True),
    ]
    together = generate(model, PROMPTS, rows)
    for i, row in enumerate(rows):
        alone = generate(model, [PROMPTS[i]], [row])
        assert tokens(alone)[0] == tokens(together)[i]
    assert [v is None for v in together.logprobs] == [True, False, True, False]
    assert [v is None for v in together.top_logprobs] == [True, False, True, True]
    assert together.top_logprobs[1][0].shape == (4, 2)


@pytest.mark.parametrize(
    "how", [(1.5, 0.0, 0.0), (1.0, 0.5, 0.25), (0.9, -0.5, 0.0), (1.5, 0.5, 0.25)], ids=str
)
def test_penalties_count_prompt_and_output_as_defined(how):
    """Replayed from the logits of full forwards, in Python."""
    model, ids, new = tiny_model(), PROMPTS[0], 40
    repetition, presence, frequency = how
    out = generate(
        model,
        [ids],
        params(
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            max_new_tokens=new,
        ),
    )
    expected: list[int] = []
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *expected]]))[0, -1].tolist()
        for token in {*ids, *expected}:
            logits[token] *= repetition if logits[token] < 0 else 1 / repetition
        for token in set(expected):
            logits[token] -= presence + frequency * expected.count(token)
        expected.append(max(range(len(logits)), key=logits.__getitem__))
    assert tokens(out) == [expected]


def test_a_stop_token_ends_its_row_and_is_kept():
    model = tiny_model()
    free = tokens(generate(model, PROMPTS, params()))
    stop = free[1][3]
    out = generate(model, PROMPTS, params(stop_token_ids=(stop, 96)))
    for row, sequence, reason in zip(free, tokens(out), out.finish_reasons):
        ended = stop in row or 96 in row
        at = next((i for i, token in enumerate(row) if token in (stop, 96)), NEW - 1)
        assert sequence == row[: at + 1]
        assert reason == ("stop" if ended else "length")
    assert out.finish_reasons[1] == "stop"


def test_stop_tokens_default_to_the_configs():
    model = tiny_model()
    free = tokens(generate(model, [PROMPTS[0]], params(max_new_tokens=60, temperature=1.0, seed=1)))
    eos = make_config(eos_token_id=(free[0][5], free[0][8]))
    other = make_model(eos)
    how = {"max_new_tokens": 60, "temperature": 1.0, "seed": 1}
    assert len(generate(other, [PROMPTS[0]], SamplingParams(**how)).sequences[0]) <= 6
    ignoring = generate(other, [PROMPTS[0]], SamplingParams(stop_token_ids=(), **how))
    assert tokens(ignoring) == free


def test_rows_that_leave_early_change_nothing_for_the_others():
    model = tiny_model()
    lengths = [3, 40, 7, 23]
    how = [params(temperature=1.0, seed=i, max_new_tokens=n) for i, n in enumerate(lengths)]
    steps = list(stream(model, PROMPTS, how))
    assert [len(step.sequences) for step in steps] == [4] * 3 + [3] * 4 + [2] * 16 + [1] * 17
    assert [step.finished for step in steps if step.finished] == [
        {0: "length"}, {2: "length"}, {3: "length"}, {1: "length"}
    ]  # fmt: skip
    together = generate(model, PROMPTS, how)
    for i in range(4):
        assert tokens(generate(model, [PROMPTS[i]], [how[i]]))[0] == tokens(together)[i]


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunked_prefill_gives_the_same(chunk):
    model = tiny_model()
    for prompts in (PROMPTS, PROMPTS[2:3]):
        whole = generate(model, prompts, params(logprobs=True))
        cut = generate(model, prompts, params(logprobs=True), prefill_chunk=chunk)
        assert tokens(cut) == tokens(whole)
        torch.testing.assert_close(cut.logprobs, whole.logprobs, rtol=1e-4, atol=1e-4)


def test_logprobs_are_those_of_a_full_forward_before_penalties_and_filters():
    model = tiny_model()
    how = params(temperature=0.7, top_k=4, repetition_penalty=1.5, seed=2, logprobs=6, n=2)
    out = generate(model, PROMPTS[:2], how)
    for i, sequence in enumerate(out.sequences):
        ids = torch.cat([torch.tensor(PROMPTS[i // 2]), sequence])
        with torch.no_grad():
            full = model(ids[None, :-1])[0, -NEW:].log_softmax(1)
        torch.testing.assert_close(
            out.logprobs[i], full.gather(1, sequence[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        top_ids, top_values = out.top_logprobs[i]
        expected = full.topk(6)
        torch.testing.assert_close(top_values, expected.values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(full.gather(1, top_ids), top_values, rtol=1e-4, atol=1e-4)
        assert out.logprobs[i].dtype == torch.float32


def test_alternatives_beyond_the_vocabulary_are_the_vocabulary():
    out = generate(tiny_model(), [PROMPTS[0]], params(logprobs=1000, max_new_tokens=1))
    ids, values = out.top_logprobs[0]
    assert sorted(ids[0].tolist()) == list(range(97))
    assert float(values.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_streaming_is_the_batch():
    model = tiny_model()
    how = params(temperature=1.0, seed=3, n=2, logprobs=2)
    run = stream(model, PROMPTS, how)
    gathered: dict[int, list[int]] = {i: [] for i in range(8)}
    for position, step in enumerate(run):
        assert step.position == position
        for sequence, token in zip(step.sequences.tolist(), step.tokens.tolist()):
            gathered[sequence].append(token)
    out = generate(model, PROMPTS, how)
    assert list(gathered.values()) == tokens(out) == tokens(run.result())
    seen = []
    generate(model, PROMPTS, how, on_step=lambda step: seen.append(step.tokens))
    assert len(seen) == NEW


def test_a_stream_left_early_has_what_there_is_and_can_go_on():
    model = tiny_model()
    run = stream(model, PROMPTS[:2], params(logprobs=1))
    empty = run.result()
    assert tokens(empty) == [[], []] and empty.finish_reasons == ["interrupted"] * 2
    assert [len(values) for values in empty.logprobs] == [0, 0]
    for step in run:
        if step.position == 3:
            break
    partial = run.result()
    whole = generate(model, PROMPTS[:2], params(logprobs=1))
    assert tokens(partial) == [row[:4] for row in tokens(whole)]
    assert partial.finish_reasons == ["interrupted"] * 2
    for _ in run:
        pass
    assert tokens(run.result()) == tokens(whole) and run.result().finish_reasons == ["length"] * 2


def test_an_interrupt_inside_the_model_leaves_whole_steps(monkeypatch):
    model = tiny_model()
    run = stream(model, PROMPTS[:2], params(logprobs=2))
    block = model.model["layers"][1]
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return type(block).forward(block, *args, **kwargs)

    monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        for _ in run:
            pass
    out = run.result()
    assert [len(row) for row in out.sequences] == [3, 3]
    assert [len(values) for values in out.logprobs] == [3, 3]
    assert out.top_logprobs[0][0].shape == (3, 2)


def test_a_consumer_can_end_rows_for_its_own_reason():
    model = tiny_model()
    run = stream(model, PROMPTS, params())
    for step in run:
        if step.position == 2:
            run.end([1, 3], "unsure")
        if step.position == 4:
            run.end([1], "too late")
    out = run.result()
    assert [len(row) for row in out.sequences] == [NEW, 3, NEW, 3]
    assert out.finish_reasons == ["length", "unsure", "length", "unsure"]
    whole = tokens(generate(model, PROMPTS, params()))
    assert tokens(out) == [row[: len(found)] for row, found in zip(whole, tokens(out))]
    with pytest.raises(ValueError, match=r"sequence 4 must be in 0 \.\. 3"):
        run.end([4], "x")


def test_a_cache_of_the_prompts_beginning_is_gone_on_with():
    model, ids = tiny_model(), PROMPTS[2]
    fresh = generate(model, [ids], params(repetition_penalty=1.2))
    for held in (1, 8, 16):
        cache = model.new_cache(1, len(ids) + NEW)
        with torch.no_grad():
            model(torch.tensor([ids[:held]]), cache=cache)
        out = generate(model, [ids], params(repetition_penalty=1.2), cache=cache)
        assert tokens(out) == tokens(fresh)
        # All but the last token have been read, so a conversation can go on from here.
        assert cache.lengths.tolist() == [len(ids) + NEW - 1]


def test_gradients_are_off_inside_and_as_they_were_outside():
    model = tiny_model()
    run = stream(model, [PROMPTS[0]], params(max_new_tokens=3))
    for _ in run:
        assert torch.is_grad_enabled()
    out = generate(model, [PROMPTS[0]], params(max_new_tokens=3, logprobs=True))
    assert not out.logprobs[0].requires_grad
    # Sampled sequences can be trained on, which inference-mode tensors could not.
    loss = model(torch.cat([torch.tensor(PROMPTS[0]), out.sequences[0]])[None]).sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_the_walk_from_generate_to_the_scan_is_six_frames():
    frames: list[list[str]] = []

    def scan(*args, **kwargs):
        frame, names = sys._getframe(), []
        while frame is not None:
            file = frame.f_code.co_filename
            if "falcon_h1r" in file or frame.f_code is scan.__code__:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        frames.append(names)
        return ops.ssd_scan(*args, **kwargs)

    from falcon_h1r.ops import TORCH

    ops = TORCH
    model = make_model(make_config(), ops=ops._replace(ssd_scan=scan))
    generate(model, [PROMPTS[0]], params(max_new_tokens=2))
    assert frames[0] == ["scan", "forward", "forward", "forward", "_steps", "generate"]


def test_float64_models_report_float64():
    model = make_model(make_config(), dtype=torch.float64)
    out = generate(model, [PROMPTS[0]], params(logprobs=1, temperature=1.0, seed=0))
    assert out.logprobs[0].dtype == torch.float64


def test_greedy_rows_in_a_sampled_batch_stay_greedy():
    model = tiny_model()
    rows = [params(), params(temperature=1.0, seed=1), params(), params(temperature=1.0, seed=2)]
    out = tokens(generate(model, PROMPTS, rows))
    greedy = tokens(generate(model, PROMPTS, params()))
    assert (out[0], out[2]) == (greedy[0], greedy[2]) and out[1] != greedy[1]


def test_greedy_rows_take_the_lowest_of_equal_ids_also_beside_sampled_ones():
    model = make_model(make_config())
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = [params(), params(temperature=1.0, seed=1)]
    alone, mixed = generate(model, PROMPTS[:1], rows[:1]), generate(model, PROMPTS[:2], rows)
    assert tokens(alone)[0] == tokens(mixed)[0] == [0] * NEW and set(tokens(mixed)[1]) != {0}

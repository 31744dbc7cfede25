"""Captured decode steps: the layout that only the device knows, and the graph on a GPU."""

import pytest
import torch
from models import make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r import FalconH1ForCausalLM, SamplingParams, generate, stream
from falcon_h1r.generation.graph import DecodeStep
from falcon_h1r.ops import REFERENCE, TORCH

VARIANTS = ["h1r_like", "two_groups", "all_biases", "no_gated_norm", "finite_dt_limit"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


class Replayed:
    """A CUDA graph without a GPU: what was captured is called again."""

    made = 0

    def __init__(self):
        Replayed.made += 1


@pytest.fixture
def no_gpu(monkeypatch):
    """Everything but the replay: a graph's call is the step itself."""
    monkeypatch.setattr(DecodeStep, "_on_a_side_stream", DecodeStep._step)

    def capture(step):
        graph = Replayed()
        graph.replay = lambda: step._logits.copy_(step._step())
        step._graph = graph

    monkeypatch.setattr(DecodeStep, "_capture", capture)
    Replayed.made = 0


def ragged(model, n=3, length=9):
    """A cache whose rows hold different numbers of tokens."""
    ids = random_ids(model.config, n, length).to(model.device)
    mask = (torch.arange(length) < torch.tensor([length, 4, 1][:n])[:, None]).to(model.device)
    caches = [model.new_cache(n, length + 8) for _ in range(2)]
    for cache in caches:
        model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)
    return caches


@pytest.mark.parametrize("table", [REFERENCE, TORCH])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_steps_of_ragged_rows_are_the_models(variant, table, no_gpu):
    model = same_weights(make_model(make_config(variant)), ops=table, dtype=torch.float64)
    plain, cache = ragged(model)
    step = DecodeStep(model, cache)
    for i in range(5):
        tokens = random_ids(model.config, 3, seed=i)
        expected = model(tokens[:, None], cache=plain, logits_to_keep=1)[:, -1]
        torch.testing.assert_close(step(tokens), expected, rtol=1e-10, atol=1e-12)
        assert cache.lengths.tolist() == plain.lengths.tolist() == step.past_b.tolist()
    for name in ("keys", "values", "windows", "states"):
        torch.testing.assert_close(getattr(cache, name), getattr(plain, name))
    assert Replayed.made == 1


@torch.no_grad()
def test_a_full_cache_is_refused_before_it_is_touched(no_gpu):
    model = make_model(make_config("h1r_like"))
    cache = model.new_cache(2, 3)
    model(random_ids(model.config, 2, 2), cache=cache)
    step = DecodeStep(model, cache)
    step(torch.tensor([1, 2]))
    before = cache.snapshot()
    with pytest.raises(ValueError, match="cache full: row 0 holds all 3 positions"):
        step(torch.tensor([1, 2]))
    assert torch.equal(cache.states, before.states) and cache.lengths.tolist() == [3, 3]


def test_generate_by_steps_gives_the_same_tokens(no_gpu, monkeypatch):
    """Rows that leave the batch on the way need a graph of their own."""
    model = make_model(make_config("h1r_like"))
    prompts = [random_ids(model.config, n, seed=n) for n in (9, 3, 5)]
    lengths = (20, 4, 6)
    params = [
        SamplingParams(max_new_tokens=n, stop_token_ids=(), temperature=1.0, seed=7)
        for n in lengths
    ]
    expected = generate(model, prompts, params, graph=False).sequences
    run = stream(model, prompts, params)
    run._step_form = DecodeStep  # as on a GPU
    for _ in run:
        pass
    assert [s.tolist() for s in run.result().sequences] == [s.tolist() for s in expected]
    assert Replayed.made == 2


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_a_graph_replays_the_models_steps(variant, dtype, tolerance):
    """Under the default table of a GPU, the kernels; steps alone cut keys at the longest row."""
    model = on_gpu(variant, dtype)
    plain, cache = ragged(model)
    step = DecodeStep(model, cache)
    for i in range(5):
        tokens = random_ids(model.config, 3, seed=i).cuda()
        expected = model(tokens[:, None], cache=plain, logits_to_keep=1)[:, -1]
        assert rms_error(step(tokens), expected) < tolerance
    assert cache.lengths.tolist() == plain.lengths.tolist() == step.past_b.tolist()


@needs_gpu
def test_generate_captures_by_itself():
    model = on_gpu("h1r_like", torch.float32)
    prompts = [random_ids(model.config, n, seed=n) for n in (9, 3, 5)]
    params = SamplingParams(max_new_tokens=24, stop_token_ids=(), temperature=0)
    runs = [generate(model, prompts, params, graph=graph).sequences for graph in (None, False)]
    assert [s.tolist() for s in runs[0]] == [s.tolist() for s in runs[1]]


def on_gpu(variant, dtype):
    weights = make_model(make_config(variant), dtype=dtype).state_dict()
    model = FalconH1ForCausalLM(make_config(variant), dtype=dtype, device="cuda")
    model.load_state_dict(weights)
    return model

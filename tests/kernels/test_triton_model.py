"""A whole model on the TRITON table, interpreted: prefill, cache, padding, packing, generation.

float32: the error to the float64 forward is at most twice TORCH's. bfloat16: at most that of
transformers, whose scan rounds nothing but its result; the kernels round the operands of their
products too.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import rounded_model
from models import make_config, make_model, random_ids, rms_error, same_weights
from witness import make_witness, witness_logits

from falcon_h1r import SamplingParams, generate
from falcon_h1r import ops as operators
from falcon_h1r.cli import main
from falcon_h1r.ops import INDUCTOR, REFERENCE, TORCH, TRITON, Ops, default_table, table

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ["h1r_like", "two_groups", "norm_before_gate", "no_gated_norm", "multi_query_odd_chunk"]


def tables(variant, dtype=torch.float32, **changes):
    """The same weights on TRITON, on TORCH, and on REFERENCE in float64."""
    model = make_model(make_config(variant, num_hidden_layers=2, **changes), dtype=dtype)
    return (
        same_weights(model, ops=TRITON),
        model,
        same_weights(model, ops=REFERENCE, dtype=torch.float64),
    )


def recording(names: set):
    """TRITON, noting which operators are called."""

    def watch(name):
        def call(*args, **kwargs):
            names.add(name)
            return getattr(TRITON, name)(*args, **kwargs)

        return call

    return Ops(**{name: watch(name) for name in Ops._fields})


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_of_a_ragged_batch_with_a_cache(variant):
    """Padded prefill, a second stretch, then steps: every operator, every kind of call."""
    models = tables(variant)
    config = models[0].config
    ids, more = random_ids(config, 2, 19), random_ids(config, 2, 5, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    called = set()
    watched = same_weights(models[1], ops=recording(called))
    found = []
    for model in (watched, *models[1:]):
        cache = model.new_cache(2, 32)
        logits = [model(ids, attention_mask=mask, cache=cache), model(more, cache=cache)]
        logits += [model(more[:, i : i + 1], cache=cache) for i in range(2)]
        found.append(torch.cat(logits, dim=1))
    assert called == set(Ops._fields)
    assert rms_error(found[0], found[2]) <= 2 * rms_error(found[1], found[2])


@torch.no_grad()
def test_packed_documents():
    models = tables("two_groups")
    ids = random_ids(models[0].config, 2, 40)
    seq_idx = torch.tensor([[0] * 3 + [1] * 20 + [2] * 17, [4] * 16 + [5] * 1 + [9] * 23])
    triton, torchs, exact = (model(ids, seq_idx=seq_idx) for model in models)
    assert rms_error(triton, exact) <= 2 * rms_error(torchs, exact)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bfloat16_is_no_worse_than_transformers(variant):
    model = rounded_model(variant, torch.bfloat16, seed=3)
    ids = random_ids(model.config, 2, 40)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)(ids)
    witness = witness_logits(make_witness(model), ids)
    found = same_weights(model, ops=TRITON)(ids)
    assert rms_error(found, exact) <= rms_error(witness, exact)


@torch.no_grad()
def test_greedy_tokens_are_those_of_torch():
    triton, torchs, _ = tables("h1r_like")
    prompts = [random_ids(triton.config, n)[:] for n in (9, 3)]
    params = SamplingParams(max_new_tokens=12, stop_token_ids=())
    found, expected = (generate(model, prompts, params).sequences for model in (triton, torchs))
    assert [s.tolist() for s in found] == [s.tolist() for s in expected]


def test_a_compiled_block_is_one_graph_with_kernels_in_it():
    triton, torchs, _ = tables("h1r_like")
    block, like = triton.model["layers"][0], torchs.model["layers"][0]
    x = torch.randn(2, 11, triton.config.hidden_size)
    spans = []

    def keep(module, args):
        spans.append(args[1])

    with torch.no_grad():
        handle = like.register_forward_pre_hook(keep)
        torchs(random_ids(triton.config, 2, 11))
        handle.remove()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        assert rms_error(compiled(x, spans[0]), block(x, spans[0])) < 1e-6
        assert rms_error(block(x, spans[0]), like(x, spans[0])) < 1e-5


def test_backward_is_refused():
    triton, _, _ = tables("two_groups")
    logits = triton(random_ids(triton.config, 1, 4))
    with pytest.raises(RuntimeError, match=r"no autograd formula|no backward"):
        logits.sum().backward()


def test_tables_by_name_and_by_device():
    names = ("reference", "torch", "inductor", "triton")
    assert [table(name) for name in names] == [REFERENCE, TORCH, INDUCTOR, TRITON]
    with pytest.raises(ValueError, match=", ".join(names)):
        table("cuda")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_table(cpu, torch.bfloat16) is TORCH
    assert default_table(cuda, torch.bfloat16) == TRITON
    assert default_table(cuda, torch.float64) is TORCH


def test_missing_kernels_are_one_clear_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "falcon_h1r_kernels", None)
    operators._triton.cache_clear()
    with pytest.raises(ValueError, match=r"TRITON cannot be made .*falcon_h1r_kernels.* TORCH"):
        default_table(torch.device("cuda"), torch.bfloat16)
    assert main(["generate", "What is 7+8?", "--ops", "triton"]) == 2
    assert capsys.readouterr().err.startswith("falcon-h1r: error: the table TRITON cannot be made")
    monkeypatch.undo()
    operators._triton.cache_clear()


def generated(*options) -> dict:
    command = [sys.executable, "-m", "falcon_h1r", "generate", "What is 7+8?", "--json"]
    done = subprocess.run(
        [*command, "--temperature", "0", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "kernels"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["outputs"]


@pytest.mark.slow
def test_the_command_line_interprets_kernels_on_a_cpu():
    """Without TRITON_INTERPRET in the environment: asking for kernels on a CPU is enough."""
    found, expected = generated("--ops", "triton"), generated("--ops", "torch")
    assert found[0]["text"].endswith("\\boxed{15}") and found[0]["tokens"] == expected[0]["tokens"]

"""The whole model against two witnesses: a plain-Python float64 forward, and transformers.

The rule for every float32 comparison: the truth is the float64 forward, and our distance to it is
at most twice that of transformers, an independent implementation in the same dtype and on the same
weights. Twice, because two correct evaluation orders differ by chance; distances are root mean
square, which a single element does not decide. In bfloat16 the factor is 1: there the policy of
computing inner quantities in float32 must show. Absolute bounds come from the unit roundoff and are
named.
"""

import re
from collections import defaultdict

import pytest
import torch
from measure import logit_distances
from models import (
    VARIANTS,
    make_config,
    make_model,
    random_ids,
    relative_error,
    rms_error,
    same_weights,
    textbook_logits,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from witness import make_witness, witness_logits

from falcon_h1r.ops import REFERENCE, TORCH

TABLES = {"reference": REFERENCE, "torch": TORCH}
FLOAT64_BOUND = 1e-13  # about 500 roundoffs: room for sums of 100 terms through three layers
FLOAT32_BOUND = 1e-5  # about 80 roundoffs of float32, what the project promises for every module


def outputs_by_module(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    """Output of every submodule that ran, by name; each must run exactly once."""
    seen, handles = {}, []
    for name, module in model.named_modules():

        def remember(module, inputs, output, name=name):
            assert name not in seen, f"{name} ran twice"
            seen[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(remember))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def expected_modules(config) -> set[str]:
    names = {"model.embed_tokens", "model.final_layernorm"}
    if not config.tie_word_embeddings:
        names.add("lm_head")
    inside = [
        "input_layernorm",
        "pre_ff_layernorm",
        *("self_attn" + part for part in ("", ".q_proj", ".k_proj", ".v_proj", ".o_proj")),
        *("mamba" + part for part in ("", ".in_proj", ".out_proj")),
        *("feed_forward" + part for part in ("", ".gate_proj", ".up_proj", ".down_proj")),
    ]
    if config.mamba_rms_norm:
        inside.append("mamba.norm")
    for index in range(config.num_hidden_layers):
        names |= {f"model.layers.{index}"} | {f"model.layers.{index}.{name}" for name in inside}
    return names


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_the_textbook(variant, table):
    model = make_model(make_config(variant), ops=TABLES[table], dtype=torch.float64)
    ids = random_ids(model.config, 2, 11)  # two chunks
    with torch.no_grad():
        assert relative_error(model(ids), textbook_logits(model, ids)) < FLOAT64_BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_two_tables_agree_in_float64(variant):
    reference = make_model(make_config(variant), ops=REFERENCE, dtype=torch.float64)
    ids = random_ids(reference.config, 2, 45)
    found = outputs_by_module(same_weights(reference, ops=TORCH), ids)
    expected = outputs_by_module(reference, ids)
    for name in expected_modules(reference.config):
        assert relative_error(found[name], expected[name]) < FLOAT64_BOUND, name


class FloatingDtypes(TorchDispatchMode):
    """Collects the dtype of every floating-point tensor that any operator reads or writes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.seen.add(leaf.dtype)
        return out


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_float64_model_computes_in_float64_only(variant, table):
    model = make_model(make_config(variant), ops=TABLES[table], dtype=torch.float64)
    ids = random_ids(model.config, 2, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = model.new_cache(2, 20)
    with FloatingDtypes() as dtypes, torch.no_grad():
        model(ids)
        model(ids, seq_idx=torch.arange(10).div(4, rounding_mode="floor").expand(2, 10))
        model(ids, attention_mask=mask, cache=cache)
        model(ids[:, :1], cache=cache)
        model(ids[:, :4], attention_mask=mask[:, 1:5], cache=cache, logits_to_keep=2)
    assert dtypes.seen == {torch.float64}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_in_float32(variant):
    """Both models have the same module names, and a name marks the same point in both.

    A multiplier acts in the parent, outside the hooked module, in both (attention_in before
    self_attn's input, ssm_in inside mamba before in_proj, the others after the module). Not
    compared: mamba.conv1d, whose weights transformers uses without calling it. A tied head is no
    module of ours; the logits stand for it.
    """
    model = make_model(make_config(variant))
    ids = random_ids(model.config, 2, 45)
    ours = outputs_by_module(model, ids)
    witness = outputs_by_module(make_witness(model), ids, use_cache=False)
    truth = outputs_by_module(same_weights(model, ops=REFERENCE, dtype=torch.float64), ids)
    names = expected_modules(model.config)
    assert {name for name in ours if not name.endswith("conv1d")} == names | {""}
    ours["logits"], truth["logits"] = ours.pop(""), truth.pop("")
    witness["logits"] = witness.pop("").logits
    for name in [*sorted(names - {"model.embed_tokens"}), "logits"]:
        assert ours[name].dtype == torch.float32
        assert relative_error(ours[name], witness[name]) < FLOAT32_BOUND, name
        ours_error, witness_error = (rms_error(m[name], truth[name]) for m in (ours, witness))
        assert ours_error <= 2 * witness_error, (name, ours_error, witness_error)
    assert torch.equal(ours["model.embed_tokens"], witness["model.embed_tokens"])


@pytest.mark.parametrize("variant", ["two_groups", "no_gated_norm", "finite_dt_limit"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17])
def test_logits_at_lengths_around_the_window_and_the_chunk(variant, length):
    model = make_model(make_config(variant))
    ids = random_ids(model.config, 3, length)
    with torch.no_grad():
        assert relative_error(model(ids), witness_logits(make_witness(model), ids)) < FLOAT32_BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_no_farther_from_float64_than_transformers(variant):
    distances = logit_distances(variant, torch.bfloat16)
    assert distances.ours <= distances.witness, distances


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float32(variant):
    """Judged per kind of parameter, all layers and seeds together: one A_log has 4 elements."""
    gradients = [defaultdict(list) for _ in range(3)]
    for seed in range(4):
        model = make_model(make_config(variant), seed=seed)
        witness = make_witness(model).train()
        truth = same_weights(model, ops=REFERENCE, dtype=torch.float64)
        # Token 0 is transformers' padding_idx, whose embedding it gives no gradient.
        ids = random_ids(model.config, 2, 20, seed=seed + 1).clamp(min=1)
        for network, found in zip((model, witness, truth), gradients):
            logits = network(ids, use_cache=False).logits if network is witness else network(ids)
            predicted = logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten()).backward()
            for name, parameter in network.named_parameters():
                kind = re.sub(r"\d+", "N", name)
                found[kind].append(parameter.grad.flatten())
    ours, theirs, exact = ({kind: torch.cat(g) for kind, g in d.items()} for d in gradients)
    assert set(ours) == set(theirs) == set(exact)
    for kind, gradient in ours.items():
        ours_error, witness_error = (rms_error(g[kind], exact[kind]) for g in (ours, theirs))
        assert relative_error(gradient, theirs[kind]) < FLOAT32_BOUND, kind
        assert ours_error <= 2 * witness_error, (kind, ours_error, witness_error)


def greedy(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Prefill, then one token at a time from the cache; (b, steps)."""
    cache = model.new_cache(len(ids), ids.shape[1] + steps)
    tokens = [model(ids, cache=cache, logits_to_keep=1)[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        tokens.append(model(tokens[-1][:, None], cache=cache)[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_over_64_steps(variant):
    """Unpadded, because transformers is not right about padded rows in every configuration.

    With a finite time_step_limit transformers forgets the limit in cached steps; there its own
    forward over the whole sequence, which is right, says which token follows.
    """
    model = make_model(make_config(variant))
    witness = make_witness(model)
    ids = random_ids(model.config, 3, 13)
    found = greedy(model, ids, 64)
    if variant == "finite_dt_limit":
        logits = witness_logits(witness, torch.cat([ids, found], dim=1))
        expected = logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    else:
        witness.generation_config.eos_token_id = None
        out = witness.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            pad_token_id=0,
        )
        expected = out[:, ids.shape[1] :]
    assert torch.equal(found, expected)


def test_precision_policy_of_a_bfloat16_model():
    """What stays in float32 between operators: dt, A, the SSM state and the logits."""
    seen = {}

    def scan(x, dt, A, B, C, D, **options):
        seen.update(x=x, dt=dt, A=A, B=B, C=C, D=D)
        return TORCH.ssd_scan(x, dt, A, B, C, D, **options)

    def step(state, x, dt, A, B, C, D):
        seen.update(step_state=state, step_x=x, step_dt=dt, step_A=A)
        return TORCH.ssd_step(state, x, dt, A, B, C, D)

    table = TORCH._replace(ssd_scan=scan, ssd_step=step)
    model = make_model(make_config(), ops=table, dtype=torch.bfloat16)
    cache = model.new_cache(1, 8)
    ids = random_ids(model.config, 1, 6)
    with torch.no_grad():
        logits = [model(ids, cache=cache), model(ids[:, :1], cache=cache)]
    wide = {"dt", "A", "D", "step_dt", "step_A", "step_state"}
    for name, tensor in seen.items():
        assert tensor.dtype == (torch.float32 if name in wide else torch.bfloat16), name
    for name in ("dt", "A", "step_dt"):  # not bfloat16 numbers in a float32 tensor
        assert not torch.equal(seen[name], seen[name].bfloat16().float()), name
    for tensor in logits:  # the multiplier acts in float32 too
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
    assert cache.states.dtype == torch.float32
    assert cache.keys.dtype == cache.values.dtype == cache.windows.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", ".D", "dt_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name

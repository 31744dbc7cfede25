"""The error budget: its parts are what they are called, and add up."""

import json
import math

import pytest
import torch
from models import load, make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r.commands.common import locate
from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.study import budget as module
from falcon_h1r.study.budget import (
    FACTOR,
    FORMAT,
    ErrorParts,
    make_budget,
    read_budget,
    rounded,
    shipped_budget,
    split_error,
    truth_of,
)
from falcon_h1r.study.dump import Inputs, compared_names, take_dump
from falcon_h1r.study.parity import PATHS, make_inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(), ops=TORCH)


@pytest.fixture(scope="module")
def splits(model):
    inputs = {"prefill": make_inputs(model.config, "prefill")}
    inputs["decode"] = Inputs(inputs["prefill"].ids, pieces=(30,) + (1,) * 10)
    return {
        (dtype, path): split_error(model, DTYPES[dtype], TORCH, given)
        for dtype in DTYPES
        for path, given in inputs.items()
    }


@torch.no_grad()
def test_the_whole_is_what_ours_is_off_by(model, splits):
    """Measured by itself: the float64 forward of the stored weights, and ours in the dtype."""
    inputs = make_inputs(model.config, "prefill")
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)(inputs.ids)
    for name, dtype in DTYPES.items():
        ours = rounded(model, dtype)(inputs.ids)
        found = splits[name, "prefill"]["logits"].total
        # The scale is the tensor of the rounded weights: equal to a roundoff of theirs.
        assert found == pytest.approx(rms_error(ours, exact), rel=0.01), name


def test_parts_add_up(splits):
    """As vectors they sum to the whole, so their sizes bound it; they are nearly independent, so
    the root sum square is close to it."""
    ratios = []
    for key, split in splits.items():
        for name, parts in split.items():
            assert parts.total <= sum(parts[:4]) * (1 + 1e-9), (key, name)
            if parts.total > 1e-9:
                ratios.append(math.hypot(parts.weights, parts.combined) / parts.total)
    assert len(ratios) > 400
    assert min(ratios) > 0.5 and max(ratios) < 2
    assert 0.8 < sorted(ratios)[len(ratios) // 2] < 1.25


def test_weights_that_are_not_narrowed_cost_nothing(splits, model):
    for (dtype, _), split in splits.items():
        zero = [parts.weights == 0 for parts in split.values()]
        assert all(zero) if dtype == "float32" else sum(zero) == 0
    stored = rounded(model, torch.bfloat16)
    split = split_error(stored, torch.bfloat16, TORCH, Inputs(random_ids(model.config, 1, 9)))
    assert all(parts.weights == 0 for parts in split.values())


@torch.no_grad()
def test_the_weights_part_is_a_rounding_of_weights(model, splits):
    inputs = make_inputs(model.config, "prefill")
    exact = truth_of(model)(inputs.ids)
    narrow = truth_of(rounded(model, torch.bfloat16))(inputs.ids)
    found = splits["bfloat16", "prefill"]["logits"].weights
    assert found == pytest.approx(rms_error(exact, narrow), rel=1e-6)


@torch.no_grad()
def test_the_activations_part_of_the_first_tensors(model, splits):
    """Written out: one rounding of a product, then one of a norm in float64."""
    ids = make_inputs(model.config, "prefill").ids
    narrow = rounded(model, torch.bfloat16)
    exact = narrow.model["embed_tokens"](ids).double() * model.config.embedding_multiplier
    product = exact.to(torch.bfloat16).double()
    split = splits["bfloat16", "prefill"]
    assert split["embedding"].activations == pytest.approx(rms_error(product, exact), rel=1e-3)
    assert split["embedding"].algorithm == split["embedding"].kernel == 0
    weight = narrow.model["layers"][0].input_layernorm.weight.double()
    normed = [
        torch.nn.functional.rms_norm(x, (48,), weight, model.config.rms_norm_eps)
        for x in (product, exact)
    ]
    found = rms_error(normed[0].to(torch.bfloat16), normed[1])
    assert split["layers.0.input_layernorm"].activations == pytest.approx(found, rel=1e-6)


@torch.no_grad()
def test_the_activations_part_of_a_linear_layer(model, splits):
    """Written out in float32: its inputs rounded as the policy says, its sum in float64."""
    c, inputs = model.config, make_inputs(model.config, "prefill")
    block = model.model["layers"][0]
    x = model.model["embed_tokens"](inputs.ids) * c.embedding_multiplier
    weight = block.input_layernorm.weight.double()
    normed = torch.nn.functional.rms_norm(x.double(), (48,), weight, c.rms_norm_eps).float()
    scaled = (normed * c.ssm_in_multiplier).double()
    found = (scaled @ block.mamba.in_proj.weight.double().T).float()
    exact = take_dump(truth_of(model), model, inputs, ["layers.0.mamba.in_proj"])
    expected = rms_error(found, exact.tensors["layers.0.mamba.in_proj"])
    part = splits["float32", "prefill"]["layers.0.mamba.in_proj"].activations
    assert part == pytest.approx(expected, rel=1e-4)


def test_the_algorithm_part_begins_at_the_scan(splits):
    for split in splits.values():
        names = list(split)
        first = next(name for name in names if split[name].algorithm > 0)
        # Of decode steps, the state that an earlier one left comes first.
        made = {f"layers.0.mamba.scan.{name}" for name in ("state_in", "y", "state")}
        assert first in made


def test_a_worse_scan_is_charged_to_the_algorithm(model):
    """The scan alone rounds its input to 12 bits: its part grows, the others stay."""

    def coarse(x, *rest, **options):
        return TORCH.ssd_scan((x * 2.0**6).round() * 2.0**-6, *rest, **options)

    inputs = Inputs(random_ids(model.config, 2, 20))
    table = TORCH._replace(ssd_scan=coarse)
    usual = split_error(model, torch.float32, TORCH, inputs)["layers.0.mamba.scan.y"]
    found = split_error(model, torch.float32, table, inputs)["layers.0.mamba.scan.y"]
    assert found.algorithm > 1000 * usual.algorithm
    assert found.activations == usual.activations


def test_a_worse_operator_is_charged_to_the_kernel(model):
    def coarse(gate, up, multiplier=1.0):
        return (TORCH.swiglu(gate, up, multiplier) * 2.0**9).round() * 2.0**-9

    inputs = Inputs(random_ids(model.config, 2, 20))
    name = "layers.0.feed_forward.swiglu.out"
    usual = split_error(model, torch.float32, TORCH, inputs)[name]
    found = split_error(model, torch.float32, TORCH._replace(swiglu=coarse), inputs)[name]
    assert found.kernel > 1000 * usual.kernel
    assert found[:3] == usual[:3]


def test_exact_operators_round_once(model):
    """Under them REFERENCE's float64 is met to one rounding, in float32."""
    table = module._exact(None)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 16, generator=g), torch.randn(16, generator=g)
    for name, inputs in {
        "rms_norm": (x, w, 1e-5),
        "gated_rms_norm": (x, x.flip(1), w, 1e-5, 2, False),
        "swiglu": (x, x.flip(0), 0.7),
    }.items():
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in inputs]
        expected = getattr(REFERENCE, name)(*wide).float()
        assert torch.equal(getattr(table, name)(*inputs), expected), name


def test_tolerances_follow_from_the_parts(tmp_path, model):
    inputs = {"prefill": Inputs(random_ids(model.config, 1, 12))}
    names = ["logits", "layers.1.mamba.scan.y"]
    budget = make_budget(model, inputs, ["bfloat16"], {"torch": TORCH}, "me", names)
    split = split_error(model, torch.bfloat16, REFERENCE, inputs["prefill"], names)
    for name in names:
        expected = FACTOR * math.sqrt(sum(part**2 for part in split[name][1:4]))
        assert budget.tolerance("bfloat16", "prefill", name) == pytest.approx(expected, rel=0.01)
    budget.write(tmp_path / "b.json")
    back = read_budget(tmp_path / "b.json")
    assert back.entries == budget.entries and back.fingerprint == budget.fingerprint
    assert back.covers(["bfloat16"], ["prefill"])
    assert not back.covers(["bfloat16"], ["decode"]) and not back.covers(["float32"], ["prefill"])
    assert isinstance(back.parts("bfloat16", "prefill", "logits", "torch"), ErrorParts)
    assert back.parts("bfloat16", "prefill", "logits", "triton") is None
    assert back.tolerance("float32", "prefill", "logits") is None


def document(entries, **changes):
    values = {"format": FORMAT, "model": "", "fingerprint": "", "versions": {}, "entries": entries}
    return json.dumps(values | changes)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "x"}',
        json.dumps({"entries": {}}),
        "[" * 100_000,
        document({}, model=1),
        document([]),
        document({"float32": 1}),
        document({"float32": {"prefill": [1]}}),
        document({"float32": {"prefill": {"logits": {}}}}),
        document({"float32": {"prefill": {"logits": {"tolerance": "1"}}}}),
        document({"float32": {"prefill": {"logits": {"tolerance": 1, "torch": [1, 2]}}}}),
        document({"float32": {"prefill": {"logits": {"tolerance": 1, "torch": [None] * 5}}}}),
    ],
    ids=lambda content: content[:9],
)
def test_a_file_that_is_no_budget(tmp_path, content):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ValueError, match="not a budget file"):
        read_budget(tmp_path / "b.json")
    with pytest.raises(ValueError, match="not a budget file"):
        read_budget(tmp_path / "missing.json")


def test_the_shipped_budget_is_of_the_embedded_model(model):
    pico = load(locate("h1r-pico"), dtype=torch.float32)
    budget = shipped_budget(pico)
    assert budget is not None and budget.covers(DTYPES, PATHS)
    assert shipped_budget(model) is None
    # One cell measured again: machines differ in the order of sums.
    given = make_inputs(pico.config, "chunked")
    split = split_error(pico, torch.float32, REFERENCE, given, compared_names(pico.config))
    for name, parts in split.items():
        stored = budget.tolerance("float32", "chunked", name)
        assert stored == pytest.approx(FACTOR * parts.combined, rel=0.5, abs=1e-9), name


def test_rounded_models_hold_values_of_the_dtype(model):
    narrow = rounded(model, torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype)), name
    wide = name.endswith("A_log") and tensor.dtype == torch.float32
    assert wide or narrow.dtype == torch.bfloat16
    dump = take_dump(truth_of(narrow), narrow, Inputs(random_ids(model.config, 1, 4)))
    assert {tensor.dtype for tensor in dump.tensors.values()} == {torch.float64}

"""A dissection's numbers against the model, against closed forms, and read in one piece or layer by
layer."""

import json
import math

import pytest
import torch
from models import (
    VARIANTS,
    make_config,
    make_model,
    random_ids,
    relative_error,
    same_weights,
    stream_modules,
)

from falcon_h1r import ops as operators
from falcon_h1r.config import ConfigError, FalconH1Config
from falcon_h1r.cpu.onednn import unusable, use_onednn
from falcon_h1r.ops import REFERENCE
from falcon_h1r.study.contributions import BRANCHES, attribute, sizes
from falcon_h1r.study.dissect import dissect, plain
from falcon_h1r.study.lens import lens
from falcon_h1r.study.measures import MEASURES
from falcon_h1r.taps import record

SWITCHED = ("mamba.out_proj", "self_attn.o_proj", "feed_forward.down_proj")


def prompt(config: FalconH1Config, length: int = 11) -> list[int]:
    return random_ids(config, length).tolist()


def test_sizes_by_hand():
    added = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[0.0, 0.0]]])
    before = torch.tensor([[[6.0, 8.0]], [[5.0, 0.0]], [[1.0, 1.0]]])
    found = sizes(added, before)
    assert found.norm.tolist() == [[5.0], [2.0], [0.0]]
    assert torch.allclose(found.before.flatten(), torch.tensor([10.0, 5, math.sqrt(2)]).double())
    assert torch.allclose(found.cosine.flatten(), torch.tensor([1.0, 0, 0]).double())
    assert torch.allclose(sizes(-added, before).cosine.flatten()[0], torch.tensor(-1.0).double())


def test_attribution_by_hand():
    """Residual (3, 4) of the embedding (1, 0) and one layer's (2, 0), (0, 1), (0, 3); eps 0."""
    added = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 3.0]]]])
    scale = 1 / math.sqrt(12.5)
    logit = torch.tensor([0.5 * scale * (3 * 2 * 1 + 4 * 3 * -1)])
    found = attribute(
        torch.tensor([[1.0, 0.0]]),
        added,
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([2.0, 3.0]),
        0.0,
        torch.tensor([[1.0, -1.0]]),
        0.5,
        logit,
    )
    expected = [[0.5 * scale * 4], [0.5 * scale * -3], [0.5 * scale * -9]]
    assert torch.allclose(found.embedding, torch.tensor([0.5 * scale * 2]).double())
    assert torch.allclose(found.branches[0], torch.tensor(expected).double())
    assert abs(float(found.rounding)) < 1e-6


def test_a_lens_by_hand():
    final = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [5.0, 0.0]])
    early = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    found = lens(early, final, torch.tensor([0, 1, 0]), k=5)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert math.isclose(float(found.kl[0]), kl, rel_tol=1e-6) and float(found.kl[1]) == 0
    assert found.top_ids.shape == (3, 2) and found.top_ids[2].tolist() == [1, 0]
    assert math.isclose(float(found.top_probabilities[2, 0]), 1 / (1 + math.exp(-2)), rel_tol=1e-6)
    assert found.rank.tolist() == [1, 1]  # ids 1 and 0 follow; equal logits share a place
    ranks = lens(
        torch.tensor([[0.0, 9, 5, 7], [0, 0, 0, 0]]), torch.zeros(2, 4), torch.tensor([0, 2])
    )
    assert ranks.rank.tolist() == [3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_contributions_are_the_residual(variant):
    """Embedding + everything added = the last residual, and its parts sum to the logit."""
    model = make_model(make_config(variant), dtype=torch.float64)
    ids = prompt(model.config)
    with torch.no_grad(), record(model, ["embedding", "contribution.*", "final_layernorm.in"]) as r:
        logits = model(torch.tensor([ids]))[0]
    total = sum(tensor for name, tensor in r.items() if name != "final_layernorm.in")
    assert relative_error(total, r["final_layernorm.in"]) < 1e-14
    found = dissect(model, ids).tensors
    parts = found["attribution.embedding"] + found["attribution.branches"].sum(dim=(0, 1))
    best, token = logits.max(-1)
    assert torch.equal(found["attribution.token"], token)
    assert torch.equal(found["attribution.logit"], best)
    assert relative_error(parts, best) < 1e-13
    assert float(found["attribution.rounding"].abs().max()) < 1e-13 * float(best.abs().max())
    for n in range(3):
        added = torch.cat([r[f"layers.{n}.contribution.{branch}"] for branch in BRANCHES])
        assert relative_error(found["contribution.norm"][n], added.norm(dim=-1)) < 1e-14


def test_rounding_is_named_and_not_spread():
    """In bfloat16 the parts do not sum to the logit: the rest is its own number."""
    model = make_model(make_config(), dtype=torch.bfloat16)
    found = dissect(model, prompt(model.config)).tensors
    parts = found["attribution.embedding"] + found["attribution.branches"].sum(dim=(0, 1))
    rest = found["attribution.logit"].double() - parts
    assert torch.allclose(rest, found["attribution.rounding"], rtol=1e-9)
    assert rest.abs().max() > 1e-5
    assert rest.abs().max() < 0.1 * found["attribution.logit"].abs().max()


@pytest.mark.parametrize("variant", ["two_groups", "tied"])
def test_the_lens_ends_at_the_models_own_logits(variant):
    model = make_model(make_config(variant))
    ids = prompt(model.config)
    out = dissect(model, ids, top_k=3)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    assert torch.equal(out.logits, logits)
    found = out.tensors
    assert found["lens.top_ids"].shape == (4, 11, 3)
    assert torch.equal(found["lens.top_ids"][-1], logits.topk(3).indices)
    assert found["lens.kl"][-1].eq(0).all() and found["lens.kl"][:-1].gt(0).all()
    losses = -logits.double().log_softmax(-1)[range(10), ids[1:]]
    assert torch.allclose(found["loss"], losses, rtol=1e-12)
    places = [
        sorted(row.tolist(), reverse=True).index(row[i]) + 1 for row, i in zip(logits, ids[1:])
    ]
    assert found["lens.rank"][-1].tolist() == places


def test_an_inner_point_of_the_lens_is_a_shorter_model():
    """After layer 0: the same weights with one layer."""
    model = make_model(make_config(), dtype=torch.float64)
    ids = prompt(model.config)
    short = make_model(make_config(num_hidden_layers=1), dtype=torch.float64)
    short.load_state_dict({name: model.state_dict()[name] for name in short.state_dict()})
    found = dissect(model, ids).tensors
    with torch.no_grad():
        logits = short(torch.tensor([ids]))[0]
    top = logits.softmax(-1).topk(5)
    assert torch.equal(found["lens.top_ids"][1], top.indices)
    assert relative_error(found["lens.top_probabilities"][1], top.values) < 1e-13


@pytest.mark.parametrize("variant", ["all_biases", "tied", "finite_dt_limit"])
@torch.no_grad()
def test_a_branch_off_is_a_model_without_its_last_projection(variant):
    model = make_model(make_config(variant), dtype=torch.float64)
    ids = prompt(model.config)
    found = dissect(model, ids).tensors
    assert found["switch.loss"].shape == (3, 3, 10)
    for n in range(3):
        for row, path in enumerate(SWITCHED):
            copy = same_weights(model)
            for parameter in copy.get_submodule(f"model.layers.{n}.{path}").parameters():
                parameter.zero_()
            logits = copy(torch.tensor([ids]))[0].log_softmax(-1)
            losses = -logits[range(10), ids[1:]]
            change = found["switch.loss"][n, row] + found["loss"]
            assert relative_error(change, losses) < 1e-12, (n, path)


def test_switches_can_be_left_out():
    model = make_model(make_config())
    found = dissect(model, prompt(model.config), branch_switches=False)
    assert "switch.loss" not in found.tensors and "switch.loss" not in found.to_dict()["measures"]


def test_inner_measures_are_those_of_the_taps():
    model = make_model(make_config(), dtype=torch.float64)
    ids = prompt(model.config)
    with torch.no_grad(), record(model) as r:
        model(torch.tensor([ids]))
    found = dissect(model, ids).tensors
    for n in range(3):
        x, y = (r[f"layers.{n}.mamba.scan.{name}"][0] for name in "xy")
        rebuilt = torch.einsum("hts,shp->thp", found["hidden_attention"][n], x)
        rebuilt = rebuilt + found["skip"][n][:, None] * x
        assert torch.equal(found["skip"][n], r[f"layers.{n}.mamba.scan.D"])
        assert relative_error(rebuilt, y) < 1e-12
        v, o = (r[f"layers.{n}.self_attn.attention.{name}"][0] for name in "vo")
        mixed = found["attention"][n] @ v.repeat_interleave(2, dim=0)
        assert relative_error(mixed, o) < 1e-12
        dt = r[f"layers.{n}.mamba.scan.dt"][0].T
        A = r[f"layers.{n}.mamba.scan.A"][:, None]
        assert torch.equal(found["dt"][n], dt)
        assert relative_error(found["decay"][n], torch.exp(dt * A)) < 1e-14
        assert relative_error(found["half_life"][n], math.log(2) / -(dt * A)) < 1e-14
        state = r[f"layers.{n}.mamba.scan.state"][0]
        assert relative_error(found["state.norm"][n, :, -1], state.flatten(1).norm(dim=-1)) < 1e-12
        taps = model.model["layers"][n].mamba.conv1d.weight[:, 0]
        assert torch.equal(found["conv.taps"][n], taps)
        residual = r[f"layers.{n}.residual.in"][0]
        assert relative_error(found["residual.norm"][n], residual.norm(dim=-1)) < 1e-14
        middle = r[f"layers.{n}.residual.mid"][0].norm(dim=-1)
        assert relative_error(found["residual.before"][n, 2], middle) < 1e-14
        added = r[f"layers.{n}.contribution.ssm"][0]
        cosine = torch.cosine_similarity(added, residual, dim=-1)
        assert relative_error(found["contribution.cosine"][n, 0], cosine) < 1e-12
    assert (
        relative_error(found["residual.norm"][3], r["final_layernorm.in"][0].norm(dim=-1)) < 1e-14
    )


@pytest.mark.parametrize("table", ["REFERENCE", "TRITON"])
def test_tables_give_the_same_dissection(table):
    model = make_model(make_config(num_hidden_layers=2))
    ids = prompt(model.config, 7)
    expected = dissect(model, ids).tensors
    found = dissect(same_weights(model, ops=getattr(operators, table)), ids).tensors
    assert list(found) == list(expected) == [m.name for m in MEASURES]
    discrete = {m.name for m in MEASURES if m.unit == "token id"} | {"lens.rank", "state.rank"}
    for name, tensor in expected.items():
        if name in discrete or name.endswith(("reach", "fewest", "positions")):
            assert torch.equal(found[name], tensor), name
        elif name != "attribution.rounding" and name != "lens.kl":
            assert relative_error(found[name], tensor) < 1e-4, name
    assert torch.allclose(found["lens.kl"], expected["lens.kl"], atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "dtype"), [("two_groups", torch.float32), ("tied", torch.bfloat16)]
)
@torch.no_grad()
def test_a_streamed_checkpoint_gives_what_the_whole_model_gives(tmp_path, variant, dtype):
    model = make_model(make_config(variant), dtype=dtype)
    model.save_pretrained(tmp_path)
    ids, source = prompt(model.config), stream_modules(tmp_path)
    whole, streamed = dissect(model, ids), dissect(source, ids)
    for name, tensor in whole.tensors.items():
        assert torch.equal(streamed.tensors[name], tensor), name
    assert torch.equal(whole.logits, streamed.logits)
    rows = torch.tensor([ids, ids[::-1]])
    assert torch.equal(source(rows), model(rows))
    # Nothing stays behind: no weight, no hook.
    assert all(parameter.is_meta for parameter in source.model.parameters())
    modules = source.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    wide = dissect(stream_modules(tmp_path, dtype=torch.float64, ops=REFERENCE), ids)
    exact = dissect(same_weights(model, dtype=torch.float64, ops=REFERENCE), ids)
    assert torch.equal(wide.logits, exact.logits) and wide.dtype == "float64"


@torch.no_grad()
def test_a_stream_holds_one_module_at_a_time(tmp_path):
    model = make_model(make_config())
    model.save_pretrained(tmp_path)
    source = stream_modules(tmp_path)
    held = []

    def look(module, args):
        names = [n for n, p in source.model.named_parameters() if not p.is_meta]
        held.append({".".join(n.split(".")[:3]) for n in names})

    for block in source.model.model["layers"]:
        block.register_forward_pre_hook(look)
    source(torch.tensor([[1, 2, 3]]))
    assert held == [{f"model.layers.{n}"} for n in range(3)]
    held.clear()
    dissect(source, [1, 2, 3], branch_switches=False)
    assert held == [{f"model.layers.{n}"} for n in range(3)]


def test_a_failing_stream_lets_its_weights_go(tmp_path):
    make_model(make_config()).save_pretrained(tmp_path)
    source = stream_modules(tmp_path)

    def fail(module, args, output):
        raise RuntimeError("stop")

    handle = source.model.model["layers"][1].mamba.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        source(torch.tensor([[1, 2]]))
    assert all(parameter.is_meta for parameter in source.model.parameters())
    handle.remove()
    assert source(torch.tensor([[1, 2]])).isfinite().all()


def test_streams_refuse_what_loading_refuses(tmp_path):
    model = make_model(make_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected one of"):
        stream_modules(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="missing"):
        stream_modules(tmp_path / "missing")
    values = json.loads((tmp_path / "config.json").read_text())
    values["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="of another shape"):
        stream_modules(tmp_path)
    values["hidden_size"] = -1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError):
        stream_modules(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"), [([5], "1 tokens"), ([], "0 tokens"), ([1, 97], "97"), ([-1, 2], "-1")]
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        dissect(make_model(make_config()), ids)


def test_a_packed_head_is_refused():
    model = make_model(make_config(), dtype=torch.bfloat16)
    if reason := unusable(model):
        pytest.skip(reason)
    with pytest.raises(ValueError, match="packed"):
        dissect(use_onednn(model), [1, 2, 3])


def test_the_document_holds_the_tensors():
    model = make_model(make_config())
    out = dissect(model, prompt(model.config))
    out.tensors["half_life"][0, 0, 0] = math.inf
    document = json.loads(json.dumps(out.to_dict(), allow_nan=False))
    assert document["ids"] == prompt(model.config) and document["dtype"] == "float32"
    assert FalconH1Config.from_dict(document["config"]) == model.config
    assert document["measures"]["half_life"]["values"][0][0][0] is None
    assert list(document["measures"]) == [m.name for m in MEASURES] == list(out.tensors)
    for measure in MEASURES:
        entry, tensor = document["measures"][measure.name], out.tensors[measure.name]
        if measure.name != "half_life":
            assert torch.equal(torch.tensor(entry["values"], dtype=tensor.dtype), tensor)
        assert len(entry["axes"]) == tensor.dim() and entry["meaning"]


def test_plain_numbers():
    values = torch.tensor([[1.5, math.inf], [-math.inf, math.nan]])
    assert plain(values) == [[1.5, None], [None, None]]
    assert plain(torch.tensor(3)) == 3 and plain(torch.tensor([2, 3])) == [2, 3]

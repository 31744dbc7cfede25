"""What the model is beside its public forward: embed, run, logits; twins, moves and embeddings."""

import pytest
import torch
from compiler import needs_compiler
from models import VARIANTS, make_config, make_model, random_ids, relative_error, same_weights

from falcon_h1r import FalconH1ForCausalLM, ops
from falcon_h1r.cache import Span
from falcon_h1r.ops import INDUCTOR, REFERENCE, TORCH

WIDE = ("A_log", "D", "dt_bias")


class Run(torch.nn.Module):
    """Ids and their rotary table to logits, behind a cache's tensors where there are any."""

    def __init__(self, model, span):
        super().__init__()
        self.model, self.others = model, span._replace(cos_bli=None, sin_bli=None)

    def forward(self, ids, cos_bli, sin_bli):
        span = self.others._replace(cos_bli=cos_bli, sin_bli=sin_bli)
        return self.model.logits(self.model.run(self.model.embed(ids), span))


def plain_span(model, ids):
    return Span.plan(model.config, None, ids, None, None, torch.float32)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("variant", ["h1r_like", "two_groups", "no_gated_norm"])
def test_the_run_is_exported(variant, strict):
    model = make_model(make_config(variant)).eval()
    ids = random_ids(model.config, 2, 13)
    span = plain_span(model, ids)
    arguments = (ids, span.cos_bli, span.sin_bli)
    with torch.no_grad():
        program = torch.export.export(Run(model, span), arguments, strict=strict)
        assert relative_error(program.module()(*arguments), model(ids)) < 1e-6


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("table", ["torch", "inductor"])
@torch.no_grad()
def test_the_run_is_compiled_as_one_graph(table):
    model = make_model(make_config("two_groups")).eval()
    ids = random_ids(model.config, 2, 13)
    span = plain_span(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(Run(model.under(table), span), fullgraph=True)
    assert relative_error(compiled(ids, span.cos_bli, span.sin_bli), model(ids)) < 1e-5


@needs_compiler
@pytest.mark.slow
def test_the_run_and_its_backward_are_compiled_as_one_graph_each():
    model = make_model(make_config("two_groups")).train()
    ids = random_ids(model.config, 2, 13)
    span = plain_span(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(Run(model, span), fullgraph=True)
    weights = list(model.parameters())
    found = compiled(ids, span.cos_bli, span.sin_bli)
    expected = model(ids)
    assert relative_error(found.detach(), expected.detach()) < 1e-5
    pairs = zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (found, expected)))
    assert max(relative_error(one, other) for one, other in pairs) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_twin_shares_its_weights_and_computes_by_its_own_table(variant):
    model = make_model(make_config(variant), dtype=torch.float64)
    twin = model.under("reference")
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad():
        model.model["layers"][0].mamba.in_proj.weight.mul_(1.5)
    assert relative_error(twin(ids), model(ids)) < 1e-11
    assert {m.ops for m in twin.modules() if hasattr(m, "ops")} == {REFERENCE}
    assert {m.ops for m in model.modules() if hasattr(m, "ops")} == {TORCH}
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters()):
        assert one is other, name
    with pytest.raises(ValueError, match="no operator table 'fast'; there are: reference"):
        model.under("fast")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_compiled_forms_are_right_without_a_compiler(variant):
    model = make_model(make_config(variant), dtype=torch.float64)
    twin, ids = model.under(INDUCTOR), random_ids(model.config, 2, 70)
    assert relative_error(twin(ids), model(ids)) < 1e-11
    caches = [m.new_cache(2, 71) for m in (model, twin)]
    for piece in ids.split((66, 1, 3), dim=1):
        expected, found = (m(piece, cache=c) for m, c in zip((model, twin), caches))
        assert relative_error(found, expected) < 1e-11
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    assert relative_error(twin(ids, mask), model(ids, mask)) < 1e-11
    with pytest.raises(ValueError, match="INDUCTOR: packed documents"):
        twin(ids, seq_idx=torch.zeros_like(ids))


def test_a_tables_name_and_what_differs():
    assert [repr(table) for table in (REFERENCE, TORCH, INDUCTOR)] == [
        "REFERENCE",
        "TORCH",
        "INDUCTOR",
    ]
    assert repr(TORCH._replace(ssd_scan=REFERENCE.ssd_scan)) == "TORCH with another ssd_scan"
    model = make_model(make_config())
    assert "ops=TORCH" in repr(model) and ops.table("inductor") is INDUCTOR


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_what_enters_exponentials_stays_float32(cast):
    model = make_model(make_config())
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(WIDE)}
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model.dtype == (torch.float16 if cast == "half" else torch.bfloat16) and before
    for name, parameter in model.named_parameters():
        if name.endswith(WIDE):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == model.dtype, name
    assert model.double().model["layers"][0].mamba.D.dtype == torch.float64
    assert model.bfloat16().model["layers"][0].mamba.D.dtype == torch.float32


def test_the_table_follows_the_device_unless_it_was_chosen(monkeypatch):
    """Meta stands for a GPU: nobody has one here."""
    taken = []

    def default_table(device, dtype):
        taken.append(device.type)
        return REFERENCE if device.type == "meta" else TORCH

    monkeypatch.setattr("falcon_h1r.model.default_table", default_table)
    model = FalconH1ForCausalLM(make_config())
    assert model.ops is TORCH
    model.to("meta")
    assert {m.ops for m in model.modules() if hasattr(m, "ops")} == {REFERENCE}
    chosen = FalconH1ForCausalLM(make_config(), ops=TORCH).to("meta")
    assert {m.ops for m in chosen.modules() if hasattr(m, "ops")} == {TORCH}
    loaded = FalconH1ForCausalLM.from_pretrained("h1r-pico")
    assert loaded.to("meta").ops is REFERENCE
    assert FalconH1ForCausalLM.from_pretrained("h1r-pico", ops=TORCH).to("meta").ops is TORCH


def test_a_move_keeps_an_operator_that_was_put_in_by_hand():
    model = make_model(make_config())
    mine = TORCH._replace(ssd_scan=REFERENCE.ssd_scan)
    model = FalconH1ForCausalLM(model.config)
    model.model["layers"][0].mamba.ops = mine
    model.to("cpu").double()
    assert model.model["layers"][0].mamba.ops is mine and model.ops is TORCH


def test_a_compiled_form_leaves_no_graph_in_the_state():
    state, x = torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 3, requires_grad=True)
    INDUCTOR.ssd_step(state, x, torch.ones(1, 2), -torch.ones(2), *torch.ones(2, 1, 1, 4))
    assert not state.requires_grad


@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_embeddings_in_place_of_ids(side):
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    ids, mask = random_ids(model.config, 2, 9), None
    if side != "none":
        mask = torch.ones_like(ids)
        mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    cache, other = model.new_cache(2, 9), model.new_cache(2, 9)
    expected = model(ids, mask, cache)
    found = model(attention_mask=mask, cache=other, inputs_embeds=model.embed(ids))
    assert torch.equal(found, expected) and torch.equal(cache.states, other.states)


def test_embeddings_are_refused_early():
    model = make_model(make_config())
    ids = random_ids(model.config, 1, 3)
    embeds = model.embed(ids)
    for wrong in (embeds[0], embeds[..., :-1], embeds.double(), embeds[:, :0]):
        with pytest.raises(ValueError, match="inputs_embeds: expected torch"):
            model(inputs_embeds=wrong)
    for both in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)


def test_weights_of_a_twin_follow_replacement_of_none():
    """A twin's modules are its own: what is put in place of a layer later is not seen."""
    model = make_model(make_config())
    twin = model.under(TORCH)
    other = same_weights(model)
    model.model["layers"][0] = other.model["layers"][1]
    assert twin.model["layers"][0] is not model.model["layers"][0]

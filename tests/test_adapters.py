"""Hooks and adapters: every module that holds weights is called, in every table and form."""

import pytest
import torch
from compiler import needs_compiler
from models import make_config, make_model, random_ids
from torch import nn

from falcon_h1r.cpu import CompiledPrefill, CompiledStep
from falcon_h1r.ops import INDUCTOR, REFERENCE, TORCH


def with_weights(model):
    return {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(False))}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("table", [REFERENCE, TORCH, INDUCTOR], ids=repr)
@torch.no_grad()
def test_hooks_run_on_every_module_with_weights(table, tie):
    model = make_model(make_config(tie_word_embeddings=tie), ops=table)
    modules, ids = with_weights(model), random_ids(model.config, 2, 11)
    assert {"conv1d", "norm", "embed_tokens"} <= {name.rpartition(".")[2] for name in modules}
    called = []
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(("before", name)))
        module.register_forward_hook(lambda *_, name=name: called.append(("after", name)))
    everything = sorted((when, name) for when in ("before", "after") for name in modules)
    cache = model.new_cache(2, 20)
    for tokens in (ids, ids[:, :1]):
        called.clear()
        model(tokens, cache=cache)
        assert sorted(called) == everything
    called.clear()
    model.under("torch")(ids)
    assert sorted(called) == everything


@torch.no_grad()
def test_a_hook_changes_what_the_convolution_gives():
    model = make_model(make_config())
    ids, mixer = random_ids(model.config, 2, 11), model.model["layers"][0].mamba
    before, cache = model(ids), model.new_cache(2, 20)
    handle = mixer.conv1d.register_forward_hook(lambda _, a, out: (out[0] * 0.5, out[1]))
    assert not torch.allclose(model(ids), before)
    model(ids, cache=cache)
    handle.remove()
    assert torch.equal(model(ids), before)


def test_a_wrapped_convolution_is_refused_by_name():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x)

    model = make_model(make_config())
    mixer = model.model["layers"][0].mamba
    mixer.conv1d = Adapter(mixer.conv1d)
    with pytest.raises(ValueError, match=r"mamba\.conv1d: Adapter, expected CausalConv1d"):
        model(random_ids(model.config, 1, 5))


def test_a_parametrised_convolution_computes():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, ids = make_model(make_config()), random_ids(make_config(), 1, 9)
    conv = model.model["layers"][0].mamba.conv1d
    other = make_model(make_config())
    with torch.no_grad():
        other.model["layers"][0].mamba.conv1d.weight.mul_(2)
    nn.utils.parametrize.register_parametrization(conv, "weight", Twice())
    assert torch.equal(model(ids), other(ids))


@needs_compiler
@pytest.mark.parametrize("name", ["mamba.conv1d", "mamba.norm", "mlp", "everywhere"])
@torch.no_grad()
def test_compiled_forms_refuse_hooks_that_come_later(name):
    model = make_model(make_config(num_hidden_layers=1))
    cache = model.new_cache(1, 64)
    step, prefill = CompiledStep(model, cache), CompiledPrefill(model)
    ids = random_ids(model.config, 1, 9)
    model(ids, cache=cache)
    step(ids[:, 0])
    step(ids[:, 1])  # recorded from here on
    block = model.model["layers"][0]
    if name == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    else:
        module = block.feed_forward.up_proj if name == "mlp" else block.get_submodule(name)
        handle = module.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="CompiledStep: a module has a forward hook"):
            step(ids[:, 2])
        with pytest.raises(ValueError, match="CompiledPrefill: a module has a forward hook"):
            prefill(ids, cache=cache)
    finally:
        handle.remove()
    step(ids[:, 2])
    up = block.feed_forward.up_proj
    plain, up.forward = up.forward, lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        step(ids[:, 3])
    up.forward = plain
    del up.forward
    block.feed_forward.up_proj = nn.Sequential(up)
    with pytest.raises(ValueError, match="a module was replaced"):
        step(ids[:, 3])
    assert int(cache.lengths[0]) == 12


def test_a_twin_of_a_model_with_a_replaced_forward_is_refused():
    model = make_model(make_config())
    layer = model.model["layers"][1].feed_forward
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward: its forward was replaced"):
        model.under("reference")

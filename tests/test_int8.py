"""Int8 linear layers, against the same quantisation written out in float64."""

import pytest
import torch
from models import make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r import FalconH1ForCausalLM, SamplingParams, generate, load_tokenizer
from falcon_h1r.commands.common import locate
from falcon_h1r.cpu.int8 import SEVEN_BITS, Int8Linear, unusable, use_int8
from falcon_h1r.ops import REFERENCE

pytestmark = pytest.mark.skipif(
    bool(reason := unusable(make_model(make_config("h1r_like")))), reason=reason
)
VARIANTS = ["h1r_like", "two_groups", "all_biases", "tied"]


class Written(torch.nn.Module):
    """The layer's arithmetic in float64: both quantised, the product of integers, scaled."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().double()
        self.scale = weight.abs().amax(1) / 127
        self.q, self.bias = (weight / self.scale[:, None]).round(), linear.bias

    def forward(self, x):
        low, high = x.min().double().clamp(max=0), x.max().double().clamp(min=0)
        levels = 127 if SEVEN_BITS else 255
        scale = (high - low) / levels
        zero = (-low / scale).round()
        q = ((x.double() / scale).round() + zero).clamp(0, levels) - zero
        y = (q @ self.q.T) * scale * self.scale
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)


def written(model):
    """A float64 model whose linear layers are quantised as they should be."""
    model = same_weights(model, ops=REFERENCE, dtype=torch.float64)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, Written(child))
    if model.config.tie_word_embeddings:
        head = torch.nn.Linear(1, 1, bias=False)
        head.weight = model.model["embed_tokens"].weight
        model.lm_head = Written(head)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_layer(bias, dtype):
    """Scales per output, which differ a thousandfold; inputs far from symmetric; any shape."""
    linear = torch.nn.Linear(50, 33, bias=bias)
    linear.weight *= torch.logspace(-2, 1, 33)[:, None]
    linear = linear.to(dtype)
    layer, exact = Int8Linear(linear), Written(linear)
    for shape in ((50,), (1, 50), (3, 5, 50)):
        x = (torch.randn(*shape[:-1], 100)[..., ::2] + 0.7).to(dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 33) and y.dtype == dtype
        if dtype == torch.bfloat16:  # one rounding more; its inputs fall on ties of the 8 bits
            assert torch.equal(y, layer(x.float()).to(dtype))
            continue
        expected = exact(x.double()).reshape(-1, 33)
        wrong = (y.double().reshape(-1, 33) - expected).norm(dim=0)
        assert (wrong <= 4e-6 * expected.norm(dim=0)).all()


@torch.no_grad()
def test_an_output_without_weights():
    linear = torch.nn.Linear(8, 4)
    linear.weight[2] = 0
    y = Int8Linear(linear)(torch.randn(3, 8))
    assert torch.equal(y[:, 2], linear.bias[2].expand(3)) and y.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_errs_as_its_quantisation_does(variant):
    """To the float model: rounding differences of the two grow alike through the layers."""
    model = make_model(make_config(variant))
    ids = random_ids(model.config, 2, 21)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)(ids)
    expected = rms_error(written(model)(ids), exact)
    int8 = use_int8(same_weights(model))
    assert 0.5 * expected <= rms_error(int8(ids), exact) <= 2 * expected
    cache = int8.new_cache(2, 21)
    parts = [int8(piece, cache=cache) for piece in ids.split((20, 1), dim=1)]
    assert rms_error(torch.cat(parts, dim=1), exact) <= 2 * expected
    kinds = {type(module) for module in int8.modules()}
    assert torch.nn.Linear not in kinds and isinstance(int8.lm_head, Int8Linear)


def test_the_embedded_model_still_reckons():
    folder = locate("h1r-pico")
    model = use_int8(FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = load_tokenizer(folder)
    for question, answer in (("What is 47+25-8?", 64), ("What is 12+30-5?", 37)):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        out = generate(model, [ids], SamplingParams(max_new_tokens=64), tokenizer=tokenizer)
        assert f"\\boxed{{{answer}}}" in out.texts[0]


def test_refusals(tmp_path):
    model = use_int8(make_model(make_config("h1r_like"), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"weight is packed in int8.* before use_int8"):
        model.save_pretrained(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
    for model, words in (
        (make_model(make_config("h1r_like"), dtype=torch.float64), "the model is torch.float64"),
        (make_model(make_config("h1r_like")).to("meta"), "on a CPU, the model is on meta"),
    ):
        with pytest.raises(ValueError, match=f"use_int8: .*{words}"):
            use_int8(model)

"""generate() calls the model as its user does: hooks, subclasses and FSDP see every forward."""

import pytest
import torch
import torch.distributed as dist
from models import make_config, make_model, random_ids

from falcon_h1r import FalconH1ForCausalLM
from falcon_h1r.generation import SamplingParams, generate

CONFIG = make_config("two_groups")
PROMPTS = [random_ids(CONFIG, length, seed=length).tolist() for length in (9, 4)]
PARAMS = SamplingParams(max_new_tokens=3, stop_token_ids=())


def test_a_hook_on_the_model_sees_the_prefill_and_every_step():
    model, shapes = make_model(CONFIG), []
    model.register_forward_hook(lambda module, args, logits: shapes.append(tuple(args[0].shape)))
    generate(model, PROMPTS, PARAMS)
    assert shapes == [(2, 9), (2, 1), (2, 1)]
    generate(model, PROMPTS, PARAMS, prefill_chunk=5)
    assert shapes[3:] == [(2, 4), (2, 5), (2, 1), (2, 1)]


def test_a_subclass_has_the_last_word_in_the_prefill_too():
    class Favours40(FalconH1ForCausalLM):
        def forward(self, *args, **kwargs):
            logits = super().forward(*args, **kwargs)
            return torch.nn.functional.pad(logits[..., :40], (0, 57), value=-100.0) + (
                torch.arange(97) == 40
            ) * (200.0)

    plain = make_model(CONFIG)
    model = Favours40(CONFIG)
    model.load_state_dict(plain.state_dict())
    out = generate(model, PROMPTS, PARAMS)
    assert [ids.tolist() for ids in out.sequences] == [[40] * 3] * 2


@pytest.fixture
def one_rank(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_generates_what_the_whole_one_does(one_rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = make_model(CONFIG)
    expected = generate(model, PROMPTS, PARAMS)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    found = generate(model, PROMPTS, PARAMS)
    for one, other in zip(found.sequences, expected.sequences, strict=True):
        assert torch.equal(one, other)

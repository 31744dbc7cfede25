"""The transformers model with the weights of ours: the independent witness of the parity tests."""

import torch
from transformers import FalconH1Config as WitnessConfig
from transformers import FalconH1ForCausalLM as WitnessModel


def make_witness(model, dtype=None):
    """transformers' model for `model`'s config and weights, in eval mode, on the same dtype."""
    values = model.config.to_dict() | {"time_step_limit": model.config.time_step_limit}
    config = WitnessConfig(**values)
    config._attn_implementation = "sdpa"
    witness = WitnessModel(config)
    missing, unexpected = witness.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    if config.tie_word_embeddings:
        witness.tie_weights()
    return witness.to(dtype or model.dtype).eval()


@torch.no_grad()
def witness_logits(witness, input_ids, **kwargs):
    return witness(input_ids, use_cache=False, **kwargs).logits

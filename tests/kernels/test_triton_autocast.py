"""The kernels under torch.autocast: linear layers alone multiply in its dtype."""

import pytest
import torch
from models import make_config, make_model, random_ids, rms_error, same_weights

from falcon_h1r.ops import REFERENCE, TORCH, TRITON


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["two_groups", "no_gated_norm"])
@torch.no_grad()
def test_model_with_padding_and_cache(variant, dtype):
    model = make_model(make_config(variant, num_hidden_layers=2), ops=TRITON)
    exact = same_weights(model, ops=REFERENCE, dtype=torch.float64)
    plain = same_weights(model, ops=TORCH)
    ids = random_ids(model.config, 2, 19)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    found = {}
    for name, each in {"ours": model, "torch": plain, "exact": exact}.items():
        cache = each.new_cache(2, 30)
        with torch.autocast("cpu", dtype=dtype):
            pieces = [each(ids, attention_mask=mask, cache=cache)]
            pieces += [each(ids[:, :5], cache=cache)]
            pieces += [each(ids[:, i : i + 1], cache=cache) for i in range(2)]
            pieces += [each(ids, seq_idx=torch.arange(19).expand(2, -1) // 7)]
        found[name] = torch.cat(pieces, 1)
    assert found["ours"].dtype == torch.float32
    assert rms_error(found["ours"], found["exact"]) < 2 * rms_error(found["torch"], found["exact"])

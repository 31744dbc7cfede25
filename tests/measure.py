"""How far the package and transformers are from the float64 forward, on the tiny random models.

Shared by `test_parity.py`, which judges the numbers, and `tools/parity_table.py`, which prints
them.
"""

from typing import NamedTuple

import torch
from models import make_config, make_model, random_ids, rms_error, same_weights
from witness import make_witness, witness_logits

from falcon_h1r.ops import REFERENCE

SEEDS = range(6)
SHAPE = (4, 64)  # batch, length: eight chunks of the tiny configurations


class Distances(NamedTuple):
    """Root mean square differences of logits, over that of the float64 logits."""

    ours: float  # ours to the float64 forward
    witness: float  # transformers to the float64 forward
    apart: float  # ours to transformers


def rounded_model(variant: str, dtype: torch.dtype, seed: int):
    """A model in `dtype` whose every parameter, A_log, D and dt_bias too, is a value of `dtype`.

    So the float64 forward, ours and transformers', which keeps those three in `dtype`, all start
    from the same numbers, as they do with a released bfloat16 checkpoint.
    """
    model = make_model(make_config(variant), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return same_weights(model, dtype=dtype)


@torch.no_grad()
def logit_distances(variant: str, dtype: torch.dtype, seeds=SEEDS, shape=SHAPE) -> Distances:
    """One variant of `models.VARIANTS` in one dtype; the logits of all seeds together."""
    ours, witness, truth = [], [], []
    for seed in seeds:
        model = rounded_model(variant, dtype, seed)
        ids = random_ids(model.config, *shape, seed=seed + 1)
        ours.append(model(ids))
        witness.append(witness_logits(make_witness(model), ids))
        truth.append(same_weights(model, ops=REFERENCE, dtype=torch.float64)(ids))
    ours, witness, truth = torch.cat(ours), torch.cat(witness), torch.cat(truth)
    return Distances(rms_error(ours, truth), rms_error(witness, truth), rms_error(ours, witness))

"""Random weights under which a fault anywhere in a block shows in what the block returns.

Fresh weights are small and the multipliers smaller: attention is near uniform whatever the keys,
one step hardly moves a state, and a block adds little to its residual stream. A correctness check
there would see the stream and nothing else. Times do not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..model import FalconH1ForCausalLM

_SEGMENT = 4.0  # undoes the mixer's segment multipliers, about a quarter each
_DT_BIAS = (-3.0, 0.0)  # softplus of it: steps of 0.05 to 0.7


@torch.no_grad()
def excite(model: FalconH1ForCausalLM, seed: int, forward: Callable[[], Any]) -> None:
    """Give the blocks of `model` such weights, in place.

    Projections keep the size of what they project; keys, and the mixer's inputs, are as large as
    without their multipliers; steps are long. forward: runs the model once, during which the three
    output projections of each block are scaled until what each adds has a root mean square of 1.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    config, hooks = model.config, []
    for block in model.model["layers"]:
        attention, mixer, mlp = block.self_attn, block.mamba, block.feed_forward
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
        attention.k_proj.weight.div_(config.key_multiplier)
        mixer.in_proj.weight.mul_(_SEGMENT / config.ssm_in_multiplier)
        mixer.dt_bias.uniform_(*_DT_BIAS, generator=generator)
        for module, projection, multiplier in (
            (attention, attention.o_proj, config.attention_out_multiplier),
            (mixer, mixer.out_proj, config.ssm_out_multiplier),
            (mlp, mlp.down_proj, 1.0),
        ):
            hook = _unit_output(projection, multiplier)
            hooks.append(module.register_forward_hook(hook))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()


def _unit_output(projection: torch.nn.Linear, multiplier: float) -> Callable:
    def hook(module, args, output):
        scale = 1 / float(output.float().square().mean().sqrt() * multiplier)
        projection.weight.mul_(scale)
        if projection.bias is not None:
            projection.bias.mul_(scale)
        return output * scale

    return hook

"""Losses of a model: its forward, with the head and the cross-entropy as one operator behind it.

Targets stand at the position that predicts them: those of plain text are the ids, moved by one.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import as_integers
from .cross_entropy import linear_cross_entropy, linear_logprobs


def next_token_loss(
    model,
    input_ids: Tensor,
    targets_bl: Tensor,
    *,
    weights_bl: Tensor | None = None,
    ignore_index: int = -100,
    **options,
) -> Tensor:
    """The sum over positions of weight times -log p(target), a scalar in `compute_dtype`.

    input_ids: (b, l); targets_bl: (b, l) integers, of which `ignore_index` counts for nothing, as
    padding must; weights_bl: (b, l), None: 1. options: `attention_mask`, `seq_idx`, `recompute` and
    `inputs_embeds` of the model's forward, which it is called by. Divide by the sum of weights for
    a mean. The logits never exist at once. Raises ValueError for what does not fit.
    """
    targets_bl = _like_ids(targets_bl, input_ids)
    if weights_bl is not None:
        if weights_bl.shape != targets_bl.shape:
            raise ValueError(
                f"weights: shape {tuple(weights_bl.shape)}, expected {tuple(targets_bl.shape)}"
            )
        weights_bl = weights_bl.flatten()

    def head(x_bld: Tensor) -> Tensor:
        return linear_cross_entropy(
            *(x_bld.flatten(0, 1), head_weight(model), targets_bl.flatten()),
            multiplier=model.config.lm_head_multiplier,
            weights_t=weights_bl,
            ignore_index=ignore_index,
        )

    return model(input_ids, head=head, **options)


def next_token_logprobs(
    model, input_ids: Tensor, targets_bl: Tensor, *, temperature: float = 1.0, **options
) -> tuple[Tensor, Tensor]:
    """log p(target) at each position and the entropy there, both (b, l) in `compute_dtype`.

    As `next_token_loss`; each target must be a word: give any to a position that does not count,
    and leave its result out. temperature: the logits are divided by it.
    """
    targets_bl = _like_ids(targets_bl, input_ids)

    def head(x_bld: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(
            *(x_bld.flatten(0, 1), head_weight(model), targets_bl.flatten()),
            multiplier=model.config.lm_head_multiplier,
            temperature=temperature,
        )
        return tuple(t.view(targets_bl.shape) for t in found)

    return model(input_ids, head=head, **options)


def head_weight(model) -> Tensor:
    """The head's weight (v, d), its adapter added; the embedding's where both are one.

    Raises ValueError for a head of packed weights.
    """
    head = model.model["embed_tokens"] if model.config.tie_word_embeddings else model.lm_head
    weight = head._parameters.get("weight")
    if weight is None:
        raise ValueError(f"the head is a {type(head).__name__}, which has no gradient")
    return weight + head.lora_delta().to(weight.dtype) if hasattr(head, "lora_delta") else weight


def _like_ids(targets, input_ids) -> Tensor:
    shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else None
    return as_integers("targets", targets, shape)
